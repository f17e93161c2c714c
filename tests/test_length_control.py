"""The length-controlled win rate against what is known of it, and against scikit-learn."""

import numpy as np
import pytest

from align_cli import length_control
from align_cli.length_control import Array, controlled, difficulties, fit, length_feature, logistic

TINY = 1e-6


def drawn(count: int, seed: int) -> tuple[Array, Array]:
    """Preferences that are probabilities, as a judge gives them, and lengths in characters."""
    rng = np.random.default_rng(seed)
    return rng.beta(0.3, 0.5, count), rng.integers(10, 3000, count).astype(float)


def test_equal_lengths_leave_the_raw_win_rate() -> None:
    """Without a feature of length the fitted preferences have the mean of the given ones, up to the penalty."""
    preferences, lengths = drawn(203, 0)
    feature = length_feature(lengths, lengths)
    assert not feature.any()
    found = controlled(preferences, feature, None, ridge=TINY)
    assert found.estimate == pytest.approx(preferences.mean(), abs=1e-6)
    assert found.low < found.estimate < found.high
    # the bootstrap of a mean, here, has its standard error
    assert (found.high - found.low) / 3.92 == pytest.approx(preferences.std() / np.sqrt(203), rel=0.08)


def test_a_planted_advantage_of_length_is_removed() -> None:
    """Preferences from the model itself with θ = -0.4, φ = 2: the raw rate is far from σ(-0.4), ours is it."""
    rng = np.random.default_rng(1)
    feature = length_feature(rng.gamma(2.0, 900.0, 801), rng.gamma(2.0, 300.0, 801))
    preferences = logistic(-0.4 + 2.0 * feature)
    found = controlled(preferences, feature, None, ridge=TINY)
    assert preferences.mean() > found.estimate + 0.1
    assert found.estimate == pytest.approx(float(logistic(np.array(-0.4))), abs=1e-6)


def test_instructions_that_favour_models_are_told_from_length() -> None:
    """θ = 0.3, φ = 1, ψ = 0.7 give preferences without noise, from which the three are found again."""
    rng = np.random.default_rng(2)
    gamma, feature = rng.standard_normal(300), np.tanh(rng.standard_normal(300))
    preferences = logistic(0.3 + 0.7 * gamma + 1.0 * feature)
    found = fit(np.stack([np.ones(300), gamma, feature], 1), preferences, np.full(3, TINY))
    np.testing.assert_allclose(found, [[0.3, 0.7, 1.0]], atol=1e-5)
    rate = controlled(preferences, feature, gamma, ridge=TINY)
    assert rate.estimate == pytest.approx(logistic(0.3 + 0.7 * gamma).mean(), abs=1e-6)


def test_swapping_model_and_baseline_swaps_the_rate() -> None:
    preferences, lengths = drawn(97, 3)
    others = lengths[::-1]
    gamma = np.linspace(-1, 1, 97)
    one = controlled(preferences, length_feature(lengths, others), gamma, ridge=0.1)
    two = controlled(1 - preferences, length_feature(others, lengths), -gamma, ridge=0.1)
    assert one.estimate + two.estimate == pytest.approx(1, abs=1e-9)
    assert (one.low + two.high, one.high + two.low) == pytest.approx((1, 1), abs=1e-9)


def test_the_fit_is_scikit_learns() -> None:
    linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn comes with the extra 'eval'")
    preferences, lengths = drawn(150, 4)
    features = np.stack([np.ones(150), length_feature(lengths, lengths[::-1])], 1)
    for ridge in (0.5, 20.0):
        peer = linear.LogisticRegression(C=1 / ridge, fit_intercept=False, tol=1e-10, max_iter=1000)
        twice = np.concatenate([preferences, 1 - preferences])  # a probability is two labels, weighted
        peer.fit(np.tile(features, (2, 1)), np.repeat([1, 0], 150), sample_weight=twice)
        np.testing.assert_allclose(fit(features, preferences, np.full(2, ridge)), peer.coef_, atol=1e-5)


def test_weights_are_repetitions() -> None:
    preferences, lengths = drawn(30, 5)
    features = np.stack([np.ones(30), length_feature(lengths, lengths[::-1])], 1)
    often = np.random.default_rng(0).integers(0, 4, (2, 30))
    found = fit(features, preferences, np.full(2, 0.3), often.astype(float))
    for row, counts in zip(found, often, strict=True):
        alone = fit(np.repeat(features, counts, 0), np.repeat(preferences, counts), np.full(2, 0.3))
        np.testing.assert_allclose(alone[0], row, atol=1e-9)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_model_that_always_wins_has_a_rate_within_bounds(rate: float) -> None:
    found = controlled(np.full(50, rate), np.zeros(50), None, ridge=0.1)
    assert all(0 <= bound <= 1 for bound in found)
    assert found.estimate == pytest.approx(rate, abs=0.03)


def test_difficulty_is_what_models_have_in_common() -> None:
    """Three models whose preferences are σ(θ_m + γ_x): γ is found again up to the pull towards 0."""
    rng = np.random.default_rng(6)
    gamma = rng.standard_normal(120)
    preferences = logistic(np.array([-1.0, 0.0, 0.5])[:, None] + gamma)
    found = difficulties(preferences, np.zeros((3, 120)), ridge=0.01)
    assert found.mean() == pytest.approx(0, abs=1e-12)
    assert np.corrcoef(found, gamma)[0, 1] > 0.98
    assert 0.2 < np.polyfit(gamma, found, 1)[0] < 1


def test_many_features_are_fitted_like_few(monkeypatch: pytest.MonkeyPatch) -> None:
    preferences, _ = drawn(40, 7)
    features = np.random.default_rng(8).standard_normal((40, 5))
    few = fit(features, preferences, np.full(5, 0.2))
    monkeypatch.setattr(length_control, "FEW", 1)
    np.testing.assert_allclose(fit(features, preferences, np.full(5, 0.2)), few, atol=1e-12)


def test_the_tanh_is_of_differences_in_units_of_their_deviation() -> None:
    found = length_feature(np.array([3.0, 1.0]), np.array([1.0, 3.0]))
    np.testing.assert_allclose(found, np.tanh([1.0, -1.0]))
