"""Preferences between the K responses to one prompt, as weights over ordered pairs.

Pairwise losses compare every y_i with every y_j and weigh the comparisons by the column `pairs`. Each response is
scored once, however many comparisons it takes part in, and a single pair is K = 2 with one weight of 1.
"""

from torch import Tensor


def gap(x: Tensor) -> Tensor:
    """By how much each response exceeds each other one: gap(x)_ij = x_i − x_j.

    Args:
        x: (..., K) any quantity of the responses.

    Returns:
        (..., K, K), antisymmetric in its last two axes, zero on their diagonal.
    """
    return x[..., :, None] - x[..., None, :]


def strict_pairs(rewards: Tensor) -> Tensor:
    """All strict preferences, equally weighted: w_ij = [r_i > r_j] / #{(k, l): r_k > r_l}.

    Args:
        rewards: (B, K) r(x, y_k); −∞ marks a response that is below all finite ones.

    Returns:
        (B, K, K) weight of "y_i is preferred to y_j", of the dtype of `rewards`. It sums to 1 for each prompt, or to 0
        where all rewards are equal and nothing is preferred.
    """
    # Compared and not subtracted: −∞ − (−∞) is NaN.
    better = (rewards[..., :, None] > rewards[..., None, :]).to(rewards.dtype)
    return better / better.sum((-2, -1), keepdim=True).clamp(min=1)
