"""A run that is stopped, by whatever, goes on with the same command and ends as if nothing had happened."""

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import Forks
from small_runs import align, build_model, largest_difference, losses, overrides, summary, weights

from align_cli import exits
from align_cli.checkpoints import committed
from align_cli.tracking import read_metrics

STEPS = 30
KILLS = 20
REFERENCE = ("reference/measured", "reference/found", "reference/seconds")  # what the cache held before

Command = Callable[[Path], list[str]]


@pytest.fixture
def command(tiny_model: Path, ragged_file: Path) -> Command:
    """`align train` of a run with checkpoints, in a folder."""
    settings = ("algo.beta=0.1", f"train.steps={STEPS}", "checkpoint.every=2", "eval.groups=2")
    return lambda run_dir: ["train", *overrides(tiny_model, ragged_file, run_dir, *settings)]


@pytest.fixture
def online(tiny_model: Path, ragged_file: Path) -> Command:
    """The same of a run that learns from its own samples, with all that such a run keeps from step to step."""
    sampled = ("source.samples=3", "source.max_new_tokens=6", "source.minibatches=2", "scorer=matches")
    learnt = ("algo=ppo", "kl=adaptive", "reward=contrastive", "reward.scaling=dynamic", "scorer.pattern='^[0-4]'")
    settings = (*learnt, *sampled, f"train.steps={STEPS}", "checkpoint.every=2", "eval.groups=2", "train.lr=1e-2")
    return lambda run_dir: ["train", *overrides(tiny_model, ragged_file, run_dir, *settings)]


def steps(run_dir: Path) -> list[int]:
    return [line["step"] for line in read_metrics(run_dir)]


def same(run_dir: Path, calm: Path) -> None:
    """Two finished runs have computed the same, bit for bit."""
    assert steps(run_dir) == list(range(1, STEPS + 1))
    assert losses(run_dir) == losses(calm)
    assert largest_difference(weights(run_dir), weights(calm)) == 0.0
    timed = ("groups_per_second", "tokens_per_second", "peak_memory_gb", *REFERENCE)
    one, other = (
        {k: v for k, v in summary(each).items() if k not in timed and not k.startswith("seconds/")}
        for each in (run_dir, calm)
    )
    assert one == other
    for mine, theirs in zip(read_metrics(run_dir), read_metrics(calm), strict=True):
        assert {k: v for k, v in mine.items() if not k.startswith("seconds/")} == {
            k: v for k, v in theirs.items() if not k.startswith("seconds/")
        }


