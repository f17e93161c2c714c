"""`align reproduce`: a recipe's runs, evaluated and held against what its paper claims."""

import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_cli import (
    config,
    exits,
    experiment,
    recipe,
    reproduction,
    reproduction_page,
    rundir,
    secrets,
    shrink,
    terminal,
)
from align_cli.commands import plan
from align_cli.commands.arguments import FOLDERS, PLUGINS
from align_cli.commands.listing import print_table
from align_cli.errors import UserError
from align_cli.recipe import SCALES
from align_cli.reproduction import RESULTS, Job, Outcome, Reproduction

USAGE = "align reproduce NAME|FILE [scale=tiny|paper] [seeds=N] [jobs=N] [dir=DIR] [shrink=ROWS] [--plan] [--json]"
KEYS = ("scale", "seeds", "jobs", "dir", "shrink")
FLAGS = ("--plan", "--json", "--list", PLUGINS, FOLDERS)
HOME = Path("reproductions")


@dataclass(frozen=True)
class Asked:
    """The command line."""

    name: str | None
    scale: str
    seeds: int | None
    jobs: int | None
    folder: Path | None
    shrink: Path | None
    flags: frozenset[str]
    config_dirs: tuple[str, ...]


def main(argv: list[str]) -> int:
    """Reproduce one recipe, plan it, or list all; returns the exit code."""
    asked = parse(argv)
    if "--list" in asked.flags:
        return listed()
    if asked.name is None:
        raise UserError(f"{USAGE} would be right. `align reproduce --list` lists the recipes.")
    told = described(asked)
    planned = reproduction.jobs(told)
    if "--plan" in asked.flags:
        return show_plan(told, planned)
    begun = time.monotonic()
    with rundir.lock(told.folder, "dir"):
        before = reproduction.read(told.folder / RESULTS)
        room = asked.jobs or reproduction.side_by_side(planned)
        terminal.say(
            f"{told.recipe.name}, scale={told.scale.name}: {len(planned)} jobs, {room} at a time; {told.folder}"
        )
        states = reproduction.run(planned, told.folder, room=room, say=terminal.say)
        found = reproduction.outcomes(told, planned, states)
        seconds = time.monotonic() - begun + (before["seconds"] if before else 0.0)
        results = reproduction.results(told, planned, states, found, seconds)
        reproduction.write(told.folder, results)
        where = reproduction_page.write(told, planned, found, results)
    if "--json" in asked.flags:
        terminal.result((told.folder / RESULTS).read_text(encoding="utf-8").rstrip())
    else:
        show(told, found)
        terminal.result(f"page in {where}; figures in {told.folder / RESULTS}")
    return code(states)


def code(states: dict[Path, str]) -> int:
    """The exit code for the states of all jobs."""
    if any(state in ("stopped", "not started") for state in states.values()):
        terminal.say("stopped; the same command goes on from there")
        return exits.STOPPED
    return exits.FAILED if any(state.startswith("failed") for state in states.values()) else exits.DONE


# --- what was asked


def parse(argv: Sequence[str]) -> Asked:
    """Read the command line.

    Raises:
        UserError: all that is wrong with it.
    """
    secrets.refuse_secrets(argv)
    names: list[str] = []
    flags: set[str] = set()
    folders: dict[str, list[str]] = {FOLDERS: [], PLUGINS: []}
    given: dict[str, str] = {}
    problems: list[str] = []
    words = iter(argv)
    for word in words:
        key, equals, value = word.partition("=")
        if key in folders:
            folders[key].append(value or next(words, ""))
        elif word in FLAGS:
            flags.add(word)
        elif word.startswith("-"):
            problems.append(f"{word}: no such option.{config.did_you_mean(key, FLAGS)} {USAGE}.")
        elif equals and key in KEYS:
            given[key] = value
        elif equals and not Path(word).is_file():
            problems.append(f"{word}: no such key.{config.did_you_mean(key, KEYS)} It takes {', '.join(KEYS)}.")
        else:
            names.append(word)
    if len(names) > 1:
        problems.append(f"{' '.join(names)}: one recipe at a time would be right.")
    counts = {key: _count(key, given[key], problems) for key in ("seeds", "jobs") if key in given}
    scale = given.get("scale", SCALES[0])
    if scale not in SCALES:
        problems.append(f"scale={scale}: {' or '.join(SCALES)} would be right.")
    for key in ("dir", "shrink"):
        if given.get(key) == "":
            problems.append(f"{key}=: a folder would be right.")
    if problems:
        raise UserError("\n".join(problems))
    config.use(folders[PLUGINS])
    return Asked(
        name=names[0] if names else None,
        scale=scale,
        seeds=counts.get("seeds"),
        jobs=counts.get("jobs"),
        folder=Path(given["dir"]) if "dir" in given else None,
        shrink=Path(given["shrink"]) if "shrink" in given else None,
        flags=frozenset(flags),
        config_dirs=tuple(folders[FOLDERS]),
    )


def _count(key: str, value: str, problems: list[str]) -> int | None:
    if re.fullmatch(r"[1-9]\d{0,5}", value):
        return int(value)
    problems.append(f"{key}={value}: a whole number from 1 on would be right.")
    return None


