"""Component parameters that are converted and validated once, for reductions at several sets of points."""

from __future__ import annotations

from torch import Tensor

from gmmkeops.components import Factor, constant
from gmmkeops.reductions.derivatives import LogSumExp as Differentiable
from gmmkeops.reductions.derivatives import recordable
from gmmkeops.reductions.dispatch import Dispatch, arranged, evaluated
from gmmkeops.reductions.library import reason
from gmmkeops.reductions.problem import Exponents, Extent, factor_tensor
from gmmkeops.reductions.protocol import Argmax, LogSumExp

__all__ = ["Prepared"]


class Prepared:
    """Component parameters for reductions at several sets of validated points.

    Args:
        offsets, means, factor: As for :func:`gmmkeops.reductions.logsumexp`, of matching shapes and on one device. Their values
            are validated at the first use, and must not change afterwards.
    """

    def __init__(self, offsets: Tensor, means: Tensor, factor: Factor) -> None:
        self.offsets, self.means, self.U = offsets, means, factor_tensor(factor)
        #: Bounds on means and factors.
        self.extent = Extent.of(self.means.detach(), self.U.detach())
        self._exponents: Exponents | None = None

    @property
    def exponents(self) -> Exponents:
        """The exponents, without points.

        Raises:
            ValueError: A parameter is not finite.
        """
        if self._exponents is None:
            offsets, means, U = self.offsets.detach(), self.means.detach(), self.U.detach()
            found = Exponents.of_shaped(means[:0], offsets, means, U, self.extent)
            # Engines on a GPU pack few parameters on the CPU; this copy serves all sets of points.
            self._exponents = found.with_host() if found.is_small and reason() is None else found
        return self._exponents

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
