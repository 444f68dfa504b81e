"""Held-out points of a fit, by whose log-likelihood its best mixture is kept."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gmmkeops._checks import as_number
from gmmkeops.data import (
    Source,
    World,
    as_generator,
    as_points,
    as_weights,
    fingerprint,
    readable,
    table_names,
    table_of,
)
from gmmkeops.fitting.objective import Objective
from gmmkeops.fitting.preparation import prepared
from gmmkeops.models import Mixture

__all__ = ["HeldOut", "Validation", "split_off"]


class HeldOut(NamedTuple):
    """Held-out points.

    Args:
        x: Points (n, D), data units, or rows of a table.
        weights: Their weights (n,), or None.
    """

    x: Any
    weights: Tensor | None


def split_off(
    x: Any, sample_weight: Any, validation: Any, generator: torch.Generator | int | None
) -> tuple[Any, Any, Any]:
    """Hold out a random fraction of the points, if ``validation`` is a number; return points, weights and held-out points.

    Raises:
        TypeError, ValueError: The fraction is not between 0 and 1, holds out no point or all of them, or ``x`` is a source.
    """
    if not isinstance(validation, numbers.Real) or isinstance(validation, bool):
        return x, sample_weight, validation
    fraction = as_number(validation, "validation")
    if not 0 < fraction < 1:
        raise ValueError(f"validation must be a fraction between 0 and 1, points or a source, got {validation}.")
    if readable(x):
        raise ValueError(
            f"validation={validation} requires points in memory; pass another source of held-out points as validation."
        )
    points = as_points(x)
    g = as_weights(sample_weight, points, name="sample_weight")
    generator = as_generator(generator, points.device)
    order = torch.randperm(len(points), generator=generator, device=points.device)
    count = round(fraction * len(points))
    if not 0 < count < len(points):
        raise ValueError(f"validation={validation} holds out {count} of {len(points)} points; pass another fraction.")
    tested, fitted = order[:count].sort().values, order[count:].sort().values
    weights = (None, None) if g is None else (g[fitted], g[tested])
    return _rows_of(x, points, fitted), weights[0], HeldOut(_rows_of(x, points, tested), weights[1])


def _rows_of(x: Any, points: Tensor, index: Tensor) -> Any:
    """Select rows of a table in memory, which keep the names of their columns, or of the points (N, D)."""
    if table_names(x) is None:
        return points[index]
    rows = index.cpu().numpy()
    if hasattr(x, "iloc"):
        return x.iloc[rows]
    return x.take(rows) if hasattr(x, "take") else x[rows]


@dataclass(frozen=True)
class Validation:
    """The mean log-likelihood of held-out points.

    Args:
        objective: Objective of the held-out points without a penalty.
        mark: Description of the points, which must be the same when a fit is resumed.
    """

    objective: Objective
    mark: str

    @classmethod
    def of(cls, validation: Any, objective: Objective, columns: tuple[str, ...] | None, world: World) -> Validation:
        """Validate held-out points, and convert them to the coordinates of the objective of a fit."""
        weights = None
        if isinstance(validation, HeldOut):
            validation, weights = validation
        D = len(objective.frame.shift)
        x: Any
        if readable(validation):
            x = world.share(Source.of(validation).matched(columns))
            if x.features != D:
                raise ValueError(f"validation has {x.features} columns, expected {D}; pass the same columns.")
            mark = x.name
        else:
            x = as_points(table_of(validation, columns), name="validation", features=D)
            x = x.to(objective.data.device)
            mark = f"{len(x)} rows, fingerprint {fingerprint(x, weights)}"
        if weights is not None and not float(weights.sum()) > 0:
            raise ValueError("the held-out points have a total weight of zero; hold out others, or a larger fraction.")
        found = prepared(
            x,
            weights,
            None,
            objective.backend,
            None,
            isotropic=False,
            device=objective.data.device,
            world=world,
            frame=objective.frame,
        )
        return cls(found, mark if world.size == 1 else f"{found.rows} rows")

    def __call__(self, mixture: Mixture) -> float:
        """Return the mean log-likelihood of the held-out points under a mixture in standardized coordinates, nats per point."""
        with torch.no_grad():
            return -float(self.objective.negative_log_likelihood(mixture))
