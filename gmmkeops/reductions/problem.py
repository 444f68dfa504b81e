r"""Validated exponents, the argument of all reductions, with parameters relative to a common center.

.. math:: e_{nk} = c_k - \tfrac12 \lVert U_k^\top (x_n - \mu_k) \rVert^2

Points keep their dtype, which is that of the results. Parameters are stored in float64 relative to ``center``, so that
the offset of map coordinates is subtracted before any rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gmmkeops.components import Factor, as_tensor, check_finite
from gmmkeops.data import Batch, as_points

__all__ = ["OFFSET_FLOOR", "Exponents", "factor_tensor"]

# Smallest offset: a component with it has zero density at all points, and float32 is still far from overflow, since KeOps'
# log-sum-exp turns an infinite first exponent into NaN.
OFFSET_FLOOR = -1e30


@dataclass(frozen=True)
class Exponents:
    """Validated points and component parameters.

    Args:
        x: Points (N, D), float32 or float64, contiguous rows, data units.
        offsets: c (K,), nats, float64, finite.
        means: μ - center (K, D), data units, float64.
        U: Factors (K, D, D) full, (K, D) diagonal or (K, 1) spherical, 1 / data units, float64.
        center: Common center (D,), data units, float64.
    """

    x: Tensor
    offsets: Tensor
    means: Tensor
    U: Tensor
    center: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, K, D)."""
        return self.x.shape[0], self.means.shape[0], self.means.shape[1]

    @property
    def is_full(self) -> bool:
        """Whether the factors are matrices."""
        return self.U.shape[1:] == (self.x.shape[1], self.x.shape[1])

    def rows(self, index: Any) -> Exponents:
        """The exponents of some of the points."""
        return Exponents(self.x[index], self.offsets, self.means, self.U, self.center)

    def components(self, index: slice) -> Exponents:
        """The exponents of some of the components."""
        return Exponents(self.x, self.offsets[index], self.means[index], self.U[index], self.center)

    @classmethod
    def of(cls, x: Any, offsets: Any, means: Any, factor: Factor | Tensor) -> Exponents:
        """Validate the arguments of a reduction; see :func:`gmmkeops.reductions.logsumexp` for shapes.

        The points of a :class:`~gmmkeops.data.Batch` have been validated where they entered.

        Raises:
            TypeError, ValueError: An argument is invalid.
        """
        points = x.points if isinstance(x, Batch) else as_points(x)
        D = points.shape[1]
        means = as_tensor(means, name="means", dtype=torch.float64, abstract=True).detach()
        if means.ndim != 2 or means.shape[0] == 0:
            raise ValueError(f"means must have shape (K, D) with K > 0, got {tuple(means.shape)}; add a row dimension.")
        if means.shape[1] != D:
            raise ValueError(
                f"x has {D} columns, expected {means.shape[1]} as the means have; pass the columns that were fitted."
            )
        offsets = as_tensor(offsets, name="offsets", dtype=torch.float64, abstract=True).detach()
        if offsets.shape != means.shape[:1]:
            raise ValueError(f"offsets must have shape ({means.shape[0]},), one per mean, got {tuple(offsets.shape)}.")
        U = as_tensor(factor_tensor(factor), name="factor", dtype=torch.float64, abstract=True).detach()
        K = means.shape[0]
        if U.ndim == 0 or U.shape[0] not in (1, K) or tuple(U.shape[1:]) not in {(D, D), (D,), (1,)}:
            raise ValueError(
                f"factor must have shape (K or 1, D, D), (K or 1, D) or (K or 1, 1) with K={K} and D={D}, "
                f"got {tuple(U.shape)}."
            )
        devices = {points.device, means.device, offsets.device, U.device}
        if len(devices) > 1:
            raise ValueError(
                f"x is on {points.device} but the parameters are on {means.device}, {offsets.device} and {U.device}; "
                "move all to one device with .to()."
            )
        check_finite(means, name="means", rows="component")
        check_finite(U, name="factor", rows="component")
        if bool(torch.isnan(offsets).any()):
            raise ValueError("offsets must not be NaN; use -inf, or drop the component, for one without weight.")
        # The median is a center that a single runaway mean does not move. Near the origin the origin itself is best:
        # subtracting it rounds nothing.
        center = _middle(means)
        near = center.abs() <= 8 * (means - center).abs().amax(0)
        center = torch.where(near, torch.zeros_like(center), center)
        return cls(
            points.detach().contiguous(),
            offsets.clamp(min=OFFSET_FLOOR, max=-OFFSET_FLOOR),
            means - center,
            U.expand(K, *U.shape[1:]),
            center,
        )


def _middle(values: Tensor) -> Tensor:
    """The lower median of each column (D,) of values (K, D), by sorting: torch's has no deterministic form on CUDA."""
    return values.sort(0).values[(len(values) - 1) // 2]


def factor_tensor(factor: Factor | Tensor) -> Tensor:
    """The tensor U of a factor, computed in float64, or the tensor itself."""
    return factor.to(torch.float64).U if isinstance(factor, Factor) else factor
