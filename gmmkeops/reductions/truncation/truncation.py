r"""Truncation: reductions that skip negligible components, with a guaranteed error bound.

Let :math:`u_k` be an upper bound of the exponent of component k over a kd-tree leaf (box). A set of components with
:math:`\sum \exp u_k \le \varepsilon \min_x \exp \ell(x)` may be skipped in the leaf: then :math:`0 \le \ell_{true} - \ell_{kept}
\le -\log(1 - \varepsilon)` at each of its points. The minimum over the leaf is estimated from the previous pass. The pass itself
gives a valid lower bound of the minimum, the sum over the kept components; leaves that do not satisfy the condition with this
bound are evaluated again with longer candidate lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.truncation.bounds import Schedule, candidate_lists
from gmmkeops.reductions.truncation.tolerance import Tolerance
from gmmkeops.reductions.truncation.tree import Cloud

__all__ = ["Check", "ListMaker", "Truncation", "lists_of"]

# Function that computes candidate lists, with the arguments of :func:`lists_of`.
ListMaker = Callable[[Cloud, Exponents, Tensor, Tolerance], Schedule]

# Number of points per leaf for the first estimate of the minimum, and the margin subtracted from it, in units of their range.
_GUESSES, _MARGIN = 4, 2.0

# Margin below the last minima, nats, so that few leaves fail if the minima decrease slightly.
_GIVE = 0.25

# Largest fraction of evaluated pairs for which truncation saves time.
_PAYS = 0.5


def lists_of(cloud: Cloud, problem: Exponents, minima: Tensor, tolerance: Tolerance) -> Schedule:
    """Compute candidate lists, given estimated minima (B,) of the leaves; leaves with +inf need no list."""
    return candidate_lists(cloud, problem, tolerance.limit(minima), single=tolerance.single)


@dataclass(frozen=True)
class Check:
    """Numbers by which the lists of a schedule of all leaves are accepted, read from the device in one transfer.

    Args:
        failed: Whether the list of a leaf was too short.
        lost: Largest log-ratio of the bound on the pruned density to the lower bound of the minimum of a leaf, nats.
        low: Lower bounds of the minima (B,), nats.
    """

    failed: bool
    lost: float
    low: Tensor


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

    def begin(self, problem: Exponents, single: bool = False, make: ListMaker = lists_of) -> Schedule | None:
        """Return the schedule of a pass, or None if candidate lists would be too long to save time.

        Args:
            problem: Exponents with the component parameters.
            single: Whether the pass computes the largest exponents rather than log-sum-exps. Only exponents that are smaller are
                then pruned, so that the results are exact.
            make: Function that computes the lists.
        """
        self._repeated = False
        tolerance = self._tolerance(problem, single)
        schedule = make(self.cloud, problem, self._guess(), tolerance if single else replace(tolerance, give=_GIVE))
        self.certificate, self.share = 0.0, self._share(problem, schedule)
        if self.share > _PAYS:
            self.share = 1.0
            return None
        return schedule if schedule.floor is not None else _floored(schedule, tolerance)

    def again(
        self,
        problem: Exponents,
        schedule: Schedule,
        minima: Tensor,
        single: bool = False,
        make: ListMaker = lists_of,
        check: Check | None = None,
    ) -> Schedule | None:
        """Return the schedule for row ranges whose minima (S,) show that their lists were too short, or None.

        Args:
            problem, single, make: As for :meth:`begin`.
            schedule, minima: The evaluated schedule, and the minima over its row ranges (S,), nats.
            check: Numbers that the engine has computed from the minima, or None.
        """
        tolerance = self._tolerance(problem, single)
        if check is not None and not check.failed:
            if not single:
                self.certificate = max(self.certificate, math.log1p(math.exp(min(check.lost, tolerance.allowed))))
            self.minima = check.low
            return None
        failed = ~schedule.good(minima)
        low = tolerance.lower(minima)
        # Each number that is read from a GPU, and each selection by a mask, waits for it.
        repeats = bool(failed.any())
        if not single and len(failed) and not (repeats and bool(failed.all())):
            pruned, least = schedule.pruned[schedule.owner], low
            if repeats:
                pruned, least = pruned[~failed], least[~failed]
            # This is below ε / (1 - ε) for row ranges that reach their floor, up to rounding, which the clamp removes.
            lost = torch.where(pruned > -math.inf, pruned - least, -math.inf).clamp(max=tolerance.allowed)
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
        if self._repeated:
            guess = torch.where(guess < math.inf, -math.inf, guess)
        self._repeated = True
        rest = make(self.cloud, problem, guess, tolerance)
        owner = torch.searchsorted(rest.boxes, boxes[failed])
        rest = replace(rest, spans=schedule.spans[failed], owner=owner, whole=None)
        self.share += self._share(problem, rest)
        return _floored(rest, tolerance)

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

    def _tolerance(self, problem: Exponents, single: bool) -> Tolerance:
        return Tolerance.of(problem.x.dtype, None if single else self.epsilon)

    def _share(self, problem: Exponents, schedule: Schedule) -> float:
        return schedule.pairs / (len(self.cloud.points) * problem.shape[1])


def _floored(schedule: Schedule, tolerance: Tolerance) -> Schedule:
    return replace(schedule, floor=tolerance.floor(schedule.pruned[schedule.owner]))
