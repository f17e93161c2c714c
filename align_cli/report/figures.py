"""Figures as inline SVG for a page that is light or dark: plain data in, text out.

matplotlib draws with colours that stand for roles, and the roles become CSS variables of the page (`page.STYLE` sets
them). Text stays text, in the page's font. Series are Okabe and Ito's colours, which people with any colour vision tell
apart, and have a marker each, which tells them apart in grey. A unit of the drawing is a CSS pixel.
"""

import contextlib
import hashlib
import html
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align_cli import statistics

SERIES = 8  # colours and markers; what comes after goes round
MARKERS = "os^DvPX*"
WIDTH, HEIGHT = 500, 300  # pixels of an ordinary figure
WIDE = 680
MOST = 240  # points of a line that are drawn
LONGEST = 48  # characters of a label

# Colours that stand for roles; no picture shows them.
INK, SOFT, GRID, PAPER, ON_MIDDLE = "#020001", "#020002", "#020003", "#020004", "#020005"
_ROLES = {
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    GRID: "var(--grid)",
    PAPER: "var(--paper)",
    ON_MIDDLE: "var(--on-middle)",
}
# Shares of a cell's colour above which its text takes the colour of the page, of a dark one and of a light one.
MIDDLE, STRONG = 0.62, 0.87
_UNIT = 72  # matplotlib's SVG has 72 units to the inch


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points in the order of x; with `low` and `high` a band around them. What is not finite is a gap.

    Attributes:
        dashed: for what is not measured here, such as a paper's own figures.
        faint: thin and grey, without an entry in the legend.
        series: lines of one series have one colour and marker; empty: the label.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dashed: bool = False
    faint: bool = False
    series: str = ""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A value with its interval; bars of one series have one colour."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    series: str = ""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point; `label` is written beside it where it is not empty. Points of one series have one colour and marker."""

    x: float
    y: float
    label: str = ""
    series: str = ""
    hollow: bool = False


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Values by row and column, (rows, columns); NaN where there is none."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """An axis of parallel coordinates: a number of each run, or, with `ticks`, a place among them."""

    label: str
    values: Sequence[float]
    ticks: Sequence[str] | None = None


# --- kinds


def averaged(label: str, curves: Sequence[Mapping[float, float]], *, dashed: bool = False, series: str = "") -> Line:
    """The mean over seeds with Student's 95 % interval, at every x that all curves have.

    Args:
        curves: y by x, of one seed each; at least one. One has no band.
    """
    shared = sorted(x for x in curves[0] if all(x in curve for curve in curves))
    if len(curves) == 1:
        return Line(label=label, x=shared, y=[curves[0][x] for x in shared], dashed=dashed, series=series)
    columns = [[curve[x] for curve in curves] for x in shared]
    none = statistics.Interval(math.nan, math.nan, math.nan)
    found = [statistics.student(values) if all(map(math.isfinite, values)) else none for values in columns]
    estimates, lows, highs = (list(part) for part in zip(*found, strict=True)) if found else ([], [], [])
    return Line(label=label, x=shared, y=estimates, low=lows, high=highs, dashed=dashed, series=series)


def lines(
    given: Sequence[Line], *, title: str, x: str, y: str, level: float | None = None, marked: bool = False
) -> str:
    """Lines with bands.

    Args:
        x, y: what the axes show, with the unit.
        level: a value of y with a line of its own, such as 0.
        marked: every point has its marker, and x its ticks at the points: for a few values rather than a course.
    """
    told = [line for line in given if not line.faint]
    named = list(dict.fromkeys(line.series or line.label for line in told))
    with _figure(title) as (figure, place, out):
        if level is not None:
            place.axhline(level, color=SOFT, linewidth=1)
        for line in given:
            kept = thinned(line.y)
            xs, ys = [line.x[i] for i in kept], _finite([line.y[i] for i in kept])
            if line.faint:
                place.plot(xs, ys, color=SOFT, linewidth=0.8, alpha=0.55)
                continue
            number = named.index(line.series or line.label)
            if line.low is not None and line.high is not None:
                low, high = (_finite([bound[i] for i in kept]) for bound in (line.low, line.high))
                place.fill_between(xs, low, high, color=_series(number), alpha=0.18, linewidth=0)
            place.plot(
                xs,
                ys,
                color=_series(number),
                label=short(line.label),
                linewidth=1.8,
                linestyle="--" if line.dashed else "-",
                marker=MARKERS[number % SERIES],
                markersize=4.5,
                markevery=1 if marked else max(1, len(xs) // 7),
            )
        if marked:
            every = sorted({value for line in given for value in line.x})
            place.set_xticks(every[:12], [f"{value:g}" for value in every[:12]])
        _axes(place, x, y)
        _legend(figure, place, len(told))
    return out[0]


def bars(given: Sequence[Bar], *, title: str, x: str, level: float | None = None) -> str:
    """Horizontal bars from 0, each with its interval and its value, the first one on top."""
    named = list(dict.fromkeys(bar.series for bar in given))
    with _figure(title, WIDE, 74 + 25 * max(1, len(given)) + 26 * (len(named) > 1)) as (figure, place, out):
        ends: list[float] = [0.0]
        written = numbers([bar.value for bar in given], signed=min((bar.value for bar in given), default=0) < 0)
        for height, bar in enumerate(given):
            if not math.isfinite(bar.value):
                place.annotate(" not finite", (max(0.0, level or 0.0), height), va="center", color=SOFT)
                continue
            number = named.index(bar.series)
            place.barh(height, bar.value, color=_series(number), height=0.62, label=short(bar.series), alpha=0.85)
            end = bar.value
            if bar.low is not None and bar.high is not None and math.isfinite(bar.low) and math.isfinite(bar.high):
                place.plot([bar.low, bar.high], [height] * 2, color=INK, linewidth=1.3)
                place.plot([bar.low, bar.high], [height] * 2, color=INK, linestyle="", marker="|", markersize=6)
                end = bar.low if bar.value < 0 else bar.high
                ends += [bar.low, bar.high]
            ends.append(bar.value)
            left = bar.value < 0
            place.annotate(
                written[height],
                (end, height),
                xytext=(-5 if left else 5, 0),
                textcoords="offset points",
                va="center",
                ha="right" if left else "left",
            )
        place.set_yticks(range(len(given)), [short(bar.label) for bar in given])
        place.set_ylim(max(1, len(given)) - 0.5, -0.5)
        place.axvline(0 if level is None else level, color=SOFT, linewidth=1)
        wide = max(ends) - min(ends) or 1.0
        place.set_xlim(min(ends) - 0.14 * wide * (min(ends) < 0), max(ends) + 0.14 * wide)
        _axes(place, x, "")
        place.grid(axis="y", visible=False)
        _legend(figure, place, len(named))
    return out[0]


def scatter(given: Sequence[Point], *, title: str, x: str, y: str, frontier: bool = False) -> str:
    """Points with labels.

    Args:
        frontier: a line along the points that none exceeds in y at an equal or a smaller x.
    """
    shown = [point for point in given if math.isfinite(point.x) and math.isfinite(point.y)]
    named = list(dict.fromkeys(point.series for point in given))
    with _figure(title, WIDTH, 340) as (figure, place, out):
        for number, name in enumerate(named):
            for hollow in (False, True):
                own = [point for point in shown if point.series == name and point.hollow == hollow]
                if own:
                    place.plot(
                        [point.x for point in own],
                        [point.y for point in own],
                        linestyle="",
                        marker=MARKERS[number % SERIES],
                        markersize=7,
                        color=_series(number),
                        markerfacecolor=PAPER if hollow else _series(number),
                        markeredgecolor=_series(number) if hollow else PAPER,
                        markeredgewidth=1.4 if hollow else 0.7,
                        label=short(name),
                    )
        if frontier:
            best = pareto(shown)
            place.plot([p.x for p in best], [p.y for p in best], color=SOFT, linewidth=1.2, zorder=1)
        place.margins(0.09)
        _axes(place, x, y)
        _legend(figure, place, len(named))
        figure.canvas.draw()  # the limits are settled, and labels can look for room
        _label(place, shown)
    return out[0]


def heat(
    grid: Grid, *, title: str, x: str, y: str, bounds: tuple[float, float] | None = None, centre: float | None = None
) -> str:
    """A heat map with the value written in every cell.

    Args:
        bounds: the values of the weakest and the strongest colour; None: those of the grid. Maps that stand side by
            side share them.
        centre: the value without colour; above it is the first series' colour, below it the second's.
    """
    values = [value for row in grid.values for value in row if math.isfinite(value)]
    low, high = bounds or ((min(values), max(values)) if values else (0.0, 1.0))
    rows, columns = len(grid.rows), len(grid.columns)
    texts = numbers([*(value for line in grid.values for value in line), low, high], signed=centre is not None)
    cell = min(80, max(46, 300 // max(1, columns)))
    with _figure(title, 92 + cell * columns, 78 + 40 * rows) as (_, place, out):
        for row, line in enumerate(grid.values):
            for column, value in enumerate(line):
                written = texts[row * columns + column]
                if not math.isfinite(value):
                    place.annotate("–", (column, row), ha="center", va="center", color=SOFT)
                    continue
                share, below = _share(value, low, high, centre)
                place.add_patch(_square(column, row, f"#0{4 if below else 3}00{round(100 * share):02x}"))
                ink = PAPER if share > STRONG else ON_MIDDLE if share > MIDDLE else INK
                place.annotate(written, (column, row), ha="center", va="center", color=ink)
        place.set_xlim(-0.5, columns - 0.5)
        place.set_ylim(rows - 0.5, -0.5)
        place.set_xticks(range(columns), [short(name, 12) for name in grid.columns])
        place.set_yticks(range(rows), [short(name, 18) for name in grid.rows])
        place.set_xlabel(short(x))
        place.set_ylabel(short(y))
        place.tick_params(length=0)
        place.grid(visible=False)
        place.spines[:].set_visible(False)
    return out[0]


def parallel(scales: Sequence[Scale], *, title: str, least: bool = False) -> str:
    """A line for each run through its place on every axis; the stronger, the higher on the last one. The best is thick.

    Args:
        scales: at least two, each with a value of every run; a run without a finite value on all of them is left out.
        least: the best is the least on the last axis.
    """
    runs = [run for run in zip(*(scale.values for scale in scales), strict=True) if all(map(math.isfinite, run))]
    runs.sort(key=lambda run: -run[-1] if least else run[-1])
    spans = [(min(column), max(column)) for column in zip(*runs, strict=True)] or [(0.0, 1.0)] * len(scales)

    def height(axis: int, value: float) -> float:
        low, high = spans[axis]
        return (value - low) / (high - low) if high > low else 0.5

    with _figure(title, WIDE, 330) as (_, place, out):
        for number, run in enumerate(runs):
            heights = [height(axis, value) for axis, value in enumerate(run)]
            best = number == len(runs) - 1
            level = round(30 + 70 * heights[-1])
            colour = _series(1) if best else f"#0300{level:02x}"
            place.plot(range(len(run)), heights, color=colour, linewidth=3 if best else 1.3, alpha=1 if best else 0.8)
        for axis, scale in enumerate(scales):
            place.axvline(axis, color=SOFT, linewidth=1)
            low, high = spans[axis]
            told = list(zip((low, high), numbers((low, high)), strict=True))[: 1 + (high > low)]
            if scale.ticks is not None:
                told = [(float(at), short(name, 16)) for at, name in enumerate(scale.ticks)]
            step = math.ceil(len(told) / 12)
            for value, name in told[::step]:
                place.annotate(
                    name,
                    (axis, height(axis, value)),
                    xytext=(-5, 0),
                    textcoords="offset points",
                    ha="right",
                    va="center",
                    bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1, "alpha": 0.8},
                )
        place.set_xlim(-0.45, len(scales) - 0.85)
        place.set_ylim(-0.06, 1.06)
        place.set_xticks(range(len(scales)), [short(scale.label, 22) for scale in scales])
        place.set_yticks([])
        place.tick_params(length=0)
        place.grid(visible=False)
        place.spines[:].set_visible(False)
    return out[0]


# --- what they share


def thinned(values: Sequence[float], most: int = MOST) -> list[int]:
    """The places to draw of a long line: of each stretch the least and the greatest value, so that no spike is lost.

    Args:
        values: what is not finite is kept as the gap that it is, where a whole stretch is so.
    """
    if len(values) <= most:
        return list(range(len(values)))
    stretches = most // 2
    kept = {0, len(values) - 1}
    for number in range(stretches):
        places = range(number * len(values) // stretches, (number + 1) * len(values) // stretches)
        finite = [at for at in places if math.isfinite(values[at])] or [places[0]]
        kept |= {min(finite, key=lambda at: values[at]), max(finite, key=lambda at: values[at])}
    return sorted(kept)


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that none exceeds in y at an equal or a smaller x, from left to right."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -point.y)):
        if not best or point.y > best[-1].y:
            best.append(point)
    return best


def short(text: str, most: int = LONGEST) -> str:
    """A label of one line, with its middle left out where it is too long."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(line) <= most:
        return line
    tail = (most - 1) // 2
    return f"{line[: most - 1 - tail]}…{line[-tail:]}"


