"""The machine and the software that a benchmark ran on."""

import hashlib
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "avx_vnni")
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "numpy", "align-cli")
# What only shows results may change without making runs anew.
SHOWING = ("picture.py", "table.py", "results.py", "floor.py", "__main__.py")


def machine() -> dict[str, Any]:
    """Processor, its flags that matter here, cores, memory, system."""
    told = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", 1)[0]
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in told.splitlines())}
    memory = Path("/proc/meminfo").read_text(encoding="utf-8").split("\n", 1)[0].split()[1]
    family = f" (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else ""
    present = fields.get("flags", "").split()
    return {
        "processor": fields.get("model name", platform.processor()) + family,
        "flags": [flag for flag in FLAGS if flag in present],
        "cpus": len([line for line in _listed() if line]),
        "memory_gb": int(memory) * 1024 / 1e9,
        "cache": fields.get("cache size"),
        "system": f"{platform.system()} {platform.release()}",
        "huge_pages": _setting("/sys/kernel/mm/transparent_hugepage/enabled"),
    }


def _listed() -> list[str]:
    """One line for each processor."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("processor")]


def _setting(path: str) -> str | None:
    return Path(path).read_text(encoding="utf-8").strip() if Path(path).is_file() else None


def versions() -> dict[str, str]:
    """Of Python and of what both sides are built on."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def git() -> str:
    """The revision; "unknown" outside a checkout."""
    told = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return told.stdout.strip() or "unknown"


def tree() -> str:
    """A digest of what the figures depend on: align's code and configuration, and the code that measures."""
    files = [*ROOT.glob("align_cli/**/*.py"), *ROOT.glob("conf/**/*.yaml"), *ROOT.glob("scripts/benchmark/*.py")]
    told = hashlib.sha256()
    for file in sorted(files):
        if file.name not in SHOWING or file.parent.name != "benchmark":
            told.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return told.hexdigest()[:16]
