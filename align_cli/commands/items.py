"""Groups of runs on the items that `align evaluate` kept of each: what is between them on the very same items.

Only `eval/NAME.json` of each run is read. Items are the observations, so that two runs are enough; what it tells is
of these models on other items of the kind, and nothing of other seeds.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from align_cli import results, statistics
from align_cli.results import FOLDER

FREE = ("date", "judge_date")  # of `made`: what may differ between results that are of the same items
PLACES = ("path", "hub", "revision", "limit", "seconds")  # options that `made` or the items tell better

Values = dict[str, dict[str, float]]  # metric -> item -> value


@dataclass(frozen=True)
class Difference:
    """A group's mean over the items less another's, both over the items that both have.

    Attributes:
        p: of the permutation test that swaps the two sides of items.
    """

    estimate: float
    low: float
    high: float
    p: float
    items: int

    @property
    def leaves_out_0(self) -> bool:
        """Whether the interval leaves out 0."""
        return not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Row:
    """A metric of an evaluation in a group: its mean over items, of values that are means over the group's seeds."""

    group: str
    seeds: int
    items: int
    mean: float
    low: float
    high: float
    difference: Difference | None


def tables(
    groups: Mapping[str, Sequence[Path]], base: str | None, left_out: list[tuple[str, str]]
) -> dict[str, list[Row]]:
    """The rows of each metric of each evaluation that at least two groups have, by `eval/NAME/METRIC`.

    Args:
        groups: the run directories of each group by its label.
        base: the group that the others are compared with; None: the first that has the metric.
        left_out: gets (run, reason) of each result that is not compared.

    Raises:
        UserError: a result cannot be read.
    """
    names = sorted({path.stem for runs in groups.values() for run in runs for path in results.all_of(run)})
    found: dict[str, list[Row]] = {}
    for name in names:
        kept = _alike(name, groups, left_out)
        for metric in dict.fromkeys(metric for values in kept.values() for each in values for metric in each):
            of = {
                label: _over_seeds([each[metric] for each in values if metric in each])
                for label, values in kept.items()
            }
            of = {label: items for label, items in of.items() if items}
            if len(of) > 1:
                found[f"{FOLDER}/{name}/{metric}"] = _rows(of, base, {label: len(kept[label]) for label in of})
    return found


def read(path: Path) -> tuple[Values, dict[str, Any]]:
    """An evaluation's values by metric and item, and how they were made.

    Raises:
        UserError: the file is damaged.
    """
    finished = results.read(path)
    values: Values = defaultdict(dict)
    for item in finished.items:
        for metric, value in item.values.items():
            values[metric][item.id] = value
    options: Mapping[str, Any] = finished.options.get("eval") or {}
    asked = {f"eval.{key}": value for key, value in options.items() if key not in PLACES}
    return dict(values), asked | {key: value for key, value in finished.made.items() if key not in FREE}


def _alike(name: str, groups: Mapping[str, Sequence[Path]], left_out: list[tuple[str, str]]) -> dict[str, list[Values]]:
    """The values of each group's runs that were made as the first run's were."""
    kept: dict[str, list[Values]] = defaultdict(list)
    first: dict[str, Any] | None = None
    for label, runs in groups.items():
        for run in runs:
            path = results.path_of(run, name)
            if not path.is_file():
                continue
            values, made = read(path)
            first = made if first is None else first
            other = sorted(key for key in {*made, *first} if made.get(key) != first.get(key))
            if other:
                told = ", ".join(f"{key} {made.get(key)}, not {first.get(key)}" for key in other)
                left_out.append((str(run), f"eval/{name} was made otherwise: {told}"))
            else:
                kept[label].append(values)
    return dict(kept)


def _over_seeds(values: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean over runs of each item that all of them have."""
    shared = [item for item in (values[0] if values else {}) if all(item in each for each in values)]
    return {item: fmean(each[item] for each in values) for item in shared}


def _rows(of: Mapping[str, Mapping[str, float]], base: str | None, seeds: Mapping[str, int]) -> list[Row]:
    first = base if base is not None and base in of else next(iter(of))
    rows: list[Row] = []
    for label in (first, *(label for label in of if label != first)):
        interval = statistics.mean_interval(list(of[label].values()))
        shared = [item for item in of[label] if item in of[first]]
        difference = None
        if label != first and shared:
            ours, theirs = [of[label][item] for item in shared], [of[first][item] for item in shared]
            p = statistics.sign_flip([a - b for a, b in zip(ours, theirs, strict=True)])
            difference = Difference(*statistics.paired(ours, theirs), p=p, items=len(shared))
        rows.append(Row(label, seeds[label], len(of[label]), *interval, difference=difference))
    return rows
