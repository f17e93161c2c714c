"""`results.json`: what a reproduction has found, where, from which commit, and how to repeat it."""

import datetime
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_cli import process, rundir, terminal
from align_cli.errors import UserError

if TYPE_CHECKING:
    from align_cli.reproduction.jobs import Job, Reproduction, State
    from align_cli.reproduction.judging import Outcome

RESULTS = "results.json"  # in the reproduction's folder


def read(path: Path) -> dict[str, Any] | None:
    """The results of an earlier reproduction; None where there are none.

    Raises:
        UserError: they cannot be read.
    """
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); removed, `align reproduce` makes it again.") from error
    if not isinstance(told, dict) or "expectations" not in told:
        raise UserError(f"{path} holds no results of a reproduction; use another folder.")
    return told


def made(
    reproduction: "Reproduction",
    planned: "Sequence[Job]",
    states: "Mapping[Path, State]",
    figures: Mapping[str, Mapping[int, Mapping[str, Any]]],
    found: "Sequence[Outcome]",
    seconds: float,
) -> dict[str, Any]:
    """What `results.json` holds: no path of this machine is in it.

    Args:
        figures: of each run, by seed.
        seconds: that it took.
    """
    runs: dict[str, Any] = {}
    for job in planned:
        told = runs.setdefault(job.run, {"command": _repeatable(reproduction, job), "seeds": {}})
        told["seeds"][str(job.seed)] = {
            "dir": Path(os.path.relpath(job.folder, reproduction.folder)).as_posix(),
            "state": states[job.folder],
            "figures": figures[job.run].get(job.seed, {}),
        }
    return {
        "recipe": reproduction.recipe.name,
        "title": reproduction.recipe.title,
        "paper": reproduction.recipe.paper,
        "scale": reproduction.scale.name,
        "shrunken": reproduction.shrunken,
        "seeds": list(reproduction.seeds),
        "commit": _commit(planned),
        "machine": machine(),
        "versions": rundir.versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seconds": round(seconds, 1),
        "runs": runs,
        "expectations": [
            {
                "claim": each.expectation.claim,
                "kind": each.expectation.kind,
                "source": each.expectation.source,
                "expected": each.expectation.expected,
                "values": {str(seed): value for seed, value in each.values.items()},
                "estimate": each.judged.estimate,
                "low": each.judged.low,
                "high": each.judged.high,
                "verdict": each.judged.verdict,
                "why": each.judged.why,
            }
            for each in found
        ],
        "departures": list(reproduction.scale.departures),
    }


def _commit(planned: "Sequence[Job]") -> str | None:
    """The commit that the runs were made from, several where they were made at different times."""
    files = [job.folder / rundir.ENV for job in planned if (job.folder / rundir.ENV).is_file()]
    made = [json.loads(file.read_text(encoding="utf-8"))["git"] for file in files] or [rundir.git_revision()]
    return ", ".join(dict.fromkeys(filter(None, made))) or None


def _repeatable(reproduction: "Reproduction", job: "Job") -> str:
    """The first command of a job as it can be given from the reproduction's folder."""
    run = next((each for each in reproduction.scale.runs if each.name == job.run), None)
    if run is None:
        told = [word.replace(str(job.folder), f"study/{job.folder.name}") for word in job.commands[0]]
        return terminal.shell(["align", *told])
    return terminal.shell(["align", "train", *reproduction.arguments(run, job.seed, Path("."))])


def machine() -> str:
    """What this computes on: GPUs, or the processor and how many cores of it."""
    import torch  # here, so that recipes are listed without it

    count = torch.cuda.device_count()
    if count:
        names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
        return f"{count} x {', '.join(names)}"
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        names = [line.partition(":")[2].strip() for line in told.splitlines() if line.startswith("model name")]
    except OSError:  # no Linux
        names = []
    return f"{process.cores()} cores of {names[0] if names else platform.processor() or platform.machine()}"


def write(folder: Path, told: Mapping[str, Any]) -> None:
    """Write `results.json`, whole or not at all."""
    rundir.write_atomic(folder / RESULTS, json.dumps(_plain(told), indent=2, ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else rundir.plain(value)
