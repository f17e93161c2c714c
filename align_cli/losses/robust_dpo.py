"""Robust DPO: provably robust to flipped labels. Ray Chowdhury, Kini, Natarajan, arXiv 2403.00409.

L = [−(1 − ε) log σ(z) + ε log σ(−z)] / (1 − 2ε),  z = DPO's margin (arXiv 2305.18290, eq. 7)
"""

import math

from torch import Tensor
from torch.nn.functional import logsigmoid

from align_cli.optima import least_squares, share
from align_cli.preferences import gap
from align_cli.ranges import BelowHalf, Positive


def robust_dpo(
    policy: Tensor, reference: Tensor, pairs: Tensor, *, beta: Positive, label_smoothing: BelowHalf
) -> Tensor:
    """DPO's loss on clean labels, estimated without bias from labels of which a share ε is flipped.

        z_ij = β (log π_θ(y_i|x)/π_ref(y_i|x) − log π_θ(y_j|x)/π_ref(y_j|x))
        L = −Σ_ij w_ij [(1 − ε) log σ(z_ij) − ε log σ(−z_ij)] / (1 − 2ε)

    Args:
        policy: (B, K) log π_θ(y_k|x), nats.
        reference: (B, K) log π_ref(y_k|x), nats.
        pairs: (B, K, K) w_ij, the weight of "y_i is preferred to y_j".
        beta: β, strength of the KL to the reference.
        label_smoothing: ε, the share of flipped labels.

    Returns:
        (B,). log 2 at the reference. Averaged over flips with probability ε it is DPO's loss on the clean labels; for
        one pair taken alone it has no lower bound when ε > 0.
    """
    margin = beta * gap(policy - reference)
    agree, disagree = logsigmoid(margin), logsigmoid(-margin)
    unbiased = ((1 - label_smoothing) * agree - label_smoothing * disagree) / (1 - 2 * label_smoothing)
    return -(pairs * unbiased).sum((-2, -1))


def at_reference(pairs: Tensor) -> Tensor:
    """log 2 for every prompt that has a pair; (B,)."""
    return math.log(2) * pairs.sum((-2, -1))


def optimum(reference: Tensor, pairs: Tensor, *, beta: Positive, label_smoothing: BelowHalf) -> Tensor:
    """DPO's optimum on what the labels were before a share ε was flipped: σ of a margin is (p − ε)/(1 − 2ε).

    arXiv 2403.00409, the loss without bias
    """
    trusted = 1 - 2 * label_smoothing
    clean = (share(pairs) - label_smoothing) / trusted
    return reference + least_squares(clean.logit(), pairs) / beta
