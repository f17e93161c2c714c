import math
from types import ModuleType

import torch
from loss_columns import as_reals, gradient, mean_over_single_pairs, one_pair
from mutants import CLASSIFIED, LOG_RATIO, PAIRED_VALUE, PAIRWISE
from torch import Tensor
from torch.testing import assert_close

from align_cli.divergences import alpha, forward_kl, js, reverse_kl
from align_cli.losses.dpo import dpo
from align_cli.preferences import gap
from align_cli.verify.batches import random_columns

MUTANTS = [
    *LOG_RATIO,
    *PAIRWISE,
    *CLASSIFIED,
    *PAIRED_VALUE,
    ("divergence.f_prime(", "divergence.f("),
    ("divergence.f_prime(policy - reference)", "(policy - reference)"),
    ("divergence.f_prime(policy - reference)", "divergence.f_prime((policy - reference).exp())"),
    ("gap(divergence.f_prime(policy - reference))", "divergence.f_prime(gap(policy - reference))"),
]

# f′(t) as in the paper's table, up to constants, beside the divergence
LINKS = [
    (reverse_kl(), lambda ratio: ratio.log()),
    (forward_kl(), lambda ratio: -1 / ratio),
    (js(), lambda ratio: (2 * ratio / (1 + ratio)).log()),
    (alpha(alpha=0.3), lambda ratio: (1 - ratio**-0.7) / 0.7),
]


def test_value_at_the_reference_is_log_2_under_every_divergence(loss: ModuleType) -> None:
    batch = random_columns()
    for divergence, _ in LINKS:
        value = loss.f_dpo(batch["reference"], batch["reference"], batch["pairs"], beta=0.3, divergence=divergence)
        assert_close(value, torch.full((3,), math.log(2), dtype=torch.float64))
        assert_close(loss.at_reference(batch["pairs"]), value)


def test_under_reverse_kl_it_is_dpo(loss: ModuleType) -> None:
    batch = random_columns()
    value = loss.f_dpo(batch["policy"], batch["reference"], batch["pairs"], beta=0.3, divergence=reverse_kl())
    assert_close(value, dpo(batch["policy"], batch["reference"], batch["pairs"], beta=0.3))


def test_alpha_runs_from_forward_to_reverse_kl(loss: ModuleType) -> None:
    batch = random_columns()
    policy = batch["reference"] + 0.3 * (batch["policy"] - batch["reference"])
    for end, limit in ((1 - 1e-9, reverse_kl()), (1e-9, forward_kl())):
        near = loss.f_dpo(policy, batch["reference"], batch["pairs"], beta=0.3, divergence=alpha(alpha=end))
        at_end = loss.f_dpo(policy, batch["reference"], batch["pairs"], beta=0.3, divergence=limit)
        # |∂f′/∂α| is below (log t)² max(1, 1/t) < 1e3 for these log-ratios, which are within ±4
        assert_close(near, at_end, atol=1e-6, rtol=0)


def test_a_pair_costs_the_log_loss_of_its_gap_in_f_prime(loss: ModuleType) -> None:
    for divergence, f_prime in LINKS:
        value = loss.f_dpo(as_reals(-7, -6), as_reals(-8, -5), one_pair(), beta=0.5, divergence=divergence)
        preferred, other = f_prime(as_reals(math.e, 1 / math.e))[0]
        assert_close(value, -(0.5 * (preferred - other)).sigmoid().log()[None])


def test_gradient_vanishes_at_the_optimum_of_the_regularised_rewards(loss: ModuleType) -> None:
    batch = random_columns()
    for divergence, f_prime in LINKS:
        log_ratio = batch["rewards"]  # any policy is optimal for the rewards r = β f′(π/π_ref)
        weights = gap(0.5 * f_prime(log_ratio.exp())).sigmoid()
        pairs = weights / weights.sum((-2, -1), keepdim=True)

        def value(policy: Tensor, pairs: Tensor = pairs, divergence: object = divergence) -> Tensor:
            return loss.f_dpo(policy, batch["reference"], pairs, beta=0.5, divergence=divergence)

        slope = gradient(value, batch["reference"] + log_ratio)
        assert_close(slope, torch.zeros_like(slope), atol=1e-14, rtol=0)


def test_all_pairs_cost_the_mean_of_the_pairs_one_by_one(loss: ModuleType) -> None:
    batch = random_columns(responses=5)

    def f_dpo(policy: Tensor, reference: Tensor, pairs: Tensor) -> Tensor:
        return loss.f_dpo(policy, reference, pairs, beta=0.2, divergence=js())

    columns = (batch["policy"], batch["reference"])
    assert_close(f_dpo(*columns, batch["pairs"]), mean_over_single_pairs(f_dpo, columns, batch["pairs"]))
