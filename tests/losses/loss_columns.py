"""Columns and gradients for the proofs about losses."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

NO_REWARD = float("-inf")


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
