"""The column `reference`: three ways that agree, and a cache that never measures twice nor answers for another."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import SETTINGS, read
from torch.testing import assert_close

from align_cli import distributed, launch, run, rundir
from align_cli.data.batches import flatten
from align_cli.data.store import Group
from align_cli.engine import Optimizer, TorchEngine
from align_cli.errors import UserError
from align_cli.models import tiny
from align_cli.models.adapters import Adapter, attach
from align_cli.models.causal import Manner, Model, commit_of, load_model
from align_cli.references import (
    AdapterOff,
    Cached,
    Frozen,
    MismatchKL,
    content,
    digest_of,
    mismatched,
    numerics,
    weights_digest,
)

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
    section = Model(name="hf", path=str(folder), revision=None, rows="auto", head="auto", architecture=None)
    network = attach(load_model(section, dtype=torch.float32, bits=None), adapter, seed=0)
    return TorchEngine(network.train(), CPU, manner=Manner(flat=True), optimizer=OPTIMIZER)


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
    frozen = Frozen(load(model).network, Manner(flat=True))
    # sums of at most 12 terms of 3 nats in fp32, in other orders where batches differ
    for reference in (cached, frozen, AdapterOff(engine)):
        assert_close(reference(batch), before, rtol=0, atol=1e-5)
        assert not reference(batch).requires_grad
    assert (engine.measure(batch)["policy"] - before).abs().mean() > 0.1  # the adapters are on again


def test_padded_rows_give_the_same_reference(model: Path) -> None:
    batch = flatten(some_groups())
    network = load(model).network
    assert_close(
        Frozen(network, Manner(flat=True))(batch), Frozen(network, Manner(flat=False))(batch), rtol=0, atol=1e-5
    )


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
    named = Model(name="hf", path=str(model), revision=None, rows="auto", head="auto", architecture=None)
    assert digest_of(named) == digest
    assert weights_digest("some/hub-id", "a" * 40) != weights_digest("some/hub-id", "b" * 40)
    homes = {
        Cached.home(
            tmp_path, each, numerics(dtype=dtype, bits=bits, manner=Manner(flat=flat), device=torch.device(device))
        )
        for each in (digest, other)
        for dtype in (torch.float32, torch.bfloat16)
        for bits in (None, 4)
        for flat in (True, False)
        for device in ("cpu", "cuda")
    }
    assert len(homes) == 2**5


def test_fewer_bits_in_matrix_products_are_other_numerics(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(dtype: torch.dtype, precision: str) -> str:
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
        return numerics(dtype=dtype, bits=None, manner=Manner(flat=True), device=CPU)

    assert len({told(torch.float32, precision) for precision in ("highest", "high", "medium")}) == 3
    assert len({told(torch.bfloat16, precision) for precision in ("highest", "high", "medium")}) == 1


def test_rows_of_one_prompt_are_no_mismatch() -> None:
    first, second, third, fourth = some_groups(4)
    again = replace(second, prompt=first.prompt)
    pairs = mismatched([first, again, third, fourth], 1000)
    expected = [(first, third), (again, third), (third, fourth), (fourth, first)]
    assert len(pairs) == 4
    for place, (pair, (own, other)) in enumerate(zip(pairs, expected, strict=True)):
        assert np.array_equal(pair.prompt, own.prompt)
        assert np.array_equal(pair.responses[0], other.responses[place % 3])
    assert mismatched([first, again], 1000) == []


def test_a_mismatched_pair_is_no_longer_than_a_row_may_be() -> None:
    first, second = some_groups(2)
    most = len(first.prompt) + 2
    (pair, _) = mismatched([first, second], most)
    assert pair.responses[0].tolist() == second.responses[0][:2].tolist()


def test_a_model_of_the_hub_is_its_commit(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    home = tmp_path / "models--some--one"
    commits = {"main": "a" * 40, "step1000": "b" * 40}
    (home / "refs").mkdir(parents=True)
    for revision, commit in commits.items():
        shutil.copytree(model, home / "snapshots" / commit)
        (home / "refs" / revision).write_text(commit)

    def named(revision: str | None) -> Model:
        return Model(name="hf", path="some/one", revision=revision, rows="auto", head="auto", architecture=None)

    for revision, commit in {None: "a" * 40, **commits, "b" * 40: "b" * 40}.items():
        assert digest_of(named(revision)) == weights_digest("some/one", commit)
        assert commit_of(named(revision)) == commit
    assert digest_of(named(None)) != digest_of(named("step1000"))
    (home / "refs" / "main").write_text("b" * 40)
    assert digest_of(named(None)) == digest_of(named("step1000"))
    assert load_model(named("step1000"), dtype=torch.float32, bits=None).config.vocab_size > 0


def test_a_run_keeps_the_commit_that_it_began_with(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    home, run_dir = tmp_path / "models--some--one", tmp_path / "run"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(model, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("a" * 40)
    given = (*SETTINGS, "model.path=some/one", "data.path=rows.jsonl", f"run.dir={run_dir}", "engine=torch")
    begun = launch.pinned(read(given))
    assert begun.model.revision == begun.tree["model"]["revision"] == "a" * 40
    run_dir.mkdir()
    rundir.write_config(run_dir, begun.tree)
    (home / "refs" / "main").write_text("b" * 40)
    assert launch.pinned(read(given)).model.revision == "a" * 40
    assert not launch.is_finished(read(given), run_dir)
    rundir.write_config(run_dir, {**begun.tree, "model": {**begun.tree["model"], "path": "another/one"}})
    assert launch.pinned(read(given)).model.revision == "b" * 40


def test_ranks_that_read_other_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = read((*SETTINGS, "model.path=.", "data.path=rows.jsonl", "run.dir=run", "engine=torch"))
    prepared: Any = SimpleNamespace(
        experiment=experiment, train=SimpleNamespace(digest="one"), held_out=SimpleNamespace(digest="two")
    )
    engine: Any = SimpleNamespace(device=CPU)
    for key in ("train", "device"):
        monkeypatch.setattr(distributed, "gather", lambda mine, key=key: [mine, mine, {**mine, key: "other"}])
        with pytest.raises(UserError, match=r"data\.path=rows\.jsonl: rank 2 found other rows"):
            run._inputs(prepared, engine)


def test_mismatched_pairs_are_of_another_prompt_and_the_estimate_is_the_mean_log_ratio(
    model: Path, tmp_path: Path
) -> None:
    groups = some_groups(4)
    engine = load(model)
    cached = Cached(tmp_path)
    pairs = mismatched(groups, 1000)
    for place, (pair, own, following) in enumerate(zip(pairs, groups, [*groups[1:], groups[0]], strict=True)):
        assert np.array_equal(pair.prompt, own.prompt)
        assert np.array_equal(pair.responses[0], following.responses[place % 3])
    cached.fill(engine, pairs, budget=100, say=silent)
    column = MismatchKL(engine, cached, budget=20, most=1000)
    column.begin(groups)
    # at the start the log-ratios are rounding
    assert_close(column(torch.zeros(4, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    train_a_little(engine, pairs)
    column.begin(groups)
    expected = torch.stack([engine.measure(flatten([pair]))["policy"] - cached.of([pair]) for pair in pairs]).mean()
    assert expected > 0.1
    assert_close(column(torch.zeros(4, 3)), expected.detach().expand(4), rtol=0, atol=1e-5)


def test_adapters_are_drawn_without_a_look_at_the_gpus(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = load(model, LORA)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # torch would warn of them, and ask each for its state
    other = load(model, LORA)
    for weight, same in zip(one.network.parameters(), other.network.parameters(), strict=True):
        assert torch.equal(weight, same)
