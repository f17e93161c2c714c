"""Columns: the named tensors about a batch, and how functions ask for them.

A batch is B prompts x K responses x T tokens. A column is one tensor about them. A function (a loss, a metric, a
producer) asks for columns by the names of its positional parameters and takes its options as keyword-only
parameters, as pytest fills fixtures. Whatever is neither the policy's own nor given by the source is made on
demand, without gradient, each once, by producers: functions of the same kind, whose name is what they make.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

Column = Callable[..., Tensor]

GLOSSARY = {
    # the policy's own: the only columns with gradient
    "policy": "(B, K) log π_θ(y_k|x), nats, summed over response tokens and stop token",
    "policy_tokens": "(B, K, T) log π_θ of each response token, nats, 0 beyond a response's end",
    # given by the source
    "ratings": "(B, K) the data's scalar for each response, as it stands in the data",
    "lengths": "(B, K) response tokens, stop token included",
    "batch": "the micro-batch itself: token ids and layout, for producers that run a model",
    "mask": "(B, K, T) 1 on response tokens, 0 beyond a response's end",
    # made
    "rewards": "(B, K) r(x, y_k), the ratings after the `reward` group",
    "reference": "(B, K) log π_ref(y_k|x), nats, as `policy`",
    "pairs": "(B, K, K) weight of 'y_i is preferred to y_j'; sums to 1 for each prompt",
    "mismatch_kl": "(B,) the step's estimate of KL(π_θ || π_ref) from mismatched prompts and responses, nats, >= 0",
}

POLICY = frozenset({"policy", "policy_tokens"})


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


def fill(columns: Mapping[str, Tensor], order: Iterable[str], producers: Mapping[str, Column]) -> dict[str, Tensor]:
    """`columns` and the produced ones, made in `order` (of `plan`)."""
    filled = dict(columns)
    for name in order:
        filled[name] = evaluate(producers[name], filled)
    return filled
