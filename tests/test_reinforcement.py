"""Reinforcement learning through the ordinary loop: what a step makes of ratings, and what whole runs do."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import align, build_model, largest_difference, overrides, read, summary, weights, write_rows
from transformers import AutoModelForCausalLM

from align_cli import assembly, cli, distributed, run, scorers
from align_cli.engine import TorchEngine
from align_cli.errors import UserError
from align_cli.method import Method
from align_cli.raters import ByProgram
from align_cli.references import Frozen
from align_cli.reinforcement import AdaptiveKL, FixedKL, Scaled, TokenRewards, Whitened
from align_cli.rewards import contrastive
from align_cli.tracking import read_metrics
from align_cli.train import NotFinite, WrongStart

SAMPLED = ("source.samples=4", "source.max_new_tokens=6", "eval.samples=16", "eval.groups=6", "train.prompts=8")
DIGIT = ("scorer=matches", "scorer.pattern='^[0-4]'", *SAMPLED, "train.lr=1e-2", "train.steps=25")
ALGORITHMS = {
    "ppo": [],
    "ppo-contrastive": ["reward=contrastive", "reward.scaling=dynamic"],
    "ppo-again": ["source.epochs=2", "source.minibatches=2", "kl=adaptive"],
    "rloo": [],
    "grpo": [],
    "remax": ["train.steps=40"],
    "reinforce_pp": ["source.missing_eos_penalty=0.1"],
}


TILTED = ("target=exponential", "target.features.digit={scorer: matches, pattern: '^[0-4]', moment: 0.5}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", responses=[2], rows=30)


def micro_batch(counted: bool = True, **columns: Any) -> dict[str, Any]:
    return {"batch": SimpleNamespace(counted=counted), **columns}


def test_advantages_of_a_step_are_whitened_together_however_it_is_cut() -> None:
    raw = torch.tensor([[[1.0, 2.0, 9.0]], [[-3.0, 0.0, 5.0]]])  # B = 2, K = 1, T = 3
    mask = torch.tensor([[[1.0, 1.0, 0.0]], [[1.0, 1.0, 1.0]]])
    tokens = torch.tensor([1.0, 2.0, -3.0, 0.0, 5.0])
    expected = (tokens - tokens.mean()) / tokens.std(correction=0)
    whole, cut = Whitened(True), Whitened(True)
    whole.gather([micro_batch(raw_advantages=raw, mask=mask)])
    idle = micro_batch(counted=False, raw_advantages=raw + 100, mask=mask)
    cut.gather([micro_batch(raw_advantages=raw[n : n + 1], mask=mask[n : n + 1]) for n in range(2)] + [idle])
    for found in (whole(raw, mask), torch.cat([cut(raw[n : n + 1], mask[n : n + 1]) for n in range(2)])):
        torch.testing.assert_close(found[mask.bool()], expected)
        assert found[0, 0, 2] == 0
    assert Whitened(False)(raw, mask) is raw


def kl_columns(kl: float) -> dict[str, Any]:
    """Eight responses of two tokens, whose KL to the reference is `kl` nats each."""
    behavior = torch.full((2, 4, 2), -1.0)
    return micro_batch(behavior_tokens=behavior, reference_tokens=behavior - kl / 2, ratings=torch.zeros(2, 4))


def test_the_penalty_follows_the_kl_and_is_saved() -> None:
    options = AdaptiveKL(name="adaptive", beta=0.1, target=2.0, horizon=80)
    penalty = TokenRewards(options)
    idle = {**kl_columns(100.0), "batch": SimpleNamespace(counted=False)}
    penalty.gather([kl_columns(2.2), idle])  # a tenth too far: e = 0.1, 8 of 80 samples
    assert penalty.beta == 0.1, "the penalty of a step does not depend on its own samples"
    assert penalty.following == pytest.approx(0.1 * 1.01)
    again = TokenRewards(options, penalty.state())
    again.gather([kl_columns(0.1)])
    assert again.beta == penalty.following and again.following == pytest.approx(again.beta * (1 - 0.2 * 0.1))
    still = TokenRewards(FixedKL(name="fixed", beta=0.3))
    still.gather([kl_columns(50.0)])
    assert still.beta == still.following == 0.3


def test_dynamic_scaling_brings_rewards_to_the_size_of_the_ratings() -> None:
    scaled = Scaled(lambda ratings, baselines: contrastive(ratings, baselines, aggregate="mean"))
    first = micro_batch(ratings=torch.tensor([[3.0, 5.0]]), baselines=torch.tensor([[3.0, 3.0]]))  # |r| 8, |r_CR| 2
    idle = micro_batch(counted=False, ratings=torch.tensor([[90.0, 5.0]]), baselines=torch.tensor([[0.0, 0.0]]))
    scaled.gather([first, idle])
    assert scaled(first["ratings"], first["baselines"]).tolist() == [[0.0, 8.0]]
    again = Scaled(scaled.contrast, scaled.state())
    again.gather([micro_batch(ratings=torch.tensor([[2.0]]), baselines=torch.tensor([[0.0]]))])
    assert again.scale == (8 + 2) / (2 + 2)
    again.gather([micro_batch(ratings=torch.tensor([[1e6]]), baselines=torch.tensor([[1e6]]))])
    assert again.scale == 10
    assert Scaled(scaled.contrast).scale == 1


@pytest.mark.parametrize("case", ALGORITHMS)
def test_reinforcement_learning_raises_the_rating(case: str, model: Path, rows: Path, tmp_path: Path) -> None:
    given = [f"algo={case.partition('-')[0]}", *DIGIT, *ALGORITHMS[case]]
    assert align("train", *overrides(model, rows, tmp_path / "run", *given)) == 0
    found = summary(tmp_path / "run")
    assert found["eval/after/alignment"] > found["eval/before/alignment"] + 0.2
    lines = read_metrics(tmp_path / "run")
    assert {"rollout/score", "rollout/kl", "seconds/rollout", "seconds/score", "seconds/train"} <= lines[-1].keys()
    if case == "ppo-again":  # four updates from the samples of a step
        assert any(line["policy/approxkl_avg"] > 0 for line in lines)
        assert lines[0]["objective/beta"] == pytest.approx(0.15) and lines[-1]["objective/beta"] < 0.15
    else:
        # behaviour is what the loss's own forward pass gives, so the ratio is 1 to the last bit
        assert all(line["val/ratio"] == 1 and line["policy/approxkl_avg"] == 0 for line in lines)


def test_before_any_update_several_passes_see_the_ratio_one(model: Path, rows: Path, tmp_path: Path) -> None:
    given = ["algo=ppo", *DIGIT, "train.lr=1e-30", "train.steps=2", "source.epochs=2", "source.minibatches=3"]
    assert align("train", *overrides(model, rows, tmp_path / "run", *given)) == 0
    for line in read_metrics(tmp_path / "run"):
        assert line["val/ratio"] == 1 and line["policy/clipfrac_avg"] == 0
        assert line["objective/kl"] == pytest.approx(0, abs=1e-5)  # of six tokens, rounded in fp32


@pytest.mark.parametrize("more", [[], ["source.epochs=2"]], ids=["once", "twice"])
def test_the_policy_at_another_temperature_is_the_one_that_was_sampled(
    model: Path, rows: Path, tmp_path: Path, more: list[str]
) -> None:
    # The first step compares the sampler's own log-probabilities with what training measures, and stops if they differ.
    given = ["algo=ppo", *DIGIT, "source.temperature=0.5", "train.steps=2", "train.lr=1e-30", *more]
    assert align("train", *overrides(model, rows, tmp_path / "run", *given)) == 0
    assert all(line["val/ratio"] == 1 for line in read_metrics(tmp_path / "run"))
    assert read_metrics(tmp_path / "run")[0]["rollout/kl"] == pytest.approx(0, abs=1e-6)


def test_measuring_at_the_wrong_temperature_is_noticed(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "_temperature", lambda experiment: 1.0)
    given = ["algo=ppo", *DIGIT, "source.temperature=0.5", "train.steps=2"]
    assert align("train", *overrides(model, rows, tmp_path / "run", *given)) == 1


def test_what_a_prompt_adds_to_all_ratings_means_nothing_to_contrastive_rewards(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ByProgram._score  # ratings are whole numbers, whose sums and quarters are exact in fp32
    given = ["algo=ppo", *DIGIT, "train.steps=5", "reward=contrastive", "reward.responses=4"]
    assert align("train", *overrides(model, rows, tmp_path / "plain", *given)) == 0

    def shifted(self: ByProgram, where: str, asked: str, text: str) -> float:
        return plain(self, where, asked, text) + 8.0 * len(asked)

    monkeypatch.setattr(ByProgram, "_score", shifted)
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))  # whose baselines are of the plain ratings
    assert align("train", *overrides(model, rows, tmp_path / "shifted", *given)) == 0
    assert largest_difference(weights(tmp_path / "plain"), weights(tmp_path / "shifted")) == 0
    one, other = (read_metrics(tmp_path / name)[0] for name in ("plain", "shifted"))
    assert other["contrastive/raw_score_mean"] > one["contrastive/raw_score_mean"] + 20
    assert other["contrastive/score_mean"] == one["contrastive/score_mean"]


def test_contrastive_rewards_have_mean_zero_before_training(model: Path, rows: Path, tmp_path: Path) -> None:
    given = ["algo=ppo", *DIGIT, "train.steps=1", "reward=contrastive", "reward.responses=64"]
    more = ["source.samples=64", "train.prompts=24"]
    assert align("train", *overrides(model, rows, tmp_path / "run", *given, *more)) == 0
    line = read_metrics(tmp_path / "run")[0]
    rate = line["contrastive/baseline_mean"]
    assert 0.01 < rate < 0.99
    # Two means of 24 x 64 ratings of 0 or 1: four deviations of their difference.
    assert abs(line["contrastive/score_mean"]) < 4 * (2 * rate * (1 - rate) / (24 * 64)) ** 0.5


def test_baselines_are_drawn_once(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))

    def told(name: str, *more: str) -> str:
        given = ["algo=ppo", *DIGIT, "train.steps=1", "reward=contrastive", "train.prompts=5", *more]
        assert align("train", *overrides(model, rows, tmp_path / name, *given)) == 0
        (line,) = (line for line in capsys.readouterr().err.splitlines() if "baseline responses" in line)
        return line

    assert "for each of 5 prompts: 0 found, 5 to draw" in told("first")
    assert "5 found, 0 to draw" in told("second", "kl.beta=0.2", "train.lr=1e-3")
    assert "5 found, 0 to draw" in told("again", "source.epochs=2", "source.samples=3")
    assert "0 found, 5 to draw" in told("more", "reward.responses=6")
    assert "0 found, 5 to draw" in told("other seed", "run.seed=1")
    assert "0 found, 5 to draw" in told("other scorer", "scorer.pattern='^[0-3]'")
    assert "0 found, 5 to draw" in told("other penalty", "source.missing_eos_penalty=1")
    for file in (tmp_path / "cache" / "baselines").glob("*.npz"):
        file.write_bytes(file.read_bytes()[:-20])
    assert "0 found, 5 to draw" in told("damaged")


def test_a_response_that_does_not_end_is_rated_lower(model: Path, rows: Path, tmp_path: Path) -> None:
    """A model of random weights hardly ever stops within a token."""
    given = ["algo=rloo", *DIGIT, "train.steps=1", "train.lr=1e-30"]
    scores: list[float] = []
    for name, penalty in (("without", 0), ("with", 2)):
        more = [f"source.missing_eos_penalty={penalty}", "source.max_new_tokens=1"]
        assert align("train", *overrides(model, rows, tmp_path / name, *given, *more)) == 0
        scores.append(read_metrics(tmp_path / name)[0]["rollout/score"])
    ended = 1 - (scores[0] - scores[1]) / 2
    assert 0 <= ended < 0.3 and (ended * 32) == pytest.approx(round(ended * 32), abs=1e-4)


@pytest.mark.parametrize("case", ["ppo-again", "ppo-contrastive", "remax"])
def test_a_run_that_is_stopped_ends_with_the_same_weights(case: str, model: Path, rows: Path, tmp_path: Path) -> None:
    given = [f"algo={case.partition('-')[0]}", *DIGIT, *ALGORITHMS[case], "train.steps=6", "checkpoint.every=3"]
    whole, cut = (overrides(model, rows, tmp_path / name, *given) for name in ("whole", "cut"))
    assert align("train", *whole) == 0
    assert align("train", *cut) == 0
    (tmp_path / "cut" / "summary.json").unlink()  # as if it had been killed after its third step
    for folder in ("checkpoints/step_00000006", "model"):
        shutil.rmtree(tmp_path / "cut" / folder)
    assert align("train", *cut) == 0
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "cut")) == 0
    states = [load_file(tmp_path / name / "checkpoints/step_00000006/engine.safetensors") for name in ("whole", "cut")]
    assert largest_difference(*states) == 0
    assert any("value_head" in name for name in states[0]) == case.startswith("ppo")


def test_a_gradient_that_is_not_finite_stops_a_run_whichever_update_it_is_of(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = iter([0.5, 0.5, 0.5, -1.0])  # DeepSpeed says -1
    monkeypatch.setattr(TorchEngine, "step", lambda self, lr: torch.tensor(next(norms, 0.5)))
    given = ["algo=rloo", *DIGIT, "train.steps=3", "source.epochs=2"]
    with pytest.raises(NotFinite, match="the gradient of step 2"):
        cli.dispatch(["train", *overrides(model, rows, tmp_path / "run", *given)])


def test_a_reference_that_is_not_the_starting_policy_is_noticed(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Frozen.measure

    def off(self: Frozen, batch: Any) -> dict[str, torch.Tensor]:
        return {name: column - 0.01 for name, column in plain(self, batch).items()}

    monkeypatch.setattr(Frozen, "measure", off)
    with pytest.raises(WrongStart, match="policy and reference are"):
        cli.dispatch(["train", *overrides(model, rows, tmp_path / "run", "algo=rloo", *DIGIT, "train.steps=1")])


def test_the_policy_is_exported_without_its_critic(model: Path, rows: Path, tmp_path: Path) -> None:
    given = ["algo=ppo", *DIGIT, "train.steps=2"]
    assert align("train", *overrides(model, rows, tmp_path / "run", *given)) == 0
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    told = loaded[1]
    assert not told["missing_keys"] and not told["unexpected_keys"]


def test_minibatches_are_all_of_a_step(model: Path, rows: Path, tmp_path: Path) -> None:
    """At one update for each of five minibatches of one step, every prompt is learned from once."""
    given = ["algo=reinforce_pp", *DIGIT, "train.steps=1", "source.minibatches=5"]
    assert align("train", *overrides(model, rows, tmp_path / "run", *given)) == 0
    experiment = read(overrides(model, rows, tmp_path / "other", *given))
    prepared = run.prepare(experiment, lambda text: None)
    engine = assembly.build_engine(experiment, distributed.local_device("cpu"))
    source = assembly.build_source(prepared, engine, "", None, tmp_path)
    (step,) = source.steps(1, 1)
    assert sorted(step.groups) == list(range(8)) and len(step.minibatches) == 5
    assert sorted(step.order) == list(range(5))
    assert sum(part.response_tokens for part in step.minibatches) == sum(
        len(response) for group in (step.store[n] for n in range(8)) for response in group.responses
    )


@pytest.mark.parametrize("algo, share, ratio", [("rloo", 1.0, math.e), ("reinforce_pp", 0.0, math.exp(0.05))])
def test_what_counts_as_clipped_is_what_the_loss_clips(
    algo: str, share: float, ratio: float, model: Path, rows: Path, tmp_path: Path
) -> None:
    experiment = read(overrides(model, rows, tmp_path / "run", f"algo={algo}", *DIGIT))
    behavior, mask = torch.full((1, 2, 20), -1.0), torch.ones(1, 2, 20)
    policy = behavior + 0.05  # each token within 1 ± ε, all of them together beyond
    filled = {"policy_tokens": policy, "behavior_tokens": behavior, "mask": mask, "advantages": mask}
    filled |= {"policy": policy.sum(-1), "behavior": behavior.sum(-1), "reference": behavior.sum(-1)}
    filled |= {"ratings": torch.zeros(1, 2), "lengths": mask.sum(-1)}
    found = {name: float(total / count) for name, (total, count) in Method(experiment, {}, ()).metrics(filled).items()}
    assert found["policy/clipfrac_avg"] == share
    assert found["val/ratio"] == pytest.approx(ratio, rel=1e-4)  # twenty logarithms in fp32


@pytest.mark.parametrize(
    "given, words",
    [
        (["algo=ppo", "advantage=to_go"], "its critic learns from advantage=gae"),
        (["algo=rloo", "advantage=gae"], "rloo has no critic; algo=ppo has"),
        (["algo=rloo", "advantage=to_go"], "takes one advantage for a whole response"),
        (["algo=rloo", "source.samples=1"], "a prompt has no other responses to compare with"),
        (["algo=rloo", "reward=contrastive"], "cancels in it"),
        (["algo=remax", "reward=contrastive"], "cancels in it"),
        (["algo=grpo", "kl=fixed"], "grpo has its own, algo.beta"),
        (["algo=ppo", "kl=null"], "needs a penalty"),
        (["algo=ppo", "advantage=null"], "needs an advantage"),
        (["algo=ppo", "source=dataset"], "learns from the policy's own samples"),
        (["algo=nca", "advantage=gae"], "advantage=gae: nothing reads it"),
        (["algo=nca", "reward=contrastive"], "use source=rollout"),
        (["algo=nca", "source=rollout", "reward=contrastive"], "what they have in common means nothing to it"),
        (["algo=nca", "source=rollout", "kl=fixed", "reference=frozen"], "nca has no advantages"),
        (["algo=grpo", "reward=hard"], "the logarithm of a label is not a reward to be earned"),
        (["algo=fdpg", "target=classifier", "source.missing_eos_penalty=1"], "weights between 0 and 1"),
        (["algo=fdpg", "scorer=model", "scorer.path=x"], "not numbers between 0 and 1"),
        (["algo=fdpg", "reward=hard"], "a label depends on the prompt's other samples"),
        (["algo=fdpg", "source.missing_eos_penalty=1", *TILTED], "which the penalty does not change"),
        (["algo=grpo", "advantage=leave_one_out", "kl=fixed"], "would both penalise the KL"),
        (["algo=ppo", "kl=adaptive", "kl.horizon=6", "train.prompts=8", "source.samples=4"], "kl.horizon=32 or more"),
        (["algo=fdpg", "reference.path=x", *TILTED], "λ is fitted on samples of the policy"),
        (["algo=ppo", "scorer=matches", "scorer.pattern='('"], "not a regular expression"),
        (["algo=ppo", "kl.beta=-1"], "kl.beta=-1"),
        (["algo=ppo", "advantage.gamma=1.5"], "advantage.gamma=1.5"),
        (["algo=ppo", "reward=contrastive", "reward.responses=0"], "reward.responses=0"),
        (["algo=ppo", "reward.responses=3"], "reward.responses"),
        (["algo=ppo", "source.epochs=0"], "source.epochs=0"),
        (["algo=ppo", "reference=cached"], "responses are new in every step"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_has_no_meaning_is_refused(given: list[str], words: str, model: Path, rows: Path, tmp_path: Path) -> None:
    rates = any(each.startswith("scorer") for each in given) or (
        given[0] == "algo=nca" and "source=rollout" not in given
    )
    rated = [] if rates else list(DIGIT[:2])
    with pytest.raises(UserError) as refusal:
        read(overrides(model, rows, tmp_path / "run", *given, *rated))
    assert words in str(refusal.value)


def test_an_imperfect_rater_errs_by_prompt_and_by_response() -> None:
    def rated(prompt: str, response: str, bias: float, noise: float) -> float:
        return scorers.noisy_addition(prompt, response, bias=bias, noise=noise)

    right = "2+4=6 1+3=4 #46"
    assert rated("12+34=", right, 0, 0) == scorers.addition("12+34=", right)
    assert rated("12+34=", right, 1, 1) == rated("12+34=", right, 1, 1)
    of_prompt = [rated(f"{n}+34=", "", 2, 0) - scorers.addition(f"{n}+34=", "") for n in range(10, 90)]
    assert len(set(of_prompt)) == 80
    # 80 draws of deviation 2: the spread of their deviation is 2/sqrt(160)
    assert np.std(of_prompt) == pytest.approx(2, abs=4 * 2 / 160**0.5)
    off = [rated("12+34=", text, 2, 0) - scorers.addition("12+34=", text) for text in ("", "#46", "x")]
    assert off == pytest.approx([off[0]] * 3)
    assert len({rated("12+34=", f"#{n}", 0, 1) for n in range(50)}) == 50
