"""f-DPG on a model whose every expectation is a sum: its gradient is that of the divergence, for any target."""

import math
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from enumerable import log_probabilities, tuples
from torch import Tensor
from torch.testing import assert_close

from align_cli import targets
from align_cli.divergences import (
    Divergence,
    alpha,
    forward_chi2,
    forward_kl,
    hellinger,
    jeffreys,
    js,
    reverse_chi2,
    reverse_kl,
    tv,
)
from align_cli.losses import fdpg

DIVERGENCES = {
    "reverse_kl": reverse_kl(),
    "forward_kl": forward_kl(),
    "js": js(),
    "alpha": alpha(alpha=0.3),
    "tv": tv(),
    "hellinger": hellinger(),
    "forward_chi2": forward_chi2(),
    "reverse_chi2": reverse_chi2(),
    "jeffreys": jeffreys(),
}
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES.keys())
# a target that excludes responses has no finite value where the limit is infinite
MEANT = [
    pytest.param(divergence, excluded, id=f"{name}-{'hard' if excluded else 'soft'}")
    for name, divergence in DIVERGENCES.items()
    for excluded in ((), (1, 4))
    if not excluded or divergence.limit < math.inf
]
VOCABULARY, STEPS = 3, 2
SEQUENCES = VOCABULARY**STEPS


def tables(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(VOCABULARY**step, VOCABULARY, generator=generator, dtype=torch.float64).requires_grad_()
        for step in range(STEPS)
    ]


def log_target(*, excluded: tuple[int, ...] = ()) -> Tensor:
    """log P of all sequences, not normalised."""
    generator = torch.Generator().manual_seed(7)
    found = torch.randn(SEQUENCES, generator=generator, dtype=torch.float64) - 1.7
    found[list(excluded)] = -math.inf
    return found


def exactly(divergence: Divergence, policy: Tensor, target: Tensor) -> Tensor:
    """D_f(π ‖ p) = Σ_{p>0} p f(π/p) + f′(∞) π(p = 0)."""
    there = target > -math.inf
    fixed = target[there].log_softmax(-1)
    inside = (fixed.exp() * divergence.f(policy[there] - fixed)).sum()
    return inside if there.all() else inside + divergence.limit * policy[~there].exp().sum()


def slopes(value: Tensor, of: list[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(value, of)])


def expected_loss(
    policy: Tensor,
    behavior: Tensor,
    target: Tensor,
    divergence: Divergence,
    *,
    responses: int,
    baseline: str,
    loss: ModuleType = fdpg,
) -> Tensor:
    """The loss of all groups of K responses, weighted with their probability under the behaviour."""
    drawn = tuples(SEQUENCES, responses)
    weight = behavior.detach()[drawn].sum(-1).exp()
    log_z = target.logsumexp(-1).expand(len(drawn))
    given = {"divergence": divergence, "baseline": baseline}
    losses = loss.fdpg(policy[drawn], behavior.detach()[drawn], target[drawn], log_z, **given)
    return (weight * losses).sum()


@pytest.mark.parametrize("divergence, excluded", MEANT)
@pytest.mark.parametrize("responses, baseline", [(1, "none"), (2, "none"), (2, "leave_one_out"), (3, "leave_one_out")])
@pytest.mark.parametrize("on_policy", [True, False], ids=["on-policy", "off-policy"])
def test_its_gradient_is_that_of_the_divergence(
    divergence: Divergence, responses: int, baseline: str, on_policy: bool, excluded: tuple[int, ...]
) -> None:
    weights = tables(1)
    policy = log_probabilities(weights)
    behavior = policy if on_policy else log_probabilities(tables(2))
    target = log_target(excluded=excluded)
    found = slopes(expected_loss(policy, behavior, target, divergence, responses=responses, baseline=baseline), weights)
    truth = slopes(exactly(divergence, log_probabilities(weights), target), weights)
    # Sums of 9^K terms, each rounded once relative to the largest.
    assert_close(found, truth, rtol=1e-9, atol=1e-11)


def test_off_policy_the_gradient_is_that_of_the_divergence(loss: ModuleType) -> None:
    for name, excluded in (("js", (1, 4)), ("forward_kl", (1, 4)), ("reverse_kl", ())):
        divergence, weights, behavior = DIVERGENCES[name], tables(1), log_probabilities(tables(2))
        target = log_target(excluded=excluded)
        truth = slopes(exactly(divergence, log_probabilities(weights), target), weights)
        for baseline in ("none", "leave_one_out"):
            policy = log_probabilities(weights)
            given = {"responses": 2, "baseline": baseline, "loss": loss}
            assert_close(slopes(expected_loss(policy, behavior, target, divergence, **given), weights), truth)


