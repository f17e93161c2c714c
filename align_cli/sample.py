"""Samples for a file of prompts, as rows that training reads back.

What is drawn is kept in the journal of responses (`align_cli.responses`) batch by batch, wherever it is interrupted;
the file itself is written once, at the end, under another name, and renamed: it is whole or not there. What it was
made of stands beside it, in `<file>.yaml`, written first. A file that is there is never written again.
"""

import datetime
import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import yaml

from align_cli import __version__, rundir, terminal
from align_cli.config import Tree
from align_cli.data import rows, schemas
from align_cli.data.records import Record, RowError
from align_cli.data.store import Group
from align_cli.data.tokens import Template
from align_cli.errors import RunError, UserError
from align_cli.evals import prompts
from align_cli.files import locked
from align_cli.ranges import Count, NonNegative, NotEmpty
from align_cli.raters import Models, Rater, Unrated
from align_cli.responses import Response
from align_cli.subject import Generate, Subject, find

SUFFIX = ".jsonl"
DESCRIBING = ("batch", "accelerator", "limit")  # options on which no sample depends; of the rows their digest tells


Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Options(Generate):
    """How samples are drawn; the keys are explained in conf/sample.yaml."""

    samples: Count
    temperature: NonNegative
    max_new_tokens: Count
    cut: Literal["drop", "keep"]
    limit: Count | None
    template: Literal["auto", "chat", "text"]
    system: NotEmpty | None


@dataclass(frozen=True)
class Asked:
    """Prompts as records and as what a model reads.

    Attributes:
        groups: the token ids of each prompt, in the order of the records.
        template: how they were written.
    """

    records: list[Record]
    groups: list[Group]
    template: Template

    @property
    def digest(self) -> str:
        """Of the prompts, as text and as tokens."""
        digest = hashlib.blake2b(digest_size=16)
        for record, group in zip(self.records, self.groups, strict=True):
            digest.update(json.dumps(record.prompt).encode() + group.prompt.tobytes())
        return digest.hexdigest()


# --- what is asked


def read(path: Path, limit: int | None) -> list[Record]:
    """The prompts of a file in any schema of data=file; responses beside them are not looked at.

    Raises:
        UserError: there is no such file, or a row has no prompt: which, and why.
    """
    if not path.is_file():
        what = "a folder" if path.is_dir() else f"not there (seen from {Path.cwd()})"
        raise UserError(f"{path} is {what}; give a file of prompts.")
    if not rows.looks_like_file(str(path)):
        raise UserError(f"{path}: a file of another kind; use one of {', '.join(rows.READERS)}.")
    found: list[Record] = []
    for where, row in islice(rows.from_files([path], str(path)).rows(), limit):
        try:
            if isinstance(row, RowError):
                raise row
            found.append(schemas.record(row, where))
        except RowError as error:
            asked = None if isinstance(row, RowError) else schemas.asked(row, where)
            if asked is None:
                raise UserError(f"{where}: {error}") from error
            found.append(asked)
    if not found:
        raise UserError(f'{path} has no rows; write one prompt per line, as {{"prompt": ...}}.')
    return found


def asked_of(subject: Subject, records: list[Record], options: Options) -> Asked:
    """The prompts as the subject reads them.

    Raises:
        UserError: one cannot be written or leaves no room for a response, with its place.
    """
    own = None if subject.config is None else subject.config["data"]
    name, system = options.template, options.system
    if name == "chat" and not subject.tokenizer.chat_template:
        raise UserError(f"template=chat: the tokenizer of {subject.name} has no chat template; use template=text.")
    if own is not None:
        name = own["template"] if name == "auto" else name
        system = own["system"] if system is None else system
    template = Template(subject.tokenizer, template=name, system=system)
    groups: list[Group] = []
    bare = [Record(record.prompt, (), (), record.where) for record in records]
    for index, (record, written) in enumerate(zip(bare, template.tokenise(bare), strict=True)):
        if isinstance(written, RowError):
            raise UserError(f"{record.where}: {written}")
        if subject.positions is not None and len(written.prompt) >= subject.positions:
            raise UserError(
                f"{record.where}: the prompt has {len(written.prompt):,} tokens, and {subject.name} has "
                f"{subject.positions:,} positions; use a shorter prompt."
            )
        groups.append(Group(index, written.prompt, (), np.zeros(0, np.float32), record.where))
    return Asked(records, groups, template)


