"""A reward model of pairwise preferences. Bradley, Terry, "Rank Analysis of Incomplete Block Designs" (1952); for
responses of language models, all pairs of a prompt at once, Ouyang et al., arXiv 2203.02155, eq. 1.

L = −log σ(r(x, y_w) − r(x, y_l) − m Δ) + c (r(x, y_w) + r(x, y_l))²

The margin m Δ is that of Llama 2 (Touvron et al., arXiv 2307.09288, eq. 2), here in proportion to how far apart the
responses are rated; the second term, which centres scores around 0, that of Eisenstein et al., arXiv 2312.09244.
"""

from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from align_cli.optima import least_squares, share
from align_cli.preferences import gap
from align_cli.ranges import NonNegative


def bradley_terry(
    scores: Tensor, pairs: Tensor, rewards: Tensor, *, centering: NonNegative, margin: NonNegative
) -> Tensor:
    """Score responses so that σ of the difference of two scores is the probability that one is preferred.

        L = Σ_ij w_ij [ −log σ(s_i − s_j − m (r_i − r_j)) + c (s_i + s_j)² ]

    Args:
        scores: (B, K) s_k, the reward model's r(x, y_k).
        pairs: (B, K, K) w_ij, the weight of "y_i is preferred to y_j".
        rewards: (B, K) r_k, by which responses are preferred; an infinite difference, as hard labels make it, asks
            for no margin.
        centering: c; a prompt's scores are known up to a constant only, which this draws to 0. With one pair of two
            responses it is the paper's term; with more, its mean over the pairs.
        margin: m, units of score for a unit of reward.

    Returns:
        (B,). log 2 for a prompt with pairs where all scores are 0 and m is 0. If c and m are 0 and w_ij ∝ σ(r_i − r_j),
        the gradient vanishes at s = r + const.
    """
    apart = gap(rewards)
    asked = margin * apart.masked_fill(~apart.isfinite(), 0.0)
    right = logsigmoid(gap(scores) - asked)
    together = scores[..., :, None] + scores[..., None, :]
    return (pairs * (centering * together.square() - right)).sum((-2, -1))


def optimum(pairs: Tensor, *, centering: Literal[0], margin: Literal[0]) -> Tensor:
    """Scores whose differences are the log-odds of the comparisons; (B, K).

    Bradley and Terry (1952); arXiv 2203.02155, eq. 1
    """
    return least_squares(share(pairs).logit(), pairs)
