"""How each side is started, and what is read off it."""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmark import plan, processes
from benchmark.plan import Case
from benchmark.processes import Ended

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "bench"
LIMIT = 1800.0  # seconds that a run may take
MOST_LOAD = 0.05  # share of the processors that others may take during a run that counts

Record = dict[str, Any]


@dataclass(frozen=True)
class Tuning:
    """What a user of TRL can turn to make it faster on this machine."""

    micro_batch: int
    weights: str  # bfloat16, or float32 under autocast
    allocator: bool = False  # glibc keeps freed memory instead of giving it back and faulting it in again

    def told(self) -> str:
        kept = ", glibc told to keep memory" if self.allocator else ""
        weights = "bf16 weights" if self.weights == "bfloat16" else "fp32 weights under bf16 autocast"
        return f"micro-batch {self.micro_batch}, {weights}{kept}"


# What `Tuning.allocator` sets: no trimming, and no mapping of its own for a large block.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 36), "MALLOC_MMAP_THRESHOLD_": str(1 << 36)}


def environment(threads: int, folder: Path) -> dict[str, str]:
    """What every contender runs in: so many threads, nothing from the network, caches that are empty."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "ALIGN_", "HF_"))}
    return kept | {
        "OMP_NUM_THREADS": str(threads),
        "ALIGN_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "HF_DATASETS_CACHE": str(folder / "hf" / "datasets"),
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
        "PYTHONPATH": os.pathsep.join((str(ROOT / "scripts"), str(ROOT))),
        "PYTHONUNBUFFERED": "1",
    }


def align_command(
    case: Case, contender: str, *, model: Path, rows: Path, run_dir: Path, more: tuple[str, ...]
) -> list[str]:
    """align's ordinary command line."""
    algorithm = {
        "sft": ("algo=sft",),
        "dpo": ("algo=dpo", f"algo.beta={plan.BETA}"),
        "nca": ("algo=nca", f"algo.beta={plan.BETA}", f"algo.alpha={plan.ALPHA}"),
    }.get(case.algorithm, (f"algo={case.algorithm}",))
    settings = (
        "model=hf",
        f"model.path={model}",
        "data=file",
        f"data.path={rows}",
        "data.template=text",
        "data.held_out=0",
        f"data.max_length={case.table.total_cut}",
        f"train.steps={case.steps}",
        f"train.prompts={case.groups}",
        f"train.lr={plan.LEARNING_RATE}",
        "train.schedule=linear",
        "train.warmup_ratio=0",
        "eval.groups=0",
        "checkpoint.every=1000000",
        "track=none",
        "track.lines=1e-9",
        "launch.accelerator=cpu",
        f"engine.precision={plan.PRECISION}",
        f"run.seed={plan.SEED}",
        f"run.dir={run_dir}",
    )
    program = Path(sys.executable).with_name("align")
    # the last of two settings of a key counts
    given = (*algorithm, *settings, *plan.OVERRIDES[contender], *more)
    chosen = {setting.partition("=")[0]: setting for setting in given}
    return [str(program), "train", *chosen.values()]


def run_align(
    case: Case, contender: str, *, model: Path, rows: Path, more: tuple[str, ...] = ()
) -> tuple[Ended, Record]:
    """One run of align from empty caches. The run directory is WORK/run until the next one."""
    folder = _fresh(WORK / "run")
    threads = plan.THREADS_OF.get(contender, plan.THREADS)
    run_dir = folder / "run"
    command = align_command(case, contender, model=model, rows=rows, run_dir=run_dir, more=more)
    ended = processes.run(command, environment=environment(threads, folder), folder=folder, limit=LIMIT)
    told: Record = {"command": ["align", *command[1:]], "threads": threads}
    if ended.code == 0:
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        told["reference_seconds"] = summary.get("reference/seconds")
        told["reference_responses"] = summary.get("reference/measured")
        told["summary"] = summary
    return ended, told


