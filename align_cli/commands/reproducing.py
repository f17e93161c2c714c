"""One reproduction from start to end: described, run, judged, written and shown."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from align_cli import config, exits, resources, rundir, terminal
from align_cli.commands import evaluate, plan
from align_cli.commands.arguments import FOLDERS
from align_cli.commands.listing import print_table
from align_cli.commands.reproduce import Asked
from align_cli.errors import UserError
from align_cli.experiment import Experiment
from align_cli.reproduction import composing, jobs, judging, loading, page, record, shrink
from align_cli.reproduction.jobs import Job, Reproduction
from align_cli.reproduction.judging import Outcome
from align_cli.reproduction.recipe import Recipe, Scale, evaluation
from align_cli.reproduction.record import RESULTS


def reproduce(asked: Asked, name: str, home: Path) -> int:
    """Reproduce one recipe, or plan it.

    Args:
        name: of the recipe, or a file.
        home: where reproductions go whose folder is not named.

    Returns:
        The exit code.
    """
    told = described(asked, name, home)
    planned = jobs.jobs(told)
    if "--plan" in asked.flags:
        return show_plan(told, planned)
    begun = time.monotonic()
    with rundir.lock(told.folder, "dir"):
        before = record.read(told.folder / RESULTS)
        room = jobs.side_by_side(planned, asked.jobs)
        terminal.say(
            f"{told.recipe.name}, scale={told.scale.name}: {len(planned)} jobs, {room} at a time; {told.folder}"
        )
        states = jobs.run(planned, told.folder, room=room, say=terminal.say)
        figures = judging.figures(told)
        found = judging.outcomes(told, planned, states, figures)
        seconds = time.monotonic() - begun + (before["seconds"] if before else 0.0)
        results = record.made(told, planned, states, figures, found, seconds)
        record.write(told.folder, results)
        where = page.write(told, planned, found, results)
    if "--json" in asked.flags:
        terminal.result((told.folder / RESULTS).read_text(encoding="utf-8").rstrip())
    else:
        show(told, found)
        terminal.result(f"page in {where}; figures in {told.folder / RESULTS}")
    return code(states)


def code(states: Mapping[Path, str]) -> int:
    """The exit code for the states of all jobs."""
    if any(state in ("stopped", "not started") for state in states.values()):
        terminal.say("stopped; the same command goes on from there")
        return exits.STOPPED
    return exits.FAILED if any(state.startswith("failed") for state in states.values()) else exits.DONE


def described(asked: Asked, name: str, home: Path) -> Reproduction:
    """The reproduction that is asked for, its runs composed.

    Raises:
        UserError: the recipe is wrong.
    """
    loaded = loading.load(name)
    scale = loaded.scales[asked.scale]
    refuse_evaluations(loaded, scale, asked.config_dirs)
    seeds = tuple(range(asked.seeds or scale.seeds))
    folder = asked.folder or home / f"{loaded.name}-{scale.name}{'-shrunken' if asked.shrink else ''}"
    made: dict[str, Experiment] = {}
    if asked.shrink is not None:
        loaded, seeds = _shrunken(loaded, asked, folder), (0,)
        scale = loaded.scales[asked.scale]
        made = composing.experiments(loaded, asked.scale, asked.config_dirs)
    return Reproduction(
        recipe=loaded,
        scale=scale,
        seeds=seeds,
        folder=folder,
        shared=None if asked.folder or asked.shrink else home / "runs",
        experiments=made or composing.composed(loaded, scale.name, asked.config_dirs),
        config_dirs=asked.config_dirs,
        shrunken=asked.shrink is not None,
    )


def refuse_evaluations(loaded: Recipe, scale: Scale, config_dirs: Sequence[str]) -> None:
    """Plan what is evaluated after training, before anything is trained.

    Raises:
        UserError: an evaluation lacks what it asks for, or has an option that it does not know.
    """
    flags = [*config.plugins(), *(part for folder in config_dirs for part in (FOLDERS, folder))]
    problems: list[str] = []
    for line in scale.evaluate:
        try:
            evaluate.plan(*evaluate.read([*flags, *evaluation(line)]))
        except UserError as error:
            problems += [f"{loaded.path}: scales.{scale.name}.evaluate: {told}" for told in str(error).splitlines()]
    if problems:
        raise UserError("\n".join(problems))


def _shrunken(loaded: Recipe, asked: Asked, folder: Path) -> Recipe:
    assert asked.shrink is not None
    experiments = composing.composed(loaded, asked.scale, asked.config_dirs)
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
            terminal.result(f"  {terminal.shell(['align', *command])}")
        checked = told.experiments.get(job.run)
        for line in [] if checked is None else [*plan.schedule(checked), memory_line(checked)]:
            terminal.result(f"    {line}")
    return exits.DONE


def memory_line(checked: Experiment) -> str:
    """The memory of a rank, where the model's sizes are known without reading it."""
    ranks = resources.devices(checked)
    if checked.model.path == "world":
        return f"{ranks} rank(s); the embedded world's model needs less than 2 GB"
    if checked.model.architecture is None:
        return f"{ranks} rank(s); memory is known when {checked.model.path} is read"
    total = sum(resources.terms(checked, resources.shape_of(checked)).values())
    there, source = resources.room(checked)
    return (
        f"{ranks} rank(s), engine={checked.engine.name}: {total / 1e9:.1f} GB of {there / 1e9:.0f} GB each ({source})"
    )
