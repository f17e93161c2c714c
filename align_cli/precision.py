"""In what a CPU multiplies matrices fastest: bfloat16, or float32 by one of two libraries, found by trying.

Training in bfloat16 keeps fp32 masters of the weights, so it costs rounding of the activations alone. In float32 the
choice is between MKL and oneDNN: the former does not use all of an AMD CPU, the latter would use bfloat16 behind
one's back where a CPU has AMX, and is not asked there.
"""

import hashlib
import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.functional import linear

ROWS = 512  # of the product that is tried
TRIES = 5
SMALL = 256  # a hidden size below which products are too small for their type to matter
WORTH = 1.3  # times as fast that bfloat16 must be, to be chosen


@dataclass(frozen=True)
class Arithmetic:
    """How to multiply.

    Attributes:
        precision: of weights and activations.
        products: torch's name for how fp32 matrices are multiplied.
        reason: in a few words, for the user.
    """

    precision: Literal["fp32", "bf16"]
    products: Literal["highest", "medium"]
    reason: str


def choose(hidden: int, intermediate: int, cache: Path) -> Arithmetic:
    """The fastest for a model of this width on this machine; tried once, then remembered.

    Args:
        hidden, intermediate: sizes of the model's largest layers.
        cache: where the answer is kept.
    """
    if hidden < SMALL:
        return Arithmetic("fp32", "highest", "a small model")
    told = [_cpu(), torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    name = hashlib.sha256(json.dumps([*told, hidden, intermediate]).encode()).hexdigest()[:32]
    kept = cache / "precision" / f"{name}.json"
    try:
        return Arithmetic(**json.loads(kept.read_text()))
    except (OSError, ValueError, TypeError):
        choice = judge(_seconds(hidden, intermediate))
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(asdict(choice)))
    except OSError:
        pass  # it is tried again next time
    return choice


def choose_for(architecture: Any, cache: Path) -> Arithmetic:
    """The fastest for a model of this architecture, a configuration of transformers, on this machine's CPU."""
    text = architecture.get_text_config()
    hidden = int(text.hidden_size)
    return choose(hidden, int(vars(text).get("intermediate_size") or 4 * hidden), cache)


def judge(seconds: dict[str, float]) -> Arithmetic:
    """The choice, from the time that a product took as `highest`, `bf16` and, where it is fp32, `medium`."""
    products: Literal["highest", "medium"] = "highest"
    if seconds.get("medium", float("inf")) < seconds["highest"] / WORTH:
        products = "medium"
    gain = seconds[products] / seconds["bf16"]
    if gain >= WORTH:
        return Arithmetic("bf16", products, f"multiplies {gain:.1f} times as fast as fp32 here")
    faster = f", {seconds['highest'] / seconds[products]:.1f} times as fast by oneDNN" if products == "medium" else ""
    return Arithmetic("fp32", products, f"bf16 multiplies {gain:.1f} times as fast here{faster}")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("model name")), platform.processor())


def _seconds(hidden: int, intermediate: int) -> dict[str, float]:
    ways = {"highest": torch.float32, "bf16": torch.bfloat16}
    if not torch.cpu._is_amx_tile_supported():
        ways["medium"] = torch.float32
    before = torch.get_float32_matmul_precision()
    least = dict.fromkeys(ways, float("inf"))
    try:
        for _ in range(TRIES):  # in turns, so that what else runs disturbs all alike
            for way, dtype in ways.items():
                torch.set_float32_matmul_precision("medium" if way == "medium" else "highest")
                states = torch.ones(ROWS, hidden, dtype=dtype)
                weight = torch.ones(intermediate, hidden, dtype=dtype)
                linear(states, weight)
                begun = time.perf_counter()
                linear(states, weight)
                least[way] = min(least[way], time.perf_counter() - begun)
    finally:
        torch.set_float32_matmul_precision(before)
    return least
