"""`align compare`: finished runs in groups that differ by more than their seed, and what is between the groups.

The seeds of a group are its independent observations; `config.yaml` and `summary.json` are all that is read for them.
What `align evaluate` measured on the same items of several groups is compared item by item as well (`items`).
"""

import argparse
import itertools
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align_cli import exits, rundir, statistics, terminal
from align_cli.commands import items
from align_cli.commands.listing import print_table
from align_cli.config import did_you_mean
from align_cli.errors import UserError

METRICS = ("eval/after/reward", "eval/after/exact_match", "eval/after/alignment", "loss/last")
OPTIONS = ("metric=", "against=", "--json")
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


def main(argv: list[str]) -> int:
    """`compare RUN_OR_SWEEP ... [metric=NAMES] [against=TEXT] [--json]`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="align compare",
        usage="align compare RUN_OR_SWEEP ... [metric=NAME,NAME] [against=TEXT] [--json]",
        description="Compare groups of finished runs; the seeds of a group are its independent observations.",
        epilog=f"metric= takes names of summary.json; without it those of {', '.join(METRICS)} that all groups have, "
        "the loss where one algorithm makes it. against= is a part of the label of the group that the others are "
        "compared with; without it the first.",
        allow_abbrev=False,
    )
    parser.add_argument("given", nargs="+", metavar="RUN_OR_SWEEP", help="a run directory, or a folder with some below")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    arguments = parser.parse_intermixed_args(argv)
    folders, metrics, against = split(arguments.given)
    left_out: list[LeftOut] = []
    runs = finished(find(folders), left_out)
    groups, in_step = grouped(runs, left_out)
    if len(groups) < 2:
        tell(left_out)
        what = f"the finished runs ({len(runs)}) differ in nothing but their seed" if runs else "no run has finished"
        raise UserError(f"{what}; finished runs of at least two configurations would be right.")
    base = named(against, list(groups)) if against is not None else None
    unlike: list[tuple[str, str]] = []
    paths = {label: [run.path for run in runs] for label, runs in groups.items()}
    by_item = {
        name: table for name, table in items.tables(paths, base, unlike).items() if not metrics or name in metrics
    }
    chosen = metrics or usual(groups, otherwise=by_item)
    tables = {metric: rows(groups, metric, base, left_out) for metric in chosen}
    left_out += [LeftOut(*each) for each in unlike]
    tell(left_out)
    if arguments.json:
        terminal.result(as_json(groups, in_step, tables, by_item, left_out))
        return exits.DONE
    for metric, table in tables.items():
        show(metric, table)
    for name, table in by_item.items():
        show_items(name, table)
    for line in (*together(in_step), *meaning(tables), *meaning_of_items(by_item)):
        terminal.result(line)
    return exits.DONE


def split(given: Sequence[str]) -> tuple[list[str], list[str], str | None]:
    """The folders, the metrics and the text of `against=`; a folder's name may hold an = sign itself.

    Raises:
        UserError: an option is empty, given twice or misspelt, or there is no folder.
    """
    folders: list[str] = []
    metrics: list[str] = []
    against: list[str] = []
    for word in given:
        key, _, value = word.partition("=")
        if key == "metric" and "=" in word:
            metrics += [name for name in value.split(",") if name] or [""]
        elif key == "against" and "=" in word:
            against.append(value)
        elif not Path(word).is_dir():
            near = did_you_mean(f"{key}=", OPTIONS[:2]) if "=" in word else ""
            raise UserError(f"{word}: there is no such folder.{near} A run directory or a sweep's would be right.")
        else:
            folders.append(word)
    if "" in metrics or against.count("") or len(against) > 1:
        raise UserError("metric= takes names such as eval/after/reward, against= one part of a group's label.")
    if not folders:
        raise UserError("align compare needs run directories, or folders of runs such as a sweep's.")
    return folders, list(dict.fromkeys(metrics)), against[0] if against else None


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
            raise UserError(f"{folder} is no run directory and holds none: no {rundir.CONFIG} is in it.")
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

    A run that repeats the configuration and the seed of another is no further observation and is left out.
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
    values = [_value(group, key) for group in settings]
    if _is_name(key):
        return values
    choices = [_value(group, f"{key.partition('.')[0]}.name") for group in settings]
    alike: dict[str, set[str]] = defaultdict(set)
    for choice, value in zip(choices, values, strict=True):
        alike[choice].add(value)
    return [value if len(alike[choice]) > 1 else "" for choice, value in zip(choices, values, strict=True)]


def _value(settings: Mapping[str, str], key: str) -> str:
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


def usual(groups: Mapping[str, Sequence[Run]], otherwise: Mapping[str, Sequence[items.Row]]) -> list[str]:
    """The figures of `METRICS` that a run of each group has; a loss only where it is one algorithm's, or alone.

    Raises:
        UserError: there are none, and nothing is compared otherwise.
    """
    shared = [name for name in METRICS if all(any(_is_number(run, name) for run in runs) for runs in groups.values())]
    algorithms = {_value(run.settings, "algo.name") for runs in groups.values() for run in runs}
    if len(algorithms) > 1 and len(shared) > 1:
        shared = [name for name in shared if not name.startswith("loss/")]
    if not shared and not otherwise:
        raise UserError(f"the groups share none of {', '.join(METRICS)}; metric=NAME names another figure.")
    return shared


def _is_number(run: Run, metric: str) -> bool:
    value = run.figures.get(metric)
    return isinstance(value, int | float) and not isinstance(value, bool)


def rows(groups: Mapping[str, Sequence[Run]], metric: str, base: str | None, left_out: list[LeftOut]) -> list[Row]:
    """A figure in each group that has it, the group that the others are compared with first.

    Raises:
        UserError: fewer than two groups have it, or `base` has not.
    """
    having = {label: [run for run in runs if _is_number(run, metric)] for label, runs in groups.items()}
    having = {label: runs for label, runs in having.items() if runs}
    if not having:
        raise UserError(f"metric={metric}: no run has such a figure.{_near(metric, groups)}")
    if len(having) < 2:
        raise UserError(f"metric={metric}: only {next(iter(having))} has it; two groups that have it would be right.")
    if base is not None and base not in having:
        raise UserError(f"metric={metric}: {base}, which against= names, has no such figure; {next(iter(having))} has.")
    for run in itertools.chain.from_iterable(groups.values()):
        if not _is_number(run, metric):
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


def _near(metric: str, groups: Mapping[str, Sequence[Run]]) -> str:
    runs = list(itertools.chain.from_iterable(groups.values()))
    there = [name for name in dict.fromkeys(itertools.chain(*(run.figures for run in runs))) if _any(runs, name)]
    ends = [name for name in there if name.endswith(f"/{metric}")]
    if ends:
        return f" Did you mean '{ends[-1]}'?"
    return did_you_mean(metric, there) or f" align show {runs[0].path} lists what there is."


def _any(runs: Iterable[Run], metric: str) -> bool:
    return any(_is_number(run, metric) for run in runs)


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


# --- what is printed


def tell(left_out: Sequence[LeftOut]) -> None:
    """One line with all runs that are left out, by reason."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for run in left_out:
        reasons[run.why].append(run.run)
    if reasons:
        terminal.warn("left out: " + "; ".join(f"{', '.join(runs)} ({why})" for why, runs in reasons.items()))


