"""`align` in a process of its own, started in milliseconds: a server that has imported everything forks for each one.

A fresh interpreter spends some six seconds on importing torch and transformers before it does anything, twenty kills
at random moments would take minutes, and most would fall into the imports. The server is not the test's own process,
which has threads, and a fork of those is not safe.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HANGS = 1200  # seconds after which what has not ended is taken for stuck, on the slowest of machines


class Forks:
    """The test's side. Children are the server's; what they say goes to `log`."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._ask("ready")

    def _ask(self, what: str, *given: Any) -> int:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps([what, *given]) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, *arguments: str, log: Path | None = None) -> int:
        """Start `align` here and in this environment, its words going to `log` or to that of all.

        Returns:
            Its process number.
        """
        return self._ask("start", arguments, str(log or self.log), os.getcwd(), dict(os.environ))

    def ended(self, child: int) -> int:
        """Wait for a child; its exit code, or minus the signal that ended it."""
        return self._ask("wait", child)

    def run(self, *arguments: str) -> int:
        """Start and wait."""
        return self.ended(self.start(*arguments))

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Look every few milliseconds, until it is taken for stuck."""
        deadline = time.monotonic() + HANGS
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()[-2000:]
            time.sleep(0.005)

    def close(self) -> None:
        """End the server."""
        self.server.communicate()


class Forked:
    """What `subprocess.Popen` gives, of a child of the server that forks."""

    def __init__(self, forks: Forks, arguments: tuple[str, ...], log: Path) -> None:
        self.forks = forks
        self.pid = forks.start(*arguments, log=log)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, once it has ended."""
        state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] if not self._known else ""
        if state == "Z":
            self.returncode = self.forks.ended(self.pid)
        return self.returncode

    @property
    def _known(self) -> bool:
        return self.returncode is not None

    def kill(self) -> None:
        """As `Popen` has it."""
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        """As `Popen` has it."""
        os.kill(self.pid, number)


def serve() -> None:
    """Answer the test's questions until it goes away."""
    import accelerate  # noqa: F401
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # which ZeRO looks for, seconds of imports
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    import wandb  # noqa: F401

    from align_cli import config, launch  # noqa: F401

    torch.set_num_threads(1)
    config.compose("train", ["model=hf", "model.path=none"])  # Hydra keeps what it has parsed
    for line in sys.stdin:
        what, *given = json.loads(line)
        answer = 0
        if what == "start":
            answer = fork(given[0], Path(given[1]), given[2], given[3])
        if what == "wait":
            answer = os.waitstatus_to_exitcode(os.waitpid(given[0], 0)[1])
        print(json.dumps(answer), flush=True)


def fork(arguments: Sequence[str], log: Path, folder: str, environment: dict[str, str]) -> int:
    """`align` in a child that works in `folder` and sees this environment; returns its process number."""
    child = os.fork()
    if child:
        return child
    os.chdir(folder)
    os.environ.clear()  # the server was started in that of some other test
    os.environ.update(environment)
    with open(os.devnull) as nothing, open(log, "a") as words:
        os.dup2(nothing.fileno(), 0)
        os.dup2(words.fileno(), 1)
        os.dup2(words.fileno(), 2)
    sys.argv = ["align", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from align_cli import cli

    try:
        cli.main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code or 0))
    finally:  # an error: whatever it is, this child must not become a second server
        sys.excepthook(*sys.exc_info())  # pyright: ignore[reportArgumentType]
        os._exit(1)


if __name__ == "__main__":
    serve()
