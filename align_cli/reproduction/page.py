"""The page of a reproduction: claims and verdicts, the paper's figure beside ours, samples, and how to repeat it."""

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_cli import rundir, statistics, terminal
from align_cli.report import content, figures, page
from align_cli.report.content import Content
from align_cli.report.page import (
    Bullets,
    Commands,
    Facts,
    Figure,
    Heading,
    Samples,
    Section,
    Table,
    Text,
    Tone,
    Verdict,
)
from align_cli.reproduction.claims import Verdict as OfClaim
from align_cli.reproduction.jobs import OF_STUDY, Job, Reproduction
from align_cli.reproduction.judging import Outcome
from align_cli.reproduction.recipe import Bars, Heat, Lines, PaperFigure, Run, Scatter
from align_cli.statistics import Interval

PAGE = "report.html"
TONES: dict[OfClaim, Tone] = {
    "holds": "good",
    "does not hold": "bad",
    "failed": "bad",
    "undecided": "warning",
    "unknown": "plain",
}
SHOWN = 4  # samples of each run


@dataclass(frozen=True)
class Material:
    """What is drawn.

    Attributes:
        reproduction: the recipe with its runs.
        told: `results.json`.
        runs: what lies in the run directories, by run and seed, as far as it can be read.
    """

    reproduction: Reproduction
    told: Mapping[str, Any]
    runs: Mapping[str, Mapping[int, Content]]

    def values(self, figure: str, chosen: Sequence[str] | None = None) -> dict[str, list[float]]:
        """A figure's values over seeds, by run; of a study by what comes before or stands for `*` in its name."""
        found: dict[str, list[float]] = {}
        for run, told in self.told["runs"].items():
            for seed in told["seeds"].values():
                for label, value in _named(run, figure, content.numbers(seed["figures"])).items():
                    if math.isfinite(value) and (chosen is None or label in chosen):
                        found.setdefault(label, []).append(value)
        return found


def _named(run: str, figure: str, known: Mapping[str, float]) -> dict[str, float]:
    if run != OF_STUDY:
        return {run: known[figure]} if figure in known else {}
    if "*" in figure:
        return {key: value for key, value in known.items() if fnmatch.fnmatchcase(key, figure)}
    return {
        key.removesuffix(f"/{figure}"): value
        for key, value in known.items()
        if key == figure or key.endswith(f"/{figure}")
    }


def write(
    reproduction: Reproduction, planned: Sequence[Job], found: Sequence[Outcome], told: Mapping[str, Any]
) -> Path:
    """Write the page beside `results.json`; returns where it is.

    Raises:
        UserError: it cannot be written.
    """
    runs: dict[str, dict[int, Content]] = {}
    for job in planned:
        if job.run != OF_STUDY and (job.folder / rundir.CONFIG).is_file():
            runs.setdefault(job.run, {})[job.seed] = content.read(job.folder, whole=True)
    material = Material(reproduction, told, runs)
    sections: list[Section] = [
        *_claims(found),
        *_drawings(material),
        *_samples(material),
        *_departures(reproduction),
        *_repeat(material),
    ]
    where = reproduction.folder / PAGE
    page.write(where, reproduction.recipe.title, sections)
    return where


# --- claims


def _claims(found: Sequence[Outcome]) -> list[Section]:
    """What was claimed, what was found."""
    counted = {verdict: sum(each.judged.verdict == verdict for each in found) for verdict in TONES}
    said = ", ".join(f"{count} {_plural(verdict, count)}" for verdict, count in counted.items() if count)
    tone: Tone = "bad" if counted["does not hold"] or counted["failed"] else "good" if counted["holds"] else "plain"
    rows = [
        [
            each.expectation.claim,
            _measured(each),
            each.expectation.expected,
            f"{each.expectation.kind}: {each.expectation.source}",
            page.SIGNS[TONES[each.judged.verdict]] + each.judged.verdict,
            each.judged.why,
        ]
        for each in found
    ]
    explained = (
        "Measured is the mean over seeds with Student's 95 % interval. A claim holds where the whole interval "
        "satisfies it, and does not hold where all of it contradicts it. Not corrected for the number of claims."
    )
    header = ["claim", "measured", "expected", "source", "verdict", "why"]
    return [Verdict(f"{len(found)} claims: {said}.", tone), Heading("Claims"), Table(header, rows), Text(explained)]


SEVERAL = {"holds": "hold", "does not hold": "do not hold"}


def _plural(verdict: str, count: int) -> str:
    return verdict if count == 1 else SEVERAL.get(verdict, verdict)


