"""RLOO: REINFORCE Leave-One-Out. Ahmadian, Cremer, Gallé, Fadaee, Kreutzer, Pietquin, Üstün, Hooker, "Back to Basics",
arXiv 2402.14740, eq. 8.

L = 1/K Σ_k max(−w_k A_k, −clamp(w_k, 1 ± ε) A_k),  w = π_θ/q

Delta from the paper: the ratio of whole responses and its clip, for several updates on one set of samples; at the first
of them w = 1, and the gradient is the paper's.
"""

from torch import Tensor

from align_cli.ranges import Positive
from align_cli.surrogates import clipped, ratio


def rloo(policy: Tensor, behavior: Tensor, advantages: Tensor, *, clip: Positive) -> Tensor:
    """Make responses more likely that are better than the prompt's others.

        w_k = π_θ(y_k|x)/q(y_k|x)
        L = 1/K Σ_k max(−w_k A_k, −clamp(w_k, 1 − ε, 1 + ε) A_k)

    A response is one action: it has one ratio and one advantage, and prompts count equally however long their
    responses are, as in the expectation whose gradient this is. Hence elements are prompts and not tokens.

    Args:
        policy: (B, K) log π_θ(y_k|x), nats.
        behavior: (B, K) log q(y_k|x) where it was sampled, nats.
        advantages: (B, K, T) A_k, the same at each token of a response.
        clip: ε, how far a response's ratio is led from 1.

    Returns:
        (B,). At w = 1 its gradient is REINFORCE's, −1/K Σ_k A_k ∇ log π_θ(y_k|x).
    """
    return clipped(ratio(policy, behavior), advantages[..., 0], clip=clip).mean(-1)
