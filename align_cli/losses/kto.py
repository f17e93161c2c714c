"""KTO: Kahneman-Tversky Optimization. Ethayarajh, Xu, Muennighoff, Jurafsky, Kiela, arXiv 2402.01306.

L = λ_y − v(x, y),  v = λ_D σ(β (log π_θ/π_ref − z)) if y is desirable, λ_U σ(β (z − log π_θ/π_ref)) if not

z, the point of reference, is the KL of policy and reference, estimated from prompts and responses that do not belong
together, without gradient, at least 0.
"""

import math

from torch import Tensor, where

from align_cli.ranges import NonNegative, Positive


def kto(
    policy: Tensor,
    reference: Tensor,
    rewards: Tensor,
    mismatch_kl: Tensor,
    *,
    beta: Positive,
    threshold: float,
    desirable: NonNegative,
    undesirable: NonNegative,
) -> Tensor:
    """Value each response by itself, as good or bad, against what the policy gains on average.

        s_k = β (log π_θ(y_k|x) − log π_ref(y_k|x) − z)
        L = 1/K Σ_k  λ_D σ(−s_k) if r_k > threshold,  λ_U σ(s_k) otherwise

    Args:
        policy: (B, K) log π_θ(y_k|x), nats.
        reference: (B, K) log π_ref(y_k|x), nats.
        rewards: (B, K) r(x, y_k); −∞ is undesirable.
        mismatch_kl: (B,) z, nats, at least 0, the same for all prompts of a step.
        beta: β, how fast value saturates (risk aversion).
        threshold: rewards above it are desirable; in units of `rewards`.
        desirable: λ_D, weight of desirable responses.
        undesirable: λ_U, weight of undesirable ones.

    Returns:
        (B,) between 0 and max(λ_D, λ_U). λ/2 for each response at the reference, where z = 0. It is linear in σ(s):
        a response that is desirable with probability p belongs at s → +∞ if p λ_D > (1 − p) λ_U, else at −∞.
    """
    score = beta * (policy - reference - mismatch_kl[:, None])
    return where(rewards > threshold, desirable * (-score).sigmoid(), undesirable * score.sigmoid()).mean(-1)


def at_reference(rewards: Tensor, *, threshold: float, desirable: NonNegative, undesirable: NonNegative) -> Tensor:
    """The mean over responses of λ_D/2 or λ_U/2, the KL being 0; (B,)."""
    good = (rewards > threshold).to(rewards.dtype).mean(-1)
    return (desirable * good + undesirable * (1 - good)) / 2


def optimum(reference: Tensor, rewards: Tensor, *, threshold: float) -> Tensor:
    """The reference, given that the response is desirable, where β is at most 1 and responses are drawn from it.

    derived from the loss of arXiv 2402.01306: σ is monotone, and σ′(s) exp(−s/β) is alike among what is desirable
    """
    desirable = rewards > threshold
    likelihood = desirable.to(reference.dtype).mean(-1, keepdim=True)
    return (reference - likelihood.log()).masked_fill(~desirable, -math.inf)
