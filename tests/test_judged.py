"""Benchmarks before judges: what the model sees, what the judge sees, and the figures against hand calculations."""

import json
import math
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs
import yaml
from scripted_judge import Reply, Request, judge, scripted

from align_cli import config, length_control, paths, results, statistics, verdicts
from align_cli.data import annotations, conversations
from align_cli.data.records import RowError
from align_cli.errors import RunError, UserError
from align_cli.evals import Result, alpaca_eval, calibrate, mt_bench, rewardbench
from align_cli.evals.judge import judge as judge_runner
from align_cli.models import tiny
from align_cli.subject import Generate, Prompt, Subject

pytest.importorskip("openai", reason="the extra 'eval' is not installed")
pytestmark = pytest.mark.usefixtures("no_judge")

REAL = Path(__file__).parents[2] / "shared" / "data"
PAIRS = REAL / "alpacaeval_gpt4_rewards.jsonl"
QUESTIONS = REAL / "mt_bench_question.jsonl"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data in {REAL}")

CHAT = "{% for turn in messages %}<{{ turn['role'] }}>{{ turn['content'] }}\n{% endfor %}<assistant>"
OPTIONS = Generate(batch=8, seed=0, precision="fp32", accelerator="cpu")


class Answering(Subject):
    """A model that answers with what it was asked, shortened, and remembers how it was asked."""

    def __init__(self) -> None:
        super().__init__("answering", "nowhere", options=OPTIONS)
        self.asked: list[tuple[Prompt, float]] = []

    def respond(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        temperature: float,
        max_new_tokens: int,
        stop: Sequence[str] = (),
    ) -> list[list[str]]:
        self.asked += [(prompt, temperature) for prompt in prompts]
        return [
            [f"answer {len(prompt)} to {prompt[-1]['content']}"] for prompt in prompts if not isinstance(prompt, str)
        ]


def options(choice: str, **changes: Any) -> dict[str, Any]:
    """The options of a choice of conf/eval."""
    node = yaml.safe_load((paths.conf() / "eval" / f"{choice}.yaml").read_text())
    del node["name"]
    assert not set(changes) - set(node)
    return {**node, **changes}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def shown_to_judge(request: Request) -> str:
    return request["messages"][1]["content"]


def mean(result: Result, metric: str) -> float:
    values = [item.values[metric] for item in result.items if metric in item.values]
    return sum(values) / len(values)


# --- MT-bench

TALKS = [
    {"question_id": 1, "category": "writing", "turns": ["one", "two"]},
    {"question_id": 2, "category": "math", "turns": ["three", "four"], "reference": ["3!", "4!"]},
    {"question_id": 3, "category": "roleplay", "turns": ["five", "six"], "reference": ["5!", "6!"]},
]


def test_the_second_turn_sees_the_models_own_first_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Answering()
    with scripted(lambda request: "[[5]]") as server:
        taken = options("mt_bench", path=write(tmp_path / "q.jsonl", TALKS), template="chat")
        mt_bench.mt_bench(subject, judge=judge(server.url, monkeypatch), **taken)
    turns = [prompt for prompt, _ in subject.asked]
    assert [{"role": "user", "content": "one"}] in turns
    assert [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "answer 1 to one"},
        {"role": "user", "content": "two"},
    ] in turns
    assert len(turns) == 6
    warmth = {prompt[0]["content"]: temperature for prompt, temperature in subject.asked if not isinstance(prompt, str)}
    assert warmth == {"one": 0.7, "three": 0.0, "five": 0.7}


