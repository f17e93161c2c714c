"""One pass over the rows of a dataset, that puts its groups on a shelf and accounts for every row.

rows -> Record -> choose -> tokenise -> Shelf
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from align_cli import config
from align_cli.data import schemas
from align_cli.data.choose import choose
from align_cli.data.options import Data
from align_cli.data.records import Record, Row, RowError
from align_cli.data.rows import Rows
from align_cli.data.shelf import KEY, Item, Shelf
from align_cli.data.tokens import Template, Tokenised
from align_cli.errors import UserError

Say = Callable[[str], None]
Convert = Callable[[Row, str], Record]
Mask = NDArray[np.bool_]

CHUNK = 256  # records tokenised at a time
REASONS = 3  # malformed rows that are quoted in the report


class Build:
    """One pass over the rows."""

    def __init__(
        self,
        data: Data,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        say: Say,
        pairwise: bool,
        strict: bool,
        sampled: int | None,
    ) -> None:
        self.data, self.seed, self.say, self.sampled = data, seed, say, sampled
        self.pairwise, self.strict = pairwise, strict or pairwise
        self.template = Template(tokenizer, template=data.template, system=data.system)
        self.counts: Counter[str] = Counter()
        self.reasons: list[str] = []
        self.found: Counter[str] = Counter()
        self.shortest: int | None = None

    def run(self, folder: Path, source: Rows, held_out: Rows | None) -> None:
        self.say(f"reading {source.name} with the {self.template.name} template")
        with Shelf(folder) as shelf:
            self.read(shelf, source, limit=self.data.limit)
            of_split = shelf.groups
            self.demand(of_split, source)
            if held_out is not None:
                self.read(shelf, held_out, limit=None)
            shelf.finish()
        prompts = shelf.prompts()
        train, aside = self.set_aside(prompts) if held_out is None else self.taken(prompts, of_split)
        shelf.write({"train": train, "held_out": aside}, self.report(train, aside))

    def read(self, shelf: Shelf, source: Rows, *, limit: int | None) -> None:
        """Put the groups of all rows on the shelf."""
        records = self.records(source, limit)
        while chunk := list(islice(records, CHUNK)):
            shelf.add(list(self.items(chunk)))

    def items(self, records: list[Record]) -> Iterator[Item]:
        """The groups of the records that can be written and are not too long."""
        for record, tokenised in zip(records, self.template.tokenise(records), strict=True):
            if isinstance(tokenised, RowError):
                self.refuse(record.where, tokenised)
                continue
            fitting = self.fitted(tokenised, record)
            if fitting is not None:
                yield Item(fitting, record.ratings, record.where, digest_of(record))

    def records(self, source: Rows, limit: int | None) -> Iterator[Record]:
        """The records of the good rows, with the responses that are kept."""
        convert = converter(self.data)
        for where, row in islice(source.rows(), limit):
            self.counts["rows"] += 1
            try:
                if isinstance(row, RowError):
                    raise row
                record = self.detected(row, where) if convert is schemas.record else convert(row, where)
                if not record.responses and self.sampled is None:
                    raise RowError("a prompt alone, and no response to learn from; source=rollout samples responses")
            except RowError as error:
                asked = None if self.sampled is None or isinstance(row, RowError) else schemas.asked(row, where)
                if asked is None:
                    self.refuse(where, error)
                    continue
                record = asked
            kept = self.chosen(record)
            if kept is not None:
                yield kept

    def detected(self, row: Row, where: str) -> Record:
        """The record of a row whose schema is detected, which is counted and at the first one said aloud."""
        schema = schemas.detect(row)
        record = schemas.SCHEMAS[schema].record(row, where)
        if schema not in self.found:
            self.say(f"rows have the schema {schema}: {schemas.SCHEMAS[schema].about} (data.format overrides)")
        self.found[schema] += 1
        return record

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
        if self.sampled is not None:
            return replace(record, responses=(), ratings=())
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
        if kept is None or (self.strict and min(len(set(kept.ratings)), len(set(kept.responses))) < 2):
            self.counts["without_preference"] += 1
            return None
        return kept

    def fitted(self, group: Tokenised, record: Record) -> Tokenised | None:
        """The group within the limits of length; None, counted, where it is dropped."""
        data = self.data
        prompt, longest = len(group.prompt), self.sampled or max(map(len, group.responses))
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
                f"no row of {source.name} prefers one response to another, and the algorithm learns from preferences. "
                "Give ratings that differ, or choose an algorithm or a reward that does not compare."
            )
        raise UserError(f"all {counts['rows']} rows of {source.name} are malformed; the first: {self.reasons[0]}.")

    def set_aside(self, prompts: NDArray[np.int32]) -> tuple[Mask, Mask]:
        """Of n groups those to train on, and those of the `held_out` prompts with the smallest digests.

        A prompt's digest knows neither its place nor its neighbours, so a prompt that is held out of a dataset is
        held out of every part of it.

        Args:
            prompts: (n,) the place of each group's prompt among all prompts, in the order of their digests.
        """
        distinct = int(prompts.max()) + 1
        wanted = min(self.data.held_out, distinct // 2)
        if wanted < self.data.held_out:
            self.say(f"{distinct} prompts: {wanted} are held out, not data.held_out={self.data.held_out}")
        return prompts >= wanted, prompts < wanted

    def taken(self, prompts: NDArray[np.int32], start: int) -> tuple[Mask, Mask]:
        """The groups before `start`; of those behind, the ones of `held_out` prompts that are not trained on."""
        known = np.zeros(int(prompts.max()) + 1, dtype=np.bool_)
        known[prompts[:start]] = True
        train = np.arange(len(prompts)) < start
        fresh = ~known[prompts]
        self.counts["held_out_but_trained_on"] += int((~train & ~fresh).sum())
        wanted = np.unique(prompts[fresh])[: self.data.held_out]
        return train, fresh & (prompts <= wanted[-1] if len(wanted) else False)

    def report(self, train: Mask, aside: Mask) -> dict[str, int | str]:
        counts = self.counts
        names = ["rows", "malformed", "too_long", "prompts_truncated", "without_preference", "duplicates"]
        report: dict[str, int | str] = {name: counts[name] for name in names}
        report["held_out_but_trained_on"] = counts["held_out_but_trained_on"]
        report |= {"train": int(train.sum()), "held_out": int(aside.sum()), "template": self.template.name}
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
    """A digest of a record's prompt, of a dialogue of its first question: what it led to is held out with it."""
    asked = record.prompt
    if not isinstance(asked, str):
        asked = next((turn["content"] for turn in asked if turn["role"] == "user"), list(asked))
    return hashlib.sha256(json.dumps(asked).encode()).digest()[:KEY]
