from types import ModuleType

import torch
from loss_columns import as_reals, gradient, mean_over_single_pairs, one_pair
from mutants import LOG_RATIO, PAIRWISE
from torch.testing import assert_close

from align_cli.verify.batches import random_columns

MUTANTS = [
    *LOG_RATIO,
    *PAIRWISE,
    ("(1 - margin).relu()", "(1 + margin).relu()"),
    ("(1 - margin).relu()", "(-margin).relu()"),
    ("(1 - margin).relu()", "(1 - margin)"),
    ("(1 - margin).relu()", "(1 - margin).relu().square()"),
    (".relu()).sum((-2, -1))", ".relu()).mean((-2, -1))"),
    ("return pairs.sum((-2, -1))", "return 2 * pairs.sum((-2, -1))"),
]


def test_value_at_the_reference_is_1(loss: ModuleType) -> None:
    for responses in (2, 3, 4):
        batch = random_columns(responses=responses)
        value = loss.hinge(batch["reference"], batch["reference"], batch["pairs"], beta=0.3)
        assert_close(value, torch.ones(3, dtype=torch.float64))
        assert_close(loss.at_reference(batch["pairs"]), value)


def test_a_margin_above_1_costs_nothing_and_pushes_nowhere(loss: ModuleType) -> None:
    reference, policy = as_reals(-8, -5), as_reals(-4, -4)  # log-ratios 4 and 1
    assert_close(loss.hinge(policy, reference, one_pair(), beta=0.34), torch.zeros(1, dtype=torch.float64))
    slope = gradient(lambda point: loss.hinge(point, reference, one_pair(), beta=0.34), policy)
    assert_close(slope, torch.zeros_like(slope))


def test_a_smaller_margin_costs_what_it_lacks_and_pushes_by_beta(loss: ModuleType) -> None:
    reference, policy = as_reals(-8, -5), as_reals(-4, -4)
    assert_close(loss.hinge(policy, reference, one_pair(), beta=0.3), torch.tensor([0.1], dtype=torch.float64))
    slope = gradient(lambda point: loss.hinge(point, reference, one_pair(), beta=0.3), policy)
    assert_close(slope, as_reals(-0.3, 0.3))


def test_preferences_that_are_more_often_right_make_the_margin_1(loss: ModuleType) -> None:
    pairs = 0.6 * one_pair() + 0.4 * one_pair().mT

    def slope(margin: float) -> float:
        policy = as_reals(margin / 0.3, 0)
        return gradient(lambda point: loss.hinge(point, as_reals(0, 0), pairs, beta=0.3), policy)[0, 0].item()

    assert slope(0.999) < 0 < slope(1.001)


def test_all_pairs_cost_the_mean_of_the_pairs_one_by_one(loss: ModuleType) -> None:
    batch = random_columns(responses=5)

    def hinge(policy: torch.Tensor, reference: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        return loss.hinge(policy, reference, pairs, beta=0.2)

    columns = (batch["policy"], batch["reference"])
    assert_close(hinge(*columns, batch["pairs"]), mean_over_single_pairs(hinge, columns, batch["pairs"]))
