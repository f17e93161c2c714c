"""Fewer activations: what is cheap to compute is computed again in the backward pass and not kept for it.

A norm of transformers keeps its input twice in fp32 and its output; a gated feed-forward part keeps the gate, its
activation, the other branch and their product. Here a layer keeps the norms' inputs, the gate and the other branch,
and makes the rest again: less than half of the bytes for a few percent of the work. It is the selective recomputation
of Korthikanti et al. 2022, arXiv:2205.05198, where it is cheapest.

Rows of norms and products do not see each other, so on a CPU they go a cache's worth at a time.
"""

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

CACHED = 1 << 20  # elements of rows at a time on a CPU: with what is made on the way, about what a cache holds

RowsFunction = Callable[..., Tensor]


class ByRows(torch.autograd.Function):
    """A function of rows that keeps nothing but its arguments.

    Args of `apply`:
        function: of n tensors (..., W), which gives (..., W); its rows do not depend on each other.
        n: how many of the tensors are rows; the others are parameters that the function has by itself.
        tensors: rows of one shape (..., W), then parameters.
    """

    @staticmethod
    def forward(ctx: Any, function: RowsFunction, n: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.told = function, n
        return by_rows(function, tensors[:n])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        tensors, (function, n), wanted = ctx.saved_tensors, ctx.told, ctx.needs_input_grad[2:]
        flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors[:n]]
        slopes = slope.reshape(-1, slope.shape[-1])
        found: list[Tensor | None] = [torch.empty_like(rows) for rows in flat] + [None] * (len(tensors) - n)
        for part in _parts(flat[0]):
            with torch.enable_grad():
                rows = [each[part].detach().requires_grad_(need) for each, need in zip(flat, wanted, strict=False)]
                out = function(*rows)
            every = [*rows, *tensors[n:]]
            asked = [place for place, need in enumerate(wanted) if need]
            gradients = torch.autograd.grad(out, [every[place] for place in asked], slopes[part])
            for place, gradient in zip(asked, gradients, strict=True):
                there = found[place]
                if place < n:
                    assert there is not None
                    there[part] = gradient
                else:
                    wide = torch.promote_types(gradient.dtype, torch.float32)
                    found[place] = gradient.to(wide) if there is None else there.add_(gradient)
        shaped = [
            None if each is None or not need else each.to(tensor.dtype).view(tensor.shape)
            for each, tensor, need in zip(found, tensors, wanted, strict=True)
        ]
        return None, None, *shaped


def by_rows(function: RowsFunction, tensors: Sequence[Tensor]) -> Tensor:
    """The function's value, rows that fit into a cache at a time."""
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    parts = list(_parts(flat[0]))
    if len(parts) == 1:
        return function(*tensors)
    out = torch.empty_like(flat[0])
    for part in parts:
        out[part] = function(*(each[part] for each in flat))
    return out.view(tensors[0].shape)


