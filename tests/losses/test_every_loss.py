"""What holds for every loss that `conf/algo` offers, whichever those are."""

from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import pytest
import torch
import yaml
from loss_columns import NO_REWARD
from pydantic import TypeAdapter
from torch import Tensor
from torch.testing import assert_close

from align_cli import divergences
from align_cli.columns import GLOSSARY, POLICY, asked, evaluate
from align_cli.preferences import strict_pairs
from align_cli.verify.batches import random_columns

CONF = Path(__file__).parents[2] / "conf"
HALF_PRECISION_AND_SINGLE = (torch.bfloat16, torch.float32)


def read(group: str, name: str) -> dict[str, object]:
    """The options of one part, as its YAML gives them."""
    written = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    return written.get(group, written)


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def build_divergence(name: str) -> divergences.Divergence:
    options = {key: value for key, value in read("divergence", name).items() if key != "name"}
    return getattr(divergences, name)(**options)


def cases() -> list[tuple[str, str]]:
    """(algorithm, divergence), the latter for those that ask for one."""
    found = []
    for algo in names("algo"):
        needs = "divergence" in signature(function(algo)).parameters
        found += [(algo, divergence) for divergence in (names("divergence") if needs else [""])]
    return found


def module(algo: str) -> ModuleType:
    return import_module(f"align_cli.losses.{algo}")


def function(algo: str) -> Callable[..., Tensor]:
    return vars(module(algo))[algo]


def options(of: Callable[..., Tensor], algo: str, divergence: str) -> dict[str, object]:
    """The keyword-only arguments of `of`, which is the algorithm's loss or its `at_reference`."""
    given = read("algo", algo) | ({"divergence": build_divergence(divergence)} if divergence else {})
    return {name: given[name] for name, kind in signature(of).parameters.items() if kind.kind is Parameter.KEYWORD_ONLY}


def bind(algo: str, divergence: str) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """The loss with its YAML's options, as a function of a batch's columns."""
    loss = function(algo)
    keywords = options(loss, algo, divergence)
    return lambda columns: loss(*(columns[name] for name in asked(loss)), **keywords)


def learnt(algo: str) -> list[str]:
    """The columns with gradient that a loss asks for."""
    return sorted(POLICY & set(asked(function(algo))))


