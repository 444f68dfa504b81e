"""EM steps in the compiled library, for ordinary steps on a CPU: several steps without the interpreter between them.

A step is ordinary if it needs no prior but a constant one, prunes no component, finds no singular covariance, and if all points
have a finite log-density. All other steps are left to the M-step in torch, which this one equals up to rounding. If steps are
accelerated by SQUAREM, each one consists of two or three EM steps, and is ordinary if all of them are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gmmkeops.components import DiagonalFactor, Factor, FullFactor, Moments, SphericalFactor, transfer_memory
from gmmkeops.data import ROUNDING, Batch
from gmmkeops.reductions.cores import cores
from gmmkeops.reductions.library import OUT_OF_MEMORY, Call, StepCall, reason, run
from gmmkeops.reductions.native import native
from gmmkeops.reductions.native.engine import ASSIGNMENTS, LONG, RATIO, scaled
from gmmkeops.reductions.problem import Exponents

__all__ = [
    "FAMILIES",
    "MOST",
    "Maximization",
    "Pool",
    "StepSettings",
    "Steps",
    "described",
    "em_steps",
    "maximizes",
    "native_m_step",
    "results",
    "tables_of",
]

# Numbers of the families in source/interface.hpp; factors of other classes may have an M-step of their own.
FAMILIES: dict[type[Factor], int] = {FullFactor: 0, DiagonalFactor: 1, SphericalFactor: 2}

_CPU = torch.device("cpu")

# Dimension of full covariances beyond which the Cholesky factorization of LAPACK is faster.
_MANY = 128

# Largest number of steps of a call, and multiplications that a call with several steps may take (about a millisecond).
MOST, _WORK = 16, 3e7


class Pool(NamedTuple):
    """Constants of an average of each covariance with a robust pooled one, see ``Steps::pool`` in source/steps.hpp.

    Args:
        below: Weight of a component below which covariances are averaged.
        weight: Weight of the pooled covariance in each average, in units of the weights of points.
        floor: Constant that is added to the variances of the pooled covariance, relative to a typical variance within components.
        limit: Mean variance of a component, relative to a typical one, above which its contribution is reduced.
    """

    below: float
    weight: float
    floor: float
    limit: float


@dataclass(frozen=True)
class StepSettings:
    """Constants of the M-step, in the units of the points.

    Args:
        mass: Total weight of all points.
        ridge: Constants (D,) that are added to the variances of the columns, float64.
        floor: Smallest eigenvalue of a covariance.
        least: Weight of a component at which it is pruned.
        fixed: Whether weights, means and covariances keep their values.
        assignment: ``"soft"`` or ``"hard"``.
        scatter: Scatter of the pseudo-points of each covariance, in the shape of S2 of a component; None without a prior.
        degrees: Number of these pseudo-points.
        bare: Whether the logits are the offsets of the exponents, as in k-means, rather than log-weights.
        pool: How covariances are averaged with a pooled one; None if they are not.
        accelerate: Whether each step is an iteration of accelerated EM, which takes up to three passes over the points. The
            M-step alone does not depend on it.
    """

    mass: float
    ridge: Tensor
    floor: float
    least: float
    fixed: tuple[bool, bool, bool] = (False, False, False)
    assignment: str = "soft"
    scatter: Tensor | None = None
    degrees: float = 0.0
    bare: bool = False
    pool: Pool | None = None
    accelerate: bool = False


class Steps:
    """Results of consecutive steps: parameters before step t < len(steps), and after the last step at t = len(steps).

    Args:
        tables: Arrays with one row before each step, and one after the last one.
        factor: Precision factor of the initial mixture.

    Attributes:
        totals: Weighted log-likelihood before each step, nats.
        costs: Half the ridge times the precisions, weighted by the fractions, before each step, nats.
        priors: Σ_k degrees / 2 log |Σ_k| + 1/2 tr(scatter Σ_k⁻¹) before each step, nats.
        drifts: Sum of the changes of the costs by those of the fractions, before each step and after the last one.
    """

    def __init__(self, tables: dict[str, Tensor], factor: Factor) -> None:
        self._tables, self._factor = tables, factor
        totals, costs, priors, self.drifts = tables["numbers"].tolist()
        self.totals, self.costs, self.priors = totals[:-1], costs[:-1], priors[:-1]

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.drifts) - 1

    def logits(self, t: int) -> Tensor:
        """Return the log-weights (K,)."""
        return self._tables["logits"][t]

    def means(self, t: int) -> Tensor:
        """Return the means (K, D)."""
        return self._tables["means"][t]

    def factor(self, t: int) -> Factor:
        """Return the precision factor."""
        return self._factor.replace(**{name: self._tables[name][t] for name in self._factor.tensors})

    def counts(self, t: int) -> Tensor:
        """Return the fraction of the points (K or 1,) for each covariance."""
        return self._tables["counts"][t]


def em_steps(
    batch: Batch,
    logits: Tensor,
    means: Tensor,
    factor: Factor,
    settings: StepSettings,
    *,
    counts: Tensor | None = None,
    drift: float = 0.0,
    backend: str = "auto",
    limit: int | None = None,
    most: int = MOST,
    tolerance: float = -math.inf,
    relative: float = 0.0,
) -> Steps | None:
    """Perform EM steps for points on a CPU, as :func:`gmmkeops.reductions.em_steps`; None if the native engine does not."""
    own = described(batch, means, factor, settings, backend)
    if own is None:
        return None
    call, _kept = own
    (N, D), K, full = batch.points.shape, len(means), factor.coupled
    passes = 3 if settings.accelerate else 1
    work = passes * N * K * (D * (D + 8) if full else D + 8)
    count = max(1, min(most, int(_WORK / max(work, 1)))) if limit is None else limit
    call.tolerance, call.relative = tolerance, relative
    tables = tables_of(count, logits, means, factor, counts, drift)
    call.steps = count
    _place(call, tables, 0)
    _run("gmmkeops_steps", call, is_long=count * passes * N * K * D >= LONG)
    return results(tables, factor, call.done)


def _run(function: str, call: StepCall, is_long: bool = False) -> None:
    if run(function, call, is_long=is_long) == OUT_OF_MEMORY:
        K, D = call.sweep.components, call.sweep.dimensions
        raise MemoryError(f"There is not enough memory for EM steps of {K} components in {D} dimensions.")


def _place(call: StepCall, tables: dict[str, Tensor], t: int) -> None:
    """Let a call read the parameters before step t, and write its results."""
    for name, table in tables.items():
        if name != "numbers":
            setattr(call, name, table.data_ptr() + t * table.stride(0) * table.element_size())
    # The last four tables are the rows of one.
    numbers = tables["numbers"]
    size = numbers.element_size()
    for i, name in enumerate(("total", "cost", "prior", "drift")):
        setattr(call, name, numbers.data_ptr() + (i * numbers.shape[1] + t) * size)


def results(tables: dict[str, Tensor], factor: Factor, done: int) -> Steps:
    """Return the results of the first steps of tables."""
    rows = {name: table[:, : done + 1] if name == "numbers" else table for name, table in tables.items()}
    return Steps(rows, factor)


class Maximization:
    """M-steps from moments that any engine has computed, from one row of tables to the next one.

    Args:
        factor: Precision factor, of a family for which :func:`maximizes` is true.
        components: Number of components K.
        settings: Constants of the M-step.
        mass: Total weight of the points of the moments.
        tables: Tables as :func:`tables_of` returns them.
    """

    def __init__(
        self, factor: Factor, components: int, settings: StepSettings, mass: float, tables: dict[str, Tensor]
    ) -> None:
        self._tables, self._odd = tables, torch.zeros(1, dtype=torch.int64, device="cpu")
        sweep = Call(
            family=FAMILIES[type(factor)],
            threads=cores(),
            components=components,
            dimensions=factor.features,
            odd=self._odd.data_ptr(),
        )
        self._call, self._kept = _described(sweep, factor, settings, mass)
        self._call.steps = 1

    def perform(self, t: int, sums: Sequence[Tensor]) -> bool:
        """Perform step t with S0, S1, S2 and the total, on the CPU; return whether it was an ordinary one."""
        parts = [part.contiguous() for part in sums]
        sweep = self._call.sweep
        sweep.S0, sweep.S1, sweep.S2, sweep.total = (part.data_ptr() for part in parts)
        _place(self._call, self._tables, t)
        _run("gmmkeops_maximize", self._call)
        return bool(self._call.done)


def maximizes(factor: Factor) -> bool:
    """Return whether the library performs M-steps for the family and the number of features of factors."""
    family = FAMILIES.get(type(factor))
    return family is not None and not (family == 0 and factor.features > _MANY) and reason() is None


def native_m_step(
    sums: Moments,
    logits: Tensor,
    means: Tensor,
    factor: Factor,
    settings: StepSettings,
    counts: Tensor,
    drift: float,
) -> Steps | None:
    """Perform the M-step of an EM step whose E-step was performed by any engine.

    Args:
        sums: Moments of the mixture about its means, on the CPU.
        logits, means, factor, settings, counts, drift: As for :func:`em_steps`.

    Returns:
        The results of one step, or of none if the M-step is not an ordinary one; None if the library does not compute it.
    """
    if not maximizes(factor):
        return None
    tables = tables_of(1, logits, means, factor, counts, drift)
    step = Maximization(factor, len(means), settings, float(sums.mass), tables)
    return results(tables, factor, step.perform(0, (sums.S0, sums.S1, sums.S2, sums.total)))


def described(
    batch: Batch, means: Tensor, factor: Factor, settings: StepSettings, backend: str
) -> tuple[StepCall, list[Tensor | None]] | None:
    """Return the arguments of steps but for their number and tables, and the tensors that must be kept until they are performed.

    Returns:
        None if the native engine does not compute them.
    """
    x, weights, family = batch.points, batch.weights, FAMILIES.get(type(factor))
    if family is None or not isinstance(x, Tensor) or (family == 0 and x.shape[1] > _MANY):
        return None
    (N, D), K = x.shape, len(means)
    if not native.runs(x, family == 0, backend, lambda: Exponents.of(batch, torch.zeros(K), means, factor)):
        return None
    mass, unit, ratio = batch.mass, 1.0, 1.0
    if weights is not None:
        weights, unit, ratio = scaled(weights)
    x, rounding = x.contiguous(), batch.rounding
    values, numbers = x.new_empty(N), torch.zeros(2, dtype=torch.int64, device="cpu")
    sweep = Call(
        request=ASSIGNMENTS[settings.assignment],
        family=family,
        double_points=x.dtype == torch.float64,
        double_arithmetic=ratio > RATIO,
        threads=cores(),
        rows=N,
        components=K,
        dimensions=D,
        points=x.data_ptr(),
        weights=None if weights is None else weights.data_ptr(),
        unit=unit,
        values=values.data_ptr(),
        odd=numbers.data_ptr(),
        doubles=numbers.data_ptr() + numbers.element_size(),
    )
    call, kept = _described(sweep, factor, settings, mass)
    call.accelerated = settings.accelerate
    call.rounding = None if rounding is None else rounding.data_ptr()
    return call, [x, weights, rounding, values, numbers, *kept]


def _described(
    sweep: Call, factor: Factor, settings: StepSettings, mass: float
) -> tuple[StepCall, list[Tensor | None]]:
    """Return the arguments of steps for a sweep over points of total weight ``mass``, and the tensors that must be kept."""
    ridge, fixed = settings.ridge.contiguous(), settings.fixed
    scatter = None if settings.scatter is None else settings.scatter.contiguous()
    below, weight, least, limit = (0.0, 0.0, 0.0, 0.0) if settings.pool is None else settings.pool
    call = StepCall(
        sweep=sweep,
        tied=factor.leading == 1,
        fixed_weights=fixed[0],
        fixed_means=fixed[1],
        fixed_covariances=fixed[2],
        bare=settings.bare,
        mass=settings.mass,
        scale=settings.mass / mass,
        least=settings.least,
        floor=settings.floor,
        ceiling=1 / settings.floor,
        coarse=ROUNDING,
        degrees=settings.degrees,
        pool_below=below,
        pool_weight=weight,
        pool_floor=least,
        pool_limit=limit,
        ridge=ridge.data_ptr(),
        scatter=None if scatter is None else scatter.data_ptr(),
    )
    return call, [ridge, scatter]


def tables_of(
    count: int,
    logits: Tensor,
    means: Tensor,
    factor: Factor,
    counts: Tensor | None,
    drift: float,
    device: torch.device = _CPU,
) -> dict[str, Tensor]:
    """Return arrays with one row before each step and one after the last one, of which the first rows are set.

    Args:
        count: Largest number of steps.
        logits, means, factor, counts, drift: As for :func:`em_steps`.
        device: Device of the points.
    """
    tensors, L = factor.tensors, factor.leading
    shapes: dict[str, Any] = {"logits": logits.shape, "means": means.shape, "counts": (L,)}
    shapes |= {name: (L, tensor.shape[-1]) for name, tensor in tensors.items()}
    tables = {name: transfer_memory((count + 1, *shape), device) for name, shape in shapes.items()}
    unknown = math.nan if counts is None else counts
    first: dict[str, Any] = {"logits": logits, "means": means, "counts": unknown, **tensors}
    for name, value in first.items():
        tables[name][0] = value
    tables["numbers"] = torch.zeros(4, count + 1, dtype=torch.float64, device="cpu")
    if drift:
        tables["numbers"][3, 0] = drift
    return tables
