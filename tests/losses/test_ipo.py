from types import ModuleType

import torch
from loss_columns import as_reals, gradient, mean_over_single_pairs, one_pair
from mutants import LOG_RATIO
from torch.testing import assert_close

from align_cli.verify.batches import random_columns

MUTANTS = [
    *LOG_RATIO,
    (" / lengths)", ")"),
    (" / lengths)", " * lengths)"),
    ("margin - 1 / (2 * beta)", "margin + 1 / (2 * beta)"),
    ("margin - 1 / (2 * beta)", "margin - 1 / beta"),
    ("margin - 1 / (2 * beta)", "margin - 2 * beta"),
    (".square()).sum", ".abs()).sum"),
    (".square()).sum", ".square()).mean"),
    ("(pairs * (margin", "(pairs.mT * (margin"),
    ("/ (4 * beta**2)", "/ (2 * beta)"),
]


def test_value_at_the_reference_is_one_over_four_beta_squared(loss: ModuleType) -> None:
    for responses in (2, 3, 4):
        batch = random_columns(responses=responses)
        value = loss.ipo(batch["reference"], batch["reference"], batch["lengths"], batch["pairs"], beta=0.2)
        assert_close(value, torch.full((3,), 6.25, dtype=torch.float64))
        assert_close(loss.at_reference(batch["pairs"], beta=0.2), value)


def test_a_gap_of_one_over_two_beta_per_token_costs_nothing_and_pushes_nowhere(loss: ModuleType) -> None:
    lengths, reference = torch.tensor([[4, 5]]), as_reals(-8, -6)
    # log-ratios per token 3 and 0.5, with β = 0.2: the gap is 2.5
    policy = reference + as_reals(12, 2.5)
    assert_close(loss.ipo(policy, reference, lengths, one_pair(), beta=0.2), torch.zeros(1, dtype=torch.float64))
    slope = gradient(lambda point: loss.ipo(point, reference, lengths, one_pair(), beta=0.2), policy)
    assert_close(slope, torch.zeros_like(slope))


def test_gradient_is_twice_the_error_over_the_length(loss: ModuleType) -> None:
    lengths, reference = torch.tensor([[4, 5]]), as_reals(-8, -6)
    slope = gradient(
        lambda point: loss.ipo(point, reference, lengths, one_pair(), beta=0.2), reference + as_reals(4, 5)
    )
    assert_close(slope, as_reals(2 * -2.5 / 4, -2 * -2.5 / 5))


def test_gradient_vanishes_at_the_preference_rate_over_beta(loss: ModuleType) -> None:
    # p(first ≻ second) = 0.8: the paper's optimum has the gap (p(w ≻ l) − 1/2)/τ
    pairs = 0.8 * one_pair() + 0.2 * one_pair().mT
    lengths, reference = torch.tensor([[4, 4]]), as_reals(-8, -6)
    slope = gradient(
        lambda point: loss.ipo(point, reference, lengths, pairs, beta=0.2), reference + 4 * as_reals(0.3 / 0.2, 0)
    )
    assert_close(slope, torch.zeros_like(slope), atol=1e-15, rtol=0)


def test_all_pairs_cost_the_mean_of_the_pairs_one_by_one(loss: ModuleType) -> None:
    batch = random_columns(responses=5)

    def ipo(policy: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        return loss.ipo(policy, reference, lengths, pairs, beta=0.2)

    columns = (batch["policy"], batch["reference"], batch["lengths"])
    assert_close(ipo(*columns, batch["pairs"]), mean_over_single_pairs(ipo, columns, batch["pairs"]))