def _parts(rows: Tensor) -> Iterator[slice]:
    most = len(rows) if rows.device.type != "cpu" else max(1, CACHED // rows.shape[-1])
    return (slice(start, start + most) for start in range(0, len(rows), max(1, most)))


class Recipe:
    """How to make a tensor again."""

    def __init__(self, made: Tensor, function: RowsFunction, rows: Sequence[Tensor]) -> None:
        self.made = weakref.ref(made)
        self.function = function
        self.rows = [each.detach() for each in rows]
        self.versions = [each._version for each in rows]
        self.waiting = 0  # for the tensor, in the backward pass
        self.again: Tensor | None = None

    def matches(self, tensor: Tensor) -> bool:
        made = self.made()
        if made is None or made.data_ptr() != tensor.data_ptr() or made.numel() != tensor.numel():
            return False
        return made.dtype == tensor.dtype and tensor.is_contiguous()

    @torch.no_grad()
    def make(self) -> Tensor:
        if [each._version for each in self.rows] != self.versions:
            raise RuntimeError("the model overwrites what its backward pass needs; engine.selective_recompute=false")
        again = by_rows(self.function, self.rows) if self.again is None else self.again
        self.waiting -= 1
        self.again = again if self.waiting > 0 else None
        return again


class Spared:
    """What one forward pass need not keep: recipes of tensors by their addresses."""

    def __init__(self) -> None:
        self.recipes: dict[int, Recipe] = {}

    def pack(self, tensor: Tensor) -> Tensor | tuple[Recipe, torch.Size]:
        recipe = self.recipes.get(tensor.data_ptr())
        # A tensor that is gone may have left its place to another.
        if recipe is None or not recipe.matches(tensor):
            return tensor
        recipe.waiting += 1
        return recipe, tensor.shape

    @staticmethod
    def unpack(kept: Tensor | tuple[Recipe, torch.Size]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[0].make().view(kept[1])


_passes: list[Spared] = []  # that are under way, the innermost last


@contextmanager
def sparing() -> Iterator[None]:
    """A forward pass inside of it keeps less for its backward pass, as far as `install` has taught the model."""
    mine = Spared()
    _passes.append(mine)
    try:
        with saved_tensors_hooks(mine.pack, mine.unpack):
            yield
    finally:
        _passes.remove(mine)


def _lean(function: RowsFunction, *rows: Tensor, parameters: Sequence[Tensor] = ()) -> Tensor:
    if not torch.is_grad_enabled():
        return by_rows(function, rows)
    made: Any = ByRows.apply(function, len(rows), *rows, *parameters)
    if _passes:
        _passes[-1].recipes[made.data_ptr()] = Recipe(made, function, rows)
    return made


def install(network: nn.Module) -> None:
    """Have a model's norms and gated feed-forward parts keep less; what is not recognised is left as it is.

    Weights must be whole when the backward pass asks for them again, which they are not under ZeRO-3.
    """
    gated: dict[type, bool] = {}
    for module in network.modules():
        kind = type(module)
        if _looks_like_norm(module):
            module.forward = MethodType(_norm, module)
        elif _looks_gated(module):
            if kind not in gated:
                gated[kind] = _is_gated(module)
            if gated[kind]:
                module.forward = MethodType(_feed_forward, module)


def kinds(network: nn.Module) -> frozenset[Literal["norms", "products"]]:
    """What of a model, made without weights, `install` would have keep less."""
    found: set[Literal["norms", "products"]] = set()
    for module in network.modules():
        if _looks_like_norm(module):
            found.add("norms")
        elif _looks_gated(module):
            found.add("products")
    return frozenset(found)


def _looks_like_norm(module: nn.Module) -> bool:
    # torch's own norms keep little by themselves; a gated one takes more than its rows
    kind = type(module)
    ours = kind.__name__.endswith("RMSNorm") and kind.__module__.startswith("transformers.")
    return ours and len(inspect.signature(kind.forward).parameters) == 2


def _looks_gated(module: nn.Module) -> bool:
    parts = dict(module.named_children())
    return all(name in parts for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    plain = MethodType(type(self).forward, self)
    return _lean(plain, hidden_states, parameters=tuple(self.parameters(recurse=False)))


def _feed_forward(self: Any, x: Tensor) -> Tensor:
    def product(gate: Tensor, up: Tensor) -> Tensor:
        return self.act_fn(gate) * up

    return self.down_proj(_lean(product, self.gate_proj(x), self.up_proj(x)))


@torch.no_grad()
def _is_gated(module: Any) -> bool:
    """Whether a feed-forward part computes down(act(gate x) · up x): held against its own code on some rows."""
    weight = module.down_proj.weight
    # 4-bit weights are bytes of another shape, and compute in a type of their own
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.bfloat16
    try:
        width = module.gate_proj.in_features
        rows = torch.linspace(-1, 1, 3 * width, dtype=dtype, device=weight.device).view(1, 3, -1)
        own = type(module).forward(module, rows)
        return torch.equal(own, _feed_forward(module, rows))
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError):
        return False
