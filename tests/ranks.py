"""One rank that lives through many prepared runs: `python ranks.py RUN...` under RANK, WORLD_SIZE and MASTER_ADDR.

Importing torch, transformers and DeepSpeed costs more than a small run, so the runs of a test share their processes.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

from forks import HANGS

from align_cli import distributed, experiment, rundir, terminal
from align_cli.run import prepare, run


def main(run_dirs: list[str]) -> None:
    """Run one after the other, as `align_cli.worker` runs one."""
    terminal.quiet_libraries()
    distributed.die_with_parent(int(run_dirs[0]))
    distributed.join(distributed.local_device("cpu"))
    for run_dir in run_dirs[1:]:
        run(prepare(experiment.read(rundir.read_config(Path(run_dir)))), Path(run_dir))
    distributed.leave()


def together(folder: Path, run_dirs: list[Path]) -> None:
    """Two ranks that live through all the runs; they write 0.log and 1.log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks: list[subprocess.Popen[bytes]] = []
    for rank in ("0", "1"):
        with open(folder / f"{rank}.log", "wb") as log:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, __file__, str(os.getpid()), *map(str, run_dirs)],
                    env={**environment, "RANK": rank, "LOCAL_RANK": rank},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        for rank, process in enumerate(ranks):
            assert process.wait(timeout=HANGS) == 0, (folder / f"{rank}.log").read_text()[-3000:]
    finally:
        for process in ranks:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main(sys.argv[1:])
