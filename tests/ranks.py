"""Two ranks that live through many prepared runs: `python ranks.py PARENT FOLDER RUN...` under MASTER_ADDR.

Importing torch, transformers and DeepSpeed costs more than a small run, so the runs of a test share their processes,
and the ranks their imports: one process imports, and forks before anything has begun a thread.
"""

import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import torch
from forks import HANGS

from align_cli import distributed, reading, rundir, terminal
from align_cli.run import prepare, run


def rank(run_dirs: list[str]) -> None:
    """Run one after the other, as `align_cli.worker` runs one."""
    distributed.join(distributed.local_device("cpu"))
    for run_dir in run_dirs:
        run(prepare(reading.read(rundir.read_config(Path(run_dir)))), Path(run_dir))
    distributed.leave()


def main(parent: int, folder: Path, run_dirs: list[str]) -> int:
    """Fork the ranks and wait for both, or until one has failed."""
    distributed.die_with_parent(parent)
    terminal.quiet_libraries()
    import deepspeed  # noqa: F401

    torch.set_num_threads(1)
    ranks = {forked(number, folder / f"{number}.log", run_dirs) for number in ("0", "1")}
    code = 0
    while ranks and code == 0:
        child, status = os.wait()
        ranks.remove(child)
        code = os.waitstatus_to_exitcode(status)
    for child in ranks:
        os.kill(child, signal.SIGKILL)
    return int(code != 0)


def forked(number: str, log: Path, run_dirs: list[str]) -> int:
    """A rank in a child of this process, its words in `log`; returns its process number."""
    parent, child = os.getpid(), os.fork()
    if child:
        return child
    code = 1
    try:
        distributed.die_with_parent(parent)
        os.environ.update(RANK=number, LOCAL_RANK=number)
        with open(log, "w") as words:
            os.dup2(words.fileno(), 1)
            os.dup2(words.fileno(), 2)
        rank(run_dirs)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def together(folder: Path, run_dirs: list[Path]) -> None:
    """Two ranks that live through all the runs; they write 0.log and 1.log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    around = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, __file__, str(os.getpid()), str(folder), *map(str, run_dirs)]
    ended = subprocess.run(
        command, env=around, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=HANGS
    )
    said = [log.read_text()[-3000:] for log in sorted(folder.glob("[01].log"))]
    assert ended.returncode == 0, "\n".join([ended.stdout, *said])


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
