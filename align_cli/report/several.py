"""The page of several runs: the best first, then what varies among them, and a table of all of them."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from align_cli import comparison
from align_cli.comparison import LeftOut, Run
from align_cli.errors import UserError
from align_cli.report import content, figures
from align_cli.report.content import Content, called
from align_cli.report.page import Bullets, Cell, Commands, Figure, Folded, Heading, Section, Table, Text, Tone, Verdict
from align_cli.report.single import FALL, SHARE, curves, written
from align_cli.statistics import Interval

Groups = Mapping[str, Sequence[Run]]

KL = "eval/after/rollout/kl"
K = "data.responses"
FIRST = ("algo.alpha", "algo.beta")  # the rows and columns of heat maps, where they vary
LINES = 8  # groups whose curves are told apart
PANELS = 9  # heat maps side by side
BARS = 30  # groups with a bar
NOTES = 30  # sentences on what is notable
COMMANDS = 40  # commands that are shown
ACCURACY = "eval/after/rewards/accuracies"
LOWER = ("loss", "kl", "js", "tv", "perplexity", "bleu", "unrated", "down", "length", "seconds", "memory")
"""In a figure's name: less is better."""


@dataclass(frozen=True)
class Sweep:
    """Runs and what is known of them together.

    Attributes:
        runs: all of them, in the order of their folders.
        groups: the finished ones by what they differ in beside their seed.
        varying: the settings that differ among the groups: key -> its values, in their order.
        metric: the figure that runs are compared by.
    """

    runs: Sequence[Content]
    groups: Groups
    varying: Mapping[str, Sequence[str]]
    metric: str

    @property
    def least(self) -> bool:
        """Whether less of the metric is better."""
        return any(part in self.metric.split("/")[-1].split("_") for part in LOWER) or self.metric.startswith("loss/")

    @property
    def of_different_losses(self) -> bool:
        """Whether the metric is a loss that means something else from one configuration to the next."""
        settings = [key for key in self.varying if key.split(".")[0] in ("algo", "reward") or key == "data.responses"]
        return self.metric.startswith("loss/") and bool(settings)


def sections(runs: Sequence[Content], unread: Sequence[LeftOut], metric: str | None) -> list[Section]:
    """Everything that the page of several runs says, in its order.

    Args:
        unread: runs that cannot be read at all.
        metric: of summary.json; None: the usual one.

    Raises:
        UserError: no run has the metric.
    """
    left_out: list[LeftOut] = list(unread)
    known = comparison.finished((run.path for run in runs), left_out)
    groups, in_step = comparison.grouped(known, left_out)
    sweep = Sweep(runs, groups, _varying(groups), _metric(groups, metric))
    differences = _differences(sweep, left_out)  # which leaves out runs, too
    found: list[Section] = [*_verdicts(sweep), *_notable(sweep, left_out, in_step)]
    found += _heat_maps(sweep)
    found += _over_settings(sweep)
    found += differences
    if len(groups) <= LINES:
        by_path = {run.path: run for run in runs}
        shown = [(label or "the runs", [by_path[run.path] for run in group]) for label, group in groups.items()]
        found += curves(shown, "over the prompts of a step and over seeds, with a 95 % band where there are several")
    return [*found, *_table(sweep), *_commands(sweep)]


# --- what varies


def _varying(groups: Groups) -> dict[str, list[str]]:
    settings = [runs[0].settings for runs in groups.values()]
    keys = dict.fromkeys(itertools.chain.from_iterable(settings))
    found = {key: list(dict.fromkeys(each.get(key, comparison.ABSENT) for each in settings)) for key in keys}
    return {key: _ordered(values) for key, values in found.items() if len(values) > 1}


def _ordered(values: Sequence[str]) -> list[str]:
    """Numbers by size, then what is none, as it came."""
    return sorted(values, key=lambda value: (_number(value) is None, _number(value) or 0.0))


def _number(value: str) -> float | None:
    try:
        found = float(value)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def _numeric(sweep: Sweep) -> list[str]:
    return [key for key, values in sweep.varying.items() if all(_number(value) is not None for value in values)]


