"""Supervised fine-tuning: maximum likelihood of the data's responses.

L = −Σ_t log π_θ(y_t | x, y_<t)
"""

from torch import Tensor


def sft(policy_tokens: Tensor) -> Tensor:
    """Make every token of the response likely, given the prompt and the tokens before it.

        ℓ_t = −log π_θ(y_t | x, y_<t)

    Args:
        policy_tokens: (B, K, T) log π_θ of each response token, nats, 0 beyond a response's end.

    Returns:
        (B, K, T) nats, at least 0. In expectation smallest, and equal to the entropy of the data, where π_θ is the
        distribution that the data came from.
    """
    return -policy_tokens


def optimum(shares: Tensor) -> Tensor:
    """The distribution of the data: log of the share of each response in it; (B, K).

    Gibbs' inequality
    """
    return shares
