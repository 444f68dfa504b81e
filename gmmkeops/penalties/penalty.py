"""Base class of penalties, their sums and multiples, and penalties that are given as functions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gmmkeops._checks import as_number
from gmmkeops.components import Surrogate
from gmmkeops.models import Mixture

__all__ = ["Penalty", "as_penalty"]

_PACKAGE = __name__.split(".")[0] + "."


class Penalty(ABC):
    r"""Function of a mixture, in nats per point, that a fit adds to the mean negative log-likelihood.

    .. math:: \text{objective} = -\frac{1}{\sum g} \sum_n g_n \log p(x_n) + \text{penalty}

    Penalties can be added and multiplied by numbers. :func:`gmmkeops.fit` converts a function of a mixture to a penalty by
    :func:`as_penalty`. EM supports penalties that implement :meth:`m_step`; gradient methods support all.

    Example:
        >>> import torch, gmmkeops as gk
        >>> mixture = gk.Mixture(torch.zeros(4), torch.zeros(4, 2), gk.FullFactor.from_factors(torch.eye(2).expand(4, 2, 2)))
        >>> both = 2 * gk.penalties.SqrtWeights(1.0) + (lambda m: m.means.square().sum())
        >>> isinstance(both, gk.penalties.Penalty), both(mixture)  # 2 / 4 of four roots of 1/4
        (True, tensor(1.))
    """

    @property
    def bounds(self) -> bool:
        """Whether :meth:`project` may change a mixture."""
        return False

    @property
    def prunes(self) -> bool:
        """Whether the penalty may drive weights to zero, so that the convergence test uses a smaller tolerance."""
        return False

    @property
    def constant(self) -> bool:
        """Whether :meth:`m_step` returns the same pseudo-points of the covariances for all mixtures, and nothing else."""
        return False

    @property
    def portable(self) -> bool:
        """Whether a fit may evaluate the penalty for mixtures on the CPU if the points are on another device.

        The penalties of this package accept mixtures on any device. A function or class of the user receives mixtures on the
        device of the points, since it may use tensors on that device.
        """
        return type(self).__module__.startswith(_PACKAGE)

    @property
    def of_weights(self) -> bool:
        """Whether the penalty depends on the weights only, so that a fit evaluates it in standardized coordinates."""
        return False

    @abstractmethod
    def __call__(self, mixture: Mixture, points: float = 1.0) -> Tensor:
        """Compute the penalty of a mixture.

        Args:
            mixture: Mixture in data units.
            points: Total weight N of the points, by which prior densities are divided.

        Returns:
            Scalar tensor, nats per point, differentiable in the parameters of the mixture.
        """

    def m_step(self, mixture: Mixture, points: float) -> Surrogate:
        """Return the terms of an M-step for N points: an upper bound of the penalty that is tight at ``mixture``.

        Raises:
            TypeError: The penalty does not support EM.
        """
        raise TypeError(
            f"EM does not support the penalty {type(self).__name__.strip('_')}, which has no M-step; use gmmkeops.Adam(...) "
            "(solver='adam' of the estimator), which supports all penalties."
        )

    def project(self, mixture: Mixture) -> tuple[Mixture, Tensor]:
        """Return the nearest mixture that satisfies the constraints, and a boolean mask (K,) of the changed components."""
        return mixture, torch.zeros(mixture.n_components, dtype=torch.bool, device=mixture.means.device)

    def __add__(self, other: Any) -> Penalty:
        if isinstance(other, int) and other == 0:
            return self
        return _Sum((self, as_penalty(other))) if callable(other) else NotImplemented

    __radd__ = __add__

    def __mul__(self, factor: float) -> Penalty:
        return _Scaled(as_number(factor, "the factor of a penalty"), self)

    __rmul__ = __mul__


def as_penalty(penalty: Penalty | Callable[[Mixture], Any]) -> Penalty:
    """Convert a callable to a penalty; a penalty is returned unchanged.

    Args:
        penalty: A :class:`Penalty`, or a function of a mixture that returns a scalar tensor in nats per point, differentiable
            in the parameters of the mixture.

    Raises:
        TypeError: The argument is not callable.

    Example:
        >>> import torch, gmmkeops as gk
        >>> ridge = gk.penalties.as_penalty(lambda mixture: mixture.means.square().sum())
        >>> ridge(gk.Mixture(torch.zeros(1), torch.full((1, 2), 3.0), gk.SphericalFactor(torch.zeros(1, 1), 2)))
        tensor(18.)
    """
    if isinstance(penalty, Penalty):
        return penalty
    if callable(penalty):
        return _Function(penalty)
    raise TypeError(f"penalty must be a Penalty or a function of a mixture, got {type(penalty).__name__}.")


@dataclass(frozen=True)
class _Sum(Penalty):
    parts: tuple[Penalty, ...]

    @property
    def bounds(self) -> bool:
        return any(part.bounds for part in self.parts)

    @property
    def prunes(self) -> bool:
        return any(part.prunes for part in self.parts)

    @property
    def constant(self) -> bool:
        return all(part.constant for part in self.parts)

    @property
    def portable(self) -> bool:
        return all(part.portable for part in self.parts)

    @property
    def of_weights(self) -> bool:
        return all(part.of_weights for part in self.parts)

    def __call__(self, mixture: Mixture, points: float = 1.0) -> Tensor:
        return sum((part(mixture, points) for part in self.parts), mixture.means.new_zeros(()))

    def m_step(self, mixture: Mixture, points: float) -> Surrogate:
        return sum((part.m_step(mixture, points) for part in self.parts), Surrogate.none(mixture))

    def project(self, mixture: Mixture) -> tuple[Mixture, Tensor]:
        moved = torch.zeros(mixture.n_components, dtype=torch.bool, device=mixture.means.device)
        for part in self.parts:
            mixture, hit = part.project(mixture)
            moved |= hit
        return mixture, moved


@dataclass(frozen=True)
class _Scaled(Penalty):
    factor: float
    part: Penalty

    @property
    def bounds(self) -> bool:
        return self.part.bounds

    @property
    def prunes(self) -> bool:
        return self.factor > 0 and self.part.prunes

    @property
    def constant(self) -> bool:
        return self.factor >= 0 and self.part.constant

    @property
    def portable(self) -> bool:
        return self.part.portable

    @property
    def of_weights(self) -> bool:
        return self.part.of_weights

    def __call__(self, mixture: Mixture, points: float = 1.0) -> Tensor:
        return self.factor * self.part(mixture, points)

    def m_step(self, mixture: Mixture, points: float) -> Surrogate:
        if self.factor < 0:
            raise TypeError(
                f"EM does not support penalties with a negative factor, got {self.factor}; use gmmkeops.Adam(...)."
            )
        return self.part.m_step(mixture, points) * self.factor

    def project(self, mixture: Mixture) -> tuple[Mixture, Tensor]:
        return self.part.project(mixture)


@dataclass(frozen=True)
class _Function(Penalty):
    function: Callable[[Mixture], Any]

    @property
    def portable(self) -> bool:
        return False

    def __call__(self, mixture: Mixture, points: float = 1.0) -> Tensor:
        value = self.function(mixture)
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"a penalty must return a scalar tensor, got {got}; end it with .sum() or .mean().")
        return value
