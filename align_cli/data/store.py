"""Prompt groups as token ids, on disk, made once and found again by content.

    rows -> Record -> choose -> tokenise -> Store

`prepare` streams (`align_cli.data.building`): memory does not grow with the tokens. It writes one folder, named by a
digest of everything that decides its content (the rows, the options, the tokenizer, this package's data code), and
commits it by rename, so that a folder that is there is whole. Processes that want the same one wait for the first.
Ranks open a `Store` by its path alone.

A folder holds tokens.npy (int32: of each group the prompt, then its responses), lengths.npy (int32: of each group
the prompt's length, then its responses'), ratings.npy (float32), where.npy (the labels of the rows, UTF-8), and
index.npy (int64, a line per group and one past the end: where its tokens, lengths, ratings and label begin). The
training and the held-out prompts are two lists of groups in it, train/ and held_out/, with what a plan needs of each
group: responses.npy, prompt_tokens.npy, response_tokens.npy, longest.npy and prompts.npy (int32).
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from align_cli import config
from align_cli.data.building import Build, Convert, Say, converter
from align_cli.data.options import Data
from align_cli.data.rows import Rows, has_splits, open_rows
from align_cli.data.shelf import HEADER
from align_cli.data.tokens import identity
from align_cli.errors import UserError
from align_cli.files import fsync_folder, locked
from align_cli.paths import whole

Number = TypeVar("Number", bound=np.generic)

LOOK = 0.2  # seconds between two looks at whether another process is done


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt and its K responses, as token ids.

    Attributes:
        index: the place in the store.
        prompt: (P,) int32.
        responses: K arrays (T_k,) int32, the stop token last.
        ratings: (K,) float32, larger is better.
        where: the row it came from.
        behavior: K arrays (T_k,) float64, the log-probability of each response token under the distribution that it
            was sampled from, nats; None where that is not known.
        given: further columns of the source about this group, by their names.
    """

    index: int
    prompt: NDArray[np.int32]
    responses: tuple[NDArray[np.int32], ...]
    ratings: NDArray[np.float32]
    where: str
    behavior: tuple[NDArray[np.float64], ...] | None = None
    given: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


