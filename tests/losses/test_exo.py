import math
from types import ModuleType

import torch
from loss_columns import as_reals, gradient
from mutants import LOG_RATIO, REWARDED
from torch.testing import assert_close

from align_cli.verify.batches import random_columns

MUTANTS = [
    *LOG_RATIO,
    *REWARDED,
    ("log_q = log_softmax(rewards / alpha", "log_q = log_softmax(rewards * alpha"),
    ("log_q = log_softmax(rewards / alpha", "log_q = log_softmax(rewards"),
    ("log_q = log_softmax(rewards / alpha", "log_q = log_softmax(-rewards / alpha"),
    ("log_q = log_softmax(rewards / alpha, dim=-1)", "log_q = log_softmax(rewards / alpha, dim=0)"),
    ("log_q = log_softmax(rewards / alpha, dim=-1)", "log_q = rewards / alpha"),
    ("(policy - reference), dim=-1)", "(policy - reference), dim=0)"),
    ("log_p.exp() * (log_p - log_q)", "log_q.exp() * (log_q - log_p)"),
    ("log_p.exp() * (log_p - log_q)", "log_p.exp() * -log_q"),
    ("log_p.exp() * (log_p - log_q)", "log_p.exp() * (log_q - log_p)"),
    ("log_p.exp() * (log_p", "log_p.exp().detach() * (log_p"),
    ("log_p.exp() * (log_p", "log_p * (log_p"),
    (")).sum(-1)", ")).mean(-1)"),
    ("return -math.log", "return math.log"),
    ("dim=-1).mean(-1)", "dim=-1).sum(-1)"),
]

# L(z) = q (log q − log(1 − ε)) + (1 − q)(log(1 − q) − log ε) with q = σ(z), by independent arithmetic, for these
# margins z
MARGINS = (-10.0, -5.0, -2.0, 0.0, 2.0, 5.0, 10.0)
PAIR_VALUES = {
    1e-3: (6.906942, 6.821350, 5.719116, 2.761231, 0.458972, 0.007047, 0.000815),
    1e-2: (4.604462, 4.534236, 3.692085, 1.614463, 0.192468, 0.000625, 0.009760),
}
RATIOS, REWARDS = as_reals(0.3, -0.2, 0.1, 0), as_reals(1, 0, 2, -1)


def test_value_at_the_reference_is_the_kl_from_uniform_to_the_target(loss: ModuleType) -> None:
    for responses in (2, 3, 4):
        batch = random_columns(responses=responses)
        value = loss.exo(batch["reference"], batch["reference"], batch["rewards"], alpha=0.7, beta=0.3)
        target = (batch["rewards"] / 0.7).softmax(-1)
        assert_close(value, (1 / responses * (1 / responses / target).log()).sum(-1))
        assert_close(loss.at_reference(batch["rewards"], alpha=0.7), value)


def test_pairs_with_smoothed_labels_cost_the_figures_of_the_pairwise_equation(loss: ModuleType) -> None:
    for epsilon, values in PAIR_VALUES.items():
        labels = 0.4 * as_reals(math.log(1 - epsilon), math.log(epsilon))  # rewards whose softmax(r/α) is the label
        policy = torch.tensor([[margin / 0.5, 0.0] for margin in MARGINS], dtype=torch.float64)
        value = loss.exo(policy, torch.zeros_like(policy), labels.expand_as(policy), alpha=0.4, beta=0.5)
        assert_close(value, torch.tensor(values, dtype=torch.float64), atol=5.1e-7, rtol=0)


def test_four_responses_cost_the_figure_worked_out_by_hand(loss: ModuleType) -> None:
    value = loss.exo(RATIOS, torch.zeros_like(RATIOS), REWARDS, alpha=0.5, beta=0.5)
    assert_close(value, torch.tensor([1.6630756], dtype=torch.float64), atol=5.1e-8, rtol=0)
    slope = gradient(lambda policy: loss.exo(policy, 0 * RATIOS, REWARDS, alpha=0.5, beta=0.5), RATIOS)
    assert_close(slope, as_reals(-0.110507, 0.106201, -0.368046, 0.372352), atol=5.1e-7, rtol=0)


def test_gradient_is_the_policy_times_the_excess_of_its_log_ratio_to_the_target(loss: ModuleType) -> None:
    batch = random_columns()
    slope = gradient(
        lambda policy: loss.exo(policy, batch["reference"], batch["rewards"], alpha=0.7, beta=0.3), batch["policy"]
    )
    ours = (0.3 * (batch["policy"] - batch["reference"])).softmax(-1)
    excess = (ours / (batch["rewards"] / 0.7).softmax(-1)).log()
    assert_close(slope, 0.3 * ours * (excess - (ours * excess).sum(-1, keepdim=True)))


def test_value_and_gradient_vanish_where_log_ratios_are_rewards_over_alpha_beta(loss: ModuleType) -> None:
    batch = random_columns()
    optimum = batch["reference"] + batch["rewards"] / (0.7 * 0.3) - 6
    value = loss.exo(optimum, batch["reference"], batch["rewards"], alpha=0.7, beta=0.3)
    assert_close(value, torch.zeros(3, dtype=torch.float64), atol=1e-14, rtol=0)
    slope = gradient(
        lambda policy: loss.exo(policy, batch["reference"], batch["rewards"], alpha=0.7, beta=0.3), optimum
    )
    assert_close(slope, torch.zeros_like(slope), atol=1e-14, rtol=0)


def test_a_shift_of_rewards_or_of_log_ratios_changes_nothing(loss: ModuleType) -> None:
    batch = random_columns()
    value = loss.exo(batch["policy"], batch["reference"], batch["rewards"], alpha=0.7, beta=0.3)
    assert_close(loss.exo(batch["policy"] + 9, batch["reference"], batch["rewards"], alpha=0.7, beta=0.3), value)
    assert_close(loss.exo(batch["policy"], batch["reference"], batch["rewards"] - 9, alpha=0.7, beta=0.3), value)


def test_a_margin_beyond_the_label_is_pushed_back(loss: ModuleType) -> None:
    labels = 0.4 * as_reals(math.log(1 - 1e-2), math.log(1e-2))
    target_margin = math.log(0.99 / 0.01)

    def slope(margin: float) -> float:
        policy = as_reals(margin / 0.5, 0)
        return gradient(lambda point: loss.exo(point, 0 * policy, labels, alpha=0.4, beta=0.5), policy)[0, 0].item()

    assert slope(target_margin - 0.1) < 0 < slope(target_margin + 0.1)
