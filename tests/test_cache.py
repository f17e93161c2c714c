"""The reference's figures on disk: what makes a run measure, what does not, and what goes wrong with disks and others.

The runs are those of `small_runs`: 26 prompts with 2, 4, 4, 2, ... responses, of which 6 prompts are held out.
"""

import errno
import itertools
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs
import torch
from forks import HANGS, Forks
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import align, overrides, summary
from torch.testing import assert_close

from align_cli import baselines, cache, distributed, exits, references, sweep
from align_cli.cache import FOUND, MISSING, Folder, Shard, names_of
from align_cli.data.batches import MicroBatch, flatten
from align_cli.data.store import Group
from align_cli.engine import Engine, Optimizer, TorchEngine
from align_cli.models.causal import Manner, Model, load_model
from align_cli.references import Cached

CPU = torch.device("cpu")
OPTIMIZER = Optimizer(betas=[0.9, 0.999], eps=1e-8, weight_decay=0.0, max_grad_norm=1.0)


def silent(text: str) -> None:
    pass


def names(*numbers: int) -> cache.Names:
    return names_of([number.to_bytes(16, "big") for number in numbers])


def figures(*values: float) -> cache.Figures:
    return np.array(values, dtype=np.float32)


def some_groups(count: int, responses: int = 3) -> list[Group]:
    generator = np.random.default_rng(0)

    def ids(size: int) -> np.ndarray:
        return generator.integers(4, 15, size).astype(np.int32)

    return [
        Group(
            index=index,
            prompt=ids(3 + index % 5),
            responses=tuple(ids(2 + 3 * k + index % 3) for k in range(responses)),
            ratings=np.arange(responses, dtype=np.float32),
            where="here",
        )
        for index in range(count)
    ]


@pytest.fixture
def engine(tiny_model: Path) -> TorchEngine:
    section = Model(name="hf", path=str(tiny_model), revision=None, rows="auto", head="auto", architecture=None)
    return TorchEngine(
        load_model(section, dtype=torch.float32, bits=None), CPU, manner=Manner(flat=True), optimizer=OPTIMIZER
    )


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.figures"))


# --- shards


@settings(deadline=None)
@given(st.dictionaries(st.binary(min_size=16, max_size=16), st.floats(width=32, allow_nan=False), min_size=1))
def test_a_shard_finds_every_name_it_holds_and_no_other(stored: dict[bytes, float]) -> None:
    shard = cache.merged([Shard(names_of(list(stored)), figures(*stored.values()), None)])
    values, there = shard.find(names_of(list(stored)))
    assert there.all() and values.tolist() == figures(*stored.values()).tolist()
    near = [bytes([name[0] ^ 1]) + name[1:] for name in stored] + [name[:-1] + bytes([name[-1] ^ 1]) for name in stored]
    assert shard.find(names_of(near))[1].tolist() == [name in stored for name in near]


def test_names_that_end_in_zero_bytes_are_names_like_others(tmp_path: Path) -> None:
    zeros = names_of([bytes(16), b"a" + bytes(15), b"a" * 16])
    kept = Folder(tmp_path, tidies=True)
    kept.adopt(zeros, figures(1, 2, 3), own=kept.add(zeros, figures(1, 2, 3)) != "")
    values, state = Folder(tmp_path, tidies=True).find(zeros[::-1])
    assert values.tolist() == [3, 2, 1] and (state == FOUND).all()


def test_of_two_figures_with_one_name_the_older_holds_before_and_after_a_merge(tmp_path: Path) -> None:
    first, second = Folder(tmp_path, tidies=True), Folder(tmp_path, tidies=True)
    for age, kept, value in ((2, first, 1.0), (1, second, 2.0)):
        file = kept.add(names(7, age), figures(value, age))
        os.utime(tmp_path / file, ns=(0, 10**18 - age))
        kept.adopt(names(7, age), figures(value, age), own=True)
    for kept in (first, second, Folder(tmp_path, tidies=True)):
        kept.refresh()
        assert kept.find(names(7))[0].tolist() == [1.0]
    del first, second, kept
    assert cache.tidy(tmp_path, many=1) == 2
    assert len(shards(tmp_path)) == 1
    values, state = Folder(tmp_path, tidies=True).find(names(7, 2, 1, 8))
    assert values[:3].tolist() == [1.0, 2.0, 1.0] and state.tolist() == [FOUND] * 3 + [MISSING]


