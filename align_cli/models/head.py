"""From states to log-probabilities of tokens: the output head in chunks, so that logits never fill the memory.

The head scores the response tokens alone. Its products are in the model's dtype, the normalisation is in float32. The
gradient of log π(y) with respect to logits and states does not depend on the loss, which only scales it, token by
token. So it is made while the logits are at hand: it takes their place and waits for the backward pass where they fit
the budget, and is computed again where they do not. A head that is not trained needs no more than the states' own.

    log π(y | h) = z_y - log Σ_v exp z_v,    z = cap tanh(scale W h / cap) / temperature
    ∂ -log π(y | h) / ∂ z = π - e_y
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import update_wrapper
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

CACHED = 1 << 20  # elements whose softmax is computed at a time, so that they stay in a CPU's cache


@dataclass(frozen=True)
class Transform:
    """What is done to logits before the softmax: z -> cap tanh(scale z / cap) / temperature; no cap where it is None.

    The first two are the family's own, the last is the run's.
    """

    scale: float = 1.0
    cap: float | None = None
    temperature: float = 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        """In place on fp32 `logits`."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.cap is not None:
            logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)

    def slope(self, transformed: Tensor) -> Tensor | float:
        """Its derivative, from its values."""
        at = self.scale / self.temperature
        if self.cap is None:
            return at
        return (transformed * (self.temperature / self.cap)).square_().neg_().add_(1).mul_(at)


@dataclass(frozen=True)
class Scoring:
    """Which states predict which tokens, and how.

    Attributes:
        keep: (N,) the place of the state among all states of the forward pass, flattened.
        targets: (N,) the token that it predicts.
        transform: the family's.
        budget: bytes of logits at a time.
    """

    keep: Tensor
    targets: Tensor
    transform: Transform
    budget: int


class HeadLogprobs(torch.autograd.Function):
    """log π(target | state) through the head.

    Args of `apply`:
        states: (N, H).
        weight: (V, H).
        bias: (V,) or None.
        targets: (N,) int64.
        transform, budget: as in `Scoring`.

    Returns:
        (N,) nats; float32, or float64 where the states are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: Transform,
        budget: int,
    ) -> Tensor:
        trained, wanted = any(ctx.needs_input_grad[1:3]), ctx.needs_input_grad[0]
        most = budget // (len(weight) * states.element_size())
        found = torch.empty(len(states), dtype=_wide(states), device=states.device)
        slopes = None
        onto_states = torch.empty_like(states) if wanted and not trained else None
        for chunk in _slices(len(states), most):
            logits = linear(states[chunk], weight, bias)
            keeps = trained and len(logits) == len(states)
            sloped = keeps or onto_states is not None
            found[chunk] = _score(logits, targets[chunk], transform, sloped=sloped)
            if keeps:
                slopes = logits
            if onto_states is not None:
                onto_states[chunk] = (logits @ weight).neg_()
            del logits  # before the next chunk is made
        ctx.save_for_backward(states, weight, targets, slopes, onto_states)
        ctx.bias, ctx.told = bias, (transform, most)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        states, weight, targets, kept, onto_states = ctx.saved_tensors
        if onto_states is not None:
            return (slope[:, None] * onto_states).to(states.dtype), None, None, None, None, None
        (transform, most), wide = ctx.told, slope.dtype
        d_states = torch.empty_like(states)
        d_weight = d_bias = None
        for chunk in _slices(len(states), most):
            slopes = kept
            if slopes is None:
                slopes = linear(states[chunk], weight, ctx.bias)
                _score(slopes, targets[chunk], transform, sloped=True)
            at = -slope[chunk, None]
            d_states[chunk] = (slopes @ weight).to(wide).mul_(at)
            if ctx.needs_input_grad[1]:
                onto = slopes.t() @ (at * states[chunk]).to(states.dtype)
                d_weight = onto if d_weight is None else d_weight.to(wide).add_(onto)
                del onto  # as large as the weight
            if ctx.needs_input_grad[2]:
                biased = torch.cat([at[part].t() @ slopes[part].to(wide) for part in _parts(slopes)]).sum(0)
                d_bias = biased if d_bias is None else d_bias + biased
            del slopes
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        if d_bias is not None:
            d_bias = d_bias.to(weight.dtype)
        return d_states, d_weight, d_bias, None, None, None


def _score(logits: Tensor, targets: Tensor, transform: Transform, *, sloped: bool) -> Tensor:
    """(n,) log π(target) nats; with `sloped`, `logits` W h become (n, V) ∂ -log π(target) / ∂ (W h)."""
    found = torch.empty(len(logits), dtype=_wide(logits), device=logits.device)
    for part in _parts(logits):
        values = transform(logits[part].to(found.dtype, copy=True))
        wanted, most = targets[part, None], values.amax(-1)
        of_target = values.gather(-1, wanted).squeeze(-1)
        inner = transform.slope(values) if sloped else 1.0
        shares = torch.softmax(values, dim=-1, out=values)
        # The largest share is exp(its value) / Σ exp, and never small.
        found[part] = of_target - most + shares.amax(-1).log()
        if sloped:
            slopes = shares.scatter_add_(-1, wanted, shares.new_full(wanted.shape, -1.0))
            logits[part] = slopes if isinstance(inner, float) and inner == 1.0 else slopes.mul_(inner)
    return found


def _wide(tensor: Tensor) -> torch.dtype:
    """The type that sums are in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _slices(length: int, most: int) -> Iterator[slice]:
    return (slice(start, min(start + max(1, most), length)) for start in range(0, length, max(1, most)))


