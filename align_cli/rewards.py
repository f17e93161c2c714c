"""The `reward` group: how the ratings of the data become the rewards of a loss.

Hard and smoothed labels are ways of making rewards, never flags of a loss: a loss that weighs responses by
softmax(rewards/α) sees exactly the label.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from align_cli.ranges import Positive, PositiveBelowHalf

LABELS = ("hard", "smoothed")  # rewards that say which response is best, and not how good each is


def given(ratings: Tensor) -> Tensor:
    """The ratings as they are, (B, K)."""
    return ratings


def hard(ratings: Tensor, *, ties: Literal["split", "first"]) -> Tensor:
    """The logarithm of a one-hot label on the best response.

    Args:
        ratings: (B, K).
        ties: whether the best responses share the label or the first of them has it.

    Returns:
        (B, K), 0 for the best and -∞ for the others; softmax(hard/α) is the label for every α.
    """
    best = ratings == ratings.amax(dim=-1, keepdim=True)
    if ties == "first":
        best = best & (best.cumsum(dim=-1) == 1)
    return torch.zeros_like(ratings).masked_fill(~best, -torch.inf)


def smoothed(ratings: Tensor, *, label_smoothing: PositiveBelowHalf, alpha: Positive) -> Tensor:
    """The logarithm of a label of 1 - ε on the best response and ε on the others together, times α.

    Args:
        ratings: (B, K), K >= 2; equally rated best responses share the label, and all of them where none is worse.
        label_smoothing: ε.
        alpha: the reward temperature of the loss.

    Returns:
        (B, K) such that softmax(smoothed/α) is the label. EXO-pref, arXiv:2402.00856, eq. (16), on pairs.
    """
    best = ratings == ratings.amax(dim=-1, keepdim=True)
    tied = best.sum(dim=-1, keepdim=True).to(ratings.dtype)
    worse = ratings.shape[-1] - tied
    top = math.log1p(-label_smoothing) * (worse > 0).to(ratings.dtype) - tied.log()
    return alpha * torch.where(best, top, math.log(label_smoothing) - worse.clamp(min=1).log())


def contrastive(ratings: Tensor, baselines: Tensor, *, aggregate: Literal["mean", "median", "max", "min"]) -> Tensor:
    """The ratings against what the starting model's responses to the same prompt were rated.

    What a rater adds to all responses of a prompt drops out. Shen et al., "Improving Reinforcement Learning from Human
    Feedback Using Contrastive Rewards", arXiv 2403.07708, whose aggregate is the mean.

    Args:
        ratings: (B, K).
        baselines: (B, N) ratings of N responses of the starting model.
        aggregate: of the baselines; the median of an even number lies between the middle two.

    Returns:
        (B, K). With the mean, its expectation is 0 for each prompt while the policy is the starting model.
    """
    aggregates = {
        "mean": baselines.mean(-1),
        "median": baselines.quantile(0.5, dim=-1),
        "max": baselines.amax(-1),
        "min": baselines.amin(-1),
    }
    return ratings - aggregates[aggregate][:, None]