@pytest.mark.parametrize("kind, kills", [("command", KILLS), ("online", 8)])
def test_kills_at_random_moments_change_nothing(
    forks: Forks, kind: str, kills: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    command: Command = request.getfixturevalue(kind)
    calm = tmp_path / "calm"
    assert forks.run(*command(calm)) == exits.DONE
    rng = random.Random(0)
    run_dir = tmp_path / "stormy-0"
    reached: list[int] = []  # the last step that was logged before each kill
    ends = 0
    while len(reached) < kills:
        before = steps(run_dir)[-1] if steps(run_dir) else 0
        target = min(before + rng.randint(0, 5), STEPS)
        child = forks.start(*command(run_dir))
        if target == before:  # while it starts, and reads what there is; or while it evaluates and exports
            time.sleep(rng.uniform(0.0, 1.0))
        else:  # in a step, or while it saves
            forks.wait_until(lambda run_dir=run_dir, target=target: steps(run_dir)[-1:] >= [target])
            time.sleep(rng.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)  # where it has ended it is a zombie, which a signal does not bother
        code = forks.ended(child)
        assert code in (exits.DONE, -signal.SIGKILL), forks.log.read_text()[-2000:]
        if code == exits.DONE:
            same(run_dir, calm)
            ends += 1
            run_dir = tmp_path / f"stormy-{ends}"
            continue
        reached.append(steps(run_dir)[-1] if steps(run_dir) else 0)
        assert steps(run_dir) == list(range(1, reached[-1] + 1))
        assert all(checkpoint.step % 2 == 0 for checkpoint in committed(run_dir / "checkpoints"))
    assert forks.run(*command(run_dir)) == exits.DONE
    same(run_dir, calm)
    assert len(set(reached)) > kills / 4  # they fell into different steps


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        signal.SIGINT,
        pytest.param(
            signal.SIGHUP,
            marks=pytest.mark.skipif(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, reason="nohup ignores SIGHUP"),
        ),
    ],
)
def test_a_signal_saves_and_the_same_command_goes_on(
    number: signal.Signals, forks: Forks, command: Command, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = [*command(run_dir), "checkpoint.every=1000"]
    child = forks.start(*arguments)
    forks.wait_until(lambda: len(read_metrics(run_dir)) >= 3)
    os.kill(child, number)
    assert forks.ended(child) == exits.STOPPED == 75
    (saved,) = committed(run_dir / "checkpoints")
    assert 3 <= saved.step == steps(run_dir)[-1] < STEPS
    assert not (run_dir / "summary.json").exists() and not (run_dir / "model").exists()
    assert f"the same command with run.dir={run_dir} goes on from there" in forks.log.read_text()

    assert forks.run(*arguments) == exits.DONE
    assert forks.run(*command(tmp_path / "calm")) == exits.DONE
    same(run_dir, tmp_path / "calm")
    before = json.loads((run_dir / "env.json").read_text())["before"]
    assert len(before) == 1  # env.json tells of both starts


def test_under_nohup_a_closed_terminal_is_no_signal_to_stop() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert exits.stopping() == [signal.SIGTERM, signal.SIGINT]
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signal.SIGHUP in exits.stopping()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_before_the_first_step_stops_as_well(forks: Forks, command: Command, tmp_path: Path) -> None:
    child = forks.start(*command(tmp_path / "run"))
    forks.wait_until((tmp_path / "run" / ".lock").exists)
    os.kill(child, signal.SIGTERM)
    assert forks.ended(child) == exits.STOPPED
    assert forks.run(*command(tmp_path / "run")) == exits.DONE


def test_a_signal_to_a_sweep_stops_its_job_and_starts_no_other(forks: Forks, command: Command, tmp_path: Path) -> None:
    jobs = [tmp_path / "sweep" / f"algo.alpha={alpha}" for alpha in ("0.1", "1")]
    arguments = [
        *command(tmp_path / "sweep"),
        "-m",
        "algo.alpha=0.1,1",
        "train.steps=100000",
        "checkpoint.every=100000",
    ]
    child = forks.start(*arguments)
    forks.wait_until(lambda: steps(jobs[0]))
    os.kill(child, signal.SIGTERM)  # to the sweep alone, as a batch system sends it
    assert forks.ended(child) == exits.STOPPED
    (saved,) = committed(jobs[0] / "checkpoints")
    assert saved.step == steps(jobs[0])[-1]
    assert not jobs[1].exists()


def test_a_finished_run_is_not_run_again(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*command(tmp_path / "run"), "train.steps=2"]
    assert align(*arguments) == exits.DONE
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    capsys.readouterr()
    assert align(*arguments) == exits.DONE
    assert capsys.readouterr().out == f"{tmp_path / 'run'} is finished already\n"
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_resume_never_refuses_a_directory_with_a_run(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*command(tmp_path / "run"), "train.steps=2", "resume=never"]
    assert align(*arguments) == exits.DONE
    assert align(*arguments) == exits.USER
    assert "holds a run already. Use resume=auto to go on with it, or a new folder." in capsys.readouterr().err


def test_what_does_not_change_the_result_may_change_at_a_resume(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert align(*command(run_dir), "launch=prepare") == exits.DONE
    assert align(*command(run_dir), "train.lr=2e-3") == exits.USER
    assert "train.lr: 0.001 -> 0.002" in capsys.readouterr().err
    assert align(*command(run_dir), "checkpoint.every=7", "track.every=5") == exits.DONE
    assert steps(run_dir) == [1, 5, 10, 15, 20, 25, 30]


def test_a_damaged_checkpoint_is_passed_over(
    forks: Forks, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    child = forks.start(*command(run_dir))
    forks.wait_until(lambda: len(committed(run_dir / "checkpoints")) == 2)
    os.kill(child, signal.SIGKILL)
    forks.ended(child)
    newest = committed(run_dir / "checkpoints")[0]
    file = newest.folder / "engine.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert align(*command(run_dir)) == exits.DONE
    assert f"step_{newest.step:08d} is damaged (wrong hash: engine.safetensors)" in capsys.readouterr().err
    assert align(*command(tmp_path / "calm")) == exits.DONE
    same(run_dir, tmp_path / "calm")


@pytest.mark.parametrize("changed", ["data.path", "model.path", "reference.path"])
def test_a_run_does_not_go_on_with_other_data_or_weights(
    changed: str, tiny_model: Path, ragged_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    rows = Path(shutil.copy(ragged_file, tmp_path / "rows.jsonl"))
    given = overrides(model, rows, tmp_path / "run", "train.steps=4", "checkpoint.every=1")
    if changed == "reference.path":
        model = Path(shutil.copytree(tiny_model, tmp_path / "reference"))
        given += ["reference=frozen", f"reference.path={model}"]
    assert align("train", *given) == exits.DONE
    (tmp_path / "run" / "summary.json").unlink()
    if changed == "data.path":
        rows.write_text("\n".join(reversed(rows.read_text().splitlines())) + "\n")
    else:
        build_model(model, seed=1)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert align("train", *given) == exits.USER
    assert f"what {changed} names has changed" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_run_that_began_on_a_gpu_does_not_go_on_without_one(
    forks: Forks, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    child = forks.start(*command(run_dir))
    forks.wait_until(lambda: len(committed(run_dir / "checkpoints")) == 1)
    os.kill(child, signal.SIGTERM)
    forks.ended(child)
    for checkpoint in committed(run_dir / "checkpoints"):
        state = checkpoint.folder / "state.json"
        state.write_text(state.read_text().replace('"device": "cpu"', '"device": "cuda"'))
        manifest = json.loads((checkpoint.folder / "manifest.json").read_text())
        for entry in manifest["files"]:
            content = (checkpoint.folder / entry["name"]).read_bytes()
            entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (checkpoint.folder / "manifest.json").write_text(json.dumps(manifest))
    assert align(*command(run_dir)) == exits.USER
    assert "the run began on cuda, and this machine offers it cpu" in capsys.readouterr().err


def test_a_run_killed_after_its_last_step_trains_no_more(tiny_model: Path, ragged_file: Path, tmp_path: Path) -> None:
    given = overrides(tiny_model, ragged_file, tmp_path / "run", "train.steps=5", "checkpoint.every=100")
    assert align("train", *given) == exits.DONE
    whole = weights(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "model")
    assert [checkpoint.step for checkpoint in committed(tmp_path / "run" / "checkpoints")] == [5]
    assert align("train", *given) == exits.DONE
    assert largest_difference(weights(tmp_path / "run"), whole) == 0.0
    assert len(losses(tmp_path / "run")) == 5
