"""f-DPG on a model whose every expectation is a sum: its gradient is that of the divergence, for any target."""

import math
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from enumerable import tuples
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
from align_cli.metrics import approximation
from align_cli.verify.tables import log_probabilities

MUTANTS = [
    ("policy.detach()", "policy"),
    ("+ log_z[:, None]", ""),
    ("+ log_z[:, None]", "- log_z[:, None]"),
    ("reward = -torch.where", "reward = torch.where"),
    ("divergence.limit, divergence", "0.0, divergence"),
    ("(now - behavior)", "(behavior - now)"),
    ("weighted = weight * reward", "weighted = reward"),
    ("(policy.shape[-1] - 1)", "policy.shape[-1]"),
    ("(weighted.sum(-1, keepdim=True) - weighted)", "weighted.sum(-1, keepdim=True)"),
    ("-(weight * reward * policy)", "-(reward * policy)"),
    ("-(weight * reward * policy)", "(weight * reward * policy)"),
    (".mean(-1)", ".sum(-1)"),
]

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


@pytest.mark.parametrize("excluded", [(), (1, 4)], ids=["soft", "hard"])
@pytest.mark.parametrize("on_policy", [True, False], ids=["on-policy", "off-policy"])
def test_the_divergences_of_a_step_are_exact_in_expectation(on_policy: bool, excluded: tuple[int, ...]) -> None:
    policy, target = log_probabilities(tables(1)).detach(), log_target(excluded=excluded)
    behavior = policy if on_policy else log_probabilities(tables(2)).detach()
    expected: dict[str, Tensor] = {}
    for drawn in range(SEQUENCES):
        one, sampled, aim = (column[drawn].view(1, 1) for column in (policy, behavior, target))
        for name, (value, count) in approximation(one, sampled, aim, target.logsumexp(-1)[None]).items():
            expected[name] = expected.get(name, torch.zeros(())) + behavior[drawn].exp() * value / count
    for name in ("forward_kl", "tv"):
        assert_close(expected[f"divergence/{name}"], exactly(DIVERGENCES[name], policy, target))
    # half of the f-divergence, as the Jensen-Shannon divergence is usually written
    assert_close(2 * expected["divergence/js"], exactly(js(), policy, target))
    assert_close(expected["divergence/excluded"], policy[target == -math.inf].exp().sum())
    assert_close(expected["divergence/log_z"], target.logsumexp(-1))
    if not excluded:
        assert_close(expected["divergence/reverse_kl"], exactly(reverse_kl(), policy, target))


def test_each_prompt_has_its_own_normaliser() -> None:
    weights, apart = tables(1), torch.tensor([[0.0], [2.5]], dtype=torch.float64)
    shared = log_target()
    policy = log_probabilities(weights)
    scaled = (shared + apart).expand(2, -1)  # two prompts with one target, of which one is 12 times as large
    found = torch.zeros(2, dtype=torch.float64)
    for drawn in range(SEQUENCES):
        logs = policy[drawn].expand(2, 1)
        losses = fdpg.fdpg(
            logs, logs.detach(), scaled[:, drawn, None], scaled.logsumexp(-1), divergence=js(), baseline="none"
        )
        found = found + policy[drawn].detach().exp() * losses
    truth = slopes(exactly(js(), log_probabilities(weights), shared), weights)
    for prompt in range(2):
        (slope, *more) = (
            gradient.flatten() for gradient in torch.autograd.grad(found[prompt], weights, retain_graph=True)
        )
        assert_close(torch.cat([slope, *more]), truth)


def nearest(divergence: Divergence, target: Tensor) -> Tensor:
    """log π after descent along the loss's own gradient, of a policy with one distribution for both tokens."""
    table = torch.zeros(1, VOCABULARY, dtype=torch.float64, requires_grad=True)
    for _ in range(300):
        policy = log_probabilities([table, table])
        loss = expected_loss(policy, policy, target, divergence, responses=1, baseline="none")
        (gradient,) = torch.autograd.grad(loss, table)
        table = (table - 0.3 * gradient).detach().requires_grad_()
    return log_probabilities([table, table]).detach()


def test_reverse_kl_is_the_narrowest_and_forward_kl_the_widest_of_a_policy_that_cannot_be_the_target() -> None:
    target = 2 * log_target()
    found = [nearest(DIVERGENCES[kind], target) for kind in ("reverse_kl", "js", "forward_kl")]
    narrow, middle, wide = (float(-(policy.exp() * policy).sum()) for policy in found)
    assert narrow + 0.2 < middle < wide - 0.2  # 0.72, 1.46 and 1.67 nats


def test_a_constraint_is_met_more_often_under_js_and_tv_than_under_forward_kl() -> None:
    target = 2 * log_target(excluded=(2, 7))
    by_js, by_tv, by_forward_kl = (
        float(nearest(DIVERGENCES[kind], target)[target > -math.inf].exp().sum()) for kind in ("js", "tv", "forward_kl")
    )
    assert min(by_js, by_tv) > by_forward_kl + 0.02  # 0.992, 0.994 and 0.958


def test_what_the_target_excludes_costs_the_limit_and_nothing_overflows() -> None:
    policy = torch.tensor([[-5.0, -900.0]], requires_grad=True)
    target = torch.tensor([[-math.inf, -3.0]])
    losses = fdpg.fdpg(policy, policy.detach(), target, torch.zeros(1), divergence=js(), baseline="none")
    (slope,) = torch.autograd.grad(losses.sum(), policy)
    assert_close(slope[0, 0].item(), math.log(2) / 2)
    assert slope.isfinite().all() and slope[0, 1] < 0


@every_divergence
@pytest.mark.parametrize("baseline", ["none", "leave_one_out"])
def test_a_prompt_whose_z_is_not_known_teaches_nothing(divergence: Divergence, baseline: str) -> None:
    policy = torch.tensor([[-1.0, -2.0, -3.0], [-2.0, -1.5, -1.0]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[-math.inf] * 3, [-1.0, -2.0, -2.5]], dtype=torch.float64)
    log_z = torch.tensor([-math.inf, 0.5], dtype=torch.float64)
    given: dict[str, Any] = {"divergence": divergence, "baseline": baseline}
    losses = fdpg.fdpg(policy, policy.detach(), target, log_z, **given)
    slope = torch.autograd.grad(losses.sum(), policy)[0]
    assert losses[0] == 0 and not slope[0].any()
    alone = fdpg.fdpg(policy[1:], policy[1:].detach(), target[1:], log_z[1:], **given)
    assert_close(losses[1:], alone, rtol=0, atol=0)
    assert slope[1].any() and slope[1].isfinite().all()


def test_targets_reweight_the_reference() -> None:
    def one(value: float) -> Tensor:
        return torch.tensor([[value]], dtype=torch.float64)

    reference = torch.tensor([[-1.0, -2.0, -3.0]], dtype=torch.float64)
    satisfied = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)
    assert targets.pointwise(reference, satisfied, floor=0.0).tolist() == [[-1.0, -math.inf, -3.0]]
    assert_close(targets.pointwise(reference, satisfied, floor=0.01)[0, 1].item(), -2 + math.log(0.01))
    assert_close(targets.rlhf(one(-1.0), one(0.5), beta=0.25), one(1.0))
    assert_close(targets.classifier(one(-1.0), one(0.25), temperature=0.5), one(-1 + 2 * math.log(0.25)))
