"""Programs that a model writes: what of a response is run, and how likely one passes."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from scripted_subject import Scripted, options_of, subject_of

from align_cli import sandbox
from align_cli.cli import dispatch
from align_cli.data.benchmarks import Task
from align_cli.errors import UserError
from align_cli.evals import Result
from align_cli.evals.code import code, pass_at, program_of
from align_cli.sandbox import Code, Sandbox

OPTIONS = Code(run=True, runner="process", image="python", seconds=20.0, memory_mb=256, processes=4, file_mb=2)
BEGUN = 'from typing import List\n\n\ndef total(x: List[int]) -> int:\n    """The sum."""\n'
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": BEGUN,
    "entry_point": "total",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
}
RIGHT, WRONG = "    return sum(x)\n", "    return len(x)\n"
TASK = Task("0", BEGUN, "The sum.", "total", "", "")


@pytest.fixture(scope="module")
def box() -> Sandbox:
    try:
        return sandbox.opened(OPTIONS)
    except UserError as error:
        pytest.skip(str(error))


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ask(box: Sandbox, name: str, path: Path, responses: Sequence[Sequence[str]], **more: Any) -> Result:
    given = options_of(name, path=str(path), **{"template": "text", **more})
    return code(cast(Any, Scripted(responses)), sandbox=box, **given)


@pytest.mark.parametrize(("samples", "passed"), [(1, 0), (1, 1), (5, 0), (5, 2), (5, 5), (6, 1)])
def test_pass_at_k_is_the_share_of_choices_of_k_samples_with_one_that_passes(samples: int, passed: int) -> None:
    outcomes = [True] * passed + [False] * (samples - passed)
    for k in range(1, samples + 1):
        choices = list(itertools.combinations(outcomes, k))
        assert pass_at(k, samples=samples, passed=passed) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_k_is_unbiased() -> None:
    """Its mean over binomial numbers of passes is 1 - (1 - p)^k."""
    n, p = 7, 0.3
    for k in (1, 3, 7):
        chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        mean = sum(weight * pass_at(k, samples=n, passed=c) for c, weight in enumerate(chance))
        assert mean == pytest.approx(1 - (1 - p) ** k)


def test_a_text_goes_on_with_the_program_and_a_chat_writes_it_anew() -> None:
    assert program_of(TASK, RIGHT, "text") == BEGUN + RIGHT
    whole = "def total(x):\n    return sum(x)\n"
    assert program_of(TASK, f"Here:\n```python\n{whole}```\nand\n```\nother\n```", "chat") == whole
    assert program_of(TASK, f"```\n{whole}```", "chat") == whole
    assert program_of(TASK, f"```python\n{whole}", "chat") == whole, "cut off at the longest response"
    assert program_of(TASK, whole, "chat") == whole
    assert program_of(TASK, f"```python\n{RIGHT}```", "chat") == BEGUN + RIGHT, "the body alone"
    assert program_of(TASK, "```python\ndef totals(x):\n    pass\n```", "chat").startswith(BEGUN)


def test_right_and_wrong_programs_are_told_apart(box: Sandbox, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", HUMANEVAL, HUMANEVAL | {"task_id": "HumanEval/1"})
    written = [
        [RIGHT, WRONG, RIGHT, "    import sys; sys.exit(0)\n"],
        [WRONG, WRONG, "    return (\n", "    while True: pass\n"],
    ]
    box = Sandbox(Code(**{**vars(OPTIONS), "seconds": 6.0}), box.level, box.path)  # to start takes a part of them
    result = ask(box, "humaneval", path, written, samples=4, k=[1, 2], temperature=0.8)
    assert [item.values for item in result.items] == [{"pass@1": 0.5, "pass@2": 1 - 1 / 6}, {"pass@1": 0, "pass@2": 0}]
    assert [item.id for item in result.items] == ["HumanEval/0", "HumanEval/1"]
    assert result.items[0].shown["verdicts"][:2] == ["passed", "failed: AssertionError: "]
    assert result.notes == ["Of 8 programs: 1 exited, 4 failed, 2 passed, 1 time."]
    assert result.made["sandbox"] == box.isolation


def test_a_chat_may_leave_out_the_imports_that_the_task_begins_with(box: Sandbox, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", HUMANEVAL)
    told = "```python\ndef total(x: List[int]) -> int:\n    return sum(x)\n```"
    assert ask(box, "humaneval", path, [[told]], template="chat").items[0].values == {"pass@1": 1.0}


def test_mbpp_and_leetcode_run_their_own_tests(box: Sandbox, tmp_path: Path) -> None:
    mbpp = {"task_id": 2, "text": "Add.", "code": "def add(a, b): ...", "test_list": ["assert add(1, 2) == 3"]}
    result = ask(box, "mbpp", write(tmp_path / "mbpp.jsonl", mbpp), [["def add(a, b):\n    return a + b\n"]])
    assert result.items[0].values == {"pass@1": 1.0}
    leetcode = {
        "task_id": "two",
        "prompt": "class Solution:\n    def twice(self, x: List[int]) -> List[int]:\n        ",
        "test": "s = Solution()\nassert s.twice([1]) == [1, 1]",
    }
    path = write(tmp_path / "leetcode.jsonl", leetcode)
    assert ask(box, "leetcode", path, [["return x + x"]]).items[0].values == {"pass@1": 1.0}
    assert ask(box, "leetcode", path, [["return x"]]).items[0].values == {"pass@1": 0.0}


@pytest.mark.parametrize(("more", "why"), [({"k": [2]}, "at most eval.samples=1"), ({"prompt": "?"}, "task")])
def test_what_cannot_be_asked_is_one_sentence(tmp_path: Path, more: dict[str, Any], why: str) -> None:
    box = Sandbox(OPTIONS, "user", "python")
    with pytest.raises(UserError, match=why):
        ask(box, "humaneval", write(tmp_path / "rows.jsonl", HUMANEVAL), [[RIGHT]], **more)


def test_nothing_runs_from_the_command_line_without_the_flag(tmp_path: Path, reader_model: Path) -> None:
    path = write(tmp_path / "rows.jsonl", HUMANEVAL)
    with pytest.raises(UserError, match=r"code\.run=true"):
        dispatch(["evaluate", str(reader_model), "eval=humaneval", f"eval.path={path}", f"out={tmp_path}"])


def test_a_models_own_programs_are_run(box: Sandbox, tmp_path: Path, reader_model: Path) -> None:
    given = options_of("humaneval", path=str(write(tmp_path / "rows.jsonl", HUMANEVAL)), max_new_tokens=8)
    result = code(subject_of(reader_model), sandbox=box, **given)
    assert result.items[0].values == {"pass@1": 0.0} and result.made["template"] == "chat"
