"""A run directory is used by one process, and its files are old or new, never half."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from align_cli import rundir
from align_cli.errors import UserError

HOLDER = """
import sys, time
from pathlib import Path
from align_cli.rundir import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_told_who_holds_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        assert rundir.holder(run) == f"process {process.pid} on {os.uname().nodename}"
        with (
            pytest.raises(UserError, match=rf"is in use by process {process.pid} on .*another run\.dir"),
            rundir.lock(run),
        ):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert rundir.holder(run) is None
    with rundir.lock(run):  # the lock of a killed process is taken over
        assert rundir.holder(run) == f"process {os.getpid()} on {os.uname().nodename}"
    assert rundir.holder(run) is None
    assert rundir.is_empty(run)


def test_a_file_system_without_locks_is_said_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with rundir.lock(tmp_path / "run"):
        assert rundir.holder(tmp_path / "run") is None
    assert "without locks; start no second run there" in capsys.readouterr().err


def test_a_run_starts_only_in_an_empty_folder(tmp_path: Path) -> None:
    assert rundir.is_empty(tmp_path / "absent")
    assert rundir.is_empty(tmp_path)
    (tmp_path / "thesis.tex").touch()
    assert not rundir.is_empty(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        rundir.is_empty(tmp_path / "thesis.tex")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    rundir.write_atomic(path, "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        rundir.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_configuration_reads_back_as_it_was_written(tmp_path: Path) -> None:
    config = {"algo": {"name": "nca", "alpha": 1e-5, "β": None}, "data": {"paths": ["a", "b: c"]}, "resume": "auto"}
    rundir.write_config(tmp_path, config)
    assert rundir.read_config(tmp_path) == config


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("algo:\n  _target_: builtins.open\n", r"'algo\._target_' would choose code"),
        ("model:\n- {_partial_: true}\n", r"'model\[0\]\._partial_' would choose code"),
        ("hydra:\n  callbacks: {}\n", "'hydra' node"),
        ("run:\n  dir: ${oc.env:HOME}\n", r"'run\.dir' holds the interpolation"),
        ("- 1\n", "holds list"),
        ("a: [1\n", "is not YAML"),
        ("!!python/object/apply:os.system [echo]\n", "is not YAML"),
    ],
)
def test_a_configuration_that_would_run_code_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=complaint):
        rundir.read_config(tmp_path)


def test_a_folder_without_a_configuration_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.yaml"):
        rundir.read_config(tmp_path)


def test_differences_name_the_key_and_both_values() -> None:
    old = {"algo": {"beta": 0.1}, "run": {"dir": "a"}, "train": {"steps": 5}}
    new = {"algo": {"beta": 0.2}, "run": {"dir": "b"}, "train": {"steps": 5, "lr": 1.0}}
    assert rundir.differences(old, new, ignore=["run"]) == ["algo.beta: 0.1 -> 0.2", "train.lr: absent -> 1.0"]


def test_the_environment_names_versions_and_device_and_keeps_what_was_before(tmp_path: Path) -> None:
    command = ["align", "train", "algo=nca", "hub.token=abc"]
    rundir.write_env(tmp_path, device="cpu", ranks=1, data={"rows": 7}, command=command)
    rundir.write_env(tmp_path, device="gpu", ranks=2, data={}, command=command)
    rundir.write_env(tmp_path, device="cpu", ranks=2, data={}, command=command)
    environment = json.loads((tmp_path / "env.json").read_text())
    assert environment["command"] == ["align", "train", "algo=nca", "hub.token=***"]
    assert environment["versions"]["torch"].startswith("2.")
    assert [before["device"] for before in environment["before"]] == ["cpu", "gpu"]
    assert environment["before"][0]["data"] == {"rows": 7}
    assert "before" not in environment["before"][0]


def test_a_summary_is_flat_and_strict_json(tmp_path: Path) -> None:
    rundir.write_summary(tmp_path, {"steps": 3, "loss/last": float("nan"), "low": float("-inf"), "note": None})
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"steps": 3, "loss/last": "nan", "low": "-inf", "note": None}
    assert rundir.read_summary(tmp_path) == json.loads(text)
    assert rundir.read_summary(tmp_path / "absent") is None
    with pytest.raises(TypeError, match="'eval' is a dict"):
        rundir.write_summary(tmp_path, {"eval": {"a": 1}})  # pyright: ignore[reportArgumentType]
