"""`align export`: an ordinary Hugging Face folder that computes what the run's model computes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_cli import rundir
from align_cli.cli import dispatch
from align_cli.commands import export
from align_cli.errors import UserError
from align_cli.models import adapters, tiny
from align_cli.models.adapters import quiet_peft

PROBE = torch.tensor([[4, 9, 12, 5, 5, 14, 7, 3]])


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that training starts from."""
    folder = tmp_path_factory.mktemp("start")
    tiny.build(folder, alphabet="abcdefgh +=", hidden=16, layers=2, heads=2, positions=64, seed=0)
    return folder


def finished_run(folder: Path, start: Path, *more: str) -> Path:
    """A run of two steps, large enough that the weights move."""
    rows = [{"prompt": "ab =", "completions": ["cd", "ef", "g"], "rewards": [1.0, 0.5, 0.0]}] * 4
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps(row | {"prompt": f"{n} a ="}) + "\n" for n, row in enumerate(rows))
    )
    given = ["algo=nca", "algo.beta=0.3", "model=hf", f"model.path={start}", "data=file", "track=none"]
    given += [f"data.path={folder / 'rows.jsonl'}", "data.held_out=1", "train.steps=2", "train.lr=0.03"]
    assert dispatch(["train", *given, f"run.dir={folder / 'run'}", *more]) == 0
    return folder / "run"


@pytest.fixture(scope="module", params=["none", "lora"])
def run(request: pytest.FixtureRequest, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(folder / "cache"))
        return finished_run(folder, start, f"adapter={request.param}", "train.warmup_ratio=0")


def logprobs(network: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return network.eval()(PROBE).logits.log_softmax(-1)


def of_the_run(run: Path, start: Path) -> Tensor:
    """What the run's model computes, put together by hand."""
    if not (run / "model" / "adapter_config.json").is_file():
        return logprobs(AutoModelForCausalLM.from_pretrained(run / "model"))
    with quiet_peft():
        return logprobs(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), str(run / "model")))


def test_the_exported_model_is_the_runs_model_and_not_the_one_it_started_from(
    run: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dest = tmp_path / "new" / "model"
    dest.parent.mkdir()
    assert dispatch(["export", str(run), str(dest)]) == 0
    assert str(dest) in capsys.readouterr().out
    found = logprobs(AutoModelForCausalLM.from_pretrained(dest))
    # Merging adds B A x to W x inside the matrix: one rounding in fp32 of values of order 1.
    assert_close(found, of_the_run(run, start), rtol=0, atol=1e-5)
    assert (found - logprobs(AutoModelForCausalLM.from_pretrained(start))).abs().max() > 1e-2


def test_the_folder_holds_safetensors_a_tokenizer_and_a_card_and_no_code(
    run: Path, start: Path, tmp_path: Path
) -> None:
    assert dispatch(["export", str(run), str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
    assert not {name for name in names if Path(name).suffix in (".bin", ".pt", ".pth", ".pkl", ".py")}
    assert "adapter_config.json" not in names and "adapter_model.safetensors" not in names
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab")["input_ids"] == [1, 4, 5]
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"base_model: {start}" in card and "aligned with nca" in card
    assert "beta=0.3" in card and "learning rate 0.03" in card
    summary = rundir.read_summary(run)
    assert summary is not None
    assert f"| loss/last | {summary['loss/last']:.4g} |" in card


def test_adapters_of_another_format_are_refused(start: Path, tmp_path: Path) -> None:
    run = finished_run(tmp_path, start, "adapter=lora")
    (run / "model" / adapters.WEIGHTS).rename(run / "model" / "adapter_model.bin")
    for command in (["export", str(run), str(tmp_path / "out")], ["evaluate", str(run), "eval=loss"]):
        with pytest.raises(UserError, match=r"/run/model: it has no adapter_model\.safetensors; use adapters in"):
            dispatch(command)


def test_nothing_is_overwritten_and_nothing_is_left_of_what_went_wrong(run: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious").write_text("mine")
    with pytest.raises(UserError, match="there exists; choose a new folder"):
        export.main([str(run), str(tmp_path / "there")])
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["precious"]


def test_a_run_that_has_not_finished_and_a_folder_that_is_none_are_refused(tmp_path: Path) -> None:
    rundir.write_config(tmp_path, {"algo": {"name": "nca"}})
    with pytest.raises(UserError, match="has not finished"):
        export.main([str(tmp_path), str(tmp_path / "out")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is not a run directory"):
        export.main([str(tmp_path / "empty"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_adapters_that_could_run_code_are_refused(run: Path, tmp_path: Path) -> None:
    if not (run / "model" / "adapter_config.json").is_file():
        pytest.skip("the run has no adapters")
    shutil.copytree(run, tmp_path / "run")
    weights = tmp_path / "run" / "model" / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match="use adapters in safetensors"):
        export.main([str(tmp_path / "run"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [0.01, float("nan")])
def test_what_does_not_read_back_the_same_is_said_and_removed(
    error: float, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = export._figures
    calls: list[int] = []

    def off(network: torch.nn.Module, probe: Tensor) -> Tensor:
        calls.append(1)
        return own(network, probe) + (error if len(calls) > 1 else 0.0)

    monkeypatch.setattr(export, "_figures", off)
    with pytest.raises(RuntimeError, match=rf"differs by {error} nats"):
        export.main([str(run), str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []
