"""`align evaluate`: figures that are those of training, kept with how they were made, and sentences for bad input."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_runs
import torch
from forks import Forks
from small_runs import align

from align_cli import config, generation, launch, paths, results, rundir, statistics, tracking
from align_cli.commands import completion, evaluate
from align_cli.data.store import Group
from align_cli.errors import RunError, UserError
from align_cli.evals import Item, Result, prompts
from align_cli.evals.reward import wins
from align_cli.subject import Generate, find

GROUPS = config.group_names()
CPU = "generate.accelerator=cpu"
SHORT = ("eval.max_new_tokens=24", "eval.samples=2")
# What an evaluation has to be given, and what tells it.
GIVEN = {
    "eval.path has to be given": "eval.path=x",
    "eval.task has to be given": "eval.task=x",
    "asks a judge": "judge=local",
}


@pytest.fixture(scope="module")
def run(tiny_model: Path, ragged_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    given = small_runs.overrides(tiny_model, ragged_file, folder, "algo=nca", "train.steps=6")
    assert align("train", *given) == 0
    return folder


def told(run: Path, name: str) -> results.Finished:
    return results.read(results.path_of(run, name))


@pytest.mark.parametrize("name", GROUPS["eval"])
def test_every_evaluation_can_be_planned(name: str) -> None:
    given: list[str] = []
    for _ in GIVEN:
        try:
            [planned] = evaluate.plan(*evaluate.read([f"eval={name}", *given]))
            assert planned.name == name
            return
        except UserError as error:
            given += [word for why, word in GIVEN.items() if why in str(error) and word not in given]
    evaluate.plan(*evaluate.read([f"eval={name}", *given]))


@pytest.mark.parametrize("name", GROUPS["suite"])
def test_every_suite_can_be_planned(name: str) -> None:
    given = ["eval.path=x"] if name.startswith("nca") else []
    planned = evaluate.plan(*evaluate.read([f"suite={name}", "judge=local", *given]))
    assert len(planned) > 1 and {each.name for each in planned} <= set(GROUPS["eval"])


@pytest.mark.parametrize("algo", ["nca", "sft"])
def test_the_loss_is_that_of_training(algo: str, tiny_model: Path, ragged_file: Path, tmp_path: Path) -> None:
    """Every figure, of a loss that is a mean over prompts and of one that is a mean over tokens."""
    folder = tmp_path / "run"
    assert align("train", *small_runs.overrides(tiny_model, ragged_file, folder, f"algo={algo}", "train.steps=3")) == 0
    assert align("evaluate", str(folder), "eval=loss", CPU) == 0
    found, after = told(folder, "loss").figures, small_runs.summary(folder)
    names = {name.removeprefix("eval/after/"): value for name, value in after.items() if name.startswith("eval/after/")}
    assert {name for name in found if name != algo} == set(names) - {"loss"}
    for name, value in names.items():
        figure = found[algo if name == "loss" else name]
        assert figure.value == pytest.approx(value, abs=1e-4)
        assert figure.n == (3 if "rank" in name else 6)  # half of them have the four responses that are ranked
        assert figure.low is not None and figure.high is not None and figure.low <= figure.value <= figure.high


def test_results_are_files_figures_of_the_summary_and_lines(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = small_runs.summary(run)
    assert align("evaluate", str(run), "eval=diversity,loss", "eval.max_new_tokens=24", CPU) == 0
    printed = capsys.readouterr().out
    after = small_runs.summary(run)
    assert {name: after[name] for name in before} == before
    finished = told(run, "diversity")
    for name, figure in finished.figures.items():
        assert after[f"eval/diversity/{name}"] == figure.value and results.shown(figure) in printed
    assert len(finished.items) == 6 and finished.made["temperature"] == 1.0
    assert set(finished.subject) == {"name", "weights", "align", "date"}
    assert align("show", str(run)) == 0
    shown = capsys.readouterr().out
    assert "diversity  self_bleu" in shown and "eval/diversity/self_bleu" not in shown and "loss/last" in shown
    tree = rundir.read_config(run)
    from align_cli import reading

    assert launch.finished(reading.read(tree), run)  # it is still the finished run that it was


def test_what_is_there_is_not_made_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("evaluate", str(run), "eval=diversity", *SHORT, CPU)
    assert align(*given) == 0
    first = results.path_of(run, "diversity").read_bytes()
    with monkeypatch.context() as patch:

        def refused(*given: Any, **settings: Any) -> Any:
            raise AssertionError("nothing is generated twice")

        patch.setattr(generation, "sample", refused)
        assert align(*given) == 0
        assert results.path_of(run, "diversity").read_bytes() == first
        assert align(*given, "again=true") == 0
    assert told(run, "diversity").figures == results.read(results.path_of(run, "diversity")).figures
    assert align(*given, "eval.limit=3") == 0 and len(told(run, "diversity").items) == 3
    monkeypatch.chdir(run.parent)
    assert align(*given, f"out={run.name}") == 0  # its own folder by another name


def test_a_file_answers_what_it_was_asked_and_nothing_else(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("eval=diversity", *SHORT, CPU)
    assert align("evaluate", str(run), *given) == 0
    path = results.path_of(run, "diversity")

    def tree(*more: str) -> config.Tree:
        return config.compose("evaluate", [*given, *more])

    assert results.answers(path, tree()) and results.answers(path, tree("again=true"))
    assert not any(results.answers(path, tree(more)) for more in ("eval.limit=3", "generate.batch=5", "judge=local"))
    assert not results.answers(tmp_path / "nothing.json", tree())
    there = results.read(path)
    judge = {**tree("judge=local")["judge"], "where": "http://here"}
    results.write(tmp_path, replace(there, options={**there.options, "judge": {**judge, "model": "one"}}))
    asked = tree("judge=local")
    monkeypatch.delenv("ALIGN_JUDGE_MODEL", raising=False)
    assert results.answers(results.path_of(tmp_path, "diversity"), asked)  # no other model is named
    for model in ("one", "two"):
        monkeypatch.setenv("ALIGN_JUDGE_MODEL", model)
        assert results.answers(results.path_of(tmp_path, "diversity"), asked) == (model == "one")


def test_an_option_is_no_file_because_it_is_text(tmp_path: Path) -> None:
    texts = ("x" * 5000 + " {question}", "~nobody-of-this-name is a prompt", "a\0b", "", 3)
    assert [evaluate._there(each) for each in texts] == [None] * 5
    assert evaluate._there(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("key", ["data.path={}", "scorer.path={}/file", "scorer.paths=[{},{}/file]"])
def test_what_an_evaluation_reads_makes_it_anew_when_it_changes(key: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("one")
    rates = ["scorer=ensemble" if "paths" in key else "scorer=model"] if key.startswith("scorer") else []
    given = ["data=file", f"data.path={tmp_path}", *rates, key.format(tmp_path, tmp_path)]
    [planned] = evaluate.plan(*evaluate.read(["eval=reward", *given]))
    asked = find(str(run), Generate(batch=8, seed=0, precision="fp32", accelerator="cpu"))
    before = evaluate.fingerprint(planned, asked)
    assert evaluate.fingerprint(planned, asked) == before
    (tmp_path / "file").write_text("other")
    assert evaluate.fingerprint(planned, asked) != before


@pytest.mark.parametrize("name", ["loss", "diversity"])
def test_other_code_of_a_runner_makes_an_evaluation_anew(name: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [planned] = evaluate.plan(*evaluate.read([f"eval={name}"]))
    asked = find(str(run), Generate(batch=8, seed=0, precision="fp32", accelerator="cpu"))
    before = evaluate.fingerprint(planned, asked)
    assert evaluate.fingerprint(planned, asked) == before
    read = Path.read_bytes

    def changed(path: Path) -> bytes:
        return read(path) + (b"#" if path.name == f"{name}.py" else b"")

    monkeypatch.setattr(Path, "read_bytes", changed)
    assert evaluate.fingerprint(planned, asked) != before


def test_a_killed_evaluation_goes_on(run: Path, forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (
        "evaluate",
        str(run),
        "eval=diversity",
        "eval.samples=64",
        "eval.max_new_tokens=96",
        CPU,
        "generate.batch=64",
    )
    out = f"out={tmp_path / 'out'}"
    before = set((paths.cache() / "responses").rglob("*.jsonl"))

    def fresh() -> list[Path]:
        return [path for path in (paths.cache() / "responses").rglob("*.jsonl") if path not in before]

    child = forks.start(*given, out)
    forks.wait_until(lambda: fresh() and fresh()[0].stat().st_size)
    os.kill(child, signal.SIGKILL)
    assert forks.ended(child) == -signal.SIGKILL
    [journal] = fresh()
    kept = journal.read_bytes().rpartition(b"\n")[0]
    assert not (tmp_path / "out" / "eval" / "diversity.json").exists()
    assert align(*given, out) == 0
    assert journal.read_bytes().startswith(kept)
    names = [json.loads(line)["name"] for line in journal.read_bytes().splitlines()]
    assert len(names) == len(set(names)) == 64 * len(told(tmp_path / "out", "diversity").items)


def test_ctrl_c_ends_with_the_code_of_what_can_go_on(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*given: Any, **settings: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "sample", interrupted)
    assert align("evaluate", str(run), "eval=diversity", "generate.seed=9", CPU) == 75
    assert "the same command goes on" in capsys.readouterr().err


def test_a_model_against_itself_wins_half_and_is_no_distance_away(run: Path) -> None:
    same = ("scorer=addition", f"eval.baseline={run}", *SHORT, CPU)
    assert align("evaluate", str(run), "eval=reward", *same) == 0
    figures = told(run, "reward").figures
    assert figures["score"].value == figures["score_baseline"].value
    assert figures["win_rate"].value == 0.5
    assert align("evaluate", str(run), "eval=divergence", f"eval.reference={run}", *SHORT, CPU) == 0
    figures = told(run, "divergence").figures
    assert figures["kl"].value == pytest.approx(0, abs=1e-9) == figures["kl_from_reference"].value
    assert figures["entropy"].value > 0


def test_the_data_s_best_response_may_be_the_baseline(run: Path) -> None:
    assert align("evaluate", str(run), "eval=reward", "scorer=addition", "eval.baseline=data", *SHORT, CPU) == 0
    finished = told(run, "reward")
    for item in finished.items:
        assert len(item.shown["baseline"]) == 1
        ours, (theirs,) = item.shown["scores"], item.shown["scores_baseline"]
        assert item.values["win_rate"] == sum((a > theirs) + 0.5 * (a == theirs) for a in ours) / len(ours)


def test_samples_for_one_prompt_are_one_item_whatever_the_data_says_of_responses(
    run: Path, tiny_model: Path, ragged_file: Path, tmp_path: Path
) -> None:
    """So that runs which keep other responses of the same prompts are compared prompt by prompt."""
    rows = [json.loads(line) for line in ragged_file.read_text().splitlines()]
    fewer = tmp_path / "fewer.jsonl"
    lines = [{**row, "completions": row["completions"][:1], "rewards": row["rewards"][:1]} for row in rows]
    fewer.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found: list[dict[str, dict[str, float]]] = []
    for path in (ragged_file, fewer):
        data = ("data=file", f"data.path={path}", "data.template=text", "data.held_out=5", f"out={tmp_path}", CPU)
        assert align("evaluate", str(tiny_model), "eval=diversity", *SHORT, *data) == 0
        found.append({item.id: dict(item.values) for item in told(tmp_path, "diversity").items})
    assert len(found[0]) == 5 and found[0] == found[1]


def test_groups_of_one_prompt_have_names_of_their_own() -> None:
    def group(prompt: int, response: int) -> Group:
        ids = (np.array([response], dtype=np.int32),)
        return Group(0, np.array([prompt], dtype=np.int32), ids, np.zeros(1, dtype=np.float32), "")

    alone, other = prompts.ids([group(1, 2), group(2, 2)])
    assert prompts.ids([group(1, 3)]) == [alone] and alone != other
    several = prompts.ids([group(1, 2), group(1, 3), group(1, 2)])
    assert len({*several, alone}) == 4
    assert prompts.ids([group(1, 3), group(1, 2), group(1, 2)]) == [several[1], several[0], several[2]]


@pytest.mark.parametrize("name", ["loss", "reward", "diversity", "divergence"])
def test_what_an_evaluation_reads_may_have_to_be_trained_first(
    name: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The embedded world is made on first use."""

    def prepare(*given: Any) -> Any:
        raise UserError(f"gradients: {torch.is_grad_enabled()}")

    monkeypatch.setattr(prompts, "prepare", prepare)
    assert align("evaluate", str(run), f"eval={name}", "again=true", CPU) == 2
    assert "gradients: True" in capsys.readouterr().err


