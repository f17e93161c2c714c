"""Contrastive rewards where every draw can be added up: their mean, their variance, and what noise does to them.

Two prompts, whose responses have ratings of their own; the starting model is uniform over the responses.
"""

from itertools import product

import pytest
import torch
from enumerable import tuples
from torch import Tensor
from torch.testing import assert_close

from align_cli.rewards import contrastive

RATINGS = torch.tensor([[0.0, 1.0, 3.0], [5.0, 5.5, 9.0]], dtype=torch.float64)
WITHIN = float(RATINGS.var(-1, correction=0).mean())
BETWEEN = float(RATINGS.mean(-1).var(correction=0))


def every(responses: int) -> Tensor:
    """(prompts, draws) contrastive rewards of all ways to draw a response and its baselines, all equally likely."""
    index = tuples(RATINGS.shape[-1], responses + 1)
    rows = [contrastive(of[index[:, :1]], of[index[:, 1:]], aggregate="mean")[:, 0] for of in RATINGS]
    return torch.stack(rows)


@pytest.mark.parametrize("responses", [1, 2, 3, 5])
def test_at_the_start_their_mean_is_0_for_each_prompt_and_their_variance_that_within_prompts(responses: int) -> None:
    found = every(responses)
    assert_close(found.mean(-1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-14)
    variance = float(found.var(correction=0))
    assert variance == pytest.approx(WITHIN * (1 + 1 / responses), rel=1e-12)
    # less than that of the ratings themselves only with enough baselines
    assert (variance < WITHIN + BETWEEN) == (responses > WITHIN / BETWEEN)


def test_one_baseline_is_noise_where_prompts_are_alike() -> None:
    alike = torch.tensor([[0.0, 1.0, 3.0]] * 2, dtype=torch.float64)
    index = tuples(3, 2)
    found = torch.stack([contrastive(of[index[:, :1]], of[index[:, 1:]], aggregate="mean") for of in alike])
    assert found.var(correction=0) == pytest.approx(2 * float(alike.var(correction=0)))


def test_with_baselines_in_their_proportions_it_is_the_reward_against_its_exact_mean() -> None:
    baselines = RATINGS.repeat_interleave(4, dim=-1)
    assert_close(contrastive(RATINGS, baselines, aggregate="mean"), RATINGS - RATINGS.mean(-1, keepdim=True))


def test_a_rater_that_errs_shrinks_them_and_adds_nothing() -> None:
    """E[r̃ − b] = (1 − c₀ − c₁) (r* − E r*) where bad responses pass with c₀ and good ones fail with c₁."""
    right, passes, fails = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64), 0.3, 0.1
    chance = torch.where(right == 1, 1 - fails, passes)  # of being rated 1
    for response in range(4):
        expected = torch.zeros((), dtype=torch.float64)
        for baseline in range(4):
            for rated, held in product((0.0, 1.0), repeat=2):
                one, other = (
                    chance[place] if value else 1 - chance[place]
                    for place, value in ((response, rated), (baseline, held))
                )
                given = (torch.tensor([[value]], dtype=torch.float64) for value in (rated, held))
                expected = expected + one * other / 4 * contrastive(*given, aggregate="mean")[0, 0]
        assert_close(expected, (1 - passes - fails) * (right[response] - right.mean()))
