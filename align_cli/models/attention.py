"""Attention over a flat row: every response attends to its prompt and to itself, and the prompt is there once.

A row holds whole groups without padding: prompt, response 1, ..., response K, next prompt, ... Its layout travels as
the keyword `align_layout` from the model's call to every attention layer, so no model code is touched. Without a
layout the function is ordinary masked attention: generation and padded batches work as before.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, softmax
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from align_cli.data.batches import Span

NAME = "align_shared"


Layout = Sequence[Span]


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
    if query.shape[1] != key.shape[1] and (softcap is not None or s_aux is not None):
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        if softcap is None and s_aux is None:
            grouped = q.shape[1] != k.shape[1]
            return scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=grouped
            )
        if causal:
            mask = causal_mask(q.shape[2], k.shape[2], None, q.device)
        return explicit_attention(q, k, v, mask, scaling=scaling, softcap=softcap, sinks=s_aux)

    if align_layout is None:
        causal = attention_mask is None and query.shape[2] > 1
        return attend(query, key, value, attention_mask, causal).transpose(1, 2), None

    pieces: list[Tensor] = []
    for span in align_layout:
        prompt = slice(span.start, span.start + span.prompt)
        # The prompt and its first response are one ordinary causal sequence.
        first = slice(span.start, span.start + span.prompt + span.responses[0])
        pieces.append(_segment(attend, query[:, :, first], key[:, :, first], value[:, :, first], sliding_window))
        start = first.stop
        for length in span.responses[1:]:
            own = slice(start, start + length)
            keys = torch.cat([key[:, :, prompt], key[:, :, own]], dim=2)
            values = torch.cat([value[:, :, prompt], value[:, :, own]], dim=2)
            pieces.append(_segment(attend, query[:, :, own], keys, values, sliding_window))
            start = own.stop
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def _segment(attend: Any, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """Causal attention of the last `query.shape[2]` positions of a sequence to all of it."""
    queries, keys = query.shape[2], key.shape[2]
    if queries == keys and (window is None or keys <= window):
        return attend(query, key, value, None, True)
    return attend(query, key, value, causal_mask(queries, keys, window, query.device), False)


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys), True where the last `queries` positions of `keys` may look."""
    position = torch.arange(keys - queries, keys, device=device)[:, None]
    source = torch.arange(keys, device=device)[None, :]
    allowed = source <= position
    return allowed if window is None else allowed & (position - source < window)


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention written out, for what the fused kernels lack: capped scores and sinks; softmax in fp32."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        sink = sinks.float().reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = softmax(scores, dim=-1)
    if sinks is not None:
        weights = weights[..., :-1]
    return weights.to(value.dtype) @ value
