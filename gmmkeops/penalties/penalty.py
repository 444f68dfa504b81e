r"""What a penalty is: a function of a mixture that adds, scales, and may have a part in an M-step.

Penalties add and scale, ``2 * SqrtWeights(20) + Dirichlet(2.0)``, and any callable that takes a mixture and returns a scalar is
one. What one does to an M-step is an upper bound of it, tight at the current mixture (majorize-minimize).
"""

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


class Penalty(ABC):
    r"""A function of a mixture, in nats per point, that a fit adds to the mean negative log-likelihood.

    .. math:: \text{objective} = -\frac{1}{\sum g} \sum_n g_n \log p(x_n) + \text{penalty}

    Penalties add, and are scaled by numbers. Any function of a mixture becomes one by :func:`as_penalty`, which
    :func:`gmmkeops.fit` calls; a subclass with an :meth:`m_step` is minimized by EM too.

    Example:
        >>> import torch, gmmkeops as gk
        >>> mixture = gk.Mixture(torch.zeros(4), torch.zeros(4, 2), gk.FullFactor.from_factors(torch.eye(2).expand(4, 2, 2)))
        >>> both = 2 * gk.penalties.SqrtWeights(1.0) + (lambda m: m.means.square().sum())
        >>> isinstance(both, gk.penalties.Penalty), both(mixture)  # 2 / 4 of four roots of 1/4
        (True, tensor(1.))
    """

    @property
    def bounds(self) -> bool:
        """Whether :meth:`project` may move a mixture."""
        return False

    @property
    def prunes(self) -> bool:
        """Whether the penalty may drive weights to zero, so that a fit goes on until no component is left to be pruned."""
        return False

    @abstractmethod
    def __call__(self, mixture: Mixture, points: float = 1.0) -> Tensor:
        """The penalty of a mixture.

        Args:
            mixture: In the user's units.
            points: N, the total weight of the points that the fit sees; priors divide by it.

        Returns:
            A scalar, nats per point, differentiable in the mixture's parameters.
        """

    def m_step(self, mixture: Mixture, points: float) -> Surrogate:
        """This penalty's part of an M-step at a mixture, for N points.

        Raises:
            TypeError: The penalty has none.
        """
        raise TypeError(
            f"{type(self).__name__.strip('_')} has no M-step, so EM cannot minimize it; use gmmkeops.Adam(...) "
            "(solver='adam' of the estimator), which takes any penalty."
        )

    def project(self, mixture: Mixture) -> tuple[Mixture, Tensor]:
        """The nearest mixture within this penalty's bounds, and which components (K,) had to move; most have none."""
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
    """A penalty from a penalty, or from any callable on a mixture.

    Args:
        penalty: A :class:`Penalty`, or a function of a mixture that returns a scalar in nats per point, differentiable in the
            mixture's parameters.

    Returns:
        The penalty, as it was or wrapped.

    Raises:
        TypeError: It cannot be called.

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

    def __call__(self, mixture: Mixture, points: float = 1.0) -> Tensor:
        return self.factor * self.part(mixture, points)

    def m_step(self, mixture: Mixture, points: float) -> Surrogate:
        if self.factor < 0:
            raise TypeError("a negative multiple of a penalty has no M-step; use gmmkeops.Adam(...).")
        return self.part.m_step(mixture, points) * self.factor

    def project(self, mixture: Mixture) -> tuple[Mixture, Tensor]:
        return self.part.project(mixture)


@dataclass(frozen=True)
class _Function(Penalty):
    function: Callable[[Mixture], Any]

    def __call__(self, mixture: Mixture, points: float = 1.0) -> Tensor:
        value = self.function(mixture)
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"a penalty must return a scalar tensor, got {got}; end it with .sum() or .mean().")
        return value
