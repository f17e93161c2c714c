"""How a fresh process learns what to do and tells what came of it: two JSON files, named on its command line."""

import json
import os
import sys
from pathlib import Path
from typing import Any


def read_job() -> dict[str, Any]:
    """What the first argument's file asks for; sets the threads that it names."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return job


def write_result(result: Any) -> None:
    """Into the second argument's file."""
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


def say(line: str) -> None:
    """A line for the process that watches, which stamps it with the time."""
    print(line, flush=True)
