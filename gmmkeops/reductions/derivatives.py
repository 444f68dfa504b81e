r"""Autograd functions for the log-sum-exp: first derivatives by an engine, second derivatives recomputed in chunks.

.. math::

    L = \sum_n g_n \ell_n(\theta), \qquad \nabla_\theta L \ \text{by moments}, \qquad
    \nabla_{g, \theta}\, \langle \nabla_\theta L, v \rangle = \nabla_{g, \theta} \sum_n g_n \dot\ell_n

with θ the points, offsets, means and factors. Each function is the derivative of the previous one. All combinations of second
derivatives (reverse over reverse, forward over reverse, reverse over forward) are sums of these functions; third derivatives
raise an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd import Function

from gmmkeops.components import constant, ordinary
from gmmkeops.reductions import plain as _plain

__all__ = ["Attached", "LogSumExp", "Sweep", "Total", "recordable", "recording"]


@contextmanager
def recording() -> Iterator[None]:
    """Enable gradients, also within ``torch.no_grad`` and ``torch.inference_mode``."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def recordable(tensor: Tensor) -> Tensor:
    """Copy an inference tensor, which autograd does not support; other tensors are returned unchanged."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not tensor.is_inference():
        return tensor
    return tensor.clone()


class Sweep(Protocol):
    """Interface of the reductions from which derivatives are computed; an instance may cache results for its arguments."""

    #: Whether gradients with respect to offsets, means or factors, or only to the points, will probably follow the values.
    fused: bool
    pointwise: bool

    def anew(self) -> Sweep:
        """Return an instance without cached results, for other arguments."""

    def unordered(self, x: Tensor) -> Tensor:
        """Return the points in the order of the results."""

    def values(self, x: Tensor, offsets: Tensor, means: Tensor, U: Tensor) -> Tensor:
        """Compute ℓ (N,)."""

    def total(
        self, x: Tensor, offsets: Tensor, means: Tensor, U: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Compute Σ g ℓ, and its gradients with respect to offsets, means and factors."""

    def parameter_gradients(
        self, g: Tensor, x: Tensor, offsets: Tensor, means: Tensor, U: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the gradients of Σ g ℓ with respect to offsets, means and factors."""

    def known(
        self, g: Tensor, x: Tensor, offsets: Tensor, means: Tensor, U: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the result of :meth:`parameter_gradients` if no other pass is needed, because all weights g are equal."""

    def point_gradient(self, g: Tensor, x: Tensor, offsets: Tensor, means: Tensor, U: Tensor) -> Tensor:
        """Compute the gradient (N, D) of Σ g ℓ with respect to the points."""


def _refused(order: str) -> str:
    """The message of the error about derivatives that are not implemented."""
    return (
        f"{order} derivatives of this log-density are not implemented; differentiate "
        "torch.logsumexp(mixture.log_joint(x), -1) instead, which stores an N x K array and supports derivatives of all orders."
    )


def _wanted(gradients: Any, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Place gradients at the positions that are True in ``wanted``, and None at the others."""
    found = iter(gradients)
    return [next(found) if want else None for want in wanted]


def _like(gradient: Tensor, argument: Tensor) -> Tensor:
    """Convert a gradient to the shape and dtype of its argument, which may have been expanded."""
    found = gradient if gradient.shape == argument.shape else gradient.sum_to_size(argument.shape)
    return found.to(argument.dtype)


def _applied(function: type[Function], *arguments: Any) -> Any:
    """Apply an autograd function, without the inspection of its signature unless ``torch.func`` needs it.

    ``Function.apply`` inspects the signature at each call, which takes as long as ten operations on small tensors.
    """
    if not ordinary(*(argument for argument in arguments if isinstance(argument, Tensor))):
        return function.apply(*arguments)
    return super(Function, function).apply(*arguments)  # type: ignore[misc]


def _one_by_one(function: Any, info: Any, in_dims: Sequence[int | None], arguments: Sequence[Any]) -> tuple[Any, Any]:
    """Implement ``vmap`` of a function by one call per batch entry, so that memory does not grow with the batch size."""
    size = info.batch_size
    if size == 0:
        raise ValueError(
            "torch.func.vmap over a log-density requires a batch of at least one entry, got an empty batch."
        )
    # Results of an engine for its parameters may be reused if the parameters are the same for all entries.
    alike = all(dim is None for dim in in_dims[function.parameters])
    found = []
    for i in range(size):
        own = [a.select(dim, i) if isinstance(dim, int) else a for a, dim in zip(arguments, in_dims, strict=True)]
        own = [a if alike or not hasattr(a, "anew") else a.anew() for a in own]
        found.append(function.apply(*own))
    if isinstance(found[0], Tensor):
        return torch.stack(found), 0
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True)), (0,) * len(found[0])


def _lead(argument: Tensor, dim: int | None, size: int) -> Tensor:
    """Move the batch dimension of an argument to the front (B, ...), or expand an argument without one."""
    return argument.unsqueeze(0).expand(size, *argument.shape) if dim is None else argument.movedim(dim, 0)


class _EntryByEntry(Function):
    """An autograd function that ``vmap`` calls once for each entry of the batch."""

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _one_by_one(cls, info, in_dims, arguments)


class _Last(_EntryByEntry):
    """An autograd function without derivatives."""

    refusal: str

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @classmethod
    def backward(cls, ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(cls.refusal)

    jvp = backward


class LogSumExp(Function):
    """ℓ (N,) of points, offsets, means and factors."""

    parameters = slice(0, 4)

    @classmethod
    def of(cls, x: Tensor, offsets: Tensor, means: Tensor, U: Tensor, sweep: Sweep) -> Tensor:
        """Apply the function; what gradients need is computed in the same pass: moments for those of a sum or mean, or slopes."""
        sweep.fused = torch.is_grad_enabled() and (offsets.requires_grad or means.requires_grad or U.requires_grad)
        sweep.pointwise = torch.is_grad_enabled() and x.requires_grad and not sweep.fused
        return cast(Tensor, _applied(cls, x, offsets, means, U, sweep))

    @staticmethod
    def forward(x: Tensor, offsets: Tensor, means: Tensor, U: Tensor, sweep: Sweep) -> Tensor:
        return sweep.values(x, offsets, means, U)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        *tensors, ctx.sweep = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        wanted, saved = ctx.needs_input_grad[:4], ctx.saved_tensors
        known = ctx.sweep.known(g, *saved) if any(wanted[1:]) else None
        arguments = (*saved, None, *(known or (None,) * 3), ctx.sweep, wanted)
        if constant(g, *saved):
            # A backward pass without a graph of its own needs no function with derivatives.
            found = _Gradient.forward(g, *arguments)
        else:
            found = _Gradient.apply(g.double(), *arguments)
        return (*_wanted(found, wanted), None)

    @staticmethod
    def jvp(ctx: Any, *directions: Tensor | None) -> Tensor:
        x = ctx.saved_tensors[0]
        return _Slope.apply(*ctx.saved_tensors, *directions[:4], ctx.sweep).to(x.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        x, *others = arguments
        if any(dim is not None for dim in in_dims[1:]):
            return _one_by_one(LogSumExp, info, in_dims, arguments)
        flat = _lead(x, in_dims[0], info.batch_size).flatten(0, 1)
        values = LogSumExp.apply(flat, *others[:-1], others[-1].anew())
        return values.unflatten(0, (info.batch_size, -1) if len(flat) else (info.batch_size, 0)), 0


class Total(_EntryByEntry):
    """Σ g ℓ, and its gradients (not differentiable) with respect to offsets, means and factors, from one pass."""

    parameters = slice(0, 4)

    @staticmethod
    def forward(x: Tensor, offsets: Tensor, means: Tensor, U: Tensor, weights: Tensor | None, sweep: Sweep) -> Any:
        value, gradients = sweep.total(x, offsets, means, U, weights)
        return (value, *gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.sweep = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.save_for_forward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Any) -> Any:
        x, offsets, means, U, weights, *gradients = ctx.saved_tensors
        scale = scale.double()
        g = scale.expand(len(ctx.sweep.unordered(x))) if weights is None else scale * weights
        wanted = ctx.needs_input_grad[:4]
        found = _Gradient.apply(g, x, offsets, means, U, scale.detach(), *gradients, ctx.sweep, wanted)
        return (*_wanted(found, wanted), None, None)

    @staticmethod
    def jvp(ctx: Any, *directions: Tensor | None) -> Any:
        x, offsets, means, U, weights, *_ = ctx.saved_tensors
        slopes = _Slope.apply(x, offsets, means, U, *directions[:4], ctx.sweep)
        return (slopes if weights is None else weights * slopes).sum(), None, None, None


class _Gradient(Function):
    """Gradients of Σ g ℓ with respect to points, offsets, means and factors; only those in ``wanted`` are computed.

    If the gradients, divided by ``scale`` if it is not None, are known from an earlier pass, they are passed as ``known_…``.
    """

    parameters = slice(1, 5)

    @staticmethod
    def forward(
        g: Tensor,
        x: Tensor,
        offsets: Tensor,
        means: Tensor,
        U: Tensor,
        scale: Tensor | None,
        known_offsets: Tensor | None,
        known_means: Tensor | None,
        known_U: Tensor | None,
        sweep: Sweep,
        wanted: Sequence[bool],
    ) -> Any:
        like = (x, offsets, means, U)
        parts: list[Tensor | None] = [None] * 4
        if wanted[0]:
            parts[0] = sweep.point_gradient(g, *like)
        if known_offsets is not None:
            known = (known_offsets, known_means, known_U)
            parts[1:] = [part if scale is None or part is None else scale * part for part in known]
        elif any(wanted[1:]):
            parts[1:] = sweep.parameter_gradients(g, *like)
        chosen = [(part, to) for part, to, want in zip(parts, like, wanted, strict=True) if want and part is not None]
        return tuple(_like(part, to) for part, to in chosen)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *_, ctx.sweep, ctx.wanted = inputs
        ctx.save_for_backward(*inputs[:5])
        ctx.save_for_forward(*inputs[:5])

    @staticmethod
    def backward(ctx: Any, *directions: Tensor) -> Any:
        needed = ctx.needs_input_grad[:5]
        found = _Curvature.apply(*ctx.saved_tensors, *_wanted(directions, ctx.wanted), ctx.sweep, needed)
        return (*_wanted(found, needed), *[None] * 6)

    @staticmethod
    def jvp(ctx: Any, *directions: Tensor | None) -> Any:
        g, *parameters = ctx.saved_tensors
        parts: list[Tensor | None] = [None] * 4
        if any(direction is not None for direction in directions[1:5]):
            needed = (False, *ctx.wanted)
            parts = _wanted(_Curvature.apply(g, *parameters, *directions[1:5], ctx.sweep, needed), needed)[1:]
        if directions[0] is not None:
            found = _Gradient.apply(directions[0], *parameters, None, None, None, None, ctx.sweep, ctx.wanted)
            first = _wanted(found, ctx.wanted)
            parts = [a if b is None else b if a is None else a + b for a, b in zip(first, parts, strict=True)]
        return tuple(
            torch.zeros_like(like) if part is None else part
            for part, like, want in zip(parts, parameters, ctx.wanted, strict=True)
            if want
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        g, x, *others, sweep, wanted = arguments
        if any(wanted[1:]) or any(dim is not None for dim in in_dims[2:5]):
            return _one_by_one(_Gradient, info, in_dims, arguments)
        flat = [_lead(a, dim, info.batch_size).flatten(0, 1) for a, dim in zip((g, x), in_dims, strict=False)]
        (found,) = _Gradient.apply(*flat, *others[:3], None, None, None, None, sweep.anew(), wanted)
        return (found.unflatten(0, (info.batch_size, len(found) // info.batch_size)),), (0,)


class _Slope(_EntryByEntry):
    """Directional derivatives of ℓ (N,) with respect to points, offsets, means and factors, float64."""

    parameters = slice(0, 4)

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        x, *others, sweep = arguments
        return _plain.slopes((sweep.unordered(x), *others[:3]), others[3:])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        *tensors, ctx.sweep = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Any:
        parameters, directions = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        needed, wanted = (False, *ctx.needs_input_grad[:4]), ctx.needs_input_grad[4:8]
        second = _wanted(_Curvature.apply(h, *parameters, *directions, ctx.sweep, needed), needed)[1:]
        first = _wanted(_Gradient.apply(h, *parameters, None, None, None, None, ctx.sweep, wanted), wanted)
        return (*second, *first, None)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(_refused("Second forward-mode (forward over forward)"))


class _Curvature(_Last):
    """Gradients of Σ g ℓ' (with ℓ' of :class:`_Slope`) with respect to g, points, offsets, means and factors, if needed."""

    parameters = slice(1, 5)
    refusal = _refused("Third")

    @staticmethod
    def forward(*arguments: Any) -> Any:
        g, x, *others, sweep, needed = arguments
        like = (g, x, *others[:3])
        found = _plain.curvature(g, (sweep.unordered(x), *others[:3]), others[3:], needed)
        return tuple(part.to(to.dtype) for part, to in zip(found, like, strict=True) if part is not None)


class Attached(_EntryByEntry):
    """Value with known gradients with respect to parameters, and without further derivatives."""

    parameters = slice(0, 0)

    @classmethod
    def of(cls, value: Tensor, *arguments: Tensor) -> Tensor:
        """Apply the function to a value, its three gradients, and the three parameters."""
        return cast(Tensor, _applied(cls, value, *arguments))

    @staticmethod
    def forward(value: Tensor, *arguments: Any) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        saved = ctx.saved_tensors
        known = _Known.forward if constant(scale, *saved) else _Known.apply
        return (None, None, None, None, *known(scale, *saved))

    @staticmethod
    def jvp(ctx: Any, *directions: Tensor | None) -> Tensor:
        one = ctx.saved_tensors[0].new_ones(())
        slopes = _Known.apply(one, *ctx.saved_tensors)
        terms = [(a * b).sum() for a, b in zip(slopes, directions[4:], strict=True) if b is not None]
        return torch.stack(terms).sum().to(one)


class _Known(_Last):
    """Known gradients times a number, without derivatives."""

    parameters = slice(0, 0)
    refusal = (
        "sums that were attached to parameters have first derivatives only; use gmmkeops.reductions.total of the points for "
        "second derivatives."
    )

    @staticmethod
    def forward(scale: Tensor, *arguments: Tensor) -> Any:
        pairs = zip(arguments[:3], arguments[3:], strict=True)
        return tuple(_like(scale * slope, like) for slope, like in pairs)
