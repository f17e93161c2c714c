"""cDPO: conservative DPO. Eric Mitchell, "A note on DPO with noisy preferences & relationship to IPO", 2023.

L = −(1 − ε) log σ(z) − ε log σ(−z),  z = DPO's margin (arXiv 2305.18290, eq. 7)

It is DPO on labels that are smoothed to (1 − ε, ε), the forward KL to them up to a constant; EXO on the same two labels
is the reverse KL.
"""

import math

from torch import Tensor
from torch.nn.functional import logsigmoid

from align_cli.optima import least_squares, share
from align_cli.preferences import gap
from align_cli.ranges import BelowHalf, Positive


def cdpo(policy: Tensor, reference: Tensor, pairs: Tensor, *, beta: Positive, label_smoothing: BelowHalf) -> Tensor:
    """Classify which of two responses is preferred, trusting the label only with probability 1 − ε.

        z_ij = β (log π_θ(y_i|x)/π_ref(y_i|x) − log π_θ(y_j|x)/π_ref(y_j|x))
        L = −Σ_ij w_ij [(1 − ε) log σ(z_ij) + ε log σ(−z_ij)]

    Args:
        policy: (B, K) log π_θ(y_k|x), nats.
        reference: (B, K) log π_ref(y_k|x), nats.
        pairs: (B, K, K) w_ij, the weight of "y_i is preferred to y_j".
        beta: β, strength of the KL to the reference.
        label_smoothing: ε, probability that a label is the wrong way round.

    Returns:
        (B,). log 2 at the reference. For one pair the gradient vanishes at z = log((1 − ε)/ε).
    """
    margin = beta * gap(policy - reference)
    agree, disagree = logsigmoid(margin), logsigmoid(-margin)
    return -(pairs * ((1 - label_smoothing) * agree + label_smoothing * disagree)).sum((-2, -1))


def at_reference(pairs: Tensor) -> Tensor:
    """log 2 for every prompt that has a pair; (B,)."""
    return math.log(2) * pairs.sum((-2, -1))


def optimum(reference: Tensor, pairs: Tensor, *, beta: Positive, label_smoothing: BelowHalf) -> Tensor:
    """σ of a margin is the smoothed share of the comparisons that a response wins, (1 − ε) p + ε (1 − p).

    Mitchell's note of 2023: the gradient is 0 where σ(z) is the smoothed label
    """
    smoothed = label_smoothing + (1 - 2 * label_smoothing) * share(pairs)
    return reference + least_squares(smoothed.logit(), pairs) / beta
