"""The column `reference`: three ways that agree, and a cache that never measures twice nor answers for another."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from align_cli import rundir
from align_cli.cli import dispatch
from align_cli.data.batches import flatten
from align_cli.data.store import Group
from align_cli.engine import Optimizer, TorchEngine
from align_cli.models import tiny
from align_cli.models.adapters import Adapter, attach
from align_cli.models.causal import Model, load_model
from align_cli.references import AdapterOff, Cached, Frozen, MismatchKL, content, mismatched, weights_digest

CPU = torch.device("cpu")
OPTIMIZER = Optimizer(betas=[0.9, 0.999], eps=1e-8, weight_decay=0.0, max_grad_norm=1.0)
LORA = Adapter(name="lora", rank=4, scale=4.0, targets="all-linear", bits=None)
FULL = Adapter(name="none", rank=None, scale=None, targets=None, bits=None)


def write_model(folder: Path, seed: int = 0) -> Path:
    tiny.build(folder, alphabet="abcdefgh +=", hidden=16, layers=2, heads=2, positions=64, seed=seed)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


def load(folder: Path, adapter: Adapter = FULL) -> TorchEngine:
    section = Model(name="hf", path=str(folder), revision=None, rows="auto", architecture=None)
    network = attach(load_model(section, dtype=torch.float32, bits=None), adapter, seed=0)
    return TorchEngine(network.train(), CPU, flat=True, optimizer=OPTIMIZER)


def some_groups(count: int = 5, responses: int = 3) -> list[Group]:
    generator = np.random.default_rng(0)

    def ids(size: int) -> np.ndarray:
        return generator.integers(4, 15, size).astype(np.int32)

    return [
        Group(
            index=index,
            prompt=ids(3 + index),
            responses=tuple(ids(2 + 3 * k + index) for k in range(responses)),
            ratings=np.arange(responses, dtype=np.float32),
            where="here",
        )
        for index in range(count)
    ]


def silent(text: str) -> None:
    pass


def train_a_little(engine: TorchEngine, groups: list[Group]) -> None:
    for _ in range(5):
        engine.backward(-engine.measure(flatten(groups))["policy"].mean())
        engine.step(1e-2)


def test_cached_frozen_and_adapter_off_agree_and_stay_while_the_policy_moves(model: Path, tmp_path: Path) -> None:
    groups = some_groups()
    engine = load(model, LORA)
    cached = Cached(tmp_path)
    cached.fill(engine, groups, budget=30, say=silent)
    batch = flatten(groups)
    before = engine.measure(batch)["policy"].detach()
    train_a_little(engine, groups)
    assert (engine.measure(batch)["policy"] - before).abs().mean() > 0.1
    frozen = Frozen(load(model).network, flat=True)
    # sums of at most 12 terms of 3 nats in fp32, in other orders where batches differ
    for reference in (cached, frozen, AdapterOff(engine)):
        assert_close(reference(batch), before, rtol=0, atol=1e-5)
        assert not reference(batch).requires_grad
    assert (engine.measure(batch)["policy"] - before).abs().mean() > 0.1  # the adapters are on again


def test_padded_rows_give_the_same_reference(model: Path) -> None:
    batch = flatten(some_groups())
    network = load(model).network
    assert_close(Frozen(network, flat=True)(batch), Frozen(network, flat=False)(batch), rtol=0, atol=1e-5)


def test_what_was_measured_is_found_by_the_next_run_in_any_order_and_selection(model: Path, tmp_path: Path) -> None:
    groups = some_groups(6)
    engine = load(model)
    first = Cached(tmp_path)
    first.fill(engine, groups, budget=100, say=silent)
    assert first.measured == 18
    second = Cached(tmp_path)
    fewer = [replace(g, responses=g.responses[2:0:-1], ratings=g.ratings[2:0:-1]) for g in reversed(groups)]
    second.fill(engine, [*groups, *fewer], budget=10, say=silent)
    assert second.measured == 0
    assert_close(second.of(fewer), first.of(groups).flip(0)[:, [2, 1]], rtol=0, atol=0)


def test_only_what_is_new_is_measured(model: Path, tmp_path: Path) -> None:
    engine = load(model)
    Cached(tmp_path).fill(engine, some_groups(4), budget=100, say=silent)
    told: list[str] = []
    cached = Cached(tmp_path)
    cached.fill(engine, some_groups(6), budget=100, say=told.append)
    assert cached.measured == 6
    assert told == ["measuring the reference on 6 responses"]


def test_a_damaged_shard_is_said_and_measured_again(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, groups = load(model), some_groups()
    whole = Cached(tmp_path)
    whole.fill(engine, groups, budget=100, say=silent)
    (shard,) = tmp_path.glob("*.npz")
    written = shard.read_bytes()
    for damaged in (written[: len(written) // 2], b"", b"PK\x03\x04", written[:200]):
        shard.write_bytes(damaged)
        cached = Cached(tmp_path)
        assert "is damaged" in capsys.readouterr().err
        cached.fill(engine, groups, budget=100, say=silent)
        assert cached.measured == 15
        assert_close(cached.of(groups), whole.of(groups), rtol=0, atol=0)


def test_an_interrupted_write_leaves_nothing_that_is_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    engine, groups = load(model), some_groups()
    with monkeypatch.context() as patch:
        patch.setattr("align_cli.references.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            Cached(tmp_path).fill(engine, groups, budget=100, say=silent)
    assert not list(tmp_path.glob("*.npz"))
    assert Cached(tmp_path).figures == {}


def test_two_processes_may_fill_one_folder_at_once(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from align_cli.references import Cached\n"
        "cache = Cached(Path(sys.argv[1]))\n"
        "for turn in range(40):\n"
        "    cache._write({bytes([turn] * 16): -float(turn), bytes([int(sys.argv[2])] * 16): 1.0})\n"
        "    Cached(Path(sys.argv[1])) if turn % 8 == 0 else None\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path), number], stderr=subprocess.PIPE, text=True)
        for number in ("100", "101")
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "damaged" not in errors
    expected = {bytes([n] * 16): -float(n) for n in range(40)} | {bytes([n] * 16): 1.0 for n in (100, 101)}
    assert Cached(tmp_path).figures == expected
    assert not list(tmp_path.glob(".*.tmp"))


tokens = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=12)


@settings(deadline=None)
@given(sequence=st.lists(st.integers(0, 3), min_size=2, max_size=12), other=tokens)
def test_names_tell_prompt_from_response_wherever_the_border_is(sequence: list[int], other: list[int]) -> None:
    def name(prompt: list[int], response: list[int]) -> bytes:
        group = Group(0, np.array(prompt, np.int32), (np.array(response, np.int32),), np.zeros(1, np.float32), "")
        return content(group)[0]

    cuts = [(sequence[:cut], sequence[cut:]) for cut in range(1, len(sequence))]
    assert len({name(*cut) for cut in cuts}) == len(cuts)
    assert name(sequence, other) != name(sequence, [*other, 0])
    assert name(sequence, other) != name([*sequence, 0], other)
    assert name(sequence, other) != name([0, *sequence], other)


def test_a_name_does_not_depend_on_the_other_responses_nor_on_how_arrays_are_stored() -> None:
    (group,) = some_groups(1)
    alone = replace(group, responses=(group.responses[1],), ratings=group.ratings[:1])
    assert content(alone) == content(group)[1:2]
    strided = np.repeat(group.responses[1], 2).astype(np.int64)[::2]
    assert content(replace(alone, responses=(strided,))) == content(alone)


def test_other_weights_dtypes_and_rows_have_folders_of_their_own(model: Path, tmp_path: Path) -> None:
    digest = weights_digest(str(model), None)
    other = weights_digest(str(write_model(tmp_path / "other", seed=1)), None)
    same = weights_digest(str(write_model(tmp_path / "same", seed=0)), None)
    assert digest == same != other
    shard = tmp_path / "same" / "model.safetensors"
    flipped = bytearray(shard.read_bytes())
    flipped[-1] ^= 1
    shard.write_bytes(flipped)
    assert weights_digest(str(tmp_path / "same"), None) != digest
    assert weights_digest("some/hub-id", "a" * 40) != weights_digest("some/hub-id", "b" * 40)
    homes = {
        Cached.home(tmp_path, each, dtype=dtype, flat=flat, bits=None)
        for each in (digest, other)
        for dtype in (torch.float32, torch.bfloat16)
        for flat in (True, False)
    }
    assert len(homes) == 8


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    generator = np.random.default_rng(0)

    def text() -> str:
        return "".join(generator.choice(list("abcdefgh"), 3 + generator.integers(5)))

    lines = [
        {"prompt": f"{text()} =", "completions": [text() for _ in range(4)], "rewards": [0.1, 0.4, 0.2, 0.9]}
        for _ in range(12)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_only_new_weights_numerics_or_tokens_are_measured(model: Path, rows: Path, cache: Path, tmp_path: Path) -> None:
    def measured(name: str, **changed: object) -> int:
        given = {
            "algo": "nca",
            "model": "hf",
            "model.path": model,
            "data": "file",
            "data.path": rows,
            "data.held_out": 2,
            "train.prompts": 5,
            "train.lr": 1e-3,
            "track": "none",
            "run.dir": tmp_path / name,
        } | {key.replace("__", "."): value for key, value in changed.items()}
        assert dispatch(["train", *(f"{key}={value}" for key, value in given.items())]) == 0
        summary = rundir.read_summary(tmp_path / name)
        assert summary is not None
        return int(str(summary["reference/measured"]))

    assert measured("first") == 4 * 12
    assert measured("loss", algo__alpha=0.3, algo__beta=0.2) == 0
    assert measured("pace", train__lr=1e-4, train__prompts=3, train__steps=2, run__seed=4) == 0
    assert measured("fewer", data__responses=2) == 0
    assert measured("adapter", adapter="lora") == 0
    assert measured("another", algo="dpo", data__pairs="best_worst") == 0
    assert measured("dtype", engine__precision="bf16") == 4 * 12
    assert measured("rows", model__rows="padded") == 4 * 12
    assert measured("weights", model__path=write_model(tmp_path / "other", seed=1)) == 4 * 12
    longer = tmp_path / "longer.jsonl"
    longer.write_text(rows.read_text().replace(' ="', ' +"', 1))
    assert measured("prompt", data__path=longer) == 4
    longer.write_text(rows.read_text().replace('"rewards"', '"scores"').replace('"scores"', '"rewards"'))
    assert measured("same", data__path=longer) == 0


def test_mismatched_pairs_are_of_another_prompt_and_the_estimate_is_the_mean_log_ratio(
    model: Path, tmp_path: Path
) -> None:
    groups = some_groups(4)
    engine = load(model)
    cached = Cached(tmp_path)
    pairs = mismatched(groups)
    for pair, own, following in zip(pairs, groups, [*groups[1:], groups[0]], strict=True):
        assert np.array_equal(pair.prompt, own.prompt)
        assert np.array_equal(pair.responses[0], following.responses[0])
    cached.fill(engine, pairs, budget=100, say=silent)
    column = MismatchKL(engine, cached, budget=20)
    column.begin(groups)
    # at the start the log-ratios are rounding
    assert_close(column(torch.zeros(4, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    train_a_little(engine, pairs)
    column.begin(groups)
    expected = torch.stack([engine.measure(flatten([pair]))["policy"] - cached.of([pair]) for pair in pairs]).mean()
    assert expected > 0.1
    assert_close(column(torch.zeros(4, 3)), expected.detach().expand(4), rtol=0, atol=1e-5)