def test_a_rating_is_of_its_turn_and_right_answers_are_shown_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """writing 2 and 4, math 6 and unread, roleplay 10 and 10: turns 18/3 and 14/2, score ((2+4)/2 + 6 + 10)/3."""
    ratings = {"one": 2, "two": 4, "three": 6, "four": "x", "five": 10, "six": 10}

    def answer(request: Request) -> str:
        told = shown_to_judge(request)
        word = next(word for word in reversed(ratings) if f"to {word}\n" in told)
        last = told.split("the response that is rated begins")[1]
        assert f"to {word}\n" in last, "the last turn is what is rated"
        assert ("reference begins" in told) == (word in ("three", "four"))
        assert ("4!" in told) == (word == "four")
        return f"reasons\n[[{ratings[word]}]]"

    with scripted(answer) as server:
        taken = options("mt_bench", path=write(tmp_path / "q.jsonl", TALKS), template="chat")
        result = mt_bench.mt_bench(Answering(), judge=judge(server.url, monkeypatch), **taken)
    assert mean(result, "turn_1") == 6 and mean(result, "turn_2") == 7
    assert mean(result, "score") == pytest.approx((3 + 6 + 10) / 3)
    assert (mean(result, "writing"), mean(result, "math"), mean(result, "roleplay")) == (3, 6, 10)
    assert result.notes == ["1 of 6 ratings could not be read and are left out."]
    assert result.made["judge"] == f"served-name@{server.url.split('/')[2]}"
    assert result.made["judge_template"] == verdicts.TEMPLATES["rate"]


@pytest.mark.parametrize(
    "row",
    [{"turns": ["a"]}, {"category": "x", "turns": []}, {"category": "x", "turns": ["a", "b"], "reference": ["c"]}],
)
def test_a_malformed_question_is_said(row: dict[str, Any]) -> None:
    with pytest.raises(RowError):
        conversations.mt_bench(row, "0")


# --- AlpacaEval


@real
def test_the_win_rate_of_published_preferences_is_that_of_a_hand_calculation() -> None:
    rows = [json.loads(line) for line in PAIRS.read_text().splitlines()][:100]
    for model in ("alpaca-7b", "OpenHermes-2.5-Mistral-7B"):
        taken = options("alpaca_eval", annotations=str(PAIRS), generator=model, limit=100)
        result = alpaca_eval.alpaca_eval(Answering(), judge=None, **taken)
        rewards = [each["reward"] for row in rows for each in row["completions"] if each["model"] == model]
        assert len(result.items) == len(rewards) == 100
        assert mean(result, "win_rate") == pytest.approx(math.fsum(rewards) / 100, rel=1e-12)
        assert result.notes == ["the file has no outputs of the baseline: nothing is length-controlled."]


def annotated(model: str, count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {
            "instruction": f"instruction {place}",
            "output_1": "b" * rng.randint(1, 500),
            "output_2": "m" * rng.randint(1, 900),
            "generator_1": "base",
            "generator_2": model,
            "preference": 1 + rng.random(),
        }
        for place in range(count)
    ]


def test_annotations_are_length_controlled_as_the_formulas_say(tmp_path: Path) -> None:
    rows = annotated("one", 60, 0)
    unread = {**rows[0], "instruction": "unread", "preference": None}  # in front: those behind keep their places
    path = write(tmp_path / "annotations.jsonl", [unread, *rows])
    table = tmp_path / "instruction_difficulty.csv"
    gamma = np.linspace(-1, 1, 60)
    table.write_text(",instruction_difficulty\n" + "".join(f"{n},{value}\n" for n, value in enumerate([7, *gamma])))
    wins = np.array([row["preference"] - 1 for row in rows])
    feature = length_control.length_feature(
        *(np.array([len(row[f"output_{side}"]) for row in rows], dtype=float) for side in (2, 1))
    )
    for difficulty, used in ((None, None), (str(table), gamma)):
        taken = options("alpaca_eval", annotations=path, difficulty=difficulty)
        result = alpaca_eval.alpaca_eval(Answering(), judge=None, **taken)
        expected = length_control.controlled(wins, feature, used, ridge=0.1)
        names = ("length_controlled_win_rate", "length_controlled_win_rate_low", "length_controlled_win_rate_high")
        assert tuple(result.figures[name] for name in names) == pytest.approx(tuple(expected))
        assert mean(result, "win_rate") == pytest.approx(wins.mean())
        assert (alpaca_eval.WITHOUT in result.notes) == (difficulty is None)


