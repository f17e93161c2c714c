"""From a composed configuration to running ranks: check, claim the directory, prepare, start.

Composition happens once, here. Ranks read the resolved file in the run directory, so they cannot disagree about it,
and that file alone repeats or resumes the run.
"""

import datetime
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from align_cli import cache, config, distributed, exits, paths, reading, resources, rundir, terminal, worker
from align_cli.checkpoints import committed
from align_cli.config import Tree
from align_cli.errors import UserError
from align_cli.experiment import Experiment
from align_cli.models.causal import commit_of, read_architecture
from align_cli.run import Prepared, prepare, run, score

# What may differ between a run and its resumption: it does not change what is computed.
FREE = ("resume", "track", "checkpoint", "run.dir", "launch.name", "source.keep")
LOCATED = ("model", "data", "reference", "source", "scorer")  # sections whose `path`, `paths` or `model` may be local
LAST_WORDS = 15  # lines of a failing rank's log that are shown
GRACE = 25.0  # seconds that ranks have to save after a signal, before they are killed


def launch(tree: Tree, command: Sequence[str]) -> int:
    """Start or resume the run that the configuration describes.

    Args:
        tree: composed and resolved.
        command: the arguments as the user gave them, for the record.

    Returns:
        An exit code.

    Raises:
        UserError: before anything is loaded or overwritten.
    """
    tree = reading.placed(tree, default_dir(tree))
    checked = reading.read(tree)
    problems = [] if checked.launch.name == "prepare" else resources.needs_gpu(checked)
    if problems:
        raise UserError("\n".join(problems))
    refuse_foreign_ranks("train")
    tell_choice(checked)
    run_dir = Path(checked.run.dir)
    device = distributed.device_type(checked.launch.accelerator)
    claimable(run_dir)
    made = not run_dir.exists()
    with exits.terminable(), cache.in_use(paths.cache()), rundir.lock(run_dir) as held:
        new = not (run_dir / rundir.CONFIG).is_file()
        try:
            if finished(checked, run_dir):
                return exits.DONE
            checked = pinned(checked)
            prepared = prepare(checked)
            rundir.write_config(run_dir, located(checked.tree))
            ranks = resources.devices(checked)
            rundir.write_env(run_dir, device=device, ranks=ranks, data=prepared.train.report, command=command)
            if checked.launch.name == "prepare":
                told = shlex.join([str(run_dir), *config.plugins()])
                terminal.result(f"prepared {run_dir} for {ranks} rank(s). On each node, with its own addresses:")
                terminal.result(f"  torchrun --nnodes=N --nproc-per-node=M ... -m align_cli.worker {told}")
                return exits.DONE
            code = inline(prepared, run_dir) if ranks == 1 else spawn(run_dir, ranks, held)
        except UserError:
            if new:
                rundir.forget(run_dir, made=made)
            raise
        if new and code == exits.USER:
            rundir.forget(run_dir, made=made)
    if code == exits.DONE:
        conclude(run_dir)
    return code


def pinned(checked: Experiment) -> Experiment:
    """With the commit of the hub that a model without a revision has now, so that the run resumes with these weights.

    Raises:
        UserError: the model cannot be read.
    """
    model = checked.model
    if model.revision is not None or model.path == "world" or Path(model.path).is_dir():
        return checked
    read_architecture(model)
    commit = commit_of(model)
    tree = {**checked.tree, "model": {**checked.tree["model"], "revision": commit}}
    return replace(checked, tree=tree, model=replace(model, revision=commit))


def tell_choice(checked: Experiment) -> None:
    """Say which ZeRO stage was chosen for several ranks and why.

    Raises:
        UserError: not even the strongest fits.
    """
    choice = checked.choice
    if choice is None or checked.engine.stage is None:
        return
    if not choice.fits:
        raise UserError(
            f"{choice.reason}. align plan tells what would help; launch.memory_gb corrects the memory of a device, and "
            f"engine={checked.engine.name}, if named, is started all the same."
        )
    terminal.say(choice.reason)


def refuse_foreign_ranks(command: str) -> None:
    """Refuse to start ranks where torchrun or srun has started this process as one."""
    several = os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"
    if several or ("RANK" in os.environ and "WORLD_SIZE" in os.environ):
        raise UserError(
            f"align {command} starts its ranks itself; under torchrun or srun, prepare the run with launch=prepare and "
            "start `python -m align_cli.worker RUN`."
        )


