from types import ModuleType

import torch
from loss_columns import gradient
from mutants import RATIO
from torch.testing import assert_close

from align_cli.verify.batches import random_columns

MUTANTS = RATIO


def test_at_ratio_1_the_gradient_is_that_of_reinforce(loss: ModuleType) -> None:
    batch = random_columns()
    slope = gradient(
        lambda policy: loss.reinforce_pp(policy, batch["policy_tokens"], batch["advantages"], clip=0.2),
        batch["policy_tokens"],
    )
    assert torch.equal(slope, -batch["advantages"])


def test_it_is_the_lower_of_two_gains(loss: ModuleType) -> None:
    batch = random_columns()
    value = loss.reinforce_pp(batch["policy_tokens"], batch["behavior_tokens"], batch["advantages"], clip=0.2)
    ratio = (batch["policy_tokens"] - batch["behavior_tokens"]).exp()
    gain = torch.minimum(ratio * batch["advantages"], ratio.clamp(0.8, 1.2) * batch["advantages"])
    assert_close(value, -gain)
    assert (value != -ratio * batch["advantages"]).any()


def test_it_is_ppo_without_a_critic(loss: ModuleType) -> None:
    from align_cli.losses.ppo import ppo

    batch = random_columns()
    zero = torch.zeros_like(batch["values"])
    value = loss.reinforce_pp(batch["policy_tokens"], batch["behavior_tokens"], batch["advantages"], clip=0.1)
    with_critic = ppo(
        batch["policy_tokens"], zero, batch["behavior_tokens"], zero, batch["advantages"], zero, clip=0.1,
        value_clip=0.2, value_weight=0.1,
    )  # fmt: skip
    assert_close(value, with_critic)
