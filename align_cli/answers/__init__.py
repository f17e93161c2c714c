"""The answer in a response to a mathematical question, and whether it is the right one.

Whether two expressions are equal is for math-verify to say. It parses what a model wrote, which can take forever or
all memory, and keeps time by signals; so it runs in a process of its own (`worker.py`) that can be killed.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import re
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Self

from align_cli.errors import UserError

Judgement = Literal["right", "wrong", "unread", "given up"]

START = 120.0  # seconds that the worker may take to import what it needs
LONGEST = 1000  # characters of an answer that are looked at; longer ones are no answers
MEMORY_MB = 4096

# what is computed, and no number as it stands: fractions, roots, powers, constants
EXPRESSION = re.compile(r"\\[a-zA-Z]+|\^")
WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boldsymbol|underline|mbox)\s*\{([^{}]*\d[^{}]*)\}")
UNIT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{[^}]*\}(?:\^\{?\d\}?)?|\^?\{?\\(?:circ|degree)\}?|\\[ ,;!%$]")
SCIENTIFIC = re.compile(r"(\d+\.?\d*|\.\d+)[eE]\+?(-?\d+)\b")
NUMBER = re.compile(r"[-−+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?|[-−+]?\.\d+")


# --- finding an answer


def boxed(text: str) -> str | None:
    r"""What is in the last \boxed{...}, braces balanced."""
    for start in (match.end() for match in reversed(list(re.finditer(r"\\f?boxed\s*\{", text)))):
        depth = 1
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[start:place].strip()
    return None


def marked(text: str) -> str | None:
    """What follows the last '####', on its line."""
    _, mark, rest = text.rpartition("####")
    return rest.partition("\n")[0].strip() or None if mark else None


def said(text: str) -> str | None:
    """What follows the last 'answer is' or 'answer:', up to the end of the sentence or line."""
    found = re.findall(r"answer\s*(?:is\s*:?|:)\s*(\S[^\n]*)", text, flags=re.IGNORECASE)
    return re.split(r"\.(?:\s|$)", found[-1].strip("*$ "))[0].strip("*$ ") or None if found else None


def last_number(text: str) -> str | None:
    """The last number."""
    found = NUMBER.findall(text)
    return found[-1] if found else None


RULES: dict[str, Callable[[str], str | None]] = {
    "boxed": boxed,
    "marked": marked,
    "said": said,
    "number": last_number,
}


def extract(response: str, rules: Sequence[str]) -> str | None:
    """The answer that the first of the rules finds, or None."""
    for rule in rules:
        found = RULES[rule](response)
        if found is not None:
            return found
    return None


def plain_number(text: str) -> str | None:
    """The number in an answer, without currency, thousands' commas and units; the last where there are several."""
    found = last_number(text.replace("\\!", "").replace("{,}", ",").replace("\\$", ""))
    return None if found is None else re.sub(r"[,\s]", "", found).replace("−", "-").lstrip("+")


def bare(text: str) -> str:
    r"""An answer without what it is equal to, units and degrees; 1.6e-19 as 1.6 \times 10^{-19}."""
    parts = [part for part in re.split(r"=|\\approx|\\simeq", text.replace("{,}", ",")) if part.strip()]
    last = WRAPPED.sub(r"\1", parts[-1] if parts else "")
    return SCIENTIFIC.sub(r"\1\\times 10^{\2}", UNIT.sub("", last)).strip()


# --- judging it


