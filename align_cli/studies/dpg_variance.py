"""What baselines and the estimate of Z do to f-DPG's gradient, on a policy over so many responses that all are listed.

Go et al., arXiv 2302.08215, ablate the baseline and the estimate of the partition function; their numbers are not
public. The starting model and its constraint are drawn with the seed; gradients are those of `align_cli.losses.fdpg`.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from align_cli import divergences
from align_cli.losses.fdpg import fdpg
from align_cli.ranges import Count, OpenFraction, Positive

FIGURES = ("*/none/variance", "*/leave_one_out/variance", "*/leave_one_out/of_none", "*/error", "z/*/error")

RUNNING = 1024  # samples of an estimate that has run for a while

Baseline = Literal["none", "leave_one_out"]


def dpg_variance(
    seed: int,
    *,
    responses: Count,
    satisfied: OpenFraction,
    floor: OpenFraction,
    learned: Positive,
    samples: Count,
    batches: Count,
) -> dict[str, float]:
    """Draw many batches from one policy and compare their gradients with the exact one.

    Args:
        responses: S, all that there are.
        satisfied: probability that a response satisfies the constraint.
        floor: weight of one that does not, so that reverse KL has a meaning.
        learned: how many nats the policy has gained on responses that satisfy it: it is on its way, and half a nat
            astray at each response.
        samples: K, of a batch.
        batches: whose gradients are averaged.

    Returns:
        For each of the paper's four divergences the total variance of a batch's gradient without baseline and with
        leave-one-out, the latter as a part of the former, and `error`, the mean gradient's distance from the exact one
        in standard errors of a component, root mean square: 1 where it is unbiased. `z/<estimate>/error` is the
        distance of the expected gradient from the exact one, relative to it, under JS, where Z is known (`exact`), the
        mean of `RUNNING` samples (`running`), or that of the batch itself (`batch`), noise included.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(responses, dtype=torch.float64, generator=generator).log_softmax(-1)
    constraint = torch.rand(responses, dtype=torch.float64, generator=generator) < satisfied
    constraint[0] = True  # at least one
    log_target = torch.where(constraint, start, start + math.log(floor))
    astray = torch.randn(responses, dtype=torch.float64, generator=generator) / 2
    logits = (start + learned * constraint + astray).requires_grad_()
    policy = logits.log_softmax(-1)
    log_z = log_target.logsumexp(-1)
    drawn = torch.multinomial(policy.detach().exp(), batches * samples, replacement=True, generator=generator)
    drawn = drawn.view(batches, samples)

    def gradients(divergence: divergences.Divergence, baseline: Baseline, log_z: Tensor) -> Tensor:
        """(batches, S) of each batch, by the chain rule through the softmax."""
        of = policy.detach()[drawn].requires_grad_()
        loss = fdpg(of, of.detach(), log_target[drawn], log_z, divergence=divergence, baseline=baseline)
        (by_sample,) = torch.autograd.grad(loss.sum(), of)
        by_response = torch.zeros(batches, responses, dtype=torch.float64).scatter_add(-1, drawn, by_sample)
        return by_response - by_sample.sum(-1, keepdim=True) * policy.detach().exp()

    def exact(divergence: divergences.Divergence) -> Tensor:
        log_p = log_target - log_z
        value = (log_p.exp() * divergence.f(policy - log_p)).sum()
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    figures: dict[str, float] = {}
    four = {name: vars(divergences)[name]() for name in ("forward_kl", "js", "tv", "reverse_kl")}
    for name, divergence in four.items():
        spread: dict[str, float] = {}
        for baseline in ("none", "leave_one_out"):
            found = gradients(divergence, baseline, log_z.expand(batches))
            spread[baseline] = float(found.var(0).sum())
            figures[f"{name}/{baseline}/variance"] = spread[baseline]
        figures[f"{name}/leave_one_out/of_none"] = spread["leave_one_out"] / spread["none"]
        off = (found.mean(0) - exact(divergence)) / (found.var(0) / batches).sqrt()
        figures[f"{name}/error"] = float(off.square().mean().sqrt())
    true = exact(four["js"])
    weights = log_target - policy.detach()
    running = torch.multinomial(policy.detach().exp(), RUNNING, replacement=True, generator=generator)
    estimates = {
        "exact": log_z.expand(batches),
        "running": (weights[running].logsumexp(-1) - math.log(RUNNING)).expand(batches),
        "batch": weights[drawn].logsumexp(-1) - math.log(samples),
    }
    for name, estimate in estimates.items():
        off = gradients(four["js"], "leave_one_out", estimate).mean(0) - true
        figures[f"z/{name}/error"] = float(off.norm() / true.norm())
    return figures