def _parts(logits: Tensor) -> Iterator[slice]:
    """Rows whose softmax is computed at a time: what a cache holds on a CPU, all elsewhere."""
    return _slices(len(logits), CACHED // logits.shape[1] if logits.device.type == "cpu" else len(logits))


class Head(nn.Linear):
    """An output head that can go on to log-probabilities in its one call, where ZeRO-3 has its weights at hand."""

    def forward(self, input: Tensor, scoring: Scoring | None = None) -> Tensor:
        """Logits; with `scoring`, the log-probabilities of its targets from all `input` states, (N,) nats."""
        if scoring is None:
            return super().forward(input)
        states = input.reshape(-1, input.shape[-1])[scoring.keep]
        told = (scoring.targets, scoring.transform, scoring.budget)
        return HeadLogprobs.apply(states, self.weight, self.bias, *told)  # pyright: ignore[reportReturnType]


def install(network: PreTrainedModel) -> bool:
    """Teach a model the keyword `align_scoring`, with which it returns log-probabilities (N,) in place of logits.

    Returns:
        False where its head is not a plain linear layer, or its call is not its class's; it is left as it is then.
    """
    head: Any = network.get_output_embeddings()
    if type(head) is not nn.Linear or "forward" in vars(network):
        return False
    head.__class__ = Head
    plain: Any = type(network).forward

    def forward(self: Any, *arguments: Any, align_scoring: Scoring | None = None, **keywords: Any) -> Any:
        if align_scoring is None:
            return plain(self, *arguments, **keywords)
        output = self.get_output_embeddings()
        assert isinstance(output, Head), "adapters took the head's place; the model is not measured by it"
        return output(self.get_decoder()(*arguments, **keywords)[0], align_scoring)

    # A method, so that a deep copy calls itself and not this model.
    network.forward = MethodType(update_wrapper(forward, plain), network)
    return True


@torch.no_grad()
def transform_of(network: nn.Module, head: nn.Module, device: torch.device) -> Transform | None:
    """What a model does to its logits, found by feeding it logits that are known; None: it is no `Transform`.

    Args:
        network: what a forward pass calls; every rank calls it.
        head: its output head.
    """
    # Small values show the slope at 0, large ones the cap; fp32 whatever the model's dtype.
    known = torch.cat([torch.linspace(-1e4, 1e4, 41), torch.linspace(-1, 1, 41) * 1e-4]).to(device)
    hook = head.register_forward_hook(lambda *_: known.expand(1, 1, -1).clone())
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    try:
        found = network(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.reshape(-1)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, IndexError, RuntimeError):  # its logits must be as many as its vocabulary
        return None
    finally:
        hook.remove()
    if found.shape != known.shape:
        return None
    found = found.float()
    scale = float(found[-1] / known[-1])
    most = float(found[:41].abs().max())
    for guess in (Transform(1.0), Transform(scale), Transform(scale, most)):
        if torch.allclose(guess(known.clone()), found, rtol=1e-5, atol=0):
            return guess
    return None
