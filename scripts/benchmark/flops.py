"""How many floating-point operations a step needs, and how fast this machine multiplies matrices.

Counted is what any implementation must do, with nothing twice: no padding, no recomputation, one copy of each prompt.
For a group of a prompt of P tokens and responses of R_k tokens,

    6 N (P + Σ R_k)                                       the blocks' matrices, N weights, forward and backward
    12 L d [P(P+1)/2 + Σ (R_k P + R_k (R_k+1)/2)]         attention: scores and values, causal, nothing masked
    6 V H Σ R_k                                           the head, at response positions alone

with L layers, d = heads x head width, V tokens in the vocabulary and H the width. With a copy of the prompt for each
response the first two are those of K sequences of P + R_k tokens; the head's is the same. The optimizer, norms,
rotations and softmaxes are not counted, though they take time.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmark.lengths import Lengths
from benchmark.shapes import Shape

FORMULA = "6 N (P + ΣR) + 12 L d [P(P+1)/2 + Σ(R P + R(R+1)/2)] + 6 V H ΣR"


def group_flops(shape: Shape, lengths: Lengths, *, shared: bool = True) -> np.ndarray:
    """(n,) operations for forward and backward of each group, with one copy of its prompt or one for each response."""
    prompts, responses = lengths.prompts.astype(float), lengths.responses.astype(float)
    tokens = (lengths.unique() if shared else lengths.logical()).astype(float)
    blocks = 6 * shape.matrix_weights * tokens
    own = prompts * (prompts + 1) / 2 * (1 if shared else responses.shape[1])
    seen = own + (responses * prompts[:, None] + responses * (responses + 1) / 2).sum(1)
    attention = 12 * shape.layers * shape.heads * shape.head_width * seen
    head = 6 * shape.vocabulary * shape.hidden * responses.sum(1)
    return blocks + attention + head


def matrices(shape: Shape) -> dict[str, tuple[int, int, int]]:
    """The matrices of a forward pass: (rows out, columns in, how many of them)."""
    width = shape.heads * shape.head_width
    narrow = shape.kv_heads * shape.head_width
    return {
        "q": (width, shape.hidden, shape.layers),
        "k, v": (narrow, shape.hidden, 2 * shape.layers),
        "o": (shape.hidden, width, shape.layers),
        "gate, up": (shape.intermediate, shape.hidden, 2 * shape.layers),
        "down": (shape.hidden, shape.intermediate, shape.layers),
        "head": (shape.vocabulary, shape.hidden, 1),
    }


def weighted_rate(rates: dict[str, float], shape: Shape, *, response_share: float) -> float:
    """The rate at which a model's products run, operations per second.

    Args:
        rates: of each kind of matrix (`matrices`).
        response_share: of the tokens, those whose logits are needed.
    """
    work = {
        name: rows * columns * count * (response_share if name == "head" else 1.0)
        for name, (rows, columns, count) in matrices(shape).items()
    }
    seconds = sum(work[name] / rates[name] for name in work)
    return sum(work.values()) / seconds


def measure_rates(shapes: list[Shape], *, tokens: int, seconds: float, square: int) -> dict[str, Any]:
    """Products of this machine in operations per second, in this process and with its threads.

    Args:
        tokens: rows of the activations.
        seconds: how long each product is repeated, at least three times.
        square: side of the square product that stands for the best that is to be had.
    """
    import torch

    settings = (
        ("bf16", torch.bfloat16, "highest"),
        ("fp32 highest", torch.float32, "highest"),
        ("fp32 medium", torch.float32, "medium"),
    )
    found: dict[str, Any] = {"tokens": tokens, "square": square, "threads": torch.get_num_threads()}
    for name, dtype, precision in settings:
        torch.set_float32_matmul_precision(precision)
        rates: dict[str, Any] = {"square": product_rate(square, square, square, dtype, seconds)}
        for shape in shapes:
            rates[shape.name] = {
                kind: product_rate(tokens, columns, rows, dtype, seconds)
                for kind, (rows, columns, _) in matrices(shape).items()
            }
        found[name] = rates
    return found


def product_rate(tokens: int, columns: int, rows: int, dtype: Any, seconds: float) -> float:
    """Operations per second of a linear layer's three products: output, gradient of the input, of the weight."""
    import torch

    data, weight = torch.randn(tokens, columns).to(dtype), torch.randn(rows, columns).to(dtype)
    slope = torch.randn(tokens, rows).to(dtype)

    def once() -> None:
        torch.mm(data, weight.T)
        torch.mm(slope, weight)
        torch.mm(slope.T, data)

    return 6 * tokens * columns * rows / best(once, seconds)


def best(once: Callable[[], object], seconds: float) -> float:
    """The shortest time of a call, of as many as fit into so many seconds, at least three."""
    once()
    found, begun, done = float("inf"), time.perf_counter(), 0
    while done < 3 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        once()
        found = min(found, time.perf_counter() - start)
        done += 1
    return found


if __name__ == "__main__":
    from benchmark import worker
    from benchmark.shapes import SHAPES

    job = worker.read_job()
    worker.write_result(
        measure_rates(
            [SHAPES[name] for name in job["shapes"]],
            tokens=job["tokens"],
            seconds=job["seconds"],
            square=job["square"],
        )
    )
