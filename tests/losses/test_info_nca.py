import math
from types import ModuleType

import torch
from loss_columns import NO_REWARD, as_reals, gradient, one_pair
from mutants import LOG_RATIO, REWARDED, SOFT_LABELS
from torch.testing import assert_close

from align_cli.losses.dpo import dpo
from align_cli.verify.batches import random_columns

MUTANTS = [
    *LOG_RATIO,
    *REWARDED,
    *SOFT_LABELS,
    ("log_softmax(score, dim=-1)", "log_softmax(score, dim=0)"),
    ("log_softmax(score, dim=-1)", "score"),
    ("-(target", "(target"),
    (")).sum(-1)", ")).mean(-1)"),
    ("math.log(responses)", "responses"),
]


def test_value_at_the_reference_is_log_k(loss: ModuleType) -> None:
    for responses in (2, 3, 4):
        batch = random_columns(responses=responses)
        value = loss.info_nca(batch["reference"], batch["reference"], batch["rewards"], alpha=0.7, beta=0.3)
        assert_close(value, torch.full((3,), math.log(responses), dtype=torch.float64))
        assert_close(loss.at_reference(batch["rewards"]), value)


def test_on_a_hard_pair_it_is_dpo(loss: ModuleType) -> None:
    batch = random_columns(responses=2)
    hard = torch.tensor([[0.0, NO_REWARD]], dtype=torch.float64).expand(3, 2)
    value = loss.info_nca(batch["policy"], batch["reference"], hard, alpha=1e-4, beta=0.3)
    assert_close(value, dpo(batch["policy"], batch["reference"], one_pair(3), beta=0.3))


def test_four_responses_cost_the_figure_worked_out_for_dpo_with_rewards(loss: ModuleType) -> None:
    # Independent arithmetic: softmax(f/2) = (.282139, .219730, .255290, .242840), softmax(2r) = (.117059, .015842,
    # .864955, .002144), and their cross-entropy.
    log_ratio, rewards = as_reals(0.3, -0.2, 0.1, 0), as_reals(1, 0, 2, -1)
    value = loss.info_nca(log_ratio, torch.zeros_like(log_ratio), rewards, alpha=0.5, beta=0.5)
    assert_close(value, torch.tensor([1.3561313], dtype=torch.float64), atol=5e-8, rtol=0)


def test_gradient_is_beta_times_the_policy_less_the_target(loss: ModuleType) -> None:
    batch = random_columns()
    slope = gradient(
        lambda policy: loss.info_nca(policy, batch["reference"], batch["rewards"], alpha=0.7, beta=0.3), batch["policy"]
    )
    ours = (0.3 * (batch["policy"] - batch["reference"])).softmax(-1)
    assert_close(slope, 0.3 * (ours - (batch["rewards"] / 0.7).softmax(-1)))


def test_gradient_vanishes_where_log_ratios_are_rewards_over_alpha_beta(loss: ModuleType) -> None:
    batch = random_columns()
    optimum = batch["reference"] + batch["rewards"] / (0.7 * 0.3) - 6
    slope = gradient(
        lambda policy: loss.info_nca(policy, batch["reference"], batch["rewards"], alpha=0.7, beta=0.3), optimum
    )
    assert_close(slope, torch.zeros_like(slope), atol=1e-15, rtol=0)


def test_a_shift_of_rewards_or_of_log_ratios_changes_nothing(loss: ModuleType) -> None:
    batch = random_columns()
    value = loss.info_nca(batch["policy"], batch["reference"], batch["rewards"], alpha=0.7, beta=0.3)
    assert_close(loss.info_nca(batch["policy"] + 9, batch["reference"], batch["rewards"], alpha=0.7, beta=0.3), value)
    assert_close(loss.info_nca(batch["policy"], batch["reference"], batch["rewards"] - 9, alpha=0.7, beta=0.3), value)


def test_hard_labels_are_the_limit_of_a_small_alpha(loss: ModuleType) -> None:
    batch = random_columns()
    best = batch["rewards"] == batch["rewards"].max(-1, keepdim=True).values
    hard = torch.where(best, 0.0, NO_REWARD).double()
    small = loss.info_nca(batch["policy"], batch["reference"], batch["rewards"], alpha=1e-4, beta=0.3)
    assert_close(loss.info_nca(batch["policy"], batch["reference"], hard, alpha=1.0, beta=0.3), small)