def test_the_baseline_is_the_weighted_mean_of_the_other_responses(loss: ModuleType) -> None:
    policy = torch.tensor([[-1.0, -2.0, -0.5]], dtype=torch.float64, requires_grad=True)
    behavior = torch.tensor([[-1.5, -1.0, -0.5]], dtype=torch.float64)
    target = torch.tensor([[-2.0, -1.0, -1.5]], dtype=torch.float64)
    reward = [-(p - t + 0.3) for p, t in zip(policy[0].tolist(), target[0].tolist(), strict=True)]  # of reverse KL
    weight = [math.exp(p - q) for p, q in zip(policy[0].tolist(), behavior[0].tolist(), strict=True)]
    others = [sum(weight[j] * reward[j] for j in range(3) if j != k) / 2 for k in range(3)]
    log_z = torch.tensor([0.3], dtype=torch.float64)
    value = loss.fdpg(policy, behavior, target, log_z, divergence=reverse_kl(), baseline="leave_one_out")
    (slope,) = torch.autograd.grad(value.sum(), policy)
    assert slope[0].tolist() == pytest.approx([-weight[k] * (reward[k] - others[k]) / 3 for k in range(3)])


@every_divergence
def test_at_the_target_every_single_response_has_advantage_zero(divergence: Divergence) -> None:
    target = log_target()
    policy = target.log_softmax(-1)[None].requires_grad_()
    losses = fdpg.fdpg(
        policy, policy.detach(), target[None], target.logsumexp(-1)[None], divergence=divergence, baseline="none"
    )
    (slope,) = torch.autograd.grad(losses.sum(), policy)
    # log π − log P + log Z is rounded; total variation jumps there
    tolerance = 1 / 2 if divergence is DIVERGENCES["tv"] else 1e-14
    assert slope.abs().max() <= tolerance / SEQUENCES


def test_reverse_kl_on_the_rlhf_target_is_reinforcement_learning_under_a_kl_penalty() -> None:
    weights, beta = tables(1), 0.7
    reference, rewards = log_probabilities(tables(3)).detach(), torch.linspace(-1, 1, SEQUENCES, dtype=torch.float64)
    policy = log_probabilities(weights)
    target = targets.rlhf(reference[None], rewards[None], beta=beta)[0]
    found = slopes(expected_loss(policy, policy, target, reverse_kl(), responses=2, baseline="leave_one_out"), weights)
    policy = log_probabilities(weights)
    objective = (policy.exp() * (rewards - beta * (policy - reference))).sum()
    assert_close(found, -slopes(objective, weights) / beta)


def test_a_wrong_normaliser_only_scales_the_gradient_of_power_divergences() -> None:
    weights, target = tables(1), log_target()

    def cosine(divergence: Divergence) -> float:
        found = []
        for shift in (0.0, math.log(3)):
            policy = log_probabilities(weights)
            drawn = torch.arange(SEQUENCES)[:, None]
            log_z = (target.logsumexp(-1) + shift).expand(SEQUENCES)
            losses = fdpg.fdpg(
                policy[drawn], policy.detach()[drawn], target[drawn], log_z, divergence=divergence, baseline="none"
            )
            found.append(slopes((policy.detach().exp() * losses).sum(), weights))
        return float(torch.cosine_similarity(found[0], found[1], dim=0))

    for name in ("forward_kl", "reverse_kl", "hellinger", "alpha", "forward_chi2", "reverse_chi2"):
        assert cosine(DIVERGENCES[name]) == pytest.approx(1, abs=1e-12), name
    for name in ("tv", "js", "jeffreys"):
        assert cosine(DIVERGENCES[name]) < 0.9999, name


@every_divergence
def test_descent_along_its_gradient_lowers_the_divergence(divergence: Divergence) -> None:
    weights, target = tables(1), log_target()
    values: list[float] = []
    for _ in range(30):
        policy = log_probabilities(weights)
        values.append(float(exactly(divergence, policy.detach(), target)))
        loss = expected_loss(policy, policy, target, divergence, responses=1, baseline="none")
        with torch.no_grad():
            for table, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                table -= 0.02 * gradient
    assert all(later < earlier for earlier, later in pairwise(values))


def test_what_the_target_excludes_costs_the_limit_and_nothing_overflows() -> None:
    policy = torch.tensor([[-5.0, -900.0]], requires_grad=True)
    target = torch.tensor([[-math.inf, -3.0]])
    losses = fdpg.fdpg(policy, policy.detach(), target, torch.zeros(1), divergence=js(), baseline="none")
    (slope,) = torch.autograd.grad(losses.sum(), policy)
    assert_close(slope[0, 0].item(), math.log(2) / 2)
    assert slope.isfinite().all() and slope[0, 1] < 0


def test_targets_reweight_the_reference() -> None:
    def one(value: float) -> Tensor:
        return torch.tensor([[value]], dtype=torch.float64)

    reference = torch.tensor([[-1.0, -2.0, -3.0]], dtype=torch.float64)
    satisfied = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)
    assert targets.pointwise(reference, satisfied, floor=0.0).tolist() == [[-1.0, -math.inf, -3.0]]
    assert_close(targets.pointwise(reference, satisfied, floor=0.01)[0, 1].item(), -2 + math.log(0.01))
    assert_close(targets.rlhf(one(-1.0), one(0.5), beta=0.25), one(1.0))
    assert_close(targets.classifier(one(-1.0), one(0.25), temperature=0.5), one(-1 + 2 * math.log(0.25)))
