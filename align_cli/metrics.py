"""What a run logs at a step, named as in TRL.

Each metric is a (sum, count) pair of 0-dimensional tensors: the caller adds the pairs over micro-batches and ranks and
divides once, so that a step's figure does not depend on how the step was split. The count is in prompts, or, where it
says so, in response tokens.

"Chosen" is the response with the best rating, the first one of ties; "rejected" are all others, averaged for each
prompt. With K = 1 there are none, and their metrics are absent. `rewards/*` are the implicit rewards
β log π_θ/π_ref, in nats times β; they stay so under every loss.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from align_cli.divergences import Divergence, forward_kl, js, reverse_kl, tv
from align_cli.preferences import gap
from align_cli.surrogates import ratio

Metrics = dict[str, tuple[Tensor, Tensor]]


def preference(policy: Tensor, reference: Tensor, ratings: Tensor, lengths: Tensor, *, beta: float) -> Metrics:
    """All metrics of a run that has a reference: `implicit_rewards`, `likelihood` and `displacement`.

    Args:
        policy: (B, K) log π_θ(y_k|x), nats.
        reference: (B, K) log π_ref(y_k|x), nats.
        ratings: (B, K) the data's scalar for each response.
        lengths: (B, K) response tokens.
        beta: β of the loss.

    Returns:
        name -> (sum over prompts, prompts).
    """
    return {
        **implicit_rewards(policy, reference, ratings, beta=beta),
        **likelihood(policy, ratings, lengths),
        **displacement(policy, reference, ratings, lengths),
    }


def implicit_rewards(policy: Tensor, reference: Tensor, ratings: Tensor, *, beta: float) -> Metrics:
    """`rewards/*`: the implicit rewards of the chosen and the rejected, and how they are ordered.

    Args: as for `preference`.

    Returns:
        rewards/chosen, rewards/rejected, rewards/margins (their difference), rewards/accuracies (the share of the
        rejected that the chosen exceeds), and for K > 2 rewards/rank_0 ... rank_K−1, in the order of the ratings, best
        first.
    """
    rewards = beta * (policy - reference)
    order = ratings.argsort(dim=-1, descending=True, stable=True)
    ranked = rewards.gather(-1, order)
    chosen, others = ranked[:, 0], ranked[:, 1:]
    values = {"rewards/chosen": chosen}
    if others.shape[-1] > 0:
        values["rewards/rejected"] = others.mean(-1)
        values["rewards/margins"] = chosen - others.mean(-1)
        values["rewards/accuracies"] = (chosen[:, None] > others).to(rewards.dtype).mean(-1)
    if others.shape[-1] > 1:
        values |= {f"rewards/rank_{rank}": ranked[:, rank] for rank in range(ranked.shape[-1])}
    return _over_prompts(values)


def likelihood(policy: Tensor, ratings: Tensor, lengths: Tensor) -> Metrics:
    """`logps/*`: log-likelihoods under the policy, which need no reference.

    Args: as for `preference`.

    Returns:
        logps/chosen and logps/rejected, nats summed over a response; logps_per_token/chosen, nats per token of each
        prompt's chosen response.
    """
    chosen, others = _chosen_and_others(policy, ratings)
    tokens, _ = _chosen_and_others(lengths, ratings)
    values = {"logps/chosen": chosen, "logps_per_token/chosen": chosen / tokens}
    if others.shape[-1] > 0:
        values["logps/rejected"] = others.mean(-1)
    return _over_prompts(values)


def displacement(policy: Tensor, reference: Tensor, ratings: Tensor, lengths: Tensor) -> Metrics:
    """`displacement/*`: how far responses have moved from the reference. Below 0, training made them less likely.

    Args: as for `preference`.

    Returns:
        displacement/chosen and displacement/rejected, nats; displacement/chosen_per_token, nats per token;
        displacement/fraction_down, the share of prompts whose chosen response is less likely than at the start.
    """
    chosen, others = _chosen_and_others(policy - reference, ratings)
    tokens, _ = _chosen_and_others(lengths, ratings)
    values = {
        "displacement/chosen": chosen,
        "displacement/chosen_per_token": chosen / tokens,
        "displacement/fraction_down": (chosen < 0).to(chosen.dtype),
    }
    if others.shape[-1] > 0:
        values["displacement/rejected"] = others.mean(-1)
    return _over_prompts(values)


def sampled(policy: Tensor, reference: Tensor, ratings: Tensor, lengths: Tensor) -> Metrics:
    """`rollout/*`: what the policy's own samples are like.

    Args:
        policy: (B, K) log π_θ(y_k|x) of responses drawn from π_θ, nats.
        reference: (B, K) log π_ref(y_k|x), nats.
        ratings: (B, K) the scorer's.
        lengths: (B, K) response tokens.

    Returns:
        rollout/score, rollout/length (tokens), rollout/entropy (nats of a response), and rollout/kl, an estimate of
        KL(π_θ ‖ π_ref) in nats whose terms are all at least 0: log t − 1 + 1/t with t = π_θ/π_ref. The last two are
        off where the responses come from another distribution: at another temperature, after a first update, or from
        a proposal.
    """
    values = {
        "rollout/score": ratings.to(policy.dtype).mean(-1),
        "rollout/length": lengths.to(policy.dtype).mean(-1),
        "rollout/entropy": -policy.mean(-1),
        "rollout/kl": _terms(reverse_kl(), policy - reference).mean(-1),
    }
    return _over_prompts(values)


def disagreement(spread: Tensor) -> Metrics:
    """`rewards/spread`: by how much the members of an ensemble disagree on a response.

    Args:
        spread: (B, K) deviation of their ratings.
    """
    return _over_prompts({"rewards/spread": spread.mean(-1)})


def moments(features: Tensor, *, names: Sequence[str]) -> Metrics:
    """`rollout/moment/*`: the mean of each feature over the policy's own samples.

    Args:
        features: (B, K, F).
        names: of the F features.
    """
    means = features.mean(1)
    return _over_prompts({f"rollout/moment/{name}": means[:, place] for place, name in enumerate(names)})


def approximation(policy: Tensor, behavior: Tensor, target: Tensor, log_z: Tensor) -> Metrics:
    """`divergence/*`: how far the policy is from a target, by samples.

    D_f(π ‖ p) = E_q[π/q f(t)/t] + f′(∞) π(p = 0) with t = π/p; every term is at least 0, and infinite where the target
    excludes a response and the divergence forbids that.

    Args:
        policy: (B, K) log π_θ(y_k|x) of responses drawn from q, nats.
        behavior: (B, K) log q(y_k|x), nats.
        target: (B, K) log P(x, y_k), −∞ where excluded.
        log_z: (B,) log Z(x); prompts where it is −∞ are not counted.

    Returns:
        divergence/forward_kl, divergence/reverse_kl, divergence/tv, divergence/js (half of `divergences.js`, as it is
        usually written); divergence/log_z, divergence/excluded, the policy's probability of what the target excludes;
        divergence/skipped, the share of prompts where log_z is −∞, of all.
    """
    known = log_z > -torch.inf
    skipped = _over_prompts({"divergence/skipped": (~known).to(policy.dtype)})
    policy, behavior, target, log_z = policy[known], behavior[known], target[known], log_z[known]
    excluded = ratio(policy.detach(), behavior) * (target == -torch.inf)
    values = {"divergence/log_z": log_z, "divergence/excluded": excluded.mean(-1)}
    kinds = {"forward_kl": (forward_kl(), 1.0), "reverse_kl": (reverse_kl(), 1.0), "tv": (tv(), 1.0), "js": (js(), 0.5)}
    for name, (divergence, scale) in kinds.items():
        values[f"divergence/{name}"] = scale * by_samples(policy, behavior, target, log_z, divergence=divergence)
    return _over_prompts(values) | skipped


def by_samples(policy: Tensor, behavior: Tensor, target: Tensor, log_z: Tensor, *, divergence: Divergence) -> Tensor:
    """D_f(π ‖ p) of each prompt, from samples of q; without bias where Z is right, and never negative.

    Args:
        policy: (B, K) log π(y_k|x) of any distribution π, nats; behavior, target: as for `approximation`.
        log_z: (B,) log Z(x), finite.
        divergence: D_f.

    Returns:
        (B,) float64, without gradient; infinite where p excludes a response and the divergence forbids that.
    """
    weight = ratio(policy.detach().double(), behavior)  # in float64, because 1/t may be as large as it is small
    excluded = target == -torch.inf
    log_ratio = policy - target.masked_fill(excluded, 0.0) + log_z[:, None]
    terms = weight * torch.where(excluded, divergence.limit, _terms(divergence, log_ratio))
    return torch.where(weight == 0, 0.0, terms).mean(-1)  # and not 0 times infinity


def objective(
    behavior_tokens: Tensor, reference_tokens: Tensor, ratings: Tensor, rewards: Tensor, mask: Tensor, *, beta: float
) -> Metrics:
    """`objective/*`: what reinforcement learning under a KL penalty maximises, on the responses of a step.

    Args:
        behavior_tokens: (B, K, T) log-probability of each token where it was sampled, nats.
        reference_tokens: (B, K, T) log π_ref of each token, nats.
        ratings: (B, K) the rater's.
        rewards: (B, K) what was made of them.
        mask: (B, K, T).
        beta: β of the KL penalty, units of reward for a nat.

    Returns:
        objective/kl, KL(q ‖ π_ref) in nats of a response, estimated without bias by log q − log π_ref;
        objective/entropy, nats of a response; objective/scores, the ratings; objective/non_score_reward, −β KL;
        objective/rlhf_reward, what a response earns altogether.
    """
    inside = mask.bool()
    kl = torch.where(inside, behavior_tokens.double() - reference_tokens, 0.0).sum(-1)
    entropy = -torch.where(inside, behavior_tokens.double(), 0.0).sum(-1)
    values = {
        "objective/kl": kl,
        "objective/entropy": entropy,
        "objective/scores": ratings.double(),
        "objective/non_score_reward": -beta * kl,
        "objective/rlhf_reward": rewards - beta * kl,
    }
    return _over_prompts({name: value.mean(-1) for name, value in values.items()})


def update(policy_tokens: Tensor, behavior_tokens: Tensor, mask: Tensor, *, clip: float) -> Metrics:
    """How far the policy has moved from where the responses were sampled; all 0, and the ratio 1, before an update.

    Args:
        policy_tokens: (B, K, T) log π_θ of each response token, nats; (B, K, 1) of each response, as RLOO clips.
        behavior_tokens: of the same shape, log q where they were sampled, nats.
        mask: of the same shape.
        clip: ε of the loss.

    Returns:
        name -> (sum over response tokens, tokens), or responses: policy/approxkl_avg, half the mean squared log-ratio;
        policy/clipfrac_avg, the share of ratios outside 1 ± ε; val/ratio, π_θ/q.
    """
    now = ratio(policy_tokens, behavior_tokens)
    values = {
        "policy/approxkl_avg": (policy_tokens.double() - behavior_tokens).square() / 2,
        "policy/clipfrac_avg": ((now - 1).abs() > clip).double(),
        "val/ratio": now,
    }
    return _over_tokens(values, mask)


def critic(values: Tensor, returns: Tensor, mask: Tensor) -> Metrics:
    """How well the critic predicts what responses earn.

    Args:
        values: (B, K, T) the critic's.
        returns: (B, K, T) what it is to predict.
        mask: (B, K, T).

    Returns:
        name -> (sum over response tokens, tokens): loss/value_avg, half the mean squared error; val/returns and
        val/returns_squared, from which the explained variance of a step follows, 1 − 2 e/(s − m²) with these three
        figures e, m and s.
    """
    wide = returns.double()
    found = {
        "loss/value_avg": (values - wide).square() / 2,
        "val/returns": wide,
        "val/returns_squared": wide.square(),
    }
    return _over_tokens(found, mask)


def contrast(ratings: Tensor, baselines: Tensor, rewards: Tensor) -> Metrics:
    """`contrastive/*`: ratings, those of the starting model's responses, and what one is above the other.

    Args:
        ratings: (B, K).
        baselines: (B, N) ratings of the starting model's responses.
        rewards: (B, K) of `rewards.contrastive`.

    Returns:
        contrastive/raw_score_mean, contrastive/baseline_mean, contrastive/score_mean, and contrastive/frac_positive,
        the share of responses above their baseline.
    """
    values = {
        "contrastive/raw_score_mean": ratings,
        "contrastive/baseline_mean": baselines,
        "contrastive/score_mean": rewards,
        "contrastive/frac_positive": rewards > 0,
    }
    return _over_prompts({name: value.double().mean(-1) for name, value in values.items()})


def ranking(scores: Tensor, pairs: Tensor) -> Metrics:
    """`rewards/*` of a reward model: how it orders responses; without a preference a prompt counts in the mean alone.

    Args:
        scores: (B, K) the reward model's.
        pairs: (B, K, K) weight of "y_i is preferred to y_j".

    Returns:
        rewards/accuracies, the share of preferences that the scores agree with, where equal scores agree by half;
        rewards/margins, rewards/chosen and rewards/rejected, of preferred and not preferred responses, weighted alike;
        rewards/mean, of all responses.
    """
    scores, pairs = scores.double(), pairs.double()
    agree = (gap(scores).sign() + 1) / 2
    over_pairs = {
        "rewards/accuracies": agree,
        "rewards/margins": gap(scores),
        "rewards/chosen": scores[:, :, None],
        "rewards/rejected": scores[:, None, :],
    }
    found = {name: ((pairs * value).detach().sum(), pairs.sum()) for name, value in over_pairs.items()}
    return found | _over_prompts({"rewards/mean": scores.mean(-1)})


def _terms(divergence: Divergence, log_ratio: Tensor) -> Tensor:
    """f(t)/t from log t; in float64, where t and 1/t are finite far beyond any response."""
    wide = log_ratio.detach().double().clamp(-700, 700)
    return divergence.f(wide) * (-wide).exp()


def _chosen_and_others(column: Tensor, ratings: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) the best response's entry and (B, K − 1) the others', by rating."""
    ranked = column.gather(-1, ratings.argsort(dim=-1, descending=True, stable=True))
    return ranked[:, 0], ranked[:, 1:]


def _over_prompts(values: dict[str, Tensor]) -> Metrics:
    """Sums of (B,) values, without gradient, beside their counts."""
    return {name: (value.detach().sum(), value.new_full((), float(len(value)))) for name, value in values.items()}


def _over_tokens(values: dict[str, Tensor], mask: Tensor) -> Metrics:
    """Sums of (B, K, T) values over real tokens, without gradient and whatever stands beyond, beside their counts."""
    inside = mask.bool()
    return {
        name: (torch.where(inside, value.detach(), 0.0).sum(), inside.sum().to(value.dtype))
        for name, value in values.items()
    }
