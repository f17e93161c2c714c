"""95 % intervals of the figures that a run reports."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

NORMAL_97_5 = 1.959963984540054
RESAMPLES = 2000


class Interval(NamedTuple):
    """An estimate with the bounds of its 95 % interval."""

    estimate: float
    low: float
    high: float


def wilson(successes: float, trials: float) -> Interval:
    """A proportion with Wilson's score interval (E. B. Wilson, JASA 22, 1927), which stays within [0, 1].

    Args:
        successes: between 0 and `trials`; both may be fractional, as effective numbers are.
        trials: at least one.

    Raises:
        ValueError: fewer trials than one, or successes outside [0, trials].
    """
    if not trials >= 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials; expected 0 <= successes <= trials, trials >= 1.")
    proportion = successes / trials
    z2 = NORMAL_97_5**2 / trials
    centre = (proportion + z2 / 2) / (1 + z2)
    half = math.sqrt(NORMAL_97_5**2 * proportion * (1 - proportion) / trials + z2**2 / 4) / (1 + z2)
    return Interval(proportion, max(0.0, min(proportion, centre - half)), min(1.0, max(proportion, centre + half)))


def clustered_proportion(fractions: Sequence[float]) -> Interval:
    """A proportion from clusters of equal size: the mean of each cluster's fraction of successes.

    Wilson's interval at the effective number of trials p (1 - p) / Var(mean), as E. L. Korn and B. I. Graubard
    (Survey Methodology 24, 1998) propose; where the clusters do not differ, at the number of clusters.

    Args:
        fractions: (clusters,) in [0, 1]; with one trial a cluster this is `wilson` of the count, up to the factor
            (n - 1) / n of an unbiased variance.
    """
    clusters = len(fractions)
    proportion = sum(fractions) / clusters
    spread = sum((fraction - proportion) ** 2 for fraction in fractions)
    if clusters < 2 or spread == 0:
        return wilson(proportion * clusters, clusters)
    variance = spread / (clusters - 1) / clusters
    effective = max(1.0, proportion * (1 - proportion) / variance)
    return wilson(proportion * effective, effective)


def mean_interval(values: Sequence[float]) -> Interval:
    """A mean with its percentile bootstrap interval over `values`, the same for the same values.

    Args:
        values: (n,) independent observations, n >= 1; bounded or skewed ones are welcome.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values to average; expected at least one.")
    observed = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(len(values))
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    low, high = observed[drawn].mean(-1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(observed.mean().item(), low, high)
