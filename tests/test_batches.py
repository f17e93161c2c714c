"""Micro-batches: membership of steps, the deal to ranks, the flat row and the masks of its attention."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from align_cli.data.batches import (
    Layout,
    Measured,
    Part,
    Span,
    flatten,
    members,
    order,
    split,
    steps_per_epoch,
)
from align_cli.data.store import Group, Store

sizes = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 5)), min_size=1, max_size=40)


@settings(deadline=None)
@given(sizes=sizes, ranks=st.integers(1, 5), budget=st.integers(1, 100), data=st.data())
def test_a_step_is_dealt_out_whole_and_evenly(
    sizes: list[tuple[int, int]], ranks: int, budget: int, data: st.DataObject
) -> None:
    tokens = np.array([size for size, _ in sizes])
    responses = np.array([k for _, k in sizes])
    prompts = np.array(data.draw(st.lists(st.integers(0, 8), min_size=len(sizes), max_size=len(sizes))))
    own = 1 + prompts % 3  # tokens of a prompt
    lengths = Measured(prompts, own, tokens, responses)
    chosen = data.draw(st.lists(st.sampled_from(range(len(sizes))), min_size=1, unique=True))
    shares = split(chosen, lengths, ranks=ranks, budget=budget)
    assert len(shares) == ranks
    assert len({len(share) for share in shares}) == 1  # ZeRO-3 meets in every forward pass
    counted = [part for share in shares for part in share if part.counted]
    assert sorted(group for part in counted for group in part.groups) == sorted(chosen)
    for part in itertools.chain.from_iterable(shares):
        assert len({int(responses[group]) for group in part.groups}) == 1
        inside = list(part.groups)
        once = dict(zip(prompts[inside].tolist(), own[inside].tolist(), strict=True))  # prompts that groups share
        assert len(inside) == 1 or tokens[inside].sum() + sum(once.values()) <= budget
        assert part.counted or set(part.groups) <= set(chosen)
    assert shares == split(list(reversed(chosen)), lengths, ranks=ranks, budget=budget)


@settings(deadline=None)
@given(sizes=sizes, ranks=st.integers(1, 4))
def test_no_rank_has_much_more_to_do_than_another(sizes: list[tuple[int, int]], ranks: int) -> None:
    tokens = np.array([size for size, _ in sizes])
    responses = np.array([k for _, k in sizes])
    lengths = Measured(np.arange(len(sizes)), np.zeros_like(tokens), tokens, responses)
    shares = split(range(len(sizes)), lengths, ranks=ranks, budget=10**9)
    loads = [sum(int(tokens[list(part.groups)].sum()) for part in share if part.counted) for share in shares]
    # The least loaded rank takes the next group, so that none is ahead by more than the group it took last.
    assert max(loads) - min(loads) <= tokens.max()


@dataclass(frozen=True, eq=False)
class Stocked:
    """As much of a store as membership knows: the prompt of each group."""

    prompts: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)


def stocked(prompts: list[int] | range) -> Store:
    return Stocked(np.array(prompts, dtype=np.int32))  # pyright: ignore[reportReturnType]


@settings(deadline=None)
@given(
    groups=st.lists(st.integers(0, 9), min_size=1, max_size=50),
    prompts=st.integers(1, 20),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 5),
    together=st.booleans(),
)
def test_every_epoch_is_a_permutation_in_steps_of_equal_size(
    groups: list[int], prompts: int, seed: int, epoch: int, together: bool
) -> None:
    store = stocked([list(dict.fromkeys(groups)).index(each) for each in groups])
    per_epoch = steps_per_epoch(len(store), prompts)
    first = epoch * per_epoch + 1
    found = [
        members(store, step, prompts=prompts, seed=seed, together=together) for step in range(first, first + per_epoch)
    ]
    drawn = np.concatenate(found)
    assert sorted(drawn.tolist()) == list(range(len(store)))
    if together:  # each prompt once, with all its groups
        assert len(list(itertools.groupby(store.prompts[drawn].tolist()))) == len(set(groups))
    assert all(len(each) == prompts for each in found[:-1])
    assert 1 <= len(found[-1]) <= prompts


def test_membership_depends_on_seed_and_epoch_alone() -> None:
    def drawn(step: int, seed: int) -> np.ndarray:
        return members(store, step, prompts=10, seed=seed, together=True)

    store = stocked(range(100))
    first = drawn(3, 1)
    order.cache_clear()
    np.random.default_rng(5)
    drawn(95, 7)
    assert np.array_equal(drawn(3, 1), first)
    assert not np.array_equal(drawn(3, 2), first)
    assert not np.array_equal(drawn(13, 1), first)


@st.composite
def groups_of_one_k(draw: st.DrawFn) -> list[Group]:
    """One to four groups with the same number of responses; token ids tell where each came from."""
    k = draw(st.integers(1, 4))
    found: list[Group] = []
    token = itertools.count(3)
    for index in range(draw(st.integers(1, 3))):
        prompt = [next(token) for _ in range(draw(st.integers(1, 24)))]
        responses = [[next(token) for _ in range(draw(st.integers(1, 24)))] for _ in range(k)]
        ratings = np.arange(k, dtype=np.float32) + index
        arrays = tuple(np.array(response, dtype=np.int32) for response in responses)
        found.append(Group(index, np.array(prompt, dtype=np.int32), arrays, ratings, f"row {index}"))
    return found


@settings(deadline=None, max_examples=40)
@given(groups=groups_of_one_k())
def test_a_flat_row_is_what_a_naive_construction_makes(groups: list[Group]) -> None:
    ids: list[int] = []
    positions: list[int] = []
    predicted: list[tuple[int, int, int, int]] = []  # state, target, response, slot
    k = len(groups[0].responses)
    for b, group in enumerate(groups):
        start = len(ids)
        ids += group.prompt.tolist()
        positions += range(len(group.prompt))
        for number, response in enumerate(group.responses):
            for slot, token in enumerate(response.tolist()):
                state = start + len(group.prompt) - 1 if slot == 0 else len(ids) - 1
                predicted.append((state, token, b * k + number, slot))
                positions.append(len(group.prompt) + slot)
                ids.append(token)
    batch = flatten(groups)
    assert batch.input_ids.tolist() == [ids]
    assert batch.position_ids.tolist() == [positions]
    found = [column.tolist() for column in (batch.keep, batch.targets, batch.response, batch.slot)]
    assert list(zip(*found, strict=True)) == predicted
    assert batch.lengths.tolist() == [[len(response) for response in group.responses] for group in groups]
    assert batch.mask().sum(-1).tolist() == batch.lengths.tolist()
    assert batch.ratings.tolist() == [group.ratings.tolist() for group in groups]
    assert batch.shape == (len(groups), k)


def seen(layout_spans: list[Span]) -> Tensor:
    """(T, T) whether position i may attend to j, token by token."""
    owner: list[tuple[int, int, int]] = []  # group, response (0 for the prompt), position
    for group, span in enumerate(layout_spans):
        owner += [(group, 0, position) for position in range(span.prompt)]
        for number, length in enumerate(span.responses, start=1):
            owner += [(group, number, span.prompt + position) for position in range(length)]
    group, number, position = torch.tensor(owner).unbind(-1)
    same = group[:, None] == group
    shared = (number[:, None] == number) | (number == 0)
    return same & shared & (position <= position[:, None])


@settings(deadline=None, max_examples=40)
@given(groups=groups_of_one_k(), window=st.one_of(st.none(), st.integers(1, 50)))
def test_buckets_allow_what_a_naive_mask_allows(groups: list[Group], window: int | None) -> None:
    batch = flatten(groups)
    layout = batch.layout
    rows = batch.input_ids.shape[1]
    expected = seen(list(layout.spans))
    positions = batch.position_ids[0]
    if window is not None:
        expected &= positions[:, None] - positions[None, :] < window
    taken: list[tuple[Tensor, Tensor]] = []  # of each query of each bucket: keys, allowed
    for bucket in layout.buckets:
        allowed = bucket.allowed if window is None else bucket.allowed & (bucket.distance < window)
        assert bucket.allowed.any(-1).all()  # no softmax is over nothing
        for number in range(len(bucket.queries)):
            taken += [(bucket.keys[number], row) for row in allowed[number, 0]]
    found = torch.zeros(rows, rows, dtype=torch.long)
    for position in range(rows):
        keys, allowed = taken[int(layout.home[position])]
        found[position].index_add_(0, keys[allowed], torch.ones(int(allowed.sum()), dtype=torch.long))
    assert torch.equal(found, expected.long())  # each key once
    queries = torch.cat([bucket.queries.reshape(-1) for bucket in layout.buckets])
    assert torch.equal(queries[layout.home], torch.arange(rows))


def test_padding_of_buckets_stays_below_what_they_compute() -> None:
    generator = np.random.default_rng(0)
    place, found = 0, []
    for _ in range(30):
        prompt, lengths = int(generator.integers(20, 300)), tuple(generator.integers(20, 500, 4).tolist())
        found.append(Span(place, prompt, lengths))
        place += prompt + sum(lengths)
    useful = sum(s.prompt**2 + sum(length * (s.prompt + length) for length in s.responses) for s in found)
    computed = sum(bucket.allowed.numel() for bucket in Layout(tuple(found), torch.device("cpu")).buckets)
    assert useful <= computed < 2 * useful


def test_a_batch_moves_whole() -> None:
    groups = [Group(0, np.array([3, 4], np.int32), (np.array([5], np.int32),), np.zeros(1, np.float32), "here")]
    moved = flatten(groups, counted=False).to(torch.device("meta"))
    tensors = [value for value in vars(moved).values() if isinstance(value, Tensor)]
    assert moved.layout.device == torch.device("meta")
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert not moved.counted and moved.groups == tuple(groups)


def group(prompt: list[int], responses: list[list[int]], where: str) -> Group:
    arrays = tuple(np.array(response, dtype=np.int32) for response in responses)
    return Group(0, np.array(prompt, dtype=np.int32), arrays, np.arange(len(arrays), dtype=np.float32), where)


def test_what_groups_of_a_prompt_share_is_in_the_row_once() -> None:
    first = group([3, 4], [[5, 6], [7]], "first")
    again = group([3, 4], [[7], [8, 8, 8]], "again")
    other = group([9], [[7], [5, 6]], "other")
    batch = flatten([first, other, again])
    assert batch.input_ids.tolist() == [[3, 4, 5, 6, 7, 8, 8, 8, 9, 7, 5, 6]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 2, 3, 4, 0, 1, 1, 2]]
    assert batch.member.tolist() == [[0, 1], [3, 4], [1, 2]]
    assert batch.lengths.tolist() == [[2, 1], [1, 2], [1, 3]]
    assert batch.targets.tolist() == [5, 6, 7, 8, 8, 8, 7, 5, 6]
    assert batch.keep.tolist() == [1, 2, 1, 1, 5, 6, 8, 8, 10]
    assert batch.response.tolist() == [0, 0, 1, 2, 2, 2, 3, 4, 4]
    assert batch.shape == (3, 2)


def test_a_row_without_sharing_repeats_the_prompt_for_each_response() -> None:
    pair = group([3, 4], [[5, 6], [7]], "pair")
    batch = flatten([pair, pair], share=False)
    assert batch.input_ids.tolist() == [[3, 4, 5, 6, 3, 4, 7] * 2]
    assert batch.member.tolist() == [[0, 1], [2, 3]]


def test_groups_of_a_prompt_go_together_as_far_as_the_budget_allows() -> None:
    prompts, tens = np.array([0, 1, 0, 1, 0, 2]), np.full(6, 10)
    lengths = Measured(prompts, tens, tens, np.full(6, 2))
    shares = split(range(6), lengths, ranks=1, budget=30)
    assert sorted(part.groups for part in shares[0]) == [(0, 2), (1, 3), (4,), (5,)]  # 10 + 2 x 10
    assert split(range(6), lengths, ranks=1, budget=90) == [[Part((0, 2, 4, 1, 3, 5))]]


def test_rows_without_sharing_count_a_copy_of_the_prompt_for_each_response() -> None:
    lengths = Measured(np.array([0, 0]), np.array([10, 10]), np.array([6, 8]), np.array([2, 3]))
    apart = Measured.apart(lengths)
    assert (apart.prompt_tokens + apart.response_tokens).tolist() == [26, 38]