def test_difficulty_is_fitted_to_other_models_and_found_by_instruction(tmp_path: Path) -> None:
    others = [row for seed, name in enumerate("xyz") for row in annotated(name, 20, seed)]
    path = write(tmp_path / "others.jsonl", others)
    there = [f"instruction {place}" for place in (7, 3)]
    one = alpaca_eval.difficulty_of(path, there, range(2), 0.1)
    np.testing.assert_allclose(alpaca_eval.difficulty_of(path, there[::-1], range(2), 0.1), one[::-1])
    assert one[0] != one[1]
    with pytest.raises(UserError, match="nothing on 1 instructions, the first is 'foreign'"):
        alpaca_eval.difficulty_of(path, ["foreign"], range(1), 0.1)
    with pytest.raises(UserError, match="annotations of 1 models"):
        alpaca_eval.difficulty_of(write(tmp_path / "alone.jsonl", others[:20]), there, range(2), 0.1)
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="a table with the column instruction_difficulty"):
        alpaca_eval.difficulty_of(str(tmp_path / "table.csv"), there, range(2), 0.1)


def test_a_file_of_several_models_asks_which(tmp_path: Path) -> None:
    path = write(tmp_path / "two.jsonl", [*annotated("one", 3, 0), *annotated("two", 3, 1)])
    with pytest.raises(UserError, match=r"of one, two; eval\.generator=NAME"):
        alpaca_eval.alpaca_eval(Answering(), judge=None, **options("alpaca_eval", annotations=path))
    with pytest.raises(UserError, match=r"eval\.generator=twoo: not in .*Did you mean 'two'"):
        alpaca_eval.alpaca_eval(Answering(), judge=None, **options("alpaca_eval", annotations=path, generator="twoo"))
    gone = str(tmp_path / "gone.json")
    with pytest.raises(UserError, match=r"^eval\.annotations=.*/gone\.json: there is no such file"):
        alpaca_eval.alpaca_eval(Answering(), judge=None, **options("alpaca_eval", annotations=gone))
    with pytest.raises(UserError, match=r"^eval\.difficulty=.*/gone\.json: there is no such file"):
        alpaca_eval.difficulty_of(gone, ["one"], [0], 0.1)
    with pytest.raises(UserError, match=r"judge=openai .* or eval\.annotations=FILE"):
        alpaca_eval.alpaca_eval(Answering(), judge=None, **options("alpaca_eval"))


