"""What is computed again in the backward pass: the same values and gradients, and less that is kept."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.axk2.configuration_axk2 import AXK2Config
from transformers.models.axk2.modeling_axk2 import AXK2GatedRMSNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from align_cli.models import recompute
from align_cli.models.recompute import ByRows, Spared, closed_form, norm_slopes, product_slopes, sparing


def llama(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).train()  # pyright: ignore[reportArgumentType]


def ids() -> Tensor:
    return torch.randint(31, (3, 11), generator=torch.Generator().manual_seed(0))


def gradients(network: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(network.parameters())))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """As far as five norms allow, whose own gradients take about eight roundings to fp32 each."""
    for slope, own in zip(found, expected, strict=True):
        torch.testing.assert_close(slope, own, rtol=0, atol=5 * 8 * 2**-24 * float(own.abs().max()))


def bytes_kept(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of all tensors that the backward pass will have, without weights."""
    own = {weight.untyped_storage().data_ptr() for weight in network.parameters()}
    kept: dict[int, Tensor] = {}
    plain = Spared.pack

    def pack(self: Spared, tensor: Tensor) -> Any:
        packed = plain(self, tensor)
        for each in [packed] if isinstance(packed, Tensor) else packed[0].rows:
            kept[each.untyped_storage().data_ptr()] = each
        return packed

    with monkeypatch.context() as patch:
        patch.setattr(Spared, "pack", pack)
        with sparing():
            network(input_ids=ids(), use_cache=False)
    return sum(each.untyped_storage().nbytes() for place, each in kept.items() if place not in own)


def test_values_are_the_same_bits_and_gradients_those_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "CACHED", 4 * 16)  # four rows of a norm at a time, two of a product
    plain = llama()
    expected = plain(input_ids=ids(), use_cache=False).logits
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slopes = gradients(plain, (expected * weight).sum())
    lean = copy.deepcopy(plain)
    recompute.install(lean)
    with sparing():
        found = lean(input_ids=ids(), use_cache=False).logits
    assert torch.equal(found, expected)
    assert_same(gradients(lean, (found * weight).sum()), slopes)


def test_without_gradients_and_outside_of_a_sparing_pass_the_model_is_itself() -> None:
    plain = llama()
    lean = copy.deepcopy(plain)
    recompute.install(lean)
    with torch.no_grad():
        assert torch.equal(lean(input_ids=ids()).logits, plain(input_ids=ids()).logits)
    one, other = (network(input_ids=ids(), use_cache=False).logits.square().sum() for network in (lean, plain))
    assert_same(gradients(lean, one), gradients(plain, other))


def test_a_copy_of_a_model_computes_with_its_own_weights() -> None:
    lean = llama()
    recompute.install(lean)
    other = copy.deepcopy(lean)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(2)
    assert not torch.allclose(lean(input_ids=ids()).logits, other(input_ids=ids()).logits)


def test_less_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = llama(torch.bfloat16)
    lean = copy.deepcopy(plain)
    recompute.install(lean)
    assert bytes_kept(lean, monkeypatch) < 0.6 * bytes_kept(plain, monkeypatch)


def test_a_product_that_three_need_is_made_again_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lean = llama()
    recompute.install(lean)
    made: list[int] = []
    plain = recompute.by_rows
    monkeypatch.setattr(recompute, "by_rows", lambda *given: made.append(1) or plain(*given))
    with sparing():
        loss = lean(input_ids=ids(), use_cache=False).logits.sum()
    forward = len(made)
    assert forward == 2 * 3 + 1  # two norms and a product in each layer, and the last norm
    loss.backward()
    assert len(made) == 2 * forward


