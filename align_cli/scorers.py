"""The `scorer` group: what a program says of a sampled response, from the texts of prompt and response.

A score becomes the response's rating; the `reward` and `target` groups make of it what an algorithm learns from.
`_load_<name>` beside a scorer takes its options and loads what it needs, before anything else is loaded
(`align_cli.raters.load`).
"""

import importlib
import random
import re
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from align_cli.data import toy
from align_cli.errors import UserError, first_line
from align_cli.ranges import Count, NonNegative, NotEmpty


def _compiled(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


Pattern = Annotated[NotEmpty, AfterValidator(_compiled)]


def contains(prompt: str, response: str, *, words: list[NotEmpty]) -> float:
    """1 where one of the words or phrases is in the response, as whole words in any case, else 0."""
    return float(any(_said(word, response) for word in words))


def _said(word: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def matches(prompt: str, response: str, *, pattern: Pattern) -> float:
    """1 where the regular expression is found in the response, else 0."""
    return float(re.search(pattern, response) is not None)


def compiles(prompt: str, response: str, *, with_prompt: bool) -> float:
    """1 where a Python program compiles, prompt and response together or the response alone, else 0; nothing is run.

    A program without a statement compiles.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd but legal programs
            compile((prompt if with_prompt else "") + response, "response", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # ValueError: a null character
        return 0.0
    return 1.0


SILENCED = re.compile(r"(?<=# )no(?:qa|pep8)\b", re.IGNORECASE)  # a comment that would switch pycodestyle off
FENCED = re.compile(r"^```[^\n]*\n(.*?)(?:^```|\Z)", re.MULTILINE | re.DOTALL)


def pycodestyle(prompt: str, response: str, *, max_line_length: Count, ignore: list[NotEmpty]) -> float:
    """1 where pycodestyle has nothing to say against the code, else 0, also where there is none; nothing is run.

    The code is what stands in the response's fences of three backticks, else prompt and response together. A missing
    line feed at the very end is not held against it: where a response ends, its tokenizer decides.
    """
    guide = _guide(max_line_length, tuple(ignore))
    fenced = FENCED.findall(response)
    code = "".join(fenced) if fenced else prompt + response
    code = SILENCED.sub(lambda found: "x" * len(found[0]), code if code.endswith("\n") else f"{code}\n")
    lines = re.findall(r"[^\n]*\n", code)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd but legal programs
        return float(bool(code.strip()) and guide.input_file("response", lines=lines) == 0)


@cache
def _guide(max_line_length: int, ignore: tuple[str, ...]) -> Any:
    """pycodestyle with these options and none of its configuration files."""
    library = _library("pycodestyle", "pycodestyle")
    # with neither `ignore` nor `select`, pycodestyle falls back to its default ignore list
    chosen = {"ignore": ignore} if ignore else {"select": ("E", "W")}
    return library.StyleGuide(reporter=library.BaseReport, max_line_length=max_line_length, **chosen)


def _load_pycodestyle(*, max_line_length: int, ignore: list[str]) -> None:
    _guide(max_line_length, tuple(ignore))


def entities(prompt: str, response: str, *, model: NotEmpty, fewest: Count) -> float:
    """The share of the different named entities in the response that the prompt names, too; in any case.

    Args:
        model: of spaCy, which finds them.
        fewest: with fewer different entities in the response it is 0.
    """
    found = {entity.text.casefold().strip() for entity in _pipeline(model)(response).ents} - {""}
    named = sum(_said(entity, prompt.casefold()) for entity in found)
    return named / len(found) if len(found) >= fewest else 0.0


@cache
def _pipeline(model: str) -> Callable[[str], Any]:
    """A pipeline of spaCy that finds entities."""
    spacy = _library("spacy", "entities")
    installed = model in spacy.util.get_installed_models()
    if not installed and not Path(model).is_dir():
        raise UserError(
            f"scorer=entities model={model}: spaCy has no such model and there is no such folder. "
            f"'python -m spacy download {model}' installs one of spaCy's own."
        )
    try:
        pipeline = spacy.load(model if installed else Path(model))  # a path is never taken for a package
    except (OSError, ValueError) as error:
        raise UserError(f"scorer=entities model={model}: spaCy cannot read it: {first_line(error)}") from error
    if not any("doc.ents" in pipeline.get_pipe_meta(name).assigns for name in pipeline.pipe_names):
        parts = ", ".join(pipeline.pipe_names) or "it has none"
        raise UserError(
            f"scorer=entities model={model}: none of its parts ({parts}) finds entities. Use a model with 'ner' "
            "or 'entity_ruler'."
        )
    return pipeline


def _load_entities(*, model: str, fewest: int) -> None:
    _pipeline(model)


def _library(name: str, scorer: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"scorer={scorer}: {error.name} is not installed; pip install 'align-cli[scorers]' brings it."
        ) from error


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
