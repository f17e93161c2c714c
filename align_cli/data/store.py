"""Prompt groups as token ids, on disk and memory-mapped, made once and found again by content.

    rows -> Record -> choose -> tokenise -> Store

`prepare` streams: memory does not grow with the tokens. It writes one folder, named by a digest of everything that
decides its content (the rows, the options, the tokenizer, this package's data code), and commits it by rename, so
that a folder that is there is whole. Ranks open a `Store` by its path alone.

A folder holds tokens.npy (int32: of each group the prompt, then its responses), lengths.npy (int32: of each group
the prompt's length, then its responses'), ratings.npy (float32), where.npy (the labels of the rows, UTF-8), and
index.npy (int64, a line per group and one past the end: where its tokens, lengths, ratings and label begin). The
training and the held-out prompts are two lists of groups in it, train/ and held_out/.
"""

import hashlib
import inspect
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray
from transformers import PreTrainedTokenizerBase

from align_cli import config
from align_cli.data import schemas
from align_cli.data.choose import choose
from align_cli.data.options import Data
from align_cli.data.records import Record, Row, RowError
from align_cli.data.rows import Rows, has_splits, open_rows
from align_cli.data.tokens import Template, Tokenised, identity
from align_cli.errors import UserError

Say = Callable[[str], None]
Convert = Callable[[Row, str], Record]

CHUNK = 256  # records tokenised at a time
REASONS = 3  # malformed rows that are quoted in the report
HEADER = 128  # bytes kept free for a .npy header, whose length depends on the number of elements


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt and its K responses, as token ids.

    Attributes:
        index: the place in the store.
        prompt: (P,) int32.
        responses: K arrays (T_k,) int32, the stop token last.
        ratings: (K,) float32, larger is better.
        where: the row it came from.
    """

    index: int
    prompt: NDArray[np.int32]
    responses: tuple[NDArray[np.int32], ...]
    ratings: NDArray[np.float32]
    where: str


class Store:
    """The groups under a path, memory-mapped.

    Attributes:
        responses: (n,) K of each group.
        prompt_tokens: (n,) tokens of each prompt.
        response_tokens: (n,) tokens of all responses of each group.
        longest: (n,) tokens of each prompt and its longest response together.
        digest: of tokens, ratings and order.
        report: what became of the rows; the same for both stores of a dataset.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.chosen: NDArray[np.int64] = np.load(path / "groups.npy")
        told = json.loads((path / "store.json").read_text())
        self.digest: str = told["digest"]
        self.report: dict[str, int | str] = told["report"]
        folder = path.parent
        self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self.lengths: NDArray[np.int32] = np.load(folder / "lengths.npy")
        self.ratings = np.load(folder / "ratings.npy", mmap_mode="r")
        self.labels = np.load(folder / "where.npy", mmap_mode="r")
        self.index: NDArray[np.int64] = np.load(folder / "index.npy").reshape(-1, 4)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Group:
        if not 0 <= index < len(self):
            raise IndexError(f"group {index} of a store of {len(self)}")
        row = self.chosen[index]
        (token, length, rating, label), (_, next_length, next_rating, next_label) = self.index[row : row + 2]
        cuts = token + np.concatenate([[0], np.cumsum(self.lengths[length:next_length], dtype=np.int64)])
        prompt, *responses = (np.asarray(self.tokens[a:b]) for a, b in pairwise(cuts))
        return Group(
            index=index,
            prompt=prompt,
            responses=tuple(responses),
            ratings=np.asarray(self.ratings[rating:next_rating]),
            where=bytes(self.labels[label:next_label]).decode(),
        )

    def __iter__(self) -> Iterator[Group]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def responses(self) -> NDArray[np.int64]:
        return np.diff(self.index[:, 2])[self.chosen]

    @cached_property
    def prompt_tokens(self) -> NDArray[np.int64]:
        return self.lengths[self.index[self.chosen, 1]].astype(np.int64)

    @cached_property
    def response_tokens(self) -> NDArray[np.int64]:
        return np.diff(self.index[:, 0])[self.chosen] - self.prompt_tokens

    @cached_property
    def longest(self) -> NDArray[np.int64]:
        starts = self.index[:-1, 1]
        responses = self.lengths.astype(np.int64)
        responses[starts] = 0
        return self.prompt_tokens + np.maximum.reduceat(responses, starts)[self.chosen]


