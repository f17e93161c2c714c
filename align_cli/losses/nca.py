"""NCA: Noise Contrastive Alignment. Chen, He, Yuan, Cui, Su, Zhu, "Noise Contrastive Alignment of Language Models with
Explicit Rewards", arXiv 2402.05369.

L = −Σ_k softmax(r/α)_k log σ(s_k) − 1/K Σ_k log σ(−s_k),  s = β log π_θ/π_ref

The authors' code adds 0.01 to the reward of the first response before it divides by α = 1e-4, which makes the target
one-hot; here the rewards are taken as they are.
"""

import math

from torch import Tensor
from torch.nn.functional import logsigmoid, softmax

from align_cli.ranges import Positive


def nca(policy: Tensor, reference: Tensor, rewards: Tensor, *, alpha: Positive, beta: Positive) -> Tensor:
    """Tell, for each response by itself, whether it came from the optimal policy or from the reference.

        s_k = β (log π_θ(y_k|x) − log π_ref(y_k|x)),  w = softmax(r/α)
        L = −Σ_k w_k log σ(s_k) − 1/K Σ_k log σ(−s_k)

    Every response has its own point of rest: unlike DPO and InfoNCA, NCA is not indifferent to a common shift of all
    log-ratios, and a best response that has become less likely is pulled back. The second term takes responses as
    noise of the reference: drawn from the policy itself (source=rollout), what is sampled often counts as noise more
    often, so that responses are held down by more than their rewards ask for.

    Args:
        policy: (B, K) log π_θ(y_k|x), nats.
        reference: (B, K) log π_ref(y_k|x), nats.
        rewards: (B, K) r(x, y_k); −∞ excludes a response from the target.
        alpha: α, temperature of the rewards, in their unit.
        beta: β, scale of the log-ratio.

    Returns:
        (B,). 2 log 2 at the reference, whatever K and the rewards are. The gradient vanishes at s_k = log(K w_k).
    """
    score = beta * (policy - reference)
    target = softmax(rewards / alpha, dim=-1)
    return -(target * logsigmoid(score)).sum(-1) - logsigmoid(-score).mean(-1)


def at_reference(rewards: Tensor) -> Tensor:
    """2 log 2; (B,)."""
    return rewards.new_full(rewards.shape[:1], 2 * math.log(2))


def optimum(reference: Tensor, rewards: Tensor, *, alpha: Positive, beta: Positive) -> Tensor:
    """β log π/π_ref = log(K w): with β = 1 and responses drawn from the reference, π ∝ π_ref exp(r/α).

    arXiv 2402.05369: where each of its logistic terms is least
    """
    density = math.log(rewards.shape[-1]) + rewards.div(alpha).log_softmax(-1)
    return reference + density / beta
