"""The answer in a response, and whether it is right, whatever the response holds."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from align_cli import answers
from align_cli.answers import Checker, boxed, extract, last_number, marked, plain_number, said
from align_cli.errors import UserError

ALL = ("boxed", "marked", "said", "number")


@pytest.fixture(scope="module")
def checker() -> Iterator[Checker]:
    pytest.importorskip("math_verify")
    with Checker(seconds=60.0) as one:
        yield one


def test_the_last_box_counts_with_its_braces_balanced() -> None:
    assert boxed(r"first \boxed{1}, then \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert boxed(r"\boxed{3} and one that never ends: \boxed{4") == "3"
    assert boxed(r"\fbox{x} and \boxed {7}") == "7"
    assert boxed("no box") is None and boxed(r"\boxed") is None


def test_an_answer_is_found_by_the_first_rule_that_finds_one() -> None:
    response = "48 + 24 = 72, of which 3 broke.\n#### 72\nThe answer is 71. \\boxed{70}"
    assert [extract(response, [rule]) for rule in ALL] == ["70", "72", "71", "70"]
    assert extract(response, ["marked", "boxed"]) == "72"
    assert extract("So it is 12, at 5 dollars each", ALL) == "5"
    assert extract("I do not know", ALL) is None and extract("", ALL) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 5. So he has none left.", "5"),
        ("Answer: 72 clips", "72 clips"),
        ("answer is: **42**.", "42"),
        ("the answer is $3.50.", "3.50"),
        ("The answer is 1.\nNo, the answer is 2.\n", "2"),
        ("answers vary", None),
        ("The answer is", None),
    ],
)
def test_what_is_said_to_be_the_answer(text: str, expected: str | None) -> None:
    assert said(text) == expected


def test_a_mark_counts_up_to_the_end_of_its_line() -> None:
    assert marked("#### 1\n#### 2 \nQuestion: #### 3 is not\n#### 4\nmore") == "4"
    assert marked("####\n5") is None and marked("5") is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("$1,080.50", "1080.50"),
        ("-3 degrees", "-3"),
        ("from 3 to 5 apples", "5"),
        ("10{,}000", "10000"),
        ("3/4 of it", "3/4"),
        (".5", ".5"),
        ("−7", "-7"),
        ("1,2", "2"),
        ("none", None),
    ],
)
def test_a_number_without_currency_commas_and_units(text: str, number: str | None) -> None:
    assert plain_number(text) == number
    assert (last_number(text) is None) == (number is None)


@pytest.mark.parametrize(
    ("gold", "answer", "shape", "tolerance", "expected"),
    [
        ("72", "$72.00", "number", 0.0, "right"),
        ("1,080", "1080 dollars", "number", 0.0, "right"),
        ("72", "71", "number", 0.0, "wrong"),
        ("0.75", "3/4", "number", 0.0, "right"),
        ("2", "2/0", "number", 0.0, "wrong"),
        ("100", "104", "number", 0.04, "right"),
        ("100", "104.1", "number", 0.04, "wrong"),
        ("-100", "-97", "number", 0.04, "right"),
        ("0", "0.001", "number", 0.04, "wrong"),
        ("0.25", r"\frac{1}{4}", "number", 0.0, "right"),
        ("4", r"\frac{3}{4}", "number", 0.0, "wrong"),
        ("2", r"3\sqrt{2}", "number", 0.0, "wrong"),
        ("1024", "2^{10}", "number", 0.0, "right"),
        ("1.6e-19", r"1.6 \times 10^{-19}", "number", 0.0, "right"),
        ("-19", r"1.6 \times 10^{-19}", "number", 0.0, "wrong"),
        ("0.00001", "1e-05", "number", 0.0, "right"),
        ("12", r"12 \text{ cm}^2", "number", 0.0, "right"),
        ("90", r"90^\circ", "number", 0.0, "right"),
        ("6", r"\text{6 apples}", "number", 0.0, "right"),
        ("7", r"\boldsymbol{7}", "number", 0.0, "right"),
        ("3.14", r"\pi \approx 3.14", "number", 0.0, "right"),
        ("5", r"x = 2 + 3 = 5", "number", 0.0, "right"),
        ("1024", "1024.3", "integer", 0.04, "right"),
        ("1024", "1000", "integer", 0.04, "wrong"),
        ("0", "0.4", "integer", 0.04, "wrong"),
        ("72", "seventy-two", "number", 0.0, "unread"),
        ("72", None, "number", 0.0, "unread"),
        ("72", "7" * 2000, "number", 0.0, "unread"),
        (r"\frac{1}{2}", "0.5", "expression", 0.0, "right"),
        ("x+1", "1 + x", "expression", 0.0, "right"),
        (r"3\sqrt{2}", r"\sqrt{18}", "expression", 0.0, "right"),
        (r"3\sqrt{2}", r"\sqrt{17}", "expression", 0.0, "wrong"),
        ("True", "yes", "bool", 0.0, "right"),
        ("False", "It is true", "bool", 0.0, "wrong"),
        ("True", "perhaps", "bool", 0.0, "unread"),
        ("(c)", r"\text{(C)}", "option", 0.0, "right"),
        ("(c)", "b", "option", 0.0, "wrong"),
        ("(c)", "nothing", "option", 0.0, "unread"),
        ("red", r"\text{Red}", "words", 0.0, "right"),
        ("red", "red and blue", "words", 0.0, "wrong"),
    ],
)
def test_judgements(
    checker: Checker, gold: str, answer: str | None, shape: str, tolerance: float, expected: str
) -> None:
    assert checker.judge([gold], answer, shape=shape, tolerance=tolerance) == expected


def test_a_list_is_right_where_it_has_the_same_numbers_in_any_order(checker: Checker) -> None:
    def judge(answer: str) -> str:
        return checker.judge(["0", "5"], answer, shape="list", tolerance=0.0)

    assert judge("[0, 5]") == judge("(0; 5.0)") == judge("[5, 0]") == "right"
    assert judge("[5, 1]") == judge("[0, 5, 1]") == judge("0") == "wrong"
    assert checker.judge(["1000", "2"], "2.2, 1010", shape="list", tolerance=0.2) == "right"
    assert checker.judge(["1000", "2"], "2.2, 1010", shape="integers", tolerance=0.2) == "wrong"
    assert judge("nothing") == "unread"


@pytest.mark.parametrize("answer", ["9^{9^{9^9}}", "10^{10^{10^{10}}}!", "(" * 900])
def test_an_answer_that_hangs_the_grader_is_given_up_and_the_next_one_is_judged(answer: str) -> None:
    pytest.importorskip("math_verify")
    with Checker(seconds=2.0) as checker:
        began = time.monotonic()
        assert checker.judge(["1"], answer, shape="expression", tolerance=0.0) in ("given up", "wrong", "unread")
        assert time.monotonic() - began < 2.0 + answers.START
        assert checker.judge(["False"], "no", shape="bool", tolerance=0.0) == "right"


def test_a_worker_that_dies_is_begun_anew(checker: Checker) -> None:
    assert checker.judge(["1"], "1", shape="number", tolerance=0.0) == "right"
    worker = checker._worker
    assert worker is not None
    worker.kill()
    worker.wait()
    assert checker.judge(["1"], "1", shape="number", tolerance=0.0) == "given up"
    assert checker.judge(["1"], "1", shape="number", tolerance=0.0) == "right"


def test_an_answer_runs_no_code_and_the_worker_has_no_environment(checker: Checker, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for text in (f"__import__('os').system('touch {mark}')", f"\\text{{open('{mark}', 'w')}}", "exec('1')"):
        checker.judge(["1"], text, shape="expression", tolerance=0.0)
    assert not mark.exists()
    assert checker._worker is not None
    environment = Path(f"/proc/{checker._worker.pid}/environ")
    if environment.exists():
        assert b"PATH=" not in environment.read_bytes() and "PATH" in os.environ


def test_without_math_verify_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'align-cli\[eval\]'"):
        Checker(seconds=1.0)
