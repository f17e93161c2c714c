"""From tokenised groups to the micro-batches of an optimizer step.

Membership of a step depends on (seed, epoch) alone. The groups of a step are then dealt to ranks and split into
micro-batches of one K under a token budget, the same number on every rank, because ZeRO-3 has collectives inside
the forward pass. Every rank computes the same plan, so nothing is communicated.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

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
class Step:
    """The groups of one optimizer step, over all ranks, and this rank's micro-batches."""

    number: int
    groups: tuple[int, ...]
    parts: tuple[Part, ...]


@lru_cache(maxsize=2)
def order(groups: int, *, seed: int, epoch: int) -> np.ndarray:
    """A shuffle of range(groups) that depends on (seed, epoch) alone."""
    return np.random.default_rng((seed, epoch)).permutation(groups)


def steps_per_epoch(groups: int, prompts: int) -> int:
    """Optimizer steps in one pass; the last one takes what is left."""
    return -(-groups // prompts)


def members(groups: int, step: int, *, prompts: int, seed: int) -> np.ndarray:
    """Indices of the groups of optimizer step `step`, counted from 1."""
    epoch, position = divmod(step - 1, steps_per_epoch(groups, prompts))
    return order(groups, seed=seed, epoch=epoch)[position * prompts : (position + 1) * prompts]


def split(
    groups: Sequence[int], tokens: np.ndarray, responses: np.ndarray, *, ranks: int, budget: int
) -> list[list[Part]]:
    """Deal groups to ranks and cut each rank's share into micro-batches.

    Args:
        groups: indices of the step's groups.
        tokens: tokens of each group of the store, prompt and all responses, (n,).
        responses: K of each group of the store, (n,).
        ranks: how many share the step.
        budget: most tokens of a micro-batch; a larger group is a micro-batch alone.

    Returns:
        For each rank its parts, the same number for every rank.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = np.zeros(ranks, dtype=np.int64)
    for group in sorted(groups, key=lambda g: (-int(tokens[g]), g)):
        rank = int(load.argmin())
        shares[rank].append(group)
        load[rank] += tokens[group]
    parts = [_pack(share, tokens, responses, budget) for share in shares]
    longest = max(len(p) for p in parts)
    filler = Part((min(groups, key=lambda g: (int(tokens[g]), g)),), counted=False)
    return [p + [filler] * (longest - len(p)) for p in parts]


def _pack(share: Sequence[int], tokens: np.ndarray, responses: np.ndarray, budget: int) -> list[Part]:
    """First fit, longest first, one K to a micro-batch."""
    bins: list[tuple[int, int, list[int]]] = []
    for group in share:
        size, k = int(tokens[group]), int(responses[group])
        for place, (bin_k, used, inside) in enumerate(bins):
            if bin_k == k and used + size <= budget:
                inside.append(group)
                bins[place] = (bin_k, used + size, inside)
                break
        else:
            bins.append((k, size, [group]))
    return [Part(tuple(inside)) for _, _, inside in bins]


def steps(
    store: Store, *, first: int, last: int, prompts: int, seed: int, rank: int, ranks: int, budget: int
) -> Iterator[Step]:
    """The optimizer steps `first`..`last`, counted from 1, as this rank sees them."""
    tokens = store.prompt_tokens + store.response_tokens
    for number in range(first, last + 1):
        groups = members(len(store), number, prompts=prompts, seed=seed)
        parts = split(groups.tolist(), tokens, store.responses, ranks=ranks, budget=budget)
        yield Step(number, tuple(groups.tolist()), tuple(parts[rank]))


@dataclass(frozen=True)
class Span:
    """Where one group lies in a flat row: `start`, then `prompt` tokens, then the tokens of each response."""

    start: int
    prompt: int
    responses: tuple[int, ...]


@dataclass(frozen=True)
class Bucket:
    """Segments of similar length, padded to the longest, whose attention is one call.

    A segment is a prompt, which attends to itself, or a response, which attends to its prompt and to itself.

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
class Layout:
    """The groups of a flat row, as attention needs them.

    Attributes:
        spans: one for each group.
        buckets: all segments of the row.
        home: (T,) where each position of the row stands among the buckets' queries, one bucket after the other.
    """

    spans: tuple[Span, ...]
    buckets: tuple[Bucket, ...]
    home: Tensor

    def to(self, device: torch.device) -> "Layout":
        """The same on another device."""
        buckets = tuple(Bucket(**{n: t.to(device) for n, t in vars(bucket).items()}) for bucket in self.buckets)
        return Layout(self.spans, buckets, self.home.to(device))


def lay_out(spans: Sequence[Span]) -> Layout:
    """Sort the segments of a row into buckets, so that a call's padding stays below the size of what it computes."""
    segments: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray]]] = {}
    for span in spans:
        prompt = np.arange(span.start, span.start + span.prompt)
        segments.setdefault(_size(span.prompt, 0), []).append((prompt, prompt))
        place = span.start + span.prompt
        for length in span.responses:
            own = np.arange(place, place + length)
            segments.setdefault(_size(length, span.prompt), []).append((own, np.concatenate([prompt, own])))
            place += length
    end = max(span.start + span.prompt + sum(span.responses) for span in spans)
    home = np.empty(end, dtype=np.int64)
    buckets: list[Bucket] = []
    offset = 0
    for members_ in segments.values():
        width = max(len(own) for own, _ in members_)
        for number, (own, _) in enumerate(members_):
            home[own] = offset + number * width + np.arange(len(own))
        offset += len(members_) * width
        buckets.append(_bucket(members_))
    return Layout(tuple(spans), tuple(buckets), torch.from_numpy(home))


