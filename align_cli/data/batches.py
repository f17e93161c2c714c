"""From tokenised groups to the micro-batches of an optimizer step.

Membership of a step depends on (seed, epoch) alone. The groups of a step are then dealt to ranks and split into
micro-batches of one K under a token budget, the same number on every rank, because ZeRO-3 has collectives inside
the forward pass. Every rank computes the same plan, so nothing is communicated.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from align_cli.data.store import Group, Store


@dataclass(frozen=True)
class Part:
    """One micro-batch of one rank: indices of groups, all with the same K; an uncounted part only keeps step."""

    groups: tuple[int, ...]
    counted: bool = True


@dataclass(frozen=True)
class Minibatch:
    """What the weights are updated from at a time: groups over all ranks, and this rank's micro-batches.

    Attributes:
        response_tokens: of all responses of all groups.
    """

    groups: tuple[int, ...]
    parts: tuple[Part, ...]
    response_tokens: int


@dataclass(frozen=True)
class Step:
    """What the source gives at a time.

    Attributes:
        minibatches: disjoint.
        order: the updates of the weights, as numbers of minibatches; samples may be learned from more than once.
        store: what groups and parts are indices into.
        tokens: of all groups; a group's prompt counts once.
        seconds: what making it took, by kind of work.
        unrated: prompts that it goes without, because responses to them could not be rated.
    """

    number: int
    minibatches: tuple[Minibatch, ...]
    order: tuple[int, ...]
    store: "Groups"
    tokens: int
    seconds: dict[str, float]
    unrated: int

    @property
    def groups(self) -> tuple[int, ...]:
        """Of all minibatches."""
        return tuple(index for minibatch in self.minibatches for index in minibatch.groups)


@lru_cache(maxsize=2)
def order(store: Store, *, seed: int, epoch: int, together: bool) -> np.ndarray:
    """A shuffle of the groups of a store that depends on its prompts and on (seed, epoch) alone.

    Args:
        together: groups of one prompt follow each other, so that a step computes what they share once.
    """
    draw = np.random.default_rng((seed, epoch)).permutation
    if not together:
        return draw(len(store))
    prompts = np.asarray(store.prompts)
    place = np.argsort(draw(int(prompts.max(initial=-1)) + 1))
    return np.argsort(place[prompts], kind="stable")


def steps_per_epoch(groups: int, prompts: int) -> int:
    """Optimizer steps in one pass; the last one takes what is left."""
    return -(-groups // prompts)


def members(store: Store, step: int, *, prompts: int, seed: int, together: bool) -> np.ndarray:
    """Indices of the groups of optimizer step `step`, counted from 1."""
    epoch, position = divmod(step - 1, steps_per_epoch(len(store), prompts))
    shuffled = order(store, seed=seed, epoch=epoch, together=together)
    return shuffled[position * prompts : (position + 1) * prompts]


class Groups(Protocol):
    """Groups by their index; a `Store` and a list are some."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Group: ...


