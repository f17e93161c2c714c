"""EXO: Efficient Exact Optimization. Ji, Lu, Niu, Ke, Wang, Zhu, Tang, Huang, arXiv 2402.00856; with the
smoothed labels of a pair as rewards, its eq. 16.

L = KL(softmax(s) ‖ softmax(r/α)),  s = β log π_θ/π_ref,  α written β_r and β written β_π

Deltas: the authors' code divides the logits of policy and reference by the sampling temperature before all this, and
its pairwise loss has the unnormalised labels (1, e^−10) and not (1 − ε, ε).
"""

import math

from torch import Tensor
from torch.nn.functional import log_softmax

from align_cli.ranges import Positive

FINITE_REWARDS = True  # the reverse KL to a label of 0, whose reward is −∞, is infinite


def exo(policy: Tensor, reference: Tensor, rewards: Tensor, *, alpha: Positive, beta: Positive) -> Tensor:
    """Match the policy's distribution over the K responses to the optimal one, as RLHF does: by the reverse KL.

        p = softmax(β (log π_θ(y|x) − log π_ref(y|x))),  q = softmax(r/α)
        L = Σ_k p_k (log p_k − log q_k)

    Args:
        policy: (B, K) log π_θ(y_k|x), nats.
        reference: (B, K) log π_ref(y_k|x), nats.
        rewards: (B, K) r(x, y_k), finite: a response that the target excludes has an infinite reverse KL.
        alpha: α, temperature of the rewards, in their unit (β_r in the paper).
        beta: β, scale of the log-ratio (β_π in the paper).

    Returns:
        (B,) at least 0. −log K − 1/K Σ_k log q_k at the reference; 0, the minimum, at π ∝ π_ref exp(r/(αβ)). A common
        shift of all log-ratios changes nothing.
    """
    log_p = log_softmax(beta * (policy - reference), dim=-1)
    log_q = log_softmax(rewards / alpha, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def at_reference(rewards: Tensor, *, alpha: Positive) -> Tensor:
    """−log K − 1/K Σ_k log q_k; (B,)."""
    return -math.log(rewards.shape[-1]) - log_softmax(rewards / alpha, dim=-1).mean(-1)


def optimum(reference: Tensor, rewards: Tensor, *, alpha: Positive, beta: Positive) -> Tensor:
    """π ∝ π_ref exp(r/(αβ)), whichever responses are seen.

    arXiv 2402.00856: where its divergence is 0
    """
    return reference + rewards / (alpha * beta)
