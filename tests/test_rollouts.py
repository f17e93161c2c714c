"""Runs that learn from their own samples: what is drawn, how it is scored, and that it does what it says."""

import math
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import align, build_model, largest_difference, overrides, read, summary, weights, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_cli import assembly, baselines, distributed, run, scorers
from align_cli.data.batches import flatten
from align_cli.data.store import Group
from align_cli.errors import RunError
from align_cli.evaluate import effective
from align_cli.models.causal import Manner, measure
from align_cli.normaliser import LogZ
from align_cli.raters import ByProgram, Unrated, Within
from align_cli.sources import FromPolicy, Rollout, Sampler
from align_cli.tracking import read_metrics
from align_cli.verify.tables import candidates, random_parts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", responses=[2], rows=30)


def sampler(model: Path, scorer: Any = lambda prompt, response: float(len(response)), **changed: Any) -> Sampler:
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    options = {"name": "rollout", "samples": 3, "temperature": 1.0, "max_new_tokens": 12, "sequences": 64}
    options |= {"missing_eos_penalty": 0.0, "bad_ratings": 0.0, "minibatches": 1, "epochs": 1, "keep": False}
    engine: Any = SimpleNamespace(network=network, collective=False, manner=Manner(flat=False))
    tokenizer = AutoTokenizer.from_pretrained(model)
    rater, section = ByProgram(scorer, tokenizer), FromPolicy(**{**options, **changed})
    return Sampler(engine, tokenizer, rater, section, int(tokenizer.eos_token_id))


def prompts(model: Path, *texts: str) -> list[Group]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [
        Group(
            index=10 + place,
            prompt=np.array(tokenizer(text)["input_ids"], dtype=np.int32),
            responses=(),
            ratings=np.zeros(0, dtype=np.float32),
            where=f"rows.jsonl:{place + 1}",
        )
        for place, text in enumerate(texts)
    ]


def test_samples_depend_on_the_step_and_the_prompt_and_not_on_their_company(model: Path) -> None:
    asked = prompts(model, "1+2=", "34+5=", "6+78=")
    every = sampler(model).draw(asked, (5, 7), samples=3)
    alone = [sampler(model, sequences=1).draw([each], (5, 7), samples=3)[0] for each in asked]
    for one, other in zip(every, alone, strict=True):
        assert [r.tolist() for r in one.responses] == [r.tolist() for r in other.responses]
        assert one.behavior is not None and other.behavior is not None
        for mine, theirs in zip(one.behavior, other.behavior, strict=True):
            assert mine.tolist() == pytest.approx(theirs.tolist(), abs=1e-9)
    later = sampler(model).draw(asked, (5, 8), samples=3)
    assert [r.tolist() for r in later[0].responses] != [r.tolist() for r in every[0].responses]


def test_the_behavior_is_what_training_measures(model: Path) -> None:
    drawn = sampler(model).draw(prompts(model, "1+2=", "34+5="), (5, 1), samples=3)
    batch = flatten(drawn)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    assert batch.behavior is not None
    # the batch holds it in fp32
    torch.testing.assert_close(
        measure(network, batch, Manner(flat=False))["policy_tokens"].float(), batch.behavior, rtol=1e-6, atol=1e-6
    )


def test_a_score_is_of_the_texts_without_special_tokens(model: Path) -> None:
    seen: list[tuple[str, str]] = []
    watching = sampler(model, lambda prompt, response: seen.append((prompt, response)) or 1.0)
    drawn = watching.draw(prompts(model, "1+2="), (5, 1), samples=3)
    assert {prompt for prompt, _ in seen} == {"1+2="}
    assert not any("<" in response for _, response in seen)
    assert drawn[0].ratings.tolist() == [1.0] * 3


@pytest.mark.parametrize(
    "value, told", [(math.nan, "nan"), (None, "None"), (math.inf, "inf"), (1e39, "1e\\+39"), ("1", "'1'")]
)
def test_a_score_that_is_no_number_names_the_row(model: Path, value: Any, told: str) -> None:
    with pytest.raises(
        RunError, match=rf"gave {told}, not a finite number of single precision, for a response to rows\.jsonl:1"
    ):
        sampler(model, lambda prompt, response: value).draw(prompts(model, "1+2="), (5, 1), samples=3)


