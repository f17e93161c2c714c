"""The table, for the terminal and for the README."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmark import plan, results


def marks(name: str) -> tuple[str, str]:
    """Between what the README holds the table of a benchmark of this name."""
    return f"<!-- bench {name}: begin -->", f"<!-- bench {name}: end -->"


def lines(data: Mapping[str, Any]) -> list[str]:
    """Markdown: the rows with targets, then the figures of the cases with targets, then what it was run on."""
    figures = data["figures"]
    machine, versions = data["machine"], data["versions"]
    told = [
        "| model | against | lengths | K | groups/s ratio (min to max) | target | products alone | least work "
        "| peak memory ratio | target | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in figures["targets"]:
        memory = f"≤ {row['memory_target']}" if row["memory_target"] is not None else ""
        goal = f"≥ {row['speed_target']:.3g}"
        if row["token_ratio"] is not None:
            goal += f" (90 % of {row['token_ratio']:.2f})"
        told.append(
            f"| {row['model']} | {row['against']}{' K-wise' * _expanded(row)} | {row['lengths']} | {row['responses']} "
            f"| {_spread(row['speed'])} | {goal} | {_number(row['limit'])} | {_number(row['floor'])} "
            f"| {row['memory']['median']:.2f} | {memory} "
            f"| {'reached' if row['reached'] else 'not reached'} |"
        )
    told += [
        "",
        "| model, lengths | contender | groups/s | logical tokens/s | first step after | peak memory "
        "| groups/s with the reference pass, 1 epoch | 3 epochs | share of the bf16 GEMM rate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, contenders in figures["cases"].items():
        if data["settings"]["cases"][name]["part"] not in plan.COMPARED:
            continue
        for contender, found in contenders.items():
            amortised = found.get("groups_per_second_with_reference", {})
            first = found["first_step_seconds"]
            share = found.get("share_of_gemm_rate", {}).get("bf16")
            told.append(
                f"| {name} | {contender} | {found['groups_per_second']['median']:.3g} "
                f"| {found['logical_tokens_per_second']:,.0f} | {'' if first is None else f'{first:.1f} s'} "
                f"| {found['peak_gb']:.2f} GB | {_number(amortised.get('1 epoch'))} "
                f"| {_number(amortised.get('3 epochs'))} | {'' if share is None else f'{share:.0%}'} |"
            )
    rounds = sorted({row["speed"]["rounds"] for row in figures["targets"]})
    loaded = sum(run["disturbed"] and not run["void"] for run in data["runs"])
    told += [
        "",
        "Products alone: the ratio if a step of align's took no longer than its products at this machine's rate. "
        "Least work: the same with attention's products at their own rate, one exponential for each logit and "
        "attention weight, and AdamW, each as fast as it runs alone (`scripts/benchmark/floor.py`). "
        f"Ratios are of neighbouring runs; medians over {' or '.join(map(str, rounds)) or 'no'} rounds. "
        f"{machine['processor']}, {machine['cpus']} cores, {machine['memory_gb']:.0f} GB; "
        f"threads {data['settings']['threads']}; torch {versions['torch']}, transformers {versions['transformers']}, "
        f"TRL {versions['trl']}; {data['started'][:10]}, revision {data['git'][:12]}.",
    ]
    for sweep in data["sweeps"].values():
        for each in sweep["tried"]:
            made = f"{each['groups_per_second']:.3g} groups/s at {each['peak_bytes'] / 1e9:.2f} GB"
            if each["weights"] != plan.WEIGHTS and each["moved"] is not None:
                told.append(f"With bf16 weights TRL made {made}, and {each['moved']:.1%} of its weights moved.")
            if each["allocator"]:
                told.append(
                    f"Told by two variables of the environment to keep freed memory, TRL made {made} in one run; its "
                    "users are not told to do so, and where fresh memory costs less they would gain less."
                )
    if loaded:
        told.append(f"{loaded} runs were taken while other processes were at work: these figures are of no use.")
    return told


def write_readme(readme: Path, data: Mapping[str, Any]) -> None:
    """Put the table, and the picture where there is one, between the two marks.

    Raises:
        ValueError: the file has not one of each.
    """
    text = readme.read_text(encoding="utf-8")
    opening, closing = marks(data["name"])
    before, begin, rest = text.partition(opening)
    _, end, after = rest.partition(closing)
    if not begin or not end:
        raise ValueError(f"{readme} has no {opening} and {closing}")
    shown = [f"![Ratios, ablations and curves](scripts/benchmark/results/{data['name']}.svg)", ""]
    told = [before + begin, "", *lines(data), "", *shown * results.has_curves(data), end + after]
    readme.write_text("\n".join(told), encoding="utf-8")


def _expanded(row: Mapping[str, Any]) -> bool:
    return row["against"].startswith("TRL") and row["responses"] != 2


def _spread(found: Mapping[str, Any]) -> str:
    return f"**{found['median']:.2f}** ({found['min']:.2f} to {found['max']:.2f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
