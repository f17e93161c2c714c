import math
from types import ModuleType

import torch
from loss_columns import as_reals, gradient, mean_over_single_pairs, one_pair
from mutants import CLASSIFIED, PAIRWISE
from torch import Tensor
from torch.testing import assert_close

from align_cli.losses.dpo import dpo
from align_cli.verify.batches import random_columns

MUTANTS = [
    *PAIRWISE,
    *CLASSIFIED,
    ("policy / lengths", "policy"),
    ("policy / lengths", "policy * lengths"),
    (") - gamma", ") + gamma"),
    (") - gamma", ")"),
    (") - gamma", ") - beta * gamma"),
    (") - gamma", ") - gamma / beta"),
]


def test_a_pair_with_the_margin_asked_for_costs_log_2(loss: ModuleType) -> None:
    # means per token −1 and −1.5, times β = 2: the margin is 1
    value = loss.simpo(as_reals(-4, -9), torch.tensor([[4, 6]]), one_pair(), beta=2.0, gamma=1.0)
    assert_close(value, torch.tensor([math.log(2)], dtype=torch.float64))


def test_gradient_is_beta_over_length_times_the_probability_of_the_wrong_order(loss: ModuleType) -> None:
    lengths = torch.tensor([[4, 6]])
    slope = gradient(lambda policy: loss.simpo(policy, lengths, one_pair(), beta=2.0, gamma=0.4), as_reals(-4, -9))
    wrong = 1 / (1 + math.exp(1 - 0.4))
    assert_close(slope, as_reals(-2 * wrong / 4, 2 * wrong / 6))


def test_for_one_token_without_margin_it_is_dpo_against_a_uniform_reference(loss: ModuleType) -> None:
    batch = random_columns()
    value = loss.simpo(batch["policy"], torch.ones(3, 4), batch["pairs"], beta=2.0, gamma=0.0)
    uniform = torch.full_like(batch["policy"], -11.0)
    assert_close(value, dpo(batch["policy"], uniform, batch["pairs"], beta=2.0))


def test_all_pairs_cost_the_mean_of_the_pairs_one_by_one(loss: ModuleType) -> None:
    batch = random_columns(responses=5)

    def simpo(policy: Tensor, lengths: Tensor, pairs: Tensor) -> Tensor:
        return loss.simpo(policy, lengths, pairs, beta=2.0, gamma=0.5)

    columns = (batch["policy"], batch["lengths"])
    assert_close(simpo(*columns, batch["pairs"]), mean_over_single_pairs(simpo, columns, batch["pairs"]))