# --- what is drawn


def drawn(subject: Subject, asked: Asked, options: Options) -> tuple[list[list[Response]], int]:
    """The samples of each prompt, and the longest that one could be."""
    ids = [group.prompt.tolist() for group in asked.groups]
    most = subject.room(ids, options.max_new_tokens)
    if most < options.max_new_tokens:
        terminal.warn(f"max_new_tokens is {most}: beside the longest prompt there is no room for more")
    found = subject.draw(
        ids,
        samples=options.samples,
        temperature=float(options.temperature),  # 1 and 1.0 are the same samples
        max_new_tokens=most,
        stop=[],
        stops=[asked.template.stop],
    )
    return found, most


def texts(subject: Subject, asked: Asked, found: Sequence[Sequence[Response]]) -> list[list[str]]:
    """The samples as texts that, read back behind their prompts, are written as they were drawn."""
    return [
        [
            each.text.removeprefix(asked.template.writer.lead(record))
            for each in subject.texts(group.prompt.tolist(), own)
        ]
        for record, group, own in zip(asked.records, asked.groups, found, strict=True)
    ]


def rewards(rate: Rater, asked: Asked, found: Sequence[Sequence[Response]]) -> list[list[float]]:
    """What a rater gives to the samples of each prompt.

    Raises:
        RunError: one has no rating.
    """
    groups = [prompts.answered(group, own) for group, own in zip(asked.groups, found, strict=True)]
    told: list[list[float]] = []
    for each in rate(groups):
        if isinstance(each, Unrated):
            raise RunError(f"{each.why} The samples are kept; the same command goes on with them.")
        told.append([float(str(rating)) for rating in each.ratings])  # no more digits than single precision has
    return told


def ended(found: Sequence[Sequence[Response]], values: Sequence[Sequence[Value]]) -> list[list[Value]]:
    """Of each prompt's samples the values of those that ended by themselves."""
    return [
        [value for each, value in zip(own, those, strict=True) if each.ended]
        for own, those in zip(found, values, strict=True)
    ]


def notes(found: Sequence[Sequence[Response]], completions: Sequence[Sequence[str]], asked: Asked) -> list[str]:
    """Sentences on what a reader of the samples may not expect."""
    said = prompts.tell_cut(found)
    empty = sum(not all(map(str.strip, own)) for own in completions)
    if empty:
        said.append(f"{empty} of {len(completions)} rows have an empty sample; training counts them in data.bad_rows")
    often = Counter(group.prompt.tobytes() for group in asked.groups)
    repeated = sum(count - 1 for count in often.values())
    if repeated:
        said.append(f"{repeated} prompts stand there again; the same prompt has the same samples")
    return said


# --- the file


def lines_of(asked: Asked, completions: Sequence[Sequence[str]], ratings: Sequence[Sequence[float]] | None) -> str:
    """A JSON line for each prompt that has samples: `prompt`, `completions`, and `rewards` where there are ratings."""
    told: list[dict[str, Any]] = [
        {"prompt": record.prompt, "completions": own} for record, own in zip(asked.records, completions, strict=True)
    ]
    if ratings is not None:
        told = [{**row, "rewards": own} for row, own in zip(told, ratings, strict=True)]
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in told if row["completions"])


def made_of(subject: Subject, asked: Asked, options: Options, scorer: Tree | None) -> Tree:
    """All that the file follows from, as far as the user can choose it."""
    section = None if scorer is None else dict(scorer)
    if section is not None:
        described = prompts.scorer_in(section)
        if isinstance(described, Models):
            section["weights"] = [find(path, options).digest for path in described.paths]
    chosen = {name: value for name, value in asdict(options).items() if name not in DESCRIBING}
    found = {"temperature": float(options.temperature), "template": asked.template.name}
    return {**chosen, **found, "scorer": section, "weights": subject.digest, "prompts": asked.digest}


