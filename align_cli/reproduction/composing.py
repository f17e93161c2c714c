"""A recipe's runs as experiments, and every expectation held against the figures that they can write."""

import fnmatch
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from align_cli import config, reading, summaries
from align_cli.errors import UserError
from align_cli.experiment import Experiment
from align_cli.reproduction.recipe import Recipe, Scale, Study


def composed(recipe: Recipe, scale: str, config_dirs: Sequence[str] = ()) -> dict[str, Experiment]:
    """The experiment of each run, without its seed and directory; every expectation is one that they can meet.

    Raises:
        UserError: all that is wrong, a sentence with file and run for each problem.
    """
    found = experiments(recipe, scale, config_dirs)
    problems = _unwritten(recipe, recipe.scales[scale], found)
    if problems:
        raise UserError("\n".join(f"{recipe.path}: {problem}" for problem in problems))
    return found


def experiments(recipe: Recipe, scale: str, config_dirs: Sequence[str] = ()) -> dict[str, Experiment]:
    """The experiment of each run, whatever is expected of it.

    Raises:
        UserError: a run is wrong, a sentence with file and run for each problem.
    """
    found: dict[str, Experiment] = {}
    problems: list[str] = []
    for run in recipe.scales[scale].runs:
        folders = {name: Path(name) for name in run.needs}
        try:
            tree = config.compose("train", run.placed(0, folders, Path("unused", run.folder)), config_dirs)
            found[run.name] = reading.read(tree, planned=True)
        except UserError as error:
            problems += [f"{recipe.path}: scales.{scale}.runs.{run.name}: {line}" for line in str(error).splitlines()]
    if problems:
        raise UserError("\n".join(problems))
    return found


def _unwritten(recipe: Recipe, scale: Scale, found: Mapping[str, Experiment]) -> list[str]:
    """Expectations of figures that nobody writes, or of a study that is not there."""
    if scale.study is not None:
        return _not_in_study(recipe, scale.study, scale.name)
    written = {
        name: [*summaries.names(each), *(f"eval/{choice}/*" for choice in scale.evaluations)]
        for name, each in found.items()
    }
    return [
        f"expect[{place}]: {figure}: {run} writes no such figure at scale {scale.name}."
        f"{config.did_you_mean(figure, written[run])}"
        for place, each in enumerate(recipe.expect)
        if each.at(scale.name)
        for run in each.runs
        for figure in each.figures
        if not _among(figure, written[run])
    ]


def _among(figure: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(figure, pattern) for pattern in patterns)


def _not_in_study(recipe: Recipe, study: Study, scale: str) -> list[str]:
    where = f"scales.{scale}"
    try:
        function = config.find("align_cli.studies", study.name, where, told="study")
    except UserError as error:
        return [str(error)]
    there = list(vars(importlib.import_module(function.__module__))["FIGURES"])
    return config.check(function, study.options, f"{where}.options") + [
        f"expect[{place}].figure: study={study.name} gives no {key}.{config.did_you_mean(key, there)} "
        f"It gives {', '.join(there)}."
        for place, each in enumerate(recipe.expect)
        if each.at(scale)
        for key in each.keys
        if not _among(key, there)
    ]
