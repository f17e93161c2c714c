"""A checkpoint is whole or absent, whatever happens while it is written."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import HANGS

from align_cli import checkpoints
from align_cli.checkpoints import CheckpointError, Checkpoints, committed


def save(store: Checkpoints, step: int, content: bytes = b"weights") -> None:
    with store.saving(step, {"cursor": step}) as folder:
        (folder / "model.bin").write_bytes(content + str(step).encode())
        (folder / "engine").mkdir()
        (folder / "engine" / "rank_0.bin").write_bytes(bytes(step))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_is_found_again(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert store.latest() is None
    save(store, 3)
    found = Checkpoints(tmp_path / "checkpoints", keep=2).latest()
    assert found is not None
    assert (found.step, found.ranks, found.state()) == (3, 1, {"cursor": 3})
    assert (found.folder / "model.bin").read_bytes() == b"weights3"
    assert [(name, size) for name, size, _ in found.files] == [
        ("engine/rank_0.bin", 3),
        ("model.bin", 8),
        ("state.json", 13),
    ]
    assert json.loads((tmp_path / "checkpoints/latest.json").read_text()) == {"step": 3, "folder": "step_00000003"}


def test_the_newest_are_kept(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 15, 20):
        save(store, step)
    assert names(tmp_path) == ["latest.json", "step_00000015", "step_00000020"]


def test_nothing_is_removed_before_the_next_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Checkpoints(tmp_path, keep=1)
    save(store, 1)

    def stop(self: Checkpoints, step: int) -> None:
        assert [checkpoint.step for checkpoint in committed(tmp_path)] == [2, 1]
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "_remove_older", stop)
    with pytest.raises(KeyboardInterrupt):
        save(store, 2)


def test_the_same_step_can_be_saved_twice(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=2)
    save(store, 4, b"first")
    save(store, 4, b"second")
    found = store.latest()
    assert found is not None and (found.folder / "model.bin").read_bytes() == b"second4"
    assert names(tmp_path) == ["latest.json", "step_00000004"]


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=1)
    save(store, 1)
    with (
        pytest.raises(CheckpointError, match=r"step 2 could not be saved.*No space left.*step 1 is untouched"),
        store.saving(2, {}) as folder,
    ):
        (folder / "half").write_bytes(b"half of i")
        raise OSError(errno.ENOSPC, "No space left on device")
    found = store.latest()
    assert found is not None and found.step == 1
    assert names(tmp_path) == ["latest.json", "step_00000001"]


@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_a_failing_disk_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store = Checkpoints(tmp_path, keep=1)
    save(store, 1)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(CheckpointError, match="Input/output error"):
            save(store, 2)
    found = Checkpoints(tmp_path, keep=1).latest()
    assert found is not None and found.step == 1


def test_a_state_that_is_no_json_is_an_error_and_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=1)
    save(store, 1)
    with pytest.raises(CheckpointError, match="not JSON serializable"), store.saving(2, {"cursor": object()}):
        pass
    assert names(tmp_path) == ["latest.json", "step_00000001"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    store = Checkpoints(tmp_path, keep=2)
    save(store, 1)
    save(store, 2)
    newest = tmp_path / "step_00000002"
    if damage == "flip":
        (newest / "model.bin").write_bytes(b"weightz2")
    elif damage == "cut":
        (newest / "model.bin").write_bytes(b"weight")
    elif damage == "remove":
        (newest / "model.bin").unlink()
    elif damage == "manifest":
        (newest / "manifest.json").write_text((newest / "manifest.json").read_text()[:-20])
    else:
        (newest / "manifest.json").unlink()
    # sizes are compared at once, hashes when a checkpoint is to be loaded
    assert [checkpoint.step for checkpoint in committed(tmp_path)] == ([2, 1] if damage == "flip" else [1])
    found = store.latest()
    assert found is not None and found.step == 1
    assert "step_00000002 is damaged" in capsys.readouterr().err
    save(store, 2)  # the run goes on from step 1 and comes to step 2 again
    assert [checkpoint.step for checkpoint in committed(tmp_path)] == [2, 1]


def test_a_damaged_later_checkpoint_does_not_push_out_an_earlier_good_one(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=1)
    save(store, 10)
    store.keep = 2
    save(store, 20)
    (tmp_path / "step_00000020/model.bin").write_bytes(b"weightz20")
    store.keep = 1
    save(store, 15)
    found = store.latest()
    assert found is not None and found.step == 15
    assert names(tmp_path) == ["latest.json", "step_00000015"]


def test_a_run_does_not_start_again_silently_when_every_checkpoint_is_damaged(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=2)
    save(store, 1)
    (tmp_path / "step_00000001/model.bin").write_bytes(b"weightz1")
    with pytest.raises(CheckpointError, match=r"step_00000001: wrong hash: model\.bin.*remove the folder"):
        store.latest()


def test_leftovers_of_a_killed_save_are_cleared_and_replaced_ones_put_back(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=2)
    save(store, 1)
    save(store, 2)
    (tmp_path / "step_00000002").rename(tmp_path / "step_00000002.replaced")
    (tmp_path / "step_00000003.tmp").mkdir()
    (tmp_path / "latest.json").write_text("{}")
    store = Checkpoints(tmp_path, keep=2)
    assert names(tmp_path) == ["latest.json", "step_00000001", "step_00000002"]
    assert json.loads((tmp_path / "latest.json").read_text())["step"] == 2


# One process imports, then forks a saver for each line it reads: importing anew for each kill would take a second each.
SAVER = """
import os, sys
from pathlib import Path
from align_cli.checkpoints import Checkpoints