def beside(out: Path) -> Path:
    """The file that tells what the samples were made of."""
    return out.with_name(f"{out.name}.yaml")


def refuse_unwritable(out: Path) -> None:
    """Refuse a place where the file cannot be written, before anything is drawn.

    Raises:
        UserError: and why.
    """
    if out.suffix != SUFFIX:
        raise UserError(f"{out}: use a name that ends with {SUFFIX}, by which training knows the kind.")
    if out.is_dir():
        raise UserError(f"{out} is a folder; give a file.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out.parent} cannot be made: {error.strerror}; use another folder.") from error
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise UserError(f"{out.parent} cannot be written; use another folder.")


def is_there(out: Path, wanted: Tree) -> bool:
    """Whether the file is there already, of just these samples.

    Raises:
        UserError: it is there, and is of others, or has been changed.
    """
    if not out.exists():
        return False
    try:
        told = yaml.safe_load(beside(out).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        told = None
    if not isinstance(told, Mapping) or not isinstance(told.get("made_of"), Mapping):
        raise UserError(f"{out} is there, and nothing beside it tells of what samples; use another file.")
    differing = rundir.differences(told["made_of"], wanted)
    if differing:
        raise UserError(f"{out} holds other samples ({'; '.join(differing)}); use another file.")
    if told.get("digest") != digest_of(out.read_bytes()):
        raise UserError(f"{out} has been changed since it was written; use another file.")
    return True


def write(out: Path, text: str, wanted: Tree, told: Mapping[str, Any]) -> None:
    """Write the file, whole, unless another process has written the very same meanwhile.

    Raises:
        UserError: another process has written other samples.
        RunError: the disk does not take it.
    """
    described = {"made_of": wanted, "digest": digest_of(text.encode()), "align": __version__, **told}
    described["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    try:
        with _alone_in(out.parent):
            if is_there(out, wanted):
                return
            rundir.write_atomic(beside(out), yaml.safe_dump(described, sort_keys=False, allow_unicode=True))
            rundir.write_atomic(out, text)
    except OSError as error:
        raise RunError(
            f"{out} cannot be written: {error.strerror}; the samples are kept, and the same command writes them."
        ) from error


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Within the block no other process writes samples into the folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        locked(descriptor, fcntl.LOCK_EX)  # released when the descriptor is closed
        yield
    finally:
        os.close(descriptor)


def digest_of(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


# --- all of it


def sample(subject: Subject, source: Path, out: Path, options: Options, scorer: Tree | None) -> list[str]:
    """Have the samples of a file's prompts in another file; returns notes on them.

    Raises:
        UserError: what is wrong with what was given.
        RunError: a sample cannot be rated, or the file cannot be written.
    """
    refuse_unwritable(out)
    subject.refuse_reward_model()
    asked = asked_of(subject, read(source, options.limit), options)
    wanted = made_of(subject, asked, options, scorer)
    if is_there(out, wanted):
        return [f"{out} is there already"]
    rate: Callable[..., Any] | None = None if scorer is None else prompts.rater(subject, scorer)
    found, most = drawn(subject, asked, options)
    completions = texts(subject, asked, found)
    ratings = None if rate is None else rewards(rate, asked, found)
    said = notes(found, completions, asked)
    if options.cut == "drop":
        completions = ended(found, completions)
        ratings = None if ratings is None else ended(found, ratings)
        without = sum(not own for own in completions)
        if without == len(completions):
            raise UserError(f"no response ended within max_new_tokens={most}; raise it, or keep them: cut=keep.")
        if not all(each.ended for own in found for each in own):
            said.append(f"those are left out, and {without} prompts that have no others; cut=keep keeps them")
    told = {"model": subject.name, "prompts": str(source), "numerics": subject.numerics, "longest": most}
    write(out, lines_of(asked, completions, ratings), wanted, told)
    return [f"{len(found):,} prompts, {options.samples} samples of each in {out}", *said]
