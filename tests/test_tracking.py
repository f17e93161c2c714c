"""metrics.jsonl is the truth: a line for each step, also after a resume; W&B has the same, and no secrets."""

import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import wandb_files

from align_cli import terminal, tracking
from align_cli.errors import RunError, UserError
from align_cli.tracking import Silent, Track, Tracker

ALONE = Track(name="none", project=None, group=None, run_name=None, every=1, lines=1e9)
WANDB = Track(name="wandb", project="papers", group="alpha-beta", run_name=None, every=1, lines=1e9)
CONFIG = {"algo": {"name": "nca", "alpha": 0.1, "beta": 0.01}, "data": {"responses": 4}, "resume": None}


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def run(folder: Path, first: int, last: int, *, resumed: int | None = None, track: Track = ALONE) -> None:
    with Tracker(folder, CONFIG, track, steps=last, resumed=resumed) as tracker:
        for step in range(first, last + 1):
            tracker.log(step, {"loss": 1 / (1 + step)})
        tracker.close({"loss/last": 1 / (1 + last)})


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in tracking.read_metrics(folder)]


def test_each_line_is_on_disk_when_it_is_logged(tmp_path: Path) -> None:
    with Tracker(tmp_path, CONFIG, ALONE, steps=2, resumed=None) as tracker:
        tracker.log(0, {"eval/exact_match": 0.5})
        tracker.log(1, {"loss": 0.25, "grad_norm": float("inf")})
        text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 0, "eval/exact_match": 0.5}\n{"step": 1, "loss": 0.25, "grad_norm": "inf"}\n'


def test_a_step_has_one_line(tmp_path: Path) -> None:
    with Tracker(tmp_path, CONFIG, ALONE, steps=2, resumed=None) as tracker:
        tracker.log(1, {"loss": 1.0})
        with pytest.raises(ValueError, match="step 1 is logged after step 1"):
            tracker.log(1, {"accuracy": 1.0})


def test_a_resume_drops_the_lines_that_will_be_logged_again(tmp_path: Path) -> None:
    run(tmp_path, 1, 7)
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    run(tmp_path, 5, 9, resumed=4)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:7] == before


def test_a_restart_without_a_checkpoint_drops_every_line(tmp_path: Path) -> None:
    run(tmp_path, 0, 3)
    run(tmp_path, 0, 2)
    assert steps(tmp_path) == [0, 1, 2]


@pytest.mark.parametrize("cut", range(1, 10))
def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path: Path, cut: int) -> None:
    run(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert steps(tmp_path) == [1, 2]
    run(tmp_path, 3, 4, resumed=2)
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: this line is not JSON"):
        tracking.read_metrics(tmp_path)


def test_a_run_whose_file_is_broken_is_not_resumed_silently(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: this line is not JSON.*Mend or remove"):
        Tracker(tmp_path, CONFIG, ALONE, steps=3, resumed=3)


def test_a_service_of_wandb_that_was_killed_costs_its_curves_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Dead:
        def __getattr__(self, name: str) -> Any:
            raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(tracking, "_start_wandb", lambda *_: Dead())
    with Tracker(tmp_path, CONFIG, WANDB, steps=3, resumed=None) as tracker:
        tracker.log(1, {"loss": 0.5})
        tracker.log(2, {"loss": 0.25})
        tracker.keep()
        tracker.close({"steps": 2})
    assert steps(tmp_path) == [1, 2]
    assert capsys.readouterr().err.count("Weights & Biases has ended (Connection lost)") == 1


def test_a_mode_that_wandb_does_not_know_is_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "nowhere")
    with Tracker(tmp_path, CONFIG, WANDB, steps=1, resumed=None) as tracker:
        tracker.log(1, {"loss": 0.5})
    assert "recorded offline" in capsys.readouterr().err and list((tmp_path / "wandb").glob("offline-run-*"))


def test_progress_is_a_plain_line_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Tracker(tmp_path, CONFIG, ALONE, steps=3, resumed=None) as tracker:
        for step in (1, 2, 3):
            tracker.progress(step, 1234.5, 0.5)
    out, err = capsys.readouterr()
    assert out == ""
    # the first and the last step; between them a line every `lines` seconds
    assert err.splitlines() == [
        "step 1/3  loss 0.5000  1,234 tokens/s",
        "step 3/3  loss 0.5000  1,234 tokens/s  0:00 left",
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_full_disk_is_said_once_and_clearly(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match="No space left on device"),
        Tracker(tmp_path, CONFIG, ALONE, steps=3, resumed=None) as tracker,
    ):
        tracker._file.close()
        tracker._file = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
        tracker.log(1, {"loss": 0.5})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_line_about_what_goes_on_that_cannot_be_written_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        terminal.say("one")
        terminal.warn("another")
        monkeypatch.undo()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Tracker(tmp_path, CONFIG, ALONE, steps=3, resumed=1) as tracker:
        tracker.progress(2, 1234.5, 0.5)
        before = len(screen.getvalue())
        terminal.warn("low on disk [step 2]")
        warned = screen.getvalue()[before:]
    shown = screen.getvalue()
    assert "2/3" in shown and "1,234 tokens/s" in shown and "loss 0.5000" in shown
    # the bar is cleared, the line stands alone, and the bar is drawn again below it
    assert warned.startswith("\r\x1b[2K") and " low on disk [step 2]\nstep " in warned


def test_a_rank_that_does_not_track_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Silent() as tracker:
        tracker.log(1, {"loss": 1.0})
        tracker.progress(1, 1.0)
        tracker.close({})
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")


def test_wandb_is_offline_without_a_key_and_as_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking.wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert tracking.wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracking.wandb_mode() == "disabled"
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert tracking.wandb_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert tracking.wandb_mode() == "offline"


def test_wandb_files_hold_the_group_and_the_configuration_as_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["align", "train", "canary-in-argv"])
    monkeypatch.setenv("CANARY", "canary-in-environment")
    run(tmp_path, 1, 4, track=WANDB)
    time.sleep(1.1)  # W&B names its folders by the second
    run(tmp_path, 3, 6, resumed=2, track=WANDB)

    first, second = wandb_files.read(tmp_path)
    for read in (first, second):
        assert read["project"] == "papers" and read["group"] == "alpha-beta"
        columns = {key: value for key, value in read["config"].items() if key != "_wandb"}
        assert columns == {
            "algo.name": "nca",
            "algo.alpha": 0.1,
            "algo.beta": 0.01,
            "data.responses": 4,
            "resume": None,
        }
    assert first["id"] == second["id"] == json.loads((tmp_path / "wandb.json").read_text())["id"]
    for read, steps_logged in ((first, (1, 2, 3, 4)), (second, (3, 4, 5, 6))):
        logged = [(row["_step"], row["loss"]) for row in read["steps"]]
        assert logged == [(step, 1 / (1 + step)) for step in steps_logged]
    assert second["summary"]["loss/last"] == 1 / 7

    assert capfd.readouterr().err.splitlines() == []
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"canary" not in path.read_bytes(), path
