"""Each algorithm, optimised exactly, arrives where its paper proves.

The world has 27 sequences of three tokens, or 512 of a vocabulary of eight, a reference μ and rewards r of every
sequence. A policy is a table (`align_cli.verify.tables`), so that nothing but the loss decides where it ends.
"""

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from enumerable import optimise, tables_of, tuples
from torch import Tensor
from torch.testing import assert_close

from align_cli.divergences import Divergence, alpha, forward_kl, js, reverse_kl
from align_cli.losses.cdpo import cdpo
from align_cli.losses.dpo import dpo
from align_cli.losses.exo import exo
from align_cli.losses.f_dpo import f_dpo
from align_cli.losses.hinge import hinge
from align_cli.losses.info_nca import info_nca
from align_cli.losses.ipo import ipo
from align_cli.losses.kto import kto
from align_cli.losses.nca import nca
from align_cli.losses.robust_dpo import robust_dpo
from align_cli.losses.sft import sft
from align_cli.preferences import gap
from align_cli.verify.tables import candidates, log_probabilities, random_parts

KWise = Callable[..., Tensor]


class World:
    """Rewards and a reference of whole parts over all sequences.

    Attributes:
        tables: the reference's logits; reference: its log μ, (S,); rewards: r, (S,);
        candidates: (N,) sequences, each as often as it has parts, so that their mean is E_μ.
    """

    def __init__(self, vocabulary: int, steps: int, seed: int = 0) -> None:
        sequences = vocabulary**steps
        parts = random_parts(sequences, seed)
        self.rewards = torch.randn(sequences, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.candidates = candidates(parts)
        self.tables = tables_of(parts.double().log(), vocabulary, steps)
        self.reference = log_probabilities(self.tables)

    def optimum(self, temperature: float) -> Tensor:
        """log of π* ∝ μ exp(r/temperature)."""
        return (self.reference + self.rewards / temperature).log_softmax(-1)

    def in_the_limit(self, loss: KWise, **options: float) -> Callable[[Tensor], Tensor]:
        """log π -> the K-wise loss on infinitely many samples of the reference."""
        drawn = self.candidates
        return lambda policy: loss(
            policy[None, drawn], self.reference[None, drawn], self.rewards[None, drawn], **options
        )[0]

    def over_tuples(self, loss: KWise, size: int, **options: float) -> Callable[[Tensor], Tensor]:
        """log π -> the expectation of the K-wise loss over `size` samples of the reference."""
        drawn = tuples(len(self.rewards), size)
        probability = self.reference[drawn].sum(-1).exp()
        return lambda policy: probability @ loss(policy[drawn], self.reference[drawn], self.rewards[drawn], **options)

    def preferences(self, probability: Tensor | None = None) -> Tensor:
        """(1, S, S): pairs drawn from μ, labelled by Bradley and Terry, or by another probability of i ≻ j."""
        drawn = self.reference.exp()
        label = gap(self.rewards).sigmoid() if probability is None else probability
        pairs = drawn[:, None] * drawn[None, :] * label
        return (pairs / pairs.sum())[None]


@pytest.fixture(scope="module")
def small() -> World:
    return World(vocabulary=3, steps=2)


@pytest.fixture(scope="module")
def world() -> World:
    return World(vocabulary=3, steps=3)


def stated(loss: KWise, *columns: Tensor, **options: Any) -> Tensor:
    """What `optimum` beside a loss says of one prompt, normalised."""
    optimum = vars(import_module(loss.__module__))["optimum"]
    return optimum(*(column[None] for column in columns), **options)[0].log_softmax(-1)


def kl(first: Tensor, second: Tensor) -> Tensor:
    return (first.exp() * (first - second)).sum()


def test_the_model_is_normalised_and_can_be_any_distribution() -> None:
    world = World(vocabulary=8, steps=3)
    assert_close(world.reference.exp().sum().item(), 1.0)
    counts = torch.bincount(world.candidates)
    assert_close(world.reference.exp(), counts / counts.sum(), check_dtype=False)


def test_the_kl_regularised_reward_is_the_distance_to_its_optimum(world: World) -> None:
    policy = torch.randn(27, generator=torch.Generator().manual_seed(3), dtype=torch.float64).log_softmax(-1)
    objective = (policy.exp() * world.rewards).sum() - 0.4 * kl(policy, world.reference)
    log_z = (world.reference + world.rewards / 0.4).logsumexp(-1)
    assert_close(objective, 0.4 * log_z - 0.4 * kl(policy, world.optimum(0.4)))


def test_with_infinitely_many_samples_exo_is_the_reverse_kl_to_the_optimum(world: World) -> None:
    policy = torch.randn(27, generator=torch.Generator().manual_seed(3), dtype=torch.float64).log_softmax(-1)
    assert_close(world.in_the_limit(exo, alpha=0.4, beta=1.0)(policy), kl(policy, world.optimum(0.4)))


def test_with_infinitely_many_samples_info_nca_is_the_forward_kl_to_the_optimum(world: World) -> None:
    policy = torch.randn(27, generator=torch.Generator().manual_seed(3), dtype=torch.float64).log_softmax(-1)
    value = world.in_the_limit(info_nca, alpha=0.4, beta=1.0)
    assert_close(value(policy) - value(world.optimum(0.4)), kl(world.optimum(0.4), policy))


def test_exos_gradient_is_that_of_reinforcement_learning(world: World) -> None:
    logits = torch.randn(27, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    policy = logits.log_softmax(-1)
    objective = (policy.exp() * world.rewards).sum() - 0.4 * kl(policy, world.reference)
    (ascent,) = torch.autograd.grad(objective, logits, retain_graph=True)
    (descent,) = torch.autograd.grad(world.in_the_limit(exo, alpha=0.4, beta=1.0)(policy), logits)
    assert_close(descent, -ascent / 0.4)


@pytest.mark.parametrize("loss", [info_nca, exo])
@pytest.mark.parametrize("size", [2, 3])
def test_contrast_of_a_few_samples_reaches_the_reference_tilted_by_alpha_beta(
    small: World, loss: KWise, size: int
) -> None:
    found = optimise(small.over_tuples(loss, size, alpha=0.8, beta=0.5), small.tables)
    assert_close(found, stated(loss, small.reference, small.rewards, alpha=0.8, beta=0.5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("loss", [info_nca, exo])
def test_contrast_of_all_samples_reaches_the_reference_tilted_by_alpha_beta(world: World, loss: KWise) -> None:
    found = optimise(world.in_the_limit(loss, alpha=0.8, beta=0.5), world.tables)
    assert_close(found, stated(loss, world.reference, world.rewards, alpha=0.8, beta=0.5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("vocabulary", [3, 8])
def test_noise_contrast_reaches_the_reference_tilted_by_alpha(vocabulary: int) -> None:
    # With β = 1. Other β ask for log-ratios that no normalised policy has: β log π/μ = log π*/μ.
    world = World(vocabulary, steps=3)
    found = optimise(world.in_the_limit(nca, alpha=0.8, beta=1.0), world.tables)
    # In KL, and not at each sequence: of 512 the least likely has 2e-5 of the mass and settles last.
    assert kl(world.optimum(0.8), world.reference) > 0.1
    assert kl(world.optimum(0.8), found) < 1e-9


def test_exo_at_the_reference_rises_with_the_number_of_samples_to_its_limit(small: World) -> None:
    options = {"alpha": 0.3, "beta": 1.0}
    values = [small.over_tuples(exo, size, **options)(small.reference).item() for size in (2, 3, 4)]
    limit = kl(small.reference, small.optimum(0.3)).item()
    assert_close(small.in_the_limit(exo, **options)(small.reference).item(), limit)
    assert values == sorted(values) and values[-1] < limit


def test_a_policy_that_cannot_be_optimal_is_nearest_in_the_divergence_of_its_loss(small: World) -> None:
    # One distribution for both steps: the family does not hold the optimum.
    unigram = torch.zeros(1, 3, dtype=torch.float64)

    def fit(loss: KWise) -> Tensor:
        value = small.in_the_limit(loss, alpha=0.3, beta=1.0)
        weights = unigram.clone().requires_grad_()
        optimiser = torch.optim.LBFGS([weights], max_iter=200, tolerance_change=0, line_search_fn="strong_wolfe")

        def closure() -> float:
            optimiser.zero_grad()
            current = value(log_probabilities([weights, weights]))
            current.backward()
            return current.item()

        optimiser.step(closure)
        return log_probabilities([weights, weights]).detach()

    by_exo, by_info_nca, optimum = fit(exo), fit(info_nca), small.optimum(0.3)
    assert kl(by_exo, optimum) < kl(by_info_nca, optimum) - 1e-3
    assert kl(optimum, by_info_nca) < kl(optimum, by_exo) - 1e-3


def test_dpo_on_bradley_terry_preferences_recovers_the_optimum(world: World) -> None:
    pairs = world.preferences()
    found = optimise(lambda policy: dpo(policy[None], world.reference[None], pairs, beta=0.7)[0], world.tables)
    assert_close(found, world.optimum(0.7), atol=1e-5, rtol=0)
    assert_close(stated(dpo, world.reference, pairs[0], beta=0.7), world.optimum(0.7))


def test_robust_dpo_recovers_the_optimum_from_flipped_labels_and_dpo_does_not(world: World) -> None:
    label = gap(world.rewards).sigmoid()
    flipped = world.preferences(0.8 * label + 0.2 * (1 - label))
    reference = world.reference[None]
    robust = optimise(
        lambda policy: robust_dpo(policy[None], reference, flipped, beta=0.7, label_smoothing=0.2)[0], world.tables
    )
    assert_close(robust, world.optimum(0.7), atol=1e-5, rtol=0)
    assert_close(stated(robust_dpo, world.reference, flipped[0], beta=0.7, label_smoothing=0.2), world.optimum(0.7))
    plain = optimise(lambda policy: dpo(policy[None], reference, flipped, beta=0.7)[0], world.tables)
    assert (plain - world.optimum(0.7)).abs().max() > 0.1


def test_cdpo_on_certain_labels_keeps_the_margin_of_its_smoothing() -> None:
    world = World(vocabulary=2, steps=1)
    certain = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]], dtype=torch.float64)
    found = optimise(
        lambda policy: cdpo(policy[None], world.reference[None], certain, beta=0.7, label_smoothing=0.1)[0],
        world.tables,
    )
    first, second = (found - world.reference).tolist()
    assert math.isclose(0.7 * (first - second), math.log(0.9 / 0.1), abs_tol=1e-6)


def test_hinge_on_certain_labels_stops_at_its_margin() -> None:
    world = World(vocabulary=2, steps=1)
    certain = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]], dtype=torch.float64)

    def value(policy: Tensor) -> Tensor:
        return hinge(policy[None], world.reference[None], certain, beta=0.7)[0]

    first, second = (optimise(value, world.tables) - world.reference).tolist()
    assert 0.7 * (first - second) >= 1 - 1e-9


