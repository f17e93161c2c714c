import math
from types import ModuleType

import torch
from loss_columns import as_reals, gradient, mean_over_single_pairs, one_pair
from mutants import LOG_RATIO, PAIRED_VALUE, PAIRWISE, SMOOTHED
from torch.testing import assert_close

from align_cli.losses.dpo import dpo
from align_cli.verify.batches import random_columns

MUTANTS = (
    LOG_RATIO
    + PAIRWISE
    + SMOOTHED
    + PAIRED_VALUE
    + [
        ("agree - label", "agree + label"),
        ("(1 - 2 * label_smoothing)", "(1 - label_smoothing)"),
        ("/ (1 - 2 * label_smoothing)", "* (1 - 2 * label_smoothing)"),
    ]
)


def test_value_at_the_reference_is_log_2(loss: ModuleType) -> None:
    for responses in (2, 3, 4):
        batch = random_columns(responses=responses)
        value = loss.robust_dpo(batch["reference"], batch["reference"], batch["pairs"], beta=0.3, label_smoothing=0.2)
        assert_close(value, torch.full((3,), math.log(2), dtype=torch.float64))
        assert_close(loss.at_reference(batch["pairs"]), value)


def test_averaged_over_flips_it_is_dpo_on_the_clean_labels(loss: ModuleType) -> None:
    batch = random_columns()
    flipped = 0.7 * batch["pairs"] + 0.3 * batch["pairs"].mT
    value = loss.robust_dpo(batch["policy"], batch["reference"], flipped, beta=0.1, label_smoothing=0.3)
    assert_close(value, dpo(batch["policy"], batch["reference"], batch["pairs"], beta=0.1))


def test_without_flips_it_is_dpo(loss: ModuleType) -> None:
    batch = random_columns()
    value = loss.robust_dpo(batch["policy"], batch["reference"], batch["pairs"], beta=0.1, label_smoothing=0.0)
    assert_close(value, dpo(batch["policy"], batch["reference"], batch["pairs"], beta=0.1))


def test_gradient_has_its_closed_form(loss: ModuleType) -> None:
    slope = gradient(
        lambda policy: loss.robust_dpo(policy, as_reals(0, 0), one_pair(), beta=0.5, label_smoothing=0.1),
        as_reals(3, -1),
    )
    right = 1 / (1 + math.exp(-2))
    push = 0.5 * (0.9 * (1 - right) + 0.1 * right) / 0.8
    assert_close(slope, as_reals(-push, push))


def test_all_pairs_cost_the_mean_of_the_pairs_one_by_one(loss: ModuleType) -> None:
    batch = random_columns(responses=5)

    def robust(policy: torch.Tensor, reference: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        return loss.robust_dpo(policy, reference, pairs, beta=0.2, label_smoothing=0.3)

    columns = (batch["policy"], batch["reference"])
    assert_close(robust(*columns, batch["pairs"]), mean_over_single_pairs(robust, columns, batch["pairs"]))
