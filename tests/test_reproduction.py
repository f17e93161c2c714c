"""A reproduction: side by side, resumed, with runs that fail, and its claims judged by what was measured."""

import importlib.machinery
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_runs import SETTINGS, align

from align_cli import config, exits, paths, rundir, terminal
from align_cli.errors import UserError
from align_cli.reproduction import jobs, loading
from align_cli.reproduction.claims import Range
from align_cli.reproduction.jobs import Job
from align_cli.reproduction.judging import judge
from align_cli.reproduction.recipe import SCALES, Expectation
from align_cli.reproduction.record import RESULTS

CLAIM = {"kind": "ours", "source": "here", "scale": "both"}
EXACT = {**CLAIM, "kind": "exact"}


@pytest.fixture
def written(tiny_model: Path, ragged_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of two runs whose two seeds take a second each; the tests work in its folder."""
    monkeypatch.chdir(tmp_path)
    common = [*SETTINGS, f"model.path={tiny_model}", f"data.path={ragged_file}", "train.steps=2", "eval.groups=2"]
    scale = {
        "cost": "seconds",
        "seeds": 2,
        "common": common,
        "runs": {"dpo": ["algo=dpo", "data.pairs=best_random"], "nca": ["algo=nca"]},
        "departures": ["It is small."],
    }
    expect = [
        {"claim": "Two steps.", "figure": "steps", "of": "dpo", "is": {"equal": {"value": 2, "tolerance": 0}}, **EXACT},
        {
            "claim": "NCA starts at 2 log 2.",
            "figure": "loss/first",
            "of": "nca",
            "is": {"within": [1.386, 1.387]},
            **EXACT,
        },
        {
            "claim": "It is what it is.",
            "figure": "loss/last",
            "of": "nca",
            "less": "dpo",
            "is": {"equal": "unknown"},
            **CLAIM,
        },
    ]
    whole = {"title": "A title", "paper": "none", "scales": {"tiny": scale, "paper": scale}, "expect": expect}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(whole), encoding="utf-8")
    return path


def results() -> dict[str, Any]:
    """What was written."""
    return json.loads(Path("out", RESULTS).read_text())


def reproduce(*more: str) -> int:
    """The command on the recipe; whole paths, as the server of forked jobs has another working directory."""
    return align("reproduce", "mine.yaml", f"dir={Path('out').absolute()}", *more)


def test_a_recipe_is_run_side_by_side_judged_and_found_again(
    written: Path, forked: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    most: list[int] = []
    plain = jobs._started

    def noted(*given: Any) -> Any:
        running = plain(*given)
        most.append(running.slot)
        return running

    monkeypatch.setattr(jobs, "_started", noted)
    assert reproduce("jobs=2") == exits.DONE
    told = capsys.readouterr()
    assert set(most) == {0, 1} and len(forked) == 4
    assert "[4/4]" in told.err and "4 jobs, 2 at a time" in told.err
    assert "departs: It is small." in told.out and "unknown" in told.out
    found = results()
    first, start, difference = found["expectations"]
    assert (first["verdict"], first["values"]) == ("holds", {"0": 2.0, "1": 2.0})
    assert start["verdict"] == "holds"
    last = {name: rundir.read_summary(Path(f"out/runs/{name}/seed=1")) for name in ("dpo", "nca")}
    assert difference["values"]["1"] == last["nca"]["loss/last"] - last["dpo"]["loss/last"]  # pyright: ignore
    assert difference["verdict"] == "unknown" and difference["low"] <= difference["estimate"] <= difference["high"]
    assert found["runs"]["nca"]["seeds"]["1"]["dir"] == "runs/nca/seed=1"
    assert found["runs"]["nca"]["seeds"]["1"]["figures"] == last["nca"]
    assert found["seeds"] == [0, 1] and found["departures"] == ["It is small."]

    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("summary.json")}
    assert reproduce("--json") == exits.DONE
    assert json.loads(capsys.readouterr().out)["expectations"] == found["expectations"]
    shutil.rmtree("out/runs/dpo/seed=1")
    assert reproduce() == exits.DONE
    assert len(forked) == 5
    assert "3 of 4 jobs are finished already" in capsys.readouterr().err
    after = {path: path.stat().st_mtime_ns for path in Path("out").rglob("summary.json")}
    assert {path.parent.parent.name for path in after if after[path] != before[path]} == {"dpo"}
    assert results()["seconds"] > found["seconds"]

    # the printed command is the run's own, to be given from the reproduction's folder
    given = shlex.split(found["runs"]["dpo"]["command"])
    assert given[:2] == ["align", "train"] and "run.dir='runs/dpo/seed=0'" in given
    monkeypatch.chdir("out")
    assert align(*given[1:]) == exits.DONE
    assert "finished already" in capsys.readouterr().out


def test_a_reproduction_that_a_signal_stops_goes_on(
    written: Path, forked: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def say(text: str) -> None:
        if text.startswith("[1/4]"):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(terminal, "say", say)
        assert reproduce("jobs=1") == exits.STOPPED
    states = [seed["state"] for run in results()["runs"].values() for seed in run["seeds"].values()]
    assert states.count("done") == 1 and "not started" in states
    assert {each["verdict"] for each in results()["expectations"]} <= {"holds", "undecided", "unknown"}
    assert reproduce("jobs=2") == exits.DONE
    done = [seed["state"] for run in results()["runs"].values() for seed in run["seeds"].values()]
    assert done == ["done"] * 4


def test_a_run_that_fails_is_told_and_the_others_are_judged(
    written: Path, forked: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = yaml.safe_load(written.read_text())
    runs = whole["scales"]["tiny"]["runs"]
    runs["dpo"] += ["train.lr=1e30", "optimizer.max_grad_norm=null", "train.steps=6"]
    runs["after"] = ["algo=nca", "model.path=<dpo>/model"]
    whole["expect"].append(
        {"claim": "It waits.", "figure": "loss/last", "of": "after", "is": {"below": 1}, **CLAIM, "scale": "tiny"}
    )
    written.write_text(yaml.safe_dump(whole))
    assert reproduce("seeds=1", "jobs=2") == exits.FAILED
    verdicts = [(each["verdict"], each["why"]) for each in results()["expectations"]]
    assert verdicts[0][0] == "failed" and re.search(r"dpo: .*is not finite|dpo: .*is nan", verdicts[0][1])
    assert verdicts[1][0] == "holds"
    assert verdicts[2][0] == "failed"
    assert verdicts[3][0] == "failed" and "it reads dpo, which failed" in verdicts[3][1]
    told = capsys.readouterr()
    assert "failed" in told.out and "after seed 0: failed" in told.err
    assert len(forked) == 2


def test_what_needs_a_job_that_was_stopped_by_itself_is_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped:
        returncode = exits.STOPPED

        def poll(self) -> int:
            return self.returncode

    monkeypatch.setattr(jobs, "_process", lambda *given: Stopped())
    one, two = tmp_path / "one", tmp_path / "two"
    planned = [
        Job("one", 0, one, (("train",),), (), 1, lambda: False),
        Job("two", 0, two, (("train",),), (one,), 1, lambda: False),
    ]
    assert jobs.run(planned, tmp_path, room=2, say=terminal.silent) == {one: "stopped", two: "not started"}


def test_a_job_s_process_speaks_into_its_log(tmp_path: Path) -> None:
    process = jobs._process(["train", "algo=nothing"], dict(os.environ), tmp_path / "log")
    assert process.wait() == exits.USER
    assert "algo=nothing: no such choice" in jobs._last_words(tmp_path / "log", exits.USER)


def test_a_folder_with_other_runs_is_left_alone(
    written: Path, forked: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce("seeds=1") == exits.DONE
    whole = yaml.safe_load(written.read_text())
    whole["scales"]["tiny"]["common"].append("train.lr=0.5")
    written.write_text(yaml.safe_dump(whole))
    assert reproduce("seeds=1") == exits.USER
    assert "another configuration: train.lr" in capsys.readouterr().err
    with rundir.lock(Path("out")):
        written.write_text(yaml.safe_dump({**whole, "title": "x"}))
        whole["scales"]["tiny"]["common"].pop()
        written.write_text(yaml.safe_dump(whole))
        assert reproduce("seeds=1") == exits.USER
    assert "is in use by process" in capsys.readouterr().err
    assert len(forked) == 2


LOSS = """
from torch import Tensor

def square(policy: Tensor, rewards: Tensor, *, beta: float) -> Tensor:
    return ((beta * policy - rewards) ** 2).sum(-1)
"""
STUDY = """
FIGURES = ("half",)

def halves(seed: int, *, of: float) -> dict[str, float]:
    return {"half": of / 2 + seed}
"""


def test_every_job_of_a_recipe_finds_the_parts_of_a_plugin(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "__init__.py": "",
        "losses/__init__.py": "",
        "losses/square.py": LOSS,
        "conf/algo/square.yaml": "# Squares\nname: square\nbeta: 0.5  # of the policy\n",
        "studies/__init__.py": "",
        "studies/halves.py": STUDY,
    }
    for name, text in files.items():
        path = tmp_path / "of_squares" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(config, "_plugins", [])
    whole = yaml.safe_load(written.read_text())
    scale = whole["scales"]["tiny"]
    scale |= {"runs": {"square": ["algo=square"]}, "evaluate": ["loss"]}
    of_study = {"cost": "none", "seeds": 2, "study": "halves", "options": {"of": 3}}
    claim = {"claim": "It is half.", "figure": "half", "is": {"within": [1, 2]}, **EXACT}
    for told, expect in ((scale, [{**whole["expect"][0], "of": "square"}]), (of_study, [claim])):
        written.write_text(yaml.safe_dump({**whole, "scales": {"tiny": told, "paper": told}, "expect": expect}))
        assert align("reproduce", "mine.yaml", "--plugin", "of_squares", "dir=out", "seeds=1", "--plan") == exits.DONE
        said = [line.strip() for line in capsys.readouterr().out.splitlines()]
        commands = [line.removeprefix("align ") for line in said if line.startswith("align ")]
        assert len(commands) == (2 if told is scale else 1)
        for command in commands:
            config.use([])  # each is a process of its own
            assert align(*shlex.split(command)) == exits.DONE, command
        config.use([])
        assert align("reproduce", "mine.yaml", "--plugin", "of_squares", "dir=out", "seeds=1") == exits.DONE
        assert "1 of 1 jobs are finished already" in capsys.readouterr().err
    assert "eval/loss/square" in json.loads(next(Path("out").glob("runs/*/seed=0/summary.json")).read_text())
    assert json.loads(Path("out/study/seed=0.json").read_text())["figures"] == {"half": 1.5}


@pytest.mark.parametrize("scale", SCALES)
def test_a_plan_prints_the_commands_and_starts_nothing(
    scale: str,
    forked: list[tuple[str, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert align("reproduce", "nca/figure5", f"scale={scale}", "--plan") == exits.DONE
    told = capsys.readouterr().out
    assert "align train " in told and "run.seed=0" in told and "optimizer steps" in told and "rank(s)" in told
    assert forked == [] and list(tmp_path.iterdir()) == []


def test_what_is_asked_wrongly_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {
        (): "align reproduce NAME",
        ("nca/figure5", "nca/figure5"): "give one recipe at a time",
        ("nca/figure5", "scale=large"): "scale=large: use tiny or paper",
        ("nca/figure5", "seeds=0"): "seeds=0: use a whole number from 1",
        ("nca/figure5", "jobs=x"): "jobs=x: use a whole number from 1",
        ("nca/figure5", "sedes=3"): "Did you mean 'seeds'?",
        ("nca/figure5", "--paln"): "Did you mean '--plan'?",
        ("nca/figure5", "dir="): "dir=: give a folder",
        ("nca/figure5", "--config-dir"): "--config-dir needs a folder",
        ("nca/figure5", "--plugin="): "--plugin needs a package",
        ("nca/figgure5",): "Did you mean 'nca/figure5'?",
    }
    for given, told in wrong.items():
        assert align("reproduce", *given) == exits.USER
        assert told in capsys.readouterr().err, given


def test_the_list_names_every_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    assert align("reproduce", "--list") == exits.DONE
    told = capsys.readouterr().out
    assert all(name in told for name in loading.names()) and "refused" not in told


# --- judging


def expectation(**changes: Any) -> Expectation:
    whole = {
        "claim": "c",
        "figure": "f",
        "since": None,
        "of": None,
        "less": None,
        "over": None,
        "spread": None,
        "less_spread": None,
        "kind": "paper",
        "source": "s",
    }
    return Expectation(**{**whole, "scale": "tiny", "wanted": Range(float("-inf"), 0.0, True), **changes})


def test_a_difference_is_paired_by_seed() -> None:
    """Of 5, 6, 7, 8, 9 less 6, 7, 8, 9, 10 every pair differs by −1, although the two spread widely."""
    found = {"a": {n: {"f": 5.0 + n} for n in range(5)}, "b": {n: {"f": 6.0 + n} for n in reversed(range(5))}}
    outcome = judge(expectation(of="a", less="b"), found, {}, asked=5)
    assert outcome.values == dict.fromkeys(range(5), -1.0)
    assert (outcome.judged.low, outcome.judged.high, outcome.judged.verdict) == (-1, -1, "holds")


@pytest.mark.parametrize("wanted, verdict", [("rising", "holds"), ("falling", "does not hold")])
def test_a_trend_is_the_slope_of_each_seed(wanted: str, verdict: str) -> None:
    found = {name: {n: {"f": n + 2.0 * place} for n in range(5)} for place, name in enumerate("abc")}
    outcome = judge(expectation(over=["a", "b", "c"], wanted=wanted), found, {}, asked=5)
    assert set(outcome.values.values()) == {2.0} and outcome.judged.verdict == verdict


def test_a_spread_is_of_each_seed_s_own_runs() -> None:
    """1, 5, 2 spread by 4 and 7, 4, 9 by 5, in any order, whatever is added to all figures of a seed."""
    one, other = (1.0, 5.0, 2.0), (7.0, 4.0, 9.0)
    found = {
        name: {n: {"f": value + 10 * n} for n in range(5)} for name, value in zip("abcdef", one + other, strict=True)
    }
    outcome = judge(expectation(spread=["c", "a", "b"]), found, {}, asked=5)
    assert outcome.values == dict.fromkeys(range(5), 4.0)
    outcome = judge(expectation(spread=["a", "b", "c"], less_spread=["f", "d", "e"]), found, {}, asked=5)
    assert outcome.values == dict.fromkeys(range(5), -1.0) and outcome.judged.verdict == "holds"


def test_a_figure_that_a_seed_lacks_leaves_the_claim_undecided() -> None:
    found = {"a": {n: {"f": -1.0} for n in range(6)}}
    del found["a"][2]["f"]
    outcome = judge(expectation(of="a"), found, {}, asked=6)
    assert outcome.judged.verdict == "undecided" and outcome.judged.why == "1 of 6 seeds have no such figure"
    assert outcome.judged.estimate == -1


def test_before_all_seeds_are_done_nothing_is_decided() -> None:
    found = {"a": {n: {"f": -1.0} for n in range(6)}}
    outcome = judge(expectation(of="a"), found, {}, asked=10)
    assert outcome.judged.verdict == "undecided" and outcome.judged.why == "6 of 10 seeds are done"


def test_one_value_against_mathematics_decides_whatever_the_others_lack() -> None:
    exact = expectation(kind="exact", wanted=Range(0.0, 1.0, False))
    assert judge(exact, {"study": {0: {"f": 5.0}, 1: {}}}, {}, asked=2).judged.verdict == "does not hold"
    assert judge(exact, {"study": {0: {"f": 0.5}, 1: {}}}, {}, asked=2).judged.verdict == "undecided"


def test_a_study_s_figures_have_the_run_in_their_name() -> None:
    found = {"study": {n: {"js/f": 1.0, "kl/f": 2.0, "f": -3.0} for n in range(5)}}
    assert judge(expectation(of="js", less="kl"), found, {}, asked=5).judged.estimate == -1
    assert judge(expectation(), found, {}, asked=5).judged.estimate == -3


def test_jobs_side_by_side_have_gpus_of_their_own() -> None:
    assert jobs.gpus(0, 2, "4,5,6,7") == ["4", "5"]
    assert jobs.gpus(2, 2, "4,5,6,7") == ["6", "7"]


def test_jobs_without_gpus_of_their_own_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    planned = [Job("one", 0, Path("one"), (), (), ranks, lambda: False) for ranks in (1, 2)]
    assert jobs.side_by_side(planned) == jobs.side_by_side(planned, 2) == 2
    with pytest.raises(UserError, match="jobs=3: PyTorch sees GPUs for 2 at a time"):
        jobs.side_by_side(planned, 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert jobs.side_by_side(planned, 3) == 3


# --- a recipe for many GPUs in small


@pytest.mark.parametrize("name", ["nca/table3", "contrastive/reward_differences", "fdpg/code"])
def test_a_recipe_of_each_paper_runs_in_small_from_end_to_end(
    name: str, few_rows: Path, forked: list[tuple[str, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random models of the real families: Mistral, Mixtral, GPT-2, a reward model, and LoRA where the recipe has it.

    The README's commands are two more, of EXO and of NCA (tests/test_readme.py).
    """
    given = ["reproduce", name, "scale=paper", f"shrink={few_rows}", f"dir={tmp_path}", "jobs=2"]
    assert align(*given) == exits.DONE, capsys.readouterr().err
    told = json.loads((tmp_path / RESULTS).read_text())
    assert told["shrunken"] and {each["verdict"] for each in told["expectations"]} == {"undecided"}
    assert len(forked) == len(loading.load(name).scales["paper"].runs)
    assert (tmp_path / "report.html").is_file()


def test_rows_that_are_not_there_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["reproduce", "nca/table3", "scale=paper", f"shrink={tmp_path}", f"dir={tmp_path / 'out'}"]
    assert align(*given) == exits.USER
    assert "ultrainteract.jsonl there" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- what is published


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`scripts/results` with recipes of its own."""
    path = Path(__file__).parents[1] / "scripts" / "results"
    loader = importlib.machinery.SourceFileLoader("results_script", str(path))
    spec = importlib.util.spec_from_loader("results_script", loader)
    assert spec is not None
    module: Any = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    (tmp_path / "recipes" / "nca").mkdir(parents=True)
    (tmp_path / "recipes" / "nca" / "mine.yaml").touch()
    (tmp_path / "README.md").write_text("`nca/mine`: not run yet\n")
    monkeypatch.setattr(module, "RECIPES", tmp_path / "recipes")
    monkeypatch.setattr(module, "PAGE", tmp_path / "recipes" / "RESULTS.md")
    monkeypatch.setattr(module, "README", tmp_path / "README.md")
    return module


def published(folder: Path, **changes: Any) -> Path:
    """The folder of a reproduction."""
    claim = {"claim": "It | falls.", "kind": "ours", "source": "here", "expected": "< 0", "values": {"0": -1.0}}
    told = {
        "recipe": "nca/mine",
        "title": "A title",
        "paper": "none",
        "scale": "tiny",
        "shrunken": False,
        "seeds": [0],
        "commit": "abc",
        "machine": "2 cores",
        "versions": {},
        "date": "2000-01-01",
        "seconds": 90.0,
        "runs": {"dpo": {"command": "align train", "seeds": {"0": {"dir": "a", "state": "done", "figures": {}}}}},
        "expectations": [
            {**claim, "estimate": -1.0, "low": -2.0, "high": -0.5, "verdict": "holds", "why": ""},
            {**claim, "estimate": 1.0, "low": 0.5, "high": 2.0, "verdict": "does not hold", "why": "it rises"},
            {**claim, "estimate": 0.1, "low": -0.5, "high": 0.7, "verdict": "undecided", "why": "the interval has 0"},
        ],
        "departures": ["It is small."],
        **changes,
    }
    folder.mkdir(exist_ok=True)
    (folder / RESULTS).write_text(json.dumps(told))
    return folder


def test_published_results_are_in_the_words_of_their_recipes(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "RECIPES", paths.recipes())
    for file in paths.recipes().glob("*/*.results.json"):
        told = json.loads(file.read_text(encoding="utf-8"))
        assert script.worded(told) == told, file
        recipe = loading.load(told["recipe"])
        expected = [each.claim for each in recipe.expect if each.at(told["scale"])]
        assert [each["claim"] for each in told["expectations"]] == expected, file


def test_the_results_page_has_what_holds_and_what_does_not(script: Any, tmp_path: Path) -> None:
    assert script.main([str(published(tmp_path / "out"))]) == 0
    page = (tmp_path / "recipes" / "RESULTS.md").read_text()
    assert r"| It \| falls. | < 0 (ours: here) | -1 [-2, -0.5] | 1 | **holds** |" in page
    assert "**does not hold**: it rises" in page and "- It is small." in page and "2 cores" in page
    assert (tmp_path / "README.md").read_text() == "`nca/mine`: 1 of 3 hold, 1 undecided\n"
    assert script.main([]) == 0 and (tmp_path / "recipes" / "RESULTS.md").read_text() == page


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"shrunken": True}, "shrunken"),
        ({"recipe": "nca/other"}, "not a recipe of this checkout"),
        ({"departures": ["See /home/me/notes."]}, "names a place of this machine, /home/me/notes"),
        ({"runs": {"dpo": {"seeds": {"0": {"state": "stopped"}}}}}, "was stopped"),
    ],
)
def test_results_that_should_not_be_published_are_refused(
    changes: dict[str, Any], told: str, script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([str(published(tmp_path / "out", **changes))]) == 2
    assert told in capsys.readouterr().err
    assert not list((tmp_path / "recipes").rglob("*.results.json"))
