r"""Formulas of the reductions as KeOps LazyTensors, built once for each dimension, family and dtype.

A formula has two arguments: the points, and the parameters of the components. Their rows are

.. math:: (x, x', \ell, g), \qquad (c, \mu, \mu', L, R),

where :math:`x + x'` is a coordinate as the sum of two float32 numbers (float64 coordinates have no second part), and :math:`L`
and :math:`R` are the factors of :math:`y = L z` and of :math:`R\, y`, the negative gradient of :math:`e = c - |y|^2`. The
log-sum-exp :math:`\ell`, the weight :math:`g` and :math:`R` are present only in formulas that need them. Reference:
Charlier et al. 2021, *Kernel operations on the GPU, with autodiff, without memory overflows* (JMLR 22).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gmmkeops.reductions.keops.triangles import lower_product, outer_product, packed_size, upper_product

__all__ = ["Family", "aligned", "logsumexp", "moments", "point_gradient", "topk"]

# A compiled formula: points (N, ...) or (B, N, ...), parameters (K, ...) or (1, K, ...), and ``ranges=``.
Compiled = Callable[..., Any]


@dataclass(frozen=True)
class Family:
    """Everything on which a formula depends.

    Args:
        D: Number of features.
        factor: Shape of a factor: (D, D) full and upper triangular, (D,) diagonal, or (1,) spherical.
        dtype: Type of the numbers.
    """

    D: int
    factor: tuple[int, ...]
    dtype: torch.dtype

    @property
    def is_full(self) -> bool:
        return len(self.factor) == 2

    @property
    def parts(self) -> int:
        """Number of parts of a coordinate."""
        return 2 if self.dtype == torch.float32 else 1

    @property
    def packed(self) -> int:
        """Number of entries of a factor, and of second moments of a component."""
        return packed_size(self.D) if self.is_full else self.factor[0]


def aligned(width: int, dtype: torch.dtype) -> int:
    """Return the length of a row, a multiple of 16 bytes, so that a GPU reads four float32 numbers by one instruction."""
    step = 16 // dtype.itemsize
    return -(-width // step) * step


class _Symbols:
    """Residuals z, products y and exponents e as LazyTensors.

    Args:
        LazyTensor: The class of KeOps.
        family: Dimension, shape of the factors and dtype.
        known: Number of known values of a point: its log-sum-exp, and its weight.
        gradient: Whether ``pull``, the negative gradient of the exponents, is needed.
        batched: Whether the points are split into batches.
    """

    def __init__(
        self, LazyTensor: Any, family: Family, known: int = 0, *, gradient: bool = False, batched: bool = False
    ) -> None:
        D, begin = family.D, 1 + family.parts * family.D
        widths = family.parts * D + known, begin + (1 + gradient) * family.packed
        # KeOps takes a tensor with a single row for a parameter of the formula.
        x, p = (torch.zeros(2, aligned(width, family.dtype), dtype=family.dtype) for width in widths)
        x, p = (x[None], p[None]) if batched else (x, p)
        self.LazyTensor, self.family = LazyTensor, family
        x_i, p_j = LazyTensor(x.unsqueeze(-2)), LazyTensor(p.unsqueeze(-3))
        self.variables = (*x_i.variables, *p_j.variables)
        self.z = x_i[:D] - p_j[1 : 1 + D]
        if family.parts == 2:
            self.z = self.z + (x_i[D : 2 * D] - p_j[1 + D : 1 + 2 * D])
        self.known = [x_i.elem(family.parts * D + place) for place in range(known)]
        self.y = self._product(p_j, begin, self.z, lower_product)
        self.pull: Any = self._product(p_j, begin + family.packed, self.y, upper_product) if gradient else None
        self.e = p_j.elem(0) - (self.y**2).sum(-1)
        # The responsibility, which is zero at padding points.
        self.share: Any = (self.e - self.known[0]).exp() if known else None

    def _product(self, p_j: Any, begin: int, vector: Any, product: Callable[..., Any]) -> Any:
        """Multiply a vector by the factor that begins at an entry of the parameters."""
        if self.family.is_full:
            return product(self.LazyTensor, p_j, begin, vector, self.family.D)
        return p_j[begin : begin + self.family.packed] * vector

    def once(self, formula: Any, *parts: Any) -> Any:
        """Return a formula that evaluates the residual and other parts once; a part may contain those that follow it."""
        for part in (*parts, self.z):
            formula = formula.factorize(part)
        formula.variables = self.variables
        return formula


@functools.lru_cache(256)
def logsumexp(LazyTensor: Any, family: Family) -> Compiled:
    """Return the formula of the log-sum-exps (N, 1)."""
    f = _Symbols(LazyTensor, family)
    return _callable(f.once(f.e).logsumexp(dim=1, call=False))


@functools.lru_cache(256)
def topk(LazyTensor: Any, family: Family, k: int) -> Compiled:
    """Return the formula of the k smallest negative exponents (N, k) and of their components (N, k)."""
    f = _Symbols(LazyTensor, family)
    return _callable(f.once(-f.e).Kmin_argKmin(k, dim=1, call=False))


@functools.lru_cache(256)
def moments(LazyTensor: Any, family: Family, batched: bool) -> Compiled:
    """Return the formula of the sums S1, S2 and S0 (K, 1 + D + packed) over all points, or (B, K, ...) over each batch."""
    f = _Symbols(LazyTensor, family, 2, batched=batched)
    r = f.share * f.known[1]
    w = r * f.z
    if family.is_full:
        products = outer_product(LazyTensor, w, f.z, family.D)
    else:
        products = (w * f.z).sum(-1) if family.factor == (1,) else w * f.z
    summand = f.once(LazyTensor.concatenate((w, products, r), axis=-1), w, r)
    # An intermediate sum of each block would need a second register for each entry.
    return _callable(summand.sum(dim=int(batched), call=False, sum_scheme="direct_sum"))


@functools.lru_cache(256)
def point_gradient(LazyTensor: Any, family: Family) -> Compiled:
    """Return the formula of the negative gradients of the log-sum-exps (N, D) with respect to the points."""
    f = _Symbols(LazyTensor, family, 1, gradient=True)
    return _callable(f.once(f.share * f.pull, f.share, f.y).sum(dim=1, call=False))


def _callable(reduction: Any) -> Compiled:
    """Return the function of a reduction that has not been called. It takes other tensors than those of the formula."""
    compiled: Callable[..., Tensor | tuple[Tensor, ...]] = reduction.callfun
    return compiled
