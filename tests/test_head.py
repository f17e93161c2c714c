"""The chunked head: the plain computation to rounding, whatever its chunks, for every transform and trained or not."""

import copy
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from align_cli.logprobs import token_logprobs
from align_cli.models import head
from align_cli.models.adapters import quiet_peft
from align_cli.models.head import Head, HeadLogprobs, Scoring, Transform, install, transform_of

TOKENS, WIDTH, VOCABULARY = 37, 24, 301
TRANSFORMS = (Transform(), Transform(0.3), Transform(1.0, 5.0), Transform(2.0, 3.0))
CPU = torch.device("cpu")
Tensors = dict[str, Tensor]


def given(dtype: torch.dtype, *, frozen: bool = False, bias: bool = True) -> Tensors:
    """States, weight, bias: values that bfloat16 holds exactly, so that all dtypes compute the same."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().to(dtype)

    made = {"states": draw(TOKENS, WIDTH).requires_grad_(), "weight": draw(VOCABULARY, WIDTH)}
    if bias:
        made["bias"] = draw(VOCABULARY)
    return made if frozen else {name: tensor.requires_grad_() for name, tensor in made.items()}


def targets() -> Tensor:
    return torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(1))


def coefficients() -> Tensor:
    """Of both signs, exact in every dtype."""
    return (torch.arange(TOKENS, dtype=torch.float64) - 16) / 16


def with_slopes(made: Tensors, logprobs: Tensor) -> Tensors:
    """The log-probabilities and their gradients under coefficients of both signs."""
    (logprobs * coefficients().to(logprobs.dtype)).sum().backward()
    slopes = {f"d {name}": t.grad.double() for name, t in made.items() if t.grad is not None}
    return {"logprobs": logprobs.detach().double()} | slopes


def plainly(made: Tensors, transform: Transform) -> Tensors:
    """z = cap tanh(scale (W h + b) / cap), then log softmax."""
    logits = made["states"] @ made["weight"].T * transform.scale + made.get("bias", 0) * transform.scale
    if transform.cap is not None:
        logits = transform.cap * torch.tanh(logits / transform.cap)
    return with_slopes(made, token_logprobs(logits, targets()))


def chunked(made: Tensors, transform: Transform, budget: int) -> Tensors:
    told = (made["states"], made["weight"], made.get("bias"), targets(), transform, budget)
    return with_slopes(made, HeadLogprobs.apply(*told))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 5, TOKENS, 1000])
def test_any_budget_gives_the_plain_values_and_gradients(
    transform: Transform, frozen: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CACHED", 3 * VOCABULARY)
    expected = plainly(given(torch.float64, frozen=frozen), transform)
    found = chunked(given(torch.float64, frozen=frozen), transform, rows * VOCABULARY * 8)
    assert found.keys() == expected.keys()
    assert ("d weight" in found) == (not frozen)
    for name, value in expected.items():
        assert_close(found[name], value, rtol=1e-11, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rows", [5, TOKENS])
def test_its_error_against_float64_is_rounding_of_logits_and_slopes(
    dtype: torch.dtype, frozen: bool, rows: int
) -> None:
    """A logit is a sum in fp32, rounded once to the dtype: it is off by d, and a log-probability by at most 2 d.

    A slope c (e_y - π) inherits π (exp(2 d) - 1) and is rounded once to the dtype; the gradients are sums of its
    products in fp32, rounded once.
    """
    exact = given(torch.float64, frozen=frozen, bias=False)
    expected = plainly(exact, Transform())
    found = chunked(given(dtype, frozen=frozen, bias=False), Transform(), rows * VOCABULARY * dtype.itemsize)
    eps, single = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    states, weight = exact["states"].detach(), exact["weight"].detach()
    logits = states @ weight.T
    off = eps * float(logits.abs().max()) + WIDTH * single * float((states.abs() @ weight.abs().T).max())
    assert float((found["logprobs"] - expected["logprobs"]).abs().max()) <= 2 * off
    weights, chosen = coefficients()[:, None].abs(), logits.softmax(-1)
    sizes = weights * (torch.nn.functional.one_hot(targets(), VOCABULARY) - chosen).abs()
    wrong = weights * chosen * math.expm1(2 * off) + (2 * eps + VOCABULARY * single) * sizes
    allowed = {"d states": wrong @ weight.abs(), "d weight": wrong.T @ states.abs()}
    for name in found.keys() & allowed.keys():
        assert ((found[name] - expected[name]).abs() <= allowed[name]).all(), name


def test_a_second_backward_pass_gives_the_same() -> None:
    made = given(torch.float64)
    told = (made["states"], made["weight"], made["bias"], targets(), Transform(), 10**9)
    total = HeadLogprobs.apply(*told).sum()  # pyright: ignore
    first = torch.autograd.grad(total, list(made.values()), retain_graph=True)
    second = torch.autograd.grad(total, list(made.values()))
    for one, other in zip(first, second, strict=True):
        assert_close(one, other, rtol=1e-12, atol=1e-12)


class Family(nn.Module):
    """A model whose logits go through some function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.lm_head = nn.Linear(4, 9)
        self.function = function

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        class Output:
            logits = self.function(self.lm_head(torch.zeros(*input_ids.shape, 4)))

        return Output


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_a_family_does_to_its_logits_is_found_by_asking_it(transform: Transform) -> None:
    network = Family(lambda logits: transform(logits.clone()))
    found = transform_of(network, network.lm_head, CPU)
    assert found is not None
    assert found.scale == pytest.approx(transform.scale, rel=1e-6)
    assert found.cap == (None if transform.cap is None else pytest.approx(transform.cap, rel=1e-6))


