"""KeOps' LazyTensor written out densely in torch, so that the code around KeOps runs on a fake device and without a compiler.

Only what the package uses is there. The one place that knows how the package finds KeOps is :func:`install`.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch

from gmmkeops import reductions
from gmmkeops.reductions.keops import loading as _keops


def _shape(*lazy):
    return torch.broadcast_shapes(*(tensor.shape[:-1] for tensor in lazy))


class LazyTensor:
    """A formula over rows i and columns j: a tensor (*batch, M or 1, N or 1, d), computed when it is reduced."""

    # Whether reductions are computed, or zeros of their shape; and a function that is called with every result.
    computes = True
    watch = staticmethod(lambda result: None)

    def __init__(self, tensor=None, *, shape=None, value=None, variables=None):
        self.shape = torch.Size(tensor.shape if shape is None else shape)
        # Tensors that a call replaces.
        self.variables = (SimpleNamespace(tensor=tensor),) if variables is None else variables
        variable = self.variables[0]
        self.value = (lambda: variable.tensor) if value is None else value
        self.ranges = None

    def _new(self, width, value, *others):
        variables = tuple(variable for lazy in (self, *others) for variable in lazy.variables)
        return type(self)(shape=(*_shape(self, *others), width), value=value, variables=variables)

    def _pointwise(self, other, operation):
        if not isinstance(other, LazyTensor):
            return self._new(self.shape[-1], lambda: operation(self.value(), other))
        width = max(self.shape[-1], other.shape[-1])
        return self._new(width, lambda: operation(self.value(), other.value()), other)

    def __add__(self, other):
        return self._pointwise(other, torch.add)

    def __sub__(self, other):
        return self._pointwise(other, torch.sub)

    def __mul__(self, other):
        return self._pointwise(other, torch.mul)

    __rmul__ = __mul__

    def __pow__(self, exponent):
        return self._new(self.shape[-1], lambda: self.value() ** exponent)

    def __neg__(self):
        return self._new(self.shape[-1], lambda: -self.value())

    def exp(self):
        return self._new(self.shape[-1], lambda: self.value().exp())

    def __getitem__(self, places):
        return self._new(len(range(self.shape[-1])[places]), lambda: self.value()[..., places])

    def elem(self, place):
        return self[place : place + 1]

    def factorize(self, part):
        """Return the formula unchanged; KeOps would evaluate the given part only once."""
        return self._new(self.shape[-1], lambda: self.value(), part)

    def matvecmult(self, vector):
        width = vector.shape[-1]
        product = lambda: (self.value().unflatten(-1, (-1, width)) * vector.value().unsqueeze(-2)).sum(-1)  # noqa: E731
        return self._new(self.shape[-1] // width, product, vector)

    def tensorprod(self, other):
        product = lambda: (self.value().unsqueeze(-1) * other.value().unsqueeze(-2)).flatten(-2)  # noqa: E731
        return self._new(self.shape[-1] * other.shape[-1], product, other)

    @staticmethod
    def concatenate(parts, axis=-1):
        def joined():
            values = [lazy.value() for lazy in parts]
            shape = torch.broadcast_shapes(*(value.shape[:-1] for value in values))
            return torch.cat([value.expand(*shape, -1) for value in values], -1)

        return parts[0]._new(sum(lazy.shape[-1] for lazy in parts), joined, *parts)

    def _pairs(self, value):
        """The values of pairs that the ranges leave out, replaced."""
        found = self.value()
        if self.ranges is None:
            return found
        rows, slices, columns = (part.tolist() for part in self.ranges[:3])
        seen = torch.zeros(found.shape[:2], dtype=torch.bool, device=found.device)
        begin = 0
        for (first, last), end in zip(rows, slices, strict=True):
            for left, right in columns[begin:end]:
                seen[first:last, left:right] = True
            begin = end
        return torch.where(seen[..., None], found, value)

    def _reduction(self, dim, width, reduction):
        """A reduction that has not been called: of points (..., N, d), parameters (..., K, d) and ranges."""

        def called(x, p, ranges=None):
            return self._reduced(dim, width, reduction, x, p, ranges)

        return SimpleNamespace(callfun=called)

    def _reduced(self, dim, width, reduction, x, p, ranges):
        assert x.is_contiguous(), "KeOps reads contiguous memory"
        assert p.is_contiguous(), "KeOps reads contiguous memory"
        points, parameters = self.variables
        points.tensor, parameters.tensor, self.ranges = x.unsqueeze(-2), p.unsqueeze(-3), ranges
        if type(self).computes:
            result = reduction()
        else:
            shape = [*torch.broadcast_shapes(points.tensor.shape[:-1], parameters.tensor.shape[:-1]), width]
            del shape[dim]
            result = x.new_zeros(shape)
        points.tensor = parameters.tensor = None
        type(self).watch(result[0] if isinstance(result, tuple) else result)
        return result

    def sum(self, dim, call=True, sum_scheme="auto"):
        if dim == -1:
            return self._new(1, lambda: self.value().sum(-1, keepdim=True))
        return self._reduction(dim, self.shape[-1], lambda: self._pairs(0.0).sum(dim))

    def logsumexp(self, dim, call):
        return self._reduction(dim, 1, lambda: self._pairs(-torch.inf).logsumexp(dim))

    def Kmin_argKmin(self, k, dim, call):
        def smallest():
            pairs = self._pairs(torch.inf).squeeze(-1)
            return tuple(pairs.topk(min(k, pairs.shape[1]), dim=dim, largest=False))

        return self._reduction(dim, k, smallest)


def _nothing(result):
    """Watches no result."""


def install(monkeypatch, folder, *, computes=True, watch=_nothing, reason=None):
    """Puts the dense LazyTensor in the place of KeOps' own, on every device; or a reason why there is none."""
    lazy = type("LazyTensor", (LazyTensor,), {"computes": computes, "watch": staticmethod(watch)})
    monkeypatch.setattr(_keops, "_compiled", set())
    monkeypatch.setattr(reductions.choice, "_told", set())
    comparison = reductions.keops.keops._comparison
    monkeypatch.setattr(comparison, "_done", set())
    if watch is not _nothing:
        # If calls are counted, or return zeros, the first ones are not compared with the dense engine.
        monkeypatch.setattr(comparison, "once", lambda *arguments: None)
    lazy = lazy if reason is None else None
    for name, value in {"lazy": lazy, "reason": reason, "pid": None, "lock": folder / "lock"}.items():
        monkeypatch.setitem(_keops._state, name, value)
    monkeypatch.setitem(sys.modules, "pykeops", SimpleNamespace(config=SimpleNamespace(gpu_available=True)))
