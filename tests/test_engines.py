"""Two ranks under every ZeRO stage compute what one plain process computes, and end together however they end."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forks import Forks
from ranks import together
from small_runs import align, build_model, largest_difference, losses, overrides, read, summary, weights
from transformers import AutoConfig, AutoModelForCausalLM

from align_cli import config, exits, launch, run, rundir
from align_cli.checkpoints import committed
from align_cli.data import toy
from align_cli.data.batches import members, split
from align_cli.tracking import read_metrics

SAMPLED = ("source.samples=2", "source.max_new_tokens=6")
MATCHED = ("scorer=matches", "scorer.pattern='[0-4]'")
ERRING = ("scorer=noisy_addition", "scorer.bias=0.5", "scorer.noise=0.1", "target.floor=0.01")
METHODS = {
    "nca": [],
    "lora": ["adapter=lora"],
    "unclipped": ["optimizer.max_grad_norm=null"],
    "kto": ["algo=kto"],
    "sft": ["algo=sft"],
    "repeated": ["algo=dpo"],  # on pairs that share prompts and responses
    "wide": ["engine.logits_mb=1"],  # a tied head whose logits go in chunks
    "scores": ["algo=bradley_terry", "data.pairs=all"],  # a reward model
    "scores_lora": ["algo=bradley_terry", "data.pairs=all", "adapter=lora"],
    "rated": ["algo=ppo", *SAMPLED, "scorer=model"],  # with a critic, by "scores"
    "together": ["algo=rloo", *SAMPLED, "scorer=ensemble"],  # by "scores", twice
    "again": [  # what looks at whole steps and has a state, and several updates from the samples of one
        *("algo=reinforce_pp", *SAMPLED, *MATCHED, "source.epochs=2", "source.minibatches=2"),
        *("kl=adaptive", "reward=contrastive", "reward.scaling=dynamic"),
    ],
    "greedy": ["algo=remax", *SAMPLED, *MATCHED],
    "target": ["algo=fdpg", "divergence=js", "target.floor=0.01", *SAMPLED, *MATCHED],
    "proposal": [  # the policy's weights make room for an older policy's, and come back
        *("algo=fdpg", "divergence=js", "target.floor=0.01", *SAMPLED, *MATCHED),
        *("proposal=adaptive", "proposal.every=3"),
    ],
    # prompts whose ratings lie outside what the target takes, on one rank or on both
    "unrated": ["algo=fdpg", "divergence=js", *SAMPLED, *ERRING, "source.bad_ratings=0.9", "eval.groups=6"],
}
ONLINE = ("rated", "together", "again", "greedy", "target", "proposal", "unrated")
WIDE = 8192  # tokens of its vocabulary; a megabyte of float32 holds the logits of 30 states
STAGES = ("zero0", "zero1", "zero2", "zero3")
STEPS = 6
# With ε = lr an update of AdamW moves a weight by about as much as its gradient differs, and not by lr times a sign
# that rounding decides. Gradients are below 1 after clipping, so that these steps of fp32 rounding (6e-8 each, in sums
# of some ten terms) leave the weights of two engines within 1e-6.
SETTINGS = ("algo.beta=0.1", "optimizer.eps=1e-3", f"train.steps={STEPS}", "eval.groups=2", "launch.devices=2")
LOSS, WEIGHT = 1e-5, 1e-6
NORMS = {
    "wide": 1e-3,  # a sum of 260,000 squares in fp32, in another order on each engine
    "unrated": 1e-4,  # of few samples, whose gradients nearly cancel
}

# name of a run of two ranks -> the method, and the engine that it is run on
RUNS = {
    **{f"{stage}-{method}": (method, [f"engine={stage}"]) for stage in STAGES for method in ("nca", "lora")},
    # several micro-batches, and one more on one rank than on the other
    **{f"{stage}-cut": ("nca", [f"engine={stage}", "engine.micro_tokens=60"]) for stage in STAGES},
    **{f"zero3-{method}": (method, ["engine=zero3"]) for method in ("unclipped", "kto", "sft")},
    **{f"{stage}-repeated": ("repeated", [f"engine={stage}"]) for stage in ("zero1", "zero3")},
    "zero3-repeated-cut": ("repeated", ["engine=zero3", "engine.micro_tokens=60"]),
    **{f"{stage}-wide": ("wide", [f"engine={stage}"]) for stage in ("zero1", "zero3")},
    "zero3-wide-cut": ("wide", ["engine=zero3", "engine.micro_tokens=200"]),
    **{f"zero3-{method}": (method, ["engine=zero3"]) for method in ("scores", "scores_lora", "rated")},
    "zero3-scores-cut": ("scores", ["engine=zero3", "engine.micro_tokens=60"]),
    **{f"zero1-{method}": (method, ["engine=zero1"]) for method in ONLINE},
    "zero3-again": ("again", ["engine=zero3"]),
    "zero3-target": ("target", ["engine=zero3"]),
    "zero3-proposal": ("proposal", ["engine=zero3"]),
    "zero3-together": ("together", ["engine=zero3"]),
    "zero3-unrated": ("unrated", ["engine=zero3"]),
    "zero2-unclipped": ("unclipped", ["engine=zero2"]),
    "zero3-frozen": ("nca", ["engine=zero3", "reference=frozen"]),
    "zero1-frozen": ("nca", ["engine=zero1", "reference=frozen"]),
    "zero3-adapter": ("lora", ["engine=zero3", "reference=adapter"]),
    "zero3-recomputed": ("nca", ["engine=zero3", "engine.gradient_checkpointing=true"]),
}
ROUNDED = {f"{stage}-bf16": ("nca", [f"engine={stage}", "engine.precision=bf16"]) for stage in ("zero1", "zero3")}
# Rounding decides what counts as "down" or "accurate" before anything has moved: shares are not compared.
EVALUATED = r"eval/.*/(loss|rollout/score|logps|displacement/chosen|displacement/rejected|rewards/margins)"


def given(model: Path, rows: Path, run_dir: Path, method: str, *more: str) -> list[str]:
    """The command line of one of `METHODS`."""
    without = ("sft", "scores", "scores_lora", *ONLINE)  # a β
    settings = [s for s in SETTINGS if not (method in without and s.startswith("algo."))]
    return overrides(model, rows, run_dir, *settings, *METHODS[method], *more)


@pytest.fixture(scope="module")
def repeating_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, in any order: of each prompt each of two good responses against each of two bad ones, one pair twice."""
    rng = random.Random(0)
    lines: list[str] = []
    for _, prompt in zip(range(9), toy.problems(0, 2), strict=False):
        texts: list[str] = []
        while len(texts) < 4:
            text = toy.demonstrate(prompt, toy.behaviour(rng), rng)
            if text not in texts:
                texts.append(text)
        pairs = [(good, bad) for good in texts[:2] for bad in texts[2:]]
        lines += [json.dumps({"prompt": prompt, "chosen": good, "rejected": bad}) for good, bad in [*pairs, pairs[0]]]
    rng.shuffle(lines)
    path = tmp_path_factory.mktemp("rows") / "repeating.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a large vocabulary, most of which no token has, and one matrix for both of its ends."""
    folder = build_model(tmp_path_factory.mktemp("models") / "wide", seed=0)
    architecture = AutoConfig.from_pretrained(folder)
    architecture.vocab_size, architecture.tie_word_embeddings = WIDE, True
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(architecture).save_pretrained(folder)
    return folder


