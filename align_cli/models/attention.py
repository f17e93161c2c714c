"""Attention over a flat row: every response attends to its prompt and to itself, and the prompt is there once.

A row holds whole groups without padding: prompt, response 1, ..., response K, next prompt, ... Its layout travels as
the keyword `align_layout` from the model's call to every attention layer, so no model code is touched. Without a
layout the function is ordinary masked attention: generation and padded batches work as before.

Three kernels compute the same: on a GPU PyTorch's own for sequences of any lengths, on a CPU products over segments
(`align_cli.models.segments`), and anywhere masked attention over buckets of segments of similar length, which also
serves short segments, capped scores and sinks.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention, softmax
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from align_cli.data.batches import Layout
from align_cli.models.segments import SegmentAttention

NAME = "align_shared"
LONG = 48  # tokens of a row's mean segment from which a CPU takes segments one by one


def register() -> None:
    """Make `attn_implementation="align_shared"` known to transformers."""
    AttentionInterface.register(NAME, shared_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def shared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    align_layout: Layout | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in the signature that transformers asks for; `dropout` is ignored, alignment runs without it.

    Args:
        query: (1, heads, T, D) for a flat row, (batch, heads, T, D) otherwise.
        key, value: the same with heads or fewer (grouped queries).
        attention_mask: used only without a layout; True (or 0) where attention is allowed.
        sliding_window: a query sees keys less than this many positions back.
        softcap: scores become softcap tanh(score / softcap), as in Gemma 2.
        s_aux: (heads,) sink logits, as in gpt-oss.
        align_layout: the row's groups.

    Returns:
        (batch, T, heads, D) and None.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if align_layout is not None and softcap is None and s_aux is None:
        if query.device.type == "cpu" and query.shape[2] >= LONG * len(align_layout.segments):
            found = SegmentAttention.apply(query[0], key[0], value[0], align_layout.segments, scale, sliding_window)
            return found[None], None  # pyright: ignore[reportOptionalSubscript]
        if takes_varlen(query, value):
            return varlen_attention(query, key, value, align_layout, scale=scale, window=sliding_window), None

    if query.shape[1] != key.shape[1] and (softcap is not None or s_aux is not None):
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        if softcap is None and s_aux is None:
            return fused_attention(q, k, v, mask, causal=causal, scale=scale)
        if causal:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        return explicit_attention(q, k, v, mask, scale=scale, softcap=softcap, sinks=s_aux)

    if align_layout is None:
        causal = attention_mask is None and query.shape[2] > 1
        return attend(query, key, value, attention_mask, causal).transpose(1, 2), None

    heads, width = query.shape[1], value.shape[-1]
    outputs: list[Tensor] = []
    for bucket in align_layout.buckets:
        mask = bucket.allowed if sliding_window is None else bucket.allowed & (bucket.distance < sliding_window)
        # (1, heads, T, D) -> (n, heads, Q, D)
        found = attend(
            query[0][:, bucket.queries].transpose(0, 1),
            key[0][:, bucket.keys].transpose(0, 1),
            value[0][:, bucket.keys].transpose(0, 1),
            mask,
            False,
        )
        outputs.append(found.transpose(1, 2).reshape(-1, heads, width))
    return torch.cat(outputs)[align_layout.home][None], None


def takes_varlen(query: Tensor, value: Tensor) -> bool:
    """Whether PyTorch's attention over sequences of any lengths computes this, on this device."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    width = query.shape[-1]
    fits = width == value.shape[-1] <= 256 and width % 8 == 0  # the kernel pads nothing
    return half and fits and query.device.type == "cuda" and _flash_capable()


@cache
def _flash_capable() -> bool:
    return torch.cuda.get_device_capability() >= (8, 0)


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, scale: float, window: int | None
) -> Tensor:
    """(1, T, heads, D): every segment a sequence of its own, whose keys are its prompt's and its own."""
    told = layout.varlen
    grouped = query.shape[1] != key.shape[1]
    # The kernel counts the keys before the query's own.
    before = -1 if window is None else window - 1
    found = varlen_attn(
        query[0].transpose(0, 1),
        RepeatPrompts.apply(key[0].transpose(0, 1), told.keys),
        RepeatPrompts.apply(value[0].transpose(0, 1), told.keys),
        told.query_ends,
        told.key_ends,
        told.most_queries,
        told.most_keys,
        scale=scale,
        window_size=(before, 0),
        enable_gqa=grouped,
    )
    return found[None]  # pyright: ignore[reportCallIssue, reportArgumentType]


class RepeatPrompts(torch.autograd.Function):
    """Rows of (T, heads, D) by an index with repeats; their gradients are summed in fp32."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.length = len(row)
        return row.index_select(0, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (index,) = ctx.saved_tensors
        wide = slope.new_zeros(ctx.length, *slope.shape[1:], dtype=torch.promote_types(slope.dtype, torch.float32))
        return wide.index_add_(0, index, slope.to(wide.dtype)).to(slope.dtype), None


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool, scale: float
) -> Tensor:
    """PyTorch's attention, kept off the kernel that writes all scores out, in fp32, wherever there is another.

    Args:
        query: (n, heads, Q, D).
        key: (n, heads or fewer, S, D).
        value: (n, as many, S, E).
        mask: (n, 1 or heads, Q, S).

    Returns:
        (n, heads, Q, E).
    """
    (n, heads, length, width), groups = query.shape, key.shape[1]
    grouped = heads != groups
    if grouped and not takes_groups(query, value, mask):
        if length == 1 and (mask is None or mask.shape[1] == 1):  # the heads of one key become its queries
            packed = query.reshape(n, groups, heads // groups, width)
            found = scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scale)
            return found.reshape(n, heads, 1, -1)
        key, value = (each.repeat_interleave(heads // groups, dim=1) for each in (key, value))
        grouped = False
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def takes_groups(query: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether a fused kernel of this device takes fewer heads of keys than of queries.

    A GPU has one that does, which takes no mask.
    """
    return query.device.type == "cpu" or (mask is None and takes_varlen(query, value))


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention written out, for what the fused kernels lack: capped scores and sinks; softmax in fp32."""
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        # Padding may see nothing at all: finite scores give it a mean, where infinite ones would give NaN, which the
        # next layer's weights of 0 do not take away.
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else (scores + mask).clamp(min=lowest)
    if sinks is not None:
        sink = sinks.float().reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = softmax(scores, dim=-1)
    if sinks is not None:
        weights = weights[..., :-1]
    return weights.to(value.dtype) @ value
