"""Who rates sampled responses; every rater takes groups as the source drew them.

A program reads texts, a reward model the tokens themselves.
"""

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import Annotated, Literal, Protocol

import numpy as np
import torch
from annotated_types import MinLen
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from align_cli.data.batches import Measured, split
from align_cli.data.store import Group
from align_cli.models.causal import Manner, measure
from align_cli.ranges import NonNegative, NotEmpty

Scorer = Callable[[str, str], float]
"""Rates a response from the texts of prompt and response (`align_cli.scorers`)."""

LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class FromModel:
    """The `scorer` section of a run whose responses a reward model rates."""

    name: Literal["model"]
    path: NotEmpty

    @property
    def paths(self) -> list[str]:
        """Of all reward models."""
        return [self.path]


@dataclass(frozen=True, kw_only=True)
class FromEnsemble:
    """The `scorer` section of a run whose responses several reward models rate together."""

    name: Literal["ensemble"]
    paths: Annotated[list[NotEmpty], MinLen(1)]
    aggregate: Literal["mean", "min"]
    caution: NonNegative
    apart: bool


Models = FromModel | FromEnsemble


@dataclass(frozen=True)
class Unrated:
    """What stands in a group's place where a response of it has no rating.

    Attributes:
        why: a sentence that names the prompt and the response.
    """

    why: str


def load(scorer: Scorer) -> None:
    """Have a scorer load what it needs: `_load_<name>` beside it is called with its options, where there is one.

    Raises:
        UserError: what it needs is not there.
    """
    function, given = (scorer.func, scorer.keywords) if isinstance(scorer, partial) else (scorer, {})
    loader = vars(importlib.import_module(function.__module__)).get(f"_load_{function.__name__}")
    if loader is not None:
        loader(**given)


class Rater(Protocol):
    """Rates the responses of groups, whose own ratings it does not look at."""

    def __call__(self, groups: Sequence[Group]) -> list[Group | Unrated]:
        """The groups with their ratings; one whose responses cannot all be rated is `Unrated`."""
        ...


@dataclass(frozen=True)
class Within:
    """Rates by another rater whose ratings must lie between 0 and 1."""

    rate: Rater

    def __call__(self, groups: Sequence[Group]) -> list[Group | Unrated]:
        return [each if isinstance(each, Unrated) else self._held(each) for each in self.rate(groups)]

    @staticmethod
    def _held(group: Group) -> Group | Unrated:
        beyond = group.ratings[(group.ratings < 0) | (group.ratings > 1)]
        if not len(beyond):
            return group
        return Unrated(
            f"a response to {group.where} is rated {beyond[0]:g}; the target weighs responses by ratings between 0 and "
            "1. target=rlhf takes any."
        )


class FirstFeature:
    """Rates by the first of the features that the groups hold."""

    def __call__(self, groups: Sequence[Group]) -> list[Group | Unrated]:
        return [replace(group, ratings=group.given["features"][:, 0]) for group in groups]


class _Bad(Exception):
    """A scorer gave no rating; says why."""


@dataclass(frozen=True)
class ByProgram:
    """Rates by a function of texts, without special tokens."""

    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase

    def __call__(self, groups: Sequence[Group]) -> list[Group | Unrated]:
        return [self._of(group) for group in groups]

    def _of(self, group: Group) -> Group | Unrated:
        # Together with its prompt: some tokenizers take the first space off whatever they decode.
        prompt = group.prompt.tolist()
        told = [prompt, *([*prompt, *response.tolist()] for response in group.responses)]
        asked, *whole = self.tokenizer.batch_decode(told, skip_special_tokens=True)
        try:
            ratings = [self._score(group.where, asked, text.removeprefix(asked)) for text in whole]
        except _Bad as bad:
            return Unrated(str(bad))
        return replace(group, ratings=np.array(ratings, dtype=np.float32))

    def _score(self, where: str, asked: str, text: str) -> float:
        try:
            found = self.scorer(asked, text)
        except (Exception, SystemExit) as error:  # a scorer of the user's own may fail in any way
            told = f"{type(error).__name__}: {error}; on a response to {where}: {text!r}."
            raise _Bad(f"the scorer failed with {told}") from error
        if not isinstance(found, Real) or not abs(found) <= LARGEST:
            raise _Bad(
                f"the scorer gave {found!r}, not a finite number of single precision, for a response to {where}: "
                f"{text!r}."
            )
        return float(found)


