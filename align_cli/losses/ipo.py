"""IPO: Identity Preference Optimization. Azar, Rowland, Piot, Guo, Calandriello, Valko, Munos, arXiv 2310.12036.

L = (h − 1/(2β))²  (eq. 17),  h = log [π_θ(y_w|x) π_ref(y_l|x) / (π_θ(y_l|x) π_ref(y_w|x))],  β written τ

Delta from the paper: log-ratios are averaged over the tokens of a response and not summed. The paper does not say so;
its authors told TRL's that this is what they ran, and with sums the one target 1/(2β) means something else for every
length.
"""

from torch import Tensor

from align_cli.optima import least_squares, root, share
from align_cli.preferences import gap
from align_cli.ranges import Positive


def ipo(policy: Tensor, reference: Tensor, lengths: Tensor, pairs: Tensor, *, beta: Positive) -> Tensor:
    """Regress the gap of per-token log-ratios on 1/(2β), so that certain preferences do not drive it to infinity.

        h_i = (log π_θ(y_i|x) − log π_ref(y_i|x)) / |y_i|
        L = Σ_ij w_ij (h_i − h_j − 1/(2β))²

    Args:
        policy: (B, K) log π_θ(y_k|x), nats.
        reference: (B, K) log π_ref(y_k|x), nats.
        lengths: (B, K) |y_k|, tokens.
        pairs: (B, K, K) w_ij, the weight of "y_i is preferred to y_j".
        beta: β, strength of the regularisation (τ in the paper), per nat and token.

    Returns:
        (B,). 1/(4β²) at the reference; 0, the minimum for one pair, at h_w − h_l = 1/(2β).
    """
    margin = gap((policy - reference) / lengths)
    return (pairs * (margin - 1 / (2 * beta)).square()).sum((-2, -1))


def at_reference(pairs: Tensor, *, beta: Positive) -> Tensor:
    """1/(4β²) for every prompt that has a pair; (B,)."""
    return pairs.sum((-2, -1)) / (4 * beta**2)


def optimum(reference: Tensor, lengths: Tensor, pairs: Tensor, *, beta: Positive) -> Tensor:
    """The gaps of per-token log-ratios are nearest to (2p − 1)/(2β), p being the share of wins.

    arXiv 2310.12036, eq. 17: the solution of its regression
    """
    ratio = least_squares((share(pairs) - 0.5) / beta, pairs)
    mass = reference.logsumexp(-1, keepdim=True)

    # A shift of all per-token ratios changes nothing of the loss; the policy's sum is that of the reference.
    def excess(shift: Tensor) -> Tensor:
        return (reference + lengths * (ratio + shift)).logsumexp(-1, keepdim=True) - mass

    furthest = ratio.abs().amax(-1, keepdim=True)
    return reference + lengths * (ratio + root(excess, -furthest, furthest))
