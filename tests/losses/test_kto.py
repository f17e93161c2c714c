import math
from types import ModuleType

import torch
from loss_columns import NO_REWARD, as_reals, gradient
from mutants import REWARDED
from torch import Tensor
from torch.testing import assert_close

MUTANTS = [
    *REWARDED,
    ("(policy - reference -", "(reference - policy -"),
    ("(policy - reference -", "(policy -"),
    ("- mismatch_kl[:, None]", "+ mismatch_kl[:, None]"),
    (" - mismatch_kl[:, None]", ""),
    ("where(rewards > threshold", "where(rewards < threshold"),
    ("where(rewards > threshold", "where(rewards >= threshold"),
    ("where(rewards > threshold", "where(rewards > 0"),
    ("desirable * (-score).sigmoid(), un", "(-score).sigmoid(), un"),
    ("undesirable * score.sigmoid()", "desirable * score.sigmoid()"),
    ("(-score).sigmoid()", "score.sigmoid()"),
    ("* score.sigmoid()", "* (-score).sigmoid()"),
    (".sigmoid()).mean(-1)", ".sigmoid()).sum(-1)"),
    ("undesirable * (1 - good)) / 2", "undesirable * (1 - good))"),
    ("desirable * good + un", "un"),
]

OPTIONS = {"beta": 0.2, "threshold": 0.5, "desirable": 1.2, "undesirable": 1.5}
NO_KL = torch.zeros(1, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_value_at_the_reference_is_half_the_mean_weight(loss: ModuleType) -> None:
    reference, rewards = as_reals(-8, -5, -7), as_reals(1, 0, NO_REWARD)
    value = loss.kto(reference, reference, rewards, NO_KL, **OPTIONS)
    assert_close(value, torch.tensor([(1.2 + 1.5 + 1.5) / 3 / 2], dtype=torch.float64))
    assert_close(loss.at_reference(rewards, threshold=0.5, desirable=1.2, undesirable=1.5), value)


def test_a_response_costs_what_its_value_lacks_of_its_weight(loss: ModuleType) -> None:
    # log-ratios 3 and −2, against a KL of 1
    policy, reference, kl = as_reals(-5, -7), as_reals(-8, -5), NO_KL + 1
    value = loss.kto(policy, reference, as_reals(0.6, 0.4), kl, **OPTIONS)
    good, bad = 1.2 * (1 - sigmoid(0.2 * 2)), 1.5 * (1 - sigmoid(0.2 * 3))
    assert_close(value, torch.tensor([(good + bad) / 2], dtype=torch.float64))


def test_a_reward_at_the_threshold_is_undesirable(loss: ModuleType) -> None:
    policy, reference = as_reals(-5), as_reals(-8)
    at, below = (loss.kto(policy, reference, as_reals(reward), NO_KL, **OPTIONS) for reward in (0.5, 0.0))
    assert_close(at, below)


def test_gradient_is_the_slope_of_the_value(loss: ModuleType) -> None:
    policy, reference, rewards = as_reals(-5, -7), as_reals(-8, -5), as_reals(1, 0)
    slope = gradient(lambda point: loss.kto(point, reference, rewards, NO_KL + 1, **OPTIONS), policy)
    good, bad = (sigmoid(score) * sigmoid(-score) for score in (0.2 * 2, 0.2 * -3))
    assert_close(slope, as_reals(-0.2 * 1.2 * good / 2, 0.2 * 1.5 * bad / 2))


def test_the_majority_decides_where_a_response_belongs(loss: ModuleType) -> None:
    # the same response is called good by 7 and bad by 3 of 10: with equal weights more likely is always better
    rewards = as_reals(*[1.0] * 7, *[0.0] * 3)
    equal = OPTIONS | {"desirable": 1.0, "undesirable": 1.0}

    def value(policy: Tensor) -> Tensor:
        return loss.kto(policy.expand(1, 10), torch.zeros(1, 10), rewards, NO_KL, **equal)

    for log_ratio in (-30.0, -3.0, 0.0, 3.0, 30.0):
        slope = gradient(value, as_reals(log_ratio)).item()
        assert math.isclose(slope, -0.2 * 0.4 * sigmoid(0.2 * log_ratio) * sigmoid(-0.2 * log_ratio), rel_tol=1e-9)