def test_many_shards_are_merged_by_the_next_run_and_never_while_one_reads(tmp_path: Path) -> None:
    writer = Folder(tmp_path, tidies=True)
    for number in range(cache.MANY + 1):
        writer.add(names(number), figures(number))
    (tmp_path / ".left.tmp").write_bytes(b"of a killed process")
    reader = Folder(tmp_path, tidies=True)
    assert len(shards(tmp_path)) == cache.MANY + 1 and (tmp_path / ".left.tmp").exists()
    del writer, reader
    merged = Folder(tmp_path, tidies=True)
    assert len(shards(tmp_path)) == len(merged.shards) == 1
    assert merged.find(names(*range(cache.MANY + 1)))[0].tolist() == list(range(cache.MANY + 1))
    assert not (tmp_path / ".left.tmp").exists()


def test_small_shards_cost_no_open_file(tmp_path: Path) -> None:
    kept = Folder(tmp_path, tidies=False)
    for number in range(20):
        kept.add(names(number), figures(number))
    before = len(os.listdir("/proc/self/fd"))
    reader = Folder(tmp_path, tidies=False)
    assert len(reader.shards) == 20 and reader.find(names(7))[0].tolist() == [7.0]
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the folder's lock


@pytest.mark.parametrize("size", [10, 60_000])
def test_a_shard_is_checked_whether_it_is_read_or_mapped(size: int, tmp_path: Path) -> None:
    kept = Folder(tmp_path, tidies=True)
    file = tmp_path / kept.add(names(*range(size)), figures(*range(size)))
    assert (cache.read_shard(file).mapped is not None) == (file.stat().st_size >= cache.MAPPED)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(cache.Damaged):
        cache.read_shard(file)


def test_a_reader_keeps_its_figures_when_shards_are_replaced_under_it(tmp_path: Path) -> None:
    reader = Folder(tmp_path, tidies=True)
    file = reader.add(names(1, 2), figures(1, 2))
    reader.refresh()
    (tmp_path / file).unlink()
    other = Folder(tmp_path, tidies=True)
    other.add(names(3), figures(3))
    assert reader.find(names(1, 2))[0].tolist() == [1, 2]


