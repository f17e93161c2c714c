"""Flat rows give what each sequence gives alone under the model's own attention, for every family that takes them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from align_cli.data.batches import Layout, MicroBatch, Span, flatten
from align_cli.data.store import Group
from align_cli.models import attention, causal, head, segments
from align_cli.models.causal import Manner, error_of, measure, recompute_activations, silence_dropout, takes_flat_rows

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
EPSILON = torch.finfo(torch.float32).eps


def build(family: str, implementation: str) -> PreTrainedModel:
    """Two layers of random weights, larger than usual so that attention is far from uniform, in training mode."""
    attention.register()
    config = AutoConfig.for_model(family, **SIZES, **{**FAMILIES, **PADDED}[family])
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
