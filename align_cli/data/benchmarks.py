"""Questions of published benchmarks: where their data is, and what a row of each says."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from align_cli.data import rows
from align_cli.data.fields import field, items, kind, number, text
from align_cli.data.records import Row, RowError
from align_cli.errors import UserError, first_line

PATH = "eval.path"
Subsets = str | list[str] | None
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Where a benchmark's data is.

    Attributes:
        path: a local file or folder; None: the hub.
        hub: its id there; None where it is not there.
        revision, subset, split: of the hub, and of a folder that is a copy of it.
        source: where else it can be had, for whoever has neither.
    """

    path: str | None
    hub: str | None
    revision: str | None
    subset: Subsets
    split: str
    source: str

    @property
    def name(self) -> str:
        """For `made`: what the questions are."""
        subset = "" if self.subset is None else f" {','.join(self.subsets)}"
        return self.path if self.path is not None else f"{self.hub}{subset} {self.split} @{self.revision or 'main'}"

    @property
    def subsets(self) -> list[str]:
        return self.subset if isinstance(self.subset, list) else [] if self.subset is None else [self.subset]


@dataclass(frozen=True, slots=True)
class Question:
    """A question with the answer that counts as right.

    Attributes:
        id: names it wherever the same data is.
        asked: the question's text.
        gold: the answer; several where it is a list.
        shape: of the answer: number, expression, or what the benchmark says of it: bool, option, list.
        solution: a worked solution that ends with the answer, for examples; None where the data has none.
    """

    id: str
    asked: str
    gold: tuple[str, ...]
    shape: str
    solution: str | None


@dataclass(frozen=True, slots=True)
class Task:
    """Something to program, with the tests that a right program passes.

    Attributes:
        id: names it wherever the same data is.
        begun: the beginning of a program, which a completion goes on with.
        asked: the task in words, for a chat.
        entry: the name of what has to be defined.
        before: what is run before the program: the imports that the benchmark grants.
        tests: a program that raises where a test does not hold.
    """

    id: str
    begun: str
    asked: str
    entry: str
    before: str
    tests: str


# --- rows


def load(benchmark: Benchmark, *, key: str = PATH) -> tuple[list[rows.Labelled], str]:
    """The rows of a benchmark, in order, and a digest of them.

    Args:
        key: what names its path, for messages; another one than `eval.path` is of a single file of a fixed schema.

    Raises:
        UserError: they are not here and cannot be fetched, with how to get them.
    """
    found = _local(benchmark, key) if benchmark.path is not None else _from_hub(benchmark)
    labelled = [each for part in found for each in part.rows()]
    if not labelled:
        raise UserError(f"{benchmark.name} has no rows.")
    return labelled, "-".join(part.identity[:16] for part in found)


def _local(benchmark: Benchmark, key: str) -> list[rows.Rows]:
    path = str(benchmark.path)
    folder = Path(path).expanduser()
    parts: Sequence[str | None] = [each for each in benchmark.subsets if (folder / each).is_dir()] or [None]
    try:
        if not folder.exists():
            raise UserError(f"{key}={path}: there is no such file or folder (seen from {Path.cwd()}).")
        return [rows.open_rows(path, revision=None, subset=part, split=benchmark.split) for part in parts]
    except UserError as error:
        named = re.sub(r"\bdata\.(split|subset)\b", r"eval.\1", str(error).replace("data.path", key))
        raise UserError(named if key == PATH else named.replace(" (eval.split)", "")) from error


def _from_hub(benchmark: Benchmark) -> list[rows.Rows]:
    """From the hub or its local cache."""
    hub = benchmark.hub
    if hub is None:
        raise UserError(f"its data is not on the hub; use eval.path=FILE with {benchmark.source}.")
    import datasets
    from datasets.exceptions import DatasetsError

    loaded: list[rows.Rows] = []
    try:
        for subset in benchmark.subsets or [None]:
            part = datasets.load_dataset(hub, subset, revision=benchmark.revision, split=benchmark.split)
            assert isinstance(part, datasets.Dataset)
            whole = cast("Sequence[Mapping[str, object]]", part)
            label = hub if subset is None else f"{hub} {subset}"
            fingerprint = rows.digest_of(Path(file["filename"]) for file in part.cache_files)
            loaded.append(rows.Rows(label, fingerprint, _numbered(label, whole)))
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        folder, reason = hub.rpartition("/")[2], first_line(error.__cause__ or error)
        raise UserError(
            f"its data, {benchmark.name}, is not here and could not be fetched ({reason}); where there is "
            f"network, `hf download --repo-type dataset {hub} --local-dir {folder}` gets it, and eval.path={folder} "
            "reads it."
        ) from error
    return loaded


def _numbered(label: str, whole: Sequence[Mapping[str, object]]) -> Callable[[], Iterator[rows.Labelled]]:
    return lambda: rows.numbered(label, whole)


def read(labelled: Sequence[rows.Labelled], reader: Callable[[Row, str], T | None]) -> tuple[list[T], int]:
    """What the rows say, and how many say nothing that can be asked.

    Args:
        reader: of a row and its place; None: the row is left out.

    Raises:
        UserError: a row cannot be read.
    """
    found: list[T] = []
    left_out = 0
    for place, (where, row) in enumerate(labelled):
        try:
            if isinstance(row, RowError):
                raise row
            one = reader(row, str(place))
        except RowError as error:
            raise UserError(f"{where}: {error}; use the schema that eval.rows names.") from error
        if one is None:
            left_out += 1
        else:
            found.append(one)
    return found, left_out


# --- mathematics