def fill(tree: Tree) -> int:
    """Measure the reference of everything that the data holds, on as many ranks as a run would have.

    Args:
        tree: composed and resolved; its run directory is not touched.

    Returns:
        An exit code.

    Raises:
        UserError: before anything is loaded; also where a run would not look into the cache.
    """
    checked = reading.read(reading.placed(tree, "unused"))
    problems = resources.needs_gpu(checked)
    if checked.reference.name != "cached":
        problems.append(f"reference={checked.reference.name}: nothing is kept; align score fills reference=cached.")
    elif "reference" not in checked.made:
        problems.append(f"algo={checked.algorithm} has no reference; use one that has, such as algo=dpo.")
    if checked.launch.name == "prepare":
        problems.append("launch=prepare: align score starts its ranks itself; use launch=local.")
    if problems:
        raise UserError("\n".join(problems))
    refuse_foreign_ranks("score")
    tell_choice(checked)
    with (
        exits.terminable(),
        cache.in_use(paths.cache()),
        tempfile.TemporaryDirectory(prefix="align-score-") as folder,
        rundir.lock(Path(folder)) as held,
    ):
        prepared = prepare(checked)
        ranks = resources.devices(checked)
        if ranks == 1:
            return inline(prepared, None)
        run = {**checked.tree["run"], "dir": folder}
        rundir.write_config(Path(folder), located({**checked.tree, "run": run}))
        return spawn(Path(folder), ranks, held, ("--score",))


def located(tree: Tree) -> Tree:
    """The configuration with local files and folders by their whole path, so that it means the same from anywhere."""

    def whole(path: Any) -> Any:
        if isinstance(path, list):
            return [whole(each) for each in path]
        return paths.whole(path) if isinstance(path, str) and path != "world" else path

    def placed(section: Any) -> Any:
        if not isinstance(section, dict):
            return section
        return section | {key: whole(section[key]) for key in ("path", "paths", "model") if key in section}

    return {name: placed(section) if name in LOCATED else section for name, section in tree.items()}