def test_two_ranks_compute_what_one_process_computes(
    tiny_model: Path, wide_model: Path, ragged_file: Path, repeating_file: Path, tmp_path: Path
) -> None:
    read_from = {"repeated": (tiny_model, repeating_file), "wide": (wide_model, ragged_file)}
    ordinary = (tiny_model, ragged_file)
    scores = tmp_path / "one" / "scores" / "model"
    rater = {"rated": [f"scorer.path={scores}"], "together": [f"scorer.paths=[{scores},{scores}]"]}
    for method in METHODS:
        more = ("launch.devices=1", *rater.get(method, []))
        one = given(*read_from.get(method, ordinary), tmp_path / "one" / method, method, *more)
        assert align("train", *one) == 0
    for name, (method, engine) in {**RUNS, **ROUNDED}.items():
        (tmp_path / name).mkdir()
        model, rows = read_from.get(method, ordinary)
        two = given(model, rows, tmp_path / name, method, *engine, *rater.get(method, []), "launch.devices=2")
        rundir.write_config(tmp_path / name, config.compose("train", two))
    together(tmp_path, [tmp_path / name for name in {**RUNS, **ROUNDED}])

    wrong: dict[str, str] = {}
    for name, (method, _) in RUNS.items():
        one, two = tmp_path / "one" / method, tmp_path / name
        loss = max(abs(a - b) for a, b in zip(losses(one), losses(two), strict=True))
        weight = largest_difference(weights(one), weights(two))
        norms = [[row["grad_norm"] for row in read_metrics(run_dir)] for run_dir in (one, two)]
        norm = max(abs(a - b) / a for a, b in zip(*norms, strict=True))
        # an evaluation sums over responses of up to 30 tokens, which the ranks share
        figures = [summary(run_dir) for run_dir in (one, two)]
        evaluated = max(abs(figures[0][key] - figures[1][key]) for key in figures[0] if re.match(EVALUATED, key))
        if loss > LOSS or weight > WEIGHT or norm > NORMS.get(method, 1e-5) or evaluated > 1e-4:
            wrong[name] = f"loss {loss:.0e}, weight {weight:.0e}, norm {norm:.0e}, evaluated {evaluated:.0e}"
    assert not wrong
    for name in ROUNDED:
        # NCA starts at 2 log 2 whatever the weights are; bf16 has 8 bits
        assert losses(tmp_path / name)[0] == pytest.approx(2 * math.log(2), abs=1e-3)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one" / "nca"), abs=0.02)
    said = (tmp_path / "0.log").read_text() + (tmp_path / "1.log").read_text()
    assert "DeepSpeed" not in said and "WARNING" not in said
    assert "measured another way" not in said.replace("\n", " ")  # the head scores by itself under every stage


