"""Exact attention on a CPU, a segment of a flat row at a time, in matrix products.

PyTorch's fused kernel for CPUs computes what a mask forbids, and in bfloat16 it is no faster than in float32. Here the
queries of a segment go in blocks, each against the keys that it may see and no others; heads that share a key are the
rows of one product. Attention weights are kept for the backward pass while there is room for them and computed again
beyond that, so memory grows with the tokens alone.
"""

from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from align_cli.data.batches import Segment

BLOCK = 192  # queries of one product: fewer compute less that is masked, more make fuller products
KEPT = 1 << 28  # bytes of attention weights that all layers together keep for the backward pass


softmax_backward = torch.ops.aten._softmax_backward_data.default


class SegmentAttention(torch.autograd.Function):
    """Softmax attention of a flat row.

    Args of `apply`:
        query: (heads, T, D).
        key, value: (kv, T, D) and (kv, T, E); heads is a multiple of kv.
        segments: who attends to what; together they cover the row.
        scaling: multiplies the scores.
        window: a query sees keys less than this many positions back; None: all.

    Returns:
        (T, heads, E).
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: tuple[Segment, ...], scaling: float, window: Any
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.told = (segments, scaling, window)
        ctx.kept = Kept(KEPT if any(ctx.needs_input_grad) else 0)
        heads, length, _ = query.shape
        width = value.shape[-1]
        out = value.new_empty(length, heads, width)
        for segment in segments:
            keys, values = segment.seen(key), segment.seen(value)
            for block in _blocks(segment, window):
                weights = _weights(query[:, block.rows], keys[:, block.keys], block, scaling, window)
                ctx.kept.add(weights)
                found = torch.bmm(weights, values[:, block.keys])
                out[block.rows] = found.view(heads, block.size, width).transpose(0, 1)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value = ctx.saved_tensors
        segments, scaling, window = ctx.told
        shared, width = len(key), value.shape[-1]
        d_query = torch.empty_like(query)
        # A prompt's keys collect from every response.
        wide = torch.promote_types(key.dtype, torch.float32)
        d_key, d_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        for segment in segments:
            keys, values = segment.seen(key), segment.seen(value)
            for block in _blocks(segment, window):
                mine = query[:, block.rows]
                weights = ctx.kept.take()
                if weights is None:
                    weights = _weights(mine, keys[:, block.keys], block, scaling, window)
                d_out = slope[block.rows].transpose(0, 1).reshape(shared, -1, width)
                d_weights = torch.bmm(d_out, values[:, block.keys].transpose(1, 2))
                d_scores = softmax_backward(d_weights, weights, -1, weights.dtype)
                d_query[:, block.rows] = torch.bmm(d_scores, keys[:, block.keys]).view_as(mine).mul_(scaling)
                onto_keys = torch.bmm(d_scores.transpose(1, 2), mine.reshape(shared, -1, mine.shape[-1]))
                onto_values = torch.bmm(weights.transpose(1, 2), d_out)
                for inside, place in segment.places(block.keys):
                    d_key[:, place].add_(onto_keys[:, inside], alpha=scaling)
                    d_value[:, place].add_(onto_values[:, inside])
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None, None


class Kept:
    """Attention weights of one layer's first blocks, as many as there is room for beside those of the other layers.

    Args:
        limit: bytes of all layers.
    """

    everywhere = 0  # bytes that all of them hold

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.weights: deque[Tensor] = deque()

    def add(self, weights: Tensor) -> None:
        """Keep the next block's weights, unless those of a block before it found no room."""
        if Kept.everywhere + weights.nbytes > self.limit:
            self.limit = 0
            return
        self.weights.append(weights)
        Kept.everywhere += weights.nbytes

    def take(self) -> Tensor | None:
        """The next block's weights, which are not kept any longer; None where they are not there."""
        if not self.weights:
            return None
        Kept.everywhere -= self.weights[0].nbytes
        return self.weights.popleft()

    def __del__(self) -> None:
        while self.weights:  # a forward pass without a backward pass
            self.take()


class _Block:
    """Queries of a segment that go together, and the stretch of the segment's keys that they may see."""

    def __init__(self, segment: Segment, start: int, window: int | None) -> None:
        end = min(start + BLOCK, segment.own.stop)
        first = segment.depth + start - segment.own.start  # the position of the first query among the keys
        self.size = end - start
        self.rows = slice(start, end)
        self.before = first if window is None else min(first, window - 1)  # keys that the first query sees before it
        self.keys = slice(first - self.before, first + self.size)


def _blocks(segment: Segment, window: int | None) -> Iterator[_Block]:
    return (_Block(segment, start, window) for start in range(segment.own.start, segment.own.stop, BLOCK))


def _weights(query: Tensor, keys: Tensor, block: _Block, scaling: float, window: int | None) -> Tensor:
    """(kv, heads / kv x size, keys of the block): where a query attends."""
    shared, size = len(keys), block.size
    rows = query.reshape(shared, -1, query.shape[-1])
    # Scaled inside of the product, before the scores are rounded; the first argument is not read.
    unread = query.new_empty(1, 1, 1).expand(shared, rows.shape[1], keys.shape[1])
    scores = torch.baddbmm(unread, rows, keys.transpose(1, 2), beta=0, alpha=scaling)
    of_heads = scores.view(shared, -1, size, keys.shape[1])
    of_heads[..., block.before :].add_(_later(size, scores.dtype))
    if window is not None and block.before + size > window:
        of_heads.masked_fill_(_far(size, keys.shape[1], block.before, window), float("-inf"))
    return torch.softmax(scores, dim=-1)


@lru_cache(maxsize=2 * BLOCK)
def _later(size: int, dtype: torch.dtype) -> Tensor:
    """(size, size) -inf above the diagonal, 0 elsewhere; to add it takes a quarter of the time that filling does."""
    return torch.full((size, size), float("-inf"), dtype=dtype).triu(1)


@lru_cache(maxsize=64)
def _far(size: int, keys: int, before: int, window: int) -> Tensor:
    """(size, keys) True where a key is `window` or more positions back."""
    return before + torch.arange(size)[:, None] - torch.arange(keys) >= window
