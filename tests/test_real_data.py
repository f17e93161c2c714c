"""Real preference data through `data=file`: the loss goes down and every row is accounted for.

The files lie in `../shared/data` beside a checkout and are not part of the project.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from align_cli import rundir
from align_cli.cli import dispatch

FOLDER = Path(__file__).resolve().parents[1].parent / "shared" / "data"
ALPACA, GSM, HH = "alpacaeval_gpt4_rewards.jsonl", "gsm8k_model_solutions.jsonl", "hh_harmless_test.jsonl"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the data is not here: no {FOLDER}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights with a byte-level tokenizer learnt on the files."""
    folder = tmp_path_factory.mktemp("model")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [line for name in (ALPACA, GSM, HH) for line in (FOLDER / name).read_text().splitlines()[:60]]
    made.train_from_iterator(texts, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


RUNS = {  # algorithm, file, rows to read, more
    # Ratings are probabilities, and many rows of AlpacaEval have four near 0: too few rows would have nothing to teach.
    "nca-alpaca": ("nca", ALPACA, 48, ["algo.alpha=0.1", "algo.beta=0.1"]),
    "info_nca-alpaca": ("info_nca", ALPACA, 48, ["algo.alpha=0.1", "algo.beta=0.1"]),
    "exo-alpaca": ("exo", ALPACA, 48, ["algo.alpha=0.1", "algo.beta=0.1"]),
    "dpo-gsm8k": ("dpo", GSM, 40, ["data.pairs=best_worst"]),
    "nca-gsm8k": ("nca", GSM, 40, ["algo.alpha=0.1", "algo.beta=0.1"]),
    "dpo-hh": ("dpo", HH, 100, ["data.bad_rows=1"]),
    "nca-hh": ("nca", HH, 100, ["data.bad_rows=1", "algo.alpha=0.1", "algo.beta=0.1"]),
}
LOST = ("malformed", "too_long", "without_preference")


@pytest.mark.parametrize("name", RUNS)
def test_the_loss_goes_down_and_no_row_is_lost(
    name: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    algorithm, file, limit, more = RUNS[name]
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    given = [
        f"algo={algorithm}",
        "model=hf",
        f"model.path={model}",
        "data=file",
        f"data.path={FOLDER / file}",
        f"data.limit={limit}",
        "data.held_out=4",
        "data.max_length=512",
        "train.steps=12",
        "train.prompts=20",
        "train.lr=3e-4",
        "track=none",
        "eval.groups=4",
        f"run.dir={tmp_path / 'run'}",
        *more,
    ]
    assert dispatch(["train", *given]) == 0
    said = capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) >= 4
    assert sum(losses[-3:]) / 3 < losses[0] - 0.01
    summary = rundir.read_summary(tmp_path / "run")
    assert summary is not None
    assert summary["steps"] == 12

    (told,) = (tmp_path / "cache" / "data").glob("*/train/store.json")
    report = json.loads(told.read_text())["report"]
    assert report["rows"] == limit
    assert report["train"] + report["held_out"] + sum(report[reason] for reason in LOST) == limit
    assert report["train"] >= 5 and report["held_out"] == 4
    spoken = re.search(r"(\d+) rows: (\d+) to train on, (\d+) held out(.*)", said)
    assert spoken
    assert [int(number) for number in spoken.groups()[:3]] == [limit, report["train"], report["held_out"]]
    for reason in LOST:
        assert not report[reason] or f"{report[reason]} " in spoken[4]
    if file == HH:
        assert report["malformed"] == 1
        assert f"{HH}:87: " in spoken[4]


def test_a_malformed_row_stops_the_run_unless_it_is_allowed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from align_cli.errors import UserError

    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    given = ["algo=dpo", "model=hf", f"model.path={model}", "data=file", f"data.path={FOLDER / HH}"]
    with pytest.raises(UserError, match=rf"{HH}:87: .*data\.bad_rows=0"):
        dispatch(["train", *given, "track=none", f"run.dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("file", [ALPACA, GSM, HH])
def test_all_rows_of_a_file_are_accounted_for(
    file: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from align_cli import config
    from align_cli.data.options import Data
    from align_cli.data.store import prepare
    from align_cli.models.causal import Model, load_tokenizer

    tree = config.compose("train", ["data=file", f"data.path={FOLDER / file}", "data.bad_rows=1"])
    section = Model(name="hf", path=str(model), revision=None, rows="auto", head="auto", architecture=None)
    options = config.build(Data, tree["data"])
    train, held_out = prepare(
        options, load_tokenizer(section), seed=0, cache=tmp_path, say=lambda text: None, pairwise=False
    )
    with open(FOLDER / file, encoding="utf-8") as stream:
        rows = sum(1 for _ in stream)
    assert train.report["rows"] == rows
    assert len(train) + len(held_out) + sum(int(train.report[reason]) for reason in LOST) == rows
    assert train.report["malformed"] == (1 if file == HH else 0)
    assert set(train.responses.tolist()) == ({2} if file == HH else {4})