class Growing:
    """A .npy file of one dimension that is written without knowing its length."""

    def __init__(self, path: Path, kind: DTypeLike) -> None:
        self.file = path.open("wb")
        self.kind = np.dtype(kind).newbyteorder("<")
        self.size = 0
        self.file.write(bytes(HEADER))

    def extend(self, values: NDArray[np.generic]) -> None:
        self.file.write(values.astype(self.kind, copy=False).tobytes())
        self.size += values.size

    def finish(self) -> None:
        """Write the header."""
        shape = {"descr": np.lib.format.dtype_to_descr(self.kind), "fortran_order": False, "shape": (self.size,)}
        text = repr(shape).ljust(HEADER - 11) + "\n"
        header = io.BytesIO()
        header.write(b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + text.encode("latin1"))
        assert header.tell() == HEADER
        self.file.seek(0)
        self.file.write(header.getvalue())
        self.file.flush()
        os.fsync(self.file.fileno())


class Shelf:
    """The folder of both stores while it is being written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokens = Growing(folder / "tokens.npy", np.int32)
        self.lengths = Growing(folder / "lengths.npy", np.int32)
        self.ratings = Growing(folder / "ratings.npy", np.float32)
        self.where = Growing(folder / "where.npy", np.uint8)
        self.index = Growing(folder / "index.npy", np.int64)
        self.parts = (self.tokens, self.lengths, self.ratings, self.where, self.index)
        self.digests: list[bytes] = []  # of each group
        self.prompts: list[bytes] = []  # a digest of each group's prompt

    def add(self, group: Tokenised, record: Record, prompt: bytes) -> None:
        self.mark()
        segments = [np.array(ids, dtype=np.int32) for ids in (group.prompt, *group.responses)]
        ratings = np.array(record.ratings, dtype=np.float32)
        lengths = np.array([segment.size for segment in segments], dtype=np.int32)
        tokens = np.concatenate(segments)
        self.tokens.extend(tokens)
        self.lengths.extend(lengths)
        self.ratings.extend(ratings)
        self.where.extend(np.frombuffer(record.where.encode(), dtype=np.uint8))
        self.digests.append(hashlib.sha256(lengths.tobytes() + tokens.tobytes() + ratings.tobytes()).digest())
        self.prompts.append(prompt)

    def mark(self) -> None:
        sizes = [part.size for part in self.parts[:-1]]
        self.index.extend(np.array(sizes, dtype=np.int64))

    def finish(self) -> None:
        """Complete the files."""
        self.mark()
        for part in self.parts:
            part.finish()

    def __enter__(self) -> "Shelf":
        return self

    def __exit__(self, *_: object) -> None:
        for part in self.parts:
            part.file.close()

    def write(self, name: str, groups: list[int], report: dict[str, int | str]) -> None:
        """Write one of the two stores."""
        folder = self.folder / name
        folder.mkdir()
        digest = hashlib.sha256(b"".join(self.digests[group] for group in groups)).hexdigest()
        np.save(folder / "groups.npy", np.array(groups, dtype=np.int64))
        (folder / "store.json").write_text(json.dumps({"digest": digest, "report": report}, indent=1))


def prepare(
    data: Data, tokenizer: PreTrainedTokenizerBase, *, seed: int, cache: Path, say: Say, pairwise: bool
) -> tuple[Store, Store]:
    """The training and the held-out groups of a dataset; the latter may be empty.

    Args:
        seed: of the random choice of responses.
        cache: where prepared datasets are kept.
        say: is told, in one line each, what is found and done.
        pairwise: the algorithm compares two responses: prompts without a strict preference are dropped.

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
        held_out = open_rows(data.path, revision=data.revision, subset=data.subset, split=data.held_out_split)
    sources = [source.identity, held_out.identity if held_out else ""]
    told = {**asdict(data), "expected": None}
    decides = json.dumps([sources, told, identity(tokenizer), seed, pairwise, code(converter(data))], sort_keys=True)
    folder = cache / hashlib.sha256(decides.encode()).hexdigest()[:32]
    if not (folder / "train").is_dir():
        build(folder, Build(data, tokenizer, seed=seed, say=say, pairwise=pairwise), source, held_out)
    train = Store(folder / "train")
    say(summary(train.report))
    return train, Store(folder / "held_out")