def numbers(values: Sequence[float], *, signed: bool = False) -> list[str]:
    """Numbers that are read together, with equally many decimals where that tells them apart.

    Args:
        signed: a plus before what is above 0.
    """
    sizes = [abs(value) for value in values if value and math.isfinite(value)]
    largest = max(sizes, default=1.0)
    fixed = 1e-3 <= largest < 1e6
    decimals = min(4, max(0, 2 - math.floor(math.log10(largest)))) if fixed else 0
    plus = "+" if signed else ""

    def written(value: float) -> str:
        if not math.isfinite(value):
            return "not finite"
        told = format(value, f"{plus},.{decimals}f" if fixed else f"{plus}.3g")
        return (told if any(digit in told for digit in "123456789") else told.lstrip("+-")).replace("-", "−")

    return [written(value) for value in values]


def signed(value: float) -> str:
    """A number with its sign: +0.120, −1.30, 0."""
    return numbers([value], signed=True)[0]


def _finite(values: Sequence[float]) -> list[float]:
    return [value if math.isfinite(value) else math.nan for value in values]


def _series(number: int) -> str:
    return f"#0100{number % SERIES:02x}"


def _square(column: int, row: int, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colour, edgecolor=PAPER, linewidth=2)


def _share(value: float, low: float, high: float, centre: float | None) -> tuple[float, bool]:
    """How strong a cell's colour is, in [0, 1], and whether its value lies below the centre."""
    if centre is None:
        share = (value - low) / (high - low) if high > low else 0.5
        return 0.06 + 0.94 * min(1.0, max(0.0, share)), False
    most = max(abs(low - centre), abs(high - centre)) or 1.0
    return min(1.0, abs(value - centre) / most), value < centre


