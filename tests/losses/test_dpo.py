import math
from types import ModuleType

import torch
from loss_columns import as_reals, gradient, mean_over_single_pairs, one_pair
from mutants import CLASSIFIED, LOG_RATIO, PAIRED_VALUE, PAIRWISE
from torch.testing import assert_close

from align_cli.preferences import gap
from align_cli.verify.batches import random_columns

MUTANTS = LOG_RATIO + PAIRWISE + CLASSIFIED + PAIRED_VALUE


def test_value_at_the_reference_is_log_2(loss: ModuleType) -> None:
    for responses in (2, 3, 4):
        batch = random_columns(responses=responses)
        value = loss.dpo(batch["reference"], batch["reference"], batch["pairs"], beta=0.3)
        assert_close(value, torch.full((3,), math.log(2), dtype=torch.float64))
        assert_close(loss.at_reference(batch["pairs"]), value)


def test_a_pair_costs_the_log_of_one_plus_exp_of_minus_its_margin(loss: ModuleType) -> None:
    value = loss.dpo(as_reals(-7, -9), as_reals(-8, -5), one_pair(), beta=0.5)
    # log-ratios 1 and −4: the margin is 0.5 · 5
    assert_close(value, torch.tensor([math.log(1 + math.exp(-2.5))], dtype=torch.float64))


def test_all_pairs_cost_the_mean_of_the_pairs_one_by_one(loss: ModuleType) -> None:
    batch = random_columns(responses=5)
    together = loss.dpo(batch["policy"], batch["reference"], batch["pairs"], beta=0.2)
    one_by_one = mean_over_single_pairs(
        lambda policy, reference, pairs: loss.dpo(policy, reference, pairs, beta=0.2),
        [batch["policy"], batch["reference"]],
        batch["pairs"],
    )
    assert_close(together, one_by_one)


def test_gradient_is_beta_times_the_probability_of_the_wrong_order(loss: ModuleType) -> None:
    policy, reference = as_reals(-7, -9), as_reals(-8, -5)
    slope = gradient(lambda point: loss.dpo(point, reference, one_pair(), beta=0.5), policy)
    wrong = 1 / (1 + math.exp(2.5))
    assert_close(slope, as_reals(-0.5 * wrong, 0.5 * wrong))


def test_gradient_vanishes_where_implicit_rewards_are_the_bradley_terry_rewards(loss: ModuleType) -> None:
    batch = random_columns()
    weights = gap(batch["rewards"]).sigmoid()
    pairs = weights / weights.sum((-2, -1), keepdim=True)
    optimum = batch["reference"] + batch["rewards"] / 0.3 + 5
    slope = gradient(lambda policy: loss.dpo(policy, batch["reference"], pairs, beta=0.3), optimum)
    assert_close(slope, torch.zeros_like(slope), atol=1e-14, rtol=0)


def test_a_common_shift_of_log_ratios_changes_nothing(loss: ModuleType) -> None:
    batch = random_columns()
    value = loss.dpo(batch["policy"], batch["reference"], batch["pairs"], beta=0.3)
    assert_close(loss.dpo(batch["policy"] + 4, batch["reference"], batch["pairs"], beta=0.3), value)


def test_a_prompt_without_a_preference_costs_nothing(loss: ModuleType) -> None:
    batch = random_columns()
    assert_close(
        loss.dpo(batch["policy"], batch["reference"], 0 * batch["pairs"], beta=0.3), torch.zeros(3, dtype=torch.float64)
    )
