"""What each rank runs: `python -m align_cli.worker RUN`, under torchrun, under srun, or started by `align train`.

`--score` behind it fills the cache of the reference and does not train; `--plugin PACKAGE` names the packages of parts
that `align train` was given.

The resolved configuration in the run directory says everything; Hydra is not imported here.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from align_cli import process

if __name__ == "__main__":
    process.settle()  # before torch, which the modules below import

from align_cli import cache, config, distributed, exits, paths, rundir, terminal
from align_cli.checkpoints import committed
from align_cli.errors import Stopped, UserError

if TYPE_CHECKING:
    from align_cli.experiment import Experiment

LOCKED = "ALIGN_RUN_IS_LOCKED_BY"  # the process number of `align train`, whose lock this process has inherited


def main(argv: list[str]) -> int:
    """Run one rank on a prepared run directory.

    Args:
        argv: the run directory, `--score` to score alone, and packages of parts, each behind `--plugin`.

    Returns:
        The exit code (`align_cli.exits`).
    """
    scores = argv[1:2] == ["--score"]
    if scores:
        argv = [argv[0], *argv[2:]]
    if len(argv) % 2 == 0 or any(flag != "--plugin" for flag in argv[1::2]):
        terminal.error(
            "usage: python -m align_cli.worker RUN [--score] [--plugin PACKAGE], "
            "a directory that align train launch=prepare has made"
        )
        return exits.USER
    terminal.quiet_libraries()
    if LOCKED in os.environ:
        distributed.die_with_parent(int(os.environ[LOCKED]))
    return exits.guarded(lambda: work(Path(argv[0]), argv[2::2], scores=scores))


def adopt_slurm() -> None:
    """Under srun, say in torch's words which rank this is; MASTER_ADDR and MASTER_PORT come from the job script.

    Raises:
        UserError: srun started several tasks and no address to meet at is set.
    """
    environment = os.environ
    if "RANK" in environment or "SLURM_PROCID" not in environment:
        return
    tasks = environment.get("SLURM_NTASKS", "1")  # a batch script that asked for none has one
    if tasks != "1" and "MASTER_ADDR" not in environment:
        raise UserError("srun started several tasks, but MASTER_ADDR is not set; set it to the first node's name.")
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment.get("SLURM_LOCALID", "0")
    environment["WORLD_SIZE"] = tasks
    environment.setdefault("MASTER_PORT", "29500")


def work(run_dir: Path, packages: Sequence[str], *, scores: bool) -> int:
    """Join the other ranks and run; rank 0 claims the directory where `align train` has not done so."""
    adopt_slurm()
    config.use(packages)
    rundir.read_config(run_dir)
    free = os.environ.get("RANK", "0") == "0" and LOCKED not in os.environ
    with exits.terminable(), cache.in_use(paths.cache()), rundir.lock(run_dir) if free else nullcontext():
        return _work(run_dir, scores=scores)


def _work(run_dir: Path, *, scores: bool) -> int:
    from align_cli import reading, resources
    from align_cli.run import prepare, run, score

    if rundir.read_summary(run_dir) is not None:
        if os.environ.get("RANK", "0") == "0":
            terminal.result(f"{run_dir} is finished already")
        return exits.DONE
    plan = reading.read(rundir.read_config(run_dir))
    problems = [*resources.needs_gpu(plan), *_wrong_ranks(plan, run_dir)]
    if problems:
        raise UserError("\n".join(problems))
    device = distributed.local_device(plan.launch.accelerator)
    if plan.engine.stage is not None:
        distributed.join(device)
    try:
        # `align train` has prepared the run and said so.
        prepared = prepare(plan, terminal.silent if LOCKED in os.environ else terminal.say)
        if LOCKED not in os.environ and distributed.rank() == 0:
            rundir.write_env(run_dir, device=device.type, ranks=distributed.world(), data=prepared.train.report)
        if scores:
            score(prepared)
        else:
            run(prepared, run_dir)
    except Stopped as stopped:  # all ranks come here together
        distributed.leave()
        if LOCKED not in os.environ:  # started by torchrun or srun: the command names the directory
            raise Stopped(str(stopped)) from None
        raise
    # After an error nobody takes leave: its peers may wait in an exchange with this rank, and it with them for the end
    # of it, while the launcher waits for a rank that has ended.
    distributed.leave()
    return exits.DONE


def _wrong_ranks(plan: "Experiment", run_dir: Path) -> list[str]:
    """What is wrong with the number of ranks that were started."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if plan.engine.stage is None and ranks > 1:
        return [f"engine=torch runs in one process; {ranks} were started. Prepare the run with engine=zero0 to zero3."]
    if plan.launch.devices is not None and plan.launch.devices != ranks:
        return [f"{run_dir} is prepared for launch.devices={plan.launch.devices}; {ranks} ranks were started."]
    saved = [checkpoint.ranks for checkpoint in committed(run_dir / "checkpoints")[:1]]
    return [
        f"{run_dir}: its checkpoints are of {there} rank(s); {ranks} were started." for there in saved if there != ranks
    ]


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except Exception:  # memory that ran out, or what nobody expected: it ends as fast as what was expected
        traceback.print_exc()
        code = exits.FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is written and closed. Threads of the communication library that are still about abort an ordinary exit
    # now and then ("terminate called without an active exception"), and the launcher would take it for a failure.
    os._exit(code)
