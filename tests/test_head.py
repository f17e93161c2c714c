"""The chunked head: the plain computation to rounding, whatever its chunks, for every transform and trained or not."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from align_cli.logprobs import token_logprobs
from align_cli.models import head
from align_cli.models.head import HeadLogprobs, Transform, transform_of

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
