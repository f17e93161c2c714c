"""Responses on disk, found by what they follow from: nothing is generated twice.

A response follows from the weights, the settings of sampling, the prompt's token ids, and its own number. There is a
journal (`align_cli.journal`) for each of the first two, `<cache>/responses/<weights>/<settings>.jsonl`.
"""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from align_cli.cache import touch
from align_cli.journal import Journal, name_of


@dataclass(frozen=True, slots=True)
class Response:
    """A generated response.

    Attributes:
        tokens: its ids, the stop token among them.
        ended: whether it ended by itself, and not because it was cut.
        logprob: nats under the distribution that it was drawn from; 0 at temperature 0.
    """

    tokens: list[int]
    ended: bool
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What decides a response beside weights and prompt: the arguments of `Subject.draw`, and how it rounds.

    Attributes:
        writing: digest of the files that say which tokens end a response, beside `ends`.
    """

    temperature: float
    max_new_tokens: int
    stop: list[str]
    ends: list[int]
    writing: str
    seed: int
    numerics: str


def digest_of(prompt: Sequence[int]) -> str:
    """A 128-bit name of a prompt, from its token ids."""
    ids = np.asarray(prompt, dtype="<i4")
    return hashlib.blake2b(struct.pack("<q", len(ids)) + ids.tobytes(), digest_size=16).hexdigest()


class Responses:
    """The responses of one model under one way of sampling.

    Args:
        home: the folder of all responses.
        weights: a digest of the model's weights.
        sampling: how they are drawn.
    """

    def __init__(self, home: Path, weights: str, sampling: Sampling) -> None:
        touch(home / weights)
        path = home / weights / f"{name_of(asdict(sampling))[:16]}.jsonl"
        self.journal = Journal(path, costs="responses are kept for this evaluation alone")

    def find(self, prompt: str, number: int) -> Response | None:
        """The response of this number to the prompt of this digest, if there is one."""
        name = _name(prompt, number)
        return Response(**self.journal[name]) if name in self.journal else None

    def add(self, found: Iterable[tuple[str, int, Response]]) -> None:
        """Keep responses: (digest of the prompt, number, response)."""
        self.journal.extend({_name(prompt, number): asdict(response) for prompt, number, response in found})


def _name(prompt: str, number: int) -> str:
    return f"{prompt}-{number}"
