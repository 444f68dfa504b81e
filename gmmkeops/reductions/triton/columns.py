"""Sums of exponentials of the tiles that matrix products compute, by one kernel that reads each exponent once or twice.

In many dimensions, exponents and moments are products of float64 matrices (:mod:`gmmkeops.reductions.dense.tile`), for which
GPUs for computing centers have tensor cores. Torch operations on their results would take three times as long as the products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gmmkeops.reductions.triton.loading import launch

__all__ = ["Softmax"]

# Numbers of components and of points of a block, and of warps of a program. Measured on an H200 with 1000 components: 7.1 ms for
# the responsibilities of 1e6 points; other blocks took up to 17 ms.
_COMPONENTS, _POINTS, _WARPS = 32, 32, 8

# Initial value of running maxima, nats. If all exponents of a point are below it, the log-sum-exp is not finite, and the dense
# engine repeats the tile with clamped exponents.
_LEAST = {torch.float64: -1e300, torch.float32: -3.4e38}


class Softmax:
    """The kernel, with the interface :class:`gmmkeops.reductions.dense.tile.Columns`."""

    def logsumexps(self, E: Tensor) -> Tensor:
        """Return the log-sum-exps (rows,) of exponents (components, rows), nats, in their dtype."""
        return self._launched(E, None, 0.0, shares=False)

    def assign(self, E: Tensor, weights: Tensor | None, depth: float) -> Tensor:
        """Overwrite exponents by weighted responsibilities, as :class:`~gmmkeops.reductions.dense.tile.Columns` demands."""
        return self._launched(E, weights, depth, shares=True)

    def _launched(self, E: Tensor, weights: Tensor | None, depth: float, shares: bool) -> Tensor:
        K, N = E.shape
        values = E.new_empty(N)
        launch(
            "columns", "softmax", E.device, (-(-N // _POINTS),), E, values, values if weights is None else weights, K, N, depth,
            LEAST=_LEAST[E.dtype], SHARES=shares, WEIGHTED=weights is not None, BK=_COMPONENTS, BN=_POINTS, warps=_WARPS,
        )  # fmt: skip
        return values
