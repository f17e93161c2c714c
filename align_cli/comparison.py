"""Finished runs in groups that differ by more than their seed, and what is between the groups.

The seeds of a group are its independent observations; `config.yaml` and `summary.json` are all that is read.
"""

import itertools
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_cli import rundir, statistics
from align_cli.config import did_you_mean
from align_cli.errors import UserError

METRICS = ("eval/after/reward", "eval/after/exact_match", "eval/after/alignment", "loss/last")
# What changes nothing of what a run computes, beyond rounding, or is its seed. A run settles `engine.micro_tokens` by
# the memory that it finds free, and `data.expected` serves plans alone.
FREE = ("run", "track", "launch", "resume", "checkpoint", "eval.every", "engine.micro_tokens", "data.expected")
FIRST = ("algo", "model", "data", "reward")  # the sections that a label names before others
ABSENT = "null"


@dataclass(frozen=True)
class Run:
    """A finished run: its settings as text, without what is free, and its figures."""

    path: Path
    seed: int
    settings: dict[str, str]
    figures: dict[str, rundir.Scalar]


@dataclass(frozen=True)
class LeftOut:
    """A run that is not compared, and why."""

    run: str
    why: str


@dataclass(frozen=True)
class Difference:
    """A group's mean less another's; without bounds where a group has one seed."""

    estimate: float
    low: float | None
    high: float | None
    leaves_out_0: bool
    method: str


@dataclass(frozen=True)
class Row:
    """A figure of a group: its values in the order of the seeds, and their mean; without bounds if it is one."""

    group: str
    seeds: list[int]
    values: list[float]
    mean: float
    low: float | None
    high: float | None
    difference: Difference | None


# --- runs


def find(folders: Iterable[str]) -> list[Path]:
    """The run directories that are given or lie below what is given, each once, in order.

    Raises:
        UserError: a folder holds none.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        before = len(found)
        below = _below(Path(folder))
        for run in below:
            found.setdefault(run.resolve(), run)
        if not below and len(found) == before:
            raise UserError(f"{folder} is not a run directory and holds none: no {rundir.CONFIG} is in it.")
    return list(found.values())


def _below(folder: Path) -> list[Path]:
    runs: list[Path] = []
    for path, folders, files in os.walk(folder):
        folders.sort()
        if rundir.CONFIG in files:
            runs.append(Path(path))
            folders.clear()  # what is below a run is its own
    return runs


def finished(paths: Iterable[Path], left_out: list[LeftOut]) -> list[Run]:
    """The runs that can be compared; the others are added to `left_out`."""
    runs: list[Run] = []
    for path in paths:
        try:
            config, figures = rundir.flatten(rundir.read_config(path)), rundir.read_summary(path)
        except UserError as error:  # one run that cannot be read does not hide the others
            left_out.append(LeftOut(str(path), f"unreadable: {error}"))
            continue
        if figures is None:
            left_out.append(LeftOut(str(path), "not finished"))
        elif "run.seed" not in config or not isinstance(config["run.seed"], int):
            left_out.append(LeftOut(str(path), "no run.seed"))
        else:
            told = {key: written(value) for key, value in config.items() if not _is_free(key)}
            settings = {key: value for key, value in told.items() if value != ABSENT}
            runs.append(Run(path, config["run.seed"], settings, figures))
    return runs


def _is_free(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in FREE)


def written(value: Any) -> str:
    """A value as a command line has it; equal numbers are written alike."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    return str(value)


# --- groups


def grouped(runs: Iterable[Run], left_out: list[LeftOut]) -> tuple[dict[str, list[Run]], dict[str, list[str]]]:
    """The runs of each group by its label, and what else differs in step with the labels: each group's value of a key.

    A run that repeats the configuration and the seed of another is not a further observation and is left out.
    """
    groups: dict[frozenset[tuple[str, str]], dict[int, Run]] = defaultdict(dict)
    for run in runs:
        group = groups[frozenset(run.settings.items())]
        if run.seed in group:
            left_out.append(LeftOut(str(run.path), f"repeats {group[run.seed].path}"))
        else:
            group[run.seed] = run
    members = [[group[seed] for seed in sorted(group)] for group in groups.values()]
    names, in_step = labels([group[0].settings for group in members])
    return dict(zip(names, members, strict=True)), in_step


def labels(settings: Sequence[Mapping[str, str]]) -> tuple[list[str], dict[str, list[str]]]:
    """The fewest settings that tell groups apart, and the other differences, which the label of a group implies.

    A section's choice comes before its options, and an option counts among groups of the same choice alone: between
    algo=dpo and algo=nca, algo.beta is not a difference of its own.

    Args:
        settings: of each group; no two are the same.
    """
    in_step: dict[str, list[str]] = {}
    told = [""] * len(settings)
    for key in _by_rank(settings):
        column = _column(settings, key)
        if len(set(column)) < 2:
            continue
        finer = list(zip(told, column, strict=True))
        if len(set(finer)) == len(set(told)):
            in_step[_short(key)] = column
            continue
        told = [f"{before} {_setting(key, value, before, finer)}".strip() for before, value in finer]
    assert len(set(told)) == len(told)
    return told, in_step


def _short(key: str) -> str:
    return key.removesuffix(".name") if _is_name(key) else key


def _setting(key: str, value: str, before: str, finer: Sequence[tuple[str, str]]) -> str:
    """What a label gains; a section that is absent is told only to part groups of the same label."""
    apart = len({other for told, other in finer if told == before}) > 1
    return f"{_short(key)}={value}" if value and (apart or value != ABSENT or not _is_name(key)) else ""