def test_wins_of_one_side_are_losses_of_the_other() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        ours, theirs = (torch.randint(3, (size,), generator=generator).double().tolist() for size in (3, 5))
        assert wins(ours, theirs) + wins(theirs, ours) == pytest.approx(1)
        assert wins(ours, ours) == 0.5
    assert wins([1, 2], [0, 2]) == (1 + 0 + 1 + 0.5) / 4


def test_a_model_that_is_no_run_is_told_its_data(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    data = ("data=file", f"data.path={pairs_file}", "data.template=text", "data.held_out=5", f"out={tmp_path}", CPU)
    assert align("evaluate", str(tiny_model), "eval=loss", *data) == 0
    figures = told(tmp_path, "loss").figures
    assert figures["sft"].n == 5 and "displacement/chosen" not in figures
    given = ("eval=loss", "algo=dpo", f"eval.reference={tiny_model}", *data)
    assert align("evaluate", str(tiny_model), *given) == 0
    figures = told(tmp_path, "loss").figures
    assert figures["dpo"].value == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-5)
    assert figures["displacement/chosen"].value == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("precision, rounding", [("fp32", 1e-4), ("bf16", 1e-6)])
def test_adapters_are_evaluated_as_they_were_trained(
    precision: str, rounding: float, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """Merged in fp32, up to its rounding; in bf16, whose rounding is far larger, by the very same products."""
    folder = tmp_path / "run"
    given = ("algo=dpo", "adapter=lora", "adapter.rank=2", "train.steps=3", f"engine.precision={precision}")
    assert align("train", *small_runs.overrides(tiny_model, pairs_file, folder, *given)) == 0
    assert align("evaluate", str(folder), "eval=loss,diversity", CPU, f"generate.precision={precision}") == 0
    found, after = told(folder, "loss").figures, small_runs.summary(folder)
    assert found["dpo"].value == pytest.approx(after["eval/after/loss"], abs=rounding)
    displacement = after["eval/after/displacement/chosen"]
    assert found["displacement/chosen"].value == pytest.approx(displacement, abs=10 * rounding)


BAD: list[tuple[list[str], str]] = [
    (["{run}"], "eval=NAME,... or suite=NAME has to be given"),
    (["{run}", "eval.samples=3"], "eval=NAME,... or suite=NAME has to be given"),
    (["{run}", "eval=diversty"], "Did you mean 'diversity'"),
    (["{run}", "suite=nca_table9"], "Did you mean 'nca_table"),
    (["{run}", "eval=diversity", "eval.sample=3"], "Did you mean 'samples'"),
    (["{run}", "eval=diversity,loss", "eval.sampels=3"], "none of these evaluations has such an option"),
    (["{run}", "eval=loss", "eval.limit=0"], "eval.limit=0"),
    (["{run}", "eval=loss,loss"], "named twice"),
    (["{run}", "eval="], "give a name"),
    (["{run}", "evl=loss"], "evl: no such key. Did you mean 'eval'?"),
    (["{run}", "eval=loss", "-m"], "eval=NAME,NAME"),
    (["{run}", "eval=mt_bench"], "judge=openai"),
    (["{run}", "eval=toy"], "without the embedded world"),
    (["{run}", "eval=toy", "data=hh"], "does not look at it"),
    (["{run}", "eval=reward"], "scorer="),
    (["{run}", "eval=reward", "scorer=addition", "eval.baseline=nowhere/at/all"], "no such run directory"),
    (["{run}", "eval=loss", "generate.batch=0"], "generate.batch=0"),
    (["{run}", "eval=loss", "again=maybe"], "again=maybe"),
    (["{run}", "eval=loss", "out={file}"], "cannot be written"),
    (["{run}", "eval=loss", "out={unfinished}"], "holds a run"),
    (["{model}", "eval=loss"], "no data of its own"),
    (["{model}", "eval=diversity", "data=file", "data.path={rows}", "data.held_out=0"], "held_out"),
    (["./runs/nothing", "eval=loss"], "no such run directory"),
    (["{empty}", "eval=loss"], "neither a run directory"),
    (["{unfinished}", "eval=loss"], "has no model yet"),
    (["eval=loss"], "comes first"),
]


@pytest.mark.parametrize("given, sentence", BAD, ids=[" ".join(given[:3]) for given, _ in BAD])
def test_bad_input_gets_a_sentence_and_loses_nothing(
    given: list[str],
    sentence: str,
    run: Path,
    tiny_model: Path,
    ragged_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    file, empty, unfinished = tmp_path / "file", tmp_path / "empty", tmp_path / "unfinished"
    file.write_text("")
    empty.mkdir()
    unfinished.mkdir()
    (unfinished / rundir.CONFIG).write_bytes((run / rundir.CONFIG).read_bytes())
    names = {"run": run, "model": tiny_model, "rows": ragged_file, "file": file, "empty": empty}
    before = (run / rundir.SUMMARY).read_bytes()
    words = [word.format(unfinished=unfinished, **names) for word in given]
    assert align("evaluate", *words, *([CPU] if len(words) > 1 or words == [str(run)] else [])) == 2
    errors = capsys.readouterr().err
    assert sentence in errors and "Traceback" not in errors
    assert (run / rundir.SUMMARY).read_bytes() == before


def test_ranks_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert align("evaluate", str(run), "eval=loss", CPU) == 2


def test_a_group_of_another_command_is_no_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert align("train", "eval=toy") == 2
    assert "align train has no such choice" in capsys.readouterr().err


def test_what_can_be_typed_is_completed(run: Path) -> None:
    assert completion.complete("align evaluate x eval=div") == ["eval=divergence", "eval=diversity"]
    assert "generate.seed=" in completion.complete("align evaluate x gen")
    assert str(run) in completion.complete(f"align evaluate {run.parent}/")
    assert "eval=" not in completion.complete("align train ev")


def test_one_evaluation_that_fails_does_not_stop_the_others(run: Path, tmp_path: Path) -> None:
    out = f"out={tmp_path}"
    assert align("evaluate", str(run), "eval=toy,diversity", *SHORT, CPU, out) == 2
    assert [path.stem for path in results.all_of(tmp_path)] == ["diversity"]


def test_a_mean_over_items_leaves_out_what_an_item_has_not() -> None:
    items = [Item("a", {"right": 1.0, "score": 0.2}, {}), Item("b", {"right": 0.0}, {}), Item("c", {"score": 0.4}, {})]
    figures = results.figures_of(Result(items, {"rate": 3.0, "rate_low": 2.0, "rate_high": 4.0, "score": 9.0}))
    assert figures["right"] == results.Figure(*statistics.wilson(1, 2), n=2)
    assert figures["score"] == results.Figure(9.0, None, None, n=2)  # what a runner says holds in place of the mean
    assert figures["rate"] == results.Figure(3.0, 2.0, 4.0, n=3)


def test_a_ratio_s_interval_is_a_mean_s_where_all_items_are_of_one_size() -> None:
    values = [0.5, 2.0, 3.5, 1.0, 4.0]
    assert statistics.ratio_interval(values, [1.0] * 5) == pytest.approx(statistics.mean_interval(values))
    twice = statistics.ratio_interval([2 * value for value in values], [2.0] * 5)
    assert twice == pytest.approx(statistics.mean_interval(values))
    assert statistics.ratio_interval([1.0, 6.0], [1.0, 3.0]).estimate == 7 / 4


def test_figures_and_a_table_of_items_go_to_the_run_s_own_wandb_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert align("evaluate", str(run), "eval=diversity", *SHORT, CPU) == 0
    finished = told(run, "diversity")
    recorded = SimpleNamespace(summary={}, tables={}, finish=lambda: None)
    recorded.log = recorded.tables.update
    monkeypatch.setattr(tracking, "_start_wandb", lambda *given: recorded)
    tree = {"track": config.compose("train", ["track=wandb"])["track"]}
    evaluate.track([finished], tmp_path, tree)
    assert not recorded.summary  # this folder has no run of W&B
    (tmp_path / tracking.WANDB_ID).write_text("{}")
    evaluate.track([finished], tmp_path, tree)
    assert recorded.summary == results.flat(finished)
    table = recorded.tables["eval/diversity/items"]
    assert table.columns[0] == "id" and {"tokens", "prompt", "responses"} <= set(table.columns)
    assert [row[0] for row in table.data] == [item.id for item in finished.items]


def test_items_without_a_number_and_ids_that_are_two_are_refused(tmp_path: Path) -> None:
    def finished(*items: Item) -> results.Finished:
        return results.Finished("x", {}, {}, [], {}, {}, list(items))

    with pytest.raises(RunError, match="item a has x=nan"):
        results.write(tmp_path, finished(Item("a", {"x": float("nan")}, {})))
    with pytest.raises(UserError, match="have the id a"):
        results.write(tmp_path, finished(Item("a", {}, {}), Item("a", {}, {})))
    assert not results.all_of(tmp_path)
