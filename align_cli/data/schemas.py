"""The schemas that rows come in: how each is recognised, and how it becomes a record.

A rating is what the data gives: a reward or score as it stands, 1 and 0 for chosen and rejected, for right and wrong
and for an unpaired label, and minus the rank for ranks (rank 1, or 0, being the best). Rows to imitate have the
rating 1. Unpaired rows of one prompt stay records of one response each.
"""

from collections.abc import Callable
from dataclasses import dataclass

from align_cli.data import hh, tldr, ultrafeedback, ultrainteract
from align_cli.data.fields import (
    asked_of,
    field,
    is_dialogue,
    items,
    mapping,
    messages,
    number,
    one_user,
    preferred,
    prompt_of,
    record_of,
    response_of,
    split_dialogues,
    text,
    with_system,
)
from align_cli.data.records import Message, Record, Row, RowError

RESPONSE_KEYS = ("response", "text", "completion", "content", "answer")
REWARD_KEYS = ("reward", "score", "rating", "overall_score", "correct", "is_correct")


@dataclass(frozen=True, slots=True)
class Schema:
    """One way to write a row.

    Attributes:
        about: the keys that tell it.
        fits: whether a row is written so.
        record: the record of such a row.
    """

    about: str
    fits: Callable[[Row], bool]
    record: Callable[[Row, str], Record]


def record(row: Row, where: str) -> Record:
    """The record of a row whose schema is detected."""
    return SCHEMAS[detect(row)].record(row, where)


def detect(row: Row) -> str:
    """The name of a row's schema. Raises RowError where it has none."""
    for name, schema in SCHEMAS.items():
        if schema.fits(row):
            return name
    known = "; ".join(f"{name} ({schema.about})" for name, schema in SCHEMAS.items())
    raise RowError(f"no known schema has the keys {', '.join(map(str, row)) or '(none)'}. Known: {known}")


def has(*keys: str) -> Callable[[Row], bool]:
    """Whether a row has all of these keys, with a value."""
    return lambda row: all(row.get(key) is not None for key in keys)


def preference(row: Row, where: str) -> Record:
    """prompt, chosen, rejected: texts, single messages, or whole dialogues or texts that repeat the prompt."""
    chosen, rejected = field(row, "chosen"), field(row, "rejected")
    if is_dialogue(chosen) or is_dialogue(rejected):
        return preferred(*split_dialogues(chosen, rejected, field(row, "prompt")), where)
    prompt, one, two = prompt_of(field(row, "prompt")), text(chosen, "chosen"), text(rejected, "rejected")
    if isinstance(prompt, str) and repeats(one, prompt) and repeats(two, prompt):
        one, two = one[len(prompt) :], two[len(prompt) :]
    return preferred(prompt, one, two, where)


def repeats(whole: str, prompt: str) -> bool:
    """Whether a text is the prompt and then a response; one that only begins with the same letters is none."""
    rest = whole[len(prompt) :]
    if not prompt.strip() or not rest.strip() or not whole.startswith(prompt):
        return False
    return rest[0].isspace() or not prompt[-1].isalnum()


