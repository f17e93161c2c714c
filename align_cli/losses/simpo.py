"""SimPO: Simple Preference Optimization with a reference-free reward. Meng, Xia, Chen, arXiv 2405.14734.

L = −log σ(β/|y_w| log π_θ(y_w|x) − β/|y_l| log π_θ(y_l|x) − γ)

The authors' code takes the ratio γ/β as its option; γ here is the paper's, subtracted after the product with β.
"""

import math

from torch import Tensor
from torch.nn.functional import logsigmoid

from align_cli.optima import least_squares, root, share
from align_cli.preferences import gap
from align_cli.ranges import NonNegative, Positive


def simpo(policy: Tensor, lengths: Tensor, pairs: Tensor, *, beta: Positive, gamma: NonNegative) -> Tensor:
    """Classify which of two responses is preferred, by their mean log-probability per token, with a margin.

        s_i = β log π_θ(y_i|x) / |y_i|
        L = −Σ_ij w_ij log σ(s_i − s_j − γ)

    Args:
        policy: (B, K) log π_θ(y_k|x), nats.
        lengths: (B, K) |y_k|, tokens.
        pairs: (B, K, K) w_ij, the weight of "y_i is preferred to y_j".
        beta: β, scale of the rewards.
        gamma: γ, the margin that the preferred response should have, in units of s.

    Returns:
        (B,). log 2 where the margin is exactly γ.
    """
    margin = beta * gap(policy / lengths) - gamma
    return -(pairs * logsigmoid(margin)).sum((-2, -1))


def optimum(lengths: Tensor, pairs: Tensor, *, beta: Positive, gamma: NonNegative) -> Tensor:
    """Margins z solve p σ(γ − z) = (1 − p) σ(γ + z), p being the share of wins; without γ they are its log-odds.

    arXiv 2405.14734, eq. 6: where the expected loss of a comparison is least
    """
    wins = share(pairs)
    # A quadratic equation in e^z.
    half = (wins - 0.5) * math.exp(gamma)
    margins = ((half + (half.square() + wins * (1 - wins)).sqrt()) / (1 - wins)).log()
    likelihood = least_squares(margins, pairs) / beta

    # A shift of all likelihoods changes nothing of the loss; probabilities sum to 1.
    def excess(shift: Tensor) -> Tensor:
        return (lengths * (likelihood + shift)).logsumexp(-1, keepdim=True)

    low = -(likelihood.amax(-1, keepdim=True) + math.log(likelihood.shape[-1]))
    return lengths * (likelihood + root(excess, low, -likelihood.amin(-1, keepdim=True)))
