"""How ratings become rewards: closed forms, ties, more than two responses."""

import math
from typing import Any

import pytest
import torch
from enumerable import tuples
from torch.testing import assert_close

from align_cli.rewards import contrastive, given, hard, smoothed

RATINGS = torch.tensor([[1.0, 5.0, 3.0], [4.0, -2.0, 0.5], [0.1, 0.2, 0.3]], dtype=torch.float64)
TIED = torch.tensor([[2.0, 2.0, 1.0], [3.0, 3.0, 3.0]], dtype=torch.float64)
NO = -torch.inf


def test_given_ratings_are_the_rewards() -> None:
    assert given(RATINGS) is RATINGS


@pytest.mark.parametrize("alpha", [1e-4, 0.3, 7.0])
def test_the_softmax_of_hard_rewards_is_one_hot_at_every_temperature(alpha: float) -> None:
    expected = torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.float64)
    for ties in ("split", "first"):
        assert_close((hard(RATINGS, ties=ties) / alpha).softmax(-1), expected, rtol=0, atol=0)


def test_ties_share_a_hard_label_or_the_first_has_it() -> None:
    zero_one = torch.tensor([[0.0, 0.0, NO], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert torch.equal(hard(TIED, ties="split"), zero_one)
    assert torch.equal(hard(TIED, ties="first"), torch.tensor([[0.0, NO, NO]] * 2, dtype=torch.float64))
    assert_close(hard(TIED, ties="split").softmax(-1).sum(-1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("alpha", [1e-4, 0.3, 7.0])
@pytest.mark.parametrize("responses", [2, 3, 5])
def test_the_softmax_of_smoothed_rewards_is_the_smoothed_label(alpha: float, responses: int) -> None:
    ratings = torch.arange(responses, dtype=torch.float64).flip(0)[None]
    label = (smoothed(ratings, label_smoothing=0.1, alpha=alpha) / alpha).softmax(-1)
    expected = torch.tensor([[0.9, *[0.1 / (responses - 1)] * (responses - 1)]], dtype=torch.float64)
    assert_close(label, expected, rtol=1e-12, atol=0)


def test_a_smoothed_pair_is_that_of_exo_pref() -> None:
    found = smoothed(torch.tensor([[0.2, 0.7]], dtype=torch.float64), label_smoothing=1e-3, alpha=0.5)
    expected = torch.tensor([[0.5 * math.log(1e-3), 0.5 * math.log(1 - 1e-3)]], dtype=torch.float64)
    assert_close(found, expected, rtol=1e-12, atol=0)


def test_tied_responses_share_the_smoothed_label() -> None:
    """And where all are tied, nothing is preferred."""
    label = smoothed(TIED, label_smoothing=0.2, alpha=1.0).exp()
    assert_close(label, torch.tensor([[0.4, 0.4, 0.2], [1 / 3] * 3], dtype=torch.float64))


def test_the_label_is_the_limit_of_little_smoothing() -> None:
    for responses in (2, 4):
        ratings = torch.rand(6, responses, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        nearly = smoothed(ratings, label_smoothing=1e-9, alpha=0.3) / 0.3
        assert_close(nearly.softmax(-1), hard(ratings, ties="first").softmax(-1), rtol=0, atol=2e-9)


def test_rewards_depend_on_the_order_of_ratings_alone_and_follow_the_responses() -> None:
    for make in (lambda r: hard(r, ties="split"), lambda r: smoothed(r, label_smoothing=0.1, alpha=0.3)):
        assert_close(make(RATINGS * 3 + 1), make(RATINGS), rtol=0, atol=0)
        assert_close(make(RATINGS.flip(-1)), make(RATINGS).flip(-1), rtol=0, atol=0)


def test_ratings_stay_as_they_were() -> None:
    before = TIED.clone()
    hard(TIED, ties="first")
    smoothed(TIED, label_smoothing=0.1, alpha=1.0)
    assert torch.equal(TIED, before)


# --- against the starting model's own responses

BASELINES = torch.tensor([[1.0, 2.0, 6.0, 3.0], [0.0, -4.0, 1.0, 1.0], [0.1, 0.1, 0.1, 0.1]], dtype=torch.float64)


def test_a_contrastive_reward_is_the_rating_above_the_aggregate_of_the_baselines() -> None:
    by_hand = {"mean": [3.0, -0.5, 0.1], "median": [2.5, 0.5, 0.1], "max": [6.0, 1.0, 0.1], "min": [1.0, -4.0, 0.1]}
    for aggregate, values in by_hand.items():
        expected = RATINGS - torch.tensor(values, dtype=torch.float64)[:, None]
        assert_close(contrastive(RATINGS, BASELINES, aggregate=aggregate), expected)  # pyright: ignore


@pytest.mark.parametrize("aggregate", ["mean", "median", "max", "min"])
def test_one_baseline_is_its_own_aggregate_and_their_order_does_not_matter(aggregate: Any) -> None:
    assert_close(contrastive(RATINGS, BASELINES[:, :1], aggregate=aggregate), RATINGS - BASELINES[:, :1])
    assert_close(
        contrastive(RATINGS, BASELINES.flip(-1), aggregate=aggregate),
        contrastive(RATINGS, BASELINES, aggregate=aggregate),
    )


@pytest.mark.parametrize("baselines", [1, 2, 3, 4])
def test_before_training_a_contrastive_reward_has_mean_0_and_the_variance_of_one_more_kth(baselines: int) -> None:
    """All ways to draw one response and k baselines from one distribution of three ratings."""
    values = torch.tensor([-1.0, 0.5, 3.0], dtype=torch.float64)
    chances = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    drawn = tuples(3, 1 + baselines)
    weight = chances[drawn].prod(-1)
    reward = contrastive(values[drawn[:, :1]], values[drawn[:, 1:]], aggregate="mean")[:, 0]
    mean = (chances * values).sum()
    variance = (chances * (values - mean).square()).sum()
    assert_close(float((weight * reward).sum()), 0.0, rtol=0, atol=1e-15)
    assert_close((weight * reward.square()).sum(), variance * (1 + 1 / baselines))
