"""What the values of a claim, one for each seed, say of it: it holds, it does not, or they cannot tell.

The seeds are the independent observations. A claim holds where the whole 95 % interval of Student's t satisfies it, it
does not hold where the whole interval contradicts it, and anything else is undecided. Mathematics has no interval: an
exact claim is held to every value.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from align_cli import statistics

Verdict = Literal["holds", "does not hold", "undecided", "unknown", "failed"]

ENOUGH = 5  # seeds below which no interval is trusted


@dataclass(frozen=True)
class Range:
    """The values that satisfy a claim, from `low` to `high`; where `strict`, without these two."""

    low: float
    high: float
    strict: bool

    def contains(self, low: float, high: float) -> bool:
        """Whether all from `low` to `high` is inside."""
        if self.strict:
            return self.low < low and high < self.high
        return self.low <= low and high <= self.high

    def excludes(self, low: float, high: float) -> bool:
        """Whether all from `low` to `high` is outside."""
        if self.strict:
            return high <= self.low or low >= self.high
        return high < self.low or low > self.high


@dataclass(frozen=True)
class Judged:
    """A claim's mean over seeds, its interval, the verdict, and why it is no other where that needs a word."""

    estimate: float | None
    low: float | None
    high: float | None
    verdict: Verdict
    why: str


def judge(values: Sequence[float], wanted: Range | None, *, exact: bool) -> Judged:
    """Hold values against a claim.

    Args:
        values: one for each seed; of a difference or a slope as well.
        wanted: None where nobody knows what to expect.
        exact: whether the claim is mathematics, which one value suffices to contradict and none needs an interval for.
    """
    odd = next((value for value in values if not math.isfinite(value)), None)
    if not values or odd is not None:
        told = f"a value is {odd}" if values else "there is no value"
        return Judged(None, None, None, "does not hold" if exact and values else "undecided", told)
    estimate, low, high = math.fsum(values) / len(values), None, None
    if len(values) > 1:
        estimate, low, high = statistics.student(values)
    if wanted is None:
        return Judged(estimate, low, high, "unknown", "what to expect could not be sourced")
    if exact:
        wrong = [value for value in values if not wanted.contains(value, value)]
        told = f"{len(wrong)} of {len(values)} values are outside" if wrong else ""
        return Judged(estimate, low, high, "does not hold" if wrong else "holds", told)
    if len(values) < ENOUGH:
        return Judged(estimate, low, high, "undecided", f"{len(values)} of the {ENOUGH} seeds that a verdict needs")
    assert low is not None and high is not None, "several values have an interval"
    if wanted.contains(low, high):
        return Judged(estimate, low, high, "holds", "")
    if wanted.excludes(low, high):
        return Judged(estimate, low, high, "does not hold", "the whole interval contradicts it")
    return Judged(estimate, low, high, "undecided", "a bound lies within the interval")


def slope(values: Sequence[float]) -> float:
    """The least-squares slope of values over their order 0, 1, 2, ...; their change from one to the next, on average.

    Args:
        values: (n,), n >= 2.

    Raises:
        ValueError: fewer than two.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} values have no slope; expected at least two.")
    middle = (len(values) - 1) / 2
    offsets = [place - middle for place in range(len(values))]
    return math.fsum(o * v for o, v in zip(offsets, values, strict=True)) / math.fsum(o * o for o in offsets)
