"""Columns and gradients for the proofs about losses."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

NO_REWARD = float("-inf")


def random_columns(prompts: int = 3, responses: int = 4, tokens: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """One float64 batch with every column that a loss may ask for, policy unlike reference."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    apart = torch.Generator().manual_seed(seed + 1)
    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (prompts, responses, 1), generator=apart)

    def inside(*shape: int) -> Tensor:
        return normal(*shape).where(mask, 0.0)

    pairs = torch.rand(prompts, responses, responses, generator=random, dtype=torch.float64)
    pairs = pairs * (1 - torch.eye(responses, dtype=torch.float64))
    return {
        "policy": -20 + 3 * normal(prompts, responses),
        "policy_tokens": -inside(prompts, responses, tokens).abs(),
        "reference": -20 + 3 * normal(prompts, responses),
        "rewards": normal(prompts, responses),
        "lengths": torch.randint(3, 9, (prompts, responses), generator=random),
        "pairs": pairs / pairs.sum((-2, -1), keepdim=True),
        "mismatch_kl": normal(1).abs().expand(prompts),
        "behavior": -20 + 3 * normal(prompts, responses),
        "target": -22 + 3 * normal(prompts, responses),
        "log_z": -2 + normal(prompts),
        "mask": mask,
        "behavior_tokens": -inside(prompts, responses, tokens).abs(),
        "reference_tokens": -inside(prompts, responses, tokens).abs(),
        "values": inside(prompts, responses, tokens),
        "old_values": inside(prompts, responses, tokens),
        "token_rewards": inside(prompts, responses, tokens),
        "advantages": inside(prompts, responses, tokens),
        "returns": inside(prompts, responses, tokens),
        "scores": normal(prompts, responses),
    }


def one_pair(prompts: int = 1) -> Tensor:
    """(prompts, 2, 2): the first of two responses is preferred."""
    return torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64).expand(prompts, 2, 2)


def as_reals(*values: float) -> Tensor:
    """(1, K) float64."""
    return torch.tensor([values], dtype=torch.float64)


def gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Of the sum of the function's elements."""
    point = at.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(point).sum(), point)
    return slope


def mean_over_single_pairs(function: Callable[..., Tensor], columns: Sequence[Tensor], pairs: Tensor) -> Tensor:
    """The weighted mean of what `function` gives to each pair by itself, cut out of the (B, K) columns; (B,)."""
    prompts, responses, _ = pairs.shape
    total = torch.zeros(prompts, dtype=torch.float64)
    for i in range(responses):
        for j in range(responses):
            if i != j:
                two = [column[:, [i, j]] for column in columns]
                total = total + pairs[:, i, j] * function(*two, one_pair(prompts))
    return total
