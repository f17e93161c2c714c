"""Distributional constraints: the exponential tilt of a distribution that gives features wanted means.

Khalifa, Elsahar, Dymetman, "A Distributional Approach to Controlled Text Generation" (GDC), arXiv 2012.11635.

    p(y|x) = π_ref(y|x) exp(λ·φ(x, y)) / Z(x),  λ such that E_x E_p[φ] = μ

Of all distributions with these means it is the one with the smallest KL(p ‖ π_ref). λ minimises the convex

    E_x[log Z(x)] − λ·μ,  Z(x) = E_{π_ref}[exp(λ·φ)]

which samples estimate. The paper has no prompts; where features are as frequent for one prompt as for another, the
samples of all of them may be taken for those of one.

Delta from the paper: damped Newton steps in place of gradient steps of a fixed size, since the
Hessian is the covariance of a few features; it comes to the last bits in ten steps or so where gradient steps do not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align_cli.errors import UserError

TOLERANCE = 1e-12  # of a mean, in units of the furthest sample's distance from it
ROUNDING = 1e-15  # of the dual, which the last steps lower by less
ITERATIONS = 200
REACH = 10.0  # nats that a step may change the weight of a sample against the others
EDGE = 1e-6  # λ that makes a sample rarer by this, against features of 0 and 1, is on its way to infinity


@dataclass(frozen=True)
class Fit:
    """The tilt of some samples.

    Attributes:
        lambdas: (F,) λ, nats per unit of each feature.
        moments: (F,) the means of the features under the tilted samples.
        errors: (F,) standard errors of the true means under the target that this λ makes; the observations are the
            prompts, or the samples where there is one prompt.
        ess: effective sample size (Σ w)² / Σ w² of the tilted samples.
        log_z: log Z, nats, averaged over prompts.
        iterations: Newton steps.
    """

    lambdas: Tensor
    moments: Tensor
    errors: Tensor
    ess: float
    log_z: float
    iterations: int


def fit(features: Tensor, log_weights: Tensor, moments: Tensor, *, names: Sequence[str]) -> Fit:
    """Find λ so that the self-normalised means of tilted samples are the wanted ones.

    Args:
        features: (G, N, F) φ of N samples of q for each of G prompts.
        log_weights: (G, N) log π_ref/q of each, nats, up to a constant of the prompt; 0 for samples of π_ref.
        moments: (F,) μ, the wanted means.
        names: of the features, for messages.

    Returns:
        The fit, in float64.

    Raises:
        UserError: a feature has one value in all samples; a moment, or all of them together, has no finite λ.
    """
    features, log_weights, moments = features.double(), log_weights.double(), moments.double()
    _refuse(features, moments, names)
    spread = features.flatten(0, 1).std(0)
    centred = (features - moments) / spread
    start = log_weights.log_softmax(-1)
    tolerance = TOLERANCE * float(centred.abs().max().clamp(min=1))
    scaled = torch.zeros_like(moments)
    for iteration in range(ITERATIONS):
        tilts = centred @ scaled
        # Even the most favoured samples lie beyond a plane through μ: no weights whatever have these means.
        if tilts.amax(-1).mean() < -1e-9 * tilts.abs().max():
            break
        share = (start + tilts).softmax(-1) / len(tilts)
        slope = torch.einsum("gn,gnf->f", share, centred)
        if slope.abs().max() <= tolerance:
            return _found(features, log_weights, moments, scaled / spread, names, iteration)
        scaled = scaled + _step(centred, start, scaled, share, slope)
    raise UserError(_no_moments(features, moments, names))


def _step(centred: Tensor, start: Tensor, scaled: Tensor, share: Tensor, slope: Tensor) -> Tensor:
    """A Newton step on the dual, shortened until the dual falls."""

    def dual(at: Tensor) -> Tensor:
        return (start + centred @ at).logsumexp(-1).mean()

    means = torch.einsum("gn,gnf->gf", share * len(share), centred)
    deviations = centred - means[:, None]
    hessian = torch.einsum("gn,gnf,gne->fe", share, deviations, deviations)
    # Features that depend on each other leave it singular; the ridge chooses among their equivalent λ.
    ridge = 1e-10 * (1 + hessian.diagonal().max()) * torch.eye(len(slope), dtype=slope.dtype)
    step = -torch.linalg.solve(hessian + ridge, slope)
    change = centred @ step
    step = step * min(1.0, REACH / float(change.abs().max()))
    before = dual(scaled)
    for _ in range(60):
        if dual(scaled + step) - before <= 1e-4 * (step @ slope) + ROUNDING:
            break
        step = step / 2
    return step


def _found(
    features: Tensor, log_weights: Tensor, moments: Tensor, lambdas: Tensor, names: Sequence[str], iterations: int
) -> Fit:
    start, prompts = log_weights.log_softmax(-1), len(features)
    logs = start + features @ lambdas
    log_z, share = logs.logsumexp(-1), logs.softmax(-1)
    rarer = (logs - start).amin(-1) - log_z
    if bool(_binary(features).all()) and float(rarer.min()) < math.log(EDGE):
        raise UserError(_no_moments(features, moments, names))
    of_prompts = torch.einsum("gn,gnf->gf", share, features)
    means = of_prompts.mean(0)
    scatter = (of_prompts - means) / prompts if prompts > 1 else share[0, :, None] * (features[0] - means)
    ess = prompts**2 / float(share.square().sum())
    return Fit(lambdas, means, scatter.square().sum(0).sqrt(), ess, float(log_z.mean()), iterations)


def _binary(features: Tensor) -> Tensor:
    """(F,) whether a feature is 0 or 1 in every sample."""
    return ((features == 0) | (features == 1)).all(0).all(0)


def _refuse(features: Tensor, moments: Tensor, names: Sequence[str]) -> None:
    """Refuse what a feature alone shows to have no finite λ."""
    samples, prompts = features.shape[0] * features.shape[1], len(features)
    lowest, highest = features.amin(1).mean(0).tolist(), features.amax(1).mean(0).tolist()
    varies = (features.amin((0, 1)) < features.amax((0, 1))).tolist()
    told = f"{samples} samples of the starting model"
    problems: list[str] = []
    for place, (name, wanted) in enumerate(zip(names, moments.tolist(), strict=True)):
        key, low, high = f"target.features.{name}", lowest[place], highest[place]
        binary = bool(_binary(features)[place])
        if binary and wanted in (0, 1):
            problems.append(
                f"{key}.moment={wanted:g}: all responses or none, which takes an infinite λ. target=pointwise is such "
                f"a constraint; use a moment {'below 1' if wanted == 1 else 'above 0'} here."
            )
        elif binary and not varies[place]:
            often = "never occurs" if high == 0 else "always occurs"
            rate = "its rate is" if high == 0 else "the rate of responses without it is"
            # the rule of three: what did not occur in N trials has a rate below 3/N at 95 %
            problems.append(
                f"{key}: it {often} in {told}; {rate} below {300 / samples:.2g} % at 95 %. Use more target.samples, "
                "or a feature that some responses have and some do not."
            )
        elif not varies[place]:
            problems.append(f"{key}: it is {low:g} in all {told}; use a feature that varies.")
        elif not low < wanted < high:
            each = "" if prompts == 1 else f" to {prompts} prompts"
            problems.append(
                f"{key}.moment={wanted:g}: {told}{each} can be weighted for means between {low:.4g} and {high:.4g}. "
                "Use a moment inside, or more target.samples."
            )
    if problems:
        raise UserError("\n".join(problems))


def _no_moments(features: Tensor, moments: Tensor, names: Sequence[str]) -> str:
    means = features.mean((0, 1)).tolist()
    told = ", ".join(
        f"{name} {wanted:g} (now {mean:.3g})" for name, wanted, mean in zip(names, moments.tolist(), means, strict=True)
    )
    return (
        f"target.features: no finite λ gives {features.shape[0] * features.shape[1]} samples of the starting model the "
        f"moments {told} together; one feature may follow from another. Use moments nearer to the present ones, or "
        "more target.samples."
    )
