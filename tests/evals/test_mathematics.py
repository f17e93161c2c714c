"""Mathematical benchmarks, from the rows to the figures, on real problems where they are at hand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from scripted_subject import Scripted, options_of, subject_of

from align_cli.cli import dispatch
from align_cli.data import benchmarks
from align_cli.errors import UserError
from align_cli.evals import Result
from align_cli.evals.mathematics import mathematics

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
pytest.importorskip("math_verify")
real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the data is not here: no {SHARED}")


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(count: int) -> list[dict[str, Any]]:
    return [
        {"question": f"{n} + 1?", "answer": f"{n} + 1 = <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(count)
    ]


def ask(responses: Sequence[Sequence[str]], path: Path, **more: Any) -> tuple[Result, Scripted]:
    subject = Scripted(responses)
    return mathematics(cast(Any, subject), **options_of("gsm8k", path=str(path), **more)), subject


def test_right_answers_are_told_from_wrong_ones_and_from_none(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", sums(3))
    result, _ = ask([["#### 1"], ["The answer is 3."], ["who knows"]], rows, shots=0)
    assert [item.values for item in result.items] == [
        {"accuracy": 1.0, "answered": 1.0},
        {"accuracy": 0.0, "answered": 1.0},
        {"accuracy": 0.0, "answered": 0.0},
    ]
    assert result.items[1].shown["answers"] == ["3"] and result.items[1].shown["gold"] == "2"
    assert result.notes == ["1 of 3 responses have no answer that could be read; they count as wrong."]
    assert str(result.made["grader"]).startswith("math-verify ") and result.made["data"] == str(rows)


def test_several_samples_of_a_question_are_one_observation(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", sums(2))
    result, subject = ask([["1", "2", "1", "x"], ["2"] * 4], rows, shots=0, samples=4, temperature=0.7)
    assert [item.values["accuracy"] for item in result.items] == [0.5, 1.0]
    assert [item.values["answered"] for item in result.items] == [0.75, 1.0]
    assert subject.given["samples"] == 4 and subject.given["temperature"] == 0.7


def test_examples_stand_before_the_question_and_are_not_asked(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", sums(4))
    result, subject = ask([["3"], ["4"]], rows, shots=2)
    worked = [f"Question: {n} + 1?\nAnswer: {n} + 1 = {n + 1}\n#### {n + 1}\n\n" for n in range(2)]
    assert subject.asked[0] == f"{''.join(worked)}Question: 2 + 1?\nAnswer:"
    assert [item.id for item in result.items] == ["2", "3"]
    _, subject = ask([["3"], ["4"]], rows, shots=2, template="chat")
    assert [turn["role"] for turn in subject.asked[0]] == ["user", "assistant"] * 2 + ["user"]
    assert subject.asked[0][1]["content"] == "0 + 1 = 1\n#### 1"


def test_examples_come_from_a_split_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "gsm8k" / "main"
    folder.mkdir(parents=True)
    write(folder / "train.jsonl", sums(9)[5:])
    write(folder / "test.jsonl", sums(2))
    result, subject = ask([["1"], ["2"]], tmp_path / "gsm8k", shots=3)
    assert [item.id for item in result.items] == ["0", "1"] and "7 + 1 = 8" in subject.asked[0]


def test_a_limit_takes_the_first_questions(tmp_path: Path) -> None:
    result, _ = ask([["1"]], write(tmp_path / "rows.jsonl", sums(5)), shots=0, limit=1)
    assert [item.id for item in result.items] == ["0"]


def test_an_answer_that_hangs_the_grader_counts_as_wrong_and_is_told(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"problem": "p", "solution": "\\boxed{1}"}] * 2)
    responses = [["\\boxed{9^{9^{9^9}}}"], ["\\boxed{1}"]]
    result, _ = ask(responses, rows, rows="math", shots=0, extract_by=["boxed"], seconds=2.0)
    assert [item.values["accuracy"] for item in result.items] == [0.0, 1.0]
    assert result.notes == ["1 of 2 answers took too long to judge; they count as wrong."]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"shots": 3}, "no question to ask"),
        ({"shots": 4}, "has 3 examples"),
        ({"prompt": "What?"}, r"eval\.prompt='What\?'"),
        ({"rows": "svamp"}, "no 'Body'"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(tmp_path: Path, more: dict[str, Any], why: str) -> None:
    rows = write(tmp_path / "rows.jsonl", sums(3))
    with pytest.raises(UserError, match=why):
        ask([], rows, **more)


def test_without_worked_solutions_there_are_no_examples(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"Body": "b", "Question": "q", "Answer": 1}] * 2)
    with pytest.raises(UserError, match=r"svamp has no worked solutions to show; use eval\.shots=0"):
        ask([], rows, rows="svamp", shots=1)


@real
def test_published_solutions_are_judged_as_their_authors_judged_them() -> None:
    """600 answers of four models, each with the verdict of GSM8K's authors."""
    from align_cli.answers import Checker, extract

    lines = (SHARED / "gsm8k_model_solutions.jsonl").read_text().splitlines()[:150]
    agreed = []
    with Checker(seconds=60.0) as checker:
        for row in map(json.loads, lines):
            gold = row["ground_truth"].rpartition("A:")[2].strip()
            for each in row["completions"]:
                found = extract(each["response"], ["marked", "boxed", "said", "number"])
                judged = checker.judge([gold], found, shape="number", tolerance=0.0)
                agreed.append((judged == "right") == each["is_correct"])
    assert len(agreed) == 600 and all(agreed)


@real
def test_fifty_real_problems_run_from_the_command_line(tmp_path: Path, reader_model: Path) -> None:
    command = ["evaluate", str(reader_model), "eval=gsm8k", f"eval.path={SHARED / 'gsm8k_train_2000.jsonl'}"]
    more = ["eval.shots=1", "eval.limit=50", "eval.max_new_tokens=12", f"out={tmp_path}", "generate.precision=fp32"]
    assert dispatch([*command, *more, "generate.accelerator=cpu"]) == 0
    told = json.loads((tmp_path / "eval" / "gsm8k.json").read_text())
    assert told["figures"]["accuracy"]["n"] == 50 and len(told["items"]) == 50
    assert 0 <= told["figures"]["accuracy"]["low"] <= told["figures"]["accuracy"]["high"] < 0.2


@real
def test_the_real_solutions_of_fifty_problems_are_all_right() -> None:
    path = SHARED / "gsm8k_train_2000.jsonl"
    given = options_of("gsm8k", path=str(path), shots=0, limit=50)
    labelled = benchmarks.load(benchmarks.Benchmark(str(path), None, None, None, "test", ""))[0][:50]
    questions, _ = benchmarks.read(labelled, benchmarks.gsm8k)
    result = mathematics(cast(Any, Scripted([[each.solution or ""] for each in questions])), **given)
    assert [item.values["accuracy"] for item in result.items] == [1.0] * 50


def test_a_model_without_a_chat_template_is_asked_in_a_text(tmp_path: Path, tiny_model: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", sums(1))
    given = options_of("gsm8k", path=str(rows), shots=0, template="auto", prompt="{question}", max_new_tokens=4)
    assert mathematics(subject_of(tiny_model), **given).made["template"] == "text"
    with pytest.raises(UserError, match="no chat template"):
        mathematics(subject_of(tiny_model), **{**given, "template": "chat"})
