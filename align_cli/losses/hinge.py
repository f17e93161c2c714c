"""Hinge loss on log-ratios. Liu et al., "Statistical Rejection Sampling Improves Preference Optimization" (RSO),
arXiv 2309.06657; after SLiC-HF, Zhao et al., arXiv 2305.10425, whose likelihoods have no reference.

L = max(0, 1 − β log π_θ(y_w|x)/π_ref(y_w|x) + β log π_θ(y_l|x)/π_ref(y_l|x))
"""

from torch import Tensor

from align_cli.optima import least_squares, share
from align_cli.preferences import gap
from align_cli.ranges import Positive


def hinge(policy: Tensor, reference: Tensor, pairs: Tensor, *, beta: Positive) -> Tensor:
    """Ask for a margin of 1 between the preferred response and the other, and for no more.

        s_i = β (log π_θ(y_i|x) − log π_ref(y_i|x))
        L = Σ_ij w_ij max(0, 1 − (s_i − s_j))

    Args:
        policy: (B, K) log π_θ(y_k|x), nats.
        reference: (B, K) log π_ref(y_k|x), nats.
        pairs: (B, K, K) w_ij, the weight of "y_i is preferred to y_j".
        beta: β; the margin is 1/β nats (the paper writes γ).

    Returns:
        (B,). 1 at the reference; 0 with zero gradient wherever every margin exceeds 1.
    """
    margin = beta * gap(policy - reference)
    return (pairs * (1 - margin).relu()).sum((-2, -1))


def at_reference(pairs: Tensor) -> Tensor:
    """1 for every prompt that has a pair; (B,)."""
    return pairs.sum((-2, -1))


def optimum(reference: Tensor, pairs: Tensor, *, beta: Positive) -> Tensor:
    """A response that wins most comparisons leads by the margin 1, however often it wins, if none wins all.

    arXiv 2309.06657; p max(0, 1 − z) + (1 − p) max(0, 1 + z) is least at z = sign(p − 1/2)
    """
    return reference + least_squares((share(pairs) - 0.5).sign(), pairs) / beta
