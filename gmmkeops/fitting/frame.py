r"""Standardized coordinates of a fit: columns are centered and scaled, so that float32 is accurate.

.. math:: x' = (x - m) / s, \qquad \mu' = (\mu - m) / s, \qquad U' = \mathrm{diag}(s)\, U, \qquad
          \log p(x) = \log p'(x') - \sum_d \log s_d

The center m is subtracted in float64 before points are cast. The scale s of a fit is a power of two, so that the division is
exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from gmmkeops import reductions
from gmmkeops.components import Moments, transferred
from gmmkeops.data import NOISE, warn_if_coarse
from gmmkeops.models import Mixture
from gmmkeops.penalties import Surrogate

__all__ = ["Frame"]

# Numbers of entries of points that are converted to float64 at a time, so that they stay in the cache of a CPU, and on a GPU.
_NUMBERS, _NUMBERS_CUDA = 1 << 17, 1 << 24


@dataclass(frozen=True)
class Frame:
    """Transformation between data units and standardized coordinates: an affine map of each column.

    Args:
        shift: m (D,), data units, float64.
        scale: s (D,), data units, float64; powers of two, if rounded.
        extra: Number of columns at the end that are contexts.
        columns: Names of all columns (D,), or None.
    """

    shift: Tensor
    scale: Tensor
    extra: int = 0
    columns: tuple[str, ...] | None = None

    @classmethod
    def of(
        cls,
        x: Tensor,
        weights: Tensor | None,
        *,
        isotropic: bool,
        extra: int = 0,
        rounded: bool = True,
        spread: tuple[Tensor, Tensor] | None = None,
    ) -> Frame:
        """Compute the transformation for points (N, D), from trimmed means and trimmed standard deviations of their columns.

        With ``isotropic`` all columns have the same scale, so that spherical factors stay spherical. Without ``rounded`` the
        scale is the standard deviation itself, so that changes of the units do not change the standardized points. ``spread``
        are the trimmed means and standard deviations (D,), if they are known.
        """
        shift, deviations = reductions.spread_of(x, weights) if spread is None else spread
        warn_if_coarse(x, deviations, shift.abs())
        return cls.around(shift, deviations, isotropic=isotropic, extra=extra, rounded=rounded)

    @classmethod
    def around(cls, shift: Tensor, spread: Tensor, *, isotropic: bool, extra: int = 0, rounded: bool = True) -> Frame:
        """Compute the transformation for given centers (D,) and standard deviations (D,) of the columns, data units."""
        if isotropic:
            own = spread[: len(spread) - extra]
            spread = torch.cat([own.square().mean().sqrt().expand_as(own), spread[len(own) :]])
        # The standard deviation of a constant column is rounding noise; it gets the largest scale of the others, or one.
        tiny = spread <= NOISE * shift.abs()
        some = bool(tiny.any())
        if some:
            largest = torch.ones_like(spread.max()) if bool(tiny.all()) else spread.max()
            spread = torch.where(tiny, largest, spread)
        scale = spread.log2().round().exp2()
        # Centers are rounded to multiples of the scale, so that subtraction is exact and does not depend on the sample of the
        # points. For a constant column the center itself is used, so that the column becomes zero.
        rounded_shift = (shift / scale).round() * scale
        shift = torch.where(tiny, shift, rounded_shift) if some else rounded_shift
        return cls(shift, scale if rounded else spread, extra)

    @cached_property
    def log_volume(self) -> float:
        """Σ log s, nats, which is subtracted from log-densities to convert them to data units."""
        return math.fsum(map(math.log, self._own(self.scale).tolist()))

    def to(self, device: torch.device) -> Frame:
        """Copy the transformation to a device."""
        if device == self.shift.device:
            return self
        shift, scale = transferred([self.shift, self.scale], device)
        return replace(self, shift=shift, scale=scale)

    @cached_property
    def _copies(self) -> dict[torch.device, Frame]:
        """Copies of the transformation for points on other devices."""
        return {}

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return shift and scale on the device of points."""
        if device == self.shift.device:
            return self.shift, self.scale
        if device not in self._copies:
            self._copies[device] = self.to(device)
        copy = self._copies[device]
        return copy.shift, copy.scale

    def variances(self, variance: float) -> Tensor:
        """Convert a variance in data units to standardized coordinates (D,)."""
        if variance not in self._variances:
            self._variances[variance] = self.scale.square().reciprocal_().mul_(variance)
        return self._variances[variance]

    @cached_property
    def _variances(self) -> dict[float, Tensor]:
        return {}

    def of_columns(self, centers: Tensor, deviations: Tensor) -> tuple[Tensor, Tensor]:
        """Convert centers and standard deviations (D,) of the columns from data units to standardized coordinates."""
        return (centers - self.shift) / self.scale, deviations / self.scale

    def _own(self, columns: Tensor) -> Tensor:
        """Remove the entries of the contexts from a tensor with one entry per column."""
        return columns[: len(columns) - self.extra]

    def points(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Standardize points (N, D) in float64, and cast them to a dtype.

        Returns:
            The points, and the largest rounding error of each column (D,), float64, on the device of this transformation, or
            None without rounding errors.
        """
        shift, scale = self._on(x.device)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        rows = max(1, (_NUMBERS_CUDA if x.is_cuda else _NUMBERS) // max(1, x.shape[1]))
        parts = zip(x.split(rows), out.split(rows), strict=True)
        if dtype == torch.float64:
            for part, into in parts:
                torch.sub(part.double(), shift, out=into).div_(scale)
            return out, None
        changed = shift.new_zeros(len(shift))
        for part, into in parts:
            wide = torch.sub(part.double(), shift).div_(scale)
            into.copy_(wide)
            changed = torch.maximum(changed, _largest(wide.sub_(into)))
        changed = changed.to(self.shift.device)
        return out, changed if bool(changed.any()) else None

    def surrogate(self, surrogate: Surrogate) -> Surrogate:
        """Convert the terms that penalties add to an M-step from data units to standardized coordinates."""
        scatter = surrogate.scatter
        return replace(
            surrogate,
            means=tuple((points, (mean - self.shift) / self.scale) for points, mean in surrogate.means),
            scatter=None if scatter is None else scatter / self.scale / self.scale[:, None],
        )

    def enter_moments(self, sums: Moments) -> Moments:
        """Convert moments from data units to standardized coordinates."""
        return sums.scaled((sums.centers - self.shift) / self.scale, 1 / self.scale)

    def leave_moments(self, sums: Moments) -> Moments:
        """Convert moments from standardized coordinates to data units."""
        return sums.scaled(sums.centers * self.scale + self.shift, self.scale)

    def enter(self, mixture: Mixture) -> Mixture:
        """Convert a mixture from data units to standardized coordinates, on the device of this transformation."""
        shift, scale = self._own(self.shift), self._own(self.scale)
        mixture = mixture if mixture.means.device == shift.device else mixture.to(shift.device)
        factor = mixture.factor.rescale(scale)
        return Mixture.from_valid(mixture.logits, (mixture.means - shift) / scale, factor, validate_args=False)

    def leave(self, mixture: Mixture) -> Mixture:
        """Convert a mixture from standardized coordinates to data units (differentiable)."""
        shift, scale = self._own(self.shift), self._own(self.scale)
        factor = mixture.factor.rescale(1 / scale)
        names = None if self.columns is None else self.columns[: len(scale)]
        return Mixture.from_valid(mixture.logits, mixture.means * scale + shift, factor).named(names)


def _largest(values: Tensor) -> Tensor:
    """Compute the largest absolute value in each column (D,) of values (N, D), which are overwritten.

    Blocks of 64 rows are reduced first, because ``amax`` over the rows of a tall, thin matrix is slow.
    """
    N, D = values.shape
    values = values.abs_()
    whole = N - N % 64
    parts = [values[whole:], values[:whole].view(64, -1, D).amax(0) if whole else values[:0]]
    found = torch.cat(parts)
    while len(found) > 64:
        keep = len(found) % 64
        found = torch.cat([found[:keep], found[keep:].view(64, -1, D).amax(0)])
    return found.amax(0) if len(found) else values.new_zeros(D)
