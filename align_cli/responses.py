"""Responses on disk, found by what they follow from: nothing is generated twice.

    <cache>/responses/<weights>/<settings>/<time>-<process>-<random>.jsonl

A response follows from the weights, the prompt's token ids, the settings of sampling, and its number. Each process
that generates appends to a file of its own, a line for each response, and reads the files of all; so several may do
so at once, on any file system. A last line that a kill has cut short is not read.
"""

import datetime
import hashlib
import json
import os
import secrets
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

SETTINGS = "settings.json"


@dataclass(frozen=True, slots=True)
class Response:
    """A generated response.

    Attributes:
        tokens: its ids, the stop token among them.
        ended: whether it ended by itself, and not because it was cut.
        logprob: nats under the distribution that it was drawn from; 0 at temperature 0.
    """

    tokens: tuple[int, ...]
    ended: bool
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What decides a response beside weights and prompt; the attributes are those of `Subject.sample`."""

    temperature: float
    max_new_tokens: int
    stop: tuple[str, ...]
    seed: int
    numerics: str


def name_of(prompt: Sequence[int]) -> str:
    """A 128-bit name of a prompt, from its token ids."""
    ids = np.asarray(prompt, dtype="<i4")
    return hashlib.blake2b(struct.pack("<q", len(ids)) + ids.tobytes(), digest_size=16).hexdigest()


class Responses:
    """The responses of one model under one way of sampling.

    Args:
        home: the folder of all responses.
        weights: a digest of the model's weights.
        sampling: how they are drawn.
        origin: what a reader of the folder wants to know of the model.
    """

    def __init__(self, home: Path, weights: str, sampling: Sampling, *, origin: str) -> None:
        told = json.dumps(asdict(sampling), sort_keys=True)
        self.folder = home / weights / hashlib.blake2b(told.encode(), digest_size=8).hexdigest()
        self.origin = {"model": origin, **asdict(sampling)}
        self.known: dict[tuple[str, int], Response] = {}
        self.file: Path | None = None
        for path in sorted(self.folder.glob("*.jsonl")):
            self._read(path)

    def _read(self, path: Path) -> None:
        # what follows the last line break was cut short, or is empty
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                prompt, number, tokens, ended, logprob = json.loads(line)
                found = Response(tuple(tokens), bool(ended), float(logprob))
            except (ValueError, TypeError):  # a damaged line is a response that is not known
                continue
            self.known.setdefault((prompt, number), found)

    def find(self, prompt: str, number: int) -> Response | None:
        """The response of this number to the prompt of this name, if there is one."""
        return self.known.get((prompt, number))

    def add(self, found: Iterable[tuple[str, int, Response]]) -> None:
        """Keep responses: (name of the prompt, number, response). They are on the disk when this returns."""
        fresh = {(prompt, number): response for prompt, number, response in found}
        self.known |= fresh
        lines = [
            json.dumps([prompt, number, list(each.tokens), each.ended, each.logprob])
            for (prompt, number), each in fresh.items()
        ]
        if self.file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d%H%M%S")
            self.file = self.folder / f"{now}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
            (self.folder / SETTINGS).write_text(json.dumps(self.origin, indent=1) + "\n", encoding="utf-8")
        with open(self.file, "a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def counted(self, names: Mapping[str, int]) -> int:
        """How many of the wanted responses there are.

        Args:
            names: how many of each prompt are wanted.
        """
        return sum((prompt, number) in self.known for prompt, most in names.items() for number in range(most))
