import math
from types import ModuleType

import torch
from loss_columns import NO_REWARD, as_reals, gradient
from mutants import LOG_RATIO, REWARDED, SOFT_LABELS
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from align_cli.verify.batches import random_columns

MUTANTS = [
    *LOG_RATIO,
    *REWARDED,
    *SOFT_LABELS,
    ("softmax(rewards / alpha, dim=-1)", "softmax(rewards / alpha, dim=-1).sqrt()"),
    ("-(target", "(target"),
    ("(target * logsigmoid(score)).sum(-1)", "(target * logsigmoid(score)).mean(-1)"),
    ("- logsigmoid(-score).mean(-1)", "+ logsigmoid(-score).mean(-1)"),
    ("- logsigmoid(-score).mean(-1)", "- logsigmoid(score).mean(-1)"),
    ("- logsigmoid(-score).mean(-1)", "- logsigmoid(-score).sum(-1)"),
    ("- logsigmoid(-score).mean(-1)", "- (target * logsigmoid(-score)).sum(-1)"),
    ("- logsigmoid(-score).mean(-1)", "- logsigmoid(-score).mean(0).sum()"),
    (" - logsigmoid(-score).mean(-1)", ""),
    (", 2 * math.log(2)", ", math.log(2)"),
]


def test_value_at_the_reference_is_2_log_2_for_any_number_of_responses(loss: ModuleType) -> None:
    for responses in (2, 3, 4):
        batch = random_columns(responses=responses)
        value = loss.nca(batch["reference"], batch["reference"], batch["rewards"], alpha=0.7, beta=0.3)
        assert_close(value, torch.full((3,), 2 * math.log(2), dtype=torch.float64))
        assert_close(loss.at_reference(batch["rewards"]), value)


def test_gradient_vanishes_where_each_score_is_the_log_of_k_times_its_target(loss: ModuleType) -> None:
    batch = random_columns(responses=5)
    target = (batch["rewards"] / 0.7).softmax(-1)
    optimum = batch["reference"] + (5 * target).log() / 0.3
    slope = gradient(
        lambda policy: loss.nca(policy, batch["reference"], batch["rewards"], alpha=0.7, beta=0.3), optimum
    )
    assert_close(slope, torch.zeros_like(slope), atol=1e-15, rtol=0)


def test_gradient_has_its_closed_form(loss: ModuleType) -> None:
    batch = random_columns()
    slope = gradient(
        lambda policy: loss.nca(policy, batch["reference"], batch["rewards"], alpha=0.7, beta=0.3), batch["policy"]
    )
    target = (batch["rewards"] / 0.7).softmax(-1)
    right = (0.3 * (batch["policy"] - batch["reference"])).sigmoid()
    assert_close(slope, 0.3 * ((target + 1 / 4) * right - target))


def test_on_a_hard_pair_it_is_the_three_term_loss_of_the_paper(loss: ModuleType) -> None:
    batch = random_columns(responses=2)
    hard = torch.tensor([[0.0, NO_REWARD]], dtype=torch.float64).expand(3, 2)
    value = loss.nca(batch["policy"], batch["reference"], hard, alpha=1e-4, beta=0.3)
    chosen, rejected = (0.3 * (batch["policy"] - batch["reference"])).unbind(-1)
    assert_close(value, -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected))


def test_hard_labels_are_the_limit_of_a_small_alpha(loss: ModuleType) -> None:
    batch = random_columns()
    best = batch["rewards"] == batch["rewards"].max(-1, keepdim=True).values
    hard = torch.where(best, 0.0, NO_REWARD).double()
    small = loss.nca(batch["policy"], batch["reference"], batch["rewards"], alpha=1e-4, beta=0.3)
    assert_close(loss.nca(batch["policy"], batch["reference"], hard, alpha=1.0, beta=0.3), small)


def test_a_shift_of_rewards_changes_nothing_and_a_shift_of_scores_does(loss: ModuleType) -> None:
    batch = random_columns()
    value = loss.nca(batch["policy"], batch["reference"], batch["rewards"], alpha=0.7, beta=0.3)
    assert_close(loss.nca(batch["policy"], batch["reference"], batch["rewards"] + 3, alpha=0.7, beta=0.3), value)
    # Where a score is at its point of rest, the loss rises both ways.
    rest = batch["reference"] + (4 * (batch["rewards"] / 0.7).softmax(-1)).log() / 0.3
    low, least, high = (
        loss.nca(rest + shift, batch["reference"], batch["rewards"], alpha=0.7, beta=0.3) for shift in (-2, 0, 2)
    )
    assert (low > least + 1e-3).all() and (high > least + 1e-3).all()


def test_equal_rewards_hold_every_response_at_the_reference(loss: ModuleType) -> None:
    batch = random_columns()
    slope = gradient(
        lambda policy: loss.nca(policy, batch["reference"], 0 * batch["rewards"], alpha=0.7, beta=0.3),
        batch["reference"],
    )
    assert_close(slope, torch.zeros_like(slope), atol=1e-16, rtol=0)


def test_a_pair_has_the_value_worked_out_by_hand(loss: ModuleType) -> None:
    # scores 1 and −2, target (3/4, 1/4)
    value = loss.nca(as_reals(-6, -9), as_reals(-8, -5), as_reals(0.5 * math.log(3), 0), alpha=0.5, beta=0.5)

    def cost(score: float) -> float:  # −log σ
        return math.log(1 + math.exp(-score))

    by_hand = 0.75 * cost(1) + 0.25 * cost(-2) + (cost(-1) + cost(2)) / 2
    assert_close(value, torch.tensor([by_hand], dtype=torch.float64))
