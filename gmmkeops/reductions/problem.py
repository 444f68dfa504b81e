"""Validated points and component parameters, from which all reductions are computed.

Parameters are stored in float64 relative to a common center, so that large coordinates do not cause rounding errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gmmkeops.components import Factor, as_tensor, check_finite, numbers, ordinary, transferred
from gmmkeops.data import Batch, as_points
from gmmkeops.reductions.library import OUT_OF_MEMORY, ExtentCall, reason, run

__all__ = ["OFFSET_FLOOR", "Exponents", "Extent", "Form", "factor_tensor", "upper_factor"]

# Smallest offset. A component with it has zero density, and float32 does not overflow: the log-sum-exp of KeOps is NaN if the
# first exponent is infinite.
OFFSET_FLOOR = -1e30

# Largest number of entries of parameters that the compiled library validates and converts on the CPU, to which those on another
# device are copied. There, each of these would take many operations, and several waits for the device. On one core, the library
# validates 4e5 entries in 0.2 ms, and packs 1000 full factors in 16 dimensions in 1.4 ms; on an H200, this took 4 ms.
_SERIAL = 400_000

# Names of the parameters of exponents.
_PARAMETERS = ("offsets", "means", "U", "center")

# Largest number of columns whose extents are compared by Python; torch operations on few numbers take longer.
_FEW = 64


class Form(NamedTuple):
    """Sizes and types of a problem, by which an engine is chosen.

    Args:
        device, dtype: Those of the points.
        rows, components, features: Numbers of points N, of components K and of features D.
        full: Whether the factors are matrices.
    """

    device: torch.device
    dtype: torch.dtype
    rows: int
    components: int
    features: int
    full: bool


@dataclass(frozen=True)
class Exponents:
    """Validated points and component parameters.

    Args:
        x: Points (N, D), float32 or float64, contiguous rows, data units.
        offsets: Offsets c (K,), nats, float64, finite.
        means: Means relative to the center, μ - center (K, D), data units, float64.
        U: Factors (K, D, D) full, (K, D) diagonal or (K, 1) spherical, 1 / data units, float64.
        center: Common center (D,), data units, float64.
        host: The same parameters on the CPU, without points, if they were copied from there; otherwise None.

    Parameters on the CPU are copied to the device of the points at their first use. Some engines read only those on the CPU
    (``host``).
    """

    x: Tensor
    offsets: Tensor
    means: Tensor
    U: Tensor
    center: Tensor
    host: Exponents | None = None

    @classmethod
    def of_host(cls, x: Tensor, host: Exponents) -> Exponents:
        """Create exponents from validated parameters on the CPU, for points on another device."""
        found = object.__new__(cls)
        vars(found).update(x=x, host=host)
        return found

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor:
            """Copy the parameters that are not on the device of the points there, in one transfer."""
            if name not in _PARAMETERS:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            given = {part: getattr(self.host, part) for part in _PARAMETERS if part not in vars(self)}
            # The factors of tied covariances share their memory.
            tied = "U" in given and given["U"].stride(0) == 0
            flat = [part[:1] if tied and place == "U" else part for place, part in given.items()]
            found = transferred(flat, self.x.device)
            for place, part in zip(given, found, strict=True):
                vars(self)[place] = part.expand(given[place].shape)
            return vars(self)[name]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of points, components and features (N, K, D)."""
        return self.x.shape[0], *(self.host or self).means.shape

    @property
    def is_full(self) -> bool:
        """Whether the factors are matrices."""
        return (self.host or self).U.shape[1:] == (self.x.shape[1], self.x.shape[1])

    @property
    def width(self) -> int:
        """Number of entries of the last dimension of the factors."""
        return (self.host or self).U.shape[-1]

    @property
    def entries(self) -> int:
        """Number of entries of all factors."""
        return (self.host or self).U.numel()

    @property
    def is_small(self) -> bool:
        """Whether the library on the CPU converts the parameters for a GPU, with their copies, faster than operations there."""
        given = self.host or self
        return _are_few(given.means, given.U)

    @property
    def form(self) -> Form:
        """Sizes and types, by which an engine is chosen."""
        return Form(self.x.device, self.x.dtype, *self.shape, self.is_full)

    def rows(self, index: Any) -> Exponents:
        """Select some of the points."""
        return Exponents(self.x[index], self.offsets, self.means, self.U, self.center, self.host)

    def components(self, index: slice | Tensor) -> Exponents:
        """Select some of the components."""
        return Exponents(self.x, self.offsets[index], self.means[index], self.U[index], self.center)

    def at(self, x: Tensor) -> Exponents:
        """Replace the points by others that have been validated."""
        return Exponents(x.detach().contiguous(), self.offsets, self.means, self.U, self.center, self.host)

    def with_factors(self, factors: Callable[[Tensor], Tensor]) -> Exponents:
        """Replace the factors U by a function of them, which is computed on the CPU if the parameters are there."""
        if self.host is None:
            return replace(self, U=factors(self.U))
        host = replace(self.host, U=factors(self.host.U))
        return replace(self, U=host.U.to(self.x.device), host=host)

    def with_host(self) -> Exponents:
        """Copy the parameters to the CPU, in one transfer, if they are on another device only."""
        if self.host is not None or self.x.device.type == "cpu":
            return self
        given = [self.offsets, self.means, self.U, self.center]
        offsets, means, U, center = transferred(given, torch.device("cpu"))
        return replace(self, host=Exponents(means[:0], offsets, means, U, center))

    @classmethod
    def of(cls, x: Any, offsets: Any, means: Any, factor: Factor | Tensor) -> Exponents:
        """Validate the arguments of a reduction; see :func:`gmmkeops.reductions.logsumexp` for shapes.

        The points of a :class:`~gmmkeops.data.Batch` have been validated before. The parameters may then be on the CPU, where
        they are validated without waiting for the device of the points, to which they are copied.

        Raises:
            TypeError, ValueError: An argument is invalid.
        """
        # Points on a GPU are validated below, together with the parameters.
        checked = isinstance(x, Batch) or not (isinstance(x, Tensor) and x.is_cuda)
        points = x.points if isinstance(x, Batch) else as_points(x, finite=checked)
        D = points.shape[1]
        means = as_tensor(means, name="means", abstract=True).detach()
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
        place = means.device if isinstance(x, Batch) and means.device.type == "cpu" else points.device
        if not place == means.device == offsets.device == U.device:
            raise ValueError(
                f"x is on {points.device} but the parameters are on {means.device}, {offsets.device} and {U.device}; "
                "move all to one device with .to()."
            )
        if points.is_cuda and place == points.device and _are_few(means, U) and reason() is None:
            return cls._copied(points, offsets, means, U, checked)
        if not checked:
            check_finite(points, name="x")
        return cls.of_shaped(points, offsets, means, U, Extent.of(means, U, offsets))

    @classmethod
    def _copied(cls, x: Tensor, offsets: Tensor, means: Tensor, U: Tensor, checked: bool) -> Exponents:
        """Validate few parameters on another device than the CPU, to which they are copied in one transfer.

        Otherwise the validation would wait for the device several times. So are points, unless they have been ``checked``.
        """
        given = [part.to(torch.float64) for part in (offsets, means, U)]
        more = [] if checked else [x.detach().sum().double()]
        own_offsets, own_means, own_U, *sums = transferred([*given, *more], torch.device("cpu"))
        # A finite sum proves that all entries are finite.
        if not all(math.isfinite(total) for total in sums):
            check_finite(x, name="x")
        extent = Extent.of(own_means, own_U, own_offsets)
        host = cls.of_shaped(own_means[:0], own_offsets, own_means, own_U, extent)
        found = cls.of_host(x.detach().contiguous(), host)
        if host.offsets is own_offsets and host.means is own_means:
            vars(found).update(offsets=given[0], means=given[1], U=given[2].expand(host.U.shape))
        return found

    @classmethod
    def of_shaped(cls, x: Tensor, offsets: Tensor, means: Tensor, U: Tensor, extent: Extent) -> Exponents:
        """Convert tensors without gradients, of valid shapes and on one device; ``extent`` is that of means and factors.

        Raises:
            ValueError: A parameter is not finite.
        """
        K, D = means.shape
        means, offsets = means.to(torch.float64), offsets.to(torch.float64)
        if not math.isfinite(extent.mean):
            check_finite(means, name="means", rows="component")
        if not math.isfinite(extent.factor):
            check_finite(U, name="factor", rows="component")
        least, most = extent.offsets or numbers(*offsets.aminmax())
        if math.isnan(least):
            raise ValueError("offsets must not be NaN, got NaN; use -inf for a component of weight zero, or remove it.")
        if least < OFFSET_FLOOR or most > -OFFSET_FLOOR:
            offsets = offsets.clamp(min=OFFSET_FLOOR, max=-OFFSET_FLOOR)
        center = torch.zeros(D, dtype=torch.float64, device=means.device) if extent.central else _center(means)
        means = means if extent.central else means - center
        U, x = U if len(U) == K else U.expand(K, *U.shape[1:]), x.detach().contiguous()
        if means.device == x.device:
            return cls(x, offsets, means, U, center)
        if means.device.type == "cpu":
            return cls.of_host(x, cls(means[:0], offsets, means, U, center))
        offsets, means, U, center = transferred([offsets, means, U, center], x.device)
        return cls(x, offsets, means, U, center)


