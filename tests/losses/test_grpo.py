import math
from types import ModuleType

import torch
from loss_columns import gradient
from mutants import RATIO
from torch import Tensor
from torch.testing import assert_close

from align_cli.verify.batches import random_columns

MUTANTS = [
    *RATIO,
    ("beta * k3", "k3"),
    ("+ beta * k3", "- beta * k3"),
    ("k3(policy_tokens, reference_tokens)", "k3(reference_tokens, policy_tokens)"),
    ("k3(policy_tokens, reference_tokens)", "k3(policy_tokens, behavior_tokens)"),
    ("k3(policy_tokens, reference_tokens)", "k3(policy_tokens, reference_tokens).detach()"),
    ("k3(policy_tokens, reference_tokens)", "(policy_tokens - reference_tokens)"),
]


def one(value: float) -> Tensor:
    """(1, 1, 1): one token."""
    return torch.full((1, 1, 1), value, dtype=torch.float64)


def test_at_ratio_1_the_gradient_is_reinforce_and_that_of_the_kl(loss: ModuleType) -> None:
    batch = random_columns()
    slope = gradient(
        lambda policy: loss.grpo(
            policy, batch["policy_tokens"], batch["reference_tokens"], batch["advantages"], clip=0.2, beta=0.3
        ),
        batch["policy_tokens"],
    )
    likelier = (batch["reference_tokens"] - batch["policy_tokens"]).exp()
    assert_close(slope, -batch["advantages"] + 0.3 * (1 - likelier))


def test_without_a_kl_it_is_the_clipped_surrogate(loss: ModuleType) -> None:
    batch = random_columns()
    value = loss.grpo(
        batch["policy_tokens"], batch["behavior_tokens"], batch["reference_tokens"], batch["advantages"], clip=0.2,
        beta=0.0,
    )  # fmt: skip
    ratio = (batch["policy_tokens"] - batch["behavior_tokens"]).exp()
    gain = torch.minimum(ratio * batch["advantages"], ratio.clamp(0.8, 1.2) * batch["advantages"])
    assert_close(value, -gain)


def test_the_kl_of_a_token_is_never_negative_and_0_at_the_reference(loss: ModuleType) -> None:
    batch = random_columns()
    zero = torch.zeros_like(batch["advantages"])
    policy, reference = batch["policy_tokens"], batch["reference_tokens"]
    value = loss.grpo(policy, policy, reference, zero, clip=0.2, beta=0.3)
    assert (value[policy != reference] > 0).all()
    assert torch.equal(loss.grpo(policy, policy, policy, zero, clip=0.2, beta=0.3), zero)


def test_a_token_has_the_value_worked_out_by_hand(loss: ModuleType) -> None:
    # ratio 1.5 with an advantage of 2, clipped to 1.2; π_ref/π_θ = 3
    policy = one(-2.0)
    value = loss.grpo(policy, policy - math.log(1.5), policy + math.log(3), one(2.0), clip=0.2, beta=0.1)
    assert_close(value, one(-1.2 * 2 + 0.1 * (3 - 1 - math.log(3))))


def test_an_advantage_ends_at_the_clip_and_the_kl_does_not(loss: ModuleType) -> None:
    policy = one(-2.0)
    slope = gradient(
        lambda moved: loss.grpo(moved, policy - 1, policy + math.log(3), one(2.0), clip=0.2, beta=0.1), policy
    )
    assert_close(slope, one(0.1 * (1 - 3)))


def test_a_token_that_has_become_unlikely_is_still_pulled_back(loss: ModuleType) -> None:
    policy = one(-1000.0)
    slope = gradient(lambda moved: loss.grpo(moved, policy, one(-1.0), one(0.0), clip=0.2, beta=0.1), policy)
    assert slope.isfinite().all() and slope.item() < -1e6