def _axes(place: Any, x: str, y: str) -> None:
    place.set_xlabel(short(x, 72))
    place.set_ylabel(short(y))
    if not place.has_data():
        place.text(0.5, 0.5, "no finite values", ha="center", va="center", color=SOFT, transform=place.transAxes)
        place.set_xticks([])
        place.set_yticks([])


def _legend(figure: Any, place: Any, entries: int) -> None:
    """Below the axes, so that it hides nothing; none for a single series without a name."""
    handles, labels = place.get_legend_handles_labels()
    once = {label: handle for handle, label in zip(handles, labels, strict=True) if label}
    if entries < 2 and len(once) < 2:
        return
    longest = max(map(len, once), default=1)
    columns = max(1, min(len(once), int(figure.get_figwidth() * _UNIT / (34 + 7 * longest))))
    figure.legend(once.values(), once.keys(), loc="outside lower left", ncols=columns, handlelength=2.2)


def _label(place: Any, points: Sequence[Point]) -> None:
    """Write labels where they cover neither a point nor each other; where there is no room, to the right."""
    to_pixels = place.transData.transform
    taken = [(px - 5, py - 5, px + 5, py + 5) for px, py in (to_pixels((p.x, p.y)) for p in points)]
    box = place.get_window_extent()
    for point in points:
        text = short(point.label, 32)
        if not text:
            continue
        px, py = to_pixels((point.x, point.y))
        width, height = 6.4 * len(text), 12
        choices = [
            ("left", "center", 8, 0),
            ("right", "center", -8, 0),
            ("center", "bottom", 0, 7),
            ("center", "top", 0, -7),
            ("left", "bottom", 6, 6),
            ("right", "bottom", -6, 6),
            ("left", "top", 6, -6),
            ("right", "top", -6, -6),
        ]
        boxes: list[tuple[float, float, float, float]] = []
        for across, along, dx, dy in choices:
            left = px + dx - {"left": 0.0, "center": width / 2, "right": width}[across]
            bottom = py + dy - {"bottom": 0.0, "center": height / 2, "top": height}[along]
            boxes.append((left, bottom, left + width, bottom + height))
        free = [n for n, own in enumerate(boxes) if _inside(own, box) and not any(_meet(own, one) for one in taken)]
        chosen = free[0] if free else 0
        across, along, dx, dy = choices[chosen]
        taken.append(boxes[chosen])
        place.annotate(text, (point.x, point.y), xytext=(dx, dy), textcoords="offset points", ha=across, va=along)


