"""95 % intervals: of the figures that a run reports, and of their means and differences over runs."""

import math
from collections.abc import Sequence
from statistics import mean, variance
from typing import NamedTuple

NORMAL_97_5 = 1.959963984540054
RESAMPLES = 2000
SWAPS = 2**14  # of the sides of pairs, in a permutation test


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
    import torch  # here, so that a command which compares runs starts without it

    if not values:
        raise ValueError("no values to average; expected at least one.")
    observed = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(len(values))
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    low, high = observed[drawn].mean(-1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(observed.mean().item(), low, high)


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """Σ numerators / Σ denominators with its percentile bootstrap interval over the pairs, as for a mean over tokens.

    Args:
        numerators, denominators: (n,) of the same items, n >= 1; denominators are positive.

    Raises:
        ValueError: no items.
    """
    import torch  # here, so that a command which compares runs starts without it

    if not numerators:
        raise ValueError("no values to average; expected at least one.")
    observed = torch.tensor([numerators, denominators], dtype=torch.float64)
    generator = torch.Generator().manual_seed(len(numerators))
    drawn = torch.randint(len(numerators), (RESAMPLES, len(numerators)), generator=generator)
    sums = observed[:, drawn].sum(-1)
    low, high = (sums[0] / sums[1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    total, size = observed.sum(-1).tolist()
    return Interval(total / size, low, high)


def paired(values: Sequence[float], others: Sequence[float]) -> Interval:
    """mean(values) - mean(others) with the bootstrap interval over pairs, of which one part is never drawn alone.

    Args:
        values, others: (n,) each, of the same items in the same order; n >= 1.

    Raises:
        ValueError: different lengths, or none.
    """
    return mean_interval([value - other for value, other in zip(values, others, strict=True)])


def sign_flip(differences: Sequence[float]) -> float:
    """The two-sided p-value of paired differences if either side of a pair were as likely to be the other.

    R. A. Fisher's permutation test: the share of all ways to swap the sides of pairs after which the mean is at least
    as far from 0 as it is. All ways are taken where they are at most `SWAPS`, else that many random ones; the
    observed one counts among them, so that p is never 0 (B. Phipson and G. K. Smyth, 2010).

    Args:
        differences: (n,), n >= 1. Those that are 0 say nothing and are left out.

    Raises:
        ValueError: no differences.
    """
    import torch  # here, so that a command which compares runs starts without it

    if not differences:
        raise ValueError("no differences to test; expected at least one.")
    observed = torch.tensor([each for each in differences if each], dtype=torch.float64)
    n = len(observed)
    if 2**n <= SWAPS:
        ways = torch.arange(2**n)[:, None] >> torch.arange(n) & 1
        extra = 0  # all ways are there, the observed one among them
    else:
        ways = torch.randint(2, (SWAPS, n), generator=torch.Generator().manual_seed(n))
        extra = 1
    sums = (2 * ways - 1).to(torch.float64) @ observed
    rounding = 1e-12 * float(observed.abs().sum())  # a sum in another order is as far from 0
    far = int((sums.abs() >= abs(float(observed.sum())) - rounding).sum())
    return (far + extra) / (len(ways) + extra)


def t_97_5(freedom: float) -> float:
    """The t that Student's distribution exceeds on either side with a probability of 5 % together.

    Args:
        freedom: degrees of freedom, 1 or more; they may be fractional, as Welch's are.

    Raises:
        ValueError: fewer than 1, or infinitely many.
    """
    if not 1 <= freedom < math.inf:
        raise ValueError(f"{freedom} degrees of freedom; expected a number of at least 1.")
    low, high = NORMAL_97_5, 13.0  # of infinitely many degrees of freedom, and above 12.71 of one
    while high - low > 1e-13 * low:
        middle = (low + high) / 2
        low, high = (middle, high) if _two_tails(middle, freedom) > 0.05 else (low, middle)
    return (low + high) / 2


def _two_tails(t: float, freedom: float) -> float:
    """P(|T| > t) = I_x(ν/2, 1/2) at x = ν / (ν + t²), by the continued fraction DLMF 8.17.22.

    It converges fast where x < (ν + 2) / (ν + 5), that is for every t >= √3; the first terms are taken, as many as
    its order √ν of convergence asks for.
    """
    a, b, x = freedom / 2, 0.5, freedom / (freedom + t * t)
    fraction = 1.0
    for m in range(50 + int(5 * math.sqrt(freedom)), 0, -1):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        fraction = 1 + even / (1 + odd / fraction)
    fraction = 1 - (a + b) * x / (a + 1) / fraction
    beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return math.exp(a * math.log(x) + b * math.log1p(-x) - beta) / (a * fraction)


def kappa(counts: Sequence[Sequence[float]]) -> float:
    """J. Cohen's κ (Educational and Psychological Measurement 20, 1960): agreement beyond what chance would give.

    Args:
        counts: (labels, labels) how often one says the row's label and the other the column's.

    Returns:
        1 for full agreement, 0 for that of chance; NaN where both only ever give one and the same label, or nothing.
    """
    total = sum(map(sum, counts))
    if total == 0:
        return math.nan
    observed = sum(row[place] for place, row in enumerate(counts)) / total
    by_chance = sum(sum(row) * sum(column) for row, column in zip(counts, zip(*counts, strict=True), strict=True))
    by_chance /= total**2
    return math.nan if by_chance == 1 else (observed - by_chance) / (1 - by_chance)


def spearman(values: Sequence[float], others: Sequence[float]) -> float:
    """C. Spearman's ρ: the correlation of ranks, equal values sharing the mean of theirs; NaN where all are equal.

    Args:
        values, others: (n,) of the same n things, n >= 2.

    Raises:
        ValueError: fewer than two.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} values have no order; expected at least two.")
    one, two = _ranks(values), _ranks(others)
    middle = (len(one) + 1) / 2
    product = math.fsum((a - middle) * (b - middle) for a, b in zip(one, two, strict=True))
    spread = math.fsum((a - middle) ** 2 for a in one) * math.fsum((b - middle) ** 2 for b in two)
    return product / math.sqrt(spread) if spread > 0 else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]


def student(values: Sequence[float]) -> Interval:
    """A mean with Student's t-interval: exact for normal observations, however few; equal ones give no width.

    Of differences between paired observations this is the paired t-interval.

    Args:
        values: (n,) independent observations, n >= 2.

    Raises:
        ValueError: fewer than two.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} observations have no spread; expected at least two.")
    estimate = mean(values)
    half = t_97_5(len(values) - 1) * math.sqrt(variance(values) / len(values))
    return Interval(estimate, estimate - half, estimate + half)


def welch(values: Sequence[float], others: Sequence[float]) -> Interval:
    """mean(values) - mean(others) with the interval of B. L. Welch (Biometrika 34, 1947), whatever their variances.

    Args:
        values, others: (n,) and (m,) independent observations, n, m >= 2.

    Raises:
        ValueError: fewer than two on a side.
    """
    fewest = min(len(values), len(others))
    if fewest < 2:
        raise ValueError(f"{fewest} observations have no spread; expected at least two on each side.")
    estimate = mean(values) - mean(others)
    squares = variance(values) / len(values), variance(others) / len(others)
    total = sum(squares)
    if total == 0:
        return Interval(estimate, estimate, estimate)
    share = squares[0] / total
    freedom = 1 / (share**2 / (len(values) - 1) + (1 - share) ** 2 / (len(others) - 1))
    half = t_97_5(max(fewest - 1, freedom)) * math.sqrt(total)  # never below, but for rounding
    return Interval(estimate, estimate - half, estimate + half)
