"""What the functions `optimum` beside the losses share: how often a response wins, and equations of one unknown."""

from collections.abc import Callable

import torch
from torch import Tensor

HALVINGS = 64  # of an interval, after which float64 has no number of its size inside it


def share(pairs: Tensor) -> Tensor:
    """Of the comparisons of y_i with y_j, how many y_i wins: w_ij/(w_ij + w_ji), 1/2 where there are none; (B, K, K).

    Args:
        pairs: (B, K, K) w_ij, the weight of "y_i is preferred to y_j".
    """
    both = pairs + pairs.mT
    return torch.where(both > 0, pairs / both.where(both > 0, 1.0), 0.5)


def least_squares(margins: Tensor, pairs: Tensor) -> Tensor:
    """The scores whose differences are nearest to the margins, in squares weighed by how often two are compared.

    Comparisons without a cycle can have any margins, and then the differences are the margins.

    Args:
        margins: (B, K, K) m_ij = −m_ji, what s_i − s_j should be; finite, or of no account where w_ij + w_ji = 0.
        pairs: (B, K, K) w_ij.

    Returns:
        (B, K), of mean 0.
    """
    both = pairs + pairs.mT
    wanted = torch.where(both > 0, both * margins, 0.0).sum(-1)
    laplacian = torch.diag_embed(both.sum(-1)) - both
    return (torch.linalg.pinv(laplacian, hermitian=True) @ wanted[..., None])[..., 0]


def root(excess: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Where an increasing function crosses 0, element by element, between `low` and `high` of the same shape."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        above = excess(middle) > 0
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2