def save_for_ever(folder):
    store = Checkpoints(folder, keep=2)
    found = store.latest()
    step = found.step if found else 0
    print(os.getpid(), step, flush=True)
    while True:
        step += 1
        with store.saving(step, {"cursor": step}) as target:
            for part in range(4):
                (target / f"{part}.bin").write_bytes(step.to_bytes(8, "big") * 5000)

for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        save_for_ever(Path(sys.argv[1]))
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


def test_a_process_killed_at_any_moment_loses_no_committed_checkpoint(tmp_path: Path) -> None:
    generator = random.Random(0)
    seen = 0
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SAVER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as host:
        assert host.stdin is not None and host.stdout is not None
        for trial in range(40):
            host.stdin.write("save\n")
            saver, started = map(int, host.stdout.readline().split())
            assert started >= seen
            # every second saver gets to commit, however slow the machine is; the others may die in their first save
            until = seen + trial % 2
            deadline = time.monotonic() + 0.05 * generator.random()
            while time.monotonic() < deadline or seen < until:
                seen = max([seen, *(checkpoint.step for checkpoint in committed(tmp_path))])
            os.kill(saver, signal.SIGKILL)
            assert host.stdout.readline() == "ended\n"
            # what could be seen as committed before the kill is there afterwards, and whole
            if found := committed(tmp_path):
                assert found[0].step >= seen
                assert checkpoints._damage(found[0]) == []
                assert (found[0].folder / "3.bin").read_bytes()[:8] == found[0].step.to_bytes(8, "big")
        host.stdin.close()
    assert seen >= 20


RANKS = """
import sys
from pathlib import Path
import torch.distributed as dist
from align_cli import checkpoints, distributed
from align_cli.checkpoints import CheckpointError, Checkpoints
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
if rank == 0:  # as on a network file system, where a listing lags behind what other nodes write
    listed = checkpoints._files
    checkpoints._files = lambda folder: [name for name in listed(folder) if name != "rank_1.bin"]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
store = Checkpoints(folder / "checkpoints", keep=2)
for step in (1, 2):
    try:
        with store.saving(step, {"step": step}) as target:
            (target / f"rank_{rank}.bin").write_bytes(bytes([rank, step]))
            if step == 2 and rank == 1:
                raise OSError(28, "No space left on device")
        print("saved", step)
    except CheckpointError as error:
        print("failed", step, "rank 1: OSError: [Errno 28]" in str(error))
found = store.latest()
print(found.step, found.ranks, len(found.files))
dist.destroy_process_group()
"""


def test_two_ranks_commit_together_and_fail_together(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", RANKS, str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for process in processes:
            said, _ = process.communicate(timeout=HANGS)
            assert said.splitlines() == ["saved 1", "failed 2 True", "1 2 3"]
    finally:
        for process in processes:
            process.kill()