@dataclass(frozen=True)
class Extent:
    """Bounds on means and factors, which tell whether they are finite and near the origin.

    Args:
        mean: Largest absolute value of the entries of the means, data units.
        factor: Largest absolute value of the entries of the factors, 1 / data units.
        central: Whether the common center of the means is known to be zero.
        offsets: Smallest and largest offset, nats, NaN if one is; None if they have not been computed.
    """

    mean: float
    factor: float
    central: bool
    offsets: tuple[float, float] | None = None

    @classmethod
    def of(cls, means: Tensor, U: Tensor, offsets: Tensor | None = None) -> Extent:
        """Compute the bounds for means (K, D) and factors (K or 1, ...); they are NaN or infinite if an entry is not finite."""
        if offsets is not None and (found := cls._compiled(means, U, offsets)) is not None:
            return found
        mean, central = 0.0, False
        if means.shape[1] <= _FEW:
            bounds = means.aminmax(dim=0)
            parts = torch.stack(tuple(bounds)).tolist() if means.is_cuda else [part.tolist() for part in bounds]
            columns = list(zip(*parts, strict=True))
            # The largest absolute value of each column; NaN if an entry is NaN.
            sizes = [max(-a, b) for a, b in columns]
            mean = max(sizes, default=0.0) if all(map(math.isfinite, sizes)) else math.nan
            # The median is at most this size, and the largest distance from it at least (b - a) / 2; 3.9 is below 8 / 2 for
            # rounding errors.
            central = all(size <= 3.9 * (b - a) for size, (a, b) in zip(sizes, columns, strict=True))
        elif means.numel():
            mean = _size(means)
        return cls(mean, _size(U) if U.numel() else 0.0, central)

    @classmethod
    def _compiled(cls, means: Tensor, U: Tensor, offsets: Tensor) -> Extent | None:
        """Compute the bounds by one call of the compiled library; None without it, and for other tensors than it reads."""
        given = offsets, means, U
        if (
            not _are_few(means, U)
            or not ordinary(*given)
            or not all(
                part.device.type == "cpu" and part.dtype == torch.float64 and part.is_contiguous() for part in given
            )
            or reason() is not None
        ):
            return None
        call = ExtentCall(*means.shape, U.numel(), *(part.data_ptr() for part in given))
        if run("gmmkeops_extent", call) == OUT_OF_MEMORY:
            return None
        return cls(call.mean, call.largest, bool(call.central), (call.least, call.most))


