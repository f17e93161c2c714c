"""Where the responses of a step come from: a dataset, the policy, which is sampled, or samples that a run has kept.

All give `Step`s, so the loop does not know which it has.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from align_cli import distributed, terminal
from align_cli.data.batches import Measured, Minibatch, Step, members, order, split, steps
from align_cli.data.store import Group, Store
from align_cli.engine import Engine
from align_cli.errors import RunError
from align_cli.generation import Drawn, sample, stops
from align_cli.proposal import Proposal
from align_cli.ranges import BelowOne, Count, NonNegative, NotEmpty, Positive
from align_cli.raters import Rater, Unrated
from align_cli.rollouts import Kept

# These take the place of a step's number, which counts from 1, in seeds.
EVALUATION = 0
FITTING = 2**32 - 1

Extra = Callable[[Sequence[Group], int], Sequence[NDArray[np.float32] | None]]
"""Gives a column for each of some prompts in the step of this number, the same on every rank.

None is that it cannot: the step goes without the prompt.
"""

KEPT = "Checkpoints of earlier steps are whole."


@dataclass(frozen=True, kw_only=True)
class FromDataset:
    """The `source` section of a run whose data brings the responses."""

    name: Literal["dataset"]


@dataclass(frozen=True, kw_only=True)
class FromPolicy:
    """The `source` section of a run that samples its responses."""

    name: Literal["rollout", "replay"]
    samples: Count
    temperature: Positive
    max_new_tokens: Count
    missing_eos_penalty: NonNegative
    bad_ratings: BelowOne
    minibatches: Count
    epochs: Count
    sequences: Count
    keep: bool

    @property
    def updates(self) -> int:
        """Of the weights, from the samples of one step."""
        return self.minibatches * self.epochs


@dataclass(frozen=True, kw_only=True)
class FromKept(FromPolicy):
    """The `source` section of a run that learns from what another has sampled; its own policy is sampled to be judged.

    Attributes:
        path: of the other run.
    """

    path: NotEmpty


class Source(Protocol):
    """Gives the steps of a run."""

    def steps(self, first: int, last: int) -> Iterator[Step]:
        """The steps `first`..`last`, counted from 1, as this rank sees them; every rank iterates alike."""
        ...


@dataclass(frozen=True)
class Dataset:
    """Steps of a store's groups.

    Attributes:
        prompts: groups of a step.
        seed: of their order.
        together: whether groups of one prompt fall into one step.
        budget: tokens of a micro-batch.
    """

    store: Store
    engine: Engine
    prompts: int
    seed: int
    together: bool
    budget: int

    def steps(self, first: int, last: int) -> Iterator[Step]:
        return steps(
            self.store,
            self.engine.manner.lengths(self.store),
            first=first,
            last=last,
            prompts=self.prompts,
            seed=self.seed,
            together=self.together,
            rank=distributed.rank(),
            ranks=distributed.world(),
            budget=self.budget,
        )


@dataclass(frozen=True)
class Sampler:
    """Draws responses from the policy as it is, and has them rated.

    A response depends on (seed, index of its prompt, its own number) and on the weights alone, not on ranks and
    batches, up to the rounding of the logits; so a run that is resumed draws what it would have drawn.

    Attributes:
        rate: rates what was drawn.
        stop: the token that ends a response as the data's template writes it; the model may name further ones.
        features: raters that give the column `features`, before `rate` is asked; a target may be made of them.
        spent: seconds, by kind of work; whoever reads them clears them.
        told: why the first prompt had to be left out, once it was said.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    rate: Rater
    options: FromPolicy
    stop: int
    features: Sequence[Rater] = ()
    spent: dict[str, float] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    def draw(
        self, prompts: Sequence[Group], seed: Sequence[int], *, samples: int, temperature: float | None = None
    ) -> list[Group]:
        """The prompts with fresh responses and their ratings, in the order of `prompts`, the same on every rank.

        Those whose responses could not all be rated are left out, if they are few enough (`judge`); the arguments are
        those of `attempt`.
        """
        found = self.attempt(prompts, seed, samples=samples, temperature=temperature)
        self.judge([each for each in found if isinstance(each, Unrated)], of=len(found))
        return [each for each in found if isinstance(each, Group)]

    @property
    def ends(self) -> list[int]:
        """The tokens that end a response, the template's first."""
        return list(dict.fromkeys([self.stop, *stops(self.engine.network, self.tokenizer)]))

    def judge(self, bad: Sequence[Unrated], *, of: int) -> None:
        """Stop where more than `source.bad_ratings` of so many prompts are unrated, and warn of the first.

        Raises:
            RunError: they are more.
        """
        share = self.options.bad_ratings
        if bad and len(bad) / of > share:
            most = f"source.bad_ratings={share:g} of them may be without"
            counted = f" {len(bad)} of {of} prompts have no ratings; {most}." if share else ""
            raise RunError(f"{bad[-1].why}{counted} {KEPT}")
        if bad and not self.told:
            self.told.append(bad[0].why)
            if distributed.rank() == 0:
                terminal.warn(f"{bad[0].why} Such prompts are left out, and counted in rollout/unrated")

    def attempt(
        self, prompts: Sequence[Group], seed: Sequence[int], *, samples: int, temperature: float | None = None
    ) -> list[Group | Unrated]:
        """The prompts with fresh responses and their ratings, in the order of `prompts`, the same on every rank.

        Args:
            prompts: whose own responses are not looked at.
            seed: whole numbers >= 0.
            samples: responses of each prompt.
            temperature: None is the source's own.
        """
        # Under ZeRO-3 every forward pass is a collective, so all ranks sample all; elsewhere each its share.
        ranks = 1 if self.engine.collective else distributed.world()
        rank = distributed.rank() % ranks
        share = prompts[rank::ranks]
        eos_ids = self.ends
        begun = time.perf_counter()
        drawn = dict(
            sample(
                self.engine.network,  # pyright: ignore[reportArgumentType]  generation works through adapters as well
                [group.prompt.tolist() for group in share],
                responses=samples,
                max_new_tokens=self.options.max_new_tokens,
                temperature=self.options.temperature if temperature is None else temperature,
                seeds=[(*seed, group.index) for group in share],
                batch=self.options.sequences,
                pad_id=eos_ids[0],
                eos_ids=eos_ids,
            )
        )
        sampled = time.perf_counter()
        mine = self._rated([_group(prompt, drawn[place]) for place, prompt in enumerate(share)], set(eos_ids))
        for name, seconds in (("rollout", sampled - begun), ("score", time.perf_counter() - sampled)):
            self.spent[name] = self.spent.get(name, 0.0) + seconds
        # Where all ranks have rated all, the first one's word holds: a scorer may fail on one rank and not on another.
        every = distributed.gather(mine)
        return [every[place % ranks][place // ranks] for place in range(len(prompts))]

    def texts(self, group: Group) -> list[str]:
        """Of the responses, without special tokens."""
        told = [response.tolist() for response in group.responses]
        return self.tokenizer.batch_decode(told, skip_special_tokens=True)

    def _rated(self, groups: Sequence[Group], eos_ids: set[int]) -> list[Group | Unrated]:
        found = self._featured(groups) if self.features else list(groups)
        rated = iter(self.rate([each for each in found if isinstance(each, Group)]))
        found = [each if isinstance(each, Unrated) else next(rated) for each in found]
        return [each if isinstance(each, Unrated) else self._ended(each, eos_ids) for each in found]

    def _featured(self, groups: Sequence[Group]) -> list[Group | Unrated]:
        """The groups with the column `features`."""
        found: list[Group | Unrated] = []
        for group, each in zip(groups, zip(*(rate(groups) for rate in self.features), strict=True), strict=True):
            bad = next((one for one in each if isinstance(one, Unrated)), None)
            values = [one.ratings for one in each if isinstance(one, Group)]
            found.append(bad or replace(group, given={"features": np.stack(values, axis=-1)}))
        return found

    def _ended(self, group: Group, eos_ids: set[int]) -> Group:
        """The group with the penalty on responses that were cut."""
        cut = np.array([int(response[-1]) not in eos_ids for response in group.responses], dtype=np.float32)
        return replace(group, ratings=group.ratings - self.options.missing_eos_penalty * cut)


def _group(prompt: Group, drawn: Sequence[Drawn]) -> Group:
    """A prompt with its samples, not rated yet."""
    return Group(
        index=prompt.index,
        prompt=prompt.prompt,
        responses=tuple(np.array(each.tokens, dtype=np.int32) for each in drawn),
        ratings=np.zeros(len(drawn), dtype=np.float32),
        where=prompt.where,
        behavior=tuple(np.array(each.logprobs) for each in drawn),
    )


@dataclass(frozen=True)
class Rollout:
    """Steps of a store's prompts, each with responses that the policy has just been sampled for.

    Attributes:
        store: of the prompts; its own responses are not looked at.
        proposal: what is sampled in the place of the policy; None: the policy itself.
        extras: further columns to give, by name.
        kept: where each step's responses are kept; None: nowhere.
        prompts, seed, together, budget: as for `Dataset`.
    """

    store: Store
    sampler: Sampler
    proposal: Proposal | None
    extras: Mapping[str, Extra]
    kept: Kept | None
    prompts: int
    seed: int
    together: bool
    budget: int

    def steps(self, first: int, last: int) -> Iterator[Step]:
        options = self.sampler.options
        for number in range(first, last + 1):
            chosen = members(self.store, number, prompts=self.prompts, seed=self.seed, together=self.together)
            asked = [self.store[index] for index in chosen.tolist()]
            drawn = self.drawn(asked, number)
            if not drawn:
                raise RunError(f"no prompt of step {number} has all the ratings that it needs. {KEPT}")
            shuffled = np.random.default_rng((self.seed, number))
            cut = np.array_split(shuffled.permutation(len(drawn)), min(options.minibatches, len(drawn)))
            minibatches = tuple(self._minibatch(places, drawn) for places in cut)
            order = [place for _ in range(options.epochs) for place in shuffled.permutation(len(minibatches)).tolist()]
            tokens = sum(len(group.prompt) for group in drawn) + sum(part.response_tokens for part in minibatches)
            yield Step(number, minibatches, tuple(order), drawn, tokens, self._spent(), len(asked) - len(drawn))

    def drawn(self, asked: Sequence[Group], number: int) -> list[Group]:
        """The prompts of a step with responses, those alone that have ratings; every rank calls it alike."""
        with nullcontext() if self.proposal is None else self.proposal.drawing():
            drawn = self.sampler.draw(asked, (self.seed, number), samples=self.sampler.options.samples)
        drawn = self.completed(drawn, number)
        if self.kept is not None and distributed.rank() == 0:
            self.kept.write(number, asked, drawn)
        return drawn

    def spread(self, responses: int, *, apiece: int) -> list[Group]:
        """At least so many responses at temperature 1, to the first prompts in the order of the seed.

        Args:
            apiece: responses of each prompt, at least; more where the store has too few prompts.
        """
        each = max(apiece, -(-responses // len(self.store)))
        chosen = order(self.store, seed=self.seed, epoch=0, together=False)[: -(-responses // each)]
        asked = [self.store[index] for index in chosen.tolist()]
        drawn = self.sampler.draw(asked, (self.seed, FITTING), samples=each, temperature=1.0)
        self.sampler.spent.clear()
        return drawn

    def completed(self, drawn: list[Group], number: int) -> list[Group]:
        """The groups with the further columns of this step, without those that lack one."""
        for name, make in self.extras.items():
            values = zip(drawn, make(drawn, number), strict=True)
            drawn = [replace(g, given={**g.given, name: value}) for g, value in values if value is not None]
        return drawn

    def _minibatch(self, places: NDArray[np.int64], drawn: Sequence[Group]) -> Minibatch:
        groups = tuple(sorted(places.tolist()))
        lengths = self.sampler.engine.manner.lengths(Measured.of(drawn))
        parts = split(groups, lengths, ranks=distributed.world(), budget=self.budget)
        tokens = sum(len(response) for place in groups for response in drawn[place].responses)
        return Minibatch(groups, tuple(parts[distributed.rank()]), tokens)

    def _spent(self) -> dict[str, float]:
        spent = dict(self.sampler.spent)
        self.sampler.spent.clear()
        return spent


@dataclass(frozen=True)
class Replay(Rollout):
    """The same steps of responses that another run has kept.

    Attributes:
        wanted: columns that were kept beside the responses and that this run asks for.
    """

    wanted: tuple[str, ...]

    def drawn(self, asked: Sequence[Group], number: int) -> list[Group]:
        assert self.kept is not None, "a replay has something to read"
        return self.kept.read(number, self.wanted)
