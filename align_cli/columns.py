"""Columns: the named tensors about a batch, and how functions ask for them.

A batch is B prompts x K responses x T tokens. A column is one tensor about them. A function (a loss, a metric, a
producer) asks for columns by the names of its positional parameters and takes its options as keyword-only
parameters, as pytest fills fixtures. Whatever is neither the policy's own nor given by the source is made on
demand, without gradient, each once, by producers: functions of the same kind, whose name is what they make.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

Column = Callable[..., Tensor]

GLOSSARY = {
    # the policy's own: the only columns with gradient
    "policy": "(B, K) log π_θ(y_k|x), nats, summed over response tokens and stop token",
    "policy_tokens": "(B, K, T) log π_θ of each response token, nats, 0 beyond a response's end",
    "values": "(B, K, T) what the critic expects before each response token, in units of the reward, 0 beyond the end",
    "scores": "(B, K) the reward model's r(x, y_k)",
    # given by the source
    "ratings": "(B, K) the data's scalar for each response, as it stands in the data",
    "lengths": "(B, K) response tokens, stop token included",
    "batch": "the micro-batch itself: token ids and layout, for producers that run a model",
    "behavior": "(B, K) log-probability of y_k under the distribution that it was sampled from, nats; of rollouts",
    "behavior_tokens": "(B, K, T) the same of each response token, nats, 0 beyond a response's end; of rollouts",
    "features": "(B, K, F) what the features of target=exponential say of each sampled response",
    "mask": "(B, K, T) 1 on response tokens, 0 beyond a response's end",
    # made
    "rewards": "(B, K) r(x, y_k), the ratings after the `reward` group",
    "reference": "(B, K) log π_ref(y_k|x), nats, as `policy`",
    "reference_tokens": "(B, K, T) log π_ref of each response token, nats, 0 beyond a response's end",
    "pairs": "(B, K, K) weight of 'y_i is preferred to y_j'; sums to 1 for each prompt, to 0 where none is preferred",
    "target": "(B, K) log P(x, y_k) of the distribution to approximate, up to log_z, nats; -inf where excluded",
    "lambdas": "(B, F) weight of each feature in the target, nats per unit of it; alike for all prompts",
    "log_z": "(B,) log Z(x), which normalises the target, nats",
    "mismatch_kl": "(B,) the step's estimate of KL(π_θ || π_ref) from mismatched prompts and responses, nats, >= 0",
    "old_values": "(B, K, T) `values` as they were when the responses were drawn",
    "token_rewards": "(B, K, T) what each token earns: its KL penalty, and the last one the response's reward besides",
    "raw_advantages": "(B, K, T) by how much each token was better than expected, of the `advantage` group",
    "advantages": "(B, K, T) the same, with mean 0 and deviation 1 over the step where `advantage.whiten` asks for it",
    "returns": "(B, K, T) what `values` is to predict, in units of the reward",
    "baselines": "(B, N) ratings of N responses of the starting model to each prompt",
    "spread": "(B, K) deviation of the ratings that the members of an ensemble give each response",
    "greedy": "(B,) rating of the policy's most likely response to each prompt",
}

REMEMBERED = {"policy": "behavior", "policy_tokens": "behavior_tokens", "values": "old_values"}
"""What the policy's own columns are called once they are those of the policy that sampled."""


@runtime_checkable
class Gathers(Protocol):
    """A producer that looks at a whole step before it makes its column of any micro-batch."""

    def gather(self, filled: Sequence[Mapping[str, Any]]) -> None:
        """Take in the columns of this rank's micro-batches; every rank calls it."""
        ...


@runtime_checkable
class Learns(Protocol):
    """A producer with a state, which is saved with the run."""

    def state(self) -> dict[str, Any]:
        """As JSON can hold it."""
        ...


POLICY = frozenset({"policy", "policy_tokens", "values", "scores"})


def asked(function: Callable[..., Any]) -> list[str]:
    """The columns that a function needs: its positional parameters, by name."""
    return [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]


def evaluate(function: Callable[..., Any], columns: Mapping[str, Tensor]) -> Any:
    """Call `function` on the columns that it asks for."""
    return function(*(columns[name] for name in asked(function)))


def plan(wanted: Iterable[str], given: Iterable[str], producers: Mapping[str, Column]) -> list[str]:
    """The columns to produce, in order, so that all of `wanted` is there.

    Raises:
        ValueError: nothing gives or makes a column that is asked for.
    """
    there = set(given)
    order: list[str] = []

    def visit(name: str, asker: str) -> None:
        if name in there:
            return
        if name not in producers:
            raise ValueError(f"nothing provides the column '{name}', asked for by {asker}.")
        there.add(name)
        for needed in asked(producers[name]):
            visit(needed, f"'{name}'")
        order.append(name)

    for name in wanted:
        visit(name, "the loss")
    return order
