from types import ModuleType

import torch
from loss_columns import gradient
from mutants import RATIO
from torch import Tensor
from torch.testing import assert_close

from align_cli.verify.batches import random_columns

MUTANTS = [
    *RATIO,
    ("torch.maximum(", "torch.minimum("),
    ("(values - returns).square(), ", "(near - returns).square(), "),
    ("(near - returns).square())", "(values - returns).square())"),
    ("(near - returns).square())", "(near - old_values).square())"),
    ("near = old_values + ", "near = "),
    ("(values - old_values)", "(old_values - values)"),
    (".clamp(-value_clip, value_clip)", ".clamp(-clip, clip)"),
    (".clamp(-value_clip, value_clip)", ".clamp(max=value_clip)"),
    (".clamp(-value_clip, value_clip)", ".clamp(min=-value_clip)"),
    ("+ value_weight * error / 2", "+ value_weight * error"),
    ("+ value_weight * error / 2", "+ error / 2"),
    ("+ value_weight * error / 2", "- value_weight * error / 2"),
]

OPTIONS = {"clip": 0.2, "value_clip": 0.3, "value_weight": 0.1}


def one(value: float) -> Tensor:
    """(1, 1, 1): one token."""
    return torch.full((1, 1, 1), value, dtype=torch.float64)


def at(loss: ModuleType, ratio: float, advantage: float) -> tuple[float, float]:
    """Value and slope in log π_θ of one token whose critic is right."""

    def value(policy: Tensor) -> Tensor:
        return loss.ppo(policy, one(0), one(-1), one(0), one(advantage), one(0), **OPTIONS)

    policy = one(-1) + torch.tensor(ratio, dtype=torch.float64).log()
    return value(policy).item(), gradient(value, policy).item()


def test_at_ratio_1_the_gradient_is_that_of_reinforce(loss: ModuleType) -> None:
    batch = random_columns()
    slope = gradient(
        lambda policy: loss.ppo(
            policy,
            batch["values"],
            batch["policy_tokens"],
            batch["old_values"],
            batch["advantages"],
            batch["returns"],
            **OPTIONS,
        ),
        batch["policy_tokens"],
    )
    assert torch.equal(slope, -batch["advantages"])


def test_inside_the_clip_the_gradient_is_the_weighted_advantage(loss: ModuleType) -> None:
    for ratio in (0.81, 0.9, 1.1, 1.19):
        for advantage in (-2.0, 3.0):
            value, slope = at(loss, ratio, advantage)
            assert_close((value, slope), (-ratio * advantage, -ratio * advantage))


def test_the_clip_ends_the_gradient_on_the_side_where_nothing_is_to_gain(loss: ModuleType) -> None:
    for ratio, advantage in ((1.3, 2.0), (0.7, -2.0)):
        bound = 1.2 if ratio > 1 else 0.8
        value, slope = at(loss, ratio, advantage)
        assert_close(value, -bound * advantage)
        assert slope == 0


def test_on_the_other_side_a_token_is_brought_back(loss: ModuleType) -> None:
    for ratio, advantage in ((1.3, -2.0), (0.7, 2.0), (5.0, -2.0), (0.01, 2.0)):
        value, slope = at(loss, ratio, advantage)
        assert_close((value, slope), (-ratio * advantage, -ratio * advantage))


def test_it_is_never_below_the_surrogate_without_a_clip(loss: ModuleType) -> None:
    batch = random_columns()
    columns = [batch[name] for name in ("policy_tokens", "values", "behavior_tokens", "old_values", "advantages")]
    value = loss.ppo(*columns, batch["values"], clip=0.2, value_clip=0.3, value_weight=0.0)
    ratio = (batch["policy_tokens"] - batch["behavior_tokens"]).exp()
    assert (value >= -ratio * batch["advantages"] - 1e-14).all()
    wide = loss.ppo(*columns, batch["values"], clip=1e6, value_clip=0.3, value_weight=0.0)
    assert_close(wide, -ratio * batch["advantages"])


def value_slope(loss: ModuleType, value: float, old: float, target: float) -> float:
    return gradient(
        lambda values: loss.ppo(one(-1), values, one(-1), one(old), one(0), one(target), **OPTIONS), one(value)
    ).item()


def test_a_value_near_its_old_one_has_half_the_squared_error(loss: ModuleType) -> None:
    found = loss.ppo(one(-1), one(0.2), one(-1), one(0), one(0), one(2), **OPTIONS)
    assert_close(found, one(0.1 * (2 - 0.2) ** 2 / 2))
    assert_close(value_slope(loss, 0.2, 0.0, 2.0), 0.1 * (0.2 - 2))


def test_a_value_moves_no_further_than_its_clip_towards_the_return(loss: ModuleType) -> None:
    assert value_slope(loss, 0.4, 0.0, 2.0) == 0
    assert value_slope(loss, -0.4, 0.0, -2.0) == 0
    found = loss.ppo(one(-1), one(0.4), one(-1), one(0), one(0), one(2), **OPTIONS)
    assert_close(found, one(0.1 * (2 - 0.3) ** 2 / 2))


def test_a_value_that_has_moved_away_from_the_return_is_brought_back(loss: ModuleType) -> None:
    assert_close(value_slope(loss, -0.4, 0.0, 2.0), 0.1 * (-0.4 - 2))
    assert_close(value_slope(loss, 0.4, 0.0, -2.0), 0.1 * (0.4 + 2))


def test_a_right_critic_and_no_advantage_cost_nothing(loss: ModuleType) -> None:
    batch = random_columns()
    zero = torch.zeros_like(batch["returns"])
    value = loss.ppo(
        batch["policy_tokens"], batch["returns"], batch["behavior_tokens"], batch["returns"], zero, batch["returns"],
        **OPTIONS,
    )  # fmt: skip
    assert torch.equal(value, zero)
