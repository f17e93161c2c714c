"""What a process settles before it computes, and that what the user has set stays."""

import subprocess
import sys

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
