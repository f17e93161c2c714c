"""Real preference data through `data=file`: the loss goes down and every row is accounted for.

The files lie in `../shared/data` beside a checkout and are not part of the project.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import together
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from align_cli import config, rundir
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
    from align_cli.data.options import Data
    from align_cli.data.store import prepare
    from align_cli.models.causal import Model, load_tokenizer

    tree = config.compose("train", ["data=file", f"data.path={FOLDER / file}", "data.bad_rows=1"])
    section = Model(name="hf", path=str(model), revision=None, rows="auto", head="auto", architecture=None)
    options = config.build(Data, tree["data"])
    train, held_out = prepare(
        options,
        load_tokenizer(section),
        seed=0,
        cache=tmp_path,
        say=lambda text: None,
        pairwise=False,
        strict=False,
        sampled=None,
    )
    with open(FOLDER / file, encoding="utf-8") as stream:
        rows = sum(1 for _ in stream)
    assert train.report["rows"] == rows
    assert len(train) + len(held_out) + sum(int(train.report[reason]) for reason in LOST) == rows
    assert train.report["malformed"] == (1 if file == HH else 0)
    assert set(train.responses.tolist()) == ({2} if file == HH else {4})


# --- a policy from preferences: SFT, a reward model, PPO with contrastive rewards

README = Path(__file__).resolve().parents[1] / "README.md"
STAGES = ("sft", "rater", "ppo")
RESPONSES = 8  # of each prompt: sampled in a step, and of the starting model
SMALL = {
    "": ["data.max_length=256", "data.held_out=8", "track=none", "launch.accelerator=cpu", "train.lr=1e-3"],
    "sft": ["train.steps=3", "train.prompts=16", "eval.groups=4"],
    "rater": ["train.steps=3", "train.prompts=16"],
    "ppo": [
        "train.steps=2",
        "train.prompts=16",
        f"source.samples={RESPONSES}",
        f"reward.responses={RESPONSES}",
        "source.max_new_tokens=6",
        "eval.groups=4",
    ],
}
DATA = {  # dataset -> what README says to write for `data=hh data.path=ROWS`, and how much of it is read
    "hh": ["data=hh", f"data.path={FOLDER / HH}", "data.limit=48"],
    "gsm8k": ["data=file", "data.pairs=all", f"data.path={FOLDER / GSM}", "data.limit=64"],
}


def documented(stage: str) -> list[str]:
    """README's command of a stage, without `align train`."""
    text = README.read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = re.findall(rf"^    align train (.* data=hh data\.path=ROWS run\.dir={stage})$", text, re.MULTILINE)
    return line.split()


def command(stage: str, dataset: str, model: Path) -> list[str]:
    """The same on a dataset that is here, and small."""
    given = ["model.path=" + str(model) if word == "model.path=FOLDER" else word for word in documented(stage)]
    assert {"data=hh", "data.path=ROWS"} < set(given)
    given = [word for word in given if word not in ("data=hh", "data.path=ROWS")]
    return [*given, *DATA[dataset], *SMALL[""], *SMALL[stage]]


def lines_of(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def spread(cache: Path) -> float:
    """The deviation of a score among the starting model's responses to one prompt."""
    (kept,) = (cache / "baselines").glob("*.npz")
    with np.load(kept) as told:
        return float(told["ratings"].var(axis=1, ddof=1).mean() ** 0.5)


def assert_a_policy_was_made(folder: Path, cache: Path) -> None:
    """What holds of the three runs whatever the data says."""
    told = {stage: lines_of(folder / stage) for stage in STAGES}
    for stage in STAGES:
        summary = rundir.read_summary(folder / stage)
        assert summary is not None
        figures = [*summary.values(), *(value for line in told[stage] for value in line.values())]
        assert all(math.isfinite(value) for value in figures if isinstance(value, int | float)), stage
        AutoTokenizer.from_pretrained(folder / stage / "model")
    assert told["sft"][-1]["loss"] < told["sft"][0]["loss"] - 0.01

    # scores are 0 at first, and equal scores agree by half
    assert told["rater"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    judged = rundir.read_summary(folder / "rater")
    assert judged is not None and judged["eval/before/rewards/accuracies"] == 0.5
    assert 0 <= float(str(judged["eval/after/rewards/accuracies"])) <= 1

    first = told["ppo"][0]
    assert first["val/ratio"] == pytest.approx(1, abs=1e-4)
    # Two means of 8 responses to each of 16 prompts: their difference has this deviation within a prompt.
    error = spread(cache) * (2 / RESPONSES / 16) ** 0.5
    assert error > 0 and abs(first["contrastive/score_mean"]) < 4 * error
    assert first["contrastive/score_mean"] == pytest.approx(
        first["contrastive/raw_score_mean"] - first["contrastive/baseline_mean"], abs=1e-6
    )

    for stage, kind in (("sft", AutoModelForCausalLM), ("ppo", AutoModelForCausalLM)):
        loaded: Any = kind.from_pretrained(folder / stage / "model", output_loading_info=True)
        assert not loaded[1]["missing_keys"] and not loaded[1]["unexpected_keys"]
    rater: Any = AutoModelForSequenceClassification.from_pretrained(
        folder / "rater" / "model", output_loading_info=True
    )
    assert rater[0].config.num_labels == 1 and not rater[1]["missing_keys"] and not rater[1]["unexpected_keys"]


@pytest.mark.parametrize("dataset", DATA)
def test_the_documented_commands_make_a_policy_of_preferences(
    dataset: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for stage in STAGES:
        assert dispatch(["train", *command(stage, dataset, model)]) == 0
    assert_a_policy_was_made(tmp_path, tmp_path / "cache")
    said = " ".join(capsys.readouterr().out.split())
    assert "held-out preferences that it agrees with: 50.0% -> " in said and "held-out mean rating: " in said


def test_two_ranks_of_zero3_make_a_policy_of_preferences(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    for stage in STAGES:
        (tmp_path / stage).mkdir()
        placed = re.compile(r"(?<=[rlh]=)(?=(?:sft|rater|ppo)(?:/model)?$)")  # of run.dir, model.path, scorer.path
        given = [placed.sub(f"{tmp_path}/", word) for word in command(stage, "hh", model)]
        rundir.write_config(tmp_path / stage, config.compose("train", [*given, "engine=zero3", "launch.devices=2"]))
    together(tmp_path, [tmp_path / stage for stage in STAGES])
    assert_a_policy_was_made(tmp_path, tmp_path / "cache")