def test_a_merge_that_is_killed_before_it_removes_loses_nothing(tmp_path: Path) -> None:
    kept = Folder(tmp_path, tidies=True)
    for number in range(3):
        kept.add(names(number), figures(number))
    del kept

    def killed(path: Path, **_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            cache.tidy(tmp_path, many=1)
    assert len(shards(tmp_path)) == 4
    assert cache.tidy(tmp_path, many=1) == 4
    assert Folder(tmp_path, tidies=True).find(names(0, 1, 2))[0].tolist() == [0, 1, 2]
    assert len(shards(tmp_path)) == 1


def test_two_processes_that_write_merge_and_read_at_once_lose_nothing(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; import numpy as np; from align_cli.cache import Folder, names_of\n"
        "folder, own = Path(sys.argv[1]), int(sys.argv[2])\n"
        "for turn in range(60):\n"
        "    kept = Folder(folder, tidies=True)\n"
        "    mine = names_of([n.to_bytes(16, 'big') for n in (turn, 1000 * own + turn)])\n"
        "    kept.add(mine, np.array([turn, -own], np.float32))\n"
        "    kept.refresh()\n"
        "    seen = names_of([n.to_bytes(16, 'big') for n in range(1000 * own, 1000 * own + turn + 1)])\n"
        "    values, state = kept.find(seen)\n"
        "    assert state.all() and (values == -own).all(), turn\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path), number], stderr=subprocess.PIPE, text=True)
        for number in ("1", "2")
    ]
    for process in processes:
        _, errors = process.communicate(timeout=HANGS)
        assert process.returncode == 0 and errors == ""
    kept = Folder(tmp_path, tidies=True)
    expected = {n: n for n in range(60)} | {1000 * own + n: -own for own in (1, 2) for n in range(60)}
    assert kept.find(names(*expected))[0].tolist() == list(expected.values())
    assert len(shards(tmp_path)) <= cache.MANY + 2  # they were merged on the way
    assert not list(tmp_path.glob(".*.tmp"))


# --- damage


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


@pytest.mark.parametrize("damage", [cut, flip, lambda data: b"", lambda data: data + data[:20]])
def test_a_damaged_shard_is_set_aside_with_one_warning_and_its_responses_are_measured_again(
    damage: Callable[[bytes], bytes], engine: TorchEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = some_groups(5)
    whole = Cached(tmp_path)
    whole.fill(engine, groups[:2], budget=100, say=silent)
    (spared,) = shards(tmp_path)
    whole.fill(engine, groups, budget=100, say=silent)
    (shard,) = set(shards(tmp_path)) - {spared}
    expected = whole.of(groups).clone()
    del whole
    written = shard.read_bytes()
    shard.unlink()  # a reader may have mapped it
    shard.write_bytes(damage(written))
    cached = Cached(tmp_path)
    assert capsys.readouterr().err.count("is damaged") == 1
    assert shards(tmp_path) == [spared] and list(tmp_path.glob("*.damaged")) == [shard.with_suffix(".damaged")]
    cached.fill(engine, groups, budget=100, say=silent)
    assert (cached.measured, cached.found) == (9, 6)
    assert_close(cached.of(groups), expected, rtol=0, atol=0)
    assert capsys.readouterr().err == ""


# --- full and read-only disks


def full_disk(number: int) -> Callable[..., None]:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
def test_a_run_goes_on_with_one_warning_when_figures_cannot_be_written(
    number: int,
    engine: TorchEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    groups = some_groups(150)
    monkeypatch.setattr(references, "MOST", 64)
    cached = Cached(tmp_path, {"model": "here"})
    monkeypatch.setattr(cache.os, "fsync", full_disk(number))
    cached.fill(engine, groups, budget=500, say=silent)
    cached.fill(engine, groups, budget=500, say=silent)
    told = capsys.readouterr().err
    assert told.count("warning:") == 1 and os.strerror(number) in told
    assert cached.measured == 450 and cached.found == 0
    monkeypatch.undo()
    assert shards(tmp_path) == []
    fresh = Cached(tmp_path)
    fresh.fill(engine, groups, budget=500, say=silent)
    # sums of at most 10 terms of 3 nats in fp32, in other orders where micro-batches differ
    assert_close(cached.of(groups), fresh.of(groups), rtol=0, atol=1e-5)


def test_a_disk_that_fills_while_a_run_measures_costs_a_warning_and_no_figure(
    engine: TorchEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kernel refuses to let files grow beyond 600 bytes, 30 figures; the second shard has more."""
    cached = Cached(tmp_path)
    cached.fill(engine, some_groups(4), budget=500, say=silent)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))
    try:
        cached.fill(engine, some_groups(60), budget=500, say=silent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    told = capsys.readouterr().err
    assert told.count("warning:") == 1 and os.strerror(errno.EFBIG) in told
    assert cached.measured == 180 and torch.isfinite(cached.of(some_groups(60))).all()
    assert [path.stat().st_size for path in shards(tmp_path)] == [12 * 20]
    assert not list(tmp_path.glob(".*.tmp"))


# --- filling


class Counting(Engine):
    """An engine that counts what it measures and may be killed on the way."""

    def __init__(self, inner: TorchEngine, *, after: int | None = None) -> None:
        super().__init__(inner.network, inner.device, manner=inner.manner)
        self.inner = inner
        self.after = after
        self.calls = 0
        self.responses = 0
        self.uncounted = 0

    def measure(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        if self.after is not None and self.responses >= self.after:
            raise KeyboardInterrupt
        self.calls += 1
        self.responses += batch.lengths.numel()
        self.uncounted += 0 if batch.counted else batch.lengths.numel()
        return self.inner.measure(batch)

    def module(self) -> torch.nn.Module:
        return self.inner.module()

    def backward(self, loss: torch.Tensor) -> None:
        self.inner.backward(loss)

    def step(self, lr: float) -> torch.Tensor:
        return self.inner.step(lr)

    def save(self, folder: Path) -> None:
        self.inner.save(folder)

    def load(self, folder: Path) -> None:
        self.inner.load(folder)

    def weights(self) -> dict[str, torch.Tensor]:
        return self.inner.weights()


def test_a_response_that_comes_twice_is_measured_once(engine: TorchEngine, tmp_path: Path) -> None:
    groups = some_groups(3)
    again = replace(groups[0], responses=(groups[0].responses[1], *groups[0].responses[1:]))
    cached, counting = Cached(tmp_path), Counting(engine)
    cached.fill(counting, [*groups, again, groups[2]], budget=1000, say=silent)
    assert counting.responses == cached.measured == 9
    expected = engine.measure(flatten([again]))["policy"].detach()
    assert_close(cached.of([again]), expected, rtol=0, atol=1e-5)


def test_a_kill_while_filling_loses_one_shard_at_most(
    engine: TorchEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "FIRST", 10)
    monkeypatch.setattr(references, "MOST", 10)  # groups of a shard
    groups = some_groups(60)
    with pytest.raises(KeyboardInterrupt):
        Cached(tmp_path).fill(Counting(engine, after=100), groups, budget=100, say=silent)
    cached = Cached(tmp_path)
    cached.fill(engine, groups, budget=100, say=silent)
    assert cached.found == 90 and cached.measured == 90  # 100 were measured, a shard holds 30


def test_a_slow_model_writes_more_often(engine: TorchEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(references.time, "perf_counter", lambda: 20.0 * next(clock))  # a shard takes 20 s
    monkeypatch.setattr(references, "FIRST", 4)
    monkeypatch.setattr(references, "FEWEST", 1)
    cached = Cached(tmp_path)
    cached.fill(engine, some_groups(30, 1), budget=1000, say=silent)
    # 4 groups in 20 s are 6 in 30 s, and then 9, and the 11 that are left
    assert sorted(path.stat().st_size // cache.RECORD for path in shards(tmp_path)) == [4, 6, 9, 11]


def test_memory_does_not_grow_with_the_number_of_groups(
    engine: TorchEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups that come one by one are let go of; a few chunks and shards of 100 are alive at once."""
    for name in ("CHUNK", "FIRST", "MOST"):
        monkeypatch.setattr(references, name, 100)
    alive: list[int] = []
    most: list[int] = []

    def stream() -> Iterator[Group]:
        for index in range(3000):
            prompt = np.array(divmod(index, 60), dtype=np.int32)
            alive.append(index)
            weakref.finalize(prompt, alive.remove, index)
            yield Group(index, prompt, (np.array([5], np.int32),), np.zeros(1, np.float32), "")
            most.append(len(alive))

    class Zero(Counting):
        def measure(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
            return {"policy": torch.zeros(batch.shape)}

    cached = Cached(tmp_path)
    cached.fill(Zero(engine), stream(), budget=4000, say=silent)
    assert cached.measured == 3000
    assert max(most) <= 500


# --- ranks


def shared_folder(rank: int, engine: TorchEngine, tmp_path: Path) -> None:
    """Both ranks see one folder, in which a shard is damaged: each measures its part of what is missing, once."""
    groups, counting = some_groups(41), Counting(engine)
    cached = Cached(tmp_path / "shared")
    cached.fill(counting, groups, budget=100, say=silent)
    assert cached.measured == sum(distributed.gather(counting.responses)) - fillers(counting) == 3 * 36
    assert cached.found == 3 * 5 and len(shards(tmp_path / "shared")) == 2
    assert set(distributed.gather(cached.of(groups).sum().item())) == {cached.of(groups).sum().item()}
    again = Counting(engine)
    cached = Cached(tmp_path / "shared")
    cached.fill(again, groups, budget=100, say=silent)
    assert (cached.measured, cached.found, again.calls) == (0, 3 * 41, 0)


def fillers(counting: Counting) -> int:
    """Responses of parts that only kept step with the other rank."""
    return sum(distributed.gather(counting.uncounted))


def folders_apart(rank: int, engine: TorchEngine, tmp_path: Path) -> None:
    """Each rank has a disk of its own, as on two machines; what one has found the other need not measure."""
    groups = some_groups(20)
    cached = Cached(tmp_path / f"of-{rank}")  # rank 1 knows the first 5 groups, and rank 0 none
    cached.fill(engine, groups, budget=100, say=silent)
    assert cached.measured == 3 * 15
    assert len(set(distributed.gather(cached.of(groups).sum().item()))) == 1
    del cached
    alone = Folder(tmp_path / f"of-{rank}", tidies=True)
    told = [name for group in groups for name in references.content(group)]
    assert (alone.find(names_of(told))[1] != MISSING).sum() == 3 * (20 if rank else 15)


def one_disk_is_full(rank: int, engine: TorchEngine, tmp_path: Path) -> None:
    groups = some_groups(20)
    cached = Cached(tmp_path / "full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache.os, "fsync", full_disk(errno.ENOSPC))
        cached.fill(engine, groups, budget=100, say=silent)
    assert cached.measured == 3 * 20 and torch.isfinite(cached.of(groups)).all()


def as_rank(model: str, tmp_path: str) -> None:
    """What each of two processes does."""
    section = Model(name="hf", path=model, revision=None, rows="auto", head="auto", architecture=None)
    network = load_model(section, dtype=torch.float32, bits=None)
    distributed.join(CPU)
    group: Any = torch.distributed.new_group([0, 1])  # as DeepSpeed makes its own, which waits no less long
    assert group._get_backend(CPU).options._timeout == distributed.TIMEOUT
    for scenario in (shared_folder, folders_apart, one_disk_is_full):
        os.environ["LOCAL_RANK"] = "0" if scenario is folders_apart else os.environ["RANK"]
        inner = TorchEngine(network, CPU, manner=Manner(flat=True), optimizer=OPTIMIZER)
        scenario(distributed.rank(), inner, Path(tmp_path))
        distributed.barrier()
    distributed.leave()


def test_two_ranks_share_the_work_and_the_figures(engine: TorchEngine, tiny_model: Path, tmp_path: Path) -> None:
    Cached(tmp_path / "of-1").fill(engine, some_groups(5), budget=100, say=silent)
    before = Cached(tmp_path / "shared")
    before.fill(engine, some_groups(5), budget=100, say=silent)
    damaged = tmp_path / "shared" / f"{'0' * 32}.figures"
    damaged.write_bytes(bytes(40))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    program = "import sys; sys.path.insert(0, sys.argv[1]); import test_cache; test_cache.as_rank(*sys.argv[2:])"
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(tiny_model), str(tmp_path)]
    meeting = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(command, env={**meeting, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    told = [process.communicate(timeout=HANGS)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(told)
    assert [text.count("is damaged") for text in told] == [1, 0]
    assert [text.count("cannot be written: No space left") for text in told] == [1, 0]
    assert [text.count("warning:") for text in told] == [2, 0]
    together, alone = Cached(tmp_path / "shared"), Cached(tmp_path / "alone")
    alone.fill(engine, some_groups(41), budget=1000, say=silent)
    assert_close(together.of(some_groups(41)), alone.of(some_groups(41)), rtol=0, atol=1e-5)


# --- runs


class Runs:
    """Small runs that share a cache, under `folder`."""

    def __init__(self, model: Path, rows: Path, folder: Path) -> None:
        self.model, self.rows, self.folder = model, rows, folder
        self.count = itertools.count()

    def train(self, *more: str) -> tuple[int, int]:
        """Responses that a run measures, and that it finds."""
        run_dir = self.folder / f"run-{next(self.count)}"
        given = overrides(self.model, self.rows, run_dir, "train.steps=5", "eval.groups=64", *more)
        plain = {override.partition("=")[0]: override for override in given}  # the last one of a key holds
        assert align("train", *plain.values()) == 0
        told = summary(run_dir)
        return told["reference/measured"], told["reference/found"]


@pytest.fixture(scope="module")
def runs(tiny_model: Path, ragged_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """A cache that holds the whole of the ragged file."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(folder / "cache"))
        made = Runs(tiny_model, ragged_file, folder)
        measured, found = made.train()
        assert measured == responses(ragged_file) and found == 0
        yield made


def responses(rows: Path, *, at_most: int = 8) -> int:
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    return sum(min(at_most, len(line["completions"])) for line in lines)


@pytest.mark.parametrize(
    "change",
    [
        ("algo.alpha=0.3",),
        ("algo.beta=0.7",),
        ("algo=info_nca", "train.lr=1e-5"),
        ("train.lr=1e-5", "train.prompts=3", "run.seed=4"),
        ("adapter=lora",),
        (),  # another run.dir alone
    ],
    ids=lambda change: ",".join(change) or "run.dir",
)
def test_alpha_beta_rate_order_adapters_and_output_never_measure_again(runs: Runs, change: tuple[str, ...]) -> None:
    measured, found = runs.train(*change)
    assert measured == 0 and found > 0


@pytest.mark.parametrize("keep", [2, 3])
def test_fewer_responses_of_a_prompt_never_measure_again(runs: Runs, keep: int) -> None:
    assert runs.train(f"data.responses={keep}") == (0, responses(runs.rows, at_most=keep))


@pytest.mark.parametrize("change", ["engine.precision=bf16", "model.rows=padded"])
def test_other_numerics_always_measure_again(runs: Runs, change: str) -> None:
    assert runs.train(change) == (responses(runs.rows), 0)


def test_other_weights_always_measure_again_and_the_first_ones_are_still_there(runs: Runs, tmp_path: Path) -> None:
    other = small_runs.build_model(tmp_path / "other", seed=1)
    assert runs.train(f"model.path={other}") == (responses(runs.rows), 0)
    weights = other / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-2] ^= 1  # of the last weight, in place
    weights.write_bytes(changed)
    assert runs.train(f"model.path={other}") == (responses(runs.rows), 0)
    assert runs.train() == (0, responses(runs.rows))


def test_another_template_always_measures_again(runs: Runs, tmp_path: Path) -> None:
    chat = tmp_path / "chat"
    shutil.copytree(runs.model, chat)
    told = json.loads((chat / "tokenizer_config.json").read_text())
    told["chat_template"] = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %}={% endif %}{% endfor %}"
    )
    (chat / "tokenizer_config.json").write_text(json.dumps(told))
    assert runs.train(f"model.path={chat}") == (0, responses(runs.rows))  # as long as the template is not used
    assert runs.train(f"model.path={chat}", "data.template=auto") == (responses(runs.rows), 0)


def test_truncation_measures_again_what_it_changes(runs: Runs) -> None:
    prompts = [len(json.loads(line)["prompt"]) for line in runs.rows.read_text().splitlines()]
    measured, found = runs.train(f"data.max_prompt_length={min(prompts) - 1}", "data.truncation=truncate_prompt_left")
    assert measured == responses(runs.rows) and found == 0


def test_a_longer_file_measures_its_new_rows_alone(runs: Runs, tmp_path: Path) -> None:
    longer = small_runs.write_rows(tmp_path / "longer.jsonl", responses=(2, 4, 4), rows=29)
    assert longer.read_text().startswith(runs.rows.read_text())
    assert runs.train(f"data.path={longer}", "train.steps=6") == (
        responses(longer) - responses(runs.rows),
        responses(runs.rows),
    )


def test_a_run_whose_reference_is_there_makes_no_forward_pass_for_it(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 5 steps of 4 prompts, each one micro-batch, the network is called 5 times, and not in the evaluations."""
    calls: list[int] = []
    plain = TorchEngine.measure

    def counted(self: TorchEngine, batch: MicroBatch) -> dict[str, torch.Tensor]:
        calls.append(batch.lengths.numel())
        return plain(self, batch)

    monkeypatch.setattr(TorchEngine, "measure", counted)
    wide = ("eval.groups=0", "data.responses=2", "engine.micro_tokens=4096")
    assert runs.train(*wide)[0] == 0
    assert len(calls) == 5
    calls.clear()
    other = small_runs.build_model(runs.folder / "other", seed=2)
    assert runs.train(*wide, f"model.path={other}")[0] == 40
    assert len(calls) > 5


def test_a_dataset_that_is_known_to_be_there_is_not_looked_through(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.train()
    monkeypatch.setattr(Cached, "_missing", None)
    assert runs.train() == (0, responses(runs.rows))
    for shard in shards(runs.folder / "cache"):
        os.utime(shard)
    for note in (runs.folder / "cache").rglob("*.covers"):
        note.write_text(json.dumps(["of a shard that is gone.figures"]))
    with pytest.raises(TypeError):  # now it has to look
        runs.train()


def test_kto_s_mismatched_pairs_are_measured_once(runs: Runs) -> None:
    measured, _ = runs.train("algo=kto", "algo.beta=0.1")
    assert measured > 0
    assert runs.train("algo=kto", "algo.beta=0.2", "train.lr=1e-5")[0] == 0


def test_a_sweep_over_beta_and_rate_measures_each_response_once(
    runs: Runs, forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forked(given: list[str], config_dirs: list[str]) -> tuple[int, bool]:
        return forks.run("train", *given), False

    monkeypatch.setattr(sweep, "_run", forked)
    model = small_runs.build_model(tmp_path / "model", seed=3)
    given = [o for o in overrides(model, runs.rows, tmp_path / "sweep", "train.steps=5") if "train.lr" not in o]
    grid = ("algo.beta=0.05,0.1,0.2", "train.lr=1e-4,3e-4,1e-3")
    forks_cache = tmp_path / "sweep-cache"
    monkeypatch.setenv("ALIGN_CACHE", str(forks_cache))
    assert align("train", "-m", *given, *grid) == exits.DONE
    told = [summary(path.parent) for path in sorted((tmp_path / "sweep").glob("*/summary.json"))]
    assert len(told) == 9
    everything = responses(runs.rows)
    assert sorted(s["reference/measured"] for s in told) == [0] * 8 + [everything]
    assert sorted(s["reference/found"] for s in told) == [0] + [everything] * 8
    assert all(s["reference/seconds"] >= 0 for s in told)


# --- align score


def test_after_score_no_run_measures_whatever_it_trains_on(
    tiny_model: Path, ragged_file: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = overrides(tiny_model, ragged_file, tmp_path / "scored", "train.steps=1", "eval.groups=2")
    everything = responses(ragged_file)
    for measured, found in ((everything, 0), (0, everything)):
        assert align("score", *given) == exits.DONE
        told = capsys.readouterr().out
        assert f"reference of {everything} responses: {measured} measured, {found} found, " in told
    assert not (tmp_path / "scored").exists() and list(home.glob("references/*/*.figures"))
    runs = Runs(tiny_model, ragged_file, tmp_path)
    assert runs.train() == runs.train("train.steps=11", "algo.beta=0.7") == (0, everything)
    assert runs.train("data.responses=2", "algo=dpo")[0] == 0


def test_score_on_two_ranks_serves_a_run_on_one(
    tiny_model: Path, ragged_file: Path, home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = overrides(tiny_model, ragged_file, tmp_path / "scored", "engine=zero0", "launch.devices=2")
    assert align("score", *given) == exits.DONE
    assert f"{responses(ragged_file)} measured, 0 found" in capfd.readouterr().out
    assert not (tmp_path / "scored").exists()
    assert Runs(tiny_model, ragged_file, tmp_path).train() == (0, responses(ragged_file))


@pytest.mark.parametrize(
    "change, word",
    [
        (["reference=frozen"], "align score fills reference=cached"),
        (["algo=sft", "data.responses=1"], "algo=sft has no reference"),
        (["launch=prepare"], "use launch=local"),
        (["-m"], "only align train takes it"),
    ],
)
def test_score_refuses_what_no_run_would_look_up(
    change: list[str],
    word: str,
    tiny_model: Path,
    ragged_file: Path,
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert align("score", *overrides(tiny_model, ragged_file, tmp_path / "none", *change)) == exits.USER
    assert word in capsys.readouterr().err
    assert not home.exists()


# --- align cache


@pytest.fixture
def scored(tiny_model: Path, ragged_file: Path, home: Path, tmp_path: Path) -> Path:
    """The folder of references of a scored dataset, with two shards."""
    assert align("score", *overrides(tiny_model, ragged_file, tmp_path / "none")) == exits.DONE
    (folder,) = (home / "references").iterdir()
    return folder


def test_cache_ls_says_what_is_kept_and_where_it_came_from(
    scored: Path, tiny_model: Path, ragged_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert align("cache", "ls") == exits.DONE
    _, reference, data = capsys.readouterr().out.splitlines()
    for word in ("reference", scored.name[:12], str(tiny_model), "float32", f"{responses(ragged_file)} responses"):
        assert word in reference
    assert data.startswith("data ") and "20 to train on, 6 held out" in data


def test_cache_verify_measures_a_sample_again_and_finds_it_equal(
    scored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for named in ([], [str(scored)], [scored.name[:8]]):
        assert align("cache", "verify", *named, "--sample", "5") == exits.DONE
        told = capsys.readouterr().out
        assert "2 shards are whole" in told and "5 of 86 kept responses measured again" in told
        assert "within the rounding of float32" in told
    assert align("cache", "verify", "ffffffffffff") == exits.USER


def test_cache_verify_fails_where_figures_are_not_the_model_s(scored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A shard of other figures, with the digest that belongs to them."""
    for path in shards(scored):
        shard = cache.read_shard(path)
        data = cache.content(replace(shard, values=shard.values + np.float32(0.5)))
        path.unlink()
        (scored / f"{cache.digest(data)}.figures").write_bytes(data)
    assert align("cache", "verify") == exits.FAILED
    assert "BEYOND the rounding" in capsys.readouterr().out


def test_cache_verify_sets_a_damaged_shard_aside(scored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = shards(scored)[0]
    shard.write_bytes(flip(shard.read_bytes()))
    assert align("cache", "verify", "--sample", "0") == exits.FAILED
    told = capsys.readouterr()
    assert "1 shards are whole, 1 damaged" in told.out and "set aside" in told.err
    assert align("cache", "verify", "--sample", "0") == exits.DONE


def test_cache_verify_compares_no_figures_with_other_weights(
    scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    origin = json.loads((scored / "origin.json").read_text())
    other = small_runs.build_model(tmp_path / "other", seed=5)
    (scored / "origin.json").write_text(json.dumps(origin | {"model": str(other)}))
    assert align("cache", "verify") == exits.DONE
    assert "has other weights by now" in capsys.readouterr().out


def test_cache_gc_merges_and_removes_leftovers_and_loses_no_figure(
    scored: Path, home: Path, tiny_model: Path, ragged_file: Path, tmp_path: Path
) -> None:
    leftovers = [scored / "x.damaged", scored / ".y.tmp", home / "data" / "z.1.tmp"]
    for path in leftovers:
        path.write_bytes(b"left")
    assert align("cache", "gc", "--dry-run") == exits.DONE
    assert len(shards(scored)) == 2 and all(path.exists() for path in leftovers)
    assert align("cache", "gc") == exits.DONE
    assert len(shards(scored)) == 1 and not any(path.exists() for path in leftovers)
    assert Runs(tiny_model, ragged_file, tmp_path).train() == (0, responses(ragged_file))


def test_cache_gc_removes_what_was_not_used_for_so_many_days(
    scored: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data,) = (path for path in (home / "data").iterdir() if path.is_dir())
    assert align("cache", "gc", "--older-than", "1") == exits.DONE
    assert scored.exists() and data.exists()
    week_ago = time.time() - 7 * 86400
    for path in (scored / ".lock", data):
        os.utime(path, (week_ago, week_ago))
    assert align("cache", "gc", "--older-than", "8") == exits.DONE
    assert scored.exists() and data.exists()
    assert align("cache", "gc", "--older-than", "6", "--dry-run") == exits.DONE
    assert scored.exists() and data.exists()
    assert align("cache", "gc", "--older-than", "6") == exits.DONE
    assert not scored.exists() and not data.exists()


def test_cache_gc_touches_nothing_that_a_live_run_uses(
    scored: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data,) = (path for path in (home / "data").iterdir() if path.is_dir())
    with cache.in_use(home):
        run = Folder(scored, tidies=True)
        for path in (scored / ".lock", data):
            os.utime(path, (0, 0))
        before = sorted(home.rglob("*"))
        assert align("cache", "gc", "--older-than", "1") == exits.DONE
        assert sorted(home.rglob("*")) == before
        told = capsys.readouterr().err
        assert "in use: left alone" in told and "data and worlds are left alone" in told
        del run
    assert align("cache", "gc", "--older-than", "1") == exits.DONE
    assert not scored.exists() and not data.exists()


def test_baselines_and_judgments_are_listed_and_the_latter_are_never_removed(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baselines._write(home / "baselines" / "of.npz", {name: np.zeros(2, np.float32) for name in ("a", "b", "c")})
    left = home / "baselines" / ".of.npz.77.tmp"
    broken, judged = home / "baselines" / "broken.npz", home / "judgments" / "asked.jsonl"
    judged.parent.mkdir()
    for path, content in ((left, b"left"), (broken, b"PK"), (judged, b'{"name": 1}\n{"name": 2}\n')):
        path.write_bytes(content)
    assert align("cache", "ls") == exits.DONE
    told = {line.split()[1]: line for line in capsys.readouterr().out.splitlines()}
    assert "baselines" in told["of.npz"] and "3 prompts" in told["of.npz"]
    assert "unknown" in told["broken.npz"]
    assert "judgments" in told["asked.jsonl"] and "2 answers" in told["asked.jsonl"]
    assert align("cache", "gc") == exits.DONE
    assert not left.exists() and broken.exists()
    for path in (home / "baselines").iterdir():
        os.utime(path, (0, 0))
    os.utime(judged, (0, 0))
    assert set(baselines._read(home / "baselines" / "of.npz")) == {"a", "b", "c"}  # and so it is used today
    assert align("cache", "gc", "--older-than", "1") == exits.DONE
    assert [path.name for path in (home / "baselines").iterdir()] == ["of.npz"]
    assert judged.exists()


def test_a_run_that_waits_for_a_folder_s_removal_makes_it_anew(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    Folder(folder, tidies=True)
    lock = cache._opened(folder / ".lock")  # of a run that has opened the lock and not yet locked it
    assert lock is not None
    with pytest.MonkeyPatch.context() as patch:
        opened = iter([lock])
        plain = cache._opened
        patch.setattr(cache, "_opened", lambda path: next(opened, None) or plain(path))
        shutil.rmtree(folder)
        descriptor = cache.hold(folder)
    assert descriptor is not None and os.path.samestat(os.fstat(descriptor), (folder / ".lock").stat())
    os.close(descriptor)


# --- digests of weights


def test_a_large_file_is_hashed_once_and_again_when_anything_about_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "LARGE", 1)
    monkeypatch.setattr(cache, "SETTLED", 0.0)
    file, kept = tmp_path / "file", tmp_path / "kept"
    file.write_bytes(b"one")
    first = cache.file_digest(file, kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache.hashlib, "blake2b", forbidden(cache.hashlib.blake2b))
        assert cache.file_digest(file, kept) == first
    stat = file.stat()
    time.sleep(0.02)
    file.write_bytes(b"two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as `cp -p` and `rsync -t` leave it
    assert file.stat().st_mtime_ns == stat.st_mtime_ns and file.stat().st_ino == stat.st_ino
    assert cache.file_digest(file, kept) != first
    for note in kept.iterdir():
        note.write_text("{")  # cut by a full disk
    file.write_bytes(b"one")
    assert cache.file_digest(file, kept) == first


def forbidden(plain: Callable[..., object]) -> Callable[..., object]:
    """A hash that takes no more than a name: nobody may read the file."""

    def small(data: bytes = b"", **options: int) -> object:
        assert data, "the file is read"
        return plain(data, **options)

    return small


def test_the_digest_of_a_file_that_has_just_changed_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "LARGE", 1)
    (tmp_path / "file").write_bytes(b"one")
    cache.file_digest(tmp_path / "file", tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
