import math
import random

import numpy as np
import pytest
from scipy import stats

from align_cli.statistics import (
    NORMAL_97_5,
    SWAPS,
    clustered_proportion,
    mean_interval,
    paired,
    sign_flip,
    student,
    t_97_5,
    welch,
    wilson,
)


def test_wilson_bounds_solve_the_equation_that_defines_them():
    # the bounds are the p at which |observed - p| = z sqrt(p (1 - p) / n)
    for successes, trials in [(3, 17), (1, 2), (40, 41), (123, 400)]:
        proportion, low, high = wilson(successes, trials)
        for bound in (low, high):
            assert abs(proportion - bound) == pytest.approx(NORMAL_97_5 * (bound * (1 - bound) / trials) ** 0.5)
        assert low < proportion < high


def test_wilson_stays_within_zero_and_one_at_the_extremes():
    z2 = NORMAL_97_5**2
    assert wilson(0, 10) == pytest.approx((0, 0, z2 / (10 + z2)))
    assert wilson(10, 10) == pytest.approx((1, 10 / (10 + z2), 1))


@pytest.mark.parametrize(("successes", "trials"), [(-1, 5), (6, 5), (0, 0), (float("nan"), 5)])
def test_wilson_refuses_counts_that_are_none(successes: float, trials: float):
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, trials)


def test_clusters_of_one_trial_give_wilsons_interval():
    fractions = [1.0] * 30 + [0.0] * 70
    assert clustered_proportion(fractions) == pytest.approx(wilson(30 * 0.99, 99), rel=1e-9)


def test_copies_of_a_trial_within_a_cluster_do_not_narrow_the_interval():
    # four identical samples for each prompt carry the information of one
    clustered = clustered_proportion([1.0] * 30 + [0.0] * 70)
    naive = wilson(120, 400)
    assert clustered.high - clustered.low > 1.9 * (naive.high - naive.low)


def test_equal_clusters_fall_back_to_one_trial_each():
    assert clustered_proportion([0.0] * 8) == wilson(0, 8)
    assert clustered_proportion([0.5] * 8) == wilson(4, 8)
    assert clustered_proportion([1.0]) == wilson(1, 1)


def test_mean_interval_has_the_width_of_the_central_limit_theorem():
    rng = random.Random(0)
    values = [rng.gauss(3, 2) for _ in range(2000)]
    mean, low, high = mean_interval(values)
    assert mean == pytest.approx(sum(values) / 2000)
    # 2000 resamples place a 2.5 % quantile within about 3 % of the half-width
    assert high - low == pytest.approx(2 * NORMAL_97_5 * 2 / 2000**0.5, rel=0.1)
    assert low < mean < high


def test_mean_interval_of_equal_values_is_the_value():
    assert mean_interval([0.25] * 7) == (0.25, 0.25, 0.25)


def test_mean_interval_is_the_same_for_the_same_values():
    values = [0.1, 0.7, 0.2, 0.9]
    assert mean_interval(values) == mean_interval(values)


def test_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_students_quantile_has_its_closed_forms():
    # of 1, 2 and 4 degrees of freedom: W. T. Shaw, Journal of Computational Finance 9(4), 2006
    a = 4 * 0.975 * 0.025
    q = math.cos(math.acos(math.sqrt(a)) / 3) / math.sqrt(a)
    closed = {1: math.tan(0.475 * math.pi), 2: 0.95 * math.sqrt(2 / a), 4: 2 * math.sqrt(q - 1)}
    for freedom, t in closed.items():
        assert t_97_5(freedom) == pytest.approx(t, rel=1e-12)


@pytest.mark.parametrize("freedom", [1.3, 2.5, 7.9, 33.3])
def test_students_quantile_bounds_95_percent_of_the_density(freedom: float):
    # with t = √ν tan θ the density is cos(θ)^(ν-1), up to a constant; by Simpson's rule
    def integral(top: float) -> float:
        steps = 2000
        heights = [math.cos(top * k / steps) ** (freedom - 1) for k in range(steps + 1)]
        return (heights[0] + 4 * sum(heights[1::2]) + 2 * sum(heights[2:-1:2]) + heights[-1]) * top / steps / 3

    whole = math.sqrt(math.pi) / 2 * math.gamma(freedom / 2) / math.gamma((freedom + 1) / 2)
    assert integral(math.atan(t_97_5(freedom) / math.sqrt(freedom))) / whole == pytest.approx(0.95, abs=1e-10)


def test_students_quantile_tends_to_the_normal_one():
    z, freedom = NORMAL_97_5, 10_000
    # Cornish and Fisher's expansion (Abramowitz and Stegun 26.7.5); its next term is below 1e-11
    expanded = z + (z**3 + z) / 4 / freedom + (5 * z**5 + 16 * z**3 + 3 * z) / 96 / freedom**2
    assert t_97_5(freedom) == pytest.approx(expanded, abs=1e-10)


@pytest.mark.parametrize("freedom", [0, 0.99, math.inf, math.nan])
def test_students_quantile_refuses_other_degrees_of_freedom(freedom: float):
    with pytest.raises(ValueError, match="degrees of freedom"):
        t_97_5(freedom)