def _by_rank(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """All keys: the sections' choices first, those of `FIRST` before others, then in the order of the files."""
    keys = list(dict.fromkeys(itertools.chain.from_iterable(settings)))
    first = [f"{section}.name" for section in FIRST]
    choices = [key for key in keys if _is_name(key)]
    options = [key for key in keys if not _is_name(key)]
    return list(dict.fromkeys([*(key for key in first if key in keys), *choices, *options]))


def _is_name(key: str) -> bool:
    return key.endswith(".name") and key.count(".") == 1


def _column(settings: Sequence[Mapping[str, str]], key: str) -> list[str]:
    """A key's value in each group; empty where the groups of the same choice in its section have one value."""
    values = [value_of(group, key) for group in settings]
    if _is_name(key):
        return values
    choices = [value_of(group, f"{key.partition('.')[0]}.name") for group in settings]
    alike: dict[str, set[str]] = defaultdict(set)
    for choice, value in zip(choices, values, strict=True):
        alike[choice].add(value)
    return [value if len(alike[choice]) > 1 else "" for choice, value in zip(choices, values, strict=True)]


def value_of(settings: Mapping[str, str], key: str) -> str:
    """A setting's value, `ABSENT` where there is none."""
    return settings.get(key, ABSENT)


def named(text: str, among: Sequence[str]) -> str:
    """The group whose label has all words of `text`: as whole settings, or else as parts of the label.

    Raises:
        UserError: none, or several.
    """
    words = text.split()
    found = [label for label in among if set(words) == set(label.split())]
    found = found or [label for label in among if set(words) <= set(label.split())]
    found = found or [label for label in among if all(word in label for word in words)]
    if len(found) == 1:
        return found[0]
    whole = "; ".join(among)
    if found:
        raise UserError(f"against={text}: {len(found)} groups have that in their label; one of them is meant: {whole}.")
    raise UserError(f"against={text}: no group has that in its label.{did_you_mean(text, among)} There are {whole}.")


# --- figures


def is_number(run: Run, metric: str) -> bool:
    """Whether a run has a figure that is a number."""
    value = run.figures.get(metric)
    return isinstance(value, int | float) and not isinstance(value, bool)


def rows(groups: Mapping[str, Sequence[Run]], metric: str, base: str | None, left_out: list[LeftOut]) -> list[Row]:
    """A figure in each group that has it, the group that the others are compared with first.

    Raises:
        UserError: fewer than two groups have it, or `base` has not.
    """
    having = {label: [run for run in runs if is_number(run, metric)] for label, runs in groups.items()}
    having = {label: runs for label, runs in having.items() if runs}
    if not having:
        raise UserError(f"metric={metric}: no run has such a figure.{near(metric, groups)}")
    if len(having) < 2:
        raise UserError(f"metric={metric}: only {next(iter(having))} has it; give two groups that have it.")
    if base is not None and base not in having:
        raise UserError(f"metric={metric}: {base}, which against= names, has no such figure; {next(iter(having))} has.")
    for run in itertools.chain.from_iterable(groups.values()):
        if not is_number(run, metric):
            why = f"{metric} is {run.figures[metric]}" if metric in run.figures else f"no {metric}"
            left_out.append(LeftOut(str(run.path), why))
    values = {label: {run.seed: float(str(run.figures[metric])) for run in runs} for label, runs in having.items()}
    first = base or next(iter(values))
    table: list[Row] = []
    for label in (first, *(label for label in values if label != first)):
        own = list(values[label].values())
        interval = statistics.student(own) if len(own) > 1 else None
        table.append(
            Row(
                group=label,
                seeds=list(values[label]),
                values=own,
                mean=interval.estimate if interval else own[0],
                low=interval.low if interval else None,
                high=interval.high if interval else None,
                difference=None if label == first else difference(values[label], values[first]),
            )
        )
    return table


def near(metric: str, groups: Mapping[str, Sequence[Run]]) -> str:
    """What may have been meant by a figure that no run has, as a sentence that follows another."""
    runs = list(itertools.chain.from_iterable(groups.values()))
    there = [name for name in dict.fromkeys(itertools.chain(*(run.figures for run in runs))) if _any(runs, name)]
    ends = [name for name in there if name.endswith(f"/{metric}")]
    if ends:
        return f" Did you mean '{ends[-1]}'?"
    return did_you_mean(metric, there) or f" align show {runs[0].path} lists what there is."


def _any(runs: Iterable[Run], metric: str) -> bool:
    return any(is_number(run, metric) for run in runs)


def difference(values: Mapping[int, float], others: Mapping[int, float]) -> Difference:
    """The mean of `values` less that of `others`, each by its seed.

    Paired where the group of fewer seeds has none that the other lacks, so that pairing drops no run of it; the pairs
    are then all that counts. Otherwise Welch's.
    """
    shared = [seed for seed in values if seed in others]
    if min(len(values), len(others)) == 1:
        estimate = math.fsum(values.values()) / len(values) - math.fsum(others.values()) / len(others)
        return Difference(estimate, None, None, leaves_out_0=False, method="one seed")
    if len(shared) == min(len(values), len(others)):
        interval = statistics.student([values[seed] - others[seed] for seed in shared])
        method = f"paired, {len(shared)} seeds"
    else:
        interval, method = statistics.welch(list(values.values()), list(others.values())), "Welch"
    return Difference(*interval, leaves_out_0=not interval.low <= 0 <= interval.high, method=method)
