"""Prompts and responses of given lengths as rows of a file, and what each side made of them as token ids."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmark.lengths import Lengths
from benchmark.shapes import EOS_ID, SPECIAL, text


@dataclass(frozen=True)
class Group:
    """Token ids of a prompt and its responses, which end with the stop token, and a reward for each; best first."""

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    rewards: tuple[float, ...]


def fill(lengths: Lengths, *, vocabulary: int, seed: int) -> list[Group]:
    """Groups of these lengths, of words drawn evenly."""
    rng = np.random.default_rng(seed)
    groups: list[Group] = []
    for prompt, responses in zip(lengths.prompts.tolist(), lengths.responses.tolist(), strict=True):
        written = [rng.integers(len(SPECIAL), vocabulary, size=length - 1) for length in responses]
        rewards = tuple(round(1.0 - place / len(responses), 6) for place in range(len(responses)))
        groups.append(
            Group(
                prompt=rng.integers(len(SPECIAL), vocabulary, size=prompt),
                responses=tuple(np.append(words, EOS_ID) for words in written),
                rewards=rewards,
            )
        )
    return groups


def row(group: Group) -> dict[str, object]:
    """A row in the schema that both sides read: a pair as chosen and rejected, else completions with rewards.

    The stop token is left to each side's own tokenisation.
    """
    prompt = text(group.prompt).lstrip()
    responses = [text(response[:-1]) for response in group.responses]
    if len(responses) == 2:
        return {"prompt": prompt, "chosen": responses[0], "rejected": responses[1]}
    return {"prompt": prompt, "completions": responses, "rewards": list(group.rewards)}


def write_rows(groups: Iterable[Group], path: Path) -> Path:
    """JSON lines."""
    with open(path, "w", encoding="utf-8") as file:
        for group in groups:
            file.write(json.dumps(row(group)) + "\n")
    return path


def placed(groups: Sequence[Group], order: Sequence[int]) -> list[Group]:
    """Rows of a file that a trainer reads in `order`, so that it meets `groups` in theirs: row order[i] is group i."""
    rows: list[Group | None] = [None] * len(groups)
    for place, group in zip(order, groups, strict=True):
        rows[place] = group
    return [group for group in rows if group is not None]


def digest(groups: Iterable[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> str:
    """Of the token ids of prompts and responses, in order."""
    told = hashlib.sha256()
    for prompt, responses in groups:
        told.update(json.dumps([list(map(int, prompt)), [list(map(int, r)) for r in responses]]).encode())
    return told.hexdigest()[:16]


def digest_of(groups: Iterable[Group]) -> str:
    """Of what the groups are, whatever a tokenizer makes of them."""
    return digest((group.prompt.tolist(), [response.tolist() for response in group.responses]) for group in groups)
