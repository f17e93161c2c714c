"""The folder of a dataset while it is being written, in an amount of memory that does not grow with its tokens.

Everything goes into files that grow. What is known of a group beside its tokens is a few bytes; only where groups are
divided and numbered, at the end, is some of that held at once, 16 bytes a group and the room to sort them.
"""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from align_cli.data.tokens import Ids, Tokenised
from align_cli.files import fsync_folder

HEADER = 128  # bytes kept free for a .npy header, whose length depends on the number of elements
BLOCK = 1 << 16  # groups looked at in one go
KEY = 16  # bytes of a prompt's digest
DIGEST = 32  # bytes of a group's digest


@dataclass(frozen=True, slots=True)
class Item:
    """A group on its way to the shelf.

    Attributes:
        tokens: its prompt and responses.
        ratings: K.
        where: the row it came from.
        key: `KEY` bytes, a digest of its prompt before any truncation.
    """

    tokens: Tokenised
    ratings: Sequence[float]
    where: str
    key: bytes


class Growing:
    """A .npy file of one dimension that is written without knowing its length."""

    def __init__(self, path: Path, kind: DTypeLike) -> None:
        self.path = path
        self.file = path.open("wb")
        self.kind = np.dtype(kind).newbyteorder("<")
        self.size = 0
        self.file.write(bytes(HEADER))

    def extend(self, values: NDArray[np.generic]) -> None:
        self.file.write(values.astype(self.kind, copy=False).tobytes())
        self.size += values.size

    def finish(self, *, kept: bool) -> None:
        """Write the header; what is kept has to reach the disk."""
        shape = {"descr": np.lib.format.dtype_to_descr(self.kind), "fortran_order": False, "shape": (self.size,)}
        text = repr(shape).ljust(HEADER - 11) + "\n"
        header = io.BytesIO()
        header.write(b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + text.encode("latin1"))
        assert header.tell() == HEADER
        self.file.seek(0)
        self.file.write(header.getvalue())
        self.file.flush()
        if kept:
            os.fsync(self.file.fileno())


