r"""Bounds on rounding errors of exponents that are expanded about a common center instead of the mean of each component.

Let :math:`u` be the unit roundoff, and let all coordinates be relative to the common center. The size of component k for points
with :math:`|x_d| \le m_d` is :math:`s_k = w_k(m) + w_k(|\mu_k|)` with :math:`w_k(m) = \sum_d m_d \lVert U_{k,d\cdot} \rVert`.
Then

.. math::

    |\delta (U_k^\top x - U_k^\top \mu_k)| \lesssim u\, s_k, \qquad
    |\delta (x^\top P_k x - 2 \mu_k^\top P_k x + \mu_k^\top P_k \mu_k)| \lesssim u\, s_k^2 .

Reference: Higham 2002, *Accuracy and Stability of Numerical Algorithms*, §3.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gmmkeops.reductions.problem import Exponents

__all__ = ["Sizes", "size_limits"]

# Safety factor of the error bounds, because sums have many terms, each of which is rounded.
_TERMS = 4.0

# Largest error of an exponent e by an expansion about the common center, as a fraction of max(1, |e|), for each dtype of the
# points.
_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-8}


def _linear_limit(tolerance: float, dtype: torch.dtype) -> float:
    """Compute the largest size for which expanded residuals change exponents e by less than tolerance * max(1, |e|)."""
    return tolerance / (_TERMS * 0.5 * torch.finfo(dtype).eps)


def _quadratic_limit(tolerance: float, dtype: torch.dtype) -> float:
    """Compute the largest size for which expanded squares change exponents by less than ``tolerance``, nats."""
    return math.sqrt(tolerance / (_TERMS * 0.25 * torch.finfo(dtype).eps))


def size_limits(dtype: torch.dtype) -> tuple[float, float]:
    """Return the largest sizes for which moments, and for which exponents, may be expanded about the common center."""
    square = _quadratic_limit(_TOLERANCE[dtype], torch.float64)
    return square, square if dtype == torch.float32 else _linear_limit(_TOLERANCE[dtype], torch.float64)


class Sizes:
    """Sizes of components for points with coordinates |x_d| ≤ m_d relative to the center; m is called the reach.

    Args:
        problem: Exponents with the components.
    """

    def __init__(self, problem: Exponents) -> None:
        U = problem.U
        self.lengths = U.norm(dim=2) if problem.is_full else U.abs().expand_as(problem.means)
        self.own = (self.lengths * problem.means.abs()).sum(1)
        self._longest, self._most = self.lengths.amax(0), self.own.amax()

    def most(self, reach: Tensor) -> Tensor:
        """Compute an upper bound (scalar) on the sizes of all components for points within a reach (D,)."""
        return self._longest @ reach + self._most

    def most_at(self, points: Tensor) -> Tensor:
        """Compute an upper bound (scalar) on the sizes of all components at points with absolute coordinates (D, rows)."""
        return (self._longest.to(points.dtype) @ points).amax() + self._most

    def of(self, reach: Tensor, index: Tensor | None = None) -> Tensor:
        """Compute the sizes of all components (K,), or of those in ``index``, for points within a reach (D,)."""
        if index is None:
            return self.lengths @ reach + self.own
        return self.lengths[index] @ reach + self.own[index]