@dataclass
class Alike:
    """Whether all ratings that a run has seen are the same, so that it has nothing to learn from them.

    Attributes:
        lowest, highest: of the ratings.
        count: of them.
    """

    lowest: float = np.inf
    highest: float = -np.inf
    count: int = 0

    def add(self, groups: Iterable[Group]) -> None:
        """Take in the ratings of some groups."""
        for group in groups:
            self.lowest = min(self.lowest, float(group.ratings.min()))
            self.highest = max(self.highest, float(group.ratings.max()))
            self.count += len(group.ratings)

    def doubt(self) -> str | None:
        """What is to be said against the ratings, if anything."""
        if self.lowest < self.highest:
            return None
        # the rule of three: what did not occur in N trials has a rate below 3/N at 95 %
        rate = min(100.0, 300 / self.count)
        rare = f"; what the scorer looks for has a rate below {rate:.2g} % at 95 %" if self.highest == 0 else ""
        return (
            f"all {self.count:,} responses so far are rated {self.highest:g}, so that there is nothing to learn from "
            f"them{rare}. Use a scorer that tells responses apart, a starting model that at times does what is wanted "
            "(algo=sft teaches it), or more source.samples."
        )


@dataclass(frozen=True)
class ByModel:
    """Rates by a reward model, from the same token ids that the policy sampled.

    Attributes:
        network: the reward model, ready to be called on this rank's device.
        manner: how it is measured.
        budget: most tokens of a micro-batch.
        visits: whether the network is on the device only while it rates, and in the host's memory otherwise.
    """

    network: nn.Module
    manner: Manner
    device: torch.device
    budget: int
    visits: bool

    @torch.no_grad()
    def __call__(self, groups: Sequence[Group]) -> list[Group | Unrated]:
        """As every rater; under ZeRO-3 every rank calls it with the same groups."""
        if not self.visits:
            return self._rated(groups)
        self.network.to(self.device)
        try:
            return self._rated(groups)
        finally:
            self.network.to("cpu")

    def _rated(self, groups: Sequence[Group]) -> list[Group | Unrated]:
        found: dict[int, Group | Unrated] = {}
        lengths = self.manner.lengths(Measured.of(groups))
        parts = split(range(len(groups)), lengths, ranks=1, budget=self.budget)[0] if groups else []
        for part in parts:
            batch = self.manner.flatten([groups[index] for index in part.groups]).to(self.device)
            scores = measure(self.network, batch, self.manner)["scores"].float().cpu().numpy()
            found |= {index: _scored(groups[index], own) for index, own in zip(part.groups, scores, strict=True)}
        return [found[index] for index in range(len(groups))]


def _scored(group: Group, scores: NDArray[np.float32]) -> Group | Unrated:
    if np.isfinite(scores).all():
        return replace(group, ratings=scores)
    return Unrated(f"the reward model gave {scores.tolist()} for the responses to {group.where}.")


@dataclass(frozen=True)
class Ensemble:
    """Rates by several raters, and gives the column `spread`: by how much they disagree.

    The mean, or the least, of the members' ratings, less `caution` times their deviation. Coste et al., "Reward Model
    Ensembles Help Mitigate Overoptimization", arXiv 2310.02743; theirs takes the variance and not the deviation away.
    """

    members: Sequence[Rater]
    aggregate: Literal["mean", "min"]
    caution: float

    def __call__(self, groups: Sequence[Group]) -> list[Group | Unrated]:
        """As every rater; a group that a member cannot rate is `Unrated`."""
        every = [member(groups) for member in self.members]  # one after the other: each may visit the device
        return [self._together(told) for told in zip(*every, strict=True)]

    def _together(self, told: Sequence[Group | Unrated]) -> Group | Unrated:
        rated: list[Group] = []
        for each in told:
            if isinstance(each, Unrated):
                return each
            rated.append(each)
        ratings = np.stack([each.ratings for each in rated]).astype(np.float64)
        spread = ratings.std(axis=0)
        found = (ratings.mean(axis=0) if self.aggregate == "mean" else ratings.min(axis=0)) - self.caution * spread
        given = {**rated[0].given, "spread": spread.astype(np.float32)}
        return replace(rated[0], ratings=found.astype(np.float32), given=given)
