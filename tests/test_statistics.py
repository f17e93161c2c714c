import random

import pytest

from align_cli.statistics import NORMAL_97_5, clustered_proportion, mean_interval, wilson


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
