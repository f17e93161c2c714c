"""How a rank ends: together with the others where all end, and at once where it alone fails."""

import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import align, overrides

from align_cli import distributed, exits, run, worker
from align_cli.errors import RunError, Stopped, UserError

ENDS: dict[str, tuple[Exception | None, int]] = {
    "done": (None, exits.DONE),
    "stopped": (Stopped("stopped by a signal"), exits.STOPPED),
    "refused": (UserError("a mistake"), exits.USER),
    "failed": (RunError("the disk is full"), exits.FAILED),
}


@pytest.fixture
def prepared(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> str:
    """A run that is prepared and not started."""
    run_dir = tmp_path / "run"
    assert align("train", *overrides(tiny_model, pairs_file, run_dir, "algo=sft", "launch=prepare")) == exits.DONE
    return str(run_dir)


@pytest.mark.parametrize("name", ENDS)
def test_a_rank_takes_leave_of_the_others_only_where_all_of_them_do(
    name: str, prepared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, code = ENDS[name]
    left: list[str] = []

    def ends(*_: object) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(run, "run", ends)
    monkeypatch.setattr(distributed, "leave", lambda: left.append(name))
    assert worker.main([prepared]) == code
    assert left == ([name] if name in ("done", "stopped") else [])


UNEXPECTED = """
import atexit, runpy
from align_cli import exits

def guarded(command):
    raise MemoryError("no memory is left")

exits.guarded = guarded
atexit.register(print, "an ordinary exit")
runpy.run_module("align_cli.worker", run_name="__main__")
"""


def test_a_rank_that_fails_unexpectedly_says_why_and_waits_for_no_thread() -> None:
    ended = subprocess.run([sys.executable, "-c", UNEXPECTED, "run"], capture_output=True, text=True)
    assert ended.returncode == exits.FAILED and ended.stdout == ""
    assert "Traceback" in ended.stderr and ended.stderr.splitlines()[-1] == "MemoryError: no memory is left"
