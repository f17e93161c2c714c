"""The `scorer` group: what a program says of a sampled response, from the texts of prompt and response.

A score becomes the response's rating; the `reward` and `target` groups make of it what an algorithm learns from.
"""

import random
import re
import warnings
from typing import Annotated

from pydantic import AfterValidator

from align_cli.data import toy
from align_cli.ranges import NonNegative, NotEmpty


def _compiled(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from error
    return pattern


Pattern = Annotated[NotEmpty, AfterValidator(_compiled)]


def contains(prompt: str, response: str, *, words: list[NotEmpty]) -> float:
    """1 where one of the words or phrases is in the response, as whole words in any case, else 0."""
    return float(any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", response, re.IGNORECASE) for word in words))


def matches(prompt: str, response: str, *, pattern: Pattern) -> float:
    """1 where the regular expression is found in the response, else 0."""
    return float(re.search(pattern, response) is not None)


def compiles(prompt: str, response: str) -> float:
    """1 where prompt and response together compile as a Python program, else 0; nothing is run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd but legal programs
            compile(prompt + response, "response", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # ValueError: a null character
        return 0.0
    return 1.0


def addition(prompt: str, response: str) -> float:
    """The embedded world's graded reward in [0, 1]: right steps and right digits (`align_cli.data.toy.score`)."""
    return toy.score(prompt, response)


def right_addition(prompt: str, response: str) -> float:
    """1 where the response to an addition of the embedded world ends with the right answer, else 0."""
    return float(toy.correct(prompt, response))


def noisy_addition(prompt: str, response: str, *, bias: NonNegative, noise: NonNegative) -> float:
    """`addition` as an imperfect reward model would give it: off by something of the prompt, and of each response.

    Args:
        bias: deviation of what is added to all responses of a prompt.
        noise: deviation of what is added to a response; the same response is always off by the same.
    """
    of_prompt, of_response = (random.Random(text).gauss(0, 1) for text in (prompt, f"{prompt}\n{response}"))
    return toy.score(prompt, response) + bias * of_prompt + noise * of_response
