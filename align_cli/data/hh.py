"""Anthropic/hh-rlhf: two whole dialogues as text, that part at some turn of the assistant.

The prompt is all turns before the first that differs, the responses are that turn of each; what follows it answers
that response and is no part of the comparison. Texts lose the spaces around them, turns of one speaker that follow
each other are joined, and dialogues that do not part are kept as they are: the same response twice.
"""

import re

from align_cli.data.fields import field, preferred, text
from align_cli.data.records import Message, Record, Row, RowError

TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):", re.MULTILINE)
ROLES = {"Human": "user", "Assistant": "assistant"}


def record(row: Row, where: str) -> Record:
    """A row: chosen, rejected."""
    chosen = turns(text(field(row, "chosen"), "chosen"), "chosen")
    rejected = turns(text(field(row, "rejected"), "rejected"), "rejected")
    alike = 0
    while alike < min(len(chosen), len(rejected)) and chosen[alike] == rejected[alike]:
        alike += 1
    if alike == len(chosen) == len(rejected):
        alike -= 1
    if alike >= min(len(chosen), len(rejected)):
        raise RowError("one of chosen and rejected is the beginning of the other: there is nothing to compare")
    one, two = chosen[alike], rejected[alike]
    if one["role"] != "assistant" or two["role"] != "assistant":
        raise RowError("chosen and rejected part before a turn of the assistant: no prompt is a prefix of both")
    return preferred(tuple(chosen[:alike]), one["content"], two["content"], where)


def turns(dialogue: str, what: str) -> list[Message]:
    """The turns of a text with "Human:" and "Assistant:" at the beginning of each."""
    pieces = TURN.split(dialogue)
    if len(pieces) < 3 or pieces[0].strip():
        raise RowError(f"{what} does not begin with 'Human:'")
    said: list[Message] = []
    for speaker, words in zip(pieces[1::2], pieces[2::2], strict=True):
        role, content = ROLES[speaker], words.strip()
        if said and said[-1]["role"] == role:
            content = f"{said.pop()['content']}\n\n{content}".strip()
        said.append(Message(role=role, content=content))
    return said