def test_a_judge_decides_between_model_and_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge prefers whoever says 'gold': the baseline in 1 of 4, the model never, so 3 ties and a loss: 3/8."""
    rows = [
        {"instruction": f"task {n}", "output": "gold" if n == 2 else "brass", "generator": "base"} for n in range(4)
    ]

    def answer(request: Request) -> str:
        first, second = shown_to_judge(request).split("response A begins")[1].split("response B begins")
        return f"[[{'A' if 'gold' in first else 'B' if 'gold' in second else 'C'}]]"

    with scripted(answer) as server:
        taken = options("alpaca_eval", path=write(tmp_path / "b.jsonl", rows), template="chat")
        result = alpaca_eval.alpaca_eval(Answering(), judge=judge(server.url, monkeypatch), **taken)
        assert len(server.asked) == 8
    assert mean(result, "win_rate") == 3 / 8
    assert 0 < result.figures["length_controlled_win_rate"] < 1
    assert [item.shown["outcome"] for item in result.items] == ["tie", "tie", "baseline", "tie"]
    assert result.made["baseline"] == "base"


# --- a judge alone


def test_responses_are_rated_or_compared_with_the_datas_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"p{n}", "completions": ["poor", "best"], "rewards": [0.1, 0.9]} for n in range(3)]
    path = write(tmp_path / "rows.jsonl", rows)
    with scripted(lambda request: "[[7]]") as server:
        taken = options("judge", path=path, template="chat")
        result = judge_runner(Answering(), judge=judge(server.url, monkeypatch), **taken)
        assert mean(result, "rating") == 7
    with scripted(lambda request: "[[B]]" if "A begins >>>\nbest" in shown_to_judge(request) else "[[A]]") as server:
        result = judge_runner(
            Answering(), judge=judge(server.url, monkeypatch), **{**taken, "baseline": "data", "limit": 2}
        )
        assert mean(result, "win_rate") == 1 and len(result.items) == 2
    bare = write(tmp_path / "bare.jsonl", [{"prompt": "p"}])
    with pytest.raises(UserError, match=r"eval\.baseline=data: row .* has no response"):
        judge_runner(Answering(), judge=judge(server.url, monkeypatch), **{**taken, "baseline": "data", "path": bare})


def test_an_interrupted_evaluation_keeps_what_was_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": f"p{n}"} for n in range(6)])
    taken = options("judge", path=path, template="chat")

    def answer(request: Request) -> Reply | str:
        return Reply(status=429, headers={"retry-after": "999"}) if len(server.asked) == 5 else "[[7]]"

    with scripted(answer) as server:
        asking = judge(server.url, monkeypatch, concurrency=1)
        with pytest.raises(RunError, match="4 of 6 answers have come and are kept"):
            judge_runner(Answering(), judge=asking, **taken)
        result = judge_runner(Answering(), judge=judge(server.url, monkeypatch), **taken)
        assert len(result.items) == 6 and len(server.asked) == 5 + 2


# --- RewardBench


class Scoring(Subject):
    """A reward model that likes long responses."""

    def __init__(self) -> None:
        super().__init__("scoring", "nowhere", options=OPTIONS)

    is_reward_model = True  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def scores(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        return [float(len(response)) for _, response in pairs]


def test_sections_weigh_subsets_as_the_authors_count_them(tmp_path: Path) -> None:
    """Reasoning: math-prm all right, hep-cpp half: (984 + 164/2) / (984 + 164). Chat: a tie is wrong, so 0."""
    pairs = [("math-prm", "aa", "a"), ("hep-cpp", "aa", "a"), ("hep-cpp", "a", "aa"), ("alpacaeval-easy", "a", "b")]
    rows = [
        {"prompt": "q", "chosen": good, "rejected": bad, "subset": subset, "id": place}
        for place, (subset, good, bad) in enumerate(pairs, 1)
    ]
    result = rewardbench.rewardbench(
        Scoring(), **options("rewardbench", path=write(tmp_path / "rb.jsonl", rows), template="chat")
    )
    reasoning = (984 + 82) / 1148
    assert result.figures["reasoning"] == pytest.approx(reasoning)
    assert result.figures["chat"] == 0
    counted = results.figures_of(result)
    assert (counted["reasoning"].n, counted["chat"].n, counted["score"].n) == (3, 1, 4)
    assert result.figures["score"] == pytest.approx(reasoning / 2)
    assert result.figures["score_low"] <= reasoning / 2 <= result.figures["score_high"]
    assert mean(result, "accuracy") == 0.5 and mean(result, "hep-cpp") == 0.5
    assert result.notes[0] == "1 of 4 pairs have equal scores and count as wrong."
    assert "llmbar-natural" in result.notes[1]
    few = rewardbench.rewardbench(
        Scoring(), **options("rewardbench", path=str(tmp_path / "rb.jsonl"), limit=1, template="chat")
    )
    assert len(few.items) == 3


def test_equal_weights_in_one_subset_are_wilsons_interval() -> None:
    right = {"one": [1.0, 0.0, 1.0, 1.0]}
    assert rewardbench.stratified(right, {"one": 1.0}) == pytest.approx(statistics.wilson(3, 4))
    assert rewardbench.stratified({"one": [1.0] * 9}, {"one": 1.0}) == pytest.approx(statistics.wilson(9, 9))


def test_math_counts_as_much_as_the_code_beside_it() -> None:
    reasoning = rewardbench.SECTIONS["reasoning"]
    assert reasoning["math-prm"] == sum(count for name, count in reasoning.items() if name != "math-prm")
    assert sum(len(subsets) for subsets in rewardbench.SECTIONS.values()) == 23


def test_a_language_model_is_no_reward_model(tiny_model: Path) -> None:
    subject = Subject("tiny", str(tiny_model), options=OPTIONS)
    with pytest.raises(UserError, match=r"not a reward model, which eval=rewardbench"):
        rewardbench.rewardbench(subject, **options("rewardbench", path="nowhere"))


# --- calibration


def rewarded(count: int) -> list[dict[str, Any]]:
    """Three models whose rewards order them alike on all prompts but the first two, c the worst."""
    rows = []
    for place in range(count):
        rewards = (0.9, 0.5, 0.1) if place > 1 else (0.5, 0.9, 0.1)
        rows.append(
            {
                "prompt": f"p{place}",
                "completions": [
                    {"model": model, "response": f"{model} {place} is worth {reward}", "reward": reward}
                    for model, reward in zip("abc", rewards, strict=True)
                ],
            }
        )
    return rows


def worth(request: Request) -> str:
    """A judge that sees what a response is worth."""
    told = shown_to_judge(request).split("is worth ")
    one, two = float(told[1].split()[0]), float(told[2].split()[0])
    return f"[[{'A' if one > two else 'B'}]]"


def test_a_judge_that_agrees_with_all_has_agreement_and_kappa_of_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rewards.jsonl", rewarded(8))
    with scripted(worth) as server:
        found = calibrate.calibrate(judge(server.url, monkeypatch), path=path, limit=None, margin=0.1, seed=0)
    figures = found.result.figures
    assert {figures[name] for name in ("agreement", "agreement_decided", "kappa", "spearman")} == {1.0}
    assert found.result.made["pairs"] == 8 * 3 and len(found.result.items) == 8
    assert [rate.model for rate in found.rates] == ["a", "b", "c"]
    assert found.rates[0].published == found.rates[0].ours == pytest.approx((2 * 6 + 2) / 16)


def test_a_judge_that_always_ties_agrees_with_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rewards.jsonl", rewarded(6))
    with scripted(lambda request: "[[A]]") as server:
        found = calibrate.calibrate(judge(server.url, monkeypatch), path=path, limit=4, margin=0.3, seed=1)
    assert found.result.figures["agreement"] == found.result.figures["kappa"] == 0
    assert "agreement_decided" not in found.result.figures and "spearman" not in found.result.figures
    assert len(found.result.items) == 4
    with pytest.raises(UserError, match=r"^calibrate\.path=.*/gone\.json: there is no such file"):
        calibrate.calibrate(
            judge(server.url, monkeypatch), path=str(tmp_path / "gone.json"), limit=4, margin=0.3, seed=1
        )
    with pytest.raises(UserError, match=r"calibrate\.margin=1"):
        calibrate.calibrate(judge(server.url, monkeypatch), path=path, limit=4, margin=1.0, seed=1)


def test_pairs_of_both_schemas() -> None:
    found = annotations.published({**annotated("one", 1, 0)[0], "preference": 1.9}, "0")
    [pair] = annotations.pairs_of(found, margin=0.3)
    assert pair.models == ("one", "base") and pair.label == 1.0 and pair.responses[0].startswith("m")
    assert annotations.pairs_of(found, margin=0.45) == []
    for told, win in ((1, 0.0), (2, 1.0), (0, 0.5), (1.5, 0.5)):
        assert annotations.published({**annotated("one", 1, 0)[0], "preference": told}, "0")[0].win == win
    three = annotations.published(rewarded(1)[0], "0")
    assert [(p.models, p.label) for p in annotations.pairs_of(three, margin=0.1)] == [
        (("a", "b"), 0.0),
        (("a", "c"), 1.0),
        (("b", "c"), 1.0),
    ]
    for row in ({"x": 1}, {"prompt": "p", "completions": [{"model": "a", "response": "b", "reward": 2}]}):
        with pytest.raises(RowError):
            annotations.published(row, "0")


def test_kappa_and_spearman_are_scipys_and_closed_forms() -> None:
    """κ of (20, 5; 10, 15): agreement 0.7, by chance 0.5, so 0.4."""
    assert statistics.kappa([[20, 5], [10, 15]]) == pytest.approx(0.4)
    assert math.isnan(statistics.kappa([[3, 0], [0, 0]])) and math.isnan(statistics.kappa([[0, 0], [0, 0]]))
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = random.Random(0)
    one, two = ([float(rng.randint(0, 6)) for _ in range(15)] for _ in range(2))
    assert statistics.spearman(one, two) == pytest.approx(scipy_stats.spearmanr(one, two).statistic)
    assert statistics.spearman([1, 2, 3], [5, 3, 1]) == pytest.approx(-1)
    assert math.isnan(statistics.spearman([1, 2], [3, 3]))
    with pytest.raises(ValueError, match="have no order"):
        statistics.spearman([1], [1])


# --- end to end, with a real server and real questions


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of random weights that knows printable ASCII, long prompts and a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    printable = "".join(map(chr, range(32, 127))) + "\n"
    tiny.build(folder, alphabet=printable, hidden=16, layers=1, heads=2, positions=16384, seed=3)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": CHAT}))
    return folder


@pytest.fixture(scope="module")
def served(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of transformers' own server with the tiny model."""
    pytest.importorskip("fastapi", reason="transformers' server needs fastapi")
    pytest.importorskip("uvicorn", reason="transformers' server needs uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(chat_model), "--host", "127.0.0.1"]
    log = tmp_path_factory.mktemp("served") / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu", "--dtype", "float32"],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:
        for _ in range(1200):
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, TimeoutError):
                time.sleep(0.1)
        else:
            pytest.fail(log.read_text()[-2000:])
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