def test_ranks_with_different_numbers_of_chunks_are_among_them(
    wide_model: Path, ragged_file: Path, tmp_path: Path
) -> None:
    """What the runs above on the wide model do, by the lengths of their responses."""
    experiment = read(given(wide_model, ragged_file, tmp_path, "wide", "engine=zero3"))
    store = run.prepare(experiment, lambda text: None).train
    states = experiment.engine.logits_mb * 1_000_000 // (WIDE * 4)
    chunks: list[list[int]] = []
    for step in range(1, STEPS + 1):
        groups = members(store, step, prompts=experiment.train.prompts, seed=0, together=True).tolist()
        shares = split(groups, store, ranks=2, budget=experiment.engine.micro_tokens)
        tokens = [sum(int(store.response_tokens[list(part.groups)].sum()) for part in share) for share in shares]
        chunks.append([math.ceil(each / states) for each in tokens])
    assert min(min(each) for each in chunks) > 1
    assert any(one != other for one, other in chunks)


@pytest.mark.parametrize("budget", [1, 40, 90])
@pytest.mark.parametrize("repeated", [True, False])
def test_any_budget_gives_the_same_weights(
    budget: int, repeated: bool, tiny_model: Path, ragged_file: Path, repeating_file: Path, tmp_path: Path
) -> None:
    method = "repeated" if repeated else "nca"
    rows = repeating_file if repeated else ragged_file
    for name, tokens in (("whole", 8192), ("cut", budget)):
        more = (f"engine.micro_tokens={tokens}", "train.steps=5", "launch.devices=1", "train.prompts=7")
        assert align("train", *given(tiny_model, rows, tmp_path / name, method, *more)) == 0
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "cut")) < WEIGHT
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), abs=LOSS)


# --- the processes of a run


