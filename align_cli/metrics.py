"""What a preference run logs at a step, named as in TRL.

Each metric is a (sum, count) pair of 0-dimensional tensors: the caller adds the pairs over micro-batches and ranks and
divides once, so that a step's figure does not depend on how the step was split. The count is in prompts.

"Chosen" is the response with the best rating, the first one of ties; "rejected" are all others, averaged for each
prompt. With K = 1 there are none, and their metrics are absent. `rewards/*` are the implicit rewards
β log π_θ/π_ref, in nats times β; they stay so under every loss.
"""

import torch
from torch import Tensor

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


def _chosen_and_others(column: Tensor, ratings: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) the best response's entry and (B, K − 1) the others', by rating."""
    ranked = column.gather(-1, ratings.argsort(dim=-1, descending=True, stable=True))
    return ranked[:, 0], ranked[:, 1:]


def _over_prompts(values: dict[str, Tensor]) -> Metrics:
    """Sums of (B,) values, without gradient, beside their counts."""
    return {
        name: (value.detach().sum(), torch.tensor(float(len(value)), dtype=value.dtype, device=value.device))
        for name, value in values.items()
    }
