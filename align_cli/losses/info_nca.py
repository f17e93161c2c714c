"""InfoNCA: InfoNCE for alignment. Chen, He, Yuan, Cui, Su, Zhu, "Noise Contrastive Alignment of Language Models with
Explicit Rewards", arXiv 2402.05369.

L = −Σ_k softmax(r/α)_k log softmax(s)_k,  s = β log π_θ/π_ref

The same loss is the "DPO with rewards" of EXO's paper (arXiv 2402.00856); with two responses and a one-hot target it is
DPO.
"""

import math

from torch import Tensor
from torch.nn.functional import log_softmax, softmax

from align_cli.ranges import Positive


def info_nca(policy: Tensor, reference: Tensor, rewards: Tensor, *, alpha: Positive, beta: Positive) -> Tensor:
    """Tell which of the K responses came from the optimal policy: cross-entropy of two softmaxes, a forward KL.

        s_k = β (log π_θ(y_k|x) − log π_ref(y_k|x)),  w = softmax(r/α)
        L = −Σ_k w_k log softmax(s)_k

    Args:
        policy: (B, K) log π_θ(y_k|x), nats.
        reference: (B, K) log π_ref(y_k|x), nats.
        rewards: (B, K) r(x, y_k); −∞ excludes a response from the target.
        alpha: α, temperature of the rewards, in their unit.
        beta: β, scale of the log-ratio.

    Returns:
        (B,). log K at the reference. The gradient vanishes at s = r/α + const, that is at π ∝ π_ref exp(r/(αβ)); a
        common shift of all log-ratios changes nothing.
    """
    score = beta * (policy - reference)
    target = softmax(rewards / alpha, dim=-1)
    return -(target * log_softmax(score, dim=-1)).sum(-1)


def at_reference(rewards: Tensor) -> Tensor:
    """log K; (B,)."""
    batch, responses = rewards.shape
    return rewards.new_full((batch,), math.log(responses))


def optimum(reference: Tensor, rewards: Tensor, *, alpha: Positive, beta: Positive) -> Tensor:
    """π ∝ π_ref exp(r/(αβ)), whichever responses are seen.

    arXiv 2402.05369: where its cross-entropy is least
    """
    return reference + rewards / (alpha * beta)
