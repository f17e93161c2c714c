"""Lengths of prompts and responses, in tokens, as public preference datasets have them.

A table is a lognormal of each length, cut as the dataset's usual recipe cuts, and scaled so that the stated means hold
after the cut. Few groups are timed, so lengths are the quantiles of the distribution in random order and not draws:
a dozen groups then have the mean and the tail of thousands.
"""

from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

SHORTEST = 2  # tokens; a response is at least one word and its stop token


@dataclass(frozen=True)
class Table:
    """The lengths of a kind of data.

    Attributes:
        prompt, response: mean tokens, after the cut.
        prompt_sigma, response_sigma: of the logarithm of a length, before the cut.
        prompt_cut: most tokens of a prompt.
        total_cut: most tokens of a prompt and a response together; the response is cut.
        source: where the figures come from.
    """

    name: str
    prompt: float
    response: float
    prompt_sigma: float
    response_sigma: float
    prompt_cut: int
    total_cut: int
    source: str


ULTRAFEEDBACK = Table(
    "UltraFeedback-like",
    185,
    305,
    1.0,
    0.85,
    512,
    1024,
    "means of arXiv:2310.01377, table 1; sigmas assumed; cut at 512 and 1024 tokens as in the usual recipes",
)
ULTRAINTERACT = Table(
    "UltraInteract-like",
    1400,
    350,
    0.2,
    0.4,
    2176,
    2560,
    "mean of 1750 tokens of interactive maths in arXiv:2404.02078, table 1; its division and the sigmas are assumed",
)
SHORT = Table("short prompts", 40, 300, 0.6, 0.6, 256, 1024, "assumed: one-line questions with answers of a page")

TABLES = {table.name: table for table in (ULTRAFEEDBACK, ULTRAINTERACT, SHORT)}


def fixed(prompt: int, response: int) -> Table:
    """Lengths that vary a little around two means."""
    total = 2 * (prompt + response)
    name = f"P = {prompt}, R = {response}"
    return Table(name, prompt, response, 0.1, 0.1, total, total, "set")


def shortened(table: Table, by: int) -> Table:
    """The same kind of data with all lengths divided, for checks that need no length."""
    return replace(
        table,
        prompt=max(8, table.prompt / by),
        response=max(8, table.response / by),
        prompt_cut=max(24, table.prompt_cut // by),
        total_cut=max(48, table.total_cut // by),
    )


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts (n,) and of their responses (n, K)."""

    prompts: np.ndarray
    responses: np.ndarray

    def means(self) -> dict[str, float]:
        """Mean tokens of a prompt, of a response, and of all that is read for a group if each response has its own
        copy of the prompt, in tokens."""
        return {
            "prompt": float(self.prompts.mean()),
            "response": float(self.responses.mean()),
            "group": float(self.logical().mean()),
        }

    def logical(self) -> np.ndarray:
        """(n,) tokens that a trainer must read without padding and without sharing: K prompts and K responses."""
        return self.responses.shape[1] * self.prompts + self.responses.sum(1)

    def unique(self) -> np.ndarray:
        """(n,) tokens of one prompt and K responses."""
        return self.prompts + self.responses.sum(1)

    def token_ratio(self) -> float:
        """What sharing a prompt saves at most: tokens with K copies of each prompt over tokens with one."""
        return float(self.logical().sum() / self.unique().sum())

    def padding(self, groups: int) -> float:
        """Tokens with padding over tokens without, if micro-batches of so many groups are padded to their longest."""
        size, k = len(self.prompts), self.responses.shape[1]
        padded = 0
        for start in range(0, size, groups):
            chosen = slice(start, start + groups)
            longest = int((self.prompts[chosen, None] + self.responses[chosen]).max())
            padded += longest * k * len(self.prompts[chosen])
        return float(padded / self.logical().sum())

    def __getitem__(self, chosen: slice) -> "Lengths":
        return Lengths(self.prompts[chosen], self.responses[chosen])

    def as_json(self) -> dict[str, Any]:
        return {"prompts": self.prompts.tolist(), "responses": self.responses.tolist()}


def draw(table: Table, *, groups: int, responses: int, seed: int) -> Lengths:
    """Lengths of `groups` groups of K = `responses`, whose means are the table's to half a token.

    Raises:
        ValueError: the cuts leave no room for the means.
    """
    rng = np.random.default_rng((seed, groups, responses))
    prompt_shape = np.exp(table.prompt_sigma * _quantiles(groups, rng))
    response_shape = np.exp(table.response_sigma * _quantiles(groups * responses, rng)).reshape(groups, responses)

    def prompts(scale: float) -> np.ndarray:
        return np.clip(np.rint(scale * prompt_shape), SHORTEST, table.prompt_cut).astype(np.int64)

    chosen = prompts(_scale(prompts, table.prompt, f"{table.name}: prompts"))
    room = table.total_cut - chosen[:, None]

    def replies(scale: float) -> np.ndarray:
        return np.clip(np.rint(scale * response_shape), SHORTEST, room).astype(np.int64)

    return Lengths(chosen, replies(_scale(replies, table.response, f"{table.name}: responses")))


def _quantiles(count: int, rng: np.random.Generator) -> np.ndarray:
    """The normal distribution's quantiles at the middles of `count` equal shares, in random order."""
    normal = NormalDist()
    return rng.permutation([normal.inv_cdf((place + 0.5) / count) for place in range(count)])


def _scale(lengths: Any, mean: float, what: str) -> float:
    """The scale at which `lengths(scale)` has the mean, by bisection: the mean grows with the scale."""
    low, high = 0.0, 1e6
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if lengths(middle).mean() < mean else (low, middle)
    found = lengths(high).mean()
    if abs(found - mean) > max(0.5, 0.01 * mean):
        raise ValueError(f"{what} have a mean of {found:.1f} tokens after the cut, {mean:g} is asked for")
    return high
