"""The memory of a dataset does not grow with its tokens, and hardly with its groups."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="only Linux tells the peak of a process"
)

BUILD = r"""
import re, sys
from pathlib import Path
import numpy as np
from align_cli.data.shelf import Item, Shelf
from align_cli.data.store import Store
from align_cli.data.tokens import Tokenised

folder, groups = Path(sys.argv[1]), int(sys.argv[2])
folder.mkdir()
ids = np.arange(100, dtype=np.int32)
with Shelf(folder) as shelf:
    for start in range(0, groups, 250):
        numbers = range(start, start + 250)
        shelf.add([
            Item(Tokenised(ids[:20] + n, (ids[:80], ids[:50])), (1.0, 0.0), f"row {n}", n.to_bytes(16, "big"))
            for n in numbers
        ])
    shelf.finish()
aside = shelf.prompts() < 64
shelf.write({"train": ~aside, "held_out": aside}, {})
store = Store(folder / "train")
assert len(store) == groups - 64 and store.prompts[-1] == groups - 65
for index in range(0, len(store), 5):
    assert store[index].prompt[0] == index + 64
assert (store.prompt_tokens + store.response_tokens).max() == 150 and store.longest.max() == 100
# ru_maxrss would begin with that of the process which started this one.
print(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def peak(folder: Path, groups: int) -> int:
    """Bytes of memory at most, to write and to read a store."""
    told = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder), str(groups)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    return int(told.stdout) * 1024


def test_a_store_takes_a_few_bytes_of_memory_a_group_and_none_for_its_tokens(tmp_path: Path) -> None:
    """Sorting takes 16 bytes of keys, as much again for their two columns, the order and its marks: below 100 bytes
    with what a plan holds. The tokens of 100,000 groups are 600 bytes each, and do not fit into that."""
    few, many = peak(tmp_path / "few", 1_000), peak(tmp_path / "many", 100_000)
    assert many - few < 100_000 * 100 + (8 << 20)  # the allocator's own pieces
