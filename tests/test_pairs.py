"""Pairs that repeat a prompt and its responses cost what is different in them, and train as if each stood alone."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import overrides, read
from torch import Tensor
from torch.testing import assert_close

from align_cli import assembly, run
from align_cli.data import toy
from align_cli.data.batches import steps
from align_cli.data.store import Group, Store
from align_cli.method import Meter
from align_cli.train import run_step

PROMPTS, SIDE = 6, 3  # each of 3 good responses against each of 3 bad ones: 9 pairs of a prompt
# algo -> its overrides; pairs hold ratings 1 and 0
LOSSES = {
    "dpo": ["algo=dpo"],
    "nca": ["algo=nca", "reward=hard"],
    "kto": ["algo=kto"],
}
# One step of all pairs; a reference that knows every pair there may be.
STEP = ("algo.beta=0.5", "data.held_out=0", f"train.prompts={9 * PROMPTS}", "reference=frozen")
ALONE = ("train.together=false", "model.rows=padded", "engine.micro_tokens=1")
EPSILON = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def nine_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSONL of all pairs of good and bad responses of each prompt, in any order."""
    rng = random.Random(0)
    lines: list[str] = []
    for _, prompt in zip(range(PROMPTS), toy.problems(0, 2), strict=False):
        texts: list[str] = []
        while len(texts) < 2 * SIDE:
            text = toy.demonstrate(prompt, toy.behaviour(rng), rng)
            if text not in texts:
                texts.append(text)
        pairs = [(good, bad) for good in texts[:SIDE] for bad in texts[SIDE:]]
        lines += [json.dumps({"prompt": prompt, "chosen": good, "rejected": bad}) for good, bad in pairs]
    rng.shuffle(lines)
    path = tmp_path_factory.mktemp("rows") / "nine.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


class Stepped:
    """The first step of a run, from a policy that has moved away from its reference."""

    def __init__(self, given: Sequence[str]) -> None:
        experiment = read(given)
        device = torch.device("cpu")
        prepared = run.prepare(experiment, lambda text: None)
        self.store: Store = prepared.train
        self.engine: Any = assembly.build_engine(experiment, device)
        method, _, _ = assembly.build_methods(prepared, self.engine, device, "of these weights", {})
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in self.engine.network.parameters():
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
        (step,) = steps(
            self.store,
            self.engine.manner.lengths(self.store),
            first=2,  # the first is compared with its closed form, which measures more
            last=2,
            prompts=experiment.train.prompts,
            seed=experiment.run.seed,
            together=experiment.train.together,
            rank=0,
            ranks=1,
            budget=experiment.engine.micro_tokens,
        )
        # KTO's mismatched pairs follow the order of the step, which is another where pairs are not grouped.
        whole = replace(step.minibatches[0], groups=tuple(sorted(step.groups)))
        step = replace(step, minibatches=(whole,))
        self.groups = step.groups
        self.parts = len(whole.parts)
        self.tokens = 0
        block = self.engine.network.get_decoder().layers[0]
        hook = block.register_forward_pre_hook(self._count)
        self.engine.step = lambda lr: torch.zeros(())  # the gradient is looked at, and stays
        self.meter: Meter = run_step(self.engine, method, step, 0.0, logged=True)[0]
        hook.remove()

    def _count(self, block: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():  # what is trained; KTO measures mismatched pairs besides
            self.tokens += arguments[0].shape[:-1].numel()

    def figures(self) -> dict[str, float]:
        return self.meter.read()

    def gradients(self) -> dict[str, Tensor]:
        return {name: weight.grad for name, weight in self.engine.network.named_parameters()}

    def lengths(self) -> list[tuple[int, int, int, int]]:
        """Of each prompt: pairs, its tokens, those of its different responses, those of all its sequences padded."""
        found: dict[bytes, list[Group]] = {}
        for group in (self.store[index] for index in self.groups):
            found.setdefault(group.prompt.tobytes(), []).append(group)
        told: list[tuple[int, int, int, int]] = []
        for groups in found.values():
            prompt = len(groups[0].prompt)
            responses = {response.tobytes(): len(response) for group in groups for response in group.responses}
            padded = sum(2 * (prompt + max(map(len, group.responses))) for group in groups)
            told.append((len(groups), prompt, sum(responses.values()), padded))
        return told


@pytest.mark.parametrize("algo", LOSSES)
def test_grouped_pairs_have_the_loss_and_gradient_of_pairs_alone_at_the_cost_of_what_differs(
    algo: str, nine_pairs: Path, tiny_model: Path, tmp_path: Path
) -> None:
    settings = [*LOSSES[algo], *STEP]
    given = overrides(tiny_model, nine_pairs, tmp_path / "run", *settings)
    grouped, alone = Stepped(given), Stepped([*given, *ALONE])
    assert grouped.groups == alone.groups == tuple(range(9 * PROMPTS))
    assert (grouped.parts, alone.parts) == (1, 9 * PROMPTS)

    lengths = grouped.lengths()
    assert [pairs for pairs, *_ in lengths] == [9] * PROMPTS
    assert grouped.tokens == sum(prompt + responses for _, prompt, responses, _ in lengths)
    assert alone.tokens == sum(padded for *_, padded in lengths)
    assert alone.tokens >= sum(18 * prompt + 3 * responses for _, prompt, responses, _ in lengths)

    figures, own = grouped.figures(), alone.figures()
    assert figures.keys() == own.keys()
    for name in figures.keys() & {"loss", "rewards/margins", "logps/chosen", "logps/rejected"}:
        assert figures[name] == pytest.approx(own[name], rel=1e-5, abs=1e-6), name
    slopes, expected = grouped.gradients(), alone.gradients()
    largest = max(float(slope.abs().max()) for slope in expected.values())
    assert largest > 1e-3
    for name, slope in expected.items():
        # sums of 54 pairs, whose entries are rounded relative to the largest
        assert_close(slopes[name], slope, rtol=0, atol=64 * EPSILON * largest, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("budget", [1, 150, 400])
def test_a_budget_that_cuts_a_prompts_pairs_apart_changes_nothing(
    budget: int, nine_pairs: Path, tiny_model: Path, tmp_path: Path
) -> None:
    settings = ["algo=dpo", *STEP]
    given = overrides(tiny_model, nine_pairs, tmp_path / "run", *settings)
    whole, cut = Stepped(given), Stepped([*given, f"engine.micro_tokens={budget}"])
    assert cut.parts > whole.parts == 1
    most = sum(9 * prompt + 3 * responses for _, prompt, responses, _ in cut.lengths())
    # one pair at a time; some pairs at a time; a prompt with all its pairs, which need no more than 400 tokens
    assert {1: cut.tokens == most, 150: whole.tokens < cut.tokens < most, 400: cut.tokens == whole.tokens}[budget]
    assert cut.figures()["loss"] == pytest.approx(whole.figures()["loss"], rel=1e-5)
    expected = whole.gradients()
    largest = max(float(slope.abs().max()) for slope in expected.values())
    for name, slope in cut.gradients().items():
        assert_close(slope, expected[name], rtol=0, atol=64 * EPSILON * largest)