def _are_few(means: Tensor, U: Tensor) -> bool:
    """Return whether the library on the CPU validates and converts parameters, also those on a GPU."""
    return max(means.numel(), U.numel()) <= _SERIAL


def _size(values: Tensor) -> float:
    """Return the largest absolute value; NaN if an entry is NaN."""
    least, most = numbers(*values.aminmax())
    return max(-least, most)


def _center(means: Tensor) -> Tensor:
    """Compute the common center (D,) of means (K, D)."""
    # The median is robust to a single distant mean. Near the origin, zero is used, since subtracting it is exact.
    center = _middle(means)
    near = center.abs() <= 8 * (means - center).abs().amax(0)
    return torch.where(near, torch.zeros_like(center), center)


def _middle(values: Tensor) -> Tensor:
    """Compute the lower median (D,) of each column by sorting, since ``torch.median`` is not deterministic on CUDA."""
    return values.sort(0).values[(len(values) - 1) // 2]


def factor_tensor(factor: Factor | Tensor) -> Tensor:
    """Return the tensor U of a factor, computed in float64; tensors are returned unchanged."""
    if isinstance(factor, Factor):
        return (factor if factor.dtype == torch.float64 else factor.to(torch.float64)).U
    return factor


def upper_factor(U: Tensor) -> Tensor:
    r"""Return upper triangular factors (K, D, D) of the same precisions :math:`U U^\top`."""
    # With the order of the rows reversed, Uᵀ = Q R gives an R whose transpose is upper triangular after the reversal is undone.
    return torch.linalg.qr(U.flip(1).mT).R.mT.flip(1, 2)