def _measured(outcome: Outcome) -> page.Cell:
    judged = outcome.judged
    if judged.estimate is None or judged.low is None or judged.high is None:
        return judged.estimate
    return Interval(judged.estimate, judged.low, judged.high)


# --- pictures


def _drawings(material: Material) -> list[Section]:
    recipe = material.reproduction.recipe
    found: list[Section] = []
    for drawing in recipe.draw:
        if isinstance(drawing, Lines):
            found += _lines(material, drawing)
        elif isinstance(drawing, Bars):
            found += _bars(material, drawing)
        elif isinstance(drawing, Scatter):
            found += _scatter(material, drawing)
        else:
            found += _heat(material, drawing)
    theirs = _of_paper(recipe.paper_figure)
    return [Heading("The paper's figure, and ours"), *theirs, *found]


def _of_paper(given: PaperFigure | None) -> list[Section]:
    if given is None:
        return [Text("The values of the paper's own figure could not be sourced.")]
    drawn = [
        figures.Line(label=name, x=[point[0] for point in points], y=[point[1] for point in points], dashed=True)
        for name, points in given.series.items()
    ]
    svg = figures.lines(drawn, title="The paper's figure", x=given.x, y="")
    return [Figure(svg, f"The paper's: {given.y}. Source: {given.source}.")]


def _lines(material: Material, drawing: Lines) -> list[Section]:
    """Each figure by step, or over a swept key, or over what stands for `*` in the names of a study's figures."""
    if drawing.x == "step":
        return [section for metric in drawing.y for section in _courses(material, metric)]
    if material.reproduction.scale.study is not None:
        lines = [line for pattern in drawing.y for line in _over_names(material, pattern)]
        return _drawn(lines, " and ".join(drawing.y), drawing.x, "")
    return [
        section
        for figure in drawing.y
        for section in _drawn(_over_swept(material, drawing.x, figure), figure, drawing.x, figure)
    ]


def _drawn(lines: Sequence[figures.Line], title: str, x: str, y: str) -> list[Section]:
    if not any(line.x for line in lines):
        return []
    svg = figures.lines(lines, title=title, x=x, y=y, marked=True)
    return [Figure(svg, "Means over seeds with 95 % intervals.")]


def _courses(material: Material, metric: str) -> list[Section]:
    drawn: list[figures.Line] = []
    for run, seeds in material.runs.items():
        known = [curve for curve in (content.curve(each.steps, metric) for each in seeds.values()) if curve]
        if known:
            drawn.append(figures.averaged(run, known))
    if not drawn:
        return []
    svg = figures.lines(drawn, title=content.called(metric), x="optimizer step", y=metric, level=0.0)
    return [Figure(svg, "On what a step trains on; means over seeds with 95 % intervals.")]


def _over_names(material: Material, pattern: str) -> list[figures.Line]:
    place = re.compile(re.escape(pattern).replace(r"\*", "(.*)", 1))
    curves: list[dict[float, float]] = []
    for told in material.told["runs"].values():
        for seed in told["seeds"].values():
            known = content.numbers(seed["figures"])
            matched = {key: place.fullmatch(key) for key in known}
            points = {_number(m[1]): known[key] for key, m in matched.items() if m is not None}
            curves.append({x: y for x, y in points.items() if x is not None})
    curves = [dict(sorted(curve.items())) for curve in curves if curve]
    return [figures.averaged(pattern, curves)] if curves else []


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _over_swept(material: Material, key: str, figure: str) -> list[figures.Line]:
    """A line for each of the other swept values."""
    curves: dict[str, dict[int, dict[float, float]]] = {}
    for run in material.reproduction.scale.runs:
        swept = dict(each.split("=", 1) for each in run.swept)
        x = _number(swept.pop(key, ""))
        if x is None:
            continue
        label = ", ".join([run.name.partition("[")[0], *(f"{name}={value}" for name, value in swept.items())])
        for place, value in enumerate(material.values(figure, [run.name]).get(run.name, [])):
            curves.setdefault(label, {}).setdefault(place, {})[x] = value
    return [
        figures.averaged(label, [dict(sorted(curve.items())) for curve in seeds.values()])
        for label, seeds in curves.items()
    ]


def _interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    if len(values) == 1:
        return values[0], None, None
    return statistics.student(values)