def described(asked: Asked) -> Reproduction:
    """The reproduction that is asked for, its runs composed.

    Raises:
        UserError: the recipe is wrong.
    """
    assert asked.name is not None
    loaded = recipe.load(asked.name)
    scale = loaded.scales[asked.scale]
    seeds = tuple(range(asked.seeds or scale.seeds))
    folder = asked.folder or HOME / f"{loaded.name}-{scale.name}{'-shrunken' if asked.shrink else ''}"
    made: dict[str, experiment.Experiment] = {}
    if asked.shrink is not None:
        loaded, seeds = _shrunken(loaded, asked, folder), (0,)
        scale = loaded.scales[asked.scale]
        made = recipe.experiments(loaded, asked.scale, asked.config_dirs)
    return Reproduction(
        recipe=loaded,
        scale=scale,
        seeds=seeds,
        folder=folder,
        shared=None if asked.folder or asked.shrink else HOME / "runs",
        experiments=made or recipe.composed(loaded, scale.name, asked.config_dirs),
        config_dirs=asked.config_dirs,
        shrunken=asked.shrink is not None,
    )


def _shrunken(loaded: recipe.Recipe, asked: Asked, folder: Path) -> recipe.Recipe:
    assert asked.shrink is not None
    experiments = recipe.composed(loaded, asked.scale, asked.config_dirs)
    return shrink.shrunken(loaded, asked.scale, experiments, asked.shrink.absolute(), (folder / "models").absolute())


# --- what is printed


def show(told: Reproduction, found: Sequence[Outcome]) -> None:
    """The claims with their verdicts."""
    rows = [
        [
            each.expectation.claim,
            measured(each.judged.estimate, each.judged.low, each.judged.high),
            f"{each.expectation.expected} ({each.expectation.kind}: {each.expectation.source})",
            each.judged.verdict + (f": {each.judged.why}" if each.judged.why else ""),
        ]
        for each in found
    ]
    terminal.result(f"{told.recipe.title} ({told.recipe.paper}), scale={told.scale.name}, {len(told.seeds)} seed(s)")
    print_table(["claim", "measured", "expected", "verdict"], rows)
    for departure in told.scale.departures:
        terminal.result(f"departs: {departure}")


def measured(estimate: float | None, low: float | None, high: float | None) -> str:
    """A mean with its interval, as far as there are."""
    if estimate is None:
        return "nothing"
    return f"{estimate:.4g}" if low is None or high is None else f"{estimate:.4g} [{low:.4g}, {high:.4g}]"


def show_plan(told: Reproduction, planned: Sequence[Job]) -> int:
    """All commands, and what each costs in steps and memory, as far as that is known without loading anything."""
    terminal.result(f"{told.recipe.title} ({told.recipe.paper}), scale={told.scale.name}; cost: {told.scale.cost}")
    for job in planned:
        if job.seed != told.seeds[0]:
            continue
        terminal.result(f"\n{job.run}, seeds {', '.join(map(str, told.seeds))}")
        for command in job.commands:
            terminal.result(f"  {shlex.join(['align', *command])}")
        checked = told.experiments.get(job.run)
        for line in [] if checked is None else [*plan.schedule(checked), memory_line(checked)]:
            terminal.result(f"    {line}")
    return exits.DONE


def memory_line(checked: experiment.Experiment) -> str:
    """The memory of a rank, where the model's sizes are known without reading it."""
    ranks = experiment.devices(checked)
    if checked.model.path == "world":
        return f"{ranks} rank(s); the embedded world's model needs less than 2 GB"
    if checked.model.architecture is None:
        return f"{ranks} rank(s); memory is known when {checked.model.path} is read"
    total = sum(experiment.terms(checked, experiment.shape_of(checked)).values())
    there, source = experiment.room(checked)
    return (
        f"{ranks} rank(s), engine={checked.engine.name}: {total / 1e9:.1f} GB of {there / 1e9:.0f} GB each ({source})"
    )


def listed() -> int:
    """All recipes, what they cost at scale tiny, and their last verdicts."""
    rows: list[list[str]] = []
    for name, path in recipe.names().items():
        try:
            loaded = recipe.load(name)
        except UserError as error:
            rows.append([name, "", "", f"refused: {error}"])
            continue
        rows.append([name, loaded.title, loaded.scales["tiny"].cost, last_verdict(name, path)])
    print_table(["recipe", "title", "cost, tiny", "last verdicts"], rows)
    return exits.DONE


def last_verdict(name: str, path: Path) -> str:
    """How many claims had which verdict at scale tiny, here or where the committed results were made."""
    here, shipped = HOME / f"{name}-tiny" / RESULTS, path.with_suffix(".results.json")
    for file, where in ((here, "here"), (shipped, "published")):
        try:
            told = reproduction.read(file)
        except UserError as error:
            return str(error)
        if told is not None:
            return f"{tally(told)} ({where}, {told['date']})"
    return "not run yet"


def tally(results: dict[str, Any]) -> str:
    """How many claims had which verdict."""
    verdicts = [each["verdict"] for each in results["expectations"]]
    return ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