@pytest.mark.parametrize(
    "divergence", [reverse_kl(), forward_kl(), js(), alpha(alpha=0.5)], ids=["reverse_kl", "forward_kl", "js", "alpha"]
)
def test_f_dpo_on_bradley_terry_preferences_recovers_the_optimum_of_its_divergence(
    world: World, divergence: Divergence
) -> None:
    pairs = world.preferences()
    found = optimise(
        lambda policy: f_dpo(policy[None], world.reference[None], pairs, beta=0.7, divergence=divergence)[0],
        world.tables,
    )
    # the stationarity of E[r] − β D_f: r − β f′(π/μ) is the same for all sequences
    assert_close(stated(f_dpo, world.reference, pairs[0], beta=0.7, divergence=divergence), found, atol=1e-5, rtol=0)
    multiplier = world.rewards - 0.7 * divergence.f_prime(found - world.reference)
    assert_close(multiplier, multiplier.mean().expand(27), atol=1e-5, rtol=0)

    def objective(policy: Tensor) -> Tensor:
        distance = (world.reference.exp() * divergence.f(policy - world.reference)).sum()
        return (policy.exp() * world.rewards).sum() - 0.7 * distance

    random = torch.Generator().manual_seed(4)
    for _ in range(20):
        elsewhere = (found + 0.1 * torch.randn(27, generator=random, dtype=torch.float64)).log_softmax(-1)
        assert objective(elsewhere) < objective(found)


