"""Reading the fields of a row, each with one clear reason where it cannot be read."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from align_cli.data.records import Message, Record, RowError

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}

Prompt = str | tuple[Message, ...]


def field(row: Mapping[str, object], key: str) -> object:
    """The value under a key. Raises RowError where there is none."""
    if key not in row or row[key] is None:
        raise RowError(f"no '{key}': the keys are {', '.join(map(str, row))}")
    return row[key]


def text(value: object, what: str) -> str:
    """A text. Raises RowError for anything else, and for a text that UTF-8 cannot hold."""
    if not isinstance(value, str):
        raise RowError(f"{what} is {kind(value)} where a text should be")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{what} holds half a character (an unpaired surrogate) at {error.start}") from error
    return value


def number(value: object, what: str) -> float:
    """A finite number; true and false are 1 and 0."""
    if value is None:
        raise RowError(f"{what} is missing")
    if not isinstance(value, int | float):
        raise RowError(f"{what} is {kind(value)} where a number should be")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise RowError(f"{what} is {found}: ratings have to be finite")
    return found


def items(value: object, what: str) -> list[object]:
    """A list."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise RowError(f"{what} is {kind(value)} where a list should be")
    return list(value)


def mapping(value: object, what: str) -> Mapping[str, object]:
    """An object."""
    if not isinstance(value, Mapping):
        raise RowError(f"{what} is {kind(value)} where an object should be")
    return value


def kind(value: object) -> str:
    return "missing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def is_dialogue(value: object) -> bool:
    """Whether a value is a list of messages."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        return False
    return len(value) > 0 and all(isinstance(turn, Mapping) for turn in value)


def messages(value: object, what: str) -> tuple[Message, ...]:
    """A dialogue, {role, content} or {from, value} each turn."""
    turns = []
    for index, item in enumerate(items(value, what)):
        turn = mapping(item, f"{what}[{index}]")
        role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
        role = text(field(turn, role_key), f"{what}[{index}].{role_key}")
        if role.lower() not in ROLES:
            raise RowError(f"{what}[{index}] is said by '{role}'; known are {', '.join(ROLES)}")
        content = said(field(turn, content_key), f"{what}[{index}].{content_key}")
        turns.append(Message(role=ROLES[role.lower()], content=content))
    return tuple(turns)


def said(content: object, what: str) -> str:
    """What a turn says: a text, or a list of text parts."""
    if isinstance(content, str):
        return text(content, what)
    parts = [mapping(part, what) for part in items(content, what)]
    if any(part.get("type") != "text" for part in parts):
        raise RowError(f"{what} has parts that are not text")
    return "".join(text(field(part, "text"), what) for part in parts)


def prompt_of(value: object, what: str = "prompt") -> Prompt:
    """A prompt: a text, or a dialogue."""
    return messages(value, what) if is_dialogue(value) or value == [] else text(value, what)


def response_of(value: object, what: str) -> str:
    """A response: a text, or the one message of an assistant."""
    if not is_dialogue(value):
        return text(value, what)
    turns = messages(value, what)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise RowError(f"{what} has {len(turns)} turns where one of the assistant should be")
    return turns[0]["content"]


def one_user(said_by_user: str) -> tuple[Message, ...]:
    """The dialogue that an instruction begins."""
    return (Message(role="user", content=said_by_user),)


def with_system(system: object, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    """A dialogue behind a system message, where there is one."""
    if not isinstance(system, str) or not system.strip():
        return prompt
    return (Message(role="system", content=text(system, "system")), *prompt)


def record_of(prompt: Prompt, responses: Sequence[str], ratings: Sequence[float], where: str) -> Record:
    """A record, checked.

    Raises:
        RowError: an empty prompt or response, a prompt that ends with the assistant, or unequal numbers.
    """
    record = asked_of(prompt, where)
    if not responses:
        raise RowError("there are no responses")
    if len(responses) != len(ratings):
        raise RowError(f"{len(responses)} responses but {len(ratings)} ratings")
    for index, response in enumerate(responses):
        if not response.strip():
            raise RowError(f"response {index} of {len(responses)} is empty")
    return replace(record, responses=tuple(responses), ratings=tuple(ratings))


def asked_of(prompt: Prompt, where: str) -> Record:
    """A record of a prompt alone, checked.

    Raises:
        RowError: the prompt is empty, or ends with the assistant.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise RowError("the prompt is empty")
    else:
        if not any(turn["role"] == "user" and turn["content"].strip() for turn in prompt):
            raise RowError("the prompt is empty: no user says anything")
        if prompt[-1]["role"] != "user":
            raise RowError(f"the prompt ends with a turn of the {prompt[-1]['role']}, not of the user")
    return Record(prompt, (), (), where)


def preferred(prompt: Prompt, chosen: str, rejected: str, where: str) -> Record:
    """A pair: 1 for the chosen response, 0 for the rejected."""
    return record_of(prompt, (chosen, rejected), (1.0, 0.0), where)


def split_dialogues(chosen: object, rejected: object, given: object | None) -> tuple[Prompt, str, str]:
    """Prompt, chosen and rejected response of two whole dialogues that begin alike.

    Args:
        given: a prompt that stands beside them: a text (the last that the user said) or a dialogue.

    Raises:
        RowError: they do not begin alike, or the given prompt is not what they begin with.
    """
    one, two = messages(chosen, "chosen"), messages(rejected, "rejected")
    if len(one) == len(two) == 1 and given is not None:
        return prompt_of(given), response_of(chosen, "chosen"), response_of(rejected, "rejected")
    if not one or not two or one[-1]["role"] != "assistant" or two[-1]["role"] != "assistant":
        raise RowError("chosen and rejected have to end with a turn of the assistant")
    if one[:-1] != two[:-1]:
        raise RowError("chosen and rejected do not share all turns before the last: no prompt is a prefix of both")
    shared = one[:-1]
    if isinstance(given, str):
        asked = [turn["content"] for turn in shared if turn["role"] == "user"]
        if given.strip() not in (said_before.strip() for said_before in asked):
            raise RowError("the prompt is not a prefix of chosen and rejected: no turn of the user says it")
    elif given is not None:
        begins = messages(given, "prompt")
        if shared != begins:
            raise RowError("the prompt is not a prefix of chosen and rejected: they begin with other turns")
    return shared, one[-1]["content"], two[-1]["content"]
