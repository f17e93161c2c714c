"""The `advantage` group: by how much each token was better than expected, from what the responses earned.

What a token earns (`token_rewards`) is the KL penalty of this token, and at the last token also the response's reward.
Advantages here are raw; a loop that whitens them does so over the whole step (`moments`, `whiten`). Everything is
without gradient, 0 beyond a response's end, whatever stands there in the columns, and computed in float32 at least.
"""

import torch
from torch import Tensor

from align_cli.logprobs import wide
from align_cli.ranges import Fraction


def gae(token_rewards: Tensor, old_values: Tensor, mask: Tensor, *, gamma: Fraction, lam: Fraction) -> Tensor:
    """Generalised advantage estimation. Schulman, Moritz, Levine, Jordan, Abbeel, arXiv 1506.02438, eq. 16.

        δ_t = r_t + γ V_{t+1} − V_t,  V = 0 after the last token
        A_t = Σ_{l≥0} (γλ)^l δ_{t+l}

    Args:
        token_rewards: (B, K, T) r_t.
        old_values: (B, K, T) V_t, what the critic expected before token t.
        mask: (B, K, T).
        gamma: γ, discount of what comes a token later.
        lam: λ; 1 is the return minus the value, 0 the error of one step.

    Returns:
        (B, K, T).
    """
    earned, values = _inside(token_rewards, mask), _inside(old_values, mask)
    after = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], dim=-1)
    errors = earned + gamma * after - values
    advantage = torch.zeros_like(errors[..., 0])
    backwards: list[Tensor] = []
    for error in errors.flip(-1).unbind(-1):
        advantage = error + gamma * lam * advantage
        backwards.append(advantage)
    return torch.stack(backwards[::-1], dim=-1).to(token_rewards.dtype)


def leave_one_out(token_rewards: Tensor, mask: Tensor) -> Tensor:
    """RLOO: against the mean of the prompt's other responses. Ahmadian et al., arXiv 2402.14740, eq. 8.

        R_k = Σ_t r_kt,  A_k = R_k − 1/(K−1) Σ_{j≠k} R_j,  at every token

    Args:
        token_rewards: (B, K, T) r_kt, K >= 2.
        mask: (B, K, T).

    Returns:
        (B, K, T); K/(K−1) (R_k − mean R), which sums to 0 over the responses, exactly 0 where all R are equal.
    """
    returns = _inside(token_rewards, mask).sum(-1)
    responses = returns.shape[-1]
    return _spread(_centred(returns) * responses / (responses - 1), mask).to(token_rewards.dtype)


def group(rewards: Tensor, mask: Tensor, *, scale: bool) -> Tensor:
    """GRPO: against the mean of the prompt's responses, in units of their spread. Shao et al., arXiv 2402.03300.

        A_k = (r_k − mean r) / (std r + 1e-6),  at every token; std with K − 1 in its denominator

    Args:
        rewards: (B, K) r(x, y_k), K >= 2; the KL penalty is the loss's own.
        mask: (B, K, T).
        scale: whether to divide; not to is Dr. GRPO, Liu et al., arXiv 2503.20783.

    Returns:
        (B, K, T); exactly 0 where all rewards are equal.
    """
    centred = _centred(wide(rewards))
    advantages = centred / (centred.std(-1, keepdim=True) + 1e-6) if scale else centred
    return _spread(advantages, mask).to(rewards.dtype)


def greedy(token_rewards: Tensor, greedy: Tensor, mask: Tensor) -> Tensor:
    """ReMax: against the rating of the policy's most likely response. Li et al., arXiv 2310.10505.

        A_t = Σ_{s≥t} r_s − r(x, ŷ),  ŷ = argmax π_θ step by step

    Args:
        token_rewards: (B, K, T) r_t.
        greedy: (B,) r(x, ŷ), in the unit of the rewards.
        mask: (B, K, T).

    Returns:
        (B, K, T).
    """
    earned = _to_go(_inside(token_rewards, mask))
    return _inside(earned - greedy[:, None, None], mask).to(token_rewards.dtype)


def to_go(token_rewards: Tensor, mask: Tensor) -> Tensor:
    """What is still earned: A_t = Σ_{s≥t} r_s; (B, K, T).

    REINFORCE++ before it is whitened. Hu, Liu, Shen, arXiv 2501.03262.
    """
    return _to_go(_inside(token_rewards, mask)).to(token_rewards.dtype)


def token_rewards(
    rewards: Tensor, behavior_tokens: Tensor, reference_tokens: Tensor, mask: Tensor, *, beta: float
) -> Tensor:
    """What each token earns: r_t = −β (log q − log π_ref)_t, and the last one the response's reward besides.

    Args:
        rewards: (B, K) r(x, y_k).
        behavior_tokens: (B, K, T) log-probability of each token where it was sampled, nats.
        reference_tokens: (B, K, T) log π_ref of each token, nats.
        mask: (B, K, T).
        beta: β, units of reward for a nat.

    Returns:
        (B, K, T); it sums to r(x, y_k) − β (log q − log π_ref)(y_k|x). The last token is the response's own last,
        its stop token where it has one.
    """
    inside = mask.bool()
    last = inside & ~torch.cat([inside[..., 1:], torch.zeros_like(inside[..., :1])], dim=-1)
    penalty = _inside(-beta * (wide(behavior_tokens) - reference_tokens), mask)
    return (penalty + _inside(wide(rewards)[..., None], last)).to(behavior_tokens.dtype)


def returns(raw_advantages: Tensor, old_values: Tensor, mask: Tensor) -> Tensor:
    """What the critic is to predict, R_t = A_t + V_t from raw advantages of `gae`; (B, K, T)."""
    return _inside(raw_advantages + old_values, mask)


def moments(advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, sum of squares and number of the advantages of real tokens, each (), float64: they add up over a step."""
    inside = _inside(advantages.double(), mask)
    return inside.sum(), inside.square().sum(), mask.bool().sum().double()


def spread(total: Tensor, squares: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (with `count` in its denominator) from a step's added `moments`, each ()."""
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0).sqrt()


def whiten(advantages: Tensor, mask: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """(A − mean)/deviation on real tokens, 0 beyond; (B, K, T). Advantages that are all equal become 0."""
    return _inside((advantages.double() - mean) / (deviation + 1e-8), mask).to(advantages.dtype)


def adapted(beta: float, kl: float, *, target: float, horizon: float, samples: int) -> float:
    """The next β, which moves so that the KL comes near its target. Ziegler et al., arXiv 1909.08593, section 2.2.

        e = clip(KL/target − 1, −0.2, 0.2),  β ← β (1 + e n/horizon)

    Args:
        beta: β of the step.
        kl: mean KL of the step's responses to the reference, nats of a whole response.
        target: the same, as it should be.
        horizon: responses in which β changes by a fifth, where the KL is far off.
        samples: n, responses of the step.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * samples / horizon)


def _inside(x: Tensor, mask: Tensor) -> Tensor:
    """`x` on real tokens and 0 beyond, whatever stands there; in float32 at least."""
    return torch.where(mask.bool(), wide(x), 0.0)


def _spread(x: Tensor, mask: Tensor) -> Tensor:
    """(B, K) -> (B, K, T): the same at every token of a response."""
    return _inside(x[..., None], mask)


def _centred(x: Tensor) -> Tensor:
    """x − its mean over the responses; exactly 0 where all are equal, whose mean is rounded."""
    beside = x - x[..., :1]
    return beside - beside.mean(-1, keepdim=True)


def _to_go(x: Tensor) -> Tensor:
    return x.flip(-1).cumsum(-1).flip(-1)