def implicit_prompt(row: Row, where: str) -> Record:
    """chosen, rejected: two dialogues, or two texts, that begin alike; the prompt is what they share.

    Texts part at the last white space that they share, which belongs to the responses.
    """
    chosen, rejected = field(row, "chosen"), field(row, "rejected")
    if is_dialogue(chosen) or is_dialogue(rejected):
        return preferred(*split_dialogues(chosen, rejected, None), where)
    one, two = text(chosen, "chosen"), text(rejected, "rejected")
    alike = next((at for at, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    while alike > 0 and not one[alike - 1 : alike].isspace():
        alike -= 1
    prompt = one[:alike].rstrip()
    if not prompt:
        raise RowError("chosen and rejected do not begin alike, and there is no 'prompt'")
    return preferred(prompt, one[len(prompt) :], two[len(prompt) :], where)


def unpaired(row: Row, where: str) -> Record:
    """prompt, completion, label: one response, good or bad."""
    response = response_of(field(row, "completion"), "completion")
    return record_of(prompt_of(field(row, "prompt")), (response,), (number(row.get("label"), "label"),), where)


def listed(row: Row) -> list[str]:
    """The texts or single messages under `completions`."""
    completions = items(field(row, "completions"), "completions")
    return [response_of(item, f"completions[{index}]") for index, item in enumerate(completions)]


def numbers(row: Row, key: str) -> list[float]:
    return [number(value, f"{key}[{index}]") for index, value in enumerate(items(field(row, key), key))]


def same_length(responses: list[str], ratings: list[float], key: str) -> None:
    if len(responses) != len(ratings):
        raise RowError(f"{len(responses)} completions but {len(ratings)} {key}")


def rewards(row: Row, where: str) -> Record:
    """prompt, completions, rewards."""
    responses, ratings = listed(row), numbers(row, "rewards")
    same_length(responses, ratings, "rewards")
    return record_of(prompt_of(field(row, "prompt")), responses, ratings, where)


def ranks(row: Row, where: str) -> Record:
    """prompt, completions, ranks; the smallest rank is the best."""
    responses, ratings = listed(row), [-rank for rank in numbers(row, "ranks")]
    same_length(responses, ratings, "ranks")
    return record_of(prompt_of(field(row, "prompt")), responses, ratings, where)


def completions(row: Row, where: str) -> Record:
    """prompt, completions[{response, reward}] under any of the usual names for the two."""
    responses, ratings = [], []
    for index, item in enumerate(items(field(row, "completions"), "completions")):
        what = f"completions[{index}]"
        if isinstance(item, str):
            raise RowError(f"{what} is a text, and there are neither 'rewards' nor 'ranks' beside 'completions'")
        completion = mapping(item, what)
        response = first_of(completion, RESPONSE_KEYS, what)
        reward = first_of(completion, REWARD_KEYS, what)
        responses.append(text(completion[response], f"{what}.{response}"))
        ratings.append(number(completion[reward], f"{what}.{reward}"))
    return record_of(prompt_of(field(row, "prompt")), responses, ratings, where)


def first_of(row: Row, keys: tuple[str, ...], what: str) -> str:
    """The first of `keys` that a row has."""
    for key in keys:
        if row.get(key) is not None:
            return key
    raise RowError(f"{what} has none of {', '.join(keys)}: its keys are {', '.join(map(str, row))}")


def nca(row: Row, where: str) -> Record:
    """A0, A1, ...: whole dialogues that share all but the last turn; score_A0, score_A1, ..."""
    names = ["A0"]
    while row.get(f"A{len(names)}") is not None:
        names.append(f"A{len(names)}")
    dialogues = [messages(field(row, name), name) for name in names]
    if any(not turns or turns[-1]["role"] != "assistant" for turns in dialogues):
        raise RowError(f"{', '.join(names)} have to end with a turn of the assistant")
    prompt = dialogues[0][:-1]
    if any(turns[:-1] != prompt for turns in dialogues):
        raise RowError(f"{', '.join(names)} do not share all turns before the last: no prompt is a prefix of all")
    scores = [number(row.get(f"score_{name}"), f"score_{name}") for name in names]
    return record_of(prompt, [turns[-1]["content"] for turns in dialogues], scores, where)


def nemo(row: Row, where: str) -> Record:
    """context, completions[{rank, completion: [message]}]; the smallest rank is the best."""
    responses, ratings = [], []
    for index, item in enumerate(items(field(row, "completions"), "completions")):
        what = f"completions[{index}]"
        completion = mapping(item, what)
        responses.append(response_of(field(completion, "completion"), f"{what}.completion"))
        ratings.append(-number(completion.get("rank"), f"{what}.rank"))
    return record_of(prompt_of(field(row, "context"), "context"), responses, ratings, where)


def alpaca(row: Row, where: str) -> Record:
    """instruction, input?, system?, history? and either output or chosen and rejected."""
    instruction = text(field(row, "instruction"), "instruction")
    given = row.get("input")
    asked = f"{instruction}\n{text(given, 'input')}" if given else instruction
    before: list[Message] = []
    for index, turn in enumerate(items(row.get("history") or [], "history")):
        both = [text(words, f"history[{index}]") for words in items(turn, f"history[{index}]")]
        if len(both) != 2:
            raise RowError(f"history[{index}] has {len(both)} texts where a user's and an assistant's should be")
        before += [Message(role="user", content=both[0]), Message(role="assistant", content=both[1])]
    if not asked.strip():
        raise RowError("the prompt is empty")
    prompt = with_system(row.get("system"), (*before, *one_user(asked)))
    if row.get("chosen") is None:
        return record_of(prompt, (text(field(row, "output"), "output"),), (1.0,), where)
    return preferred(prompt, text(row["chosen"], "chosen"), text(field(row, "rejected"), "rejected"), where)


def sharegpt(row: Row, where: str) -> Record:
    """conversations[{from, value}], with chosen and rejected turns or with the response as the last turn."""
    turns = with_system(row.get("system"), messages(field(row, "conversations"), "conversations"))
    if row.get("chosen") is None:
        return to_imitate(turns, "conversations", where)
    given = (field(row, key) for key in ("chosen", "rejected"))
    one, two = ([turn] if isinstance(turn, dict) else turn for turn in given)
    return preferred(turns, response_of(one, "chosen"), response_of(two, "rejected"), where)


def to_imitate(turns: tuple[Message, ...], what: str, where: str) -> Record:
    """A dialogue whose last turn is the response."""
    if not turns or turns[-1]["role"] != "assistant":
        raise RowError(f"{what} has to end with a turn of the assistant")
    return record_of(turns[:-1], (turns[-1]["content"],), (1.0,), where)


def prompt_alone(row: Row, where: str) -> Record:
    """prompt, whose responses are to be sampled."""
    return asked_of(prompt_of(field(row, "prompt")), where)


def asked(row: Row, where: str) -> Record | None:
    """The prompt of a row whatever its responses are like; None where it stands under no key of its own."""
    try:
        return prompt_alone(row, where)
    except RowError:
        return None


SFT_KEYS = (("question", "answer"), ("prompt", "response"), ("prompt", "completion"))


def sft(row: Row, where: str) -> Record:
    """A prompt and a response to imitate, or messages that end with it."""
    if row.get("messages") is not None:
        return to_imitate(messages(row["messages"], "messages"), "messages", where)
    asked, answered = next((keys for keys in SFT_KEYS if has(*keys)(row)), SFT_KEYS[0])
    response = response_of(field(row, answered), answered)
    return record_of(prompt_of(field(row, asked), asked), (response,), (1.0,), where)


ANSWERS = ("chosen", "rejected", "completion", "completions", "response")


def is_prompt(row: Row) -> bool:
    return has("prompt")(row) and not any(row.get(key) is not None for key in ANSWERS)


def is_hh(row: Row) -> bool:
    chosen = row.get("chosen")
    return "prompt" not in row and isinstance(chosen, str) and chosen.lstrip().startswith("Human:")


# In the order in which they are tried: a schema stands before those whose keys it has too.
SCHEMAS = {
    "nca": Schema("A0, A1, ..., score_A0, score_A1, ...", has("A0", "A1"), nca),
    "ultrafeedback": Schema(
        "instruction, completions[response, overall_score]", has("instruction", "completions"), ultrafeedback.record
    ),
    "ultrainteract": Schema(
        "trajectory, chosen, rejected", has("trajectory", "chosen", "rejected"), ultrainteract.record
    ),
    "tldr": Schema("info, summaries, choice", has("info", "summaries", "choice"), tldr.record),
    "nemo": Schema("context, completions[rank, completion]", has("context", "completions"), nemo),
    "sharegpt": Schema("conversations, or with chosen, rejected", has("conversations"), sharegpt),
    "alpaca": Schema(
        "instruction, input, output or chosen, rejected",
        lambda row: has("instruction")(row) and (has("output")(row) or has("chosen", "rejected")(row)),
        alpaca,
    ),
    "rewards": Schema("prompt, completions, rewards", has("prompt", "completions", "rewards"), rewards),
    "ranks": Schema("prompt, completions, ranks", has("prompt", "completions", "ranks"), ranks),
    "completions": Schema("prompt, completions[response, reward]", has("prompt", "completions"), completions),
    "preference": Schema("prompt, chosen, rejected", has("prompt", "chosen", "rejected"), preference),
    "hh": Schema("chosen, rejected: 'Human: ... Assistant: ...'", is_hh, hh.record),
    "implicit_prompt": Schema("chosen, rejected that begin alike", has("chosen", "rejected"), implicit_prompt),
    "unpaired": Schema(
        "prompt, completion, label", lambda row: has("prompt", "completion")(row) and "label" in row, unpaired
    ),
    "sft": Schema(
        "question, answer, or prompt, response or completion, or messages",
        lambda row: has("messages")(row) or any(has(*keys)(row) for keys in SFT_KEYS),
        sft,
    ),
    "prompt": Schema("prompt alone, whose responses are sampled", is_prompt, prompt_alone),
}
