"""f-divergences between a policy and a fixed distribution, in log space.

D_f(π ‖ p) = E_p[f(t)] with t = π/p, f convex. Adding c·(t − 1) to f leaves D_f as it is and shifts f′ by c; every f
here is the centred one, f(1) = f′(1) = 0, so that f ≥ 0 pointwise and the family `alpha` is continuous in its ends.

"Forward" means that the fixed distribution comes first, KL(p ‖ π); "reverse" is KL(π ‖ p), the regulariser of RLHF.

One convention for alpha, Amari's: alpha → 0 is forward KL, alpha → 1 reverse KL. What others write translates as
    alpha = 1 − α        f-DPO's paper and code (arXiv 2309.16240), TRL until 2025
    alpha = coefficient  TRL since 2026 (`f_alpha_divergence_coef`)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from align_cli.ranges import OpenFraction

STEEPEST = 20.0
"""Exponent beyond which f′ goes on in a straight line: there its slope in log t is e^20 = 4.9e8. Without an end the
exponential overflows for a response that has become unlikely; cut off flat, its gradient would be exactly zero."""


@dataclass(frozen=True)
class Divergence:
    """One f-divergence.

    Attributes:
        f: log t -> f(t), of the same shape; never negative, 0 at log t = 0. It may overflow to +∞ where t does.
        f_prime: log t -> f′(t), of the same shape; increasing, 0 at log t = 0, finite for |log t| up to 1000 and far
            beyond, see `STEEPEST`.
        links: whether f′(0+) = −∞. Only then does every reward have a policy that is optimal under the divergence
            as a regulariser, r = β f′(π/π_ref) + const, and only then may it serve f-DPO.
        limit: f′(∞), what a unit of π costs where p is 0. It is +∞ where the divergence forbids that; then a target
            that excludes responses has no meaning.
    """

    f: Callable[[Tensor], Tensor]
    f_prime: Callable[[Tensor], Tensor]
    links: bool
    limit: float


def reverse_kl() -> Divergence:
    """KL(π ‖ p): f(t) = t log t − t + 1, f′(t) = log t."""
    return Divergence(
        f=lambda log_ratio: log_ratio.exp() * log_ratio - torch.expm1(log_ratio),
        f_prime=lambda log_ratio: log_ratio,
        links=True,
        limit=math.inf,
    )


def forward_kl() -> Divergence:
    """KL(p ‖ π): f(t) = t − 1 − log t, f′(t) = 1 − 1/t."""
    return Divergence(
        f=lambda log_ratio: torch.expm1(log_ratio) - log_ratio,
        f_prime=lambda log_ratio: -expm1(-log_ratio),
        links=True,
        limit=1.0,
    )


def js() -> Divergence:
    """Twice the Jensen-Shannon divergence: f(t) = t log t − (t + 1) log((t + 1)/2), f′(t) = log(2t/(1 + t))."""

    def f_prime(log_ratio: Tensor) -> Tensor:
        return logsigmoid(log_ratio) + math.log(2)

    return Divergence(
        f=lambda log_ratio: log_ratio.exp() * f_prime(log_ratio) - softplus(log_ratio) + math.log(2),
        f_prime=f_prime,
        links=True,
        limit=math.log(2),
    )


def alpha(*, alpha: OpenFraction) -> Divergence:
    """Amari's family: f(t) = (t^α − α t − (1 − α)) / (α(α − 1)), f′(t) = (t^(α−1) − 1)/(α − 1).

    Args:
        alpha: α in (0, 1); → 0 is forward KL, → 1 reverse KL, 1/2 four times the squared Hellinger distance
            1 − Σ √(π p).
    """
    return Divergence(
        f=lambda log_ratio: (torch.expm1(alpha * log_ratio) - alpha * torch.expm1(log_ratio)) / (alpha * (alpha - 1)),
        f_prime=lambda log_ratio: expm1((alpha - 1) * log_ratio) / (alpha - 1),
        links=True,
        limit=1 / (1 - alpha),
    )


def tv() -> Divergence:
    """Total variation, Σ |π − p|/2: f(t) = |t − 1|/2, f′(t) = sign(t − 1)/2."""
    return Divergence(
        f=lambda log_ratio: torch.expm1(log_ratio).abs() / 2,
        f_prime=lambda log_ratio: log_ratio.sign() / 2,
        links=False,
        limit=0.5,
    )


def hellinger() -> Divergence:
    """The squared Hellinger distance, Σ (√π − √p)²: f(t) = (√t − 1)², f′(t) = 1 − 1/√t."""
    return Divergence(
        f=lambda log_ratio: torch.expm1(log_ratio / 2) ** 2,
        f_prime=lambda log_ratio: -expm1(-log_ratio / 2),
        links=True,
        limit=1.0,
    )


def forward_chi2() -> Divergence:
    """χ²(p ‖ π) = Σ (p − π)²/π: f(t) = (t − 1)²/t, f′(t) = 1 − 1/t²."""
    return Divergence(
        f=lambda log_ratio: torch.expm1(log_ratio) + torch.expm1(-log_ratio),
        f_prime=lambda log_ratio: -expm1(-2 * log_ratio),
        links=True,
        limit=1.0,
    )


def reverse_chi2() -> Divergence:
    """χ²(π ‖ p) = Σ (π − p)²/p: f(t) = (t − 1)², f′(t) = 2 (t − 1)."""
    return Divergence(
        f=lambda log_ratio: torch.expm1(log_ratio) ** 2,
        f_prime=lambda log_ratio: 2 * expm1(log_ratio),
        links=False,
        limit=math.inf,
    )


def jeffreys() -> Divergence:
    """KL(π ‖ p) + KL(p ‖ π): f(t) = (t − 1) log t, f′(t) = log t + 1 − 1/t."""
    return Divergence(
        f=lambda log_ratio: torch.expm1(log_ratio) * log_ratio,
        f_prime=lambda log_ratio: log_ratio - expm1(-log_ratio),
        links=True,
        limit=math.inf,
    )


def expm1(exponent: Tensor) -> Tensor:
    """e^exponent − 1, continued by its tangent beyond `STEEPEST`."""
    # Terms whose slopes do not overlap: e^20 taken from itself would leave rounding errors above 1 in float32.
    return torch.expm1(exponent.clamp(max=STEEPEST)) + math.exp(STEEPEST) * (exponent - STEEPEST).relu()
