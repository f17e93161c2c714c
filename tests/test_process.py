"""What a process settles before it computes, and that what the user has set stays."""

import os
import platform
import subprocess
import sys

import pytest

SETTLE = "from align_cli import process; process.settle()"


def told(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_threads_spin_for_long_only_where_the_user_says_so() -> None:
    spins = f"{SETTLE}; import os; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert told(spins) == "3000"
    assert told(spins, GOMP_SPINCOUNT="7") == "7"
    assert told(spins, OMP_WAIT_POLICY="ACTIVE") == "None"


def test_memory_comes_in_large_pages_unless_the_user_says_otherwise() -> None:
    pages = f"{SETTLE}; import os; print(os.environ['THP_MEM_ALLOC_ENABLE'])"
    assert told(pages) == "1"
    assert told(pages, THP_MEM_ALLOC_ENABLE="0") == "0"


def test_blocks_of_a_gpu_grow_unless_the_user_says_otherwise() -> None:
    grows = f"{SETTLE}; import os; print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    assert told(grows) == "expandable_segments:True"
    assert told(grows, PYTORCH_ALLOC_CONF="max_split_size_mb:128") == "max_split_size_mb:128"
    assert told(grows, PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:128") == "None"


RANK = """
import runpy, sys
from align_cli import process
process.settle = lambda: print("settled before torch" if "torch" not in sys.modules else "settled too late")
runpy.run_module("align_cli.worker", run_name="__main__")
"""


def test_a_rank_settles_before_torch_is_imported() -> None:
    ended = subprocess.run([sys.executable, "-c", RANK], capture_output=True, text=True)
    assert ended.stdout == "settled before torch\n" and "usage" in ended.stderr


FREED = f"""
{SETTLE}
import ctypes
from pathlib import Path

library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes, library.free.argtypes = (
    ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
)

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1024

size = 50 << 20
before = held()
block = library.malloc(size)
ctypes.memset(block, 1, size)
library.free(block)
kept = held() - before
process.trim()
print(kept, held() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are of glibc")
def test_freed_memory_is_kept_until_it_is_trimmed_unless_the_user_says_otherwise() -> None:
    kept, left = map(int, told(FREED).split())
    assert kept >= 50 and left <= 2
    kept, left = map(int, told(FREED, MALLOC_TRIM_THRESHOLD_="131072").split())
    assert kept <= 2 and left <= 2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system keeps no process to some of its cores")
def test_cores_are_those_that_the_process_may_use() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from align_cli import process"
    assert told(f"{code}; print(process.cores())") == "1"