def _meet(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _inside(own: tuple[float, float, float, float], box: Any) -> bool:
    return own[0] >= box.x0 and own[2] <= box.x1 and own[1] >= box.y0 and own[3] <= box.y1


@contextlib.contextmanager
def _figure(title: str, width: int = WIDTH, height: int = HEIGHT) -> Iterator[tuple[Any, Any, list[str]]]:
    """A figure, its axes, and where its SVG will be found after the block."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "align",  # the same figure is the same text
        "text.parse_math": False,  # a dollar in a label is a dollar
        "font.size": 12,
        "figure.titlesize": 13,
        "figure.titleweight": "bold",
        "axes.edgecolor": SOFT,
        "axes.labelcolor": INK,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,
        "axes.unicode_minus": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "text.color": INK,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "xtick.labelsize": 11,
        "ytick.labelsize": 11,
        "legend.frameon": False,
        "legend.fontsize": 12,
        "figure.dpi": _UNIT,
    }
    out: list[str] = []
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # the page's own font shows what matplotlib's lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width / _UNIT, height / _UNIT), layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        place = figure.add_subplot()
        figure.suptitle(short(title, 72), x=0.004, ha="left")
        yield figure, place, out
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    out.append(_inline(written.getvalue(), title))


def _inline(svg: str, title: str) -> str:
    """The <svg> element alone, with the page's colours and font."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>\s*|<!--.*?-->\s*", "", body, flags=re.DOTALL)
    digest = hashlib.sha256(body.encode()).hexdigest()[:8]  # two figures of a page share no identifier
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>f{digest}-", body)
    body = re.sub(r"font: [^;\"]*?([\d.]+)px [^;\"]*", _font, body)
    body = re.sub(r" ?font-family: [^;\"]*;?", "", body)
    body = re.sub(r"#0[1-4]0[0-9a-f]{3}\b", _colour, body)
    body = re.sub(r'\b(?:d|x|y|width|height|transform)="[^"]*"', _rounded, body)
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', body)
    assert box is not None
    width = float(box[1])
    shape = f'viewBox="0 0 {box[1]} {box[2]}" width="{box[1]}" style="min-width: {min(330.0, width):g}px"'
    head = f'<svg role="img" aria-label="{html.escape(short(title, 200))}" {shape}'
    return head + body[body.index(">") :].rstrip()


def _rounded(found: re.Match[str]) -> str:
    """Coordinates to a hundredth of a pixel, on one line."""
    return re.sub(r"(\.\d\d)\d+", r"\1", found[0]).replace("\n", "")


def _font(found: re.Match[str]) -> str:
    bold = "font-weight: bold; " if "bold" in found[0] or "700" in found[0] else ""
    return f"{bold}font-size: {found[1]}px"


def _colour(found: re.Match[str]) -> str:
    """A role's CSS: series, or a share of the first or second series' colour on the page's ground."""
    colour = found[0]
    if colour in _ROLES:
        return _ROLES[colour]
    number = int(colour[5:], 16)
    if colour[2] == "1":
        return f"var(--series-{number + 1})"
    return f"color-mix(in oklab, var(--series-{1 if colour[2] == '3' else 2}) {number}%, var(--paper))"
