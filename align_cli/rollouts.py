"""Sampled responses on disk: `source.keep` writes them, a file for each step, and `source=replay` learns from them.

RUN/rollouts/step_00000003.jsonl begins with a line that says what the samples are, with a digest of all that follows:
a line for each prompt, with its token ids, and the token ids, ratings and log-probabilities of its responses. A file
is there whole or not at all. A step that is drawn again, as after a kill, gives the same file again, so that a run
that was resumed has kept each step once.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align_cli.data.store import Group
from align_cli.errors import RunError, UserError
from align_cli.rundir import write_atomic

FOLDER = "rollouts"
_FORMAT = 1
DRAWN = ("samples", "temperature", "max_new_tokens", "missing_eos_penalty")
"""Options of a source that decide what its samples are."""


@dataclass(frozen=True)
class Kept:
    """The rollouts of a run.

    Attributes:
        run: its folder.
        origin: what decides how its samples are to be read: `tokenizer`, its digest; `source`, the options `DRAWN`;
            `scorer`, who rated them; `baselines`, how many responses of the starting model its rewards are against.
    """

    run: Path
    origin: Mapping[str, Any]

    def file(self, number: int) -> Path:
        """Of a step."""
        return self.run / FOLDER / f"step_{number:08d}.jsonl"

    def write(self, number: int, prompts: Sequence[Group], groups: Sequence[Group]) -> None:
        """Keep what was drawn in a step, in the place of what is there.

        Args:
            prompts: of the step.
            groups: those of them that have responses with ratings.

        Raises:
            RunError: it cannot be written.
        """
        body = "".join(json.dumps(_line(group), allow_nan=False) + "\n" for group in groups)
        head = {"format": _FORMAT, "step": number, "sha256": _digest(body), "prompts": digest_of_prompts(prompts)}
        columns = sorted({name for group in groups for name in group.given})
        told = json.dumps({**head, "columns": columns, **self.origin})
        try:
            self.file(number).parent.mkdir(exist_ok=True)
            write_atomic(self.file(number), f"{told}\n{body}")
        except OSError as error:
            raise RunError(
                f"the responses of step {number} cannot be kept in {self.file(number).parent}: {error.strerror}; "
                "source.keep=false goes on without."
            ) from error

    def steps(self) -> int:
        """So many steps are there, from the first on."""
        number = 0
        while self.file(number + 1).is_file():
            number += 1
        return number

    def check(self, number: int, prompts: Sequence[Group], wanted: Sequence[str]) -> None:
        """Refuse a step that was not drawn as this run would have drawn it.

        Args:
            prompts: of this run's step.
            wanted: columns that must have been kept beside the responses.

        Raises:
            UserError: it is damaged, or of another tokenizer, another scorer, other options or other prompts.
        """
        head, _ = self._open(number)
        if head["tokenizer"] != self.origin["tokenizer"]:
            raise UserError(
                f"source.path={self.run}: its responses are of another tokenizer than model.path names; their token "
                "ids would mean something else. Use the model that drew them, or one of its family."
            )
        for name, own in self.origin["source"].items():
            if head["source"][name] != own:
                there = head["source"][name]
                raise UserError(
                    f"source.path={self.run}: it was drawn with source.{name}={there}, this run has {own}. "
                    f"Use source.{name}={there}."
                )
        if head["scorer"] != self.origin["scorer"]:
            raise UserError(
                f"source.path={self.run}: its responses were rated by {json.dumps(head['scorer'])}, this run has "
                f"{json.dumps(self.origin['scorer'])}. Use the same scorer."
            )
        missing = [name for name in wanted if name not in head["columns"]]
        if missing:
            raise UserError(
                f"source.path={self.run}: it has not kept '{missing[0]}', which this run asks for. Use a run that "
                "keeps it too, or leave out the part that asks."
            )
        responses = self.origin.get("baselines")
        there = head.get("baselines", responses)
        if "baselines" in wanted and there != responses:
            raise UserError(
                f"source.path={self.run}: its rewards were held against {there} responses of the starting model, this "
                f"run asks for {responses}. Use reward.responses={there}."
            )
        if head["prompts"] != digest_of_prompts(prompts):
            raise UserError(
                f"source.path={self.run}: step {number} has responses to other prompts than this run's step. Use the "
                "same data, train.prompts, train.together and run.seed."
            )

    def read(self, number: int, wanted: Sequence[str]) -> list[Group]:
        """The groups of a step, with the columns `wanted` of those that were kept.

        Raises:
            UserError: the file is damaged.
        """
        _, body = self._open(number)
        return [_group(json.loads(line), wanted) for line in body.splitlines()]

    def _open(self, number: int) -> tuple[dict[str, Any], str]:
        """What a step's file says of itself, and the rest of it."""
        path = self.file(number)
        try:
            first, _, body = path.read_text(encoding="utf-8").partition("\n")
            head = json.loads(first)
            whole = head["format"] == _FORMAT and head["step"] == number and head["sha256"] == _digest(body)
        # cut short, overwritten, or no file of ours
        except (OSError, ValueError, KeyError, TypeError):
            whole, head, body = False, {}, ""
        if not whole:
            raise UserError(
                f"{path} is damaged, or not what source.keep writes. Use an undamaged copy, or make the run once more "
                "with source.keep=true."
            )
        return head, body


def digest_of_prompts(groups: Sequence[Group]) -> str:
    """Of their token ids, in order."""
    return _digest(json.dumps([group.prompt.tolist() for group in groups]))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _line(group: Group) -> dict[str, Any]:
    assert group.behavior is not None, "what was sampled has its log-probabilities"
    return {
        "index": group.index,
        "where": group.where,
        "prompt": group.prompt.tolist(),
        "responses": [response.tolist() for response in group.responses],
        "ratings": group.ratings.tolist(),
        "behavior": [logs.tolist() for logs in group.behavior],
        "given": {name: column.tolist() for name, column in group.given.items()},
    }


def _group(line: Mapping[str, Any], wanted: Sequence[str]) -> Group:
    return Group(
        index=line["index"],
        prompt=np.array(line["prompt"], dtype=np.int32),
        responses=tuple(np.array(each, dtype=np.int32) for each in line["responses"]),
        ratings=np.array(line["ratings"], dtype=np.float32),
        where=line["where"],
        behavior=tuple(np.array(each, dtype=np.float64) for each in line["behavior"]),
        given={name: np.array(line["given"][name], dtype=np.float32) for name in wanted},
    )
