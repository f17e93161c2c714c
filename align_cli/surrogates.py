"""What the losses on sampled responses share: likelihood ratios, the clipped surrogate, and an estimator of the KL.

Ratios go on in a straight line beyond e^20 (`divergences.STEEPEST`): they neither overflow, nor does their gradient
end where a token has become far more likely than it was.
"""

import math

import torch
from torch import Tensor

from align_cli.divergences import STEEPEST, expm1
from align_cli.logprobs import wide


def ratio(policy: Tensor, behavior: Tensor) -> Tensor:
    """w = π_θ/q, of the shape of the log-probabilities, in float32 at least; 1 where both are 0."""
    log_ratio = wide(policy) - behavior
    # 1 + expm1 would round away what is below 1e-7: the responses that the policy has given up
    return log_ratio.clamp(max=STEEPEST).exp() + math.exp(STEEPEST) * (log_ratio - STEEPEST).relu()


def clipped(ratio: Tensor, advantages: Tensor, *, clip: float) -> Tensor:
    """max(−w A, −clamp(w, 1 − ε, 1 + ε) A): nothing is gained by moving w beyond 1 ± ε to where A asks it to go.

    Its gradient at w = 1 is REINFORCE's, −A ∇ log π_θ. It vanishes where A > 0 and w > 1 + ε, and where A < 0 and
    w < 1 − ε; on the other sides it is there and brings w back. Schulman et al., arXiv 1707.06347, eq. 7.

    Args:
        ratio: w, of any shape.
        advantages: A, of the same shape, without gradient.
        clip: ε.

    Returns:
        of the same shape.
    """
    return torch.maximum(-ratio * advantages, -ratio.clamp(1 - clip, 1 + clip) * advantages)


def k3(policy: Tensor, reference: Tensor) -> Tensor:
    """t − 1 − log t with t = π_ref/π_θ, of the shape of the log-probabilities, in float32 at least.

    Never negative, 0 where both agree, and in expectation over samples of π_θ the KL(π_θ ‖ π_ref). Its gradient is
    (1 − t) ∇ log π_θ, which in expectation is not that of KL(π_θ ‖ π_ref), but that of KL(π_ref ‖ π_θ).
    """
    log_ratio = reference - wide(policy)
    return expm1(log_ratio) - log_ratio
