"""Verdicts against calculations by hand, and what they do at the edges."""

import math

import pytest

from align_cli.reproduction.claims import Range, judge, slope

BELOW_0 = Range(-math.inf, 0.0, True)
WITHIN = Range(1.0, 3.0, False)
T4 = 2.7764451051977987  # Student's t of four degrees of freedom, 95 %, from a printed table


def test_the_interval_is_student_s_over_seeds() -> None:
    """Of 1, 2, 3, 4, 5: mean 3, variance 2.5, so ± t √(2.5/5)."""
    judged = judge([1.0, 2.0, 3.0, 4.0, 5.0], WITHIN, exact=False)
    assert judged.estimate == 3
    assert judged.low == pytest.approx(3 - T4 * math.sqrt(0.5), rel=1e-12)
    assert judged.high == pytest.approx(3 + T4 * math.sqrt(0.5), rel=1e-12)
    assert judged.verdict == "undecided"


@pytest.mark.parametrize(
    "values, verdict",
    [
        ([-1.0, -1.1, -0.9, -1.2, -0.8], "holds"),
        ([1.0, 1.1, 0.9, 1.2, 0.8], "does not hold"),
        ([-1.0, 1.0, -1.0, 1.0, 0.5], "undecided"),
        ([0.0] * 5, "does not hold"),  # below 0 is not 0
    ],
)
def test_a_bound_is_held_to_the_whole_interval(values: list[float], verdict: str) -> None:
    assert judge(values, BELOW_0, exact=False).verdict == verdict
    mirrored = judge([-value for value in values], Range(0.0, math.inf, True), exact=False)
    assert mirrored.verdict == verdict


def test_the_ends_of_a_range_belong_to_it() -> None:
    assert judge([1.0] * 5, WITHIN, exact=False).verdict == "holds"
    assert judge([3.0] * 5, WITHIN, exact=False).verdict == "holds"
    assert judge([3.0 + 1e-9] * 5, WITHIN, exact=False).verdict == "does not hold"


@pytest.mark.parametrize("seeds", range(1, 5))
def test_fewer_than_five_seeds_decide_nothing(seeds: int) -> None:
    judged = judge([-1.0] * seeds, BELOW_0, exact=False)
    assert judged.verdict == "undecided" and f"{seeds} of the 5 seeds" in judged.why
    assert (judged.low is None) == (seeds == 1)


def test_mathematics_is_held_to_every_value() -> None:
    assert judge([2.0], WITHIN, exact=True).verdict == "holds"
    judged = judge([2.0, 2.0, 3.5], WITHIN, exact=True)
    assert judged.verdict == "does not hold" and judged.why == "1 of 3 values are outside"
    assert judge([math.nan], WITHIN, exact=True).verdict == "does not hold"


def test_what_is_no_number_decides_nothing() -> None:
    assert judge([], BELOW_0, exact=False).verdict == "undecided"
    for odd in (math.nan, math.inf, -math.inf):
        judged = judge([-1.0, -1.0, -1.0, -1.0, odd], BELOW_0, exact=False)
        assert judged.verdict == "undecided" and judged.estimate is None and str(odd) in judged.why


def test_where_nothing_was_sourced_the_measurement_stands_alone() -> None:
    judged = judge([1.0, 2.0, 3.0, 4.0, 5.0], None, exact=False)
    assert judged.verdict == "unknown" and judged.estimate == 3 and judged.low is not None


def test_the_slope_is_the_least_squares_line_s() -> None:
    assert slope([1.0, 3.0]) == 2
    assert slope([5.0, 5.0, 5.0]) == 0
    assert slope([0.0, 1.0, 5.0]) == pytest.approx(2.5)  # (−1·0 + 0·1 + 1·5) / 2
    assert slope([4.0, 3.0, 2.0, 1.0]) == pytest.approx(-1)
    with pytest.raises(ValueError, match="no slope"):
        slope([1.0])
