"""Published preferences of judges: what a model answered, and how likely a judge preferred it to a baseline."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from align_cli.data import benchmarks
from align_cli.data.benchmarks import Benchmark
from align_cli.data.fields import field, items, mapping, number, one_user, text
from align_cli.data.records import Message, Row, RowError


@dataclass(frozen=True, slots=True)
class Published:
    """A response, and what a judge said of it.

    Attributes:
        prompt: names the instruction wherever the same file is.
        dialogue: what is answered.
        model: who answered.
        response: the answer.
        baseline, other: whom it was compared with, and what that one answered; None where the file does not say.
        win: the probability that the judge prefers the response, in [0, 1]; NaN where it gave none.
        order: its place among the model's own, those without a preference counted.
    """

    prompt: str
    dialogue: tuple[Message, ...]
    model: str
    response: str
    baseline: str | None
    other: str | None
    win: float
    order: int = 0


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses to one prompt, and which one the published judge prefers: 1 the first, 0 the second, 1/2 none."""

    prompt: str
    dialogue: tuple[Message, ...]
    models: tuple[str, str]
    responses: tuple[str, str]
    label: float


def read(path: str, *, key: str) -> tuple[list[Published], str]:
    """The preferences of a file, without those that its judge did not give, with its digest.

    Args:
        key: what names the file, for messages.

    Raises:
        UserError: it is not there, or is of another schema.
    """
    data = Benchmark(path=path, hub=None, revision=None, subset=None, split="train", source="annotations")
    labelled, digest = benchmarks.load(data, key=key)
    rows, _ = benchmarks.read(labelled, published)
    found: list[Published] = []
    seen: Counter[str] = Counter()
    for each in itertools.chain.from_iterable(rows):
        found.append(replace(each, order=seen[each.model]))
        seen[each.model] += 1
    return [each for each in found if not math.isnan(each.win)], digest


def published(row: Row, place: str) -> list[Published]:
    """What a row says.

    Two schemas are known: `prompt` with `completions`, each of `model`, `response` and `reward`, a probability; and
    the annotations of alpaca_eval: `instruction`, `output_1`, `output_2`, `generator_1`, `generator_2` and
    `preference`, 1 for the first output, 2 for the second, anything between for a probability, 0 for a draw.

    Raises:
        RowError: it is neither, or a probability is none.
    """
    if "completions" in row:
        return _rewarded(row, place)
    if "preference" in row:
        return _annotated(row, place)
    raise RowError(
        "neither 'completions' with rewards nor 'preference' with two outputs: the keys are " + ", ".join(map(str, row))
    )


def _rewarded(row: Row, place: str) -> list[Published]:
    asked = one_user(text(field(row, "prompt"), "prompt"))
    found: list[Published] = []
    for each in items(field(row, "completions"), "completions"):
        one = mapping(each, "a completion")
        model, response = (text(field(one, key), key) for key in ("model", "response"))
        win = _probability(number(field(one, "reward"), "reward"), "reward")
        found.append(Published(place, asked, model, response, None, None, win))
    return found


def _annotated(row: Row, place: str) -> list[Published]:
    told = row["preference"]
    win = math.nan
    if told is not None and told == told:  # else no answer could be read, or it is NaN
        preference = number(told, "preference")
        win = 0.5 if preference == 0 else _probability(preference - 1, "preference - 1")
    asked = one_user(text(field(row, "instruction"), "instruction"))
    baseline, model = (text(field(row, f"generator_{side}"), f"generator_{side}") for side in (1, 2))
    other, response = (text(field(row, f"output_{side}"), f"output_{side}") for side in (1, 2))
    return [Published(place, asked, model, response, baseline, other, win)]


def _probability(value: float, what: str) -> float:
    if not 0 <= value <= 1:
        raise RowError(f"{what} is {value:g}: use a probability between 0 and 1")
    return value


def pairs_of(found: Sequence[Published], *, margin: float) -> list[Pair]:
    """The pairs of which a published judge prefers one by at least `margin`.

    A response and the baseline's, where the file has both; else any two responses to one prompt, whose probabilities
    against the same baseline order them.

    Args:
        found: of one file.
        margin: the least distance of the probability from 1/2, or of two probabilities from each other.
    """
    pairs: list[Pair] = []
    by_prompt: dict[str, list[Published]] = {}
    for each in found:
        if each.other is None or each.baseline is None:
            by_prompt.setdefault(each.prompt, []).append(each)
        elif abs(each.win - 0.5) >= margin:
            pairs.append(
                Pair(
                    each.prompt,
                    each.dialogue,
                    (each.model, each.baseline),
                    (each.response, each.other),
                    _label(each.win - 0.5),
                )
            )
    for together in by_prompt.values():
        pairs += [
            Pair(
                one.prompt,
                one.dialogue,
                (one.model, two.model),
                (one.response, two.response),
                _label(one.win - two.win),
            )
            for one, two in combinations(together, 2)
            if abs(one.win - two.win) >= margin and one.response != two.response
        ]
    return pairs


def _label(difference: float) -> float:
    return 0.5 if difference == 0 else float(difference > 0)
