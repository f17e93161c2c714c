"""What was paid for once, on disk: an append-only file of JSON lines, each found by a name.

A line is `{"name": ..., "check": ..., "value": {...}}`; `check` is a digest of name and value. Lines are never changed
or removed. A line that a kill cut off is ignored, and what is appended next begins on a line of its own. Several
processes may append at once, each line under a lock. Where two lines have one name, the earlier one holds.
"""

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align_cli import terminal
from align_cli.files import locked

Value = dict[str, Any]


def name_of(content: object) -> str:
    """A name for what JSON can hold: the SHA-256 of its canonical form."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


class Journal:
    """The values of a file, and those that are added; threads may share it.

    Args:
        path: made with its folder at the first addition.
        costs: what is lost with a value that cannot be written, for the warning.
    """

    def __init__(self, path: Path, *, costs: str) -> None:
        self.path = path
        self.costs = costs
        self._values: dict[str, Value] = {}
        self._read = 0  # bytes of the file that are known
        self._lock = threading.Lock()
        self._warned = False
        self.refresh()

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __getitem__(self, name: str) -> Value:
        return self._values[name]

    def __len__(self) -> int:
        return len(self._values)

    def refresh(self) -> None:
        """Take in what other processes have appended."""
        with self._lock:
            try:
                with open(self.path, "rb") as file:
                    file.seek(self._read)
                    data = file.read()
            except FileNotFoundError:
                return
            except OSError as error:
                self._warn("read", error)
                return
            whole, end, _ = data.rpartition(b"\n")  # what follows the last end of line may still be growing
            self._read += len(whole) + len(end)
            for line in whole.splitlines():
                found = _parsed(line)
                if found is not None:
                    self._values.setdefault(*found)

    def add(self, name: str, value: Mapping[str, Any]) -> None:
        """Keep a value under a name, durably where the disk takes it and in memory where not."""
        self.extend({name: value})

    def extend(self, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep several values, at the cost of one."""
        with self._lock:
            fresh = {name: dict(value) for name, value in values.items() if name not in self._values}
            if not fresh:
                return
            self._values |= fresh
            try:
                self._append(b"".join(_line(name, value) for name, value in fresh.items()))
            except OSError as error:
                self._warn("written", error)

    def _append(self, lines: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            locked(descriptor, fcntl.LOCK_EX)  # released when the descriptor is closed
            size = os.fstat(descriptor).st_size
            cut = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            left = b"\n" + lines if cut else lines
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _warn(self, done: str, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            terminal.warn(f"{self.path} cannot be {done}: {error.strerror}; {self.costs}")


def _check(name: str, value: Value) -> str:
    return name_of([name, value])[:16]


def _line(name: str, value: Value) -> bytes:
    told = json.dumps({"name": name, "check": _check(name, value), "value": value}, ensure_ascii=True)
    return f"{told}\n".encode()


def _parsed(line: bytes) -> tuple[str, Value] | None:
    """Name and value of a line; None for a line that is cut or damaged."""
    try:
        told = json.loads(line)
        name, check, value = told["name"], told["check"], told["value"]
    except (ValueError, KeyError, TypeError):  # RecursionError is not met: we write flat values alone
        return None
    whole = isinstance(name, str) and isinstance(value, dict) and check == _check(name, value)
    return (name, value) if whole else None