def _size(queries: int, before: int) -> tuple[int, int]:
    """Segments of one size share a bucket: lengths up to 16, then up to each power of the square root of 2."""

    def step(length: int) -> int:
        return 0 if length <= 16 else int(np.ceil(2 * np.log2(length)))

    return step(queries), step(before)


def _bucket(segments: Sequence[tuple[np.ndarray, np.ndarray]]) -> Bucket:
    width = max(len(own) for own, _ in segments)
    depth = max(len(seen) for _, seen in segments)
    queries = np.zeros((len(segments), width), dtype=np.int64)
    keys = np.zeros((len(segments), depth), dtype=np.int64)
    distance = np.full((len(segments), 1, width, depth), -1, dtype=np.int32)
    for number, (own, seen) in enumerate(segments):
        queries[number, : len(own)] = own
        keys[number, : len(seen)] = seen
        position = np.arange(len(seen) - len(own), len(seen))
        distance[number, 0, : len(own), : len(seen)] = position[:, None] - np.arange(len(seen))[None, :]
        distance[number, 0, len(own) :, 0] = 0
    allowed = torch.from_numpy(distance >= 0)
    return Bucket(torch.from_numpy(queries), torch.from_numpy(keys), allowed, torch.from_numpy(distance))


@dataclass(frozen=True)
class MicroBatch:
    """B groups of K responses as one flat row of T tokens, and what is known about them.

    Attributes:
        input_ids: (1, T) prompt, response 1, ..., response K, next prompt, ...
        position_ids: (1, T) each response continues the positions of its prompt.
        layout: where the B groups lie in the row.
        keep: (N,) position in the row of the state that predicts each response token.
        targets: (N,) the response tokens.
        response: (N,) b K + k, whose token it is.
        slot: (N,) its place in the response.
        ratings: (B, K).
        lengths: (B, K) tokens of each response.
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
    ratings: Tensor
    lengths: Tensor
    groups: tuple[Group, ...]
    counted: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        """(B, K)."""
        return self.lengths.shape[0], self.lengths.shape[1]

    def mask(self) -> Tensor:
        """(B, K, T) 1 on response tokens."""
        slots = torch.arange(int(self.lengths.max()), device=self.lengths.device)
        return (slots < self.lengths[..., None]).float()

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor | Layout)}
        return MicroBatch(**{**vars(self), **moved})


def flatten(groups: Sequence[Group], *, counted: bool = True) -> MicroBatch:
    """Lay groups of one K out as a flat row."""
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    layout: list[Span] = []
    keep: list[np.ndarray] = []
    slots: list[np.ndarray] = []
    place = 0
    for group in groups:
        prompt, lengths = len(group.prompt), [len(r) for r in group.responses]
        layout.append(Span(place, prompt, tuple(lengths)))
        ids.append(group.prompt)
        positions.append(np.arange(prompt))
        last = place + prompt - 1
        place += prompt
        for response, length in zip(group.responses, lengths, strict=True):
            ids.append(response)
            positions.append(np.arange(prompt, prompt + length))
            keep.append(np.concatenate([[last], np.arange(place, place + length - 1)]))
            slots.append(np.arange(length))
            place += length
    targets = np.concatenate([response for group in groups for response in group.responses])
    lengths = np.array([[len(r) for r in group.responses] for group in groups])
    return MicroBatch(
        input_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64))[None],
        position_ids=torch.from_numpy(np.concatenate(positions).astype(np.int64))[None],
        layout=lay_out(layout),
        keep=torch.from_numpy(np.concatenate(keep).astype(np.int64)),
        targets=torch.from_numpy(targets.astype(np.int64)),
        response=torch.from_numpy(np.repeat(np.arange(lengths.size), lengths.reshape(-1))),
        slot=torch.from_numpy(np.concatenate(slots).astype(np.int64)),
        ratings=torch.from_numpy(np.stack([group.ratings for group in groups]).astype(np.float32)),
        lengths=torch.from_numpy(lengths),
        groups=tuple(groups),
        counted=counted,
    )
