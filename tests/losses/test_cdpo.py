import math
from types import ModuleType

import torch
from loss_columns import as_reals, gradient, mean_over_single_pairs, one_pair
from mutants import LOG_RATIO, PAIRED_VALUE, PAIRWISE, SMOOTHED
from torch.testing import assert_close

from align_cli.losses.dpo import dpo
from align_cli.verify.batches import random_columns

MUTANTS = [*LOG_RATIO, *PAIRWISE, *SMOOTHED, *PAIRED_VALUE, ("agree + label", "agree - label")]


def test_value_at_the_reference_is_log_2(loss: ModuleType) -> None:
    for responses in (2, 3, 4):
        batch = random_columns(responses=responses)
        value = loss.cdpo(batch["reference"], batch["reference"], batch["pairs"], beta=0.3, label_smoothing=0.2)
        assert_close(value, torch.full((3,), math.log(2), dtype=torch.float64))
        assert_close(loss.at_reference(batch["pairs"]), value)


def test_it_is_dpo_on_pairs_that_are_partly_the_other_way_round(loss: ModuleType) -> None:
    batch = random_columns()
    value = loss.cdpo(batch["policy"], batch["reference"], batch["pairs"], beta=0.1, label_smoothing=0.2)
    smoothed = 0.8 * batch["pairs"] + 0.2 * batch["pairs"].mT
    assert_close(value, dpo(batch["policy"], batch["reference"], smoothed, beta=0.1))


def test_it_is_the_forward_kl_to_the_smoothed_label_and_a_constant(loss: ModuleType) -> None:
    log_ratio, epsilon = as_reals(2.5, -0.5), 0.1
    value = loss.cdpo(log_ratio, as_reals(0, 0), one_pair(), beta=0.4, label_smoothing=epsilon)
    label = torch.tensor([1 - epsilon, epsilon], dtype=torch.float64)
    log_policy = (0.4 * log_ratio).log_softmax(-1)
    divergence = (label * (label.log() - log_policy)).sum(-1)
    entropy = -(label * label.log()).sum()
    assert_close(value, divergence + entropy)


def test_gradient_vanishes_at_the_log_odds_of_the_label(loss: ModuleType) -> None:
    margin = math.log(0.9 / 0.1)
    slope = gradient(
        lambda policy: loss.cdpo(policy, as_reals(-4, -6), one_pair(), beta=0.4, label_smoothing=0.1),
        as_reals(-4 + margin / 0.4, -6),
    )
    assert_close(slope, torch.zeros_like(slope), atol=1e-15, rtol=0)


def test_gradient_is_the_probability_less_the_label(loss: ModuleType) -> None:
    slope = gradient(
        lambda policy: loss.cdpo(policy, as_reals(0, 0), one_pair(), beta=0.5, label_smoothing=0.1), as_reals(3, -1)
    )
    push = 0.5 * (1 / (1 + math.exp(-2)) - 0.9)
    assert_close(slope, as_reals(push, -push))


def test_all_pairs_cost_the_mean_of_the_pairs_one_by_one(loss: ModuleType) -> None:
    batch = random_columns(responses=5)

    def cdpo(policy: torch.Tensor, reference: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        return loss.cdpo(policy, reference, pairs, beta=0.2, label_smoothing=0.3)

    columns = (batch["policy"], batch["reference"])
    assert_close(cdpo(*columns, batch["pairs"]), mean_over_single_pairs(cdpo, columns, batch["pairs"]))