def ranks_of(parent: int) -> list[int]:
    return [int(number) for number in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def is_running(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends ranks with their parent on Linux only")
def test_two_ranks_go_on_after_a_kill_and_after_a_signal_as_if_nothing_had_been(
    forks: Forks, tiny_model: Path, ragged_file: Path, tmp_path: Path
) -> None:
    settings = ("engine=zero3", "train.steps=20", "checkpoint.every=2")
    calm = given(tiny_model, ragged_file, tmp_path / "calm", "nca", *settings)
    done = subprocess.run([sys.executable, "-m", "align_cli.cli", "train", *calm], capture_output=True, text=True)
    assert done.returncode == exits.DONE, done.stderr
    assert done.stdout.splitlines()[-1] == (
        f"model in {tmp_path / 'calm' / 'model'}; next: align show {tmp_path / 'calm'}"
    )
    assert "2 rank(s) on cpu" in done.stderr and "DeepSpeed" not in done.stdout + done.stderr

    run_dir = tmp_path / "stormy"
    command = ["train", *given(tiny_model, ragged_file, run_dir, "nca", *settings)]
    child = forks.start(*command)
    forks.wait_until(lambda: committed(run_dir / "checkpoints"))
    ranks = ranks_of(child)
    os.kill(child, signal.SIGKILL)
    assert forks.ended(child) == -signal.SIGKILL and len(ranks) == 2
    # the kernel ends them with their parent, and with the last of them nobody holds the directory
    forks.wait_until(lambda: rundir.holder(run_dir) is None and not any(is_running(rank) for rank in ranks))

    reached = committed(run_dir / "checkpoints")[0].step
    child = forks.start(*command)
    forks.wait_until(lambda: committed(run_dir / "checkpoints")[0].step > reached)
    os.kill(child, signal.SIGTERM)
    assert forks.ended(child) == exits.STOPPED
    # what was done is saved, wherever between two checkpoints the signal came
    assert committed(run_dir / "checkpoints")[0].step == read_metrics(run_dir)[-1]["step"] < 20
    assert not (run_dir / "summary.json").exists()

    assert forks.run(*command) == exits.DONE
    assert losses(run_dir) == losses(tmp_path / "calm") and len(losses(run_dir)) == 20
    assert largest_difference(weights(run_dir), weights(tmp_path / "calm")) == 0.0


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """`launch.spawn` of two ranks that are a shell script: $RANK says which, and what they do is the test's."""

    def spawn(script: str) -> int:
        file = tmp_path / "rank.sh"
        file.write_text(f"#!/bin/bash\n{script}\n")
        file.chmod(0o755)
        monkeypatch.setattr(launch.sys, "executable", str(file))
        monkeypatch.setattr(launch, "GRACE", 1.0)
        monkeypatch.chdir(tmp_path)
        with rundir.lock(tmp_path / "run") as held:
            return launch.spawn(tmp_path / "run", 2, held)

    return spawn


def test_a_failing_rank_takes_the_run_down_with_its_code_and_its_words(
    scripted: Callable[[str], int], capfd: pytest.CaptureFixture[str]
) -> None:
    begun = time.monotonic()
    assert scripted('if [ $RANK = 1 ]; then echo "error: a reason" >&2; exit 2; fi; exec sleep 60') == 2
    assert time.monotonic() - begun < 30
    assert capfd.readouterr().err.splitlines() == [
        "error: rank 1 ended with exit code 2; the other ranks were stopped",
        "  rank 1: error: a reason",
    ]


def test_the_rank_that_was_killed_is_named_and_not_the_one_that_missed_it(
    scripted: Callable[[str], int], capfd: pytest.CaptureFixture[str]
) -> None:
    killed = "if [ $RANK = 1 ]; then echo $$ > killed; kill -9 $$; fi; until [ -s killed ]; do sleep 0.01; done; "
    gone = '[ ! -e /proc/$(cat killed) ] || grep -q "State:.Z" /proc/$(cat killed)/status'
    assert scripted(f"{killed}until {gone}; do sleep 0.01; done; echo lost a peer >&2; exit 1") == exits.FAILED
    assert "rank 1 ended by signal 9 (SIGKILL); the other ranks were stopped" in capfd.readouterr().err


def test_a_configuration_means_the_same_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    tree = {
        "model": {"path": "here"},
        "data": {"path": "world"},
        "reference": {"path": None},
        "scorer": {"paths": ["here", "of/the_hub"]},
        "algo": {"path": "here"},  # a hyper-parameter of that name
    }
    whole = str(tmp_path / "here")
    moved = tree | {"model": {"path": whole}, "scorer": {"paths": [whole, "of/the_hub"]}}
    assert launch.located(tree) == launch.located(moved) == moved


@pytest.mark.parametrize(
    "codes, first",
    [([1, -9], 1), ([2, 1], 0), ([1, 2], 1), ([1, 1], 0), ([None, 1], 1), ([75, 1], 1), ([75, 0], None)],
)
def test_of_ranks_that_failed_together_the_one_with_the_reason_is_named(codes: list[int], first: int | None) -> None:
    processes: Any = [SimpleNamespace(poll=lambda code=code: code) for code in codes]
    assert launch._first_failure(processes) == first


def test_a_rank_that_will_not_end_is_killed(scripted: Callable[[str], int]) -> None:
    begun = time.monotonic()
    stuck = 'trap "" TERM; echo $$ > stuck; while true; do sleep 0.1; done'
    assert scripted(f"if [ $RANK = 0 ]; then until [ -s stuck ]; do sleep 0.01; done; exit 3; fi; {stuck}") == 3
    assert time.monotonic() - begun > 1.0  # it was given its time to end
    assert not is_running(int(Path("stuck").read_text()))


@pytest.mark.parametrize(
    "script",
    [
        "trap 'exit 75' TERM; [ $RANK = 0 ] && { sleep 0.5; kill -TERM $PPID; }; while true; do sleep 0.05; done",
        # not ready to save: the signal ends it at once, and its peer fails because it left
        "if [ $RANK = 0 ]; then sleep 0.5; kill -TERM $PPID; exec sleep 60; fi; trap 'exit 1' TERM; "
        "while true; do sleep 0.05; done",
    ],
    ids=["saving", "starting"],
)
def test_a_signal_to_the_parent_reaches_the_ranks(script: str, scripted: Callable[[str], int]) -> None:
    assert scripted(script) == exits.STOPPED


def test_a_second_interrupt_kills_ranks_that_are_stuck(scripted: Callable[[str], int]) -> None:
    stuck = 'trap "" TERM; [ $RANK = 0 ] && { sleep 0.5; kill -INT $PPID; sleep 0.3; kill -INT $PPID; }; '
    assert scripted(stuck + "while true; do sleep 0.05; done") == exits.STOPPED


def test_the_ranks_hold_the_directory_as_long_as_one_of_them_lives(scripted: Callable[[str], int]) -> None:
    # descriptor 3 and above are closed on exec unless they are handed over
    assert scripted("ls -l /proc/$$/fd | grep -q /run/.lock || exit 9") == exits.DONE
