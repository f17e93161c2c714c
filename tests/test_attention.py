"""Flat rows give what each sequence gives alone under the model's own attention, for every family that takes them."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from align_cli.data.batches import Layout, MicroBatch, Span, flatten
from align_cli.data.store import Group
from align_cli.models import attention, causal, head, recompute, segments
from align_cli.models.causal import Manner, error_of, measure, recompute_activations, silence_dropout, takes_flat_rows
from align_cli.models.segments import SegmentAttention

VOCABULARY = 61
WINDOW = 6  # far below the longest sequence, so that it matters
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "ministral": {"sliding_window": WINDOW, "head_dim": 8},
    "mixtral": EXPERTS,
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, **EXPERTS},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": WINDOW},
    "gemma3_text": {"head_dim": 8, "sliding_window": WINDOW},
    "phi": {},
    "phi3": {},
    "phimoe": EXPERTS,
    "olmo2": {},
    "olmo3": {"sliding_window": WINDOW},
    "smollm3": {},
    "granite": {"attention_multiplier": 0.3, "logits_scaling": 2.0},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "cohere2": {"sliding_window": WINDOW},
    "glm4": {"head_dim": 8},
    "gpt_oss": {"head_dim": 8, "sliding_window": WINDOW, **EXPERTS},
}
LINEAR = {f"linear_{name}": size for name, size in [("num_key_heads", 2), ("num_value_heads", 2)]} | {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
PADDED: dict[str, dict[str, Any]] = {
    "falcon": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mamba": {"state_size": 4},
    "qwen3_next": {
        **EXPERTS,
        **LINEAR,
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "minimax": {**EXPERTS, "head_dim": 8},
}
FAMILIES["deepseek_v3"] = {  # values narrower than keys
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
}
EPSILON = torch.finfo(torch.float32).eps


def build(family: str, implementation: str) -> PreTrainedModel:
    """Two layers of random weights, larger than usual so that attention is far from uniform, in training mode."""
    attention.register()
    config = AutoConfig.for_model(family, **{**SIZES, **{**FAMILIES, **PADDED}[family]})
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=implementation)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim == 2:
                weight.mul_(5)
    return silence_dropout(network).train()


def groups() -> list[Group]:
    """Ragged prompts and responses, one K; a prompt of one token, a response of one, and lengths of several buckets."""
    generator = np.random.default_rng(1)
    shapes = [(9, (5, 7, 4)), (3, (8, 1, 2)), (1, (2, 3, 12)), (20, (18, 3, 26))]
    return [
        Group(
            index=index,
            prompt=generator.integers(3, VOCABULARY, prompt).astype(np.int32),
            responses=tuple(generator.integers(3, VOCABULARY, length).astype(np.int32) for length in lengths),
            ratings=np.zeros(len(lengths), dtype=np.float32),
            where="here",
        )
        for index, (prompt, lengths) in enumerate(shapes)
    ]


def one_at_a_time(network: PreTrainedModel) -> Tensor:
    """(B, K) log-probabilities by the model's own code: a sequence, its logits, the entries of the response."""
    rows: list[Tensor] = []
    for group in groups():
        for response in group.responses:
            ids = torch.tensor([*group.prompt.tolist(), *response.tolist()])[None]
            logprobs = network(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            found = logprobs[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
            rows.append(found[len(group.prompt) - 1 :].sum())
    return torch.stack(rows).view(len(groups()), -1)


def gradients(network: PreTrainedModel, policy: Tensor) -> dict[str, Tensor]:
    """Of a sum that weighs every response differently."""
    network.zero_grad()
    (policy * torch.linspace(-1, 1, policy.numel()).view_as(policy)).sum().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def assert_same(found: Tensor, slopes: dict[str, Tensor], expected: Tensor, own: dict[str, Tensor]) -> None:
    """Equal up to fp32.

    A log-probability of a response is a sum of logits and normalisers whose rounding is relative to its size; a
    gradient is a sum over all tokens, so its entries are rounded relative to the largest, not to themselves (a bias
    of keys has gradient 0 under softmax, and noise in fp32).
    """
    assert_close(found, expected, rtol=0, atol=8 * EPSILON * float(expected.detach().abs().max()))
    assert slopes.keys() == own.keys()
    largest = max(float(slope.abs().max()) for slope in own.values())
    for name, slope in own.items():
        assert_close(slopes[name], slope, rtol=0, atol=64 * EPSILON * largest, msg=lambda text, n=name: f"{n}: {text}")


KERNELS = {"segments": 0, "buckets": 10**9}  # tokens of a mean segment from which a CPU takes segments one by one


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_flat_rows_give_the_logprobs_and_gradients_of_single_sequences(
    family: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "LONG", KERNELS[kernel])
    monkeypatch.setattr(segments, "BLOCK", 7)  # so that segments have several blocks
    own = build(family, "eager")
    expected = one_at_a_time(own)
    slopes = gradients(own, expected)
    flat = build(family, attention.NAME)
    assert takes_flat_rows(flat.config)
    assert head.install(flat)
    output = flat.get_output_embeddings()
    known = head.transform_of(flat, output, torch.device("cpu"))  # pyright: ignore[reportArgumentType]
    assert known is not None
    for share in (True, False):
        for rows in (True, False):
            # a budget of three tokens' logits, of all, and the model's own head
            for way in (
                Manner(rows, share, known, 3 * VOCABULARY * 4),
                Manner(rows, share, known, 10**9),
                Manner(rows, share),
            ):
                found = measure(flat, flatten(groups(), share=share), way)["policy"]
                assert_same(found, gradients(flat, found), expected, slopes)
                assert error_of(flat, way, VOCABULARY, torch.device("cpu")) < 1e-5

    recompute_activations(flat)
    batch = flatten(groups())
    calls: list[int] = []

    def counted(*arguments: Any, **more: Any) -> tuple[Tensor, None]:
        calls.append(1)
        return attention.shared_attention(*arguments, **more)

    AttentionInterface.register(attention.NAME, counted)
    found = measure(flat, batch, Manner(flat=True))["policy"]
    assert_same(found, gradients(flat, found), expected, slopes)
    assert len(calls) == 4  # two layers, each again in the backward pass
    attention.register()

    monkeypatch.setattr(recompute, "CACHED", 5 * 32)  # rows of norms in several parts
    lean = build(family, attention.NAME)
    recompute.install(lean)
    found = measure(lean, batch, Manner(flat=True, sparing=True))["policy"]
    assert_same(found, gradients(lean, found), expected, slopes)


# --- the kernel of a GPU, as PyTorch describes it


def described_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn` in loops, with all that its CUDA code checks but the dtype of half size.

    The last query stands at the last key; `window_size` counts the keys to the left and right of a query's own, and -1
    is no limit.
    """
    assert enable_gqa == (query.shape[1] != key.shape[1]) and query.shape[1] % key.shape[1] == 0
    assert query.dtype == key.dtype == value.dtype and query.shape[-1] % 8 == 0
    assert key.shape == value.shape and key.shape[-1] == query.shape[-1] <= 256
    assert all(tensor.stride(-1) == 1 for tensor in (query, key, value))
    for ends, most, total in ((cu_seq_q, max_q, len(query)), (cu_seq_k, max_k, len(key))):
        assert ends.dtype == torch.int32 and ends.is_contiguous() and ends.device == query.device
        assert int(ends[0]) == 0 and int(ends[-1]) == total
        assert int(ends.diff().max()) == most and int(ends.diff().min()) > 0
    left, right = window_size
    repeats = query.shape[1] // key.shape[1]
    outputs: list[Tensor] = []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):
        q, k, v = (each.transpose(0, 1) for each in (query[q0:q1], key[k0:k1], value[k0:k1]))
        k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
        stand = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        other = torch.arange(k1 - k0)
        allowed = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
        if left >= 0:
            allowed &= other >= stand - left
        if right >= 0:
            allowed &= other <= stand + right
        scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        outputs.append((scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


UNLIKE = ("gemma2", "gpt_oss", "deepseek_v3")  # capped scores, sinks, narrow values


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in UNLIKE])
def test_the_kernel_for_any_lengths_gives_the_logprobs_and_gradients_of_single_sequences(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = build(family, "eager")
    expected = one_at_a_time(own)
    slopes = gradients(own, expected)
    calls: list[int] = []

    def counted(*arguments: Any, **more: Any) -> Tensor:
        calls.append(1)
        return described_varlen(*arguments, **more)

    monkeypatch.setattr(attention, "LONG", 10**9)
    monkeypatch.setattr(attention, "varlen_attn", counted)
    monkeypatch.setattr(attention, "takes_varlen", lambda query, value: True)
    flat = build(family, attention.NAME)
    for share in (True, False):
        found = measure(flat, flatten(groups(), share=share), Manner(flat=True))["policy"]
        assert_same(found, gradients(flat, found), expected, slopes)
    assert len(calls) == 4  # two layers, shared and not
    recompute_activations(flat)
    found = measure(flat, flatten(groups()), Manner(flat=True))["policy"]
    assert_same(found, gradients(flat, found), expected, slopes)


class Sums(TorchDispatchMode):
    """The types in which sums over an index are made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index_add_.default:
            self.seen.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_prompts_of_a_gpu_row_collect_their_gradients_in_float32() -> None:
    row = torch.ones(3, 1, 8, dtype=torch.bfloat16, requires_grad=True)
    index = torch.tensor([0, 1, *[0] * 8, 2])
    found = attention.RepeatPrompts.apply(row, index)
    assert isinstance(found, Tensor) and torch.equal(found, torch.ones(11, 1, 8, dtype=torch.bfloat16))
    slope = torch.tensor([256.0, 3.0, *[1.0] * 8, 5.0]).bfloat16().view(-1, 1, 1).expand(-1, 1, 8)
    with Sums() as sums:
        found.backward(slope)
    assert sums.seen == [torch.float32]  # a CPU would do so by itself, a GPU would not
    assert row.grad is not None and row.grad.dtype == torch.bfloat16
    assert row.grad[:, 0, 0].tolist() == [264.0, 3.0, 5.0]


@pytest.mark.parametrize(
    "taken, dtype, widths, device",
    [
        (True, torch.bfloat16, (64, 64), "cuda"),
        (True, torch.float16, (256, 256), "cuda"),
        (False, torch.float32, (64, 64), "cuda"),
        (False, torch.bfloat16, (64, 64), "cpu"),
        (False, torch.bfloat16, (100, 100), "cuda"),  # no multiple of 8
        (False, torch.bfloat16, (264, 264), "cuda"),
        (False, torch.bfloat16, (192, 128), "cuda"),
    ],
)
def test_a_gpus_kernel_gets_only_what_it_accepts(
    taken: bool, dtype: torch.dtype, widths: tuple[int, int], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_flash_capable", lambda: True)
    query, value = (
        SimpleNamespace(dtype=dtype, shape=torch.Size((1, 2, 9, width)), device=torch.device(device))
        for width in widths
    )
    assert attention.takes_varlen(query, value) == taken  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "taken, dtype, masked, device",
    [
        (True, torch.float32, True, "cpu"),
        (True, torch.bfloat16, False, "cuda"),
        (False, torch.bfloat16, True, "cuda"),
        (False, torch.float32, False, "cuda"),
    ],
)
def test_a_gpus_kernel_gets_groups_only_without_a_mask(
    taken: bool, dtype: torch.dtype, masked: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_flash_capable", lambda: True)
    given: Any = SimpleNamespace(dtype=dtype, shape=torch.Size((1, 2, 9, 64)), device=torch.device(device))
    assert attention.takes_groups(given, given, torch.ones(1, 1, 9, 9) if masked else None) == taken


@pytest.mark.parametrize("heads_of_mask", [0, 1, 6])
@pytest.mark.parametrize("length", [1, 5])
def test_grouped_heads_are_the_same_where_no_kernel_takes_them(
    length: int, heads_of_mask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 6, length, 8), (3, 2, 5, 8), (3, 2, 5, 4)]  # six heads, two keys, narrower values
    query, key, value = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    mask = None
    if heads_of_mask:
        mask = torch.rand(3, heads_of_mask, length, 5, generator=generator) < 0.6
        mask[..., 0] = True  # a query sees something
    causal = mask is None and length > 1
    given = (query, key, value, mask)
    taken = attention.fused_attention(*given, causal=causal, scale=0.3)

    def ungrouped(*args: Any, enable_gqa: bool = False, **more: Any) -> Tensor:
        assert not enable_gqa
        return scaled_dot_product_attention(*args, **more)

    monkeypatch.setattr(attention, "takes_groups", lambda *_: False)
    monkeypatch.setattr(attention, "scaled_dot_product_attention", ungrouped)
    assert_close(attention.fused_attention(*given, causal=causal, scale=0.3), taken)
    assert taken.shape == (3, 6, length, 4)


# --- the kernel of a CPU


def allowed_of(layout: Layout, window: int | None) -> Tensor:
    """(T, T) who may attend to whom in a row, from its spans alone."""
    owner = [
        (number, response, place + (span.prompt if response else 0))
        for number, span in enumerate(layout.spans)
        for response, length in enumerate((span.prompt, *span.responses))
        for place in range(length)
    ]
    number, response, position = torch.tensor(owner).unbind(-1)
    back = position[:, None] - position
    found = (number[:, None] == number) & ((response[:, None] == response) | (response == 0)) & (back >= 0)
    return found if window is None else found & (back < window)


def densely(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scaling: float) -> Tensor:
    """(T, heads, E) attention with every score there is."""
    repeats = len(query) // len(key)
    scores = query @ key.repeat_interleave(repeats, 0).transpose(1, 2) * scaling
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return (weights @ value.repeat_interleave(repeats, 0)).transpose(0, 1)


RAGGED = Layout(
    (Span(0, 9, (5, 7, 1)), Span(22, 1, (12,)), Span(35, 1, (1, 1)), Span(38, 14, (3, 17))), torch.device("cpu")
)


@pytest.mark.parametrize("block", [1, 4, 128])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 6, 13, 100])
@pytest.mark.parametrize("heads, kv, wide, narrow", [(4, 2, 6, 6), (3, 1, 5, 4), (2, 2, 4, 7)])
def test_products_over_segments_are_dense_attention(
    heads: int, kv: int, wide: int, narrow: int, window: int | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "BLOCK", block)
    tokens = RAGGED.segments[-1].own.stop
    generator = torch.Generator().manual_seed(0)
    # as projections leave them: tokens first in memory, heads first in shape
    query, key, value = (
        torch.randn(tokens, n, width, generator=generator, dtype=torch.float64).transpose(0, 1).requires_grad_()
        for n, width in ((heads, wide), (kv, wide), (kv, narrow))
    )
    slope = torch.randn(tokens, heads, narrow, generator=generator, dtype=torch.float64)
    expected = densely(query, key, value, allowed_of(RAGGED, window), 0.7)
    own = torch.autograd.grad(expected, (query, key, value), slope)
    found = SegmentAttention.apply(query, key, value, RAGGED.segments, 0.7, window)
    assert isinstance(found, Tensor)
    assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for again in (True, False):  # a second backward pass is as good as the first
        slopes = torch.autograd.grad(found, (query, key, value), slope, retain_graph=again)
        for one, other in zip(slopes, own, strict=True):
            assert_close(one, other, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(SegmentAttention.apply(query, key, value, RAGGED.segments, 0.7, window), found)  # pyright: ignore


@pytest.mark.parametrize("blocks", [0, 1, 5, 1000])
def test_weights_that_are_kept_give_the_same_bits_and_leave_no_trace(
    blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two layers; room for a few blocks is room for some of the first layer's, and for none of the second's."""
    monkeypatch.setattr(segments, "BLOCK", 4)
    monkeypatch.setattr(segments, "KEPT", 0)
    inputs = [torch.randn(2, RAGGED.segments[-1].own.stop, 8, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    made: list[int] = []
    weights = segments._weights

    def counted(*given: Any) -> Tensor:
        made.append(1)
        return weights(*given)

    def slopes() -> tuple[Tensor, ...]:
        first = SegmentAttention.apply(*inputs, RAGGED.segments, 1.0, None)
        second = SegmentAttention.apply(first.transpose(0, 1), *inputs[1:], RAGGED.segments, 1.0, None)  # pyright: ignore
        return torch.autograd.grad(second.float().square().sum(), inputs)  # pyright: ignore

    expected = slopes()
    monkeypatch.setattr(segments, "_weights", counted)
    monkeypatch.setattr(segments, "KEPT", blocks * 2 * 4 * 32 * 2)  # 32: more keys than any block sees
    found = slopes()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    every = 2 * sum(math.ceil((each.own.stop - each.own.start) / 4) for each in RAGGED.segments)
    kept = 2 * every - len(made)
    assert min(blocks, every) <= kept
    assert (kept > 0, kept == every) == (blocks > 0, blocks == 1000)
    unused = SegmentAttention.apply(*inputs, RAGGED.segments, 1.0, None)
    assert (segments.Kept.everywhere > 0) == (blocks > 0)
    del unused
    assert segments.Kept.everywhere == 0


@pytest.mark.parametrize("window", [None, 50])
def test_rounding_of_scores_to_bfloat16_stays_within_its_bound(window: int | None) -> None:
    """A score s is off by u |s|, u = 2^-8, so that a weight w is off by the factor e^(2 u S), S = max |s|.

    Weights are rounded once more, and so are the products with values and slopes: the output is off by Σ w |v| times
    e^(2 u S) (1 + u)^2 - 1. A gradient of scores w (g - Σ w g), g = slope · v, holds two weights, and its product with
    keys or queries is rounded and scaled: (1 + u)^8 is enough for all its roundings.
    """
    layout = Layout((Span(0, 190, (150, 280)), Span(620, 40, (300, 9))), torch.device("cpu"))
    tokens, heads, kv, width = 969, 4, 2, 32
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, tokens, width), (kv, tokens, width), (kv, tokens, width), (tokens, heads, width))
    drawn = [torch.randn(*shape, generator=generator).bfloat16() for shape in shapes]
    inputs = [each.clone().requires_grad_() for each in drawn[:3]]
    scaling = width**-0.5
    found = SegmentAttention.apply(*inputs, layout.segments, scaling, window)
    assert isinstance(found, Tensor)
    found.backward(drawn[3])

    query, key, value = (each.double().requires_grad_() for each in drawn[:3])
    slope = drawn[3].double()
    allowed = allowed_of(layout, window)
    exact = densely(query, key, value, allowed, scaling)
    exact.backward(slope)
    unit = torch.finfo(torch.bfloat16).eps / 2
    with torch.no_grad():
        k, v = (each.repeat_interleave(heads // kv, 0) for each in (key, value))
        scores = query @ k.transpose(1, 2) * scaling
        most = scores.masked_fill(~allowed, 0).abs().amax(-1, keepdim=True)  # (heads, T, 1)
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
        tiny = tokens * EPSILON  # sums in float32
        once = (2 * unit * most).exp() * (1 + unit) ** 3 - 1 + tiny
        twice = (4 * unit * most).exp() * (1 + unit) ** 8 - 1 + tiny
        arrived = slope.transpose(0, 1)  # (heads, T, E)
        onto = (arrived @ v.transpose(1, 2)).abs().masked_fill(~allowed, 0)
        # g itself is a sum whose terms are rounded relative to their sizes
        sizes = (arrived.abs() @ v.abs().transpose(1, 2)).masked_fill(~allowed, 0) * tiny + onto
        of_scores = twice * weights * (sizes + (weights * sizes).sum(-1, keepdim=True))
        shared = (kv, heads // kv, tokens, width)
        bounds = {
            "output": ((once * weights) @ v.abs()).transpose(0, 1),
            "query": of_scores @ k.abs() * scaling,
            "key": (of_scores.transpose(1, 2) @ query.abs() * scaling).view(shared).sum(1),
            "value": ((once * weights).transpose(1, 2) @ arrived.abs()).view(shared).sum(1),
        }
    pairs = {"output": (found.double(), exact)}
    for name, rounded, whole in zip(("query", "key", "value"), inputs, (query, key, value), strict=True):
        assert rounded.grad is not None and whole.grad is not None
        pairs[name] = rounded.grad.double(), whole.grad
    for name, (rounded, whole) in pairs.items():
        assert ((rounded - whole).abs() <= bounds[name]).all(), name


def test_prompts_collect_their_gradients_in_float32() -> None:
    """598 slopes of a half and one of 1 are 300; a sum in bfloat16 would stay at 128, whose neighbour is 129."""
    layout = Layout((Span(0, 1, (1,) * 598),), torch.device("cpu"))
    query, key, value = (torch.zeros(1, 599, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    found = SegmentAttention.apply(query, key, value, layout.segments, 1.0, None)
    assert isinstance(found, Tensor)
    found.backward(torch.ones_like(found))
    assert value.grad is not None
    assert value.grad[0, 0].tolist() == [300.0] * 8 and value.grad[0, 1:].unique().tolist() == [0.5]


def test_bfloat16_is_as_exact_as_under_pytorchs_own_attention() -> None:
    """Scores are rounded besides, as are queries and keys before them under any kernel: an error of the same size.

    Three roundings in place of two add at most the half of a variance: √1.5 = 1.22 of the error.
    """
    config = AutoConfig.for_model(
        "llama",
        vocab_size=256,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    generator = np.random.default_rng(0)
    shapes = [(185, (305, 240)), (130, (350, 48))]
    drawn = [
        Group(
            index=index,
            prompt=generator.integers(3, 256, prompt).astype(np.int32),
            responses=tuple(generator.integers(3, 256, length).astype(np.int32) for length in lengths),
            ratings=np.zeros(2, dtype=np.float32),
            where="here",
        )
        for index, (prompt, lengths) in enumerate(shapes)
    ]
    batch = flatten(drawn)
    assert batch.input_ids.shape[1] >= attention.LONG * len(batch.layout.segments)

    def measured(implementation: str, dtype: torch.dtype, manner: Manner) -> tuple[Tensor, Tensor]:
        attention.register()
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=implementation)
        with torch.no_grad():
            for name, weight in network.named_parameters():
                if weight.ndim == 2:
                    weight.mul_(6 if "q_proj" in name or "k_proj" in name else 2)  # scores of some units
                weight.copy_(weight.bfloat16())
        network = network.to(dtype)
        if manner.transform is not None:
            assert head.install(network)
        found = measure(network, batch, manner)
        (found["policy"] * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])).sum().backward()
        slopes = [weight.grad.double().flatten() for weight in network.parameters() if weight.grad is not None]
        return found["policy_tokens"].detach().double(), torch.cat(slopes)

    exact = measured("sdpa", torch.float64, Manner(flat=False))
    peer = measured("sdpa", torch.bfloat16, Manner(flat=False))
    ours = measured(attention.NAME, torch.bfloat16, Manner(True, True, head.Transform(), 100_000))
    for name, true, other, own in zip(("log-probabilities", "gradients"), exact, peer, ours, strict=True):
        errors = [float((rounded - true).norm() / true.norm()) for rounded in (other, own)]
        assert errors[1] <= 1.22 * errors[0] < 0.1, (name, errors)


@pytest.mark.parametrize("family", PADDED)
def test_architectures_that_cannot_are_known_and_their_padded_rows_are_right(family: str) -> None:
    network = build(family, "eager")
    assert not takes_flat_rows(network.config)
    assert error_of(network, Manner(flat=True), VOCABULARY, torch.device("cpu")) > 1e-3
    expected = one_at_a_time(network)
    own = gradients(network, expected)
    found = measure(network, flatten(groups()), Manner(flat=False))["policy"]
    # The states of mamba and of linear attention are products over the sequence, rounded once a token.
    longest = max(len(group.prompt) + len(response) for group in groups() for response in group.responses)
    assert_close(found, expected, rtol=0, atol=longest * EPSILON * float(expected.detach().abs().max()))
    for name, slope in gradients(network, found).items():
        largest = max(float(each.abs().max()) for each in own.values())
        assert_close(slope, own[name], rtol=0, atol=64 * longest * EPSILON * largest)


def test_token_logprobs_stand_at_their_slots_and_sum_to_the_responses() -> None:
    batch = flatten(groups())
    found = measure(build("llama", attention.NAME), batch, Manner(flat=True))
    tokens = found["policy_tokens"]
    assert tokens.shape == (4, 3, 26)
    assert_close(tokens.sum(-1), found["policy"])
    assert torch.equal(tokens != 0, batch.mask().bool())


def window_ignored(batch: MicroBatch) -> MicroBatch:
    """Every key is said to be near."""
    layout = Layout(batch.layout.spans, batch.layout.device)
    vars(layout)["buckets"] = tuple(replace(each, distance=each.distance.clamp(max=0)) for each in layout.buckets)
    return replace(batch, layout=layout)


def responses_see_each_other(batch: MicroBatch) -> MicroBatch:
    """Attention takes all responses of a prompt for one."""
    spans = tuple(Span(span.start, span.prompt, (sum(span.responses),)) for span in batch.layout.spans)
    merged = Layout(spans, batch.layout.device)
    layout = Layout(batch.layout.spans, batch.layout.device)
    vars(layout).update(segments=merged.segments, buckets=merged.buckets, home=merged.home)
    return replace(batch, layout=layout)


def positions_shifted(batch: MicroBatch) -> MicroBatch:
    """Responses start a position too late."""
    prompt = batch.layout.spans[0].prompt
    return replace(batch, position_ids=batch.position_ids + (batch.position_ids >= prompt))


def state_of_the_next_token(batch: MicroBatch) -> MicroBatch:
    """Logits are read a position too late."""
    return replace(batch, keep=(batch.keep + 1).clamp(max=batch.input_ids.shape[1] - 1))


@pytest.mark.parametrize(
    "broken", [window_ignored, responses_see_each_other, positions_shifted, state_of_the_next_token]
)
def test_the_self_test_of_a_run_sees_a_broken_layout(
    broken: Callable[[MicroBatch], MicroBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = build("mistral", attention.NAME)
    device = torch.device("cpu")
    assert error_of(network, Manner(flat=True), VOCABULARY, device) < 1e-5

    monkeypatch.setattr(causal, "flatten", lambda chosen, **told: broken(flatten(chosen, **told)))
    assert error_of(network, Manner(flat=True), VOCABULARY, device) > 0.05  # nats; 1e-3 and 0.3 are a run's limits


def test_the_self_test_calls_it_infinite_where_the_model_knows_no_layout() -> None:
    class Plain(torch.nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> None:
            raise AssertionError("not with these arguments")

    assert error_of(Plain(), Manner(flat=True), VOCABULARY, torch.device("cpu")) == float("inf")


@pytest.mark.parametrize(
    "family, own",
    [("llama", "sdpa"), ("mistral", "sdpa"), ("gemma3_text", "sdpa"), ("gemma2", "eager"), ("gpt_oss", "eager")],
)
def test_generation_with_left_padding_and_a_cache_is_that_of_the_own_attention(family: str, own: str) -> None:
    prompts = [[5, 9, 33, 7, 8, 40, 21, 11, 4, 60, 13], [17], [6, 30, 41]]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    told = {"max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False}
    told |= {"return_dict_in_generate": True, "output_logits": True}
    drawn: dict[str, Any] = {
        name: build(family, name).eval().generate(input_ids=ids, attention_mask=mask, **told)  # pyright: ignore
        for name in (own, attention.NAME)
    }
    shared = drawn[attention.NAME]
    assert torch.equal(shared.sequences, drawn[own].sequences)
    logits = torch.stack(drawn[own].logits)
    assert_close(torch.stack(shared.logits), logits, rtol=0, atol=64 * EPSILON * float(logits.abs().max()))
    # padding does not matter
    alone = build(family, attention.NAME).eval().generate(input_ids=torch.tensor([prompts[2]]), **told)  # pyright: ignore
    assert torch.equal(alone.sequences[0, 3:], shared.sequences[2, width:])  # pyright: ignore


def test_routers_and_dropout_are_silent_while_training() -> None:
    network = build("phimoe", attention.NAME)
    batch = flatten(groups())
    first, second = (measure(network, batch, Manner(flat=True))["policy"] for _ in range(2))
    assert torch.equal(first, second)
