"""A sweep: each combination once, each a run of its own, in one group of Weights & Biases."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import wandb_files
from forks import Forks
from small_runs import align, overrides, summary

from align_cli import exits, rundir, sweep

GRID = ("algo.alpha=0.1,1", "algo.beta=0.05,0.1", "data.responses=2,3")
COLUMNS = ("algo.alpha", "algo.beta", "data.responses")


@dataclass
class Swept:
    """A finished sweep, and what starts it again."""

    command: list[str]
    home: Path

    def runs(self) -> list[Path]:
        return sorted(path.parent for path in self.home.glob("*/summary.json"))


@pytest.fixture(scope="module")
def swept(tiny_model: Path, ragged_file: Path, tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Swept:
    """Its jobs are processes that are forked; the other tests start theirs as users get them."""

    def forked(given: list[str], config_dirs: list[str]) -> tuple[int, bool]:
        return forks.run("train", *given), False

    home = tmp_path_factory.mktemp("sweeps") / "three ways"
    given = overrides(tiny_model, ragged_file, home, "track=wandb", "train.steps=2", "eval.groups=0")
    command = ["train", "-m", *(o.replace(str(home), f"'{home}'") for o in given), *GRID]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "_run", forked)
        assert align(*command) == exits.DONE
    return Swept(command, home)


def test_every_combination_is_a_run(swept: Swept) -> None:
    assert len(swept.runs()) == 8
    values = {tuple(rundir.flatten(rundir.read_config(run))[name] for name in COLUMNS) for run in swept.runs()}
    assert values == {(a, b, k) for a in (0.1, 1) for b in (0.05, 0.1) for k in (2, 3)}
    assert {summary(run)["steps"] for run in swept.runs()} == {2}


def test_the_runs_are_one_group_whose_columns_are_the_swept_keys(swept: Swept) -> None:
    found = [run for folder in swept.runs() for run in wandb_files.read(folder)]
    assert len(found) == 8
    assert {run["group"] for run in found} == {"three ways"}
    assert len({run["id"] for run in found}) == 8
    columns = {tuple(run["config"][name] for name in COLUMNS) for run in found}
    assert columns == {(a, b, k) for a in (0.1, 1) for b in (0.05, 0.1) for k in (2, 3)}
    assert all("loss/last" in run["summary"] for run in found)


def test_the_reference_is_measured_once_for_the_whole_sweep(swept: Swept) -> None:
    """Each response is measured by the first run that keeps it; K, α and β change nothing about its likelihood."""
    measured = {run.name: summary(run)["reference/measured"] for run in swept.runs()}
    assert sum(count > 0 for count in measured.values()) <= 2
    assert all(
        "data.responses=3" in name or "algo.alpha=0.1,algo.beta=0.05" in name for name, n in measured.items() if n
    )


def test_a_sweep_run_again_runs_what_is_missing_alone(
    swept: Swept, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []
    plain = sweep._run

    def noted(given: list[str], config_dirs: list[str]) -> tuple[int, bool]:
        started.extend(o for o in given if "run.dir=" in o)
        return plain(given, config_dirs)

    monkeypatch.setattr(sweep, "_run", noted)
    before = {run: (run / "summary.json").stat().st_mtime_ns for run in swept.runs()}
    assert align(*swept.command) == exits.DONE
    assert started == []
    assert capsys.readouterr().out.count("skipped") == 8
    missing = swept.runs()[5]
    shutil.rmtree(missing)
    assert align(*swept.command) == exits.DONE
    assert len(started) == 1 and missing.name in started[0]
    after = {run: (run / "summary.json").stat().st_mtime_ns for run in swept.runs()}
    assert {run for run in after if after[run] != before[run]} == {missing}


def test_a_job_that_fails_does_not_stop_the_others(
    tiny_model: Path,
    ragged_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At so large a rate the weights overflow within a few steps; the other job is as small as ever."""
    monkeypatch.setenv("COLUMNS", "160")  # the table breaks no line
    given = [o for o in overrides(tiny_model, ragged_file, tmp_path / "two", "train.steps=6") if "train.lr" not in o]
    assert align("train", "-m", *given, "train.lr=1e30,1e-3", "optimizer.max_grad_norm=null") == exits.FAILED
    told = capsys.readouterr().out
    assert "failed (1)" in told and "done" in told
    assert [path.parent.name for path in (tmp_path / "two").glob("*/summary.json")] == ["train.lr=0.001"]


def test_a_wrong_value_is_refused_before_any_job_starts(
    tiny_model: Path, ragged_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = overrides(tiny_model, ragged_file, tmp_path / "none", "algo.beta=0.1,-1")
    assert align("train", "-m", *given) == exits.USER
    assert "algo.beta=-1" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_sweep_s_configuration_is_refused_and_starts_nothing(
    tiny_model: Path, ragged_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = overrides(tiny_model, ragged_file, tmp_path / "none", "algo.beta=0.1,0.2")
    assert align("train", "-m", "--cfg", *given) == exits.USER
    assert "-m --cfg: each job has a configuration of its own" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_values_are_given_once(tiny_model: Path, ragged_file: Path, tmp_path: Path) -> None:
    given = overrides(tiny_model, ragged_file, tmp_path / "none", "algo.beta=0.1,0.1")
    assert align("train", "-m", *given) == exits.USER


def test_combinations_keep_the_order_of_the_command_line() -> None:
    combinations, swept = sweep.expand(["algo=nca,dpo", "train.steps=3", "algo.beta=1,2"])
    assert swept == 2
    assert combinations == [
        [f"algo={algo}", "train.steps=3", f"algo.beta={beta}"] for algo in ("nca", "dpo") for beta in (1, 2)
    ]


def test_a_sweep_finds_its_folder_whatever_a_run_may_be_resumed_with() -> None:
    def home(*more: str) -> Path:
        given = ["algo=nca,dpo", *more]
        return sweep._home(given, [], [[each.replace("nca,", "") for each in given]])

    same = ("checkpoint.every=7", "track=none", "resume=auto", "source.keep=true")
    assert {home(each) for each in same} == {home()}
    assert len({home(), home("train.steps=3"), home("launch.devices=2")}) == 3


def test_jobs_with_long_or_odd_values_have_folders_of_their_own() -> None:
    names = {sweep.folder_name((f"data.path='/a b/{letter * 300}'",)) for letter in "xy"}
    assert len(names) == 2
    assert all(len(name) < 200 and "/" not in name for name in names)


def test_brackets_in_a_swept_value_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [sweep.Job((), (f"scorer.paths={value}",), tmp_path / value[1]) for value in ("[/rm/a]", "[q_proj]")]
    sweep.show(jobs, {})
    printed = capsys.readouterr().out
    assert "[/rm/a]" in printed and "[q_proj]" in printed