def peer_job(case: Case, *, model: Path, rows: Path, order: list[int], tuning: Tuning | None) -> Record:
    """What TRL's process is told; without tuning it runs as shipped."""
    micro_batch = min(8, case.groups) if tuning is None else tuning.micro_batch
    return {
        "model": str(model),
        "rows": str(rows),
        "order": order,
        "responses": case.responses,
        "groups": case.groups,
        "steps": case.steps,
        "micro_batch": micro_batch,
        "lr": plan.LEARNING_RATE,
        "beta": plan.BETA,
        "alpha": plan.ALPHA,
        "cpu": True,
        "shipped": tuning is None,
        "checkpointing": False,
        "weights": "float32" if tuning is None else tuning.weights,
        "autocast": tuning is None or tuning.weights == "float32",
        # the switch that sends fp32 products through oneDNN; on a CPU without AMX they stay fp32
        "fp32_products": "highest" if tuning is None else "medium",
        "gradient": None,
        "reference": None,
        "folder": "",
    }


def run_peer(job: Record, *, tuning: Tuning | None, module: str = "benchmark.peer") -> tuple[Ended, Record]:
    """One run of TRL; what it tokenised and measured before is not kept."""
    folder = _fresh(WORK / "peer")
    job = job | {"folder": str(folder / "out")}
    given, result = folder / "job.json", folder / "result.json"
    given.write_text(json.dumps(job), encoding="utf-8")
    around = environment(plan.THREADS, folder)
    if tuning is not None and tuning.allocator:
        around |= KEEP_MEMORY
    command = [sys.executable, "-m", module, str(given), str(result)]
    ended = processes.run(command, environment=around, folder=folder, limit=LIMIT)
    told: Record = {"command": ["python", "-m", module], "threads": plan.THREADS}
    told["tuning"] = "as shipped" if tuning is None else tuning.told()
    if ended.code == 0:
        told |= json.loads(result.read_text(encoding="utf-8"))
        marks = {line: at for at, line in ended.lines if line in ("reference begins", "reference ends")}
        measured = bool(marks) and not told["reference_reused"]
        told["reference_seconds"] = marks["reference ends"] - marks["reference begins"] if measured else None
    return ended, told


def ask(module: str, job: Record) -> Any:
    """The result of a process of the harness's own."""
    folder = _fresh(WORK / "ask")
    given, result = folder / "job.json", folder / "result.json"
    given.write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, "-m", module, str(given), str(result)]
    ended = processes.run(command, environment=environment(plan.THREADS, folder), folder=folder, limit=LIMIT)
    if ended.code != 0:
        raise RuntimeError(f"{module} failed:\n{ended.tail(30)}")
    return json.loads(result.read_text(encoding="utf-8"))


def model(name: str) -> Path:
    """The folder of a model, made where it is not there."""
    folder = WORK / "models" / name
    if not (folder / "tokenizer.json").is_file():
        ask("benchmark.shapes", {"shape": name, "folder": str(folder), "seed": plan.SEED})
    return folder


def step_ends(ended: Ended, steps: int) -> list[float]:
    """When each step ended, in seconds since the start.

    Raises:
        ValueError: not every step was announced once.
    """
    found: list[tuple[int, float]] = []
    for at, line in ended.lines:
        _, mark, rest = line.rpartition("step ")
        number, slash, of = rest.split(" ")[0].partition("/")
        if mark and slash and number.isdigit() and of.strip() == str(steps):
            found.append((int(number), at))
    if [number for number, _ in found] != list(range(1, steps + 1)):
        raise ValueError(f"{len(found)} of {steps} steps were announced:\n{ended.tail()}")
    return [at for _, at in found]


def record_of(case: Case, ended: Ended, told: Record) -> Record:
    """What is kept of a run: raw step times, and what else was seen from outside."""
    kept = {
        "code": ended.code,
        "seconds": ended.seconds,
        "load": ended.load,
        "others": ended.others,
        "peak_bytes": ended.peak_bytes,
        **told,
    }
    if ended.code != 0:
        return kept | {"said": ended.tail()}
    ends = step_ends(ended, case.steps)
    return kept | {
        "first_step": ends[0],
        "step_seconds": [after - at for at, after in pairwise(ends)],
    }


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
