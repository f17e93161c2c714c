"""What a run directory holds, read for a page: what is missing or damaged is said and left out, nothing is changed."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_cli import rundir, tracking
from align_cli.errors import UserError
from align_cli.statistics import Interval

EVALUATIONS = "eval"
CALLED = {
    "eval/after/reward": "held-out reward",
    "eval/after/exact_match": "held-out exact match",
    "eval/after/alignment": "held-out rating",
    "eval/after/rollout/kl": "KL, nats",
    "loss/last": "last loss",
    "displacement/chosen": "chosen, nats",
    "displacement/fraction_down": "share fallen",
}  # figure of summary.json -> what a table or an axis calls it


@dataclass(frozen=True, kw_only=True)
class Content:
    """A run as it lies on the disk.

    Attributes:
        config: with dots.
        figures: of summary.json that are numbers, infinite ones and NaN among them; empty where it has not finished.
        steps: the logged lines, in order.
        environment: env.json of the last session, empty where there is none.
        before, after: samples, by prompt.
        evaluations: the files of `align evaluate`.
        user: the process that is at work on it.
        problems: what could not be read, and what is not a number, a sentence each.
    """

    path: Path
    config: dict[str, Any]
    finished: bool
    figures: dict[str, float]
    steps: list[dict[str, float]]
    environment: dict[str, Any]
    before: dict[str, str]
    after: dict[str, str]
    evaluations: list[dict[str, Any]]
    user: str | None
    problems: list[str]

    @property
    def state(self) -> str:
        """finished, running, stopped after step 12, or not started."""
        if self.user is not None:
            return "running"
        if self.finished:
            return "finished"
        return f"stopped after step {self.steps[-1]['step']:g}" if self.steps else "not started"


def read(run: Path, *, whole: bool) -> Content:
    """Everything that a page tells of a run.

    Args:
        whole: keep all logged lines; False: the last one alone, as many runs at once have no curves.

    Raises:
        UserError: there is no configuration that can be read.
    """
    problems: list[str] = []
    config = rundir.flatten(rundir.read_config(run))
    summary: Mapping[str, Any] | None = None
    try:
        summary = rundir.read_summary(run)
    except UserError as error:
        problems.append(str(error))
    figures = numbers(summary or {})
    rows = steps(run / tracking.METRICS, problems)
    for name, where in not_finite(rows).items():
        at = f"step {where[0]:g}" if len(where) == 1 else f"{len(where)} steps, first at {where[0]:g}"
        problems.append(f"{name} is not a number at {at}.")
    problems += [f"{name} is not a number in the end." for name, value in figures.items() if not math.isfinite(value)]
    environment = _json(run / rundir.ENV, dict, problems)
    evaluations = [_json(path, dict, problems) for path in sorted((run / EVALUATIONS).glob("*.json"))]
    return Content(
        path=run,
        config=config,
        finished=summary is not None,
        figures=figures,
        steps=rows if whole else rows[-1:],
        environment=environment,
        before=_samples(run / rundir.SAMPLES_BEFORE, problems),
        after=_samples(run / rundir.SAMPLES, problems),
        evaluations=[told for told in evaluations if isinstance(told.get("figures"), dict)],
        user=rundir.holder(run),
        problems=problems,
    )


def numbers(told: Mapping[str, Any]) -> dict[str, float]:
    """The entries that are numbers; JSON has no NaN and no infinity, they come as texts."""
    found: dict[str, float] = {}
    for name, value in told.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number or value in ("nan", "inf", "-inf"):
            found[name] = float(value)
    return found


def steps(path: Path, problems: list[str]) -> list[dict[str, float]]:
    """The logged lines in the order of their steps; of damaged ones `problems` gets a sentence.

    A last line without an end is being written, or was cut short by a kill, and is not damage.
    """
    lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    rows: dict[float, dict[str, float]] = {}
    damaged: list[int] = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            told = json.loads(line)
        except ValueError:  # not JSON, or not UTF-8
            told = None
        row = numbers(told) if isinstance(told, dict) else {}
        if "step" in row:
            rows[row["step"]] = row
        else:
            damaged.append(number)
    if damaged:
        which = f"line{'s' * (len(damaged) > 1)} {', '.join(map(str, damaged[:5]))}{' …' * (len(damaged) > 5)}"
        problems.append(f"{path.name}: {which} cannot be read and {'are' if len(damaged) > 1 else 'is'} left out.")
    return [rows[step] for step in sorted(rows)]


def called(metric: str) -> str:
    """What a table or an axis calls a figure of summary.json."""
    return CALLED.get(metric, metric)


def interval(figures: Mapping[str, float], name: str) -> Interval | None:
    """A figure with its bounds, where it has them."""
    keys = (name, f"{name}_low", f"{name}_high")
    return Interval(*(figures[key] for key in keys)) if all(key in figures for key in keys) else None


def is_bound(figures: Mapping[str, Any], name: str) -> bool:
    """Whether a figure is a bound of another one."""
    return any(name.endswith(end) and name.removesuffix(end) in figures for end in ("_low", "_high"))


def curve(rows: Iterable[Mapping[str, float]], name: str) -> dict[float, float]:
    """A metric by step, where it was logged."""
    return {row["step"]: row[name] for row in rows if name in row}


def held_out(run: Content, name: str) -> dict[float, float]:
    """A metric on held-out prompts by step: before the first one, at `eval.every`, and after the last one."""
    found = curve(run.steps, f"eval/{name}")
    ends = (0.0, "before"), (run.figures.get("steps", 0.0), "after")
    return found | {
        step: run.figures[f"eval/{when}/{name}"] for step, when in ends if f"eval/{when}/{name}" in run.figures
    }


def not_finite(rows: Iterable[Mapping[str, float]]) -> dict[str, list[float]]:
    """The steps at which a metric is not a number, by metric."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if not math.isfinite(value):
                found.setdefault(name, []).append(row["step"])
    return found


def _samples(path: Path, problems: list[str]) -> dict[str, str]:
    rows = _json(path, list, problems)
    return {
        row["prompt"]: row["greedy"]
        for row in rows
        if isinstance(row, dict) and isinstance(row.get("prompt"), str) and isinstance(row.get("greedy"), str)
    }


def _json(path: Path, kind: type, problems: list[str]) -> Any:
    """A file's content; empty where it is absent or damaged."""
    if not path.is_file():
        return kind()
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read ({error}) and is left out.")
        return kind()
    if not isinstance(told, kind):
        problems.append(f"{path.name} holds something else than a report needs and is left out.")
        return kind()
    return told
