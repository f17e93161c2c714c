"""Ratios, the clipped surrogate and the estimators of the KL, on a policy of three tokens."""

import torch
from torch import Tensor
from torch.testing import assert_close

from align_cli.metrics import objective
from align_cli.surrogates import clipped, k3, ratio

REFERENCE = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()


def logits() -> Tensor:
    return torch.tensor([0.3, -1.1, 0.8], dtype=torch.float64, requires_grad=True)


def slope(value: Tensor, of: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(value, of)
    return found


def test_the_ratio_is_the_exponential_of_the_difference() -> None:
    policy, behavior = REFERENCE - 1, REFERENCE.flip(0)
    assert_close(ratio(policy, behavior), (policy - behavior).exp())
    assert torch.equal(ratio(policy, policy), torch.ones(3, dtype=torch.float64))


def test_ratios_go_on_in_a_straight_line_and_keep_their_gradient() -> None:
    far = torch.tensor([-1000.0, 19.0, 21.0, 1000.0], dtype=torch.float64, requires_grad=True)
    found = ratio(far, torch.zeros_like(far))
    edge = torch.tensor(20.0, dtype=torch.float64).exp()
    assert_close(found, torch.stack([0 * edge, edge / torch.e, 2 * edge, 981 * edge]))
    assert_close(slope(found.sum(), far), torch.stack([0 * edge, edge / torch.e, edge, edge]))


def test_what_the_policy_has_given_up_keeps_its_weight_in_single_precision() -> None:
    far = torch.tensor([-1e-6, -10.0, -17.0, -30.0, -80.0])
    found = ratio(far, torch.zeros_like(far))
    assert found.dtype == torch.float32
    # a rounding of the exponential, and one of its argument
    assert_close(found.double(), far.double().exp(), rtol=2 * torch.finfo(torch.float32).eps, atol=0)


def test_half_precision_is_left_for_single() -> None:
    half = REFERENCE.bfloat16()
    assert ratio(half, half).dtype == k3(half, half).dtype == torch.float32
    assert ratio(REFERENCE, REFERENCE).dtype == torch.float64


def test_the_surrogate_is_flat_only_where_nothing_is_to_gain() -> None:
    ratios = torch.tensor([0.5, 0.9, 1.0, 1.1, 2.0], dtype=torch.float64, requires_grad=True)
    for advantage, expected in ((3.0, [-3, -3, -3, -3, 0]), (-3.0, [0, 3, 3, 3, 3])):
        value = clipped(ratios, torch.full_like(ratios, advantage), clip=0.2)
        assert slope(value.sum(), ratios).tolist() == expected


def test_k1_and_k3_are_in_expectation_the_kl_of_the_policy_to_the_reference() -> None:
    policy = logits().log_softmax(-1).detach()
    exactly = (policy.exp() * (policy - REFERENCE)).sum()
    assert_close((policy.exp() * k3(policy, REFERENCE)).sum(), exactly)
    total = torch.zeros((), dtype=torch.float64)
    for token in range(3):
        one = {"ratings": torch.zeros(1, 1), "rewards": torch.zeros(1, 1), "mask": torch.ones(1, 1, 1)}
        logs = {"behavior_tokens": policy[token].view(1, 1, 1), "reference_tokens": REFERENCE[token].view(1, 1, 1)}
        total = total + policy[token].exp() * objective(**logs, **one, beta=0.1)["objective/kl"][0]
    assert_close(total, exactly)


def test_k3_is_never_negative_and_varies_less_than_k1_near_the_reference() -> None:
    apart = torch.arange(-50, 51, dtype=torch.float64) / 10
    found = k3(apart, torch.zeros_like(apart))
    assert (found[apart != 0] > 0).all() and found[50] == 0
    near = (REFERENCE + torch.tensor([0.05, -0.02, 0.01], dtype=torch.float64)).log_softmax(-1)
    weight, mean = near.exp(), (near.exp() * (near - REFERENCE)).sum()
    spreads = [(weight * (term - mean).square()).sum() for term in (k3(near, REFERENCE), near - REFERENCE)]
    assert spreads[0] < spreads[1] / 100


def test_the_expected_gradient_of_k3_is_that_of_the_kl_of_the_reference_to_the_policy() -> None:
    weights = logits()
    policy = weights.log_softmax(-1)
    found = slope((policy.detach().exp() * k3(policy, REFERENCE)).sum(), weights)
    policy = weights.log_softmax(-1)
    assert_close(found, slope((REFERENCE.exp() * (REFERENCE - policy)).sum(), weights))
    policy = weights.log_softmax(-1)
    reverse = slope((policy.exp() * (policy - REFERENCE)).sum(), weights)
    assert (found - reverse).abs().max() > 0.05
