"""The least time that a step can take on this machine, whatever computes it.

A step needs more than its matrices' products at their rate (`benchmark.flops`): attention multiplies with a head's few
columns, which is slower; every logit and every attention weight is the exponential of something; and AdamW reads and
writes all weights and moments. The floor is the sum of these four, each as fast as PyTorch does it alone in a loop.
Norms, rotations, sums, the second exponential of what was not kept, and all moving of memory between are left out.
"""

from collections.abc import Mapping
from typing import Any

from benchmark.flops import best
from benchmark.lengths import TABLES, Table
from benchmark.shapes import SHAPES, Shape

ELEMENTS = 1 << 18  # of a block of exponentials: 1 MB, which a core's cache holds


def seconds_per_group(settings: Mapping[str, Any], shape: Shape, rates: Mapping[str, Any], products: float) -> float:
    """The least seconds of a group.

    Args:
        settings: of a case, as `results.case_settings` writes them.
        rates: of the case's model, from `measure`.
        products: operations per second of the matrices' products.
    """
    head = 6 * shape.vocabulary * shape.hidden * settings["response_tokens_per_group"]
    matrices = 6 * shape.matrix_weights * settings["unique_tokens_per_group"] + head
    attention = settings["flops_per_group"] - matrices
    weights = attention / (12 * shape.head_width)  # of attention, over heads and layers
    logits = shape.vocabulary * settings["response_tokens_per_group"]
    return (
        matrices / products
        + attention / rates["attention"][settings["lengths"]]
        + (weights + logits) / rates["exponentials"]
        + shape.weights / rates["AdamW"] / settings["groups_per_step"]
    )


def measure(shape: Shape, *, seconds: float) -> dict[str, Any]:
    """What `seconds_per_group` needs of this machine.

    Args:
        seconds: how long each part is repeated, at least three times.

    Returns:
        `attention`, operations per second at each table's mean lengths; `exponentials` per second; weights per second
        of `AdamW`.
    """
    attention = {table.name: attention_rate(shape, table, seconds) for table in TABLES.values()}
    return {
        "attention": attention,
        "exponentials": exponential_rate(seconds),
        "AdamW": optimizer_rate(shape, seconds),
    }


def attention_rate(shape: Shape, table: Table, seconds: float) -> float:
    """Operations per second of the six products of a prompt's and a response's attention in bf16, all heads at once."""
    import torch

    def made(*sizes: int) -> torch.Tensor:
        return torch.randn(shape.heads, *sizes).to(torch.bfloat16)

    prompt, response = round(table.prompt), round(table.response)
    sizes = [(prompt, prompt), (response, prompt + response)]
    work = [
        (made(queries, shape.head_width), made(keys, shape.head_width), made(queries, keys)) for queries, keys in sizes
    ]

    def once() -> None:
        for query, key, weights in work:
            # forward, and each of the two products' two slopes
            for one, other in (
                (query, key.mT),
                (weights, key),
                (query, key.mT),
                (weights.mT, query),
                (weights, key),
                (weights.mT, query),
            ):
                torch.bmm(one, other)

    pairs = sum(queries * keys for queries, keys in sizes)
    return 12 * shape.heads * shape.head_width * pairs / best(once, seconds)


def exponential_rate(seconds: float) -> float:
    """fp32 exponentials per second."""
    import torch

    block, out = torch.randn(ELEMENTS), torch.empty(ELEMENTS)
    return ELEMENTS / best(lambda: torch.exp(block, out=out), seconds)


def optimizer_rate(shape: Shape, seconds: float) -> float:
    """Weights per second of fused AdamW in fp32, on a tensor of all of them."""
    import torch

    weights = torch.zeros(shape.weights, requires_grad=True)
    weights.grad = torch.ones_like(weights)
    optimizer = torch.optim.AdamW([weights], lr=1e-6, fused=True)
    return shape.weights / best(optimizer.step, seconds)


if __name__ == "__main__":
    from benchmark import worker

    job = worker.read_job()
    worker.write_result({name: measure(SHAPES[name], seconds=job["seconds"]) for name in job["shapes"]})
