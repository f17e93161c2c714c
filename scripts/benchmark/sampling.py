"""`align_cli.generation.sample` beside transformers' own `generate`, in one process, on the same batch.

The stop token is one that the vocabulary does not have: both sides look for it and neither finds it, so both draw
the same number of tokens. align reads a prompt once for all of its responses; both keep a cache of keys and values.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from align_cli.generation import sample
from benchmark import groups, worker
from benchmark.lengths import draw, fixed
from benchmark.shapes import SHAPES


def samplers(
    model: PreTrainedModel, prompts: list[list[int]], *, responses: int, new_tokens: int, pad_id: int
) -> dict[str, Callable[[int], int]]:
    """Both sides as functions of a seed, which give the number of tokens that they drew."""
    never = model.config.vocab_size
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def align(seed: int) -> int:
        drawn = sample(
            model,
            prompts,
            responses=responses,
            max_new_tokens=new_tokens,
            temperature=1.0,
            seeds=[(seed, place) for place in range(len(prompts))],
            batch=len(prompts) * responses,
            pad_id=pad_id,
            eos_ids=[never],
        )
        return sum(len(each.tokens) for _, group in drawn for each in group)

    def generate(seed: int) -> int:
        torch.manual_seed(seed)
        found = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=responses,
            max_new_tokens=new_tokens,
            eos_token_id=never,
            pad_token_id=pad_id,
            use_cache=True,
        )
        return found[:, width:].numel()

    return {"align": align, "generate": generate}


def alternate(sides: dict[str, Callable[[int], int]], *, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each side in each round; who begins alternates, and a first round is thrown away."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
            begun = time.perf_counter()
            tokens = sides[name](number)
            if number > 0:
                speeds[name].append(tokens / (time.perf_counter() - begun))
    return speeds


def main() -> None:
    job = worker.read_job()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    table = fixed(job["prompt"], job["new_tokens"])
    lengths = draw(table, groups=job["prompts"], responses=job["responses"], seed=0)
    written = groups.fill(lengths, vocabulary=SHAPES[job["shape"]].vocabulary, seed=0)
    prompts = [np.asarray(group.prompt).tolist() for group in written]
    sides = samplers(model, prompts, responses=job["responses"], new_tokens=job["new_tokens"], pad_id=0)
    worker.write_result(alternate(sides, rounds=job["rounds"]))


if __name__ == "__main__":
    main()
