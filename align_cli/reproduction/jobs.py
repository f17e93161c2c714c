"""A reproduction: the runs of a recipe at a scale, side by side.

Jobs are processes. What is finished is left alone, what was interrupted goes on, and a job that fails takes nothing
with it but the jobs that read its result and the verdicts that rest on it.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import torch

from align_cli import config, exits, launch, process, reading, resources, rundir, study
from align_cli.errors import UserError
from align_cli.experiment import Experiment
from align_cli.reproduction.recipe import Recipe, Run, Scale, evaluation
from align_cli.results import answers, path_of

LAST_WORDS = 3  # lines of a failed job's log that are shown
PAUSE = 0.05  # seconds between two looks at the jobs
OF_STUDY = "study"

State = str  # done, failed: WHY, stopped, not started


@dataclass(frozen=True)
class Job:
    """One seed of a run, or of the study.

    Attributes:
        run: its name.
        folder: where it writes.
        commands: the arguments of `align`, one command after the other.
        needs: folders of jobs that have to be done before.
        ranks: processes, or GPUs, that it occupies.
        finished: whether there is nothing left to do.
    """

    run: str
    seed: int
    folder: Path
    commands: tuple[tuple[str, ...], ...]
    needs: tuple[Path, ...]
    ranks: int
    finished: Callable[[], bool]


@dataclass(frozen=True)
class Reproduction:
    """A recipe at a scale, with seeds, in a folder.

    Attributes:
        shared: where runs are that other recipes may have made, or will use; None: in a folder of their own.
        shrunken: whether its models are random ones, whose figures mean nothing (`align_cli.reproduction.shrink`).
    """

    recipe: Recipe
    scale: Scale
    seeds: tuple[int, ...]
    folder: Path
    shared: Path | None
    experiments: Mapping[str, Experiment]
    config_dirs: tuple[str, ...]
    shrunken: bool

    def run_dir(self, run: Run, seed: int) -> Path:
        """The directory of one run."""
        home = self.folder / "runs" / run.folder if self.shared is None else self.shared / self._shared_name(run)
        return home / f"seed={seed}"

    def _shared_name(self, run: Run) -> str:
        """A folder's name that follows from what is computed, whatever the recipe calls it."""
        tree = self.experiments[run.name].tree
        read = [self._shared_name(other) for other in self.scale.runs if other.name in run.needs]
        told = json.dumps([{key: value for key, value in tree.items() if key != "run"}, read], sort_keys=True)
        return f"{tree['algo']['name']}-{hashlib.sha256(told.encode()).hexdigest()[:10]}"

    def arguments(self, run: Run, seed: int, folder: Path | None = None) -> list[str]:
        """The arguments of `align train` for one run.

        Args:
            folder: the reproduction's, as the command is to name it; None: as it is.
        """
        named = self
        if folder is not None:
            named = replace(self, folder=folder, shared=None if self.shared is None else folder / "runs")
        folders = {other.name: named.run_dir(other, seed) for other in self.scale.runs}
        return run.placed(seed, folders, named.run_dir(run, seed))

    def study_file(self, seed: int) -> Path:
        """The figures of one seed of the study."""
        return self.folder / "study" / f"seed={seed}.json"


def jobs(reproduction: Reproduction) -> list[Job]:
    """All jobs, a seed after the other, each after those that it needs.

    Raises:
        UserError: a run directory holds something else.
    """
    found: list[Job] = []
    trees: dict[str, config.Tree] = {}  # of runs that were composed already
    lines = zip(reproduction.scale.evaluations, reproduction.scale.evaluate, strict=True)
    asked = {choice: config.compose("evaluate", evaluation(line), reproduction.config_dirs) for choice, line in lines}
    for seed in reproduction.seeds:
        if reproduction.scale.study is not None:
            found.append(_study_job(reproduction, seed))
        found += [_run_job(reproduction, run, seed, trees, asked) for run in _in_order(reproduction.scale.runs)]
    return found


def _in_order(runs: Sequence[Run]) -> list[Run]:
    """Runs, each after those that it needs."""
    ordered: list[Run] = []

    def visit(run: Run) -> None:
        for other in runs:
            if other.name in run.needs:
                visit(other)
        if run not in ordered:
            ordered.append(run)

    for run in runs:
        visit(run)
    return ordered


def _run_job(
    reproduction: Reproduction, run: Run, seed: int, trees: dict[str, config.Tree], asked: Mapping[str, config.Tree]
) -> Job:
    run_dir = reproduction.run_dir(run, seed)
    given = reproduction.arguments(run, seed)
    flags = [*config.plugins(), *(part for each in reproduction.config_dirs for part in ("--config-dir", each))]
    commands = [("train", *flags, *given)]
    commands += [("evaluate", str(run_dir), *flags, *evaluation(line)) for line in reproduction.scale.evaluate]
    launch.claimable(run_dir)
    if (run_dir / rundir.CONFIG).is_file():
        if run.needs or run.name not in trees:
            trees[run.name] = config.compose("train", given, reproduction.config_dirs)
        tree = trees[run.name]
        launch.is_finished(reading.read({**tree, "run": {**tree["run"], "seed": seed, "dir": str(run_dir)}}), run_dir)

    def finished() -> bool:
        return rundir.read_summary(run_dir) is not None and all(
            answers(path_of(run_dir, choice), tree) for choice, tree in asked.items()
        )

    needs = tuple(reproduction.run_dir(other, seed) for other in reproduction.scale.runs if other.name in run.needs)
    ranks = resources.devices(reproduction.experiments[run.name])
    return Job(run.name, seed, run_dir, tuple(commands), needs, ranks, finished)


