import math
from types import ModuleType

import torch
from loss_columns import as_reals, gradient, mean_over_single_pairs, one_pair
from torch import Tensor
from torch.testing import assert_close

from align_cli.verify.batches import random_columns

MUTANTS = [
    ("likelihood = policy / lengths", "likelihood = policy"),
    ("likelihood - _log1mexp", "likelihood + _log1mexp"),
    ("log_odds = likelihood - _log1mexp(likelihood.clamp(max=-CERTAIN))", "log_odds = likelihood"),
    ("likelihood.clamp(max=-CERTAIN)", "likelihood"),
    ("likelihood[..., :, None]", "likelihood[..., None, :]"),
    ("likelihood[..., :, None] + weight", "likelihood[..., :, None] - weight"),
    ("weight * logsigmoid", "logsigmoid"),
    ("logsigmoid(gap(log_odds))", "logsigmoid(-gap(log_odds))"),
    ("return -(pairs", "return (pairs"),
    ("torch.log(-torch.expm1(x))", "torch.log(torch.exp(x))"),
]


def test_a_pair_costs_its_token_mean_and_the_log_loss_of_its_odds_ratio(loss: ModuleType) -> None:
    # mean token probabilities 1/2 and 1/5: the odds are 1 and 1/4
    policy = as_reals(4 * math.log(1 / 2), 3 * math.log(1 / 5))
    value = loss.orpo(policy, torch.tensor([[4, 3]]), one_pair(), weight=0.3)
    assert_close(value, torch.tensor([math.log(2) + 0.3 * math.log(1 + 1 / 4)], dtype=torch.float64))


def test_equally_likely_responses_cost_lambda_log_2_beside_the_likelihood(loss: ModuleType) -> None:
    value = loss.orpo(as_reals(-6, -9), torch.tensor([[2, 3]]), one_pair(), weight=0.3)
    assert_close(value, torch.tensor([3 + 0.3 * math.log(2)], dtype=torch.float64))


def test_gradient_has_its_closed_form(loss: ModuleType) -> None:
    policy, lengths = as_reals(4 * math.log(1 / 2), 3 * math.log(1 / 5)), torch.tensor([[4, 3]])
    slope = gradient(lambda point: loss.orpo(point, lengths, one_pair(), weight=0.3), policy)
    # d log odds / d log P = 1/(1 − P); odds 1 against 1/4 are the right order with probability 4/5
    assert_close(slope, as_reals((-1 - 0.3 * 0.2 * 2) / 4, 0.3 * 0.2 * 1.25 / 3))


def test_certain_responses_cost_and_push_finitely(loss: ModuleType) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        policy, lengths = torch.tensor([[0.0, 0.0], [0.0, -5000.0], [-5000.0, 0.0]], dtype=dtype), torch.ones(3, 2)
        assert loss.orpo(policy, lengths, one_pair(3), weight=0.3).isfinite().all()
        assert gradient(lambda point, n=lengths: loss.orpo(point, n, one_pair(3), weight=0.3), policy).isfinite().all()


def test_all_pairs_cost_the_mean_of_the_pairs_one_by_one(loss: ModuleType) -> None:
    batch = random_columns(responses=5)

    def orpo(policy: Tensor, lengths: Tensor, pairs: Tensor) -> Tensor:
        return loss.orpo(policy, lengths, pairs, weight=0.7)

    columns = (batch["policy"], batch["lengths"])
    assert_close(orpo(*columns, batch["pairs"]), mean_over_single_pairs(orpo, columns, batch["pairs"]))
