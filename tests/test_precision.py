"""The choice between bfloat16 and fp32 on a CPU: what is measured decides, once."""

from pathlib import Path

import pytest
import torch

from align_cli import precision
from align_cli.precision import Arithmetic, choose, judge


def test_the_fastest_is_chosen_and_bfloat16_must_be_worth_it() -> None:
    told = {(c.precision, c.products) for c in [judge({"highest": 8.0, "medium": 4.0, "bf16": 2.0})]}
    assert told == {("bf16", "medium")}
    slow = judge({"highest": 8.0, "medium": 4.0, "bf16": 4.0})
    assert (slow.precision, slow.products) == ("fp32", "medium")
    emulated = judge({"highest": 8.0, "bf16": 80.0})  # AMX: oneDNN's fp32 is not asked
    assert (emulated.precision, emulated.products) == ("fp32", "highest")
    near = judge({"highest": 8.0, "medium": 7.0, "bf16": 7.0})
    assert (near.precision, near.products) == ("fp32", "highest")


def test_a_small_model_is_trained_in_fp32_without_a_trial(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(precision, "_seconds", lambda *_: pytest.fail("tried"))
    assert choose(precision.SMALL - 1, 10**6, tmp_path).precision == "fp32"


def test_a_machine_is_tried_once_and_what_cannot_be_kept_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trials: list[tuple[int, int]] = []

    def trial(hidden: int, intermediate: int) -> dict[str, float]:
        trials.append((hidden, intermediate))
        return {"highest": 3.0, "bf16": 1.0}

    monkeypatch.setattr(precision, "_seconds", trial)
    first = choose(512, 2048, tmp_path)
    assert first == Arithmetic("bf16", "highest", "multiplies 3.0 times as fast as fp32 here")
    assert choose(512, 2048, tmp_path) == first
    assert trials == [(512, 2048)]
    next((tmp_path / "precision").iterdir()).write_text("{damaged")
    assert choose(512, 2048, tmp_path) == first
    choose(512, 4096, tmp_path)
    assert trials == [(512, 2048)] * 2 + [(512, 4096)]
    choose(512, 2048, tmp_path / "precision" / next((tmp_path / "precision").iterdir()).name)  # no folder
    assert len(trials) == 4


def test_a_real_trial_leaves_torch_as_it_was() -> None:
    before = torch.get_float32_matmul_precision()
    found = precision._seconds(64, 128)
    assert found.keys() >= {"highest", "bf16"} and all(0 < seconds < 10 for seconds in found.values())
    assert torch.get_float32_matmul_precision() == before
