"""A record: one prompt, its responses, and the scalar that the data gives to each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict


class Message(TypedDict):
    """One turn of a dialogue; role is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt with K responses, or with none that are to be learned from.

    Attributes:
        prompt: plain text, or the messages of a dialogue that ends before the response.
        responses: K texts.
        ratings: K finite numbers, larger is better.
        where: `file:line` or `dataset[row]`, for messages to the user.
    """

    prompt: str | tuple[Message, ...]
    responses: tuple[str, ...]
    ratings: tuple[float, ...]
    where: str


class RowError(ValueError):
    """A row that cannot become a record, with the reason."""


Row = Mapping[str, object]