class Store:
    """The groups under a path. What is held in memory does not grow with their number.

    Attributes:
        responses: (n,) int32 K of each group; this and the other arrays are memory-mapped.
        prompts: (n,) int32 the number of each group's prompt, counted from 0 as they first appear: groups with the
            same prompt ids have the same number.
        prompt_tokens: (n,) int32 tokens of each prompt.
        response_tokens: (n,) int32 tokens of all responses of each group.
        longest: (n,) int32 tokens of each prompt and its longest response together.
        tokens: all token ids of both stores of a dataset.
        largest: the largest of these ids.
        digest: of tokens, ratings and order.
        report: what became of the rows; the same for both stores of a dataset.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        told = json.loads((path / "store.json").read_text())
        self.digest: str = told["digest"]
        self.largest: int = told["largest"]
        self.report: dict[str, int | str] = told["report"]
        self.chosen: NDArray[np.int32] = mapped(path / "groups.npy")
        self.responses: NDArray[np.int32] = mapped(path / "responses.npy")
        self.prompts: NDArray[np.int32] = mapped(path / "prompts.npy")
        self.prompt_tokens: NDArray[np.int32] = mapped(path / "prompt_tokens.npy")
        self.response_tokens: NDArray[np.int32] = mapped(path / "response_tokens.npy")
        self.longest: NDArray[np.int32] = mapped(path / "longest.npy")
        self.tokens: NDArray[np.int32] = mapped(path.parent / "tokens.npy")
        self._index = Read(path.parent / "index.npy", np.int64)
        self._tokens = Read(path.parent / "tokens.npy", np.int32)
        self._lengths = Read(path.parent / "lengths.npy", np.int32)
        self._ratings = Read(path.parent / "ratings.npy", np.float32)
        self._labels = Read(path.parent / "where.npy", np.uint8)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Group:
        if not 0 <= index < len(self):
            raise IndexError(f"group {index} of a store of {len(self)}")
        row = int(self.chosen[index])
        token, length, rating, label, *nexts = self._index[4 * row : 4 * row + 8].tolist()
        next_token, next_length, next_rating, next_label = nexts
        ids = self._tokens[token:next_token]
        cuts = np.cumsum(self._lengths[length:next_length]).tolist()
        prompt, *responses = (ids[a:b] for a, b in pairwise([0, *cuts]))
        return Group(
            index=index,
            prompt=prompt,
            responses=tuple(responses),
            ratings=self._ratings[rating:next_rating],
            where=self._labels[label:next_label].tobytes().decode(),
        )

    def __iter__(self) -> Iterator[Group]:
        return (self[index] for index in range(len(self)))


def mapped(path: Path) -> NDArray[np.int32]:
    """An array on the disk."""
    return np.asarray(np.load(path, mmap_mode="r"))


class Read(Generic[Number]):
    """Pieces of a .npy file that `Growing` wrote.

    They are read, not mapped: pages of a map that were looked at once count as the process's own memory, which would
    grow to the size of the dataset in one epoch.
    """

    def __init__(self, path: Path, kind: type[Number]) -> None:
        self.kind = np.dtype(kind).newbyteorder("<")
        self.file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.file)

    def __getitem__(self, piece: slice) -> NDArray[Number]:
        size = self.kind.itemsize
        found = os.pread(self.file, (piece.stop - piece.start) * size, HEADER + piece.start * size)
        return np.frombuffer(found, dtype=self.kind)


def prepare(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    cache: Path,
    say: Say,
    pairwise: bool,
    strict: bool,
    sampled: int | None,
) -> tuple[Store, Store]:
    """The training and the held-out groups of a dataset; the latter may be empty.

    Args:
        seed: of the random choice of responses.
        cache: where prepared datasets are kept.
        say: is told, in one line each, what is found and done.
        pairwise: the algorithm compares two responses: `data.pairs` says which, and prompts without a strict preference
            are dropped.
        strict: the same prompts are dropped, and no pairs are made.
        sampled: most tokens of the responses that a run samples; then prompts alone are kept, and what the rows say of
            responses drops none. None: the run learns from the rows' own.

    Raises:
        UserError: nothing to train on, more malformed rows than `data.bad_rows`, rows too long under
            `data.truncation=error`, or K > 2 for an algorithm that compares two and no `data.pairs`.
    """
    if data.path is None:
        raise UserError(
            f"data.path is not set: data={data.name} has no rows of its own. Give a file, folder or hub id."
        )
    source = open_rows(data.path, revision=data.revision, subset=data.subset, split=data.split)
    held_out = None
    if data.held_out_split is not None and data.held_out and has_splits(data.path):
        try:
            held_out = open_rows(data.path, revision=data.revision, subset=data.subset, split=data.held_out_split)
        except UserError as error:
            key = "data.held_out_split; null takes data.held_out prompts out of data.split"
            raise UserError(str(error).replace("(data.split)", f"({key})")) from error
    sources = [source.identity, held_out.identity if held_out else ""]
    told = {**asdict(data), "expected": None, "path": whole(data.path)}  # the ranks of a run are given it so
    decides = json.dumps(
        [sources, told, identity(tokenizer), seed, pairwise, strict, sampled, code(converter(data))], sort_keys=True
    )
    folder = cache / hashlib.sha256(decides.encode()).hexdigest()[:32]
    if not (folder / "train").is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with alone(folder.with_suffix(".lock"), lambda: say(f"another process is reading {source.name}: waiting")):
            if not (folder / "train").is_dir():
                work = Build(data, tokenizer, seed=seed, say=say, pairwise=pairwise, strict=strict, sampled=sampled)
                build(folder, work, source, held_out)
    train = Store(folder / "train")
    say(summary(train.report))
    return train, Store(folder / "held_out")


def code(convert: Convert) -> str:
    """A digest of the code that makes a store, which may be a plugin's."""
    digest = hashlib.sha256()
    for path in [*sorted(Path(__file__).parent.glob("*.py")), *config.sources(convert)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def alone(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a file, which is there only meanwhile.

    The kernel releases the lock when its process ends, however it ends: a killed build stops nobody.

    Args:
        waiting: is called once where another process holds it.
    """
    told = False
    while True:
        with path.open("w") as file:
            try:
                locked(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    waiting()
                told = True
                time.sleep(LOOK)
                continue
            if not same(file.fileno(), path):  # its last holder has removed it
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def same(file: int, path: Path) -> bool:
    """Whether an open file is the one that a path names."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def build(folder: Path, work: Build, source: Rows, held_out: Rows | None) -> None:
    """Write `folder`, whole or not at all; the caller holds its lock."""
    for left in folder.parent.glob(f"{folder.name}.*.tmp"):  # by a process that was killed
        shutil.rmtree(left)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    partial.mkdir()
    try:
        work.run(partial, source, held_out)
        fsync_folder(partial)
        partial.rename(folder)
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def summary(report: dict[str, int | str]) -> str:
    """One line on what became of the rows."""
    told = {
        "malformed": "malformed",
        "too_long": "dropped as too long",
        "prompts_truncated": "with a shortened prompt",
        "without_preference": "dropped without a preference",
        "duplicates": "with identical responses",
        "held_out_but_trained_on": "not held out because they are trained on",
    }
    parts = [f"{report[name]} {words}" for name, words in told.items() if report[name]]
    line = f"{report['rows']} rows: {report['train']} to train on, {report['held_out']} held out"
    return ", ".join([line, *parts]) + (f" ({report['reasons']})" if report["reasons"] else "")
