"""The objective of a fit: a function of a mixture over batches of points, in standardized coordinates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from gmmkeops import reductions
from gmmkeops.components import Factor, Moments, Surrogate
from gmmkeops.data import Batch, World
from gmmkeops.fitting.data import Data, Memory
from gmmkeops.fitting.frame import Frame
from gmmkeops.fitting.journal import Journal
from gmmkeops.fitting.passes import Passes
from gmmkeops.models import GMM, Mixture
from gmmkeops.penalties import Penalty, as_penalty

__all__ = ["FLOOR", "Objective"]


# Smallest eigenvalue of a covariance in standardized coordinates, about the square of the rounding error of coordinates. A
# component that collapses to a single point then has a finite density. Covariances that the data determine are larger: two
# clusters that are 1e8 standard deviations apart have variances of about 1e-16.
FLOOR = 1e-28


@dataclass(frozen=True)
class Objective:
    """Objective of a fit: the mean negative log-likelihood of all points plus a penalty.

    Args:
        data: The points of this rank in standardized coordinates.
        rows: Number of points on all ranks.
        mass: Total weight Σ g of all points, in units of ``unit``.
        count: Effective number of points, (Σ g)² / Σ g².
        frame: Transformation between data units and standardized coordinates.
        penalty: Function of a mixture in data units, nats per point; or None.
        backend: Name of the engine.
        passes: The passes over the data, with progress and checkpoints.
        unit: Power of two by which the weights were divided. Penalties and reports use the original weights.
        model: The network of a conditional fit, or None.
    """

    data: Data
    rows: int
    mass: float
    count: float
    frame: Frame
    penalty: Penalty | None
    backend: str
    passes: Passes
    unit: float = 1.0
    model: GMM | None = None

    @property
    def device(self) -> torch.device:
        """Device of the parameters in standardized coordinates."""
        return self.frame.shift.device

    def leave(self, mixture: Mixture) -> Mixture:
        """Convert a mixture from standardized coordinates to data units, on the device of the points."""
        found, device = self.frame.leave(mixture), self.data.device
        return found if found.means.device == device else found.to(device)

    def placed(self, device: torch.device) -> Objective:
        """Return the same objective for parameters on a device."""
        return replace(self, frame=self.frame.to(device))

    @classmethod
    def without_points(cls, frame: Frame, mass: float, penalty: Any) -> Objective:
        """Create an objective without points, for an M-step from given moments of total weight ``mass``."""
        data = Memory(frame.shift.new_empty(0, len(frame.shift)), None)
        world = World.alone()
        passes = Passes(world, Journal(None, world), torch.Generator(frame.shift.device))
        return cls(data, 0, mass, mass, frame, None if penalty is None else as_penalty(penalty), "dense", passes)

    def truncated(self, truncate: float | None, mixture: Mixture, sweeps: int) -> Objective:
        """Return the objective with points sorted for truncation by a mixture, if that saves time over ``sweeps`` passes."""
        if not isinstance(self.data, Memory):
            return self
        return replace(self, data=self.data.arranged(truncate, mixture, sweeps, self.backend))

    def settled(self, mixture: Mixture) -> Objective:
        """Return the objective with points regrouped by their labels under ``mixture``, if they were grouped by labels."""
        cloud = self.data.cloud if isinstance(self.data, Memory) else None
        return self if cloud is None or not cloud.cloud.labeled else self.truncated(cloud.epsilon, mixture, 1)

    @property
    def on_gpu(self) -> bool:
        """Whether the points of this rank are on a GPU, or are copied there in chunks."""
        return self.data.device.type == "cuda"

    @cached_property
    def rounding(self) -> Tensor | None:
        """Largest rounding errors (D,) of points in memory, on the device of the parameters; None if they are exact."""
        batch = self.whole()
        return None if batch is None or batch.rounding is None else batch.rounding.to(self.device, torch.float64)

    def whole(self) -> Batch | None:
        """Return all points as one batch without truncation, if they are in the memory of one process; else None."""
        data, passes = self.data, self.passes
        if not isinstance(data, Memory) or data.cloud is not None or passes.world.size > 1 or passes.journal.replay:
            return None
        (batch,) = data.batches()
        return batch

    def moments(
        self,
        offsets: Tensor,
        means: Tensor,
        factor: Factor,
        batches: list[Batch] | None = None,
        *,
        assignment: str = "soft",
    ) -> Moments:
        """Compute the moments of all points, or of given batches, on all ranks; standardized coordinates, float64."""
        seed = self.passes.seed() if assignment == "stochastic" else 0

        def sums_of(batch: Batch) -> tuple[Any, bool, Moments]:
            accurate = batch.accurate(lambda: factor.row_norms().detach())
            x = accurate.points
            if isinstance(x, Tensor) and accurate.truncate != 0:
                x = reductions.arrange(replace(accurate, points=x), len(means), accurate.truncate)
            sums = reductions.moments(
                accurate if x is accurate.points else replace(accurate, points=x),
                offsets,
                means,
                factor,
                assignment=assignment,
                seed=seed + accurate.first,
                backend=self.backend,
                truncate=0,
            )
            return x, accurate is not batch, sums

        nothing = partial(Moments.nothing, means, type(factor))
        if batches is None:
            return self.passes.total(self.data, nothing, sums_of)
        parts = [sums_of(batch)[2] for batch in batches if len(batch)]
        return self.passes.world.added(sum(parts[1:], parts[0]) if parts else nothing())

    def mixture_moments(
        self, mixture: Mixture, batches: list[Batch] | None = None, *, assignment: str = "soft"
    ) -> Moments:
        """Compute the moments of a mixture, with arguments and result as for :meth:`moments`."""
        batch = self.whole() if batches is None and self.data.device != self.device else None
        if batch is not None and assignment != "stochastic":
            parameters = mixture.logits, mixture.means, mixture.factor
            sums = reductions.mixture_moments(
                batch, *parameters, mass=self.mass, assignment=assignment, backend=self.backend
            )
            if sums is not None:
                self.passes.seen(batch, mixture.n_components)
                self.passes.journal.swept(sums)
                return sums
        return self.moments(mixture.offsets, mixture.means, mixture.factor, batches, assignment=assignment)

    def negative_log_likelihood(self, mixture: Mixture, batches: list[Batch] | None = None) -> Tensor:
        """Compute the mean negative log-likelihood of all points or of batches, data units, nats per point; differentiable."""
        offsets, means, factor = mixture.offsets, mixture.means, mixture.factor
        with torch.no_grad():
            # The moments have no gradients, and are themselves the gradients of the total.
            if self.data.device != self.device:
                sums = self.mixture_moments(mixture.detach(), batches)
            else:
                sums = self.moments(offsets, means, factor, batches)
        if not torch.is_grad_enabled():
            return self.frame.log_volume - sums.total / max(float(sums.mass), 1e-300)
        total = reductions.attached(sums, offsets, means, factor)
        return self.frame.log_volume - total / max(float(sums.mass), 1e-300)

    def gradients(
        self, offsets: Tensor, means: Tensor, U: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]] | None:
        """Compute the mean negative log-likelihood and its gradients for points on a GPU, without another wait for it.

        Args:
            offsets, means, U: Finite parameters (K,), (K, D), (K, ...), for which float32 points are accurate. The offsets are
                without their constant -D/2 log 2π, which changes the value only.

        Returns:
            The value, nats per point, and the gradients; None if the points are not in the memory of one GPU.
        """
        batch = self.whole() if self.on_gpu else None
        if batch is None:
            return None
        scale = -1 / self.mass
        total, slopes = reductions.valid_gradients(batch, offsets, means, U, scale=scale, backend=self.backend)
        self.passes.seen(batch, len(means))
        constant = self.frame.log_volume + 0.5 * means.shape[1] * math.log(2 * math.pi)
        return torch.rsub(total, constant, alpha=1 / self.mass), slopes

    def penalized(self, mixture: Mixture) -> Tensor:
        """Compute the penalty of a mixture in standardized coordinates, nats per point."""
        if self.penalty is None:
            return mixture.means.new_zeros(())
        given = mixture if self.penalty.of_weights else self.frame.leave(mixture)
        return self.penalty(given, self.mass * self.unit)

    def surrogate(self, mixture: Mixture) -> Surrogate:
        """Compute the terms that the penalty adds to an M-step at a mixture; both in standardized coordinates."""
        if self.penalty is None:
            return Surrogate.none(mixture)
        return self._terms(self.penalty, self.frame.leave(mixture))

    def _terms(self, penalty: Penalty, mixture: Mixture) -> Surrogate:
        """Return the terms of a penalty at a mixture in data units; standardized coordinates."""
        added = penalty.m_step(mixture, self.mass * self.unit)
        return self.frame.surrogate(added if self.unit == 1 else added.counted_in(self.unit))

    def pseudo_points(self, mixture: Mixture) -> tuple[Tensor | None, float]:
        """Return the scatter and the number of the pseudo-points of each covariance, for penalties whose terms are constant.

        The scatter has the shape of second moments of the components of ``mixture``, standardized coordinates.
        """
        if self.penalty is None:
            return None, 0.0
        kind = type(mixture.factor)
        if kind not in self._constants:
            # The terms do not depend on the parameters, so that they need not be in data units.
            terms = self._terms(self.penalty, mixture)
            scatter = None if terms.scatter is None else kind.second_moments(terms.scatter).contiguous()
            self._constants[kind] = scatter, terms.degrees
        return self._constants[kind]

    @cached_property
    def _constants(self) -> dict[type[Factor], tuple[Tensor | None, float]]:
        return {}

    def project(self, mixture: Mixture) -> tuple[Mixture, Tensor]:
        """Enforce the bounds on the covariances of a standardized mixture; return it and a mask (K,) of changed components."""
        factor, low = mixture.factor.floored(FLOOR)
        hit = low.expand(mixture.n_components)
        if factor is not mixture.factor:
            mixture = Mixture(mixture.logits, mixture.means, factor, validate_args=False)
        if self.penalty is None or not self.penalty.bounds:
            return mixture, hit
        bounded, moved = self.penalty.project(self.frame.leave(mixture))
        return (self.frame.enter(bounded), hit | moved) if bool(moved.any()) else (mixture, hit)
