"""What evaluations have found, on disk: OUT/eval/<name>.json, and their figures in OUT/summary.json.

OUT is the run directory of a run, and a folder of its own for a model that is not a run.
"""

import contextlib
import fcntl
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align_cli import judges, rundir, statistics
from align_cli.errors import RunError, UserError
from align_cli.evals import Item, Result
from align_cli.files import locked
from align_cli.statistics import Interval
from align_cli.tracking import Table

FOLDER = "eval"
LOCK = ".lock"
TRAINING = ("data", "algo", "scorer")  # sections of the configuration of training
SETTINGS = ("generate", "judge", "code", *TRAINING)  # what a runner's result depends on beside its own options
HEADINGS = ["eval", "metric", "value [95 %]", "n", "judge"]
SAMPLED = 100  # items of an evaluation that Weights & Biases shows


@dataclass(frozen=True)
class Figure:
    """A figure of an evaluation, with its 95 % interval where it has one, and the items that it is of."""

    value: float
    low: float | None
    high: float | None
    n: int | None


@dataclass(frozen=True)
class Finished:
    """A finished evaluation, as its file holds it.

    Attributes:
        name: of the evaluation, `eval/<name>`.
        figures: by name.
        made: how they came about; evaluations of two models that were made alike can be compared item by item.
        notes: sentences for the reader.
        subject: what was evaluated, by which version, and when.
        options: what was asked; the same options of the same weights give the same evaluation.
        items: what was found of each question, prompt or pair.
    """

    name: str
    figures: dict[str, Figure]
    made: dict[str, Any]
    notes: list[str]
    subject: dict[str, Any]
    options: dict[str, Any]
    items: list[Item]


def figures_of(result: Result) -> dict[str, Figure]:
    """The mean of each metric over the items that have it, and the result's own figures."""
    found: dict[str, Figure] = {}
    for name in dict.fromkeys(name for item in result.items for name in item.values):
        values = [item.values[name] for item in result.items if name in item.values]
        found[name] = Figure(*mean_of(values), n=len(values))
    ends = {f"{name}{end}" for name in result.figures for end in ("_low", "_high")}
    for name, value in result.figures.items():
        if name not in ends:
            low, high = (result.figures.get(f"{name}{end}") for end in ("_low", "_high"))
            of = found[name].n if name in found else result.counts.get(name, len(result.items)) or None
            found[name] = Figure(value, low, high, of)
    return found


def shown(figure: Figure) -> str:
    """A figure with its interval, for readers."""
    if figure.low is None or figure.high is None:
        return f"{figure.value:.4g}"
    return f"{figure.value:.4g} [{figure.low:.4g}, {figure.high:.4g}]"


def mean_of(values: Sequence[float]) -> Interval:
    """A mean over items with its interval: Wilson's of a share, the bootstrap's of anything else."""
    if all(value in (0.0, 1.0) for value in values):
        return statistics.wilson(sum(values), len(values))
    return statistics.mean_interval(values)


def rows_of(finished: Finished) -> list[list[str]]:
    """The figures as lines under `HEADINGS`."""
    judge = " ".join(str(finished.made[key]) for key in ("judge", "judge_date") if key in finished.made)
    return [
        [finished.name, name, shown(figure), "" if figure.n is None else str(figure.n), judge]
        for name, figure in finished.figures.items()
    ]


def sample_of(finished: Finished) -> Table:
    """Some of the items, for readers: their values, and what is shown of them."""
    some = finished.items[:SAMPLED]
    values = list(dict.fromkeys(name for item in some for name in item.values))
    told = list(dict.fromkeys(name for item in some for name in item.shown))
    rows: list[list[str | float]] = [
        [
            item.id,
            *(item.values.get(name, math.nan) for name in values),
            *(_text(item.shown.get(name)) for name in told),
        ]
        for item in some
    ]
    return Table(["id", *values, *(f"{name}:" if name in values else name for name in told)], rows)


def _text(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return "\n---\n".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def path_of(out: Path, name: str) -> Path:
    """The file of an evaluation."""
    return out / FOLDER / f"{name}.json"


def write(out: Path, finished: Finished) -> None:
    """Write an evaluation and its figures; two processes may do so at once.

    Raises:
        UserError: two items have one id.
        RunError: an item has a value that is not a finite number.
    """
    ids = Counter(item.id for item in finished.items)
    if len(ids) < len(finished.items):
        raise UserError(f"several items have the id {ids.most_common(1)[0][0]}; each needs its own.")
    for item in finished.items:
        odd = [name for name, value in item.values.items() if not math.isfinite(value)]
        if odd:
            raise RunError(
                f"item {item.id} has {odd[0]}={item.values[odd[0]]}, of which there is no mean; nothing is written. "
                "Weights that have diverged, or a probability of zero, give such numbers."
            )
    path = path_of(out, finished.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    told = asdict(finished)
    told["figures"] = {
        name: {key: rundir.plain(value) for key, value in asdict(figure).items()}
        for name, figure in finished.figures.items()
    }
    with _locked(path.parent):
        rundir.write_atomic(path, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
        prefix = f"{FOLDER}/{finished.name}/"
        before = rundir.read_summary(out) or {}
        kept = {name: value for name, value in before.items() if not name.startswith(prefix)}
        rundir.write_summary(out, kept | flat(finished))


def flat(finished: Finished) -> dict[str, rundir.Scalar]:
    """The figures under `eval/<name>/<metric>`, and those with `_low` and `_high` for their intervals."""
    found: dict[str, rundir.Scalar] = {}
    for name, figure in finished.figures.items():
        values = {"": figure.value, "_low": figure.low, "_high": figure.high}
        found |= {f"{FOLDER}/{finished.name}/{name}{end}": value for end, value in values.items() if value is not None}
    return found


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Within the block no other process writes the folder's evaluations."""
    with open(folder / LOCK, "w", encoding="utf-8") as file:
        locked(file.fileno(), fcntl.LOCK_EX)
        yield


def read(path: Path) -> Finished:
    """An evaluation from its file.

    Raises:
        UserError: the file is none of an evaluation.
    """
    try:
        told: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        figures = {
            name: Figure(float(each["value"]), _number(each["low"]), _number(each["high"]), each["n"])
            for name, each in told["figures"].items()
        }
        return Finished(
            name=told["name"],
            figures=figures,
            made=told["made"],
            notes=told["notes"],
            subject=told["subject"],
            options=told["options"],
            items=[Item(**item) for item in told["items"]],
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not an evaluation ({error}); removed, align evaluate makes it again") from error


def answers(path: Path, tree: Mapping[str, Any]) -> bool:
    """Whether a file holds the evaluation that a configuration asks for, whatever it was made of and by which code.

    A judge is another one where its section differs, or the model that is named there or in the environment.
    """
    try:
        there = read(path).options
    except UserError:
        return False
    plain = [name for name in ("eval", *SETTINGS) if name != "judge"]
    if any(there.get(name) != tree.get(name) for name in plain):
        return False
    judge, judged = tree.get("judge"), there.get("judge")
    if judge is None or judged is None:
        return judge is judged
    named = {**judge, "model": judges.model_of(judge) or judged.get("model")}
    return all(judged.get(name) == value for name, value in named.items())


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def all_of(out: Path) -> list[Path]:
    """The files of a folder's evaluations."""
    return sorted((out / FOLDER).glob("*.json"))
