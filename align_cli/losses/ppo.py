"""PPO: Proximal Policy Optimization. Schulman, Wolski, Dhariwal, Radford, Klimov, arXiv 1707.06347, eq. 7 and 9; the
clipped error of the values is that of the authors' code.

L = max(−w A, −clamp(w, 1 ± ε) A) + c · ½ max((V − R)², (V_old + clamp(V − V_old, ± ε_V) − R)²),  w = π_θ/q

No entropy is rewarded; the KL penalty is in what tokens earn.
"""

import torch
from torch import Tensor

from align_cli.ranges import NonNegative, Positive
from align_cli.surrogates import clipped, ratio


def ppo(
    policy_tokens: Tensor,
    values: Tensor,
    behavior_tokens: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    *,
    clip: Positive,
    value_clip: Positive,
    value_weight: NonNegative,
) -> Tensor:
    """Make tokens with an advantage more likely, a short way at a time, and predict what responses earn.

        w_t = π_θ(y_t|x, y_<t)/q(y_t|x, y_<t),  V̄_t = V_old,t + clamp(V_t − V_old,t, −ε_V, ε_V)
        ℓ_t = max(−w_t A_t, −clamp(w_t, 1 − ε, 1 + ε) A_t) + c · ½ max((V_t − R_t)², (V̄_t − R_t)²)

    Args:
        policy_tokens: (B, K, T) log π_θ of each response token, nats.
        values: (B, K, T) V_t, the critic's, in units of the reward.
        behavior_tokens: (B, K, T) log q where the tokens were sampled, nats.
        old_values: (B, K, T) V_old, the critic's at that time.
        advantages: (B, K, T) A_t.
        returns: (B, K, T) R_t.
        clip: ε, how far a token's ratio is led from 1.
        value_clip: ε_V, how far a value is led from V_old, in units of the reward.
        value_weight: c.

    Returns:
        (B, K, T). At w = 1 the policy's gradient is REINFORCE's, −A_t ∇ log π_θ. 0 beyond a response's end.
    """
    near = old_values + (values - old_values).clamp(-value_clip, value_clip)
    error = torch.maximum((values - returns).square(), (near - returns).square())
    return clipped(ratio(policy_tokens, behavior_tokens), advantages, clip=clip) + value_weight * error / 2