def code(convert: Convert) -> str:
    """A digest of the code that makes a store, which may be a plugin's."""
    digest = hashlib.sha256()
    for path in [*sorted(Path(__file__).parent.glob("*.py")), Path(inspect.getfile(convert))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def build(folder: Path, work: "Build", source: Rows, held_out: Rows | None) -> None:
    """Write `folder`, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        work.run(partial, source, held_out)
        if not folder.is_dir():  # another process may have made the same one
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Build:
    """One pass over the rows."""

    def __init__(self, data: Data, tokenizer: PreTrainedTokenizerBase, *, seed: int, say: Say, pairwise: bool) -> None:
        self.data, self.seed, self.say, self.pairwise = data, seed, say, pairwise
        self.template = Template(tokenizer, template=data.template, system=data.system)
        self.counts: Counter[str] = Counter()
        self.reasons: list[str] = []
        self.found: Counter[str] = Counter()
        self.shortest: int | None = None

    def run(self, folder: Path, source: Rows, held_out: Rows | None) -> None:
        self.say(f"reading {source.name} with the {self.template.name} template")
        with Shelf(folder) as shelf:
            self.read(shelf, source, limit=self.data.limit)
            of_split = len(shelf.prompts)
            self.demand(of_split, source)
            if held_out is None:
                train, aside = self.set_aside(shelf)
            else:
                self.read(shelf, held_out, limit=None)
                train, aside = list(range(of_split)), self.taken(shelf, of_split)
            shelf.finish()
        report = self.report(train, aside)
        shelf.write("train", train, report)
        shelf.write("held_out", aside, report)

    def read(self, shelf: Shelf, source: Rows, *, limit: int | None) -> None:
        """Put the groups of all rows on the shelf."""
        records = self.records(source, limit)
        while chunk := list(islice(records, CHUNK)):
            for record, tokenised in zip(chunk, self.template.tokenise(chunk), strict=True):
                if isinstance(tokenised, RowError):
                    self.refuse(record.where, tokenised)
                    continue
                fitting = self.fitted(tokenised, record)
                if fitting is not None:
                    shelf.add(fitting, record, digest_of(record))

    def records(self, source: Rows, limit: int | None) -> Iterator[Record]:
        """The records of the good rows, with the responses that are kept."""
        convert = converter(self.data)
        for where, row in islice(source.rows(), limit):
            self.counts["rows"] += 1
            try:
                if isinstance(row, RowError):
                    raise row
                record = convert(row, where)
                self.note(convert, row)
            except RowError as error:
                self.refuse(where, error)
                continue
            kept = self.chosen(record)
            if kept is not None:
                yield kept

    def note(self, convert: Convert, row: Row) -> None:
        """Count the schema of a row where it is detected, and say it aloud at the first."""
        if convert is not schemas.record:
            return
        schema = schemas.detect(row)
        if schema not in self.found:
            self.say(f"rows have the schema {schema}: {schemas.SCHEMAS[schema].about} (data.format overrides)")
        self.found[schema] += 1

    def refuse(self, where: str, error: RowError) -> None:
        """Count a malformed row. Raises UserError beyond `data.bad_rows`."""
        self.counts["malformed"] += 1
        reason = f"{where}: {error}"
        if len(self.reasons) < REASONS:
            self.reasons.append(reason)
        if self.counts["malformed"] > self.data.bad_rows:
            before = self.counts["malformed"] - 1
            raise UserError(
                f"{reason}. data.bad_rows={self.data.bad_rows} malformed rows may be skipped"
                f"{f', {before} were' if before else ''}; mend the row or raise data.bad_rows."
            )

    def chosen(self, record: Record) -> Record | None:
        """The record with the responses that are kept; None, counted, without a preference."""
        if len(set(record.responses)) < len(record.responses):
            self.counts["duplicates"] += 1
        data = self.data
        if self.pairwise and data.pairs is None and len(record.ratings) > 2 and (data.responses or 3) > 2:
            raise UserError(
                f"{record.where}: {len(record.ratings)} responses for an algorithm that compares two. "
                "Set data.pairs to best_random, best_worst or all."
            )
        pairs = data.pairs if self.pairwise else None
        kept = choose(record, responses=data.responses, keep=data.keep, pairs=pairs, seed=self.seed)
        if kept is None or (self.pairwise and len(set(kept.ratings)) < 2):
            self.counts["without_preference"] += 1
            return None
        return kept

    def fitted(self, group: Tokenised, record: Record) -> Tokenised | None:
        """The group within the limits of length; None, counted, where it is dropped."""
        data = self.data
        prompt, longest = len(group.prompt), max(map(len, group.responses))
        self.shortest = min(prompt + longest, self.shortest or prompt + longest)
        most = data.max_length - longest
        if data.max_prompt_length is not None:
            most = min(most, data.max_prompt_length)
        if prompt <= most:
            return group
        if data.truncation == "error":
            raise UserError(
                f"{record.where}: a prompt of {prompt} tokens and a response of {longest}, with "
                f"data.max_length={data.max_length}, data.max_prompt_length={data.max_prompt_length} and "
                "data.truncation=error. Raise the limit, or set data.truncation to drop or truncate_prompt_left."
            )
        shorter = self.template.shortened(group.prompt, most) if data.truncation == "truncate_prompt_left" else None
        if shorter is None:
            self.counts["too_long"] += 1
            return None
        self.counts["prompts_truncated"] += 1
        return Tokenised(shorter, group.responses)

    def demand(self, groups: int, source: Rows) -> None:
        """Raises UserError where there is nothing to train on."""
        if groups:
            return
        counts, data = self.counts, self.data
        if not counts["rows"]:
            raise UserError(f"{source.name} holds no rows: nothing to train on (data.path, data.split).")
        if counts["too_long"]:
            raise UserError(
                f"all rows of {source.name} are too long: the shortest has {self.shortest} tokens, "
                f"data.max_length={data.max_length}, data.max_prompt_length={data.max_prompt_length}. Raise the limit."
            )
        if counts["without_preference"]:
            raise UserError(
                f"no row of {source.name} prefers one response to another, and the algorithm compares two. "
                "Give ratings that differ, or choose an algorithm that does not compare."
            )
        raise UserError(f"all {counts['rows']} rows of {source.name} are malformed; the first: {self.reasons[0]}.")

    def set_aside(self, shelf: Shelf) -> tuple[list[int], list[int]]:
        """The groups to train on, and those of the `held_out` prompts with the smallest digests.

        A prompt's digest knows neither its place nor its neighbours, so a prompt that is held out of a dataset is
        held out of every part of it.
        """
        prompts = sorted(set(shelf.prompts))
        wanted = min(self.data.held_out, len(prompts) // 2)
        if wanted < self.data.held_out:
            self.say(f"{len(prompts)} prompts: {wanted} are held out, not data.held_out={self.data.held_out}")
        aside = set(prompts[:wanted])
        train = [group for group, prompt in enumerate(shelf.prompts) if prompt not in aside]
        return train, [group for group, prompt in enumerate(shelf.prompts) if prompt in aside]

    def taken(self, shelf: Shelf, start: int) -> list[int]:
        """Of the groups from `start` on, those of `held_out` prompts that are not trained on."""
        trained = set(shelf.prompts[:start])
        fresh = [group for group in range(start, len(shelf.prompts)) if shelf.prompts[group] not in trained]
        self.counts["held_out_but_trained_on"] += len(shelf.prompts) - start - len(fresh)
        wanted = set(sorted({shelf.prompts[group] for group in fresh})[: self.data.held_out])
        return [group for group in fresh if shelf.prompts[group] in wanted]

    def report(self, train: list[int], aside: list[int]) -> dict[str, int | str]:
        counts = self.counts
        names = ["rows", "malformed", "too_long", "prompts_truncated", "without_preference", "duplicates"]
        report: dict[str, int | str] = {name: counts[name] for name in names}
        report["held_out_but_trained_on"] = counts["held_out_but_trained_on"]
        report |= {"train": len(train), "held_out": len(aside), "template": self.template.name}
        own = self.data.name if self.data.format == "auto" else self.data.format
        report["schema"] = ", ".join(f"{name} ({rows})" for name, rows in self.found.items()) or own
        report["reasons"] = "; ".join(self.reasons)
        return report


def converter(data: Data) -> Callable[[Row, str], Record]:
    """The function that turns this dataset's rows into records."""
    if data.format != "auto":
        return schemas.SCHEMAS[data.format].record
    return config.find("align_cli.data", data.name, "data", function="record")


def digest_of(record: Record) -> bytes:
    """A digest of a record's prompt."""
    prompt = record.prompt if isinstance(record.prompt, str) else list(record.prompt)
    return hashlib.sha256(json.dumps(prompt).encode()).digest()[:16]


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
