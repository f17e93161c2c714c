"""The picture of a benchmark, drawn from its JSON alone: `python -m benchmark.picture RESULT.json`."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmark import results
from benchmark.plan import ALIGN, SHIPPED, TUNED, UNSHARED

# Okabe and Ito's colours, which people with any colour vision tell apart; markers tell them apart in grey.
STYLE = {
    ALIGN: ("#0072B2", "o"),
    UNSHARED: ("#56B4E9", "s"),
    TUNED: ("#D55E00", "^"),
    SHIPPED: ("#E69F00", "v"),
}
PAPER, INK = "#ffffff", "#222222"  # its own ground, so that it reads on a light and on a dark page


def draw(data: Mapping[str, Any], path: Path) -> None:
    """Ratios, ablations and curves as one SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    settings: dict[Any, Any] = {
        "svg.hashsalt": "align",
        "svg.fonttype": "none",
        "font.size": 9,
        "font.family": "sans-serif",
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
    }
    with pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(2, 3, figsize=(13, 7.4), facecolor=PAPER, layout="constrained")
        panels = (_ratios, _ablations, _ranks, _over_k, _over_ratio, _dataset)
        for panel, place in zip(panels, axes.flat, strict=True):
            place.set_facecolor(PAPER)
            panel(place, data)
            if not place.has_data():
                place.text(0.5, 0.5, "not measured", ha="center", va="center", transform=place.transAxes)
                place.set_xticks([])
                place.set_yticks([])
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def _ratios(place: Any, data: Mapping[str, Any]) -> None:
    place.set_title("Groups per second of align, over those of …")
    rows = [row for row in data["figures"]["targets"] if row["against"] != UNSHARED]
    labels: list[str] = []
    for height, row in enumerate(reversed(rows)):
        speed, (colour, _) = row["speed"], STYLE[row["against"]]
        place.barh(height, speed["median"], color=colour, height=0.6)
        place.plot([speed["min"], speed["max"]], [height, height], color=INK, linewidth=1)
        place.plot([row["speed_target"]] * 2, [height - 0.38, height + 0.38], color=INK, linewidth=1.5, linestyle=":")
        place.annotate(f"  {speed['median']:.1f}", (max(speed["max"], row["speed_target"]), height), va="center")
        labels.append(f"{row['against']}\n{row['model']}, {row['lengths']}, K = {row['responses']}")
    place.set_yticks(range(len(rows)), labels, fontsize=7)
    if rows:
        place.set_xlabel("ratio; dotted: the target; line: least to greatest round")
        place.set_xlim(0, 1.15 * max(max(row["speed"]["max"], row["speed_target"]) for row in rows))


def _ablations(place: Any, data: Mapping[str, Any]) -> None:
    place.set_title("align with one thing taken away")
    names = [name for name, told in data["settings"]["cases"].items() if told["part"] == "ablations"]
    found: list[tuple[str, float, float]] = []
    for name in names:
        for contender in data["figures"]["cases"].get(name, {}):
            told = results.ratios(data, name, ALIGN, contender)
            if told is not None and contender != ALIGN:
                found.append((contender, told["speed"]["median"], told["memory"]["median"]))
        plain = name.removesuffix(" [ablations]")
        for shared in (f"{plain} [sharing]", plain):
            told = results.ratios(data, shared, ALIGN, UNSHARED) if shared in data["settings"]["cases"] else None
            if told is not None:
                found.insert(0, (UNSHARED, told["speed"]["median"], told["memory"]["median"]))
                break
    for height, (_, speed, memory) in enumerate(reversed(found)):
        place.barh(height + 0.2, speed, color=STYLE[ALIGN][0], height=0.38, label="groups per second")
        place.barh(height - 0.2, memory, color=STYLE[SHIPPED][0], height=0.38, label="peak memory")
        place.annotate(f" {speed:.2f}", (speed, height + 0.2), va="center", fontsize=7)
        place.annotate(f" {memory:.2f}", (memory, height - 0.2), va="center", fontsize=7)
    labels = [name.removeprefix("align ") for name, _, _ in reversed(found)]
    place.set_yticks(range(len(found)), labels, fontsize=8)
    if found:
        place.axvline(1, color=INK, linewidth=1, linestyle=":")
        place.set_xlabel("over those of align as it is")
        _legend(place, loc="lower center", bbox_to_anchor=(0.5, -0.32), ncols=2)


def _ranks(place: Any, data: Mapping[str, Any]) -> None:
    place.set_title("Ranks and threads")
    for name, told in data["settings"]["cases"].items():
        if told["part"] != "ranks":
            continue
        found = data["figures"]["cases"].get(name, {})
        names = [
            contender.removeprefix("align, ").replace(" of ", "\nof ").replace(ALIGN, "1 rank\nof 2 threads")
            for contender in found
        ]
        speeds = [figure["groups_per_second"]["median"] for figure in found.values()]
        place.bar(range(len(found)), speeds, color=STYLE[ALIGN][0], width=0.6)
        place.set_xticks(range(len(found)), names)
        place.set_ylabel("groups per second")


def _curve(place: Any, data: Mapping[str, Any], part: str) -> bool:
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, told in data["settings"]["cases"].items():
        if told["part"] != part:
            continue
        for contender, figure in data["figures"]["cases"].get(name, {}).items():
            lines.setdefault(contender, []).append((told["x"], figure["groups_per_second"]["median"]))
    for contender, points in lines.items():
        colour, marker = STYLE[contender]
        points.sort()
        place.plot(*zip(*points, strict=True), color=colour, marker=marker, label=contender)
    return bool(lines)


def _over_k(place: Any, data: Mapping[str, Any]) -> None:
    place.set_title("Responses of a prompt")
    if _curve(place, data, "K"):
        place.set_yscale("log")
        place.set_xlabel("K, UltraFeedback-like lengths")
        place.set_ylabel("groups per second")
        _plain(place.yaxis)
        _legend(place)


def _over_ratio(place: Any, data: Mapping[str, Any]) -> None:
    place.set_title("Length of the prompt")
    if _curve(place, data, "P/R"):
        place.set_xscale("log", base=2)
        place.set_yscale("log")
        place.set_xlabel("P over R (sum 800 tokens), K = 2")
        place.set_ylabel("groups per second")
        _plain(place.xaxis)
        _plain(place.yaxis)
        _legend(place)


def _dataset(place: Any, data: Mapping[str, Any]) -> None:
    place.set_title("Size of the dataset")
    found = data["figures"]["dataset"]
    if not found:
        return
    points = found["points"]
    tokens = [point["tokens"] for point in points]
    place.plot(tokens, [p["training_seconds"] for p in points], color=STYLE[ALIGN][0], marker="o", label="training")
    place.plot(tokens, [p["whole_seconds"] for p in points], color=STYLE[TUNED][0], marker="^", label="start to end")
    place.set_xscale("log")
    place.set_yscale("log")
    place.set_xlabel(f"tokens in the dataset; slope of training {found['slope']:.2f}")
    place.set_ylabel("seconds of an epoch, tiny model")
    _legend(place)


def _plain(axis: Any) -> None:
    """0.5 and not 5 x 10⁻¹ on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:.1g}" if f"{value:.0e}"[0] in "235" else ""))


def _legend(place: Any, **where: Any) -> None:
    handles, labels = place.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    place.legend(once.values(), once.keys(), frameon=False, fontsize=8, **where)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(results.read(source), source.with_suffix(".svg"))