@pytest.mark.parametrize("function", [lambda z: z + 1, torch.sigmoid, lambda z: z**3, lambda z: z[..., :-1]])
def test_what_is_no_scale_and_no_cap_is_left_to_the_family(function: Any) -> None:
    network = Family(function)
    assert transform_of(network, network.lm_head, CPU) is None


# --- in a model

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
SCORED = Scoring(torch.tensor([2, 3, 4, 6]), torch.tensor([7, 1, 5, 6]), Transform(), 3 * 11 * 4)


def build(family: str, **more: Any) -> PreTrainedModel:
    """Two layers over a vocabulary of 11, in float32, with a head that scores."""
    config = AutoConfig.for_model(
        family,
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **more,
    )
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.endswith("bias"):
                weight.normal_()  # those of a fresh model are 0
    return network.eval()


def scored(network: nn.Module) -> Tensor:
    return network(input_ids=IDS, use_cache=False, align_scoring=SCORED)


def from_logits(network: nn.Module) -> Tensor:
    return token_logprobs(network(input_ids=IDS, use_cache=False).logits[0, SCORED.keep], SCORED.targets)


@pytest.mark.parametrize("family, tied", [("llama", False), ("llama", True), ("phi", False), ("gpt2", True)])
def test_a_model_scores_as_its_logits_say_with_all_gradients(family: str, tied: bool) -> None:
    network = build(family, tie_word_embeddings=tied)
    assert install(network)
    output: Any = network.get_output_embeddings()
    assert (output.weight is network.get_input_embeddings().weight) == tied  # pyright: ignore
    assert (output.bias is not None) == (family == "phi")
    parameters = dict(network.named_parameters())
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])
    found, expected = scored(network), from_logits(network)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    own = torch.autograd.grad((expected * weights).sum(), list(parameters.values()))
    largest = max(float(slope.abs().max()) for slope in own)
    slopes = torch.autograd.grad((found * weights).sum(), list(parameters.values()))
    for name, one, other in zip(parameters, slopes, own, strict=True):
        assert_close(one, other, rtol=0, atol=1e-5 * largest, msg=lambda text, n=name: f"{n}: {text}")


def test_a_copy_of_a_model_scores_with_its_own_weights() -> None:
    network = build("llama")
    assert install(network)
    before = scored(network)
    copied = copy.deepcopy(network)
    with torch.no_grad():
        for weight in copied.parameters():
            weight.zero_()
    assert_close(scored(copied), torch.full((4,), -math.log(11)))
    assert_close(from_logits(copied), torch.full((4,), -math.log(11)))
    assert torch.equal(scored(network), before)


def test_transformers_sees_the_models_own_signature_and_saves_its_own_class(tmp_path: Path) -> None:
    network = build("llama")
    assert install(network)
    own = inspect.signature(LlamaForCausalLM.forward).parameters
    assert list(inspect.signature(network.forward).parameters) == list(own)[1:]  # without self
    network.save_pretrained(tmp_path)
    again: Any = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(from_logits(again), from_logits(network))
    drawn = network.generate(IDS, max_new_tokens=3, do_sample=False)  # pyright: ignore[reportCallIssue]
    assert torch.equal(drawn, again.generate(IDS, max_new_tokens=3, do_sample=False))


def test_without_gradient_a_model_scores_the_same_and_keeps_no_graph() -> None:
    network = build("llama")
    assert install(network)
    with torch.no_grad():
        found = scored(network)
    assert found.grad_fn is None
    assert_close(found, scored(network).detach())


def adapted(**more: Any) -> nn.Module:
    """With adapters that change something."""
    network = build("llama")
    assert install(network)
    with quiet_peft():
        adapters = get_peft_model(network, LoraConfig(task_type="CAUSAL_LM", **more))
    torch.manual_seed(1)
    for weight in adapters.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight)
    return adapters


def test_adapters_below_the_head_are_scored_and_trained() -> None:
    network = adapted(target_modules=["q_proj", "down_proj"])
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    found, expected = scored(network), from_logits(network)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    own = torch.autograd.grad(expected.sum(), trained)
    for one, other in zip(torch.autograd.grad(found.sum(), trained), own, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize(
    "more",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["adapter", "saved"],
)
def test_a_head_that_adapters_replace_is_never_passed_by(more: dict[str, Any]) -> None:
    network: Any = adapted(**more)
    assert not isinstance(network.get_output_embeddings(), Head)  # so that a run asks it for logits
    with pytest.raises(AssertionError, match="adapters took the head's place"):
        scored(network)


@pytest.mark.parametrize("change", ["class", "call"])
def test_a_head_or_a_call_that_is_not_plain_is_left_alone(change: str) -> None:
    network: Any = build("llama")
    if change == "class":
        network.lm_head = nn.Sequential(network.lm_head)
    else:
        network.forward = network.forward
    assert not install(network)
    assert_close(from_logits(network), from_logits(build("llama")))
