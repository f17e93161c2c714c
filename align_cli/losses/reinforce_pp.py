"""REINFORCE++. Hu, Liu, Shen, arXiv 2501.03262.

L = max(−w A, −clamp(w, 1 ± ε) A),  w = π_θ/q,  A_t = what is earned from t on, whitened over the step

PPO without a critic: the mean of the step is the only baseline, so that one response for each prompt is enough.
"""

from torch import Tensor

from align_cli.ranges import Positive
from align_cli.surrogates import clipped, ratio


def reinforce_pp(policy_tokens: Tensor, behavior_tokens: Tensor, advantages: Tensor, *, clip: Positive) -> Tensor:
    """Make tokens more likely after which more is earned than after others of the step.

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
