"""Fewer activations: what is cheap to compute is computed again in the backward pass and not kept for it.

A norm of transformers keeps its input twice in fp32 and its output; a gated feed-forward part keeps the gate, its
activation, the other branch and their product. Here a layer keeps the norms' inputs, the gate and the other branch,
and makes the rest again: less than half of the bytes for a few percent of the work. It is the selective recomputation
of Korthikanti et al. 2022, arXiv:2205.05198, where it is cheapest.

Rows of norms and products do not see each other, so on a CPU they go a cache's worth at a time. A norm's gradient has a
closed form, which reads memory less often than autograd and takes a fifth of the time there.
"""

import copy
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

CACHED = 1 << 20  # elements of rows at a time on a CPU: with what is made on the way, about what a cache holds

# what a family's own code raises at rows that it does not expect
REFUSALS = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)

RowsFunction = Callable[..., Tensor]
# from rows, parameters and the slope of the function's value to their gradients; None for one that is not wanted
Slopes = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], Sequence[Tensor | None]]


class ByRows(torch.autograd.Function):
    """A function of rows that keeps nothing but its arguments.

    Args of `apply`:
        function: of n tensors (..., W), which gives (..., W); its rows do not depend on each other.
        slopes: its gradients; None: those of autograd.
        n: how many of the tensors are rows; the others are parameters that the function has by itself.
        tensors: rows of one shape (..., W), then parameters.
    """

    @staticmethod
    def forward(ctx: Any, function: RowsFunction, slopes: Slopes | None, n: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.told = slopes or partial(_by_autograd, function, ctx.needs_input_grad[3:]), n
        return by_rows(function, tensors[:n])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        tensors, (slopes, n), wanted = ctx.saved_tensors, ctx.told, ctx.needs_input_grad[3:]
        flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors[:n]]
        onto = slope.reshape(-1, slope.shape[-1])
        found: list[Tensor | None] = [torch.empty_like(rows) for rows in flat] + [None] * (len(tensors) - n)
        for part in _parts(flat[0]):
            gradients = slopes([rows[part] for rows in flat], tensors[n:], onto[part])
            for place, gradient in enumerate(gradients):
                there = found[place]
                if gradient is None:
                    continue
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
        return None, None, None, *shaped


def _by_autograd(
    function: RowsFunction, wanted: Sequence[bool], rows: Sequence[Tensor], parameters: Sequence[Tensor], slope: Tensor
) -> list[Tensor | None]:
    with torch.enable_grad():
        again = [each.detach().requires_grad_(need) for each, need in zip(rows, wanted, strict=False)]
        out = function(*again)
    every = [*again, *parameters]
    gradients = iter(torch.autograd.grad(out, [each for each, need in zip(every, wanted, strict=True) if need], slope))
    return [next(gradients) if need else None for need in wanted]


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


def _lean(
    function: RowsFunction, *rows: Tensor, slopes: Slopes | None = None, parameters: Sequence[Tensor] = ()
) -> Tensor:
    if not torch.is_grad_enabled():
        return by_rows(function, rows)
    made: Any = ByRows.apply(function, slopes, len(rows), *rows, *parameters)
    if _passes:
        _passes[-1].recipes[made.data_ptr()] = Recipe(made, function, rows)
    return made


def install(network: nn.Module) -> None:
    """Have a model's norms and gated feed-forward parts keep less; what is not recognised is left as it is.

    Weights must be whole when the backward pass asks for them again, which they are not under ZeRO-3.
    """
    gated: dict[Any, bool] = {}
    for module in network.modules():
        if _looks_like_norm(module):
            module.forward = MethodType(partial(_norm, closed_form(module)), module)
        elif _looks_gated(module):
            kind = type(module), type(module.act_fn), _settings(module)
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
    # torch's own norms keep little by themselves; a gated one takes more than its rows, or has parts with weights
    kind = type(module)
    ours = kind.__name__.endswith("RMSNorm") and kind.__module__.startswith("transformers.")
    return ours and len(inspect.signature(kind.forward).parameters) == 2 and not any(module.children())


def _looks_gated(module: nn.Module) -> bool:
    parts = dict(module.named_children())
    there = all(name in parts for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))
    return there and not any(parts["act_fn"].parameters())


def _settings(module: nn.Module) -> frozenset[tuple[str, Any]]:
    """What may differ between modules of one class: a limit in one layer that another does not have."""
    return frozenset((n, v) for n, v in vars(module).items() if v is None or isinstance(v, bool | int | float | str))


