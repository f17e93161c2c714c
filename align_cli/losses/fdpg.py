"""f-DPG: approximate any target distribution by any f-divergence. Go, Korbak, Kruszewski, Rozen, Ryu, Dymetman,
"Aligning Language Models with Preferences through f-divergence Minimization", arXiv 2302.08215.

∇_θ D_f(π_θ ‖ p) = E_{y~π_θ}[ f′(π_θ(y|x)/p(y|x)) ∇_θ log π_θ(y|x) ],  p = P/Z

A policy gradient whose reward −f′(π_θ/p) falls as the policy passes the target. Responses may come from another
distribution q, a weight π_θ/q then stands before each.

Deltas from the paper: f is centred, f′(1) = 0, so that under forward KL the mean reward is 0 and no divergence pays a
response that already has its target probability; the baseline is the mean of the prompt's other responses, which keeps
no state; weights end at e^20, and an exponential in f′ goes on in a straight line beyond it.
"""

from typing import Literal

import torch
from torch import Tensor

from align_cli.divergences import STEEPEST, Divergence
from align_cli.logprobs import wide


def fdpg(
    policy: Tensor,
    behavior: Tensor,
    target: Tensor,
    log_z: Tensor,
    *,
    divergence: Divergence,
    baseline: Literal["leave_one_out", "none"],
) -> Tensor:
    """Raise the probability of what the target has more of, lower it where the policy has more.

        r_k = −f′(π_θ(y_k|x)/p(y_k|x)),  w_k = π_θ(y_k|x)/q(y_k|x)
        L = −1/K Σ_k w_k (r_k − b_k) log π_θ(y_k|x),  b_k = mean of w_j r_j over j ≠ k

    r, w and b carry no gradient.

    Args:
        policy: (B, K) log π_θ(y_k|x), nats.
        behavior: (B, K) log q(y_k|x) of the distribution that y_k was drawn from, nats.
        target: (B, K) log P(x, y_k), not normalised; −∞ where the target excludes y_k.
        log_z: (B,) log Z(x) of the target, nats; −∞ where no sample so far had any of it: nothing is learned from
            these prompts.
        divergence: D_f; with a finite `limit` where the target excludes responses.
        baseline: b; "none" is 0, as one response for each prompt needs it.

    Returns:
        (B,). Its gradient is that of D_f(π_θ ‖ p) in expectation, where Z is exact and no ratio is beyond e^20; its
        value means nothing.
    """
    now = wide(policy.detach())
    excluded, unknown = target == -torch.inf, (log_z == -torch.inf)[:, None]
    log_ratio = now - target.masked_fill(excluded, 0.0) + log_z[:, None].masked_fill(unknown, 0.0)
    reward = -torch.where(excluded, divergence.limit, divergence.f_prime(log_ratio)).masked_fill(unknown, 0.0)
    weight = (now - behavior).clamp(max=STEEPEST).exp()
    if baseline == "leave_one_out":
        weighted = weight * reward
        reward = reward - (weighted.sum(-1, keepdim=True) - weighted) / (policy.shape[-1] - 1)
    return -(weight * reward * policy).mean(-1)
