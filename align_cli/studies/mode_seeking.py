"""EXO seeks a mode of the optimal policy where DPO covers them all: a Gaussian policy and a target of two bumps.

The setting of the picture that Ji et al. show (arXiv 2402.00856, figure 1), whose numbers and code are not public; the
grid, the starting model and the bumps are this project's own. A policy that may be any distribution could not tell the
two losses apart, both have their minimum at the optimum; a single Gaussian cannot have two bumps, and the reverse and
the forward KL part.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from align_cli.losses.exo import exo
from align_cli.losses.info_nca import info_nca
from align_cli.ranges import Count

FIGURES = ("exo/*/mean", "exo/*/deviation", "dpo/*/mean", "dpo/*/deviation")

POINTS = torch.linspace(-6, 6, 121, dtype=torch.float64)  # the responses
BUMPS = ((0.65, -2.5), (0.35, 2.5))  # weight and mean of each; the higher one on the left
WIDTH = 0.7  # of a bump
STARTS = ((-2.5, 1.0), (0.0, 2.0), (2.5, 1.0))  # mean and deviation from which a fit sets out
EDGE, NARROWEST, WIDEST = 6.0, 0.1, 6.0  # the mean lies on the grid, and the deviation between these

Objective = Callable[[Tensor], Tensor]


def mode_seeking(seed: int, *, responses: list[Count], draws: Count) -> dict[str, float]:
    """Fit the policy by EXO and by DPO-rw, the forward KL (InfoNCA), with α = β = 1, K responses at a time.

    Args:
        seed: of the draws.
        responses: each K; the responses are drawn from the starting model.
        draws: groups of K responses whose mean loss is minimised.

    Returns:
        Mean and deviation of the Gaussian, as `exo/<K>/mean`; for K = `all` those of the exact KL divergences, in which
        the seed has no part.
    """
    start = _log_normal(0.0, 2.0)
    target = torch.stack([math.log(weight) + _log_normal(mean, WIDTH) for weight, mean in BUMPS]).logsumexp(0)
    rewards = target - start  # of which the target is the optimum, π ∝ π_ref exp(r)
    generator = torch.Generator().manual_seed(seed)

    def grouped(k: int, loss: Callable[..., Tensor]) -> Objective:
        groups = torch.multinomial(start.exp(), draws * k, replacement=True, generator=generator).view(draws, k)
        return lambda policy: loss(policy[groups], start[groups], rewards[groups], alpha=1.0, beta=1.0).mean()

    found = {
        "exo/all": _fit(lambda policy: (policy.exp() * (policy - target)).sum()),
        "dpo/all": _fit(lambda policy: -(target.exp() * policy).sum()),
    }
    for k in responses:
        state = generator.get_state()
        found[f"exo/{k}"] = _fit(grouped(k, exo))
        generator.set_state(state)  # the same draws for both
        found[f"dpo/{k}"] = _fit(grouped(k, info_nca))
    return {f"{name}/{key}": value for name, fit in found.items() for key, value in zip(_KEYS, fit, strict=True)}


_KEYS = ("mean", "deviation")


def _log_normal(mean: float | Tensor, deviation: float | Tensor) -> Tensor:
    """Log-probabilities of a normal distribution on the grid, (points,)."""
    return (-0.5 * ((POINTS - mean) / deviation) ** 2).log_softmax(-1)


def _in_bounds(free: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and deviation that two numbers without bounds stand for."""
    share = free[1].sigmoid()
    return EDGE * free[0].tanh(), NARROWEST ** (1 - share) * WIDEST**share


def _fit(objective: Objective) -> tuple[float, float]:
    """The mean and deviation of least loss, the best of those that each of `STARTS` leads to."""
    fits: list[tuple[float, float, float]] = []
    for mean, deviation in STARTS:
        share = math.log(deviation / NARROWEST) / math.log(WIDEST / NARROWEST)
        free = torch.tensor(
            [math.atanh(mean / EDGE), math.log(share / (1 - share))], dtype=torch.float64, requires_grad=True
        )
        optimizer = torch.optim.LBFGS([free], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

        def closure(free: Tensor = free, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = objective(_log_normal(*_in_bounds(free)))
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            fit = _in_bounds(free)
            fits.append((float(objective(_log_normal(*fit))), float(fit[0]), float(fit[1])))
    _, mean, deviation = min(fits)
    return mean, deviation
