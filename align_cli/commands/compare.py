"""`align compare`: finished runs in groups that differ by more than their seed, and what is between the groups.

The seeds of a group are its independent observations; `config.yaml` and `summary.json` are all that is read for them.
What `align evaluate` measured on the same items of several groups is compared item by item as well (`items`).
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from align_cli import exits, terminal
from align_cli.commands import items
from align_cli.commands.arguments import Parser
from align_cli.commands.listing import print_table
from align_cli.comparison import (
    METRICS,
    LeftOut,
    Row,
    Run,
    find,
    finished,
    grouped,
    is_number,
    named,
    rows,
    value_of,
)
from align_cli.config import did_you_mean
from align_cli.errors import UserError

OPTIONS = ("metric=", "against=", "--json")
LEVEL = 0.05  # the largest p of what a table over items marks


def main(argv: list[str]) -> int:
    """`compare RUN_OR_SWEEP ... [metric=NAMES] [against=TEXT] [--json]`; returns the exit code."""
    parser = Parser(
        prog="align compare",
        usage="align compare RUN_OR_SWEEP ... [metric=NAME,NAME] [against=TEXT] [--json]",
        description="Compare groups of finished runs; the seeds of a group are its independent observations.",
        epilog=f"metric= takes names of summary.json; without it those of {', '.join(METRICS)} that all groups have, "
        "the loss where one algorithm makes it. against= is a part of the label of the group that the others are "
        "compared with; without it the first.",
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
        raise UserError(f"{what}; give finished runs of at least two configurations.")
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
            raise UserError(f"{word}: there is no such folder.{near} Give a run directory or a sweep's.")
        else:
            folders.append(word)
    if "" in metrics or against.count("") or len(against) > 1:
        raise UserError("metric= takes names such as eval/after/reward, against= one part of a group's label.")
    if not folders:
        raise UserError("align compare needs run directories, or folders of runs such as a sweep's.")
    return folders, list(dict.fromkeys(metrics)), against[0] if against else None


# --- figures


def usual(groups: Mapping[str, Sequence[Run]], otherwise: Mapping[str, Sequence[items.Row]]) -> list[str]:
    """The figures of `METRICS` that a run of each group has; a loss only where it is one algorithm's, or alone.

    Raises:
        UserError: there are none, and nothing is compared otherwise.
    """
    shared = [name for name in METRICS if all(any(is_number(run, name) for run in runs) for runs in groups.values())]
    algorithms = {value_of(run.settings, "algo.name") for runs in groups.values() for run in runs}
    if len(algorithms) > 1 and len(shared) > 1:
        shared = [name for name in shared if not name.startswith("loss/")]
    if not shared and not otherwise:
        raise UserError(f"the groups share none of {', '.join(METRICS)}; metric=NAME names another figure.")
    return shared


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
        mark = " *" if told.leaves_out_0 and told.p <= LEVEL else ""  # an interval of few items is too narrow
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
        "[ ] is a 95 % bootstrap interval over items, of differences over pairs; p is of swapping the two sides "
        "of items; * leaves out 0 with p up to 0.05, not corrected for the number of comparisons. It tells of these "
        "models on other such items, and nothing of other seeds."
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
