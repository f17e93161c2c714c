"""What reinforcement learning makes of ratings beside the functions of `align_cli.advantages`: it looks at whole steps.

rewards -> token_rewards (the KL penalty) -> raw_advantages (the `advantage` group) -> advantages, returns
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from align_cli import advantages, distributed
from align_cli.ranges import Count, NonNegative, Positive


@dataclass(frozen=True, kw_only=True)
class FixedKL:
    """The `kl` section: a penalty that stays."""

    name: Literal["fixed"]
    beta: NonNegative


@dataclass(frozen=True, kw_only=True)
class AdaptiveKL:
    """The `kl` section: a penalty that is led so that the KL comes near `target` (`advantages.adapted`)."""

    name: Literal["adaptive"]
    beta: Positive
    target: Positive
    horizon: Count


class TokenRewards:
    """The column `token_rewards`.

    Attributes:
        beta: strength of the penalty in the present step.
        following: and in the next one.

    Args:
        options: how it is chosen.
        state: of an earlier session, see `state`.
    """

    def __init__(self, options: FixedKL | AdaptiveKL, state: Mapping[str, float] | None = None) -> None:
        self.options = options
        self.following = options.beta if state is None else state["beta"]
        self.beta = self.following

    def gather(self, filled: Sequence[Mapping[str, Any]]) -> None:
        """Begin a step; every rank calls it with the columns of its own micro-batches."""
        self.beta = self.following
        if isinstance(self.options, FixedKL):
            return
        counted = [columns for columns in filled if columns["batch"].counted]
        kl = sum(float((c["behavior_tokens"].double() - c["reference_tokens"]).sum()) for c in counted)
        totals = distributed.gather((kl, sum(c["ratings"].numel() for c in counted)))
        kl, samples = (sum(column) for column in zip(*totals, strict=True))
        told = {"target": self.options.target, "horizon": self.options.horizon}
        self.following = advantages.adapted(self.beta, kl / samples, samples=samples, **told)

    def __call__(self, rewards: Tensor, behavior_tokens: Tensor, reference_tokens: Tensor, mask: Tensor) -> Tensor:
        return advantages.token_rewards(rewards, behavior_tokens, reference_tokens, mask, beta=self.beta)

    def state(self) -> dict[str, float]:
        """The strength for the next step."""
        return {"beta": self.following}


class Scaled:
    """The column `rewards` of contrastive rewards, brought to the size of the ratings that they were made of.

    λ r, where λ is the mean of |rating| over all samples so far by that of |r|, within `BOUNDS`. The paper names such a
    dynamic scaling (arXiv 2403.07708) without a form that could be read; this one keeps the balance to the KL penalty
    where a baseline takes most of the ratings away.

    Args:
        contrast: (ratings, baselines) -> rewards.
        state: of an earlier session, see `state`.
    """

    BOUNDS = (0.1, 10.0)

    def __init__(self, contrast: Callable[[Tensor, Tensor], Tensor], state: Mapping[str, float] | None = None) -> None:
        self.contrast = contrast
        self.before, self.after = (0.0, 0.0) if state is None else (state["before"], state["after"])

    @property
    def scale(self) -> float:
        """λ."""
        low, high = self.BOUNDS
        return 1.0 if self.after == 0 else min(max(self.before / self.after, low), high)

    def gather(self, filled: Sequence[Mapping[str, Any]]) -> None:
        """Take in the samples of a step; every rank calls it with the columns of its own micro-batches."""
        counted = [(c["ratings"], c["baselines"]) for c in filled if c["batch"].counted]
        before = sum(float(ratings.double().abs().sum()) for ratings, _ in counted)
        after = sum(float(self.contrast(*pair).double().abs().sum()) for pair in counted)
        for more_before, more_after in distributed.gather((before, after)):
            self.before, self.after = self.before + more_before, self.after + more_after

    def __call__(self, ratings: Tensor, baselines: Tensor) -> Tensor:
        return self.scale * self.contrast(ratings, baselines)

    def state(self) -> dict[str, float]:
        """The sums."""
        return {"before": self.before, "after": self.after}


class Whitened:
    """The column `advantages`: as they are, or brought to mean 0 and deviation 1 over all response tokens of a step."""

    def __init__(self, whiten: bool) -> None:
        self.whiten = whiten
        self.moments = torch.zeros(3, dtype=torch.float64)

    def gather(self, filled: Sequence[Mapping[str, Any]]) -> None:
        """Begin a step; every rank calls it with the columns of its own micro-batches."""
        if not self.whiten:
            return
        mine = [
            torch.stack(advantages.moments(columns["raw_advantages"], columns["mask"])).tolist()
            for columns in filled
            if columns["batch"].counted
        ]
        every = [moments for theirs in distributed.gather(mine) for moments in theirs]
        self.moments = torch.tensor(every, dtype=torch.float64).sum(0)

    def __call__(self, raw_advantages: Tensor, mask: Tensor) -> Tensor:
        if not self.whiten:
            return raw_advantages
        mean, deviation = (value.to(mask.device) for value in advantages.spread(*self.moments))
        return advantages.whiten(raw_advantages, mask, mean, deviation)


def summed(reference_tokens: Tensor) -> Tensor:
    """The column `reference` where its tokens are known."""
    return reference_tokens.sum(-1)