class Shelf:
    """Both stores of a dataset on their way to the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokens = Growing(folder / "tokens.npy", np.int32)
        self.lengths = Growing(folder / "lengths.npy", np.int32)
        self.ratings = Growing(folder / "ratings.npy", np.float32)
        self.where = Growing(folder / "where.npy", np.uint8)
        self.index = Growing(folder / "index.npy", np.int64)
        # Of each group; `write` gives them to the two stores.
        self.facts = {
            name: Growing(folder / f"{name}.npy", np.int32)
            for name in ("responses", "prompt_tokens", "response_tokens", "longest")
        }
        self.digests = Growing(folder / "digests.npy", np.uint8)
        self.keys = Growing(folder / "keys.npy", np.uint8)  # of each prompt as text
        self.heads = Growing(folder / "heads.npy", np.uint8)  # of each prompt as tokens
        self.passing = (*self.facts.values(), self.digests, self.keys, self.heads)
        self.parts = (self.tokens, self.lengths, self.ratings, self.where, self.index, *self.passing)
        self.groups = 0
        self.largest = 0  # token id

    def add(self, items: Sequence[Item]) -> None:
        """Append groups."""
        if not items:
            return
        segments = [[item.tokens.prompt, *item.tokens.responses] for item in items]
        lengths = np.array([len(ids) for group in segments for ids in group], dtype=np.int32)
        responses = np.array([len(group) - 1 for group in segments], dtype=np.int32)
        starts = before(responses + 1)
        tokens = [np.concatenate(group) for group in segments]
        together = np.concatenate(tokens)
        ratings = [np.array(item.ratings, dtype=np.float32) for item in items]
        labels = [item.where.encode() for item in items]

        totals = np.add.reduceat(lengths, starts)
        prompts = lengths[starts]
        answers = lengths.copy()
        answers[starts] = 0
        facts = (responses, prompts, totals - prompts, prompts + np.maximum.reduceat(answers, starts))
        for part, values in zip(self.facts.values(), facts, strict=True):
            part.extend(values)
        ends = np.array([len(label) for label in labels], dtype=np.int64)
        places = [
            part.size + before(sizes)
            for part, sizes in zip(self.parts[:4], (totals, responses + 1, responses, ends), strict=True)
        ]
        self.index.extend(np.stack(places, axis=1).reshape(-1))
        self.tokens.extend(together)
        self.lengths.extend(lengths)
        self.ratings.extend(np.concatenate(ratings))
        self.where.extend(np.frombuffer(b"".join(labels), dtype=np.uint8))
        self.largest = max(self.largest, int(together.max()))
        self.groups += len(items)

        digests, heads = [], []
        sizes = np.split(lengths, starts[1:])
        for own, ids, rated, group in zip(sizes, tokens, ratings, segments, strict=True):
            digests.append(hashlib.sha256(own.tobytes() + ids.tobytes() + rated.tobytes()).digest())
            heads.append(hashlib.blake2b(group[0].tobytes(), digest_size=KEY).digest())
        for part, found in (
            (self.digests, digests),
            (self.heads, heads),
            (self.keys, [item.key for item in items]),
        ):
            part.extend(np.frombuffer(b"".join(found), dtype=np.uint8))

    def finish(self) -> None:
        """Complete the files."""
        self.index.extend(np.array([part.size for part in self.parts[:4]], dtype=np.int64))
        for part in self.parts:
            part.finish(kept=part not in self.passing)

    def __enter__(self) -> "Shelf":
        return self

    def __exit__(self, *_: object) -> None:
        for part in self.parts:
            part.file.close()

    def prompts(self) -> Ids:
        """(n,) the place of each group's prompt among all prompts, in the order of their digests."""
        return ranked(self.keys.path)

    def write(self, chosen: dict[str, NDArray[np.bool_]], report: dict[str, int | str]) -> None:
        """Write the stores, each of the groups that its (n,) mask chooses, and drop what was only passing."""
        heads = ranked(self.heads.path)
        for name, mask in chosen.items():
            folder = self.folder / name
            folder.mkdir()
            arrays = {"groups": np.flatnonzero(mask).astype(np.int32), "prompts": numbered(heads[mask])}
            arrays |= {fact: np.load(part.path)[mask] for fact, part in self.facts.items()}
            for array, values in arrays.items():
                with durable(folder / f"{array}.npy") as file:
                    np.save(file, values)
            told = {"digest": self.digest(mask), "largest": self.largest, "report": report}
            with durable(folder / "store.json") as file:
                file.write(json.dumps(told, indent=1).encode())
            fsync_folder(folder)
        for part in self.passing:
            part.path.unlink()

    def digest(self, mask: NDArray[np.bool_]) -> str:
        """A digest of the chosen groups, in order."""
        whole = hashlib.sha256()
        with self.digests.path.open("rb") as file:
            file.seek(HEADER)
            for start in range(0, len(mask), BLOCK):
                block = mask[start : start + BLOCK]
                of_groups = np.frombuffer(file.read(len(block) * DIGEST), dtype=np.uint8).reshape(-1, DIGEST)
                whole.update(of_groups[block].tobytes())
        return whole.hexdigest()


@contextlib.contextmanager
def durable(path: Path) -> Iterator[BinaryIO]:
    """A new file, which has reached the disk at the end of the block."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def before(sizes: NDArray[np.integer]) -> NDArray[np.int64]:
    """Where each of several pieces begins that lie one behind the other."""
    return np.cumsum(sizes, dtype=np.int64) - sizes


def ranked(path: Path) -> Ids:
    """(n,) the place of each key of a file among its distinct keys, in their order as bytes."""
    keys = np.fromfile(path, dtype=">u8", offset=HEADER).reshape(-1, 2)
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    new = np.ones(len(order), dtype=np.bool_)
    for start in range(1, len(order), BLOCK):
        end = min(start + BLOCK, len(order))
        new[start:end] = (keys[order[start:end]] != keys[order[start - 1 : end - 1]]).any(axis=1)
    ranks = np.empty(len(order), dtype=np.int32)
    ranks[order] = np.cumsum(new, dtype=np.int32) - 1
    return ranks


def numbered(values: Ids) -> Ids:
    """(n,) the number of each value, which are counted from 0 in the order in which they first appear."""
    if not len(values):
        return values
    places = np.arange(len(values), dtype=np.int32)
    first = np.empty(int(values.max()) + 1, dtype=np.int32)
    first[values[::-1]] = places[::-1]  # of several writes to one place the last one stays
    number = np.cumsum(first[values] == places, dtype=np.int32) - 1
    return number[first[values]]