class Lengths(Protocol):
    """What a deal of groups to ranks must know of them; a `Store` does.

    Attributes:
        prompts: (n,) the number of each group's prompt.
        prompt_tokens: (n,) its tokens.
        response_tokens: (n,) tokens of all responses of the group.
        responses: (n,) K of the group.
    """

    @property
    def prompts(self) -> np.ndarray: ...
    @property
    def prompt_tokens(self) -> np.ndarray: ...
    @property
    def response_tokens(self) -> np.ndarray: ...
    @property
    def responses(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Measured:
    """The lengths of groups that lie in no store, or in rows of another kind."""

    prompts: np.ndarray
    prompt_tokens: np.ndarray
    response_tokens: np.ndarray
    responses: np.ndarray

    @staticmethod
    def of(groups: Sequence[Group]) -> "Measured":
        """Of these groups, in their order."""
        numbers: dict[bytes, int] = {}
        return Measured(
            np.array([numbers.setdefault(group.prompt.tobytes(), len(numbers)) for group in groups]),
            np.array([len(group.prompt) for group in groups]),
            np.array([sum(map(len, group.responses)) for group in groups]),
            np.array([len(group.responses) for group in groups]),
        )

    @staticmethod
    def apart(lengths: Lengths) -> "Measured":
        """The same where every response brings its own copy of the prompt."""
        responses = np.asarray(lengths.responses)
        return Measured(
            np.arange(len(responses)), lengths.prompt_tokens * responses, lengths.response_tokens, responses
        )


def split(groups: Sequence[int], lengths: Lengths, *, ranks: int, budget: int) -> list[list[Part]]:
    """Deal groups to ranks and cut each rank's share into micro-batches.

    Groups of one prompt stay together as far as the budget allows.

    Args:
        groups: indices of the step's groups.
        lengths: of all groups that are counted in `groups`.
        ranks: how many share the step.
        budget: most tokens of a micro-batch; a larger group is a micro-batch alone.

    Returns:
        For each rank its parts, the same number for every rank.
    """
    shares: list[list[Unit]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    units = _units(groups, lengths, budget)
    for unit in units:
        rank = load.index(min(load))
        shares[rank].append(unit)
        load[rank] += unit.tokens
    parts = [_pack(share, budget) for share in shares]
    longest = max(len(p) for p in parts)
    filler = Part(units[-1].groups[:1], counted=False)
    return [p + [filler] * (longest - len(p)) for p in parts]


@dataclass(frozen=True)
class Unit:
    """Groups of one prompt and one K that go together; `tokens` counts the prompt once."""

    responses: int
    tokens: int
    groups: tuple[int, ...]


def _units(groups: Sequence[int], lengths: Lengths, budget: int) -> list[Unit]:
    """The units of a step, the largest first."""
    found: dict[tuple[int, int], list[Unit]] = {}
    for group in sorted(groups):
        k, prompt = int(lengths.responses[group]), int(lengths.prompt_tokens[group])
        more = int(lengths.response_tokens[group])
        of_prompt = found.setdefault((int(lengths.prompts[group]), k), [])
        if of_prompt and of_prompt[-1].tokens + more <= budget:
            last = of_prompt.pop()
            of_prompt.append(Unit(k, last.tokens + more, (*last.groups, group)))
        else:
            of_prompt.append(Unit(k, prompt + more, (group,)))
    return sorted((unit for units in found.values() for unit in units), key=lambda unit: (-unit.tokens, unit.groups))


def _pack(share: Sequence[Unit], budget: int) -> list[Part]:
    """First fit, longest first, one K to a micro-batch."""
    bins: list[Unit] = []
    for unit in share:
        for place, inside in enumerate(bins):
            if inside.responses == unit.responses and inside.tokens + unit.tokens <= budget:
                bins[place] = Unit(unit.responses, inside.tokens + unit.tokens, inside.groups + unit.groups)
                break
        else:
            bins.append(unit)
    return [Part(inside.groups) for inside in bins]


def steps(
    store: Store,
    lengths: Lengths,
    *,
    first: int,
    last: int,
    prompts: int,
    seed: int,
    together: bool,
    rank: int,
    ranks: int,
    budget: int,
) -> Iterator[Step]:
    """The optimizer steps `first`..`last`, counted from 1, as this rank sees them.

    Args:
        lengths: of the store's groups as a row holds them.
    """
    for number in range(first, last + 1):
        groups = members(store, number, prompts=prompts, seed=seed, together=together).tolist()
        parts = split(groups, lengths, ranks=ranks, budget=budget)
        responses = int(store.response_tokens[groups].sum())
        tokens = int(store.prompt_tokens[groups].sum()) + responses
        yield Step(number, (Minibatch(tuple(groups), tuple(parts[rank]), responses),), (0,), store, tokens, {}, 0)


@dataclass(frozen=True)
class Span:
    """Where one group lies in a flat row: `start`, then `prompt` tokens, then the tokens of each response."""

    start: int
    prompt: int
    responses: tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """Tokens of a row that attend to what is before them in their sequence and to themselves.

    Attributes:
        prompt: the place of the prompt that they follow; empty for a prompt itself.
        own: their place.
    """

    prompt: slice
    own: slice

    @property
    def depth(self) -> int:
        """Tokens of the prompt."""
        return self.prompt.stop - self.prompt.start

    def seen(self, row: Tensor) -> Tensor:
        """(heads, depth + own, D) of a row (heads, T, D): all that it may see, in the order of its sequence."""
        return torch.cat([row[:, self.prompt], row[:, self.own]], dim=1)

    def places(self, stretch: slice) -> Iterator[tuple[slice, slice]]:
        """Where a stretch of what `seen` returns stands in itself and in the row: in the prompt, then in its own."""
        for part, offset in ((self.prompt, 0), (self.own, self.depth)):
            start, stop = max(stretch.start, offset), min(stretch.stop, offset + part.stop - part.start)
            if start < stop:
                shift = part.start - offset
                yield slice(start - stretch.start, stop - stretch.start), slice(start + shift, stop + shift)


@dataclass(frozen=True)
class Bucket:
    """Segments of similar length, padded to the longest, whose attention is one call.

    Attributes:
        queries: (n, Q) positions in the row of each segment's own tokens; padding repeats position 0.
        keys: (n, S) positions in the row of what they may attend to, in the order of the sequence.
        allowed: (n, 1, Q, S) True where attention is causal and not to padding. A padded query sees key 0, so that no
            softmax is over nothing.
        distance: (n, 1, Q, S) how many positions back a key is, for sliding windows; int32.
    """

    queries: Tensor
    keys: Tensor
    allowed: Tensor
    distance: Tensor


@dataclass(frozen=True)
class Varlen:
    """All segments, one after the other, for kernels that take sequences of any lengths.

    Attributes:
        keys: (S,) positions in the row of what each segment may attend to; prompts repeat.
        query_ends, key_ends: (n + 1,) int32, where segments end among queries, which are the row itself, and keys.
        most_queries, most_keys: of the longest segment.
    """

    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    most_queries: int
    most_keys: int


@dataclass(frozen=True)
class Layout:
    """The groups of a flat row, as attention needs them; each kernel's form is made when it is first asked for.

    Attributes:
        spans: one for each group.
        device: where tensors are wanted.
    """

    spans: tuple[Span, ...]
    device: torch.device

    def to(self, device: torch.device) -> "Layout":
        """The same on another device."""
        return self if device == self.device else Layout(self.spans, device)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Of the row, in its order; together they cover it."""
        found: list[Segment] = []
        for span in self.spans:
            place = span.start + span.prompt
            prompt = slice(span.start, place)
            found.append(Segment(slice(span.start, span.start), prompt))
            for length in span.responses:
                found.append(Segment(prompt, slice(place, place + length)))
                place += length
        return tuple(found)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """All segments by size, so that a call's padding stays below the size of what it computes."""
        return tuple(_bucket(sizes, self.device) for sizes in self._by_size())

    @cached_property
    def home(self) -> Tensor:
        """(T,) where each position of the row stands among the buckets' queries, one bucket after the other."""
        home = np.empty(self.segments[-1].own.stop, dtype=np.int64)
        offset = 0
        for segments in self._by_size():
            width = max(_length(each.own) for each in segments)
            for each in segments:
                home[each.own] = np.arange(offset, offset + _length(each.own))
                offset += width
        return torch.from_numpy(home).to(self.device)

    @cached_property
    def varlen(self) -> Varlen:
        """The segments as sequences of their own."""
        keys = [torch.arange(part.start, part.stop) for each in self.segments for part in (each.prompt, each.own)]
        queries = [_length(each.own) for each in self.segments]
        depths = [each.depth + own for each, own in zip(self.segments, queries, strict=True)]
        ends = [torch.tensor([0, *accumulate(lengths)], dtype=torch.int32) for lengths in (queries, depths)]
        on_device = [tensor.to(self.device) for tensor in (torch.cat(keys), *ends)]
        return Varlen(on_device[0], on_device[1], on_device[2], max(queries), max(depths))

    def _by_size(self) -> list[list[Segment]]:
        sizes: dict[tuple[int, int], list[Segment]] = {}
        for each in self.segments:
            sizes.setdefault((_size(_length(each.own)), _size(each.depth)), []).append(each)
        return list(sizes.values())


def _length(part: slice) -> int:
    return part.stop - part.start


def _size(length: int) -> int:
    """Lengths of one size share a bucket: up to 16, then up to each power of the square root of 2."""
    return 0 if length <= 16 else int(np.ceil(2 * np.log2(length)))


def _bucket(segments: Sequence[Segment], device: torch.device) -> Bucket:
    width = max(_length(each.own) for each in segments)
    depth = max(each.depth + _length(each.own) for each in segments)
    queries = np.zeros((len(segments), width), dtype=np.int64)
    keys = np.zeros((len(segments), depth), dtype=np.int64)
    distance = np.full((len(segments), 1, width, depth), -1, dtype=np.int32)
    for number, each in enumerate(segments):
        own, seen = _length(each.own), each.depth + _length(each.own)
        queries[number, :own] = np.arange(each.own.start, each.own.stop)
        keys[number, : each.depth] = np.arange(each.prompt.start, each.prompt.stop)
        keys[number, each.depth : seen] = np.arange(each.own.start, each.own.stop)
        distance[number, 0, :own, :seen] = np.arange(each.depth, seen)[:, None] - np.arange(seen)[None, :]
        distance[number, 0, own:, 0] = 0
    back = torch.from_numpy(distance).to(device)
    return Bucket(torch.from_numpy(queries).to(device), torch.from_numpy(keys).to(device), back >= 0, back)


@dataclass(frozen=True)
class MicroBatch:
    """B groups of K responses as one flat row of T tokens, and what is known about them.

    A prompt is in the row once, however many groups it has, and so is a response that a prompt has several times.

    Attributes:
        input_ids: (1, T) prompt, response 1, response 2, ..., next prompt, ...
        position_ids: (1, T) each response continues the positions of its prompt.
        layout: where the prompts and responses lie in the row.
        keep: (N,) position in the row of the state that predicts each response token.
        targets: (N,) the response tokens.
        response: (N,) whose token it is, in [0, U) for U different responses.
        slot: (N,) its place in the response.
        member: (B, K) which of the U responses it is.
        ratings: (B, K).
        lengths: (B, K) tokens of each response.
        given: further columns of the source, by their names.
        behavior: (B, K, T) log-probabilities of the tokens of sampled responses where they were sampled, nats, 0 beyond
            a response's end; None for others.
        groups: the B groups themselves.
        counted: False for a part that only keeps step with other ranks.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: Layout
    keep: Tensor
    targets: Tensor
    response: Tensor
    slot: Tensor
    member: Tensor
    ratings: Tensor
    lengths: Tensor
    given: dict[str, Tensor]
    behavior: Tensor | None
    groups: tuple[Group, ...]
    counted: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        """(B, K)."""
        return self.lengths.shape[0], self.lengths.shape[1]

    @property
    def longest(self) -> int:
        """Tokens of the longest response, without asking the device."""
        return max(length for span in self.layout.spans for length in span.responses)

    def mask(self) -> Tensor:
        """(B, K, T) 1 on response tokens."""
        return (torch.arange(self.longest, device=self.lengths.device) < self.lengths[..., None]).float()

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor | Layout)}
        given = {name: value.to(device) for name, value in self.given.items()}
        return MicroBatch(**{**vars(self), **moved, "given": given})


def flatten(groups: Sequence[Group], *, share: bool = True, counted: bool = True) -> MicroBatch:
    """Lay groups of one K out as a flat row.

    Args:
        share: one copy of a prompt for all its responses; otherwise one for each.
    """
    # Prompt -> response -> its number; the numbers follow the row.
    tree: dict[tuple[bytes, int], dict[bytes, None]] = {}
    for b, group in enumerate(groups):
        for k, response in enumerate(group.responses):
            key = group.prompt.tobytes(), 0 if share else b * len(group.responses) + k
            tree.setdefault(key, {})[response.tobytes()] = None
    ids: list[np.ndarray] = []
    spans: list[Span] = []
    keep: list[np.ndarray] = []
    number: dict[tuple[bytes, int, bytes], int] = {}
    place = 0
    for (prompt, copy), followers in tree.items():
        tokens, *responses = (np.frombuffer(each, dtype=np.int32) for each in (prompt, *followers))
        spans.append(Span(place, len(tokens), tuple(len(response) for response in responses)))
        ids += [tokens, *responses]
        last = place + len(tokens) - 1
        place += len(tokens)
        for name, response in zip(followers, responses, strict=True):
            number[prompt, copy, name] = len(number)
            keep.append(np.concatenate([[last], np.arange(place, place + len(response) - 1)]))
            place += len(response)
    member = [
        [
            number[group.prompt.tobytes(), 0 if share else b * len(group.responses) + k, response.tobytes()]
            for k, response in enumerate(group.responses)
        ]
        for b, group in enumerate(groups)
    ]
    lengths = np.array([length for span in spans for length in span.responses])
    positions = [
        part
        for span in spans
        for part in (np.arange(span.prompt), *(np.arange(span.prompt, span.prompt + n) for n in span.responses))
    ]
    row = np.concatenate(ids).astype(np.int64)
    targets = np.concatenate([np.frombuffer(r, dtype=np.int32) for f in tree.values() for r in f]).astype(np.int64)
    return MicroBatch(
        input_ids=torch.from_numpy(row)[None],
        position_ids=torch.from_numpy(np.concatenate(positions))[None],
        layout=Layout(tuple(spans), torch.device("cpu")),
        keep=torch.from_numpy(np.concatenate(keep)),
        targets=torch.from_numpy(targets),
        response=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        slot=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        member=torch.tensor(member),
        ratings=torch.from_numpy(np.stack([group.ratings for group in groups]).astype(np.float32)),
        lengths=torch.from_numpy(lengths)[torch.tensor(member)],
        given={name: torch.from_numpy(np.stack([group.given[name] for group in groups])) for name in groups[0].given},
        behavior=_behavior(groups),
        groups=tuple(groups),
        counted=counted,
    )


def _behavior(groups: Sequence[Group]) -> Tensor | None:
    known = [group.behavior for group in groups if group.behavior is not None]
    if len(known) < len(groups):
        return None
    longest = max(len(tokens) for responses in known for tokens in responses)
    padded = np.zeros((len(known), len(known[0]), longest), dtype=np.float32)
    for b, responses in enumerate(known):
        for k, tokens in enumerate(responses):
            padded[b, k, : len(tokens)] = tokens
    return torch.from_numpy(padded)