def _norm(slopes: Slopes | None, self: Any, hidden_states: Tensor) -> Tensor:
    plain = MethodType(type(self).forward, self)
    return _lean(plain, hidden_states, slopes=slopes, parameters=tuple(self.parameters(recurse=False)))


def norm_slopes(
    epsilon: float, offset: float, rows: Sequence[Tensor], parameters: Sequence[Tensor], slope: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The gradients of (offset + w) n with n = r x and r = (mean x² + ε)^-1/2, in fp32 or float64.

    ∂x = r (u - n mean(n u)) with u = (offset + w) g, and ∂w = Σ n g over the rows.
    """
    (inner,), (weight,) = rows, parameters
    wide = torch.promote_types(inner.dtype, torch.float32)
    normal = inner.to(wide, copy=True)
    squares = torch.linalg.vector_norm(normal, dim=-1, keepdim=True).square_()
    scale = squares.div_(normal.shape[-1]).add_(epsilon).rsqrt_()
    normal.mul_(scale)
    onto = slope.to(wide, copy=True)
    d_weight = (onto * normal).sum(0) if weight.requires_grad else None
    onto.mul_(weight.to(wide) + offset)
    along = (onto * normal).mean(-1, keepdim=True)
    return onto.addcmul_(normal, along, value=-1).mul_(scale), d_weight


def closed_form(module: Any) -> Slopes | None:
    """`norm_slopes` of a norm, held against the gradients of its own code on some rows; None where they differ."""
    parameters = list(module.parameters(recurse=False))
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(epsilon, float) or len(parameters) != 1 or parameters[0].ndim != 1:
        return None
    twin = copy.deepcopy(module).to(torch.float32).requires_grad_()
    (weight,) = twin.parameters(recurse=False)
    width, device = len(weight), weight.device
    weight.detach().copy_(torch.linspace(0.5, 1.5, width))
    # one row is so small that ε counts
    sizes = torch.tensor([1.0, epsilon**0.5, 4.0], device=device)[:, None]
    rows = torch.linspace(-1, 1, 3 * width, device=device).view(3, width).roll(1, 0) * sizes
    slope = torch.linspace(2, -1, 3 * width, device=device).view(3, width)
    try:
        own = _by_autograd(MethodType(type(module).forward, twin), (True, True), [rows], [weight], slope)
    except REFUSALS:
        return None
    for offset in (0.0, 1.0):
        slopes = partial(norm_slopes, epsilon, offset)
        found = slopes([rows], [weight], slope)
        pairs = [(a, b) for a, b in zip(found, own, strict=True) if a is not None and b is not None]
        # each row for itself: the gradients of the small one are a thousand times as large
        if all(bool(((a - b).abs() <= 1e-4 * b.abs().amax(-1, keepdim=True)).all()) for a, b in pairs):
            return slopes
    return None


def _feed_forward(self: Any, x: Tensor) -> Tensor:
    def product(gate: Tensor, up: Tensor) -> Tensor:
        return self.act_fn(gate) * up

    slopes = partial(product_slopes, self.act_fn)
    return self.down_proj(_lean(product, self.gate_proj(x), self.up_proj(x), slopes=slopes))


def product_slopes(
    activation: Callable[[Tensor], Tensor], rows: Sequence[Tensor], _: Sequence[Tensor], slope: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of activation(gate) up."""
    gate, up = rows
    with torch.enable_grad():
        again = gate.detach().requires_grad_()
        active = activation(again)
    (d_gate,) = torch.autograd.grad(active, again, slope * up)
    return d_gate, slope * active.detach()


@torch.no_grad()
def _is_gated(module: Any) -> bool:
    """Whether a feed-forward part computes down(act(gate x) · up x): held against its own code on some rows.

    Large ones are among them, which a limit on the gate or the other branch would show.
    """
    weight = module.down_proj.weight
    # 4-bit weights are bytes of another shape, and compute in a type of their own
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.bfloat16
    try:
        width = module.gate_proj.in_features
        rows = torch.linspace(-1, 1, 3 * width, dtype=torch.float32, device=weight.device).view(1, 3, -1)
        rows = torch.cat([size * rows for size in (1.0, 1e2, 1e4)], dim=1).to(dtype)
        own = type(module).forward(module, rows)
        return torch.equal(own, _feed_forward(module, rows))
    except REFUSALS:
        return False
