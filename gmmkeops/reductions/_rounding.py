r"""Bounds on what rounding changes of exponents that are not computed from residuals about each component's own mean.

With numbers of unit roundoff :math:`u`, and :math:`w_k(m) = \sum_d m_d \lVert U_{k,d\cdot} \rVert`, the size of component k
over points with :math:`|x_d| \le m_d` is :math:`s_k = w_k(m) + w_k(|\mu_k|)`, all about a common center. Then

.. math::

    |\delta (U_k^\top x - U_k^\top \mu_k)| \lesssim u\, s_k, \qquad
    |\delta (x^\top P_k x - 2 \mu_k^\top P_k x + \mu_k^\top P_k \mu_k)| \lesssim u\, s_k^2 .

Reference: Higham 2002, *Accuracy and Stability of Numerical Algorithms*, §3.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gmmkeops.reductions._exponents import Exponents

__all__ = ["Sizes", "linear_limit", "quadratic_limit"]

# How much larger than u times the size an error may be: sums have many terms, each of which is rounded.
_TERMS = 4.0


def linear_limit(tolerance: float, dtype: torch.dtype) -> float:
    """The size up to which the expanded residual changes an exponent e by less than ``tolerance`` times max(1, |e|)."""
    return tolerance / (_TERMS * 0.5 * torch.finfo(dtype).eps)


def quadratic_limit(tolerance: float, dtype: torch.dtype) -> float:
    """The size up to which the expanded square changes an exponent by less than ``tolerance``."""
    return math.sqrt(tolerance / (_TERMS * 0.25 * torch.finfo(dtype).eps))


class Sizes:
    """The sizes of components over points within a reach m of the center.

    Args:
        problem: The components.
    """

    def __init__(self, problem: Exponents) -> None:
        U = problem.U
        self.lengths = U.norm(dim=2) if problem.is_full else U.abs().expand_as(problem.means)
        self.own = (self.lengths * problem.means.abs()).sum(1)
        self._longest, self._most = self.lengths.amax(0), self.own.amax()

    def most(self, reach: Tensor) -> Tensor:
        """An upper bound on the sizes of all components over points within a reach (D,), a scalar."""
        return self._longest @ reach + self._most

    def most_at(self, points: Tensor) -> Tensor:
        """An upper bound on the sizes of all components at points, whose absolute values (D, rows) are given; a scalar."""
        return (self._longest.to(points.dtype) @ points).amax() + self._most

    def of(self, reach: Tensor, index: Tensor | None = None) -> Tensor:
        """The size of each component, or of some, over points within a reach (D,)."""
        if index is None:
            return self.lengths @ reach + self.own
        return self.lengths[index] @ reach + self.own[index]
