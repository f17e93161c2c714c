"""Before anything is timed: both sides compute the same thing.

In fp32, on the same token ids, with the same groups in each step and the same optimizer, align (its ordinary command
line) and TRL have to agree in the losses of three steps and in the direction of the first step's gradient over all
weights. align's gradient is read from its checkpoint: after one step AdamW's first moment is a tenth of it. For K = 4
the same is asked of the K-wise trainer that stands for TRL there.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmark import contenders, worker
from benchmark.contenders import WORK, Tuning
from benchmark.plan import ALIGN, Case

STEPS = 3
LOSS = 1e-4  # largest difference of a step's loss
COSINE = 0.99999  # least cosine between the gradients
MOVEMENT = 0.1  # largest difference as a share of how far the losses move: where they stand still, equality is nothing
# Learning rates at which the losses of three steps move far more than the rounding of a sum of log-probabilities.
# AdamW's first steps have the sign of each slope, which rounding decides where a slope is nearly 0: at much larger
# rates two exact implementations drift apart.
RATES = {"tiny": 1e-4, "30M": 1e-5, "135M": 5e-6}


class Disagreement(Exception):
    """The two sides do not compute the same thing: nothing that they are timed at could be compared."""


def hold(case: Case, *, model: Path, rows: Path, order: list[int]) -> dict[str, Any]:
    """Run both sides and compare.

    Raises:
        Disagreement: they differ, or one of them fails.
    """
    rate = RATES[case.shape.name]
    more = ("engine.precision=fp32", f"train.lr={rate}", "checkpoint.every=1", "checkpoint.keep=9")
    ended, _ = contenders.run_align(case, ALIGN, model=model, rows=rows, more=more)
    if ended.code != 0:
        raise Disagreement(f"align failed on {case.name}:\n{ended.tail()}")
    run_dir = WORK / "run" / "run"
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ours = [json.loads(line)["loss"] for line in lines]
    moments = run_dir / "checkpoints" / "step_00000001" / "engine.safetensors"

    tuning = Tuning(micro_batch=1, weights="float32")
    job = contenders.peer_job(case, model=model, rows=rows, order=order, tuning=tuning)
    gradient = WORK / "gradient.safetensors"
    job |= {"autocast": False, "lr": rate, "gradient": str(gradient), "fp32_products": "highest"}
    ended, told = contenders.run_peer(job, tuning=tuning)
    if ended.code != 0:
        raise Disagreement(f"TRL failed on {case.name}:\n{ended.tail()}")
    parts = len(told["losses"]) // STEPS
    theirs = [sum(told["losses"][step * parts : (step + 1) * parts]) / parts for step in range(STEPS)]

    given, result = WORK / "cosine.json", WORK / "cosine_result.json"
    given.write_text(json.dumps({"moments": str(moments), "gradient": str(gradient)}), encoding="utf-8")
    around = contenders.environment(2, WORK)
    subprocess.run([sys.executable, "-m", "benchmark.gate", str(given), str(result)], env=around, check=True)
    compared = json.loads(result.read_text(encoding="utf-8"))
    found = judge(ours, theirs, compared["cosine"]) | {"weights": compared["weights"], "groups_per_step": case.groups}
    gradient.unlink()
    if not found["passed"]:
        raise Disagreement(f"{case.name}: {json.dumps(found)}")
    return found


def judge(ours: list[float], theirs: list[float], cosine: float) -> dict[str, Any]:
    """Whether losses and gradients agree, the losses also beside how far they move."""
    apart = [abs(one - other) for one, other in zip(ours, theirs, strict=True)]
    moved = max(ours) - min(ours)
    allowed = min(LOSS, MOVEMENT * moved)
    agree = all(difference <= allowed for difference in apart)  # which is false of one that is no number
    return {
        "passed": agree and cosine >= COSINE and moved > 0,
        "losses_align": ours,
        "losses_trl": theirs,
        "largest_difference": max(apart),
        "losses_moved": moved,
        "gradient_cosine": cosine,
    }


def cosine_of(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Between two gradients over all weights, in float64.

    Raises:
        Disagreement: they are not of the same weights.
    """
    if one.keys() != other.keys():
        raise Disagreement(f"gradients of different weights: {sorted(one.keys() ^ other.keys())}")
    product = sum(float((one[name].double() * other[name].double()).sum()) for name in one)
    lengths = [sum(float(weight.double().square().sum()) for weight in side.values()) for side in (one, other)]
    return product / math.sqrt(lengths[0] * lengths[1])


if __name__ == "__main__":
    from safetensors.torch import load_file

    job = worker.read_job()
    stored = load_file(job["moments"])
    first = {name.removeprefix("exp_avg/"): value for name, value in stored.items() if name.startswith("exp_avg/")}
    worker.write_result({"cosine": cosine_of(first, load_file(job["gradient"])), "weights": len(first)})
