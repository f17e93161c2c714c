"""GRPO: Group Relative Policy Optimization. Shao, Wang, Zhu, Xu, Song, Bi, Zhang, Zhang, Li, Wu, Guo, "DeepSeekMath",
arXiv 2402.03300, eq. 3 and 4.

L = max(−w A, −clamp(w, 1 ± ε) A) + β (t − 1 − log t),  w = π_θ/q,  t = π_ref/π_θ

Delta from the paper: every token of a step counts equally; there every response does, and its tokens share its weight.
"""

import torch
from torch import Tensor

from align_cli.optima import root
from align_cli.ranges import NonNegative, Positive
from align_cli.surrogates import clipped, k3, ratio


def grpo(
    policy_tokens: Tensor,
    behavior_tokens: Tensor,
    reference_tokens: Tensor,
    advantages: Tensor,
    *,
    clip: Positive,
    beta: NonNegative,
) -> Tensor:
    """Make better than usual responses more likely, a short way at a time, and stay near the reference.

        w_t = π_θ(y_t|x, y_<t)/q(y_t|x, y_<t),  d_t = log π_ref(y_t|x, y_<t) − log π_θ(y_t|x, y_<t)
        ℓ_t = max(−w_t A_t, −clamp(w_t, 1 − ε, 1 + ε) A_t) + β (exp(d_t) − d_t − 1)

    Args:
        policy_tokens: (B, K, T) log π_θ of each response token, nats.
        behavior_tokens: (B, K, T) log q where the tokens were sampled, nats.
        reference_tokens: (B, K, T) log π_ref of each response token, nats.
        advantages: (B, K, T) A_t.
        clip: ε, how far a token's ratio is led from 1.
        beta: β, strength of the KL to the reference, units of the advantage for a nat.

    Returns:
        (B, K, T). At w = 1 the gradient is −(A_t − β (1 − exp d_t)) ∇ log π_θ. 0 beyond a response's end.
    """
    surrogate = clipped(ratio(policy_tokens, behavior_tokens), advantages, clip=clip)
    return surrogate + beta * k3(policy_tokens, reference_tokens)


def optimum(reference: Tensor, rewards: Tensor, tokens: Tensor, *, beta: Positive) -> Tensor:
    """π(a) = π_ref(a)/(1 − (Q(a) − V)/β) at each token, Q being the reward that is expected after it and V its mean.

    derived from arXiv 2402.03300, eq. 4: the gradient of its estimator of the KL is that of KL(π_ref ‖ π)
    """
    rows = zip(reference, rewards, tokens, strict=True)
    return torch.stack([_at_rest(*row, beta=beta)[2] for row in rows])


def _at_rest(reference: Tensor, rewards: Tensor, tokens: Tensor, *, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of responses that begin alike: the reference's probability of that, the expected reward, and (K,) how they go on.

    Args:
        reference: (K,) log π_ref; rewards: (K,); tokens: (K, T) after what they have in common.
    """
    if tokens.shape[-1] == 0 or bool((tokens[:, 0] < 0).all()):
        return reference.exp().sum(), rewards[0], torch.zeros_like(reference)
    branches = [tokens[:, 0] == token for token in tokens[:, 0].unique()]
    after = [_at_rest(reference[branch], rewards[branch], tokens[branch, 1:], beta=beta) for branch in branches]
    mass, worth = torch.stack([each[0] for each in after]), torch.stack([each[1] for each in after])

    def shares(value: Tensor) -> Tensor:
        return mass / mass.sum() / (1 - (worth - value) / beta)

    value = root(lambda value: 1 - shares(value).sum(), worth.max() - beta, worth.max())
    found = torch.empty_like(reference)
    for branch, share, (_, _, rest) in zip(branches, shares(value), after, strict=True):
        found[branch] = share.log() + rest
    return mass.sum(), value, found
