"""`align train -m`: every combination of swept overrides is a run of its own, in a process of its own.

A job's directory is named by its swept values under a directory named by the command, so the same command finds what
it finished before and runs only the rest.
"""

import hashlib
import itertools
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from align_cli import config, exits, rundir, terminal
from align_cli.config import Tree, quoted
from align_cli.errors import UserError

LONGEST_NAME = 160  # of a job's folder, in characters
COLUMNS = {
    "loss/last": "loss",
    "eval/after/exact_match": "exact match",
    "eval/after/reward": "reward",
    "displacement/chosen": "chosen, nats",
}  # figure -> its heading in the table


@dataclass(frozen=True)
class Job:
    """One combination: all its overrides, and the swept ones as text."""

    overrides: tuple[str, ...]
    swept: tuple[str, ...]
    run_dir: Path


def expand(overrides: Sequence[str]) -> tuple[list[list[str]], int]:
    """Every combination of the swept overrides, in the order of the command line, and how many are swept."""
    from hydra.core.override_parser.types import Glob

    choices: list[list[str]] = []
    parsed = config.parse(overrides)
    given = Counter(override.get_key_element().lstrip("+") for override in parsed)
    for override in parsed:
        if not override.is_sweep_override():
            choices.append([str(override.input_line)])
            continue
        if given[override.get_key_element().lstrip("+")] > 1:
            raise UserError(f"{override.input_line}: this key is given twice; give it once, with all its values.")
        if override.is_interval_sweep() or isinstance(override.value(), Glob):
            raise UserError(f"{override.input_line}: a grid needs values; use choice(...) or range(...).")
        key = override.get_key_element()
        choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
    return [list(combination) for combination in itertools.product(*choices)], sum(len(c) > 1 for c in choices)


def jobs(overrides: Sequence[str], config_dirs: Sequence[str]) -> list[Job]:
    """The jobs of a sweep.

    Raises:
        UserError: an override cannot be read.
    """
    combinations, _ = expand(overrides)
    varying = [place for place in range(len(overrides)) if len({c[place] for c in combinations}) > 1]
    home = _home(overrides, config_dirs, combinations)
    found: list[Job] = []
    for combination in combinations:
        swept = tuple(combination[place] for place in varying)
        plain = [o for o in combination if not re.match(r"\+*run\.dir=", o)]
        found.append(Job(tuple(plain), swept, home / folder_name(swept)))
    return found


def folder_name(swept: Sequence[str]) -> str:
    """A folder's name for swept values, another one for other values."""
    told = ",".join(swept) or "single"
    name = re.sub(r"[^\w.=,+-]", "_", told)
    if name == told and len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


# what a run may be resumed with another value of (`launch.FREE`)
_FREE = re.compile(r"\+*((track|resume|checkpoint|source\.keep|launch\.name)\b|launch=)")


def _home(overrides: Sequence[str], config_dirs: Sequence[str], combinations: Sequence[Sequence[str]]) -> Path:
    tree = config.compose("train", combinations[0], config_dirs)
    if tree["run"]["dir"] is not None:
        return Path(str(tree["run"]["dir"]))
    told = sorted(override for override in overrides if not _FREE.match(override))
    digest = hashlib.sha256("\n".join([*told, *config_dirs]).encode()).hexdigest()[:8]
    return Path("sweeps") / f"{tree['model']['name']}-{tree['data']['name']}-{digest}"


def sweep(overrides: Sequence[str], config_dirs: Sequence[str]) -> int:
    """Run what is not finished, then print a table of all jobs.

    Returns:
        0 if all jobs are done, 1 if one failed, 75 if a signal stopped the sweep.

    Raises:
        UserError: a job's configuration is wrong, or its directory holds something else; no job is started then.
    """
    from align_cli import launch, reading

    planned = jobs(overrides, config_dirs)
    homes = {job.run_dir for job in planned}
    if len(homes) < len(planned):
        raise UserError("two jobs of the sweep have the same values; give each value once.")
    arguments: dict[Path, list[str]] = {}
    states: dict[Path, str] = {}
    for job in planned:
        tree = config.compose("train", job.overrides, config_dirs)
        tree["run"]["dir"] = str(job.run_dir)
        checked = reading.read(tree)
        launch.claimable(job.run_dir)
        if launch.finished(checked, job.run_dir):
            states[job.run_dir] = "skipped"
        arguments[job.run_dir] = [*job.overrides, f"run.dir={quoted(str(job.run_dir))}", *_group(tree, job)]
    for number, job in enumerate(planned, start=1):
        if job.run_dir in states:
            continue
        terminal.say(f"job {number} of {len(planned)}: {','.join(job.swept)}")
        with exits.terminable():
            code, stopped = _run(arguments[job.run_dir], config_dirs)
        states[job.run_dir] = {exits.DONE: "done", exits.STOPPED: "stopped"}.get(code, f"failed ({code})")
        if stopped or code == exits.STOPPED:
            break
    show(planned, states)
    if len(states) < len(planned) or "stopped" in states.values():
        return exits.STOPPED
    return exits.FAILED if any(state.startswith("failed") for state in states.values()) else exits.DONE


def _group(tree: Tree, job: Job) -> list[str]:
    """W&B shows the runs of a sweep as one group."""
    if "group" not in tree["track"] or tree["track"]["group"] is not None:
        return []
    return [f"track.group={quoted(job.run_dir.absolute().parent.name)}"]


def _run(overrides: Sequence[str], config_dirs: Sequence[str]) -> tuple[int, bool]:
    """The exit code of a job, and whether a signal asked the sweep to stop; the job was told, and has saved."""
    flags = [*config.plugins(), *(part for folder in config_dirs for part in ("--config-dir", folder))]
    started: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for process in started:  # Ctrl-C reaches it from the terminal as well; a signal to this process alone does not
            process.terminate()

    before = {number: signal.signal(number, forward) for number in exits.stopping()}
    try:
        started.append(subprocess.Popen([sys.executable, "-m", "align_cli.cli", "train", *flags, *overrides]))
        return started[0].wait(), bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show(planned: Sequence[Job], states: dict[Path, str]) -> None:
    """A table of all jobs: swept values, state, final figures."""
    summaries = {job.run_dir: rundir.read_summary(job.run_dir) or {} for job in planned}
    names = [name for name in COLUMNS if any(name in summary for summary in summaries.values())]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    keys = [part.partition("=")[0] for part in planned[0].swept]
    for heading in ("job", *keys, "state", *(COLUMNS[name] for name in names)):
        table.add_column(heading, overflow="fold", no_wrap=heading == "state")
    for number, job in enumerate(planned, start=1):
        figures = [summaries[job.run_dir].get(name) for name in names]
        cells = [f"{figure:.4g}" if isinstance(figure, float) else "" for figure in figures]
        values = [part.partition("=")[2] for part in job.swept]
        told = [str(number), *values, states.get(job.run_dir, "not started"), *cells]
        table.add_row(*map(Text, told))  # brackets in a value are no markup
    Console().print(table)
    terminal.result(f"runs in {planned[0].run_dir.parent}")