def _metric(groups: Groups, asked: str | None) -> str:
    """The figure to compare by: what is asked for, or the usual one that most runs have.

    Raises:
        UserError: no run has what is asked for.
    """
    runs = list(itertools.chain.from_iterable(groups.values()))
    if asked is not None:
        if not any(comparison.is_number(run, asked) for run in runs):
            raise UserError(f"metric={asked}: no finished run has such a figure.{comparison.near(asked, groups)}")
        return asked
    usual = (*comparison.METRICS[:-1], ACCURACY, comparison.METRICS[-1])
    count = Counter({name: sum(comparison.is_number(run, name) for run in runs) for name in usual})
    return max(usual, key=lambda name: count[name])


def _values(runs: Sequence[Run], metric: str) -> list[float]:
    """A figure of each run that has it and where it is finite."""
    found = (float(str(run.figures[metric])) for run in runs if comparison.is_number(run, metric))
    return [value for value in found if math.isfinite(value)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


# --- verdicts


def _verdicts(sweep: Sweep) -> list[Section]:
    found: list[Section] = []
    means = {label: _mean(_values(runs, sweep.metric)) for label, runs in sweep.groups.items()}
    means = {label: value for label, value in means.items() if math.isfinite(value)}
    if means and not sweep.of_different_losses:
        best = (min if sweep.least else max)(means, key=lambda label: means[label])
        seeds = len(_values(sweep.groups[best], sweep.metric))
        one = seeds == 1
        told = f"The {'least' if sweep.least else 'highest'} {called(sweep.metric)} is {_plain(means[best])}"
        if len(means) > 1:
            told += f", of {best}; {len(means)} configurations reach {_span(list(means.values()))}"
        luck = ": the best of many is partly luck" if len(means) > 2 else ""
        found.append(Verdict(f"{told}. It has {'one seed' if one else f'{seeds} seeds'}{luck}."))
    fell = {label: _mean(_values(runs, FALL)) for label, runs in sweep.groups.items()}
    fell = {label: value for label, value in fell.items() if math.isfinite(value)}
    if fell:
        down = [label for label, value in fell.items() if value < 0]
        shares = [_mean(_values(sweep.groups[label], SHARE)) for label in fell]
        tone: Tone = "good" if not down else "bad" if len(down) == len(fell) else "warning"
        found.append(
            Verdict(
                f"Likelihood displacement: on average chosen responses on held-out prompts became less likely in "
                f"{len(down)} of {len(fell)} configurations ({_span(list(fell.values()), signed=True)} nats; "
                f"{_span([100 * share for share in shares])} % of them fell).",
                tone,
            )
        )
    states = Counter(run.state.partition(" after")[0] for run in sweep.runs)
    unfinished = {state: count for state, count in states.items() if state != "finished"}
    if unfinished:
        parts = ", ".join(f"{count} {state}" for state, count in unfinished.items())
        found.append(Verdict(f"Of {len(sweep.runs)} runs {states['finished']} have finished; {parts}.", "warning"))
    return found


def _span(values: Sequence[float], *, signed: bool = False) -> str:
    low, high = min(values), max(values)
    told = figures.numbers([low, high], signed=signed)
    return told[0] if told[0] == told[1] else f"{told[0]} to {told[1]}"


def _plain(value: float) -> str:
    return figures.numbers([value])[0]


def _notable(sweep: Sweep, left_out: Sequence[LeftOut], in_step: Mapping[str, Sequence[str]]) -> list[Section]:
    told = [f"{run.path.name}: {problem}" for run in sweep.runs for problem in run.problems]
    reasons: dict[str, list[str]] = {}
    for run in left_out:
        reasons.setdefault(run.why, []).append(run.run.rpartition("/")[2])
    for why, names in reasons.items():
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        told.append(f"Not compared ({why}): {shown}.")
    for key, values in in_step.items():
        told.append(f"Groups also differ in {key} ({', '.join(dict.fromkeys(filter(None, values)))}).")
    if len(told) > NOTES:
        told = [*told[:NOTES], f"And {len(told) - NOTES} more of the kind."]
    return [Heading("What is notable"), Bullets(told)] if told else []


# --- heat maps


def _heat_maps(sweep: Sweep) -> list[Section]:
    """For each combination of the other settings a map over the first two numeric ones."""
    keys = [key for key in FIRST if key in _numeric(sweep)]
    keys += [key for key in _numeric(sweep) if key not in keys and key != K]
    keys += [key for key in _numeric(sweep) if key == K]
    if len(keys) < 2:
        return []
    down, across = keys[:2]
    others = [key for key in sweep.varying if key not in (down, across)]
    panels: dict[tuple[str, ...], list[Run]] = {}
    for runs in sweep.groups.values():
        place = tuple(runs[0].settings.get(key, comparison.ABSENT) for key in others)
        panels.setdefault(place, []).extend(runs)
    cells = len(sweep.varying[down]) * len(sweep.varying[across]) * len(panels)
    if len(panels) > PANELS or len(sweep.groups) < cells / 2:
        return []  # more maps than a reader compares, or no grid
    found: list[Section] = []
    for metric in dict.fromkeys((sweep.metric, FALL)):
        maps = {place: _map(sweep, runs, metric, down, across) for place, runs in sorted(panels.items(), key=_by_size)}
        values = [v for grid in maps.values() for row in grid.values for v in row if math.isfinite(v)]
        if not values:
            continue
        around_0 = metric == FALL
        what = (
            "Log-likelihood of chosen responses on held-out prompts since the start, nats"
            if around_0
            else called(metric)
        )
        found.append(Text(f"{what[0].upper()}{what[1:]}:"))
        for place, grid in maps.items():
            told = ", ".join(f"{_name(key)} = {value}" for key, value in zip(others, place, strict=True))
            svg = figures.heat(
                grid,
                title=told or called(metric),
                x=_name(across),
                y=_name(down),
                bounds=(min(values), max(values)),
                centre=0.0 if around_0 else None,
            )
            found.append(Figure(svg, ""))
    return [Heading(f"Over {_name(down)} and {_name(across)}"), *found]


def _by_size(item: tuple[tuple[str, ...], object]) -> list[tuple[bool, float, str]]:
    return [(_number(value) is None, _number(value) or 0.0, value) for value in item[0]]


def _map(sweep: Sweep, runs: Sequence[Run], metric: str, down: str, across: str) -> figures.Grid:
    rows, columns = sweep.varying[down], sweep.varying[across]

    def cell(row: str, column: str) -> float:
        own = [run for run in runs if run.settings.get(down) == row and run.settings.get(across) == column]
        return _mean(_values(own, metric))

    return figures.Grid(rows=rows, columns=columns, values=[[cell(row, column) for column in columns] for row in rows])


def _name(key: str) -> str:
    """algo.alpha as alpha, data.responses as K, algo.name as algo."""
    return "K" if key == K else key.removesuffix(".name").rpartition(".")[2]


# --- frontier, K, parallel coordinates


def _over_settings(sweep: Sweep) -> list[Section]:
    found = [*_frontier(sweep), *_over_k(sweep), *_parallel(sweep)]
    return [Heading("Over all settings"), *found] if found else []


def _kl(sweep: Sweep) -> str | None:
    """The figure that tells how far the policy is from its start, where there is one."""
    every = dict.fromkeys(itertools.chain.from_iterable(run.figures for runs in sweep.groups.values() for run in runs))
    measured = [name for name in every if name.startswith("eval/") and name.endswith(("/kl", "/reverse_kl"))]
    measured = [name for name in measured if not name.startswith("eval/before/")]
    return KL if KL in measured else next(iter(measured), None)


def _frontier(sweep: Sweep) -> list[Section]:
    """Score against KL; without a KL against how far chosen responses have moved."""
    kl = _kl(sweep)
    x = kl or FALL
    by = K if K in sweep.varying else "algo.name" if "algo.name" in sweep.varying else None
    rest = [key for key in sweep.varying if key != by]
    points: list[figures.Point] = []
    for runs in sweep.groups.values():
        settings = runs[0].settings
        near, score = _mean(_values(runs, x)), _mean(_values(runs, sweep.metric))
        series = f"{_name(by)} = {settings.get(by, comparison.ABSENT)}" if by else ""
        label = ", ".join(f"{_name(key)} {settings[key]}" for key in rest if key in settings)
        points.append(figures.Point(x=near, y=score, label=label, series=series))
    points = [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
    if len(points) < 2:
        return []
    points.sort(
        key=lambda point: [(_number(part) is None, _number(part) or 0.0, part) for part in point.series.split()]
    )
    best = figures.pareto(points)
    extremes = {id(p) for p in best} if kl and not sweep.least else {id(_best(sweep, points)), id(min(points, key=_x))}
    shown = [
        figures.Point(x=p.x, y=p.y, series=p.series, label=p.label if len(points) <= LINES or id(p) in extremes else "")
        for p in points
    ]
    title = f"{called(sweep.metric)} against {'KL' if kl else 'the likelihood of chosen responses'}"
    svg = figures.scatter(
        shown,
        title=title,
        x="KL to the starting model, nats of a response"
        if kl
        else "log-likelihood of chosen responses since the start, nats",
        y=called(sweep.metric),
        frontier=kl is not None and not sweep.least,
    )
    said = f"A point is a configuration; {x} and {sweep.metric} of summary.json."
    return [Figure(svg, said + (" The line joins what none beats at its KL or less." if kl else ""))]


def _x(point: figures.Point) -> float:
    return point.x


def _best(sweep: Sweep, points: Sequence[figures.Point]) -> figures.Point:
    return (min if sweep.least else max)(points, key=lambda point: point.y)


def _over_k(sweep: Sweep) -> list[Section]:
    """The score over K, a grey line for each setting of the others, and their mean."""
    if K not in sweep.varying or K not in _numeric(sweep):
        return []
    others = [key for key in sweep.varying if key != K]
    by: dict[tuple[str, ...], dict[float, float]] = {}
    for runs in sweep.groups.values():
        settings = runs[0].settings
        score = _mean(_values(runs, sweep.metric))
        if K in settings and math.isfinite(score):
            place = tuple(settings.get(key, comparison.ABSENT) for key in others)
            by.setdefault(place, {})[float(settings[K])] = score
    every = sorted({k for curve in by.values() for k in curve})
    whole = [curve for curve in by.values() if len(curve) == len(every)]
    if len(every) < 2 or not whole:
        return []
    drawn = [figures.Line(label="", x=every, y=[curve[k] for k in every], faint=True) for curve in whole]
    mean = [_mean([curve[k] for curve in whole]) for k in every]
    label = f"mean of {len(whole)} settings" if len(whole) > 1 else "score"
    drawn.append(figures.Line(label=label, x=every, y=mean))
    svg = figures.lines(
        drawn, title=f"{called(sweep.metric)} over K", x="responses of a prompt, K", y=called(sweep.metric), marked=True
    )
    grey = f" A grey line is one setting of {', '.join(map(_name, others))}." if others else ""
    return [Figure(svg, f"The mean over settings that have every K.{grey}")]


def _parallel(sweep: Sweep) -> list[Section]:
    runs = list(itertools.chain.from_iterable(sweep.groups.values()))
    if len(runs) < 3 or not sweep.varying:
        return []
    scales: list[figures.Scale] = []
    for key, values in list(sweep.varying.items())[:6]:
        places = {value: float(place) for place, value in enumerate(values)}
        own = [places[run.settings.get(key, comparison.ABSENT)] for run in runs]
        scales.append(figures.Scale(label=_name(key), values=own, ticks=values))
    for metric in dict.fromkeys((FALL, sweep.metric)):
        column = [(_values([run], metric) or [math.nan])[0] for run in runs]
        if any(math.isfinite(value) for value in column):
            scales.append(figures.Scale(label=called(metric), values=column))
    svg = figures.parallel(scales, title="Every run through its settings", least=sweep.least)
    return [Figure(svg, f"A line is a run; the thick one has the best {called(sweep.metric)}.")]


# --- differences


def _differences(sweep: Sweep, left_out: list[LeftOut]) -> list[Section]:
    """Means with intervals over seeds, and the differences to the first group, as `align compare` tells them."""
    having = [runs for runs in sweep.groups.values() if any(comparison.is_number(run, sweep.metric) for run in runs)]
    if len(having) < 2:
        return []
    rows = comparison.rows(sweep.groups, sweep.metric, None, left_out)
    seeded = any(row.low is not None for row in rows)
    found: list[Section] = []
    if len(rows) <= BARS and (seeded or len(rows) <= LINES):
        bars = [figures.Bar(label=row.group, value=row.mean, low=row.low, high=row.high) for row in rows]
        svg = figures.bars(
            bars, title=called(sweep.metric), x="mean over seeds, with 95 % intervals" if seeded else "one seed"
        )
        found.append(Figure(svg, ""))
    if seeded:
        cells: list[list[Cell]] = []
        for row in rows:
            told = row.difference
            bounded = _bounded(row.mean, row.low, row.high)
            less = "to this one" if told is None else _bounded(told.estimate, told.low, told.high)
            sure = "" if told is None or told.low is None else "yes" if told.leaves_out_0 else "no"
            cells.append([row.group, len(row.seeds), bounded, less, sure, told.method if told is not None else ""])
        header = ["configuration", "seeds", "mean", "difference", "leaves out 0", "by"]
        found.append(Table(header, cells, sortable=True))
        compared = sum(row.difference is not None and row.difference.low is not None for row in rows)
        found.append(
            Text(
                "Brackets are 95 % intervals over seeds, Student's t; of differences paired by seed, or Welch's. They "
                f"are not corrected for the number of comparisons, {compared} here."
            )
        )
    return [Heading("Between configurations"), *found] if found else []


def _bounded(estimate: float, low: float | None, high: float | None) -> Cell:
    return estimate if low is None or high is None else Interval(estimate, low, high)


# --- all runs


def _table(sweep: Sweep) -> list[Section]:
    grouped = {run.path: run for runs in sweep.groups.values() for run in runs}
    keys = list(sweep.varying)
    wanted = (sweep.metric, *comparison.METRICS, FALL, SHARE, _kl(sweep) or "")
    metrics = [name for name in dict.fromkeys(wanted) if any(name in run.figures for run in sweep.runs)]
    rows: list[list[Cell]] = []
    for run in sorted(sweep.runs, key=lambda run: _rank(sweep, run)):
        known = grouped.get(run.path)
        told = known.settings if known else {k: comparison.written(v) for k, v in run.config.items()}
        settings = [told.get(key, comparison.ABSENT) for key in keys]
        score = content.interval(run.figures, sweep.metric) or run.figures.get(sweep.metric)
        rest: list[Cell] = [run.figures.get(name) for name in metrics if name != sweep.metric]
        scores: list[Cell] = [score, *rest] if sweep.metric in metrics else rest
        seed = comparison.written(run.config.get("run.seed"))
        rows.append([*settings, seed, *scores, run.state, run.path.name])
    header = [*map(_name, keys), "seed", *map(called, metrics), "state", "run"]
    caption = f"The best {called(sweep.metric)} first; a click on a heading sorts. Intervals are over held-out prompts."
    return [Heading("All runs"), Table(header, rows, sortable=True, caption=caption)]


def _rank(sweep: Sweep, run: Content) -> tuple[bool, float]:
    value = run.figures.get(sweep.metric, math.nan)
    return not math.isfinite(value), (value if sweep.least else -value) if math.isfinite(value) else 0.0


def _commands(sweep: Sweep) -> list[Section]:
    every = [run.environment.get("command") for run in sweep.runs]
    told = [written(command) for command in every if isinstance(command, list) and command]
    if not told:
        return []
    more = [Text(f"And {len(told) - COMMANDS} more.")] if len(told) > COMMANDS else []
    return [Heading("Commands"), Folded(f"The command of each run ({len(told)})", [Commands(told[:COMMANDS]), *more])]
