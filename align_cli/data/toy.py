"""Digit addition with written steps: a task whose responses a program can grade.

The prompt is `47+85=`. The best response adds column by column from the right, each carry written as a summand, and
ends with the answer: `7+5=12 4+8+1=13 #132`. Demonstrations mix behaviours of graded quality, so that a model trained
on them has behaviours among which alignment can select, and not only a skill to improve.
"""

import random
import re
from collections.abc import Iterator
from typing import TypedDict

from align_cli.data import schemas

ALPHABET = "0123456789+= #,.?abcdefghijklmnopqrstuvwxyz"
ANSWER = "#"

MIXTURE = {
    "steps": 0.22,  # right, with steps
    "carry_dropped": 0.34,  # steps that forget the carry, and the answer that follows from them
    "guess": 0.26,  # no steps, and often wrong
    "ramble": 0.18,  # words before a guess
}
GUESS_RIGHT = 0.3
WORDS = ("well", "let me see", "hmm", "i think", "so", "that is", "maybe")

PROMPT = re.compile(r"(\d+)\+(\d+)=")


class ToyRow(TypedDict):
    """A row of the samples' JSONL: K completions of one prompt with their scores."""

    prompt: str
    completions: list[str]
    rewards: list[float]


def problem(rng: random.Random, digits: int) -> str:
    """A prompt that asks for the sum of two numbers of `digits` digits, leading zeros not allowed."""
    low, high = 10 ** (digits - 1), 10**digits - 1
    return f"{rng.randint(low, high)}+{rng.randint(low, high)}="


def problems(seed: int, digits: int) -> Iterator[str]:
    """Distinct prompts in a random order fixed by `seed`, until all have been given."""
    rng = random.Random(f"problems {seed} {digits}")
    numbers = 9 * 10 ** (digits - 1)
    seen: set[str] = set()
    while len(seen) < numbers * numbers:
        prompt = problem(rng, digits)
        if prompt not in seen:
            seen.add(prompt)
            yield prompt


def summands(prompt: str) -> tuple[int, int]:
    """The two numbers of a prompt.

    Raises:
        ValueError: `prompt` is not of the form `47+85=`.
    """
    match = PROMPT.fullmatch(prompt)
    if match is None:
        raise ValueError(f"{prompt!r} is no addition; expected the form '47+85='.")
    return int(match[1]), int(match[2])


def steps(prompt: str, *, carry: bool) -> tuple[list[str], int]:
    """The columns' sums from the right, and the answer that they lead to; without `carry` each carry is forgotten."""
    a, b = summands(prompt)
    lines: list[str] = []
    carried, answer, unit = 0, 0, 1
    while a or b:
        total = a % 10 + b % 10 + carried
        lines.append(f"{a % 10}+{b % 10}{'+1' if carried else ''}={total}")
        a, b = a // 10, b // 10
        last = not (a or b)
        answer += unit * (total if last else total % 10)
        carried = total // 10 if carry else 0
        unit *= 10
    return lines, answer


def guess(prompt: str, rng: random.Random) -> str:
    """An answer without steps: right with probability `GUESS_RIGHT`, else with one digit changed."""
    answer = str(sum(summands(prompt)))
    if rng.random() < GUESS_RIGHT:
        return f"{ANSWER}{answer}"
    place = rng.randrange(len(answer))
    other = rng.choice([digit for digit in "123456789" if digit != answer[place]])
    return f"{ANSWER}{answer[:place]}{other}{answer[place + 1 :]}"


def behaviour(rng: random.Random) -> str:
    """The name of a behaviour, drawn by the weights of `MIXTURE`."""
    return rng.choices(list(MIXTURE), weights=list(MIXTURE.values()))[0]


def demonstrate(prompt: str, behaviour: str, rng: random.Random) -> str:
    """A response to `prompt` in the manner of `behaviour`, a key of `MIXTURE`."""
    if behaviour == "guess":
        return guess(prompt, rng)
    if behaviour == "ramble":
        return f"{', '.join(rng.sample(WORDS, 2))} {guess(prompt, rng)}"
    lines, answer = steps(prompt, carry=behaviour == "steps")
    return f"{' '.join(lines)} {ANSWER}{answer}"


def answer_of(response: str) -> str:
    """What follows the last answer mark; empty where there is none."""
    return response.rpartition(ANSWER)[2] if ANSWER in response else ""


def correct(prompt: str, response: str) -> bool:
    """Whether the response ends with the right answer."""
    return answer_of(response) == str(sum(summands(prompt)))


def score(prompt: str, response: str) -> float:
    """The graded reward in [0, 1]: 0.6 for the right answer (or 0.3 x its share of right digits), 0.4 x right steps.

    Steps count from the first character on, so that words before them forfeit that part; digits are compared from
    the right, as the steps produce them.
    """
    right = str(sum(summands(prompt)))
    given = answer_of(response)
    expected, _ = steps(prompt, carry=True)
    written = response.partition(ANSWER)[0].split()
    stepwise = sum(a == b for a, b in zip(expected, written, strict=False)) / len(expected)
    digits = sum(a == b for a, b in zip(reversed(right), reversed(given), strict=False)) / max(len(right), len(given))
    return round((0.6 if given == right else 0.3 * digits) + 0.4 * stepwise, 6)


record = schemas.rewards  # rows of the world's samples have an ordinary schema
