"""The JSON of a benchmark: what was run where, every raw step time, and the figures that follow from them.

format        1
name, git, tree, started, finished
machine       processor, flags, memory, system
versions      of Python and the packages that matter
settings      models, lengths as drawn, optimizer, threads, formulas
gate          losses and gradients of both sides in fp32
gemm          products per second, and what else bounds a step from below (`floor`)
sweeps        what was tried to tune TRL
runs          one record for each process: case, contender, round, step seconds, peak bytes, others' share, ...
figures       medians and ratios, derived from `runs` alone by `figures`
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmark import floor, flops, machine
from benchmark.lengths import Lengths
from benchmark.plan import ALIGN, COMPARED, TARGETS, UNSHARED, Case
from benchmark.shapes import SHAPES

FORMAT = 1
SECTIONS = (
    "format",
    "name",
    "git",
    "tree",
    "started",
    "finished",
    "machine",
    "versions",
    "settings",
    "gate",
    "gemm",
    "sweeps",
    "runs",
    "figures",
)
Record = dict[str, Any]


def read(path: Path) -> Record:
    """A benchmark's JSON.

    Raises:
        ValueError: it is none.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    problems = check(found)
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")
    return found


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Whole or not at all: a benchmark that is interrupted goes on from this file.

    Paths are written from the checkout's root, where the commands can be given again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, indent=1, ensure_ascii=False).replace(f"{Path(__file__).resolve().parents[2]}/", "")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def begun(name: str) -> Record:
    """The sections of a benchmark that starts now, which say what it is of."""
    return {
        "format": FORMAT,
        "name": name,
        "git": machine.git(),
        "tree": machine.tree(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "finished": None,
        "machine": machine.machine(),
        "versions": machine.versions(),
    }


def check(data: Mapping[str, Any]) -> list[str]:
    """What is wrong with the form of a benchmark's JSON."""
    problems = [f"{name} is missing" for name in SECTIONS if name not in data]
    if problems:
        return problems
    if data["format"] != FORMAT:
        return [f"format {data['format']}, this is {FORMAT}"]
    for place, run in enumerate(data["runs"]):
        for name in (
            "case",
            "contender",
            "round",
            "void",
            "disturbed",
            "code",
            "seconds",
            "load",
            "others",
            "peak_bytes",
        ):
            if name not in run:
                problems.append(f"runs[{place}] has no {name}")
        if run.get("code") == 0 and len(run.get("step_seconds", ())) == 0:
            problems.append(f"runs[{place}] has no step times")
        if run.get("case") not in data["settings"]["cases"]:
            problems.append(f"runs[{place}] is of a case that settings.cases does not name")
    return problems


def case_settings(case: Case, lengths: Lengths) -> Record:
    """What `figures` needs to know of a case: its groups' tokens, and which of them are timed."""
    timed = lengths[case.groups * case.warm :]
    operations = flops.group_flops(case.shape, timed)
    return {
        "part": case.part,
        "x": case.x,
        "model": case.shape.name,
        "lengths": case.table.name,
        "responses": case.responses,
        "groups_per_step": case.groups,
        "warm_steps": case.warm,
        "timed_steps": case.timed,
        "rounds": case.repeats,
        "algorithm": case.algorithm,
        "means": lengths.means(),
        "means_timed": timed.means(),
        "token_ratio": timed.token_ratio(),
        "padding": {str(size): timed.padding(size) for size in (1, 2, 4, 8)},
        "logical_tokens_per_group": float(timed.logical().mean()),
        "unique_tokens_per_group": float(timed.unique().mean()),
        "response_tokens_per_group": float(timed.responses.sum(1).mean()),
        "flops_per_group": float(operations.mean()),
        "groups": case.rows,
        "flops": float(flops.group_flops(case.shape, lengths).sum()),
        # of the tokens that the reference pass reads, those of a group that is timed
        "share_of_pass": float(timed.unique().mean() / lengths.unique().sum()),
    }


def kept_rates(before: Mapping[str, Any], rates: Mapping[str, Any]) -> Record:
    """Rates of products, where one that is there already stays: it was measured before the runs held against it."""
    kept: Record = dict(rates)
    for setting, found in before.items():
        kept[setting] = {**rates.get(setting, {}), **found} if isinstance(found, Mapping) else found
    return kept


def has_curves(data: Mapping[str, Any]) -> bool:
    """Whether there is more to draw than the ratios of the table."""
    return any(told["part"] not in COMPARED for told in data["settings"]["cases"].values())


def counted(data: Mapping[str, Any], case: str, contender: str) -> dict[int, Record]:
    """The runs that count, by round."""
    return {
        run["round"]: run
        for run in data["runs"]
        if run["case"] == case and run["contender"] == contender and not run["void"] and run["code"] == 0
    }


def groups_per_second(run: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """Of the median timed step."""
    return settings["groups_per_step"] / median(timed(run, settings))


def timed(run: Mapping[str, Any], settings: Mapping[str, Any]) -> list[float]:
    """Seconds of the steps that count; step times begin with the second step, whose start is the end of the first."""
    return run["step_seconds"][settings["warm_steps"] - 1 :]


def spread(values: Sequence[float]) -> Record:
    """Median, least and greatest."""
    return {"median": median(values), "min": min(values), "max": max(values), "rounds": len(values)}


def figures(data: Mapping[str, Any]) -> Record:
    """Everything that the table and the picture show, from the raw runs."""
    cases = data["settings"]["cases"]
    speeds = {name: _case_figures(data, name, settings) for name, settings in cases.items()}
    return {
        "cases": {name: found for name, found in speeds.items() if found},
        "targets": _target_figures(data, speeds),
        "dataset": _dataset_figures(data),
    }


def _case_figures(data: Mapping[str, Any], name: str, settings: Mapping[str, Any]) -> Record:
    found: Record = {}
    for contender in dict.fromkeys(run["contender"] for run in data["runs"] if run["case"] == name):
        runs = counted(data, name, contender)
        if not runs:
            continue
        speeds = [groups_per_second(run, settings) for run in runs.values()]
        typical = median(speeds)
        cold = [run["first_step"] for run in runs.values() if not run.get("reference_reused")]
        figure: Record = {
            "groups_per_second": spread(speeds),
            "logical_tokens_per_second": typical * settings["logical_tokens_per_group"],
            "first_step_seconds": median(cold) if cold else None,
            "peak_gb": median(run["peak_bytes"] for run in runs.values()) / 1e9,
        }
        passes = [run["reference_seconds"] for run in runs.values() if run.get("reference_seconds")]
        if passes:
            each = median(passes) * settings["share_of_pass"]
            figure["reference_seconds_per_group"] = each
            figure["groups_per_second_with_reference"] = {
                f"{epochs} epoch{'s' * (epochs > 1)}": 1 / (1 / typical + each / epochs) for epochs in (1, 3)
            }
        if data["gemm"] and contender == ALIGN and settings["model"] in data["gemm"]["weighted"]:
            figure["share_of_gemm_rate"] = {
                rate: typical * settings["flops_per_group"] / value
                for rate, value in data["gemm"]["weighted"][settings["model"]].items()
            }
        rates = data["gemm"].get("floor", {}).get(settings["model"])
        if contender == ALIGN and rates and settings["lengths"] in rates["attention"]:
            products = data["gemm"]["weighted"][settings["model"]]["bf16"]
            least = floor.seconds_per_group(settings, SHAPES[settings["model"]], rates, products)
            figure["share_of_floor"] = typical * least
        found[contender] = figure
    return found


def ratios(data: Mapping[str, Any], case: str, against: str, contender: str = ALIGN) -> Record | None:
    """Speed and memory of `contender` over those of `against`, round by round; None where no round has both."""
    settings = data["settings"]["cases"][case]
    ours, theirs = counted(data, case, contender), counted(data, case, against)
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return None
    speed = [groups_per_second(ours[r], settings) / groups_per_second(theirs[r], settings) for r in both]
    memory = [ours[r]["peak_bytes"] / theirs[r]["peak_bytes"] for r in both]
    return {"speed": spread(speed), "memory": spread(memory)}


def _target_figures(data: Mapping[str, Any], speeds: Mapping[str, Record]) -> list[Record]:
    found: list[Record] = []
    for name, settings in data["settings"]["cases"].items():
        if settings["part"] not in COMPARED:
            continue
        for target in TARGETS:
            if (target.table, target.responses) != (settings["lengths"], settings["responses"]):
                continue
            told = ratios(data, name, target.against)
            if told is None:
                continue
            ceiling = settings["token_ratio"]
            speed = target.speed if target.speed is not None else 0.9 * ceiling
            share = speeds[name][ALIGN].get("share_of_gemm_rate", {}).get("bf16")
            least = speeds[name][ALIGN].get("share_of_floor")
            found.append(
                {
                    "case": name,
                    "model": settings["model"],
                    "lengths": target.table,
                    "responses": target.responses,
                    "against": target.against,
                    "speed_target": speed,
                    "memory_target": target.memory,
                    "token_ratio": ceiling if target.against == UNSHARED else None,
                    # the ratio if a step of align's were its products alone, at the machine's rate
                    "limit": told["speed"]["median"] / share if share and target.against != UNSHARED else None,
                    "floor": told["speed"]["median"] / least if least and target.against != UNSHARED else None,
                    "reached": told["speed"]["median"] >= speed
                    and (target.memory is None or told["memory"]["median"] <= target.memory),
                    **told,
                }
            )
    order = {(target.against, target.table, target.responses): place for place, target in enumerate(TARGETS)}
    models = {name: place for place, name in enumerate(SHAPES)}
    return sorted(found, key=lambda f: (models[f["model"]], order[f["against"], f["lengths"], f["responses"]]))


def _dataset_figures(data: Mapping[str, Any]) -> Record | None:
    """How the cost grows with the dataset: the slope of its logarithm over the logarithm of the tokens, 1 if linear."""
    points: list[Record] = []
    for name, settings in data["settings"]["cases"].items():
        runs = counted(data, name, ALIGN) if settings["part"] == "dataset" else {}
        for run in list(runs.values())[:1]:
            points.append(
                {
                    "groups": settings["groups"],
                    "tokens": settings["groups"] * settings["unique_tokens_per_group"],
                    "step_seconds": median(run["step_seconds"]),
                    "training_seconds": sum(run["step_seconds"]),
                    "reference_seconds": run["reference_seconds"],
                    "whole_seconds": run["seconds"],
                    "peak_gb": run["peak_bytes"] / 1e9,
                }
            )
    if len(points) < 2:
        return None
    points.sort(key=lambda point: point["tokens"])
    return {"points": points, "slope": slope([(p["tokens"], p["training_seconds"]) for p in points])}


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of log y over log x, by least squares."""
    import math

    across, up = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    mean_x, mean_y = sum(across) / len(points), sum(up) / len(points)
    over = sum((x - mean_x) * (y - mean_y) for x, y in zip(across, up, strict=True))
    return over / sum((x - mean_x) ** 2 for x in across)
