from types import ModuleType

import torch
from loss_columns import as_reals, gradient
from torch.testing import assert_close

from align_cli.verify.batches import random_columns

MUTANTS = [
    ("ratio(policy, behavior)", "ratio(behavior, policy)"),
    ("ratio(policy, behavior)", "(policy - behavior)"),
    ("ratio(policy, behavior)", "ratio(policy, behavior).detach()"),
    ("advantages[..., 0]", "-advantages[..., 0]"),
    ("advantages[..., 0]", "advantages.sum(-1)"),
    ("clip=clip", "clip=2 * clip"),
    ("clip=clip", "clip=1e9"),
    (".mean(-1)", ".sum(-1)"),
    ("return clipped", "return -clipped"),
]


def test_at_ratio_1_the_gradient_is_reinforce_of_whole_responses(loss: ModuleType) -> None:
    batch = random_columns()
    slope = gradient(lambda policy: loss.rloo(policy, batch["policy"], batch["advantages"], clip=0.2), batch["policy"])
    assert_close(slope, -batch["advantages"][..., 0] / 4)


def test_a_group_has_the_value_worked_out_by_hand(loss: ModuleType) -> None:
    # ratios 1.5, 0.9, 0.5 with advantages 2, −1, −1: the first and the last are clipped
    behavior = as_reals(-5, -6, -7)
    policy = behavior + as_reals(1.5, 0.9, 0.5).log()
    advantages = as_reals(2, -1, -1)[..., None].expand(1, 3, 4)
    value = loss.rloo(policy, behavior, advantages, clip=0.2)
    assert_close(value, torch.tensor([-(1.2 * 2 - 0.9 - 0.8) / 3], dtype=torch.float64))
    slope = gradient(lambda moved: loss.rloo(moved, behavior, advantages, clip=0.2), policy)
    assert_close(slope, as_reals(0, 0.9 / 3, 0))


def test_a_long_response_counts_as_much_as_a_short_one(loss: ModuleType) -> None:
    batch = random_columns()
    advantage = batch["advantages"][..., :1]
    short, long = (
        loss.rloo(batch["policy"], batch["behavior"], advantage.expand(3, 4, tokens), clip=0.2) for tokens in (1, 9)
    )
    assert torch.equal(short, long)


def test_what_has_gone_too_far_the_wrong_way_is_brought_back(loss: ModuleType) -> None:
    behavior = as_reals(-5, -6)
    policy = behavior + as_reals(3.0, 0.1).log()
    advantages = as_reals(-1, 1)[..., None]
    slope = gradient(lambda moved: loss.rloo(moved, behavior, advantages, clip=0.2), policy)
    assert_close(slope, as_reals(3.0 / 2, -0.1 / 2))