def test_a_scorer_that_fails_names_the_row_and_its_reason(model: Path) -> None:
    with pytest.raises(RunError, match=r"failed with ZeroDivisionError: .*; on a response to rows\.jsonl:2"):
        failing = sampler(model, lambda prompt, response: 1 / (prompt != "3+4="))
        failing.draw(prompts(model, "1+2=", "3+4="), (5, 1), samples=3)


def test_a_scorer_that_ends_the_program_fails_like_any_other(model: Path) -> None:
    with pytest.raises(RunError, match=r"failed with SystemExit: 0; on a response to rows\.jsonl:1"):
        sampler(model, lambda prompt, response: sys.exit(0)).draw(prompts(model, "1+2="), (5, 1), samples=3)


@pytest.mark.parametrize("value", [np.float32(0.5), np.int64(2), True])
def test_a_score_may_be_any_real_number(model: Path, value: Any) -> None:
    drawn = sampler(model, lambda prompt, response: value).draw(prompts(model, "1+2="), (5, 1), samples=3)
    assert drawn[0].ratings.tolist() == [float(value)] * 3


def test_prompts_without_ratings_are_left_out_up_to_a_share(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = prompts(model, "1+2=", "34+5=", "6+78=", "3+4=")
    failing = sampler(model, lambda prompt, response: 1 / (prompt != "34+5="), bad_ratings=0.25)
    found = [failing.draw(asked, (5, number), samples=3) for number in (7, 8)]
    assert [group.where for group in found[0]] == ["rows.jsonl:1", "rows.jsonl:3", "rows.jsonl:4"]
    whole = sampler(model).draw(asked, (5, 7), samples=3)
    for one, other in zip(found[0], [whole[0], *whole[2:]], strict=True):
        assert [r.tolist() for r in one.responses] == [r.tolist() for r in other.responses]
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("Such prompts are left out") == 1 and "on a response to rows.jsonl:2: '" in told
    failing = sampler(model, lambda prompt, response: 1 / (prompt[0] != "3"), bad_ratings=0.25)
    words = (
        r"to rows\.jsonl:4: '.*'\. 2 of 4 prompts have no ratings; source\.bad_ratings=0\.25 of them may be without\."
    )
    with pytest.raises(RunError, match=words):
        failing.draw(asked, (5, 7), samples=3)


def test_where_all_ranks_rate_all_the_first_decides_who_is_left_out(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, mine = prompts(model, "1+2=", "34+5="), sampler(model, bad_ratings=0.5)
    first = sampler(model, lambda prompt, response: 1 / (prompt != "1+2="), bad_ratings=0.5)
    theirs: list[Any] = []
    monkeypatch.setattr(distributed, "gather", lambda thing: [theirs.append(thing) or thing])
    first.draw(asked, (5, 7), samples=3)
    mine.engine.collective = True  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(distributed, "gather", lambda thing: [theirs[0], thing])
    assert [group.where for group in mine.draw(asked, (5, 7), samples=3)] == ["rows.jsonl:2"]


def test_a_prompt_without_baselines_or_greedy_rating_is_left_out(model: Path, tmp_path: Path) -> None:
    asked = prompts(model, "1+2=", "34+5=", "6+78=")
    failing = sampler(model, lambda prompt, response: 1 / (prompt != "34+5="), bad_ratings=0.5)
    named: Any = {"responses": 2, "seed": 0, "origin": "", "say": lambda text: None}
    there = baselines.prepare(failing, asked, kept=tmp_path, **named)
    again = baselines.prepare(failing, asked, kept=tmp_path, **named)
    extras = [there, again, partial(assembly._greedy, failing, 0)]
    for name, make in zip(("baselines", "baselines", "greedy"), extras, strict=True):
        own: Any = {"store": None, "prompts": 3, "seed": 0, "together": False, "budget": 99}
        rollout = Rollout(sampler=failing, proposal=None, extras={name: make}, kept=None, **own)
        left = rollout.completed(asked, 1)
        assert [group.where for group in left] == ["rows.jsonl:1", "rows.jsonl:3"]
        assert all(name in group.given for group in left)


def test_baselines_are_kept_even_where_too_many_prompts_have_none(model: Path, tmp_path: Path) -> None:
    asked, said = prompts(model, "1+2=", "34+5=", "6+78="), list[str]()
    named: Any = {"responses": 2, "seed": 0, "origin": "", "say": said.append, "kept": tmp_path}
    strict, tolerant = (
        sampler(model, lambda prompt, response: 1 / (prompt != "34+5="), bad_ratings=share) for share in (0.2, 0.4)
    )
    with pytest.raises(RunError, match="1 of 3 prompts have no ratings"):
        baselines.prepare(strict, asked, **named)
    assert len(baselines.prepare(tolerant, asked, **named).found) == 2
    assert "2 found, 1 to draw" in said[-1]


def test_baselines_that_ended_elsewhere_are_not_taken(model: Path, tmp_path: Path) -> None:
    asked, said = prompts(model, "1+2="), list[str]()
    named: Any = {"responses": 2, "seed": 0, "origin": "", "say": said.append, "kept": tmp_path}
    plain, more = sampler(model), sampler(model)
    settings: Any = more.engine.network.generation_config
    settings.eos_token_id = [*plain.ends, 7]
    for each in (plain, plain, more):
        baselines.prepare(each, asked, **named)
    drawn, found = "0 found, 1 to draw", "1 found, 0 to draw"
    assert [line.partition("prompts: ")[2] for line in said] == [drawn, found, drawn]


def failing(prompt: str, response: str) -> float:
    """1 where a response begins with a low digit; fails on prompts that begin with 1."""
    return float(response[:1] in "01234") / (not prompt.startswith("1"))


failing.__module__ = scorers.__name__
TOLERANT = ("scorer=right_addition", "source.bad_ratings=0.9", "train.steps=null", "train.prompts=6")


@pytest.mark.parametrize(
    "case",
    [
        ["algo=rloo"],
        ["algo=remax"],
        ["algo=ppo", "reward=contrastive", "source.minibatches=2"],
        ["algo=fdpg", "divergence=js", "target.floor=0.1"],
        ["algo=fdpg", "divergence=js", "target=exponential", "target.samples=96"],
    ],
    ids=["rloo", "remax", "contrastive", "fdpg", "exponential"],
)
def test_a_run_goes_without_prompts_that_cannot_be_rated_and_counts_them(
    case: list[str], model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorers, "right_addition", failing)
    tilted = ["target.features.low={scorer: right_addition, moment: 0.3}"] if "target=exponential" in case else []
    given = overrides(model, rows, tmp_path / "run", *case, *tilted, *ONLINE, *TOLERANT)
    prepared = run.prepare(read(given), lambda text: None)
    texts: list[list[Any]] = [
        [prepared.tokenizer.decode(store[index].prompt, skip_special_tokens=True) for index in range(len(store))]
        for store in (prepared.train, prepared.held_out)
    ]
    trained, evaluated = (sum(text.startswith("1") for text in each) for each in texts)
    assert 0 < trained < len(texts[0]) and 0 < evaluated < len(texts[1])
    assert align("train", *given) == 0
    found, lines = summary(tmp_path / "run"), read_metrics(tmp_path / "run")
    assert found["rollout/unrated"] == lines[-1]["rollout/unrated"] == trained
    assert found["eval/before/unrated"] == found["eval/after/unrated"] == evaluated
    assert lines[-1]["epoch"] == 1


def test_no_failure_is_tolerated_unless_it_is_asked_for_and_never_a_step_of_nothing(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scorers, "right_addition", failing)
    given = [*ONLINE, *TOLERANT]
    assert align("train", *overrides(model, rows, tmp_path / "run", "algo=rloo", *given, "source.bad_ratings=0")) == 1
    assert "failed with ZeroDivisionError: float division by zero; on a response to" in capsys.readouterr().err
    monkeypatch.setattr(baselines.Baselines, "__call__", lambda self, prompts, number: [None] * len(prompts))
    given += ["algo=ppo", "reward=contrastive"]
    assert align("train", *overrides(model, rows, tmp_path / "none", *given)) == 1
    assert "no prompt of step 1 has all the ratings that it needs." in capsys.readouterr().err


def test_a_response_keeps_the_space_that_it_begins_with() -> None:
    class Stripping:
        """Takes the first space off what it decodes, as SentencePiece's tokenizers do."""

        def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
            return ["".join(" a" if token == 1 else "b" for token in row).removeprefix(" ") for row in rows]

    seen: list[tuple[str, str]] = []
    rate = ByProgram(lambda prompt, response: seen.append((prompt, response)) or 1.0, Stripping())  # pyright: ignore
    prompt, response = np.array([1, 2], dtype=np.int32), np.array([1, 1], dtype=np.int32)
    rate([Group(0, prompt, (response,), np.zeros(1, dtype=np.float32), "here")])
    assert seen == [("ab", " a a")]


def test_a_weight_outside_zero_and_one_names_its_row(model: Path, rows: Path, tmp_path: Path) -> None:
    given = ["algo=fdpg", "scorer=noisy_addition", *ONLINE, "train.steps=1", "train.prompts=8"]
    assert align("train", *overrides(model, rows, tmp_path / "run", *given)) == 1
    drawn = sampler(model).draw(prompts(model, "1+2="), (5, 1), samples=3)
    within = Within(lambda groups: [replace(each, ratings=np.array([0.5, 2, 1], dtype=np.float32)) for each in groups])
    (found,) = within(drawn)
    assert isinstance(found, Unrated) and "a response to rows.jsonl:1 is rated 2;" in found.why


@pytest.mark.parametrize("samples, told", [(4, False), (64, True)])
def test_divergences_are_told_where_z_can_be_estimated(
    samples: int, told: bool, model: Path, rows: Path, tmp_path: Path
) -> None:
    given = [*DIGIT, "target=rlhf", "target.beta=1", "divergence=js", "train.steps=1", f"eval.samples={samples}"]
    assert align("train", *overrides(model, rows, tmp_path / "run", *given)) == 0
    found = summary(tmp_path / "run")
    assert ("eval/after/divergence/js" in found) == told and "eval/after/divergence/excluded" in found


def test_effective_samples_worked_out_by_hand() -> None:
    assert effective([-3.0, -3.0, -math.inf]) == pytest.approx(2)
    assert effective([0.0, math.log(3)]) == pytest.approx((1 + 3) ** 2 / (1 + 9))
    assert effective([-2000.0]) == pytest.approx(1) and effective([-math.inf]) == 0


def test_scorers_of_words_patterns_and_programs() -> None:
    assert scorers.contains("", "So it IS.", words=["is", "x"]) == 1
    assert scorers.contains("", "This island", words=["is"]) == 0
    assert scorers.contains("", "a (b) c", words=["(b)"]) == 1
    assert scorers.matches("", "hmm", pattern="^hm+$") == 1
    assert scorers.matches("", "ahmm", pattern="^hm+$") == 0
    assert scorers.compiles("def f(x):\n", "    return x\n", with_prompt=True) == 1
    assert scorers.compiles("def f(x):\n", "return x\n", with_prompt=True) == 0
    assert scorers.compiles("1 + ", "1 # two", with_prompt=False) == scorers.compiles("(", "1", with_prompt=False) == 1
    for response in ("return 1\n", "\0", "(" * 5000):
        assert (
            scorers.compiles("", response, with_prompt=True) == scorers.compiles("", response, with_prompt=False) == 0
        )
    assert scorers.right_addition("12+30=", "2+0=2 1+3=4 #42") == 1
    assert scorers.right_addition("12+30=", "#41") == 0


def batch_of(targets: list[list[float]], behavior: list[list[float]], prompts: list[list[int]]) -> dict[str, Any]:
    groups = tuple(
        Group(n, np.array(p, dtype=np.int32), (), np.zeros(0, dtype=np.float32), "here") for n, p in enumerate(prompts)
    )
    batch = SimpleNamespace(groups=groups, counted=True)
    return {"batch": batch, "target": torch.tensor(targets), "behavior": torch.tensor(behavior)}


def test_z_is_the_mean_of_all_samples_so_far() -> None:
    shared, apart = LogZ("shared"), LogZ("prompt")
    first = batch_of([[-1.0, -math.inf], [-2.0, -3.0]], [[-1.0, -1.0], [-1.0, -3.0]], [[1], [2]])
    second = batch_of([[0.0, -1.0]], [[-1.0, -1.0]], [[1]])
    for columns in (first, second):
        shared.gather([columns])
        apart.gather([columns])
    ratios = [1.0, 0.0, math.exp(-1), 1.0, math.e, 1.0]
    args = (second["batch"], second["target"], second["behavior"])
    assert shared(*args).tolist() == pytest.approx([math.log(sum(ratios) / 6)])
    assert apart(*args).tolist() == pytest.approx([math.log((1 + 0 + math.e + 1) / 4)])
    again = LogZ("prompt", apart.state())
    assert again(*args).tolist() == apart(*args).tolist()


def test_z_is_exact_where_each_response_is_drawn_as_often_as_its_proposal_says() -> None:
    parts = [random_parts(9, seed) for seed in (1, 2)]
    target = torch.randn(2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target[:, 4] = -math.inf
    shared, apart = LogZ("shared"), LogZ("prompt")
    for place, part in enumerate(parts):
        drawn = candidates(part)
        behavior = (part.double() / part.sum()).log()
        columns = batch_of([target[place, drawn].tolist()], [behavior[drawn].tolist()], [[place]])
        apart.gather([columns])
        shared.gather([columns])
        args = (columns["batch"], columns["target"], columns["behavior"])
        torch.testing.assert_close(apart(*args).double()[0], target[place].logsumexp(-1), rtol=0, atol=1e-6)
    of_all = (target.logsumexp(-1).exp() * torch.stack([part.sum() for part in parts])).sum() / torch.cat(parts).sum()
    assert math.exp(float(shared(*args)[0])) == pytest.approx(float(of_all), rel=1e-6)


def test_a_prompt_whose_samples_are_all_excluded_has_z_0_and_its_state_is_json() -> None:
    log_z = LogZ("prompt")
    columns = batch_of([[-math.inf]], [[-1.0]], [[1]])
    log_z.gather([columns])
    assert log_z(columns["batch"], columns["target"], columns["behavior"]).tolist() == [-math.inf]
    assert list(log_z.state().values()) == [[None, 1]]
    assert list(LogZ("prompt", log_z.state()).sums.values()) == [(-math.inf, 1)]


ONLINE = ("source=rollout", "source.samples=4", "source.max_new_tokens=6", "reference=frozen", "eval.samples=4")
DIGIT = (
    "algo=fdpg",
    "scorer=matches",
    "scorer.pattern='^[0-4]'",
    "train.steps=25",
    "train.prompts=8",
    "train.lr=1e-2",
    *ONLINE,
)


@pytest.mark.parametrize("divergence", ["js", "forward_kl", "tv", "reverse_kl", "hellinger"])
def test_fdpg_moves_the_policy_towards_its_target(model: Path, rows: Path, tmp_path: Path, divergence: str) -> None:
    soft = ["target.floor=0.01"] if divergence == "reverse_kl" else []
    given = [*DIGIT, f"divergence={divergence}", *soft]
    assert align("train", *overrides(model, rows, tmp_path / "run", *given)) == 0
    found = summary(tmp_path / "run")
    assert found["eval/after/alignment"] > found["eval/before/alignment"] + 0.1
    assert found["eval/after/divergence/tv"] < found["eval/before/divergence/tv"]
    assert found["divergence/js"] == found["eval/after/divergence/js"]
    assert 1 <= found["eval/after/divergence/ess"] <= 6 * 4 and 0 < found["eval/after/diversity/distinct_1"] <= 1
    assert 0 <= found["eval/before/diversity/self_bleu"] <= 1
    lines = read_metrics(tmp_path / "run")
    assert {"rollout/score", "rollout/kl", "rollout/entropy", "divergence/log_z"} <= lines[-1].keys()
    # Z is the mean over 25 steps of 8 prompts and those of the evaluation, four samples each, and none is below 0
    own = found["eval/after/divergence/log_z"] - lines[-1]["divergence/log_z"]
    assert own >= math.log(25 * 8 / (25 * 8 + 6)) - 1e-5
    for line in lines:  # it is infinite where any sample of the step is excluded
        assert ("divergence/reverse_kl" in line) == (line["divergence/excluded"] == 0)


def test_a_response_in_a_conversation_ends_where_the_template_ends_a_turn(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    """The turn's end is also the padding, and neither the tokenizer's nor the model's end of a sequence."""
    shutil.copytree(model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}={{ m.content }}<pad>{% endfor %}"
        "{% if add_generation_prompt %}a={% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    turn, end = int(tokenizer.pad_token_id), int(tokenizer.eos_token_id)
    assert turn != end
    given = ["algo=rloo", "scorer=contains", "scorer.words=[a]", "data.template=chat", *ONLINE, "train.prompts=24"]
    experiment = read(overrides(tmp_path / "model", rows, tmp_path / "run", *given, "source.max_new_tokens=12"))
    prepared = run.prepare(experiment, lambda text: None)
    engine = assembly.build_engine(experiment, distributed.local_device("cpu"))
    (step,) = assembly.build_source(prepared, engine, "", None, tmp_path).steps(1, 1)
    last: set[int] = set()
    for group in (step.store[index] for index in step.groups):
        assert tokenizer.decode(group.prompt).endswith("=<pad>a=")
        for response in map(list, group.responses):
            assert not {turn, end} & set(response[:-1])
            assert response[-1] in (turn, end) or len(response) == 12
            last.add(response[-1])
    assert {turn, end} < last


NEVER = ("algo=fdpg", "divergence=js", "scorer=matches", "scorer.pattern=ZZZ", "train.steps=2", *ONLINE)


@pytest.mark.parametrize("more", [[], ["algo.baseline=none"], ["target.normaliser=prompt", "algo.baseline=none"]])
def test_what_never_occurs_is_said_and_changes_no_weight(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    assert align("train", *overrides(model, rows, tmp_path / "run", *NEVER, *more)) == 0
    told = " ".join(capsys.readouterr().err.split())
    # of n responses none: the rate is below 3/n at 95 %
    assert "all 16 responses so far are rated 0, so that there is nothing to learn from them" in told
    assert "a rate below 19 % at 95 %" in told and "all 32 responses" in told and "a rate below 9.4 % at 95 %" in told
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "run" / "model"))
    assert largest_difference(before, after) == 0
    assert all(line["divergence/skipped"] == 1 and line["loss"] == 0 for line in read_metrics(tmp_path / "run"))


def test_nothing_is_said_once_ratings_differ(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["algo=rloo", "scorer=matches", "scorer.pattern='^[0-4]'", "train.steps=2", *ONLINE]
    assert align("train", *overrides(model, rows, tmp_path / "run", *given)) == 0
    assert "so far are rated" not in capsys.readouterr().err


def test_a_target_that_excludes_what_the_divergence_forbids_says_so(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["divergence=reverse_kl", "target=classifier", "scorer.pattern='^[0-4]'"]
    assert align("train", *overrides(model, rows, tmp_path / "run", *NEVER, *given)) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "The target excludes 75% of the samples; divergence=js, tv, " in told


@pytest.mark.parametrize("algo", ["dpo", "nca", "info_nca", "exo"])
def test_offline_losses_learn_online(model: Path, rows: Path, tmp_path: Path, algo: str) -> None:
    given = [f"algo={algo}", "scorer=matches", "scorer.pattern='^[0-4]'", *ONLINE, "train.steps=20", "train.prompts=8"]
    smooth = ["reward=smoothed"] if algo == "exo" else []
    given += [*smooth, "algo.beta=0.1", "train.lr=1e-2"]
    assert align("train", *overrides(model, rows, tmp_path / "run", *given)) == 0
    found = summary(tmp_path / "run")
    assert found["eval/after/alignment"] > found["eval/before/alignment"]


def test_a_run_that_is_stopped_draws_what_it_would_have_drawn(model: Path, rows: Path, tmp_path: Path) -> None:
    given = [*DIGIT, "train.steps=6", "checkpoint.every=3", "target.normaliser=prompt"]
    whole, cut = (overrides(model, rows, tmp_path / name, *given) for name in ("whole", "cut"))
    assert align("train", *whole) == 0
    assert align("train", *cut) == 0
    # as if it had been killed after its third step
    for path in ("summary.json", "checkpoints/step_00000006", "model"):
        place = tmp_path / "cut" / path
        if place.is_dir():
            for file in sorted(place.rglob("*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()
            place.rmdir()
        else:
            place.unlink()
    assert align("train", *cut) == 0
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "cut")) == 0
