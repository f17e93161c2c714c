"""One rank that lives through many prepared runs: `python ranks.py RUN...` under RANK, WORLD_SIZE and MASTER_ADDR.

Importing torch, transformers and DeepSpeed costs more than a small run, so the runs of a test share their processes.
"""

import sys
from pathlib import Path

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


if __name__ == "__main__":
    main(sys.argv[1:])
