"""ORPO: Odds Ratio Preference Optimization without a reference. Hong, Lee, Thorne, arXiv 2403.07691.

L = L_SFT(y_w) − λ log σ(log odds(y_w|x)/odds(y_l|x)),  odds = P/(1 − P),  P = exp(mean of token log-probabilities)
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align_cli.preferences import gap
from align_cli.ranges import NonNegative

CERTAIN = 1e-7
"""Nats per token. A response that lost less counts as having lost this much: the odds of probability 1 are infinite,
and the difference of two of them is no number."""
ROUNDS = 200  # in which the optimum is found: each halves the distance


def orpo(policy: Tensor, lengths: Tensor, pairs: Tensor, *, weight: NonNegative) -> Tensor:
    """Fine-tune on the preferred response and, in the same step, raise its odds over those of the other.

        p_i = log π_θ(y_i|x) / |y_i|,  o_i = p_i − log(1 − exp p_i)
        L = −Σ_ij w_ij [p_i + λ log σ(o_i − o_j)]

    Args:
        policy: (B, K) log π_θ(y_k|x), nats, at most 0.
        lengths: (B, K) |y_k|, tokens.
        pairs: (B, K, K) w_ij, the weight of "y_i is preferred to y_j".
        weight: λ, weight of the odds ratio beside the likelihood.

    Returns:
        (B,). The preferred response's mean token loss plus λ log 2 where the two are equally likely.
    """
    likelihood = policy / lengths
    log_odds = likelihood - _log1mexp(likelihood.clamp(max=-CERTAIN))
    return -(pairs * (likelihood[..., :, None] + weight * logsigmoid(gap(log_odds)))).sum((-2, -1))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 − e^x) for x < 0, exact near 0."""
    return torch.log(-torch.expm1(x))


def optimum(lengths: Tensor, pairs: Tensor, *, weight: NonNegative) -> Tensor:
    """π_i ∝ a_i/|y_i|, a_i = Σ_j w_ij + λ Σ_j [w_ij σ(o_j − o_i) − w_ji σ(o_i − o_j)]/(1 − P_i): the gradient is 0.

    arXiv 2403.07691, the gradient that the paper derives for its odds ratio, beside that of the likelihood
    """
    wins = pairs.sum(-1)
    policy = (wins / lengths).log().log_softmax(-1)
    for _ in range(ROUNDS):
        mean = policy / lengths
        lost = -gap(mean - _log1mexp(mean.clamp(max=-CERTAIN)))
        pulled = (pairs * lost.sigmoid() - pairs.mT * (-lost).sigmoid()).sum(-1) / -torch.expm1(mean)
        again = ((wins + weight * pulled).clamp(min=CERTAIN) / lengths).log().log_softmax(-1)
        policy = ((policy + again) / 2).log_softmax(-1)
    return policy