class Checker:
    """Judges answers, one after another, in a process that is begun anew when one of them hangs it.

    A context manager; the process is begun with the first answer.
    """

    def __init__(self, *, seconds: float) -> None:
        """
        Args:
            seconds: longest time for one answer.

        Raises:
            UserError: math-verify is not installed.
        """
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("math-verify is not installed; run pip install 'align-cli[eval]'.")
        self.seconds = seconds
        self.version = f"math-verify {importlib.metadata.version('math-verify')}"
        self._worker: subprocess.Popen[bytes] | None = None

    def judge(self, gold: Sequence[str], answer: str | None, *, shape: str, tolerance: float) -> Judgement:
        """Whether an answer is right.

        Args:
            gold: the right answer; several where it is a list.
            answer: None: none was found.
            shape: number, integer, expression, bool, option, words, list or integers (`align_cli.data.benchmarks`).
            tolerance: how far a number may be off, relative to the right one; an integer is one when rounded.

        Returns:
            unread: there is no answer of this shape; given up: it took too long, or more memory than it may.
        """
        if answer is None or len(answer) > LONGEST:
            return "unread"
        if shape in ("list", "integers"):
            return self._list(gold, answer, tolerance, shape)
        if shape == "bool":
            return _same(_truth(gold[0]), _truth(answer))
        if shape == "option":
            return _same(_letter(gold[0]), _letter(answer))
        if shape == "words":
            return _same(_words(gold[0]), _words(answer))
        if shape in ("number", "integer"):
            return self._number(gold[0], answer, tolerance, shape)
        return self._ask(gold[0], answer, tolerance)

    def _number(self, gold: str, answer: str, tolerance: float, shape: str) -> Judgement:
        """A number, or what can be computed to one."""
        wanted = bare(gold)
        if shape == "integer":
            tolerance = _half(wanted)
        stripped = bare(answer)
        if EXPRESSION.search(stripped):
            return self._ask(wanted, stripped, tolerance)
        number = plain_number(stripped)
        return "unread" if number is None else self._ask(wanted, number, tolerance)

    def _list(self, gold: Sequence[str], answer: str, tolerance: float, shape: str) -> Judgement:
        """The same numbers, in any order."""
        found = [plain_number(part) for part in re.split(r"[;,]", answer.replace("{,}", ""))]
        numbers = [part for part in found if part is not None]
        if len(numbers) != len(gold):
            return "wrong" if numbers else "unread"
        one = "integer" if shape == "integers" else "number"
        for right, number in zip(_sorted(gold), _sorted(numbers), strict=True):
            judgement = self._number(right, number, tolerance, one)
            if judgement != "right":
                return judgement
        return "right"

    def _ask(self, gold: str, answer: str, tolerance: float) -> Judgement:
        if self._worker is None:
            self._worker = self._begin()
        worker = self._worker
        assert worker.stdin is not None
        try:
            worker.stdin.write(json.dumps({"gold": gold, "answer": answer, "tolerance": tolerance}).encode() + b"\n")
            worker.stdin.flush()
            said = self._line(self.seconds)
        except BrokenPipeError:
            said = None
        known: dict[str, Judgement] = {"right": "right", "wrong": "wrong", "unread": "unread"}
        if said is None or said not in known:
            self.close()
            return "given up"
        return known[said]

    def _begin(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-I", "-B", str(Path(__file__).with_name("worker.py")), str(MEMORY_MB)]
        self._worker = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd=tempfile.gettempdir(),
            start_new_session=True,
        )
        if self._line(START) != "ready":
            self.close()
            raise UserError("math-verify does not start here; `python -c 'import math_verify'` says why.")
        return self._worker

    def _line(self, seconds: float) -> str | None:
        """The worker's next line; None where it does not come in time, or the worker has died."""
        assert self._worker is not None and self._worker.stdout is not None
        stream, text, ends = self._worker.stdout, b"", time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while not text.endswith(b"\n"):
                if not selector.select(max(0.0, ends - time.monotonic())):
                    return None
                found = stream.raw.read(1)  # pyright: ignore[reportAttributeAccessIssue]
                if not found:
                    return None
                text += found
        return text.decode(errors="replace").strip()

    def close(self) -> None:
        """End the process; the next answer begins another."""
        worker, self._worker = self._worker, None
        if worker is None:
            return
        worker.kill()
        worker.wait()
        for stream in (worker.stdin, worker.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # what it was last asked is of no interest any more
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _half(gold: str) -> float:
    """The relative tolerance within which a number becomes this integer when it is rounded."""
    try:
        return 0.5 / abs(float(gold.replace(",", "")))
    except (ValueError, ZeroDivisionError):
        return 0.0


def _sorted(numbers: Sequence[str]) -> list[str]:
    """In ascending order; as they are where one is no plain number."""
    try:
        return sorted(numbers, key=float)
    except ValueError:
        return list(numbers)


def _same(gold: str | None, answer: str | None) -> Judgement:
    if answer is None:
        return "unread"
    return "right" if gold == answer else "wrong"


def _truth(text: str) -> str | None:
    found = re.findall(r"\b(true|yes|false|no)\b", text.lower())
    return None if not found else "true" if found[-1] in ("true", "yes") else "false"


def _letter(text: str) -> str | None:
    """The letter of a choice: (c), c), C., or alone."""
    bare = re.sub(r"\\(?:text|mathrm|textbf)\s*\{([^}]*)\}", r"\1", text).strip()
    found = re.fullmatch(r"\(?\s*([A-Za-z])\s*(?:[).:].*)?", bare, flags=re.DOTALL)
    return found[1].lower() if found else None


def _words(text: str) -> str | None:
    bare = re.sub(r"\\(?:text|mathrm|textbf)\s*\{([^}]*)\}", r"\1", text)
    return " ".join(re.findall(r"\w+", bare.lower())) or None
