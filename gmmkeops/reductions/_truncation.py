r"""Sweeps that leave components out, and certify what that costs.

A set of components with :math:`\sum \exp u_k \le \varepsilon \min_x \exp \ell(x)` may be left out of a box:
:math:`0 \le \ell_{true} - \ell_{kept} \le -\log(1 - \varepsilon)` at each of its points. The minimum over the box is a guess
from the sweep before; the sweep itself yields a valid one, since what is kept is a lower bound of the truth, and a box that
fails is done again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gmmkeops.reductions._boxes import Cloud
from gmmkeops.reductions._exponents import Exponents
from gmmkeops.reductions._lists import Drift, Plan, lists

__all__ = ["Truncation"]

# Points of a box that a first guess looks at, and how far below their least ℓ the others' may be, in their ranges.
_GUESSES, _MARGIN = 4, 2.0
# What lists are given beside the last minima, nats, so that few boxes fail when those sink a little.
_GIVE = 0.25
# Lists are made for so many moves as the last one, if those are gentle; and made anew when more than this share of the boxes
# fails with them.
_AHEAD, _FAILURES = 4.0, 0.02
# Below these values the engines keep exponents finite, so that what they find says nothing.
_LEAST = {torch.float32: -2.9e38, torch.float64: -9.9e299}
# Lists longer than this share of all components do not pay for being lists.
_PAYS = 0.5


@dataclass
class Truncation:
    r"""One sweep after another over a cloud, each with lists that leave out less than ε of every point's density.

    .. math:: 0 \le \ell_n - \ell_n^{\text{kept}} \le \text{certificate} \le -\log(1 - \varepsilon) \qquad \text{for every } n

    Args:
        cloud: The points.
        epsilon: ε, in (0, 1).
        minima: min ℓ over each box (B,) in the last sweep, or a guess of it, nats.
        certificate: Most that the last sweep may have lost of any point's ℓ, nats.
        share: Part of all pairs that the last sweep looked at.

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
    _last: Exponents | None = field(default=None, repr=False)
    _kept: tuple[Plan, Exponents, Drift, bool] | None = field(default=None, repr=False)
    _repeated: bool = field(default=False, repr=False)

    def __len__(self) -> int:
        return len(self.cloud.rank)

    def sample(self) -> Tensor:
        """Rows of a few points of each box (B, n), for a first guess."""
        first, sizes = self.cloud.starts[:-1, None], self.cloud.starts.diff()[:, None]
        return first + torch.arange(_GUESSES, device=sizes.device) * sizes // _GUESSES

    def suppose(self, values: Tensor) -> None:
        """Takes ℓ of the sample (B, n) as the first guess."""
        low, high = values.double().aminmax(dim=1)
        guess = low - _MARGIN * (high - low)
        self.minima = torch.where(guess.isnan(), -math.inf, guess)

    def begin(self, problem: Exponents, single: bool = False) -> Plan | None:
        """The plan of a sweep; None where lists would not be shorter than all components by enough to pay.

        Args:
            problem: The components.
            single: Whether the sweep reads single exponents rather than their sum. No dropped one is then above what it
                reads, which therefore is what it would read of all.
        """
        self._repeated = False
        plan = self._reused(problem, single)
        if plan is None:
            margin = None if self._last is None else Drift.between(self._last, problem) * _AHEAD
            if margin is not None and not margin.gentle:
                margin = None
            limit = self._limit(problem, self._guess(), single) - (0 if single else _GIVE)
            plan = lists(self.cloud, problem, limit, single=single, margin=margin)
            self._kept = None if margin is None else (plan, problem, margin, single)
        self._last = problem
        self.certificate, self.share = 0.0, self._share(problem, plan)
        if self.share > _PAYS:
            self.share = 1.0
            return None
        return plan

    def _reused(self, problem: Exponents, single: bool) -> Plan | None:
        """The last lists, if no component has moved further since than they allow for."""
        if self._kept is None:
            return None
        plan, reference, margin, kind = self._kept
        return plan if kind == single and Drift.between(reference, problem).within(margin) else None

    def again(self, problem: Exponents, plan: Plan, minima: Tensor, single: bool = False) -> Plan | None:
        """What is left to do after a sweep that found these minima (S,) over its stretches, or None."""
        failed = ~self.good(problem, plan, minima, single)
        low = self._lower(problem, minima)
        if not single and not bool(failed.all()):
            dropped = plan.dropped[plan.owner][~failed]
            # A floor that is met keeps this below ε / (1 - ε), but for the rounding of the difference itself.
            lost = torch.where(dropped > -math.inf, dropped - low[~failed], -math.inf).clamp(max=self._allowed(single))
            self.certificate = max(self.certificate, float(lost.max().exp().log1p()))
        boxes = plan.boxes[plan.owner]
        untouched = torch.full_like(self._guess(), math.inf)
        new = untouched.scatter_reduce(0, boxes, low, "amin")
        self.minima = torch.where(new < math.inf, new, self._guess())
        if not bool(failed.any()):
            return None
        if int(failed.sum()) > _FAILURES * len(failed):
            self._kept = None
        # What is found with a list is a lower bound of the truth, so that one more list is enough; if rounding lets even that
        # one fail, or there is no bound, all components are looked at.
        guess = untouched.scatter_reduce(0, boxes[failed], low[failed], "amin")
        limit = torch.where(guess < math.inf, self._limit(problem, guess, single), guess)
        if self._repeated:
            limit = torch.where(guess < math.inf, -math.inf, guess)
        self._repeated = True
        rest = lists(self.cloud, problem, limit, single=single)
        rest = replace(rest, spans=plan.spans[failed], owner=torch.searchsorted(rest.boxes, boxes[failed]))
        self.share += self._share(problem, rest)
        return rest

    def good(self, problem: Exponents, plan: Plan, minima: Tensor, single: bool = False) -> Tensor:
        """Whether each stretch (S,) has found enough with its list; what is not a number has overflowed, and has not."""
        floor = self.floor(problem, plan, single)
        return (minima >= floor) | (floor == -math.inf)

    def floor(self, problem: Exponents, plan: Plan, single: bool = False) -> Tensor:
        """The least value that each stretch (S,) may find with its list, nats; -inf where the list is all components."""
        dropped = plan.dropped[plan.owner]
        least = dropped - self._allowed(single)
        # Twice the rounding that a value found is lowered by, since that one is relative to the value.
        least = least + 2 * _rounding(problem) * least.abs().clamp(min=1.0)
        return torch.where(dropped > -math.inf, least, -math.inf)

    def _lower(self, problem: Exponents, minima: Tensor) -> Tensor:
        """Values found, less what rounding may have added to them; -inf for those beyond the range of the engines."""
        low = minima - _rounding(problem) * minima.abs().clamp(min=1.0)
        return torch.where(low > _LEAST[problem.x.dtype], low, -math.inf)

    def _limit(self, problem: Exponents, guess: Tensor, single: bool) -> Tensor:
        """The most that lists may drop of boxes whose least values are guessed (B,), nats."""
        room = 4 * _rounding(problem) * guess.abs().clamp(min=1.0)
        return torch.where(guess > -math.inf, guess - room + self._log_epsilon(single), -math.inf)

    def remember(self) -> dict[str, Any]:
        """What the next sweep's lists depend on, beside the cloud."""
        last = None if self._last is None else _parameters(self._last)
        kept = None
        if self._kept is not None:
            plan, reference, margin, single = self._kept
            parts = [plan.boxes, plan.index, plan.pointer, plan.dropped, plan.spans, plan.owner]
            kept = (parts, _parameters(reference), [margin.stretch, margin.shift, margin.rise], single)
        return {
            "minima": self.minima,
            "certificate": self.certificate,
            "share": self.share,
            "last": last,
            "lists": kept,
        }

    def recall(self, memory: dict[str, Any]) -> None:
        """Goes on where :meth:`remember` was called, with the same cloud."""
        self.minima, self.certificate, self.share = memory["minima"], memory["certificate"], memory["share"]
        points = self.cloud.points[:0]
        self._last = None if memory["last"] is None else Exponents(points, *memory["last"])
        self._kept = None
        if memory["lists"] is not None:
            parts, reference, margin, single = memory["lists"]
            self._kept = Plan(*parts), Exponents(points, *reference), Drift(*margin), single

    def _guess(self) -> Tensor:
        if self.minima is None:
            raise RuntimeError("a truncated sweep has no first guess; call suppose before begin.")
        return self.minima

    def _log_epsilon(self, single: bool) -> float:
        return 0.0 if single else math.log(self.epsilon)

    def _allowed(self, single: bool) -> float:
        """How much larger the sum of what is dropped may be than the sum of what is kept, nats."""
        return 0.0 if single else math.log(self.epsilon) - math.log1p(-self.epsilon)

    def _share(self, problem: Exponents, plan: Plan) -> float:
        return plan.pairs / (len(self.cloud.points) * problem.shape[1])


def _parameters(problem: Exponents) -> list[Tensor]:
    return [problem.offsets, problem.means, problem.U, problem.centre]


def _rounding(problem: Exponents) -> float:
    return 8 * torch.finfo(problem.x.dtype).eps
