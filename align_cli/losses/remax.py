"""ReMax. Li, Xu, Zhang, Lin, Yu, Sun, Luo, "ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method for
Aligning Large Language Models", arXiv 2310.10505.

L = −Σ_t A_t log π_θ(y_t|x, y_<t),  A_t = what is earned from t on − the reward of the greedy response

Delta from the paper: the ratio π_θ/q and its clip, for several updates on one set of samples; at the first of them the
ratio is 1, and the gradient is the paper's.
"""

from torch import Tensor

from align_cli.ranges import Positive
from align_cli.surrogates import clipped, ratio


def remax(policy_tokens: Tensor, behavior_tokens: Tensor, advantages: Tensor, *, clip: Positive) -> Tensor:
    """Make the tokens of responses more likely that earn more than the greedy one.

        w_t = π_θ(y_t|x, y_<t)/q(y_t|x, y_<t)
        ℓ_t = max(−w_t A_t, −clamp(w_t, 1 − ε, 1 + ε) A_t)

    Args:
        policy_tokens: (B, K, T) log π_θ of each response token, nats.
        behavior_tokens: (B, K, T) log q where the tokens were sampled, nats.
        advantages: (B, K, T) A_t.
        clip: ε, how far a token's ratio is led from 1.

    Returns:
        (B, K, T). At w = 1 the gradient is REINFORCE's, −A_t ∇ log π_θ. 0 beyond a response's end.
    """
    return clipped(ratio(policy_tokens, behavior_tokens), advantages, clip=clip)