@real
def test_real_questions_of_two_turns_go_to_a_real_server(
    chat_model: Path,
    served: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ALIGN_JUDGE_URL", served)
    monkeypatch.setenv("ALIGN_JUDGE_MODEL", str(chat_model))
    shared = ["judge=local", "judge.max_tokens=4", f"out={tmp_path / 'out'}"]
    line = ["evaluate", str(chat_model), "eval=mt_bench", f"eval.path={QUESTIONS}", "eval.limit=3"]
    line += ["eval.max_new_tokens=6", "generate.accelerator=cpu", *shared]
    assert small_runs.align(*line) == 0
    told = json.loads((tmp_path / "out" / "eval" / "mt_bench.json").read_text())
    assert len(told["items"]) == 3 and told["made"]["judge"].endswith(served.split("/")[2])
    assert [turn["role"] for turn in told["items"][0]["shown"]["dialogue"]] == ["user", "assistant"] * 2
    assert any("ratings could not be read" in note for note in told["notes"]), "a random model rates nothing"
    capsys.readouterr()
    assert small_runs.align("evaluate", "calibrate", str(PAIRS), "calibrate.limit=3", *shared) == 0
    printed = capsys.readouterr().out
    assert "win rate as published" in printed and "OpenHermes" in printed
    told = json.loads((tmp_path / "out" / "eval" / "calibrate.json").read_text())
    assert told["figures"]["agreement"]["value"] == 0


def test_mistakes_are_said_before_anything_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert small_runs.align("evaluate", "calibrate") == 2
    assert small_runs.align("evaluate", "calibrate", "file.jsonl", "calibrate.limitt=3") == 2
    assert small_runs.align("evaluate", "calibrate", "file.jsonl") == 2
    printed = capsys.readouterr().err
    assert "comes first" in printed and "Did you mean 'limit'" in printed and "ALIGN_JUDGE_KEY" in printed


def test_the_choices_are_what_the_runners_take() -> None:
    for name, runner in (
        ("judge", judge_runner),
        ("mt_bench", mt_bench.mt_bench),
        ("alpaca_eval", alpaca_eval.alpaca_eval),
    ):
        node = {key: value for key, value in options(name).items() if value != config.MISSING}
        problems = config.check(runner, {**node, "path": "p"}, "eval", injected=["judge"])
        assert problems == []
