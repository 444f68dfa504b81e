"""Component parameters that are converted and validated once, for reductions at several sets of points."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from gmmkeops.components import Factor, constant
from gmmkeops.data import Batch
from gmmkeops.reductions.derivatives import LogSumExp as Differentiable
from gmmkeops.reductions.derivatives import recordable
from gmmkeops.reductions.dispatch import Dispatch, arranged, evaluated
from gmmkeops.reductions.problem import Exponents, Extent, factor_tensor
from gmmkeops.reductions.protocol import Argmax, LogSumExp

__all__ = ["Prepared"]


class Prepared:
    """Component parameters for reductions at several sets of points, which have been validated.

    Args:
        offsets, means, factor: As for :func:`gmmkeops.reductions.logsumexp`. They are converted at the first use, and must not
            change afterwards.
    """

    def __init__(self, offsets: Tensor, means: Tensor, factor: Factor | Tensor) -> None:
        self.offsets, self.means, self.U = offsets, means, factor_tensor(factor)

    @cached_property
    def extent(self) -> Extent:
        """Bounds on means and factors."""
        return Extent.of(self.means.detach(), self.U.detach())

    @cached_property
    def exponents(self) -> Exponents:
        """The exponents, without points.

        Raises:
            ValueError: Parameters are not finite, or their shapes do not match.
        """
        nowhere = Batch(self.means.new_empty(0, self.means.shape[1]))
        return Exponents.of(nowhere, self.offsets, self.means, self.U, self.extent)

    def logsumexp(self, x: Tensor, *, backend: str = "auto", truncate: float | None = None) -> Tensor:
        """Compute the log-sum-exps, with the arguments and derivatives of :func:`gmmkeops.reductions.logsumexp`."""
        problem = self.exponents.at(x)
        if constant(x, self.offsets, self.means, self.U):
            return evaluated(problem, LogSumExp(), backend, truncate)[0]
        sweep = Dispatch(None, backend, truncate, True, arranged(problem, truncate))
        x, offsets, means, U = map(recordable, (x, self.offsets, self.means, self.U))
        return Differentiable.of(x, offsets, means, U, sweep)

    def argmax(self, x: Tensor, *, backend: str = "auto", truncate: float | None = None) -> Tensor:
        """Compute the most probable components, with the arguments of :func:`gmmkeops.reductions.argmax`."""
        return evaluated(self.exponents.at(x), Argmax(), backend, truncate)[0]
