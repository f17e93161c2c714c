"""f-DPO: DPO under other divergences. Wang, Jiang, Yang, Liu, Chen, "Beyond Reverse KL: Generalizing Direct Preference
Optimization with Diverse Divergence Constraints", arXiv 2309.16240.

L = −log σ(β f′(π_θ(y_w|x)/π_ref(y_w|x)) − β f′(π_θ(y_l|x)/π_ref(y_l|x)))

Deltas from the paper: its alpha is 1 − alpha here (`align_cli.divergences`), and where f′ would overflow it goes on in
a straight line. "Reverse KL" names the regulariser: it gives DPO itself. The matching divergence of EXO is another.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align_cli.divergences import Divergence
from align_cli.optima import least_squares, root, share
from align_cli.preferences import gap
from align_cli.ranges import Positive

FAR = 100.0  # nats between policy and reference that no reward asks for


def f_dpo(policy: Tensor, reference: Tensor, pairs: Tensor, *, beta: Positive, divergence: Divergence) -> Tensor:
    """Classify which of two responses is preferred, by the reward that would make the policy optimal under β D_f.

        s_i = β f′(π_θ(y_i|x)/π_ref(y_i|x))
        L = −Σ_ij w_ij log σ(s_i − s_j)

    Args:
        policy: (B, K) log π_θ(y_k|x), nats.
        reference: (B, K) log π_ref(y_k|x), nats.
        pairs: (B, K, K) w_ij, the weight of "y_i is preferred to y_j".
        beta: β, strength of the divergence to the reference; values for two divergences do not compare.
        divergence: D_f, one that links.

    Returns:
        (B,). log 2 at the reference. If w_ij ∝ σ(r_i − r_j), the gradient vanishes at s = r + const, the optimum of
        E[r] − β D_f(π ‖ π_ref).
    """
    margin = beta * gap(divergence.f_prime(policy - reference))
    return -(pairs * logsigmoid(margin)).sum((-2, -1))


def at_reference(pairs: Tensor) -> Tensor:
    """log 2 for every prompt that has a pair, under every divergence; (B,)."""
    return math.log(2) * pairs.sum((-2, -1))


def optimum(reference: Tensor, pairs: Tensor, *, beta: Positive, divergence: Divergence) -> Tensor:
    """f′(π/π_ref) = r/β + const, where differences of r are the log-odds of the comparisons.

    arXiv 2309.16240: the optimum of E[r] − β D_f
    """
    reward = least_squares(share(pairs).logit(), pairs) / beta
    mass, slope = reference.logsumexp(-1, keepdim=True), divergence.f_prime

    def log_ratio(shift: Tensor) -> Tensor:
        return root(lambda ratio: slope(ratio) - reward - shift, -FAR * one, FAR * one)

    def excess(shift: Tensor) -> Tensor:
        return (reference + log_ratio(shift)).logsumexp(-1, keepdim=True) - mass

    one = torch.ones_like(reward)
    furthest = reward.abs().amax(-1, keepdim=True)
    return reference + log_ratio(root(excess, -furthest, furthest))