def _study_job(reproduction: Reproduction, seed: int) -> Job:
    chosen, file = reproduction.scale.study, reproduction.study_file(seed)
    assert chosen is not None
    study.check(file, chosen.name, chosen.options, seed)
    told = [f"{key}={json.dumps(value)}" for key, value in chosen.options.items()]
    command = ("study", chosen.name, *config.plugins(), f"seed={seed}", f"out={file}", *told)
    return Job(OF_STUDY, seed, file, (command,), (), 1, file.is_file)


# --- running


def side_by_side(planned: Sequence[Job], asked: int | None = None) -> int:
    """How many jobs run at a time: as many as are asked for, or as there are cores or GPUs for.

    Raises:
        UserError: more are asked for than there are GPUs for; what is left without one would compute on the CPU.
    """
    found = max(1, (torch.cuda.device_count() or process.cores()) // _widest(planned))
    if asked is not None and asked > found and torch.cuda.device_count():
        raise UserError(f"jobs={asked}: PyTorch sees GPUs for {found} at a time; each job needs its own.")
    return asked or found


def _widest(planned: Sequence[Job]) -> int:
    """The most ranks that a job has."""
    return max((job.ranks for job in planned), default=1)


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    step: int  # which of the job's commands
    slot: int
    log: Path


def run(planned: Sequence[Job], folder: Path, *, room: int, say: Callable[[str], None]) -> dict[Path, State]:
    """Run what is not finished, as many jobs at once as there is room for.

    A signal is passed on to every job, which saves and ends; a second Ctrl-C kills them.

    Args:
        folder: of the reproduction; what jobs say goes to its `logs`.
        room: jobs side by side.

    Returns:
        The state of each job by its folder: "done", "stopped", "not started", or "failed: " and why.
    """
    states: dict[Path, State] = {job.folder: "done" if job.finished() else "not started" for job in planned}
    waiting = [job for job in planned if states[job.folder] != "done"]
    if len(waiting) < len(planned):
        say(f"{len(planned) - len(waiting)} of {len(planned)} jobs are finished already")
    running: list[_Running] = []
    asked: list[int] = []
    begun, widest = time.monotonic(), _widest(planned)

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for each in running:
            each.process.send_signal(signal.SIGKILL if asked.count(signal.SIGINT) > 1 else signal.SIGTERM)

    def ended(job: Job, state: State) -> None:
        states[job.folder] = state
        done = sum(each == "done" or each.startswith("failed") for each in states.values())
        say(f"[{done}/{len(states)}] {job.run} seed {job.seed}: {state}; {_minutes(time.monotonic() - begun)}")

    before = {number: signal.signal(number, forward) for number in exits.stopping()}
    try:
        while running or (waiting and not asked):
            for each in [each for each in running if each.process.poll() is not None]:
                running.remove(each)
                code = each.process.returncode
                following = each.step + 1
                if code == exits.DONE and following < len(each.job.commands) and not asked:
                    running.append(_started(each.job, following, each.slot, folder, room, widest))
                elif code == exits.DONE and following == len(each.job.commands):
                    ended(each.job, "done")
                elif asked or code == exits.STOPPED:
                    ended(each.job, "stopped")
                else:
                    ended(each.job, f"failed: {_last_words(each.log, code)}")
            for job in [] if asked else list(waiting):
                missing = [states[needed] for needed in job.needs if states[needed] != "done"]
                if any(state.startswith("failed") for state in missing):
                    waiting.remove(job)
                    ended(job, f"failed: it reads {', '.join(_short(job, states))}, which failed")
                elif "stopped" in missing or states[job.folder] != "not started":
                    # what it needs was stopped by itself, or another run of the recipe computes the same
                    waiting.remove(job)
                elif not missing and len(running) < room and job.folder not in [each.job.folder for each in running]:
                    waiting.remove(job)
                    free = min(set(range(room)) - {each.slot for each in running})
                    running.append(_started(job, 0, free, folder, room, widest))
            time.sleep(PAUSE)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for each in running:  # an error of our own leaves no process behind
            each.process.kill()
    return states


def _short(job: Job, states: Mapping[Path, State]) -> list[str]:
    return [needed.parent.name for needed in job.needs if states[needed] != "done"]


def _started(job: Job, step: int, slot: int, folder: Path, room: int, widest: int) -> _Running:
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{job.folder.parent.name},{job.folder.stem}.log"
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", _threads(job.ranks, room))}
    if torch.cuda.device_count():
        own = gpus(slot * widest, job.ranks, os.environ.get("CUDA_VISIBLE_DEVICES"))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    if not step:
        log.unlink(missing_ok=True)
    return _Running(job, _process(job.commands[step], environment, log), step, slot, log)


def _process(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """`align` with these arguments; what it says goes to the end of `log`."""
    command = [sys.executable, "-m", "align_cli.cli", *arguments]
    with open(log, "ab") as file:
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file)


def _threads(ranks: int, room: int) -> str:
    return str(max(1, process.cores() // (ranks * room)))


def gpus(first: int, ranks: int, visible: str | None) -> list[str]:
    """The GPUs of a job, among what this process may see.

    Args:
        first: its first; slots are as wide as the widest job, so that no two jobs share one.
        ranks: how many it has.
        visible: CUDA_VISIBLE_DEVICES; None: all.
    """
    there = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    return there[first : first + ranks]


def _last_words(log: Path, code: int) -> str:
    """Why a job failed: what it calls an error, else the end of what it said, such as a traceback's."""
    said = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    told = " ".join(errors) or " | ".join(said[-LAST_WORDS:]) or "it said nothing"
    return f"killed by signal {-code}: {told}" if code < 0 else told


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes so far" if seconds >= 60 else f"{seconds:.0f} s so far"
