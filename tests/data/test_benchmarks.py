"""What rows of published benchmarks say, and what is said where they are not at hand."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from align_cli import paths
from align_cli.answers import plain_number
from align_cli.data import benchmarks
from align_cli.data.benchmarks import Benchmark, Question, Task
from align_cli.data.records import RowError
from align_cli.errors import UserError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
GSM8K = {"question": "How many?", "answer": "48/2 = <<48/2=24>>24.\nSo 72.\n#### 72"}
SOLUTION = "Half of it is \\boxed{x}, so \\boxed{\\frac{1}{2}}."


def at(path: Path | str | None, **more: Any) -> Benchmark:
    given = {"hub": "openai/gsm8k", "revision": None, "subset": None, "split": "test", "source": "a file"} | more
    return Benchmark(path=None if path is None else str(path), **given)


def write(path: Path, rows: list[Mapping[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


QUESTIONS: list[tuple[Callable[..., Question | None], Mapping[str, object], Question | None]] = [
    (benchmarks.gsm8k, GSM8K, Question("7", "How many?", ("72",), "number", "48/2 = 24.\nSo 72.\n#### 72")),
    (
        benchmarks.gsm_plus,
        {"question": "q", "solution": "s", "answer": "12"},
        Question("7", "q", ("12",), "number", "s\n#### 12"),
    ),
    (benchmarks.gsm_plus, {"question": "q", "solution": "s", "answer": "None"}, None),
    (
        benchmarks.math,
        {"problem": "p", "solution": SOLUTION},
        Question("7", "p", ("\\frac{1}{2}",), "expression", SOLUTION),
    ),
    (
        benchmarks.theoremqa,
        {"Question": "q", "Answer": [0.333, 0.25], "Answer_type": "list of float"},
        Question("7", "q", ("0.333", "0.25"), "list", None),
    ),
    (
        benchmarks.theoremqa,
        {"Question": "q", "Answer": 1024, "Answer_type": "integer"},
        Question("7", "q", ("1024",), "integer", None),
    ),
    (
        benchmarks.theoremqa,
        {"Question": "q", "Answer": [1, 2], "Answer_type": "list of integer"},
        Question("7", "q", ("1", "2"), "integers", None),
    ),
    (
        benchmarks.theoremqa,
        {"Question": "q", "Answer": True, "Answer_type": "bool"},
        Question("7", "q", ("True",), "bool", None),
    ),
    (
        benchmarks.svamp,
        {"Body": "Dan had $ 3", "Question": "How much?", "Answer": 1.0},
        Question("7", "Dan had $ 3. How much?", ("1",), "number", None),
    ),
    (
        benchmarks.svamp,
        {"Body": "b.", "Question": "q", "Answer": 1234567.25},
        Question("7", "b. q", ("1234567.25",), "number", None),
    ),
    (
        benchmarks.asdiv,
        {"body": "Two apples.", "question": "How many?", "answer": "9 (apples)"},
        Question("7", "Two apples. How many?", ("9",), "number", None),
    ),
    (
        benchmarks.asdiv,
        {"body": "b", "question": "q", "answer": "3 (red); 5 (blue)"},
        Question("7", "b q", ("3", "5"), "list", None),
    ),
    (
        benchmarks.asdiv,
        {"body": "b", "question": "q", "answer": "Ann"},
        Question("7", "b q", ("Ann",), "words", None),
    ),
]


@pytest.mark.parametrize(("reader", "row", "expected"), QUESTIONS)
def test_a_row_becomes_a_question(
    reader: Callable[..., Question | None], row: Mapping[str, object], expected: Question | None
) -> None:
    assert reader(row, "7") == expected


@pytest.mark.parametrize(
    ("reader", "row", "why"),
    [
        (benchmarks.gsm8k, {"question": "q", "answer": "72"}, "no '####'"),
        (benchmarks.gsm8k, {"answer": "#### 72"}, "no 'question'"),
        (benchmarks.gsm8k, {"question": 5, "answer": "#### 72"}, "question is int"),
        (benchmarks.math, {"problem": "p", "solution": "1/2"}, "boxed"),
        (benchmarks.theoremqa, {"Question": "q", "Answer": 1, "Answer_type": "matrix"}, "list of float are known"),
        (benchmarks.svamp, {"Body": "b", "Question": "q", "Answer": float("nan")}, "finite"),
        (benchmarks.mbpp, {"text": "t", "code": "x = 1", "test_list": ["assert f()"]}, "no function of 'code'"),
        (benchmarks.mbpp, {"text": "t", "code": "def f(): pass", "test_list": []}, "test_list is empty"),
        (benchmarks.humaneval, {"prompt": "def f():\n", "test": "def check(f): pass"}, "no 'entry_point'"),
    ],
)
def test_a_malformed_row_says_what_is_wrong(reader: Callable[..., object], row: Mapping[str, object], why: str) -> None:
    with pytest.raises(RowError, match=why):
        reader(row, "0")


def test_tasks_have_their_tests_and_what_these_need() -> None:
    begun = 'from typing import List\n\ndef f(x: List[int]) -> int:\n    """Sum."""\n'
    row = {
        "task_id": "HumanEval/0",
        "prompt": begun,
        "entry_point": "f",
        "test": "def check(c):\n    assert c([1]) == 1",
    }
    asked = benchmarks.humaneval(row, "0")
    assert asked == Task(
        "HumanEval/0",
        begun,
        f"```python\n{begun}```",
        "f",
        "from typing import List\n\n",
        "def check(c):\n    assert c([1]) == 1\ncheck(f)",
    )
    row = {
        "task_id": 2,
        "text": "Add.",
        "code": "def helper(): ...\ndef add(a): ...",
        "test_list": ["assert add(1) == 1"],
    }
    asked = benchmarks.mbpp(row | {"test_setup_code": "import math"}, "0")
    assert (asked.id, asked.entry, asked.before, asked.tests) == ("2", "add", "import math", "assert add(1) == 1")
    # the sanitised version says it in other words
    other = {"task_id": 2, "prompt": "Add.", "code": "def add(a): ...", "test_list": ["assert add(1) == 1"]}
    assert benchmarks.mbpp(other | {"test_imports": ["import math"]}, "0") == asked
    row = {"task_id": "two-sum", "prompt": "class Solution:\n", "prompt_sft": "Do.", "test": "s = Solution()"}
    asked = benchmarks.leetcode(row, "0")
    assert (asked.entry, asked.asked, asked.tests) == ("Solution", "Do.", "s = Solution()")


def test_rows_come_from_a_file_a_folder_and_a_copy_of_the_hub(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [GSM8K])
    write(tmp_path / "copy" / "main" / "test.jsonl", [GSM8K, GSM8K])
    write(tmp_path / "copy" / "main" / "train.jsonl", [GSM8K] * 3)
    write(tmp_path / "copy" / "socratic" / "test.jsonl", [GSM8K] * 4)

    def count(benchmark: Benchmark) -> int:
        return len(benchmarks.load(benchmark)[0])

    assert count(at(file)) == 1
    assert count(at(tmp_path / "copy", subset="main")) == 2
    assert count(at(tmp_path / "copy", subset=["main", "socratic"])) == 6
    assert count(at(tmp_path / "copy", subset="main", split="train")) == 3
    assert count(at(tmp_path / "copy" / "main", subset="main")) == 2


def test_the_digest_follows_what_the_rows_hold(tmp_path: Path) -> None:
    one, same = (write(tmp_path / name, [GSM8K]) for name in ("a.jsonl", "b.jsonl"))
    other = write(tmp_path / "c.jsonl", [GSM8K, GSM8K])
    digests = [benchmarks.load(at(path))[1] for path in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]


def test_data_that_is_not_at_hand_is_one_sentence_on_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"hf download --repo-type dataset openai/gsm8k .* eval\.path=gsm8k"):
        benchmarks.load(at(None))
    with pytest.raises(UserError, match=r"not on the hub; use eval\.path=FILE with leetcode-test\.json"):
        benchmarks.load(at(None, hub=None, source="leetcode-test.json"))
    with pytest.raises(UserError, match=r"eval\.path=.*/nowhere: there is no such file"):
        benchmarks.load(at(tmp_path / "nowhere"))
    write(tmp_path / "copy" / "train.jsonl", [GSM8K])
    with pytest.raises(UserError, match=r"no file for the split 'test' \(eval\.split\)"):
        benchmarks.load(at(tmp_path / "copy"))
    with pytest.raises(UserError, match="has no rows"):
        benchmarks.load(at(write(tmp_path / "empty.jsonl", [])))


def test_a_malformed_row_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [GSM8K, {"question": "q"}])
    labelled, _ = benchmarks.load(at(file))
    with pytest.raises(UserError, match=r"rows\.jsonl:2: no 'answer'"):
        benchmarks.read(labelled, benchmarks.gsm8k)
    file.write_text("{broken\n")
    labelled, _ = benchmarks.load(at(file))
    with pytest.raises(UserError, match=r"rows\.jsonl:1: not JSON"):
        benchmarks.read(labelled, benchmarks.gsm8k)


def test_questions_without_an_answer_are_counted_and_left_out(tmp_path: Path) -> None:
    row = {"question": "q", "solution": "s", "answer": "5"}
    file = write(tmp_path / "rows.jsonl", [row, row | {"answer": "None"}, row])
    questions, left_out = benchmarks.read(benchmarks.load(at(file))[0], benchmarks.gsm_plus)
    assert [each.id for each in questions] == ["0", "2"] and left_out == 1


@pytest.mark.parametrize("path", sorted((paths.conf() / "eval").glob("*.yaml")), ids=lambda path: path.stem)
def test_each_choice_names_a_schema_that_is_read(path: Path) -> None:
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "rows" in tree:
        assert callable(vars(benchmarks)[tree["rows"]])
        assert tree["hub"] is not None or tree["source"]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the data is not here: no {SHARED}")
def test_every_real_problem_of_gsm8k_has_a_number_for_an_answer() -> None:
    labelled, _ = benchmarks.load(at(SHARED / "gsm8k_train_2000.jsonl"))
    questions, left_out = benchmarks.read(labelled, benchmarks.gsm8k)
    assert len(questions) == 2000 and left_out == 0
    for each in questions:
        assert plain_number(each.gold[0]) == each.gold[0].replace(",", "")
        assert (
            each.solution is not None and "<<" not in each.solution and each.solution.endswith(f"#### {each.gold[0]}")
        )