def _bars(material: Material, drawing: Bars) -> list[Section]:
    given: list[figures.Bar] = []
    for figure in drawing.y:
        for label, values in material.values(figure, drawing.runs).items():
            value, low, high = _interval(values)
            given.append(figures.Bar(label=label, value=value, low=low, high=high, series=figure))
    if not given:
        return []
    several = len(drawing.y) > 1
    given = given if several else [figures.Bar(**{**vars(bar), "series": ""}) for bar in given]
    x = "" if several else drawing.y[0]
    svg = figures.bars(given, title=", ".join(map(content.called, drawing.y)), x=x, level=0.0)
    return [Figure(svg, "Means over seeds with 95 % intervals, after training.")]


def _scatter(material: Material, drawing: Scatter) -> list[Section]:
    across, up = material.values(drawing.x, drawing.runs), material.values(drawing.y, drawing.runs)
    points = [
        figures.Point(
            x=_interval(across[label])[0],
            y=_interval(up[label])[0],
            label=label.partition("[")[2].removesuffix("]"),
            series=label.partition("[")[0],
        )
        for label in across
        if label in up
    ]
    if not points:
        return []
    title = f"{content.called(drawing.y)} against {content.called(drawing.x)}"
    return [Figure(figures.scatter(points, title=title, x=drawing.x, y=drawing.y), "A point is a mean over seeds.")]


def _heat(material: Material, drawing: Heat) -> list[Section]:
    found: list[Section] = []
    groups: dict[str, list[Run]] = {}
    for run in material.reproduction.scale.runs:
        swept = dict(each.split("=", 1) for each in run.swept)
        if {drawing.x, drawing.y} <= set(swept) and (drawing.runs is None or run.name in drawing.runs):
            rest = [f"{key}={value}" for key, value in swept.items() if key not in (drawing.x, drawing.y)]
            groups.setdefault(", ".join([run.name.partition("[")[0], *rest]), []).append(run)
    for label, runs in groups.items():
        cells = {_place(run, drawing): material.values(drawing.figure, [run.name]).get(run.name) for run in runs}
        columns, rows = (list(dict.fromkeys(place[axis] for place in cells)) for axis in (0, 1))
        values = [[_mean(cells.get((column, row))) for column in columns] for row in rows]
        grid = figures.Grid(rows=rows, columns=columns, values=values)
        svg = figures.heat(grid, title=f"{content.called(drawing.figure)}, {label}", x=drawing.x, y=drawing.y)
        found.append(Figure(svg, f"{drawing.figure}, means over seeds."))
    return found


def _place(run: Run, drawing: Heat) -> tuple[str, str]:
    swept = dict(each.split("=", 1) for each in run.swept)
    return swept[drawing.x], swept[drawing.y]


def _mean(values: Sequence[float] | None) -> float:
    return _interval(values)[0] if values else math.nan


# --- samples, and how to repeat it


def _samples(material: Material) -> list[Section]:
    found: list[Section] = []
    for run, seeds in material.runs.items():
        first = next(iter(seeds.values()))
        prompts = list(dict.fromkeys([*first.after, *first.before]))[:SHOWN]
        if prompts:
            told = [(prompt, first.before.get(prompt), first.after.get(prompt)) for prompt in prompts]
            found += [Text(f"{run}, seed {next(iter(seeds))}: responses to held-out prompts."), Samples(told)]
    return [Heading("Samples before and after"), *found] if found else []


def _departures(reproduction: Reproduction) -> list[Section]:
    departures = reproduction.scale.departures or ("None is known.",)
    return [Heading("What departs from the paper"), Bullets(departures)]


def _repeat(material: Material) -> list[Section]:
    told = material.told
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items() if version)
    facts = [
        ("recipe", f"{told['recipe']}, {told['paper']}, scale {told['scale']}"),
        ("seeds", ", ".join(map(str, told["seeds"]))),
        ("cost", material.reproduction.scale.cost),
        ("this took", f"{told['seconds'] / 60:.1f} minutes"),
        ("machine", str(told["machine"])),
        ("commit", str(told["commit"] or "unknown")),
        ("date", str(told["date"])),
        ("versions", versions),
    ]
    states = [
        [run, seed, str(each["state"])] for run, those in told["runs"].items() for seed, each in those["seeds"].items()
    ]
    whole = terminal.shell(
        ["align", "reproduce", told["recipe"], f"scale={told['scale']}", f"seeds={len(told['seeds'])}"]
    )
    each = [those["command"] for those in told["runs"].values()]
    return [
        Heading("How to repeat it"),
        Facts(facts),
        Commands([whole, *each]),
        page.Folded("State of every run", [Table(["run", "seed", "state"], states)]),
    ]
