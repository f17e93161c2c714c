"""The `target` group: distributions that f-DPG approximates, as log P(x, y) up to a constant of the prompt.

Each is the model that alignment starts from, reweighted: P(x, y) = π_ref(y|x) · weight(x, y). Go et al., arXiv
2302.08215; constraints on every response and on means of features are those of Khalifa, Elsahar, Dymetman, arXiv
2012.11635.
"""

import torch
from torch import Tensor

from align_cli.ranges import Fraction, Positive


def pointwise(reference: Tensor, ratings: Tensor, *, floor: Fraction) -> Tensor:
    """A constraint on every response: P = π_ref · max(b, floor); with b in {0, 1} the nearest to π_ref that keeps it.

    Args:
        reference: (B, K) log π_ref(y_k|x), nats.
        ratings: (B, K) b, 1 where the response satisfies the constraint, 0 where it does not, or a share between.
        floor: least weight of a response; 0 excludes those that do not satisfy it. Reverse KL needs more than 0.

    Returns:
        (B, K) nats, −∞ where a response is excluded.
    """
    return reference + ratings.clamp(min=floor).log()


def rlhf(reference: Tensor, rewards: Tensor, *, beta: Positive) -> Tensor:
    """The optimum of E[r] − β KL(π ‖ π_ref): P = π_ref · exp(r/β).

    Args:
        reference: (B, K) log π_ref(y_k|x), nats.
        rewards: (B, K) r(x, y_k).
        beta: β, strength of the KL to the reference; larger stays closer.

    Returns:
        (B, K) nats. f-DPG with reverse KL on it is KL-regularised reinforcement learning.
    """
    return reference + rewards / beta


def classifier(reference: Tensor, ratings: Tensor, *, temperature: Positive) -> Tensor:
    """A classifier's probability as the weight: P = π_ref · φ^(1/T).

    Args:
        reference: (B, K) log π_ref(y_k|x), nats.
        ratings: (B, K) φ, the probability of the wanted class, in [0, 1].
        temperature: T; smaller asks for more certain responses.

    Returns:
        (B, K) nats, −∞ where φ is 0.
    """
    return reference + torch.log(ratings) / temperature


def exponential(reference: Tensor, features: Tensor, lambdas: Tensor) -> Tensor:
    """Wanted means of features: P = π_ref · exp(λ·φ), the nearest to π_ref that has them.

    Args:
        reference: (B, K) log π_ref(y_k|x), nats.
        features: (B, K, F) φ.
        lambdas: (B, F) λ, so that E_p[φ] is what is wanted (`align_cli.moments`).

    Returns:
        (B, K) nats; nothing is excluded.
    """
    return reference + (features * lambdas[:, None]).sum(-1)