def test_frozen_weights_get_no_gradient_and_pass_it_on() -> None:
    network = llama()
    recompute.install(network)
    network.requires_grad_(False)
    network.get_input_embeddings().weight.requires_grad_(True)  # pyright: ignore[reportAttributeAccessIssue]
    with sparing():
        network(input_ids=ids(), use_cache=False).logits.square().sum().backward()
    trained = [name for name, weight in network.named_parameters() if weight.grad is not None]
    assert trained == ["model.embed_tokens.weight"]
    norm = network.model.norm
    inner = torch.randn(2, 16, dtype=torch.float64)
    norm.weight.requires_grad_(True)
    norm(inner).sum().backward()  # the rows want none
    assert norm.weight.grad is not None


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def product(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("closed", [True, False])
def test_gradients_of_rows_are_right_to_finite_differences(closed: bool) -> None:
    norm = nn.RMSNorm(5, eps=1e-2).double()  # transformers' own are fp32 inside
    rows, other, weight = drawn(4, 3, 5, seed=2), drawn(4, 3, 5, seed=3), drawn(5, seed=4)

    def normed(x: Tensor, w: Tensor) -> Any:
        def function(each: Tensor) -> Tensor:
            return torch.func.functional_call(norm, {"weight": w}, each)

        return ByRows.apply(function, partial(norm_slopes, 1e-2, 0.0) if closed else None, 1, x, w)

    def gated(g: Tensor, u: Tensor) -> Any:
        return ByRows.apply(product, partial(product_slopes, nn.functional.silu) if closed else None, 2, g, u)

    assert torch.autograd.gradcheck(normed, (rows, weight))
    assert torch.autograd.gradcheck(gated, (rows, other))


@pytest.mark.parametrize(
    ("norm", "offset"),
    [
        (LlamaRMSNorm(6, eps=1e-5), 0.0),
        (Olmo2RMSNorm(6), 0.0),  # rounds after its weights, not before
        (GemmaRMSNorm(6), 1.0),
        (Gemma3RMSNorm(6), 1.0),
    ],
)
def test_the_closed_form_of_a_family_s_norm_is_found(norm: nn.Module, offset: float) -> None:
    closed = closed_form(norm.requires_grad_(False).bfloat16())
    assert isinstance(closed, partial) and closed.args[1] == offset


class Centred(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class OfAnotherEpsilon(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, 2 * self.variance_epsilon)


@pytest.mark.parametrize("norm", [Centred(6), OfAnotherEpsilon(6), Gemma3nRMSNorm(6, with_scale=False)])
def test_a_norm_that_computes_something_else_has_no_closed_form(norm: nn.Module) -> None:
    assert closed_form(norm) is None


def test_a_feed_forward_part_that_computes_something_else_is_left_alone() -> None:
    class Clipped(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=0.01) * self.up_proj(x))

    network = llama()
    network.model.layers[0].mlp = Clipped(network.config).double()  # pyright: ignore[reportArgumentType]
    recompute.install(network)
    assert "forward" not in vars(network.model.layers[0].mlp)
    assert "forward" in vars(network.model.layers[1].mlp)


class Limited(LlamaMLP):
    """As DeepSeek V4 and Step 3.7 have it: a limit that ordinary states stay below, in some layers."""

    def __init__(self, config: LlamaConfig, limit: float | None) -> None:
        super().__init__(config)
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return self.down_proj(self.act_fn(gate) * up)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_limit_that_only_some_layers_have_is_seen(dtype: torch.dtype) -> None:
    network = llama(dtype)
    for layer, limit in zip(network.model.layers, (None, 10.0), strict=True):
        layer.mlp = Limited(network.config, limit).to(dtype)
    recompute.install(network)
    assert ["forward" in vars(layer.mlp) for layer in network.model.layers] == [True, False]


def test_parts_whose_own_parts_have_weights_are_left_alone() -> None:
    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.slope * x)

    network = llama()
    layer: Any = network.model.layers[0]
    layer.mlp.act_fn = Trained()
    layer.input_layernorm = AXK2GatedRMSNorm(AXK2Config(hidden_size=16))
    recompute.install(network)
    assert "forward" not in vars(layer.mlp) and "forward" not in vars(layer.input_layernorm)
    assert "norms" in recompute.kinds(network)  # the other ones


class Packed(nn.Linear):
    """A layer as bitsandbytes has them for 4 bits: two weights in a byte, and a type of its own to compute in."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.held = plain.weight.detach().bfloat16()
        self.weight = nn.Parameter(torch.zeros(self.held.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input.bfloat16(), self.held).to(input.dtype)


def test_a_feed_forward_part_of_4_bit_weights_keeps_less() -> None:
    network = llama()
    for name, each in list(network.model.layers.named_modules()):
        if isinstance(each, nn.Linear):
            network.model.layers.set_submodule(name, Packed(each))
    recompute.install(network)
    assert all("forward" in vars(layer.mlp) for layer in network.model.layers)


def test_a_tensor_at_the_address_of_one_that_is_gone_is_kept() -> None:
    spared = Spared()
    made = torch.ones(2, 3)
    spared.recipes[made.data_ptr()] = recompute.Recipe(made, lambda rows: rows + 1, [made])
    assert not isinstance(spared.pack(made.view(6)), Tensor)
    alias = made.detach()
    del made
    assert spared.pack(alias) is alias


def test_a_model_that_overwrites_what_is_needed_again_is_refused() -> None:
    rows = torch.ones(2, 3)
    recipe = recompute.Recipe(torch.ones(2, 3), lambda rows: rows + 1, [rows])
    rows.add_(1)
    with pytest.raises(RuntimeError, match="overwrites"):
        recipe.make()
