"""Limits on the density that may be pruned, with margins for the rounding errors of the engines."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Tolerance"]

# The engines clamp exponents below these values, which are therefore no lower bounds.
_LEAST = {torch.float32: -2.9e38, torch.float64: -9.9e299}


@dataclass(frozen=True)
class Tolerance:
    """Numbers by which candidate lists are computed and accepted.

    Args:
        rounding: Bound on the rounding error of a minimum, as a fraction of it or of one nat.
        least: Exponents that are not greater are no lower bounds, nats.
        share: Largest log-ratio of the pruned density to the minimum of a leaf, nats.
        allowed: Largest log-ratio of the pruned density to the density of the list at its minimum, nats.
        single: Whether the limit applies to each exponent, rather than to the density.
        give: Margin below estimated minima, nats.
    """

    rounding: float
    least: float
    share: float
    allowed: float
    single: bool
    give: float = 0.0

    @classmethod
    def of(cls, dtype: torch.dtype, epsilon: float | None) -> Tolerance:
        """Return the numbers for points of a dtype; ``epsilon`` is None if each exponent that is pruned must be smaller."""
        rounding = 8 * torch.finfo(dtype).eps
        if epsilon is None:
            return cls(rounding, _LEAST[dtype], 0.0, 0.0, single=True)
        share = math.log(epsilon)
        return cls(rounding, _LEAST[dtype], share, share - math.log1p(-epsilon), single=False)

    def limit(self, minima: Tensor) -> Tensor:
        """Compute the log of the density that may be pruned in leaves with estimated minima (B,), nats.

        Minima of -inf and +inf stay, and NaN becomes -inf.
        """
        room = 4 * self.rounding * minima.abs().clamp(min=1.0)
        limit = torch.where(minima.abs() < math.inf, minima - room + self.share - self.give, minima)
        return torch.where(minima > -math.inf, limit, -math.inf)

    def floor(self, pruned: Tensor) -> Tensor:
        """Compute the smallest minima for which lists are long enough, given log-densities that were pruned, nats."""
        least = pruned - self.allowed
        # Twice the rounding bound of ``lower``, since that is relative to the value.
        least = least + 2 * self.rounding * least.abs().clamp(min=1.0)
        return torch.where(pruned > -math.inf, least, -math.inf)

    def lower(self, minima: Tensor) -> Tensor:
        """Subtract a bound of the rounding error from minima; minima beyond the range of the engines become -inf."""
        low = minima - self.rounding * minima.abs().clamp(min=1.0)
        return torch.where(low > self.least, low, -math.inf)
