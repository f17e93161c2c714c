"""Columns: who asks for what, in which order they are made, and that every name is in the glossary."""

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from align_cli import advantages, metrics, preferences, reading, references, rewards
from align_cli.columns import GLOSSARY, POLICY, asked, evaluate, plan
from align_cli.paths import conf


def ratio(policy: Tensor, reference: Tensor, *, beta: float) -> Tensor:
    return beta * (policy - reference)


def make_reference(batch: Tensor) -> Tensor:
    return batch * 2


def make_mean(reference: Tensor, ratings: Tensor) -> Tensor:
    return reference.mean() + ratings


PRODUCERS: dict[str, Callable[..., Tensor]] = {"reference": make_reference, "mean": make_mean}


def test_positional_parameters_are_columns_and_keyword_only_ones_are_options() -> None:
    assert asked(ratio) == ["policy", "reference"]


def test_what_is_needed_is_made_before_it_is_needed_and_once() -> None:
    assert plan(["mean", "reference"], ["batch", "ratings"], PRODUCERS) == ["reference", "mean"]
    assert plan(["reference", "mean", "mean"], ["batch", "ratings"], PRODUCERS) == ["reference", "mean"]


def test_what_is_given_is_not_made() -> None:
    assert plan(["mean"], ["reference", "ratings"], PRODUCERS) == ["mean"]
    assert plan(["policy"], ["policy"], PRODUCERS) == []


def test_a_column_that_nothing_makes_is_named_with_its_asker() -> None:
    with pytest.raises(ValueError, match=r"nothing provides the column 'advantages', asked for by the loss"):
        plan(["advantages"], ["batch"], PRODUCERS)
    with pytest.raises(ValueError, match=r"nothing provides the column 'ratings', asked for by 'mean'"):
        plan(["mean"], ["batch"], PRODUCERS)


def test_only_what_was_planned_is_made_and_what_was_there_stays() -> None:
    calls: list[str] = []

    def unwanted(batch: Tensor) -> Tensor:
        raise AssertionError("nobody asked")

    def counted(batch: Tensor) -> Tensor:
        calls.append("reference")
        return batch * 2

    producers = {"reference": counted, "mean": make_mean, "other": unwanted}
    columns = {"batch": torch.ones(2), "ratings": torch.zeros(2)}
    filled = dict(columns)
    for name in plan(["mean", "reference"], columns, producers):
        filled[name] = evaluate(producers[name], filled)
    assert calls == ["reference"]
    assert set(filled) == {"batch", "ratings", "reference", "mean"}
    assert set(columns) == {"batch", "ratings"}
    assert torch.equal(filled["mean"], torch.full((2,), 2.0))
    assert torch.equal(evaluate(make_mean, filled), filled["mean"])


def losses() -> list[Callable[..., Any]]:
    """The loss of every algorithm and, where there is one, its closed form at the reference."""
    found: list[Callable[..., Any]] = []
    for path in sorted((conf() / "algo").glob("*.yaml")):
        module = importlib.import_module(f"align_cli.losses.{path.stem}")
        found += [vars(module)[name] for name in (path.stem, "at_reference") if name in vars(module)]
    return found


@pytest.mark.parametrize("loss", losses(), ids=lambda loss: f"{loss.__module__}.{loss.__name__}")
def test_every_loss_asks_for_columns_of_the_glossary(loss: Callable[..., Any]) -> None:
    assert set(asked(loss)) <= set(GLOSSARY)
    if loss.__name__ == "at_reference":
        assert not POLICY & set(asked(loss))
    else:
        assert POLICY & set(asked(loss))


def test_every_metric_and_producer_asks_for_columns_of_the_glossary() -> None:
    public = [preferences.strict_pairs]
    for home in (metrics, rewards):
        own = [f for _, f in inspect.getmembers(home, inspect.isfunction) if f.__module__ == home.__name__]
        public += [f for f in own if not f.__name__.startswith("_")]
    public += [vars(advantages)[path.stem] for path in (conf() / "advantage").glob("*.yaml")]
    public += [advantages.token_rewards, advantages.returns]
    assert len(public) >= 22
    for function in public:
        assert set(asked(function)) <= set(GLOSSARY), function
    for producer in (references.Cached, references.Frozen, references.AdapterOff, references.MismatchKL):
        assert set(asked(producer.__call__)) - {"self"} <= set(GLOSSARY), producer


def test_every_column_of_a_run_is_in_the_glossary_with_its_shape() -> None:
    assert {*reading.GIVEN, *reading.SAMPLED} <= set(GLOSSARY)
    for name, text in GLOSSARY.items():
        assert name == "batch" or re.match(r"\(B(, [KN])?(, [KTF])?,?\) ", text), name
