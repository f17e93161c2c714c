"""What the figures of a reproduction say of its recipe's claims."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from align_cli import rundir, study
from align_cli.reproduction import claims
from align_cli.reproduction.claims import Judged, Range
from align_cli.reproduction.jobs import OF_STUDY, Job, Reproduction, State
from align_cli.reproduction.recipe import Expectation


def figures(reproduction: Reproduction) -> dict[str, dict[int, dict[str, Any]]]:
    """The figures of each run that has finished, by run and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for run in reproduction.scale.runs:
        each = {seed: rundir.read_summary(reproduction.run_dir(run, seed)) for seed in reproduction.seeds}
        found[run.name] = {seed: summary for seed, summary in each.items() if summary is not None}
    if reproduction.scale.study is not None:
        files = {seed: reproduction.study_file(seed) for seed in reproduction.seeds}
        found[OF_STUDY] = {seed: study.read(file)["figures"] for seed, file in files.items() if file.is_file()}
    return found


@dataclass(frozen=True)
class Outcome:
    """An expectation, its value for each seed, and the verdict."""

    expectation: Expectation
    values: dict[int, float]
    judged: Judged


def judge(
    expectation: Expectation,
    found: Mapping[str, Mapping[int, Mapping[str, Any]]],
    failed: Mapping[str, str],
    *,
    asked: int,
) -> Outcome:
    """Hold an expectation against the figures.

    Args:
        found: of each run (of the study), by seed.
        failed: runs of which a seed failed, and why.
        asked: how many seeds there are to be; before all are done nothing but what is exact can be refuted.
    """
    studied = OF_STUDY in found
    names = expectation.keys if studied else expectation.runs
    for name in [OF_STUDY] if studied else names:
        if name in failed:
            return Outcome(expectation, {}, Judged(None, None, None, "failed", f"{name}: {failed[name]}"))
    runs = {name: found[OF_STUDY] if studied else found[name] for name in names}
    seeds = sorted(set.intersection(*(set(each) for each in runs.values())))
    values: dict[int, float] = {}
    for seed in seeds:
        read = [[name] if studied else expectation.figures for name in names]
        each = [[runs[name][seed].get(figure) for figure in of] for name, of in zip(names, read, strict=True)]
        if not all(isinstance(value, int | float | str) and not isinstance(value, bool) for of in each for value in of):
            continue  # a run leaves out what is infinite, or what its data does not show
        numbers = [[float(value) for value in of if value is not None] for of in each]
        told = [first - sum(since) for first, *since in numbers]
        values[seed] = _value(expectation, told)
    wanted = expectation.wanted
    if isinstance(wanted, str):
        wanted = Range(0.0, float("inf"), True) if wanted == "rising" else Range(float("-inf"), 0.0, True)
    judged = claims.judge(list(values.values()), wanted, exact=expectation.kind == "exact")
    refuted = expectation.kind == "exact" and judged.verdict == "does not hold"  # one value is enough
    if len(values) < asked and not refuted:
        missing = len(seeds) - len(values)
        told = f"{len(seeds)} of {asked} seeds are done"
        if missing:
            told = f"{missing} of {len(seeds)} seeds have no such figure"
        judged = Judged(judged.estimate, judged.low, judged.high, "undecided", told)
    return Outcome(expectation, values, judged)


def _value(expectation: Expectation, told: Sequence[float]) -> float:
    """What is claimed something of, from the figure of each of the expectation's runs."""
    if expectation.over is not None:
        return claims.slope(told)
    if expectation.spread is not None:
        own, others = told[: len(expectation.spread)], told[len(expectation.spread) :]
        return max(own) - min(own) - (max(others) - min(others) if others else 0.0)
    return told[0] - sum(told[1:])


def outcomes(
    reproduction: Reproduction,
    planned: Sequence[Job],
    states: Mapping[Path, State],
    found: Mapping[str, Mapping[int, Mapping[str, Any]]],
) -> list[Outcome]:
    """Every claim of this scale with its verdict.

    Args:
        found: the figures of each run, by seed.
    """
    failed = {job.run: states[job.folder] for job in planned if states[job.folder].startswith("failed")}
    expected = [each for each in reproduction.recipe.expect if each.at(reproduction.scale.name)]
    told = [judge(each, found, failed, asked=len(reproduction.seeds)) for each in expected]
    if not reproduction.shrunken:
        return told
    why = "the model is a random one of a few weights"
    return [
        each
        if each.judged.verdict == "failed"
        else replace(each, judged=replace(each.judged, verdict="undecided", why=why))
        for each in told
    ]
