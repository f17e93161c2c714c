"""DPO: Direct Preference Optimization. Rafailov, Sharma, Mitchell, Ermon, Manning, Finn, arXiv 2305.18290, eq. 7.

L = −log σ(β log π_θ(y_w|x)/π_ref(y_w|x) − β log π_θ(y_l|x)/π_ref(y_l|x))

Beyond the paper: K responses with any weights over their pairs. All K(K−1)/2 pairs of a ranking then cost K scores.
"""

import math

from torch import Tensor
from torch.nn.functional import logsigmoid

from align_cli.optima import least_squares, share
from align_cli.preferences import gap
from align_cli.ranges import Positive


def dpo(policy: Tensor, reference: Tensor, pairs: Tensor, *, beta: Positive) -> Tensor:
    """Classify which of two responses is preferred, by the log-ratio of policy and reference.

        s_i = β (log π_θ(y_i|x) − log π_ref(y_i|x))
        L = −Σ_ij w_ij log σ(s_i − s_j)

    Args:
        policy: (B, K) log π_θ(y_k|x), nats.
        reference: (B, K) log π_ref(y_k|x), nats.
        pairs: (B, K, K) w_ij, the weight of "y_i is preferred to y_j".
        beta: β, strength of the KL to the reference.

    Returns:
        (B,). log 2 at the reference. If w_ij ∝ σ(r_i − r_j), the gradient vanishes at s = r + const, that is at
        π ∝ π_ref exp(r/β).
    """
    margin = beta * gap(policy - reference)
    return -(pairs * logsigmoid(margin)).sum((-2, -1))


def at_reference(pairs: Tensor) -> Tensor:
    """log 2 for every prompt that has a pair; (B,)."""
    return math.log(2) * pairs.sum((-2, -1))


def optimum(reference: Tensor, pairs: Tensor, *, beta: Positive) -> Tensor:
    """σ of a margin is the share of the comparisons that a response wins: π ∝ π_ref exp(r/β) if they follow
    Bradley and Terry's r.

    arXiv 2305.18290, eq. 4 to 7
    """
    return reference + least_squares(share(pairs).logit(), pairs) / beta