def test_ipo_tilts_the_reference_by_the_rate_of_being_preferred(world: World) -> None:
    pairs = world.preferences()
    lengths = torch.full((1, 27), 3)
    found = optimise(lambda policy: ipo(policy[None], world.reference[None], lengths, pairs, beta=0.7)[0], world.tables)
    rate = gap(world.rewards).sigmoid() @ world.reference.exp()  # p(y ≻ μ)
    # β is per nat and token, and a response has three
    assert_close(found, (world.reference + 3 * rate / 0.7).log_softmax(-1), atol=1e-5, rtol=0)


def test_kto_gives_all_mass_to_what_the_majority_calls_good(world: World) -> None:
    share = world.rewards.sigmoid()  # how often a response is called desirable
    drawn = world.reference.exp()
    labels = torch.cat([torch.ones(27), torch.zeros(27)]).double()[:, None]
    weight = torch.cat([drawn * share, drawn * (1 - share)])
    no_kl = torch.zeros(54, dtype=torch.float64)

    def value(policy: Tensor) -> Tensor:
        both, reference = policy.repeat(2)[:, None], world.reference.repeat(2)[:, None]
        return weight @ kto(both, reference, labels, no_kl, beta=1.0, threshold=0.5, desirable=1.0, undesirable=1.0)

    found = optimise(value, world.tables)
    assert found.exp()[share < 0.5].sum() < 1e-3
    assert value(found) < value(world.optimum(1.0)) - 1e-3


def test_supervised_fine_tuning_reaches_the_distribution_of_the_data(world: World) -> None:
    data = world.optimum(0.5)
    found = optimise(lambda policy: (data.exp() * sft(policy[None, :, None])[0, :, 0]).sum(), world.tables)
    assert_close(found, data, atol=1e-5, rtol=0)