def test_students_interval_of_two_is_cauchys():
    t = math.tan(0.475 * math.pi)
    assert student([1.0, 4.0]) == pytest.approx((2.5, 2.5 - 1.5 * t, 2.5 + 1.5 * t))


def test_students_interval_holds_the_mean_as_often_as_it_says():
    rng = random.Random(0)
    trials = 400
    held = sum(
        interval.low <= 3 <= interval.high
        for interval in (student([rng.gauss(3, 2) for _ in range(3)]) for _ in range(trials))
    )
    # five standard errors of a proportion of 0.95; with the normal quantile it would be 0.81
    assert held / trials == pytest.approx(0.95, abs=5 * math.sqrt(0.95 * 0.05 / trials))


def test_equal_observations_have_an_interval_of_no_width():
    assert student([0.1] * 3) == (0.1, 0.1, 0.1)
    assert welch([0.1] * 3, [0.1] * 7) == (0, 0, 0)


def test_welch_has_the_freedom_of_both_where_they_spread_alike_and_of_one_where_the_other_does_not():
    t = 0.95 * math.sqrt(2 / (1 - 0.95**2))  # two degrees of freedom
    assert welch([1.0, 2.0], [5.0, 6.0]) == pytest.approx((-4, -4 - t / math.sqrt(2), -4 + t / math.sqrt(2)))
    values = [0.3, 0.1, 0.7, 0.2]
    shifted = [bound - 0.5 for bound in student(values)]
    assert welch(values, [0.5] * 9) == pytest.approx(tuple(shifted))


def test_welch_of_the_other_order_is_its_mirror():
    ours, theirs = [0.3, 0.1, 0.7], [2.0, 9.0]
    estimate, low, high = welch(ours, theirs)
    assert welch(theirs, ours) == pytest.approx((-estimate, -high, -low))


def test_one_observation_has_no_interval():
    for wrong in (lambda: student([1.0]), lambda: welch([1.0], [1.0, 2.0]), lambda: welch([1.0, 2.0], [])):
        with pytest.raises(ValueError, match="have no spread"):
            wrong()


def test_swapping_sides_counts_every_way_where_there_are_few():
    # of ±1 ±2 ±4 only +7 and -7 are as far from 0 as 1 + 2 + 4; of 1 + 2 - 3 = 0 all eight are
    assert sign_flip([1.0, 2.0, 4.0]) == 2 / 8
    assert sign_flip([1.0, 2.0, -3.0]) == 1
    assert sign_flip([0.1, 0.2, 0.3, 0.0]) == 2 / 8  # rounding of sums in another order does not matter, nor does a 0
    assert sign_flip([0.0, 0.0]) == 1


def test_swapping_sides_agrees_with_an_independent_implementation():
    rng = random.Random(0)
    few = [rng.gauss(0.5, 1) for _ in range(11)]
    exact = stats.permutation_test((few,), np.mean, permutation_type="samples", n_resamples=2**11)
    assert sign_flip(few) == pytest.approx(exact.pvalue)
    many = [rng.gauss(0.12, 1) for _ in range(200)]
    drawn = stats.permutation_test((many,), np.mean, permutation_type="samples", n_resamples=SWAPS, rng=1)
    spread = (drawn.pvalue * (1 - drawn.pvalue) * 2 / SWAPS) ** 0.5  # of the difference of two such shares
    assert abs(sign_flip(many) - drawn.pvalue) < 5 * spread


def test_swapping_sides_is_symmetric_and_knows_no_scale():
    rng = random.Random(1)
    differences = [rng.gauss(0.3, 1) for _ in range(12)]
    p = sign_flip(differences)
    assert sign_flip([-each for each in differences]) == p
    assert sign_flip([1000 * each for each in differences]) == p


def test_no_p_value_is_zero():
    assert sign_flip([1.0] * 100) == 1 / (SWAPS + 1)


def test_the_bootstrap_agrees_with_an_independent_implementation():
    rng = random.Random(2)
    values = [rng.expovariate(1) for _ in range(60)]
    ours = mean_interval(values)
    low, high = stats.bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=3).confidence_interval
    # a quantile of 2000 resamples at 2.5 % has the deviation sqrt(.025 .975 / 2000) / density of a normal there
    noise = (0.025 * 0.975 / 2000) ** 0.5 / 0.0584 * stats.sem(values)
    assert abs(ours.low - low) < 5 * 2**0.5 * noise
    assert abs(ours.high - high) < 5 * 2**0.5 * noise


def test_pairs_are_drawn_together():
    rng = random.Random(4)
    easy = [rng.random() for _ in range(80)]  # how hard an item is moves both sides alike
    ours, theirs = [each + 0.01 for each in easy], easy
    assert paired(ours, theirs) == pytest.approx((0.01, 0.01, 0.01))
    with pytest.raises(ValueError, match="argument"):
        paired([1.0], [1.0, 2.0])
    for test in (paired, lambda values, others: sign_flip(values)):
        with pytest.raises(ValueError, match="no "):
            test([], [])