def at_the_reference(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same batch with the reference as policy, whose KL is then 0."""
    return dict(columns) | {"policy": columns["reference"], "mismatch_kl": torch.zeros(len(columns["reference"]))}


every_loss = pytest.mark.parametrize("algo, divergence", cases())
# the value of a loss that weighs log-probabilities means nothing; tests of its own say what its gradient is
every_loss_whose_value_counts = pytest.mark.parametrize(
    "algo, divergence", [case for case in cases() if "target" not in asked(function(case[0]))]
)


@pytest.mark.parametrize("algo", names("algo"))
def test_the_yaml_gives_exactly_the_keywords_within_their_ranges(algo: str) -> None:
    loss, written = function(algo), read("algo", algo)
    hints = get_type_hints(loss, include_extras=True)
    keywords = {
        name
        for name, parameter in signature(loss).parameters.items()
        if parameter.kind is Parameter.KEYWORD_ONLY and name != "divergence"
    }
    assert written.pop("name") == algo
    assert set(written) == keywords
    for key, value in written.items():
        TypeAdapter(hints[key]).validate_python(value, strict=True)


@pytest.mark.parametrize("algo", names("algo"))
def test_python_has_no_default_for_what_a_yaml_sets(algo: str) -> None:
    assert all(parameter.default is Parameter.empty for parameter in signature(function(algo)).parameters.values())


@pytest.mark.parametrize("algo", names("algo"))
def test_a_loss_asks_for_columns_of_the_glossary_and_one_of_the_policy_or_two_with_its_critic(algo: str) -> None:
    columns = asked(function(algo))
    assert set(columns) <= set(GLOSSARY)
    assert len(POLICY - {"values"} & set(columns)) == 1
    assert ("values" in columns) == ("returns" in columns)


@every_loss
def test_a_loss_returns_an_element_for_each_prompt_or_each_token(algo: str, divergence: str) -> None:
    columns = random_columns(prompts=2, responses=3, tokens=5)
    shape = (2, 3, 5) if "policy_tokens" in asked(function(algo)) else (2,)
    assert bind(algo, divergence)(columns).shape == shape


@every_loss
@pytest.mark.parametrize("responses", [2, 3, 4])
def test_the_stated_value_is_the_one_at_the_reference(algo: str, divergence: str, responses: int) -> None:
    if "reference" not in asked(function(algo)):
        assert "at_reference" not in vars(module(algo))
        return
    columns = at_the_reference(random_columns(prompts=5, responses=responses))
    for pairs in (columns["pairs"], strict_pairs(columns["rewards"]), torch.zeros_like(columns["pairs"])):
        stated = vars(module(algo))["at_reference"]
        value = stated(
            *((columns | {"pairs": pairs})[name] for name in asked(stated)), **options(stated, algo, divergence)
        )
        assert value.shape == (5,)
        assert "policy" not in asked(stated) and set(asked(stated)) <= set(asked(function(algo)))
        assert_close(value, bind(algo, divergence)(columns | {"pairs": pairs}))


@every_loss
@pytest.mark.parametrize("dtype", HALF_PRECISION_AND_SINGLE, ids=str)
def test_value_and_gradient_are_finite_at_log_ratios_of_a_thousand(
    algo: str, divergence: str, dtype: torch.dtype
) -> None:
    reference = torch.full((6, 3), -1500.0)
    log_ratio = 1000 * torch.tensor([[1, -1, 0], [-1, 1, 0], [1, 1, 1], [-1, -1, -1], [0, 1, 1], [0, 0, 0]])
    for rewards in (torch.tensor([[0.0, 1.0, 0.5]]), torch.tensor([[0.0, NO_REWARD, NO_REWARD]])):
        if rewards.isinf().any() and getattr(module(algo), "FINITE_REWARDS", False):
            continue
        for behavior in (reference + log_ratio, reference):
            columns = {
                "policy": (reference + log_ratio).to(dtype),
                "policy_tokens": torch.tensor([[[0.0, -1000.0, 0.0]]], dtype=dtype).repeat(6, 3, 1),
                "reference": reference.to(dtype),
                "lengths": torch.tensor([[1, 2, 700]]).expand(6, 3),
                "rewards": rewards.expand(6, 3).to(dtype),
                "pairs": strict_pairs(rewards.expand(6, 3)).to(dtype),
                "mismatch_kl": torch.zeros(6, dtype=dtype),
                "behavior": behavior.to(dtype),
                "target": reference.to(dtype),
                "log_z": torch.zeros(6, dtype=dtype),
                "behavior_tokens": torch.tensor([[[-1000.0, 0.0, 0.0]]], dtype=dtype).repeat(6, 3, 1),
                "reference_tokens": torch.tensor([[[-1000.0, 0.0, 0.0]]], dtype=dtype).repeat(6, 3, 1),
                "advantages": log_ratio.sign()[..., None].repeat(1, 1, 3).to(dtype),
                "values": log_ratio[..., None].repeat(1, 1, 3).to(dtype),
                "old_values": torch.zeros(6, 3, 3, dtype=dtype),
                "returns": -log_ratio[..., None].repeat(1, 1, 3).to(dtype),
                "scores": log_ratio.to(dtype),
            }
            for name in learnt(algo):
                columns[name].requires_grad_()
            value = bind(algo, divergence)(columns)
            assert value.isfinite().all()
            for slope in torch.autograd.grad(value.sum(), [columns[name] for name in learnt(algo)]):
                assert slope.isfinite().all()


@every_loss
@pytest.mark.parametrize("dtype", HALF_PRECISION_AND_SINGLE, ids=str)
def test_low_precision_gives_the_value_and_gradient_of_float64(algo: str, divergence: str, dtype: torch.dtype) -> None:
    columns = random_columns(prompts=7)
    columns["policy"] = columns["reference"] + 0.1 * (columns["policy"] - columns["reference"])
    rounded = {name: column.to(dtype) if column.is_floating_point() else column for name, column in columns.items()}
    exact = {name: column.double() if column.is_floating_point() else column for name, column in rounded.items()}

    def value_and_slopes(batch: Mapping[str, Tensor]) -> list[Tensor]:
        own = {name: batch[name].requires_grad_() for name in learnt(algo)}
        value = bind(algo, divergence)({**batch, **own})
        slopes = torch.autograd.grad(value.sum(), list(own.values()))
        return [found.double() for found in (value, *slopes)]

    # Everything but the rewards over alpha, whose softmax is one-hot, is of the order of 1: a handful of roundings.
    tolerance = 16 * torch.finfo(dtype).eps
    for low, high in zip(value_and_slopes(rounded), value_and_slopes(exact), strict=True):
        # a baseline is a difference to the other responses: its rounding is relative to the largest of them
        largest = max(1.0, float(high.detach().abs().max())) if "baseline" in read("algo", algo) else 1.0
        assert_close(low, high, atol=tolerance * largest, rtol=tolerance)


@every_loss
def test_the_order_of_the_responses_does_not_matter(algo: str, divergence: str) -> None:
    columns = random_columns(responses=4)
    order = torch.tensor([2, 0, 3, 1])
    reordered = {
        name: column[:, order] if column.dim() > 1 else column for name, column in columns.items() if name != "pairs"
    } | {"pairs": columns["pairs"][:, order][:, :, order]}
    value, again = bind(algo, divergence)(columns), bind(algo, divergence)(reordered)
    assert_close(again, value if value.dim() == 1 else value[:, order])


@every_loss
def test_prompts_do_not_see_each_other(algo: str, divergence: str) -> None:
    columns = random_columns(prompts=4)
    alone = {name: column[1:2] for name, column in columns.items()}
    assert_close(bind(algo, divergence)(columns)[1:2], bind(algo, divergence)(alone))


@every_loss
def test_a_loss_does_not_write_into_its_columns(algo: str, divergence: str) -> None:
    columns = random_columns()
    before = {name: column.clone() for name, column in columns.items()}
    bind(algo, divergence)(columns)
    for name, column in columns.items():
        assert torch.equal(column, before[name]), name


@every_loss_whose_value_counts
def test_the_gradient_is_the_slope(algo: str, divergence: str) -> None:
    columns = random_columns(prompts=2, responses=3)
    columns["policy"] = columns["reference"] + 0.2 * (columns["policy"] - columns["reference"])
    own = [columns[name].requires_grad_() for name in learnt(algo)]
    assert torch.autograd.gradcheck(
        lambda *moved: bind(algo, divergence)(columns | dict(zip(learnt(algo), moved, strict=True))), own
    )


@every_loss
def test_only_the_policy_needs_a_gradient(algo: str, divergence: str) -> None:
    for name in learnt(algo):
        columns = random_columns()
        columns[name].requires_grad_()
        assert bind(algo, divergence)(columns).requires_grad


@every_loss
def test_tokens_beyond_a_response_cost_nothing(algo: str, divergence: str) -> None:
    columns = random_columns()
    value = bind(algo, divergence)(columns)
    assert value.dim() == 1 or not value[~columns["mask"]].any()


def test_columns_that_a_stated_value_asks_for_can_be_filled_by_name() -> None:
    columns = random_columns()
    assert evaluate(module("nca").at_reference, columns).shape == (3,)


def test_supervised_fine_tuning_takes_one_response_for_each_prompt() -> None:
    text = (CONF / "algo" / "sft.yaml").read_text()
    assert text.startswith("# @package _global_\n")
    assert yaml.safe_load(text)["data"] == {"responses": 1}


@pytest.mark.parametrize("group", ["advantage", "algo", "divergence", "kl"])
def test_every_key_has_its_line_of_explanation(group: str) -> None:
    for name in names(group):
        for line in filter(str.strip, (CONF / group / f"{name}.yaml").read_text().splitlines()):
            explained = line.startswith("#") or " # " in line or line.endswith(":") or line.strip() == f"name: {name}"
            assert explained, f"{group}/{name}: {line}"