def default_dir(tree: Tree) -> str:
    """runs/<time>-<algo>-<model>-<data>, a name that no earlier run has."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    names = [str(tree[group].get("name")) if isinstance(tree.get(group), dict) else group for group in _NAMED]
    return str(Path("runs") / "-".join([now, *names]))


_NAMED = ("algo", "model", "data")


def claimable(run_dir: Path) -> None:
    """Refuse a folder that holds something else than a run."""
    if not rundir.is_empty(run_dir) and not (run_dir / rundir.CONFIG).is_file():
        raise UserError(f"run.dir={run_dir} is not empty and holds no run. Choose a new folder.")


def finished(checked: Experiment, run_dir: Path) -> bool:
    """`is_finished`, said to the user."""
    done = is_finished(checked, run_dir)
    if done:
        terminal.result(f"{run_dir} is finished already")
    return done


def is_finished(checked: Experiment, run_dir: Path) -> bool:
    """Whether the directory holds this run already, finished; an unfinished one is checked for resumption.

    Raises:
        UserError: it holds another run, or one that may not or cannot be resumed.
    """
    if not (run_dir / rundir.CONFIG).is_file():
        return False
    if checked.tree["resume"] == "never":
        raise UserError(f"run.dir={run_dir} holds a run already. Use resume=auto to go on with it, or a new folder.")
    changed = rundir.differences(rundir.read_config(run_dir), located(checked.tree), ignore=FREE)
    if changed:
        raise UserError(
            f"run.dir={run_dir} holds a run with another configuration: {'; '.join(changed)}. "
            "Give the same configuration to resume it, or a new folder."
        )
    if rundir.read_summary(run_dir) is not None:
        return True
    for checkpoint in committed(run_dir / "checkpoints")[:1]:
        ranks = resources.devices(checked)
        if checkpoint.ranks != ranks:
            same = f"launch.devices={checkpoint.ranks}"
            if checked.launch.devices is None:  # as it was when the run began, or the configurations would differ
                same = f"as many devices visible (CUDA_VISIBLE_DEVICES) as then, {checkpoint.ranks}"
            raise UserError(
                f"run.dir={run_dir}: its checkpoints are of {checkpoint.ranks} rank(s), launch.devices gives {ranks}. "
                f"Resume with {same}."
            )
    return False


def inline(prepared: Prepared, run_dir: Path | None) -> int:
    """Run in this process, alone; without a run directory, score."""
    checked = prepared.experiment
    if checked.engine.stage is not None:
        distributed.join(distributed.local_device(checked.launch.accelerator))
    try:
        if run_dir is None:
            score(prepared)
        else:
            run(prepared, run_dir)
    finally:
        distributed.leave()
    return exits.DONE


def spawn(run_dir: Path, ranks: int, held: int, flags: Sequence[str] = ()) -> int:
    """Start a process for each rank on this machine and wait; rank 0 speaks, the others write into RUN/ranks/.

    Args:
        held: descriptor of the directory's lock, which the ranks keep while they live.
        flags: of `align_cli.worker`.

    Returns:
        0 if all ranks ended well, else the first failing rank's code; the other ranks are then stopped.
    """
    logs = run_dir / "ranks"
    logs.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // ranks))),
    }
    processes: list[subprocess.Popen[bytes]] = []
    begun: list[int] = []  # where this start begins in each rank's log, which an earlier one may have written to
    for rank in range(ranks):
        with open(logs / f"rank_{rank}.log" if rank else os.devnull, "ab") as log:
            log.write(f"--- {datetime.datetime.now().astimezone().isoformat(timespec='seconds')}\n".encode())
            log.flush()
            begun.append(log.tell())
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "align_cli.worker", str(run_dir), *flags, *config.plugins()],
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), worker.LOCKED: str(os.getpid())},
                    pass_fds=(held,),
                    stdout=None if rank == 0 else log,
                    stderr=None if rank == 0 else log,
                    start_new_session=True,
                )
            )
    code, failed = _wait(processes)
    if failed is None:
        return code
    ended = processes[failed].returncode
    how = f"with exit code {ended}" if ended > 0 else f"by signal {-ended} ({signal.Signals(-ended).name})"
    terminal.error(f"rank {failed} ended {how}; the other ranks were stopped")
    said = (logs / f"rank_{failed}.log").read_bytes()[begun[failed] :] if failed else b""
    for line in said.decode(errors="replace").strip().splitlines()[-LAST_WORDS:]:
        terminal.say(f"  rank {failed}: {line}")
    return code


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int | None]:
    """Wait for all, passing signals on; the first failure stops the rest, a second Ctrl-C kills them.

    Returns:
        The run's exit code, and the rank that failed first.
    """
    asked: list[int] = []
    failed: int | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL if asked.count(signal.SIGINT) > 1 else signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in exits.stopping()}
    try:
        while any(process.poll() is None for process in processes):
            failed = _first_failure(processes)
            if failed is not None:
                _stop(processes)
                break
            time.sleep(0.05)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if failed is None:
        failed = _first_failure(processes)
    codes = [process.returncode for process in processes]
    # A rank that was not yet ready to save has ended at once, and the others with an error because it left.
    if asked and any(code in (exits.STOPPED, -signal.SIGTERM, -signal.SIGKILL) for code in codes):
        return exits.STOPPED, None
    if failed is not None:
        return max(codes[failed], 0) or exits.FAILED, failed
    return exits.STOPPED if exits.STOPPED in codes else exits.DONE, None


def _first_failure(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """The first rank that has ended otherwise than by finishing or saving; one that was killed before others."""
    codes = [process.poll() for process in processes]
    bad = [(code, rank) for rank, code in enumerate(codes) if code not in (None, exits.DONE, exits.STOPPED)]
    # The peers of a rank that was killed, or given a mistake, fail a moment later and for its sake.
    return min(bad, key=lambda one: (one[0] >= 0, one[0] != exits.USER, one[1]))[1] if bad else None


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:  # it waits in a collective for the rank that failed
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def conclude(run_dir: Path) -> None:
    """The last lines of a run: its result and what to type next."""
    summary = rundir.read_summary(run_dir)
    assert summary is not None
    for line in result_lines(summary):
        terminal.result(line)
    terminal.result(f"model in {run_dir / 'model'}; next: align show {run_dir}")


FIGURES = {
    "alignment": "held-out mean rating",
    "exact_match": "held-out exact match",
    "reward": "held-out mean reward",
}  # figure with an interval -> what it is called


def result_lines(summary: dict[str, rundir.Scalar]) -> list[str]:
    """What a person wants to know of a finished run."""
    sampled = "eval/after/alignment" in summary  # the value of a loss on samples means nothing
    steps = f"{summary['steps']} steps"
    lines = [] if sampled else [f"loss {summary['loss/first']:.4f} -> {summary['loss/last']:.4f} in {steps}"]
    for name, text in FIGURES.items():
        keys = [f"eval/{when}/{name}{end}" for when in ("before", "after") for end in ("", "_low", "_high")]
        if all(key in summary for key in keys):
            before, b_low, b_high, after, a_low, a_high = (float(str(summary[key])) for key in keys)
            lines.append(
                f"{text}: {before:.3f} [{b_low:.3f}, {b_high:.3f}] -> {after:.3f} [{a_low:.3f}, {a_high:.3f}]  (95 %)"
            )
    if sampled:
        kl = float(str(summary["eval/after/rollout/kl"]))
        lines.append(f"{kl:.2f} nats of KL to the start, after {steps}")
    agreed = [summary.get(f"eval/{when}/rewards/accuracies") for when in ("before", "after")]
    if None not in agreed and "displacement/chosen" not in summary:  # a reward model
        before, after = (float(str(share)) for share in agreed)
        lines.append(f"held-out preferences that it agrees with: {before:.1%} -> {after:.1%}")
    if "displacement/chosen" in summary:
        lines.append(
            f"chosen responses on held-out prompts moved by {float(str(summary['displacement/chosen'])):+.2f} nats; "
            f"{float(str(summary['displacement/fraction_down'])):.0%} became less likely"
        )
    return lines
