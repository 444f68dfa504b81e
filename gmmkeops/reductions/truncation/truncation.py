r"""Truncation: reductions that skip negligible components, with a guaranteed error bound.

Let :math:`u_k` be an upper bound of the exponent of component k over a kd-tree leaf (box). A set of components with
:math:`\sum \exp u_k \le \varepsilon \min_x \exp \ell(x)` may be skipped in the leaf: then :math:`0 \le \ell_{true} - \ell_{kept}
\le -\log(1 - \varepsilon)` at each of its points. The minimum over the leaf is estimated from the previous pass. The pass itself
gives a valid lower bound of the minimum, the sum over the kept components; leaves that do not satisfy the condition with this
bound are evaluated again with longer candidate lists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.truncation.bounds import Schedule, candidate_lists
from gmmkeops.reductions.truncation.tree import Cloud

__all__ = ["Truncation"]

# Number of points per leaf for the first estimate of the minimum, and the margin subtracted from it, in units of their range.
_GUESSES, _MARGIN = 4, 2.0

# Margin below the last minima, nats, so that few leaves fail if the minima decrease slightly.
_GIVE = 0.25

# The engines clamp exponents below these values, which are therefore no lower bounds.
_LEAST = {torch.float32: -2.9e38, torch.float64: -9.9e299}

# Largest fraction of evaluated pairs for which truncation saves time.
_PAYS = 0.5


@dataclass
class Truncation:
    r"""Sorted points for a sequence of reductions that neglect at most a fraction ε of the density of each point.

    .. math:: 0 \le \ell_n - \ell_n^{\text{kept}} \le \text{certificate} \le -\log(1 - \varepsilon) \qquad \text{for every } n

    Args:
        cloud: The points, sorted into kd-tree leaves.
        epsilon: Tolerance ε in (0, 1).
        minima: Minimum of ℓ over each leaf (B,) in the last pass, or an estimate of it, nats.
        certificate: Upper bound on the error of ℓ at each point in the last pass, nats.
        share: Fraction of all point-component pairs that were evaluated in the last pass.

    Example:
        >>> import torch, gmmkeops as gk
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = 100 * torch.arange(20).repeat_interleave(500)[:, None] + torch.randn(10_000, 1, generator=generator)
        >>> sweep = gk.reductions.arrange(x, components=20, truncate=1e-4)
        >>> means, factors = 100.0 * torch.arange(20)[:, None], torch.ones(20, 1, 1)
        >>> sums = gk.reductions.moments(sweep, torch.zeros(20), means, factors)
        >>> isinstance(sweep, gk.reductions.Truncation), 0 <= sweep.certificate <= 1.01e-4, sweep.share < 0.3
        (True, True, True)
    """

    cloud: Cloud
    epsilon: float
    minima: Tensor | None = None
    certificate: float = 0.0
    share: float = 1.0
    _repeated: bool = field(default=False, repr=False)

    def __len__(self) -> int:
        return len(self.cloud.rank)

    def sample(self) -> Tensor:
        """Select the rows (B, n) of a few points of each leaf, for the first estimate of the minima."""
        first, sizes = self.cloud.starts[:-1, None], self.cloud.starts.diff()[:, None]
        return first + torch.arange(_GUESSES, device=sizes.device) * sizes // _GUESSES

    def set_initial_bounds(self, values: Tensor) -> None:
        """Set the first estimate of the minima, given the log-sum-exps or exponents (B, n) of :meth:`sample`."""
        low, high = values.double().aminmax(dim=1)
        guess = low - _MARGIN * (high - low)
        self.minima = torch.where(guess.isnan(), -math.inf, guess)

    def begin(self, problem: Exponents, single: bool = False) -> Schedule | None:
        """Return the schedule of a pass, or None if candidate lists would be too long to save time.

        Args:
            problem: Exponents with the component parameters.
            single: Whether the pass computes the largest exponents rather than log-sum-exps. Only exponents that are smaller are
                then pruned, so that the results are exact.
        """
        self._repeated = False
        limit = self._limit(problem, self._guess(), single) - (0 if single else _GIVE)
        schedule = candidate_lists(self.cloud, problem, limit, single=single)
        self.certificate, self.share = 0.0, self._share(problem, schedule)
        if self.share > _PAYS:
            self.share = 1.0
            return None
        return self._floored(problem, schedule, single)

    def again(self, problem: Exponents, schedule: Schedule, minima: Tensor, single: bool = False) -> Schedule | None:
        """Return the schedule for row ranges whose minima (S,) show that their lists were too short, or None."""
        failed = ~schedule.good(minima)
        low = self._lower(problem, minima)
        # Each number that is read from a GPU, and each selection by a mask, waits for it.
        repeats = bool(failed.any())
        if not single and len(failed) and not (repeats and bool(failed.all())):
            pruned, least = schedule.pruned[schedule.owner], low
            if repeats:
                pruned, least = pruned[~failed], least[~failed]
            # This is below ε / (1 - ε) for row ranges that reach their floor, up to rounding, which the clamp removes.
            lost = torch.where(pruned > -math.inf, pruned - least, -math.inf).clamp(max=self._allowed(single))
            self.certificate = max(self.certificate, float(lost.max().exp().log1p()))
        boxes = schedule.boxes[schedule.owner]
        untouched = torch.full_like(self._guess(), math.inf)
        new = untouched.scatter_reduce(0, boxes, low, "amin")
        self.minima = torch.where(new < math.inf, new, self._guess())
        if not repeats:
            return None
        # The results with a list are lower bounds, so that one longer list is sufficient. If it fails because of rounding, or if
        # there is no bound, all components are evaluated.
        guess = untouched.scatter_reduce(0, boxes[failed], low[failed], "amin")
        limit = torch.where(guess < math.inf, self._limit(problem, guess, single), guess)
        if self._repeated:
            limit = torch.where(guess < math.inf, -math.inf, guess)
        self._repeated = True
        rest = candidate_lists(self.cloud, problem, limit, single=single)
        rest = replace(rest, spans=schedule.spans[failed], owner=torch.searchsorted(rest.boxes, boxes[failed]))
        self.share += self._share(problem, rest)
        return self._floored(problem, rest, single)

    def _floored(self, problem: Exponents, schedule: Schedule, single: bool) -> Schedule:
        """Set the floors of a schedule, the smallest minima for which its lists are long enough."""
        pruned = schedule.pruned[schedule.owner]
        least = pruned - self._allowed(single)
        # Twice the rounding bound of ``_lower``, since that is relative to the value.
        least = least + 2 * _rounding(problem) * least.abs().clamp(min=1.0)
        return replace(schedule, floor=torch.where(pruned > -math.inf, least, -math.inf))

    def _lower(self, problem: Exponents, minima: Tensor) -> Tensor:
        """Subtract a bound of the rounding error from minima; minima beyond the range of the engines become -inf."""
        low = minima - _rounding(problem) * minima.abs().clamp(min=1.0)
        return torch.where(low > _LEAST[problem.x.dtype], low, -math.inf)

    def _limit(self, problem: Exponents, guess: Tensor, single: bool) -> Tensor:
        """Compute the log of the density that may be pruned in leaves with estimated minima (B,), nats."""
        room = 4 * _rounding(problem) * guess.abs().clamp(min=1.0)
        return torch.where(guess > -math.inf, guess - room + self._log_epsilon(single), -math.inf)

    def remember(self) -> dict[str, Any]:
        """Return the state for a checkpoint, on which the next schedules depend in addition to the sorted points."""
        return {"minima": self.minima, "certificate": self.certificate, "share": self.share}

    def recall(self, memory: dict[str, Any]) -> None:
        """Restore the state of :meth:`remember`, for the same sorted points."""
        self.minima, self.certificate, self.share = memory["minima"], memory["certificate"], memory["share"]

    def _guess(self) -> Tensor:
        if self.minima is None:
            raise RuntimeError("a truncation has no estimate of the minima; call set_initial_bounds before begin.")
        return self.minima

    def _log_epsilon(self, single: bool) -> float:
        return 0.0 if single else math.log(self.epsilon)

    def _allowed(self, single: bool) -> float:
        """Compute the largest allowed log-ratio of the pruned to the kept density, nats."""
        return 0.0 if single else math.log(self.epsilon) - math.log1p(-self.epsilon)

    def _share(self, problem: Exponents, schedule: Schedule) -> float:
        return schedule.pairs / (len(self.cloud.points) * problem.shape[1])


def _rounding(problem: Exponents) -> float:
    return 8 * torch.finfo(problem.x.dtype).eps