def show(metric: str, table: Sequence[Row]) -> None:
    """A table of one figure, with its name above."""
    terminal.result(metric)
    lines: list[list[str]] = []
    for row in table:
        line = [row.group, str(len(row.seeds)), f"{row.mean:.4g}{_half(row.low, row.high)}"]
        if row.difference is None:
            lines.append([*line, "to this one", ""])
            continue
        mark = " *" if row.difference.leaves_out_0 else ""
        half = _half(row.difference.low, row.difference.high)
        lines.append([*line, f"{row.difference.estimate:+.4g}{half}{mark}", row.difference.method])
    print_table(["group", "seeds", "mean", "difference", "by"], lines)
    terminal.result("")


def show_items(name: str, table: Sequence[items.Row]) -> None:
    """A table of what an evaluation found, with its name above."""
    terminal.result(f"{name}, item by item")
    lines: list[list[str]] = []
    for row in table:
        line = [row.group, str(row.items), _between(row.mean, row.low, row.high)]
        if row.difference is None:
            lines.append([*line, "to this one" if row is table[0] else "no item is shared", ""])
            continue
        told = row.difference
        mark = " *" if told.leaves_out_0 else ""
        lines.append([*line, f"{_between(told.estimate, told.low, told.high, '+')}{mark}", f"{told.p:.2g}"])
    print_table(["group", "items", "mean", "difference", "p"], lines)
    terminal.result("")


def _between(estimate: float, low: float, high: float, sign: str = "") -> str:
    return f"{estimate:{sign}.4g} [{low:{sign}.4g}, {high:{sign}.4g}]"


def _half(low: float | None, high: float | None) -> str:
    """Half of an interval, which has its estimate in the middle."""
    return "" if low is None or high is None else f" ± {(high - low) / 2:.4g}"


def together(in_step: Mapping[str, Sequence[str]]) -> list[str]:
    """What differs beside the labels: a comparison cannot tell its effect from theirs."""
    if not in_step:
        return []
    told = [f"{key} ({', '.join(dict.fromkeys(filter(None, values)))})" for key, values in in_step.items()]
    return [f"What else differs between these groups: {'; '.join(told)}."]


def meaning(tables: Mapping[str, Sequence[Row]]) -> list[str]:
    """What the intervals are, and are not."""
    every = list(itertools.chain.from_iterable(tables.values()))
    compared = [row.difference for row in every if row.difference is not None and row.difference.low is not None]
    lines: list[str] = []
    if any(row.low is not None for row in every):
        lines.append(
            "± is half of a 95 % interval over seeds, Student's t; of differences paired by seed, or Welch's; * leaves "
            f"out 0. Not corrected for the number of comparisons, {len(compared)} here."
        )
    if any(row.low is None for row in every):
        lines.append("One seed has no interval: a difference may be chance. align train -m run.seed=1,2,3 makes more.")
    return lines


def meaning_of_items(by_item: Mapping[str, Sequence[items.Row]]) -> list[str]:
    """What the intervals over items are, and are not."""
    if not by_item:
        return []
    return [
        "[ ] is a 95 % bootstrap interval over items, of differences over pairs; * leaves out 0; p is of swapping the "
        "two sides of items. It tells of these models on other such items, and nothing of other seeds."
    ]


def as_json(
    groups: Mapping[str, Sequence[Run]],
    in_step: Mapping[str, Sequence[str]],
    tables: Mapping[str, Sequence[Row]],
    by_item: Mapping[str, Sequence[items.Row]],
    left_out: Sequence[LeftOut],
) -> str:
    """Everything that the tables say, the values by seed, and which runs they are of."""
    return json.dumps(
        {
            "groups": {label: {str(run.seed): str(run.path) for run in runs} for label, runs in groups.items()},
            "differ_together": in_step,
            "metrics": {metric: [asdict(row) for row in table] for metric, table in tables.items()},
            "items": {name: [asdict(row) for row in table] for name, table in by_item.items()},
            "left_out": [asdict(run) for run in left_out],
            "meaning": [*meaning(tables), *meaning_of_items(by_item)],
        },
        indent=2,
    )