def gsm8k(row: Row, place: str) -> Question:
    """question; answer: a worked solution that ends with '#### 72'. arXiv 2110.14168."""
    worked = text(field(row, "answer"), "answer")
    steps, mark, gold = worked.rpartition("####")
    if not mark:
        raise RowError("the answer has no '####' before its result")
    # <<48/2=24>> is a note for a calculator
    solution = f"{re.sub(r'<<[^>]*>>', '', steps)}#### {gold.strip()}"
    return Question(place, text(field(row, "question"), "question"), (gold.strip(),), "number", solution)


def gsm_plus(row: Row, place: str) -> Question | None:
    """question, solution, answer; None is the answer to what cannot be answered. arXiv 2402.19255."""
    gold = text(field(row, "answer"), "answer").strip()
    if gold.lower() == "none":
        return None
    return Question(
        place,
        text(field(row, "question"), "question"),
        (gold,),
        "number",
        f"{text(field(row, 'solution'), 'solution')}\n#### {gold}",
    )


def math(row: Row, place: str) -> Question:
    """problem, solution with the answer in its last box. arXiv 2103.03874."""
    from align_cli.answers import boxed

    solution = text(field(row, "solution"), "solution")
    gold = boxed(solution)
    if gold is None:
        raise RowError("the solution has no \\boxed{...}")
    return Question(place, text(field(row, "problem"), "problem"), (gold,), "expression", solution)


def theoremqa(row: Row, place: str) -> Question:
    """Question, Answer, Answer_type. arXiv 2305.12524."""
    told = field(row, "Answer_type")
    shapes = {
        "integer": "integer",
        "float": "number",
        "bool": "bool",
        "option": "option",
        "list of integer": "integers",
        "list of float": "list",
    }
    if told not in shapes:
        raise RowError(f"Answer_type is {kind(told)}: {', '.join(shapes)} are known")
    gold = str(field(row, "Answer")).strip()
    shape = shapes[str(told)]
    parts = tuple(part.strip() for part in gold.strip("[]()").split(",")) if shape in ("list", "integers") else (gold,)
    return Question(place, text(field(row, "Question"), "Question"), parts, shape, None)


def svamp(row: Row, place: str) -> Question:
    """Body, Question, Answer. arXiv 2103.07191."""
    body = text(field(row, "Body"), "Body").strip()
    asked = text(field(row, "Question"), "Question").strip()
    gold = field(row, "Answer")
    right = f"{number(gold, 'Answer'):.15g}" if isinstance(gold, int | float) else text(gold, "Answer").strip()
    return Question(place, f"{body}{'' if body.endswith(('.', '?', '!')) else '.'} {asked}", (right,), "number", None)


def asdiv(row: Row, place: str) -> Question:
    """body, question, answer as '9 (apples)'. arXiv 2106.15772."""
    asked = f"{text(field(row, 'body'), 'body').strip()} {text(field(row, 'question'), 'question').strip()}"
    gold = text(field(row, "answer"), "answer")
    values = [re.sub(r"\s*\([^()]*\)", "", part).strip() for part in gold.split(";")]
    if len(values) > 1:
        return Question(place, asked, tuple(values), "list", None)
    right = values[0]
    return Question(place, asked, (right,), "number" if re.fullmatch(r"[-\d.,/]+", right) else "words", None)


# --- programs

# what LeetCode's own editor has at hand
LEETCODE_IMPORTS = """import bisect, collections, functools, heapq, itertools, math, operator, random, re, string
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
"""


def humaneval(row: Row, place: str) -> Task:
    """task_id, prompt, entry_point, test: a function `check`. arXiv 2107.03374."""
    begun = text(field(row, "prompt"), "prompt")
    entry = text(field(row, "entry_point"), "entry_point")
    tests = f"{text(field(row, 'test'), 'test')}\ncheck({entry})"
    # the beginning's imports and helpers are at hand, too, where a chat's program leaves them out
    return Task(_named(row, place), begun, f"```python\n{begun}```", entry, _head(begun, entry), tests)


def mbpp(row: Row, place: str) -> Task:
    """task_id, text or prompt, code, test_list, and what the tests need. arXiv 2108.07732."""
    asked = text(row.get("text") or field(row, "prompt"), "text")
    tests = [text(each, "test_list") for each in items(field(row, "test_list"), "test_list")]
    if not tests:
        raise RowError("test_list is empty")
    before = row.get("test_setup_code") or "\n".join(map(str, items(row.get("test_imports") or [], "test_imports")))
    code = text(field(row, "code"), "code")
    called = set(re.findall(r"\w+", " ".join(tests)))
    entry = next((name for name in re.findall(r"def\s+(\w+)", code) if name in called), "")
    if not entry:
        raise RowError("no function of 'code' is tested")
    begun = f'"""\n{asked}\n{tests[0]}\n"""\n'
    return Task(_named(row, place), begun, f"{asked}\n>>> {tests[0]}", entry, str(before), "\n".join(tests))


def leetcode(row: Row, place: str) -> Task:
    """task_id, prompt: a description and a class begun, prompt_sft, test. The file of DeepSeek-Coder and Eurus."""
    begun = text(field(row, "prompt"), "prompt")
    asked = text(row.get("prompt_sft") or begun, "prompt_sft")
    return Task(_named(row, place), begun, asked, "Solution", LEETCODE_IMPORTS, text(field(row, "test"), "test"))


def _named(row: Row, place: str) -> str:
    return str(row.get("task_id") or place)


def _head(begun: str, entry: str) -> str:
    """What stands before the function that is asked for."""
    return re.split(rf"^(?:async )?def {re.escape(entry)}\b", begun, maxsplit=1, flags=re.MULTILINE)[0]
