"""The validated arguments of a fit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from gmmkeops import reductions
from gmmkeops._checks import as_choice, as_fraction, as_functions, as_integer, as_number, renamed
from gmmkeops.data import Source, World, as_dtype, as_points, as_weights, readable, table_names, table_of
from gmmkeops.fitting.em import EM
from gmmkeops.fitting.facts import LIMITS, described
from gmmkeops.fitting.frame import Frame
from gmmkeops.fitting.gradient import Gradient
from gmmkeops.fitting.journal import Journal
from gmmkeops.fitting.memory import as_bytes, chunk_rows, estimate_memory
from gmmkeops.fitting.method import Method
from gmmkeops.fitting.objective import Objective
from gmmkeops.fitting.placement import parameter_device
from gmmkeops.fitting.preparation import prepared
from gmmkeops.models import GMM, Mixture

__all__ = ["Task"]


class Task:
    """The arguments of one call of :func:`gmmkeops.fit`, validated.

    Args:
        start: The initial mixture or :class:`~gmmkeops.GMM`.
        method, penalty, context, max_iter, tol, callback, checkpoint, generator: As for :func:`gmmkeops.fit`.
        truncate, backend, dtype, max_memory: As for :func:`gmmkeops.fit`.

    Attributes:
        mixture: The initial mixture; for a network, its mixture at the central context.
        model: The network of a conditional fit, or None.
        device: Device of the parameters during the fit.
    """

    def __init__(
        self,
        start: Any,
        *,
        method: Any,
        penalty: Any,
        context: Any,
        max_iter: Any,
        tol: Any,
        callback: Any,
        checkpoint: Any,
        generator: Any,
        truncate: Any,
        backend: Any,
        dtype: Any,
        max_memory: Any,
    ) -> None:
        self.method: Method[Any] = EM() if method is None else method
        self.mixture, self.model = _initial(start, self.method, context)
        self.columns: tuple[str, ...] | None = start.columns
        self.max_iter, self.tol = _limits(self.method, max_iter, tol)
        self.truncate, self.callbacks = as_fraction(truncate, "truncate"), as_functions(callback, "callback")
        self.backend = as_choice(backend, "backend", reductions.BACKENDS)
        self.penalty, self.context, self.checkpoint, self.generator = penalty, context, checkpoint, generator
        self.dtype, self.max_memory = dtype, max_memory
        if self.model is not None:
            if not isinstance(self.method, Gradient):
                raise ValueError(
                    f"a GMM with a context requires a gradient method, got {type(self.method).__name__}; pass "
                    "gmmkeops.Adam(lr=1e-3)."
                )
            if self.truncate:
                raise ValueError(
                    f"truncate must be None or 0 for a GMM with a context, got {self.truncate:g}; do not pass it."
                )
            self.truncate = 0
        self.device = parameter_device(self.mixture, self.method, penalty, self.model)

    def points(self, x: Any) -> tuple[Any, tuple[str, ...] | None]:
        """Append the contexts to the points as columns; return them, and the names of all columns or None."""
        if self.model is None or self.context is None:
            return x, self.columns
        return _with_context(self.model, x, self.context)

    def agreed(self, world: World, x: Any, sample_weight: Any, columns: Any) -> dict[str, Any]:
        """Compare all settings between ranks; return descriptions of those that must equal the ones in a checkpoint."""
        settings: dict[str, Any] = {}
        if self.checkpoint is not None or world.size > 1:
            settings = described(self.mixture, self.model, self.method, self.penalty, self.truncate, self.backend)
        given = {
            "sample_weight": sample_weight,
            "generator": self.generator,
            "checkpoint": self.checkpoint,
            "context": self.context,
        }
        others: dict[str, Any] = {name: "none" if value is None else "given" for name, value in given.items()}
        others |= {"max_iter": self.max_iter, "tol": self.tol}
        others |= {name: getattr(self.method, name, None) for name in LIMITS[2:]}
        others |= {"columns": str(columns), "max_memory": str(self.max_memory)}
        others["kind of x"] = "read" if readable(x) else "in memory"
        world.agree({"call": "fit"} | settings | others)
        return settings

    def objective(
        self,
        x: Any,
        sample_weight: Any,
        columns: tuple[str, ...] | None,
        journal: Journal,
        saved: Any,
        spread: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Objective:
        """Check the data and create the objective; the last columns are contexts if there is a network.

        ``spread`` is known from the search for the initial mixture, as in :class:`~gmmkeops.fitting.result.Start`.
        """
        mixture, model, dtype = self.mixture, self.model, as_dtype(self.dtype)
        limit = None if self.max_memory is None else as_bytes(self.max_memory)
        world, extra = journal.world, 0 if model is None else model.context
        K, D, device, name = mixture.n_components, mixture.n_features + extra, mixture.means.device, "x"
        x, columns = _matched(x, sample_weight, columns, world)
        if isinstance(x, Source):
            name, g = x.name, None
            if x.features != D:
                raise ValueError(
                    f"{name} has {x.features} columns, expected {D} as in the model; pass the same columns."
                )
        else:
            x = as_points(x, features=D, minimum=K if world.size == 1 else 0)
            if x.device != device:
                raise ValueError(f"x is on {x.device} but start on {device}; move one with .to().")
            g = as_weights(sample_weight, x, name="sample_weight", some=world.size == 1)
        if limit is not None:
            x, g = _within(limit, mixture, x, g, dtype, world)
        objective = prepared(
            x,
            g,
            self.penalty,
            self.backend,
            self.generator,
            isotropic=mixture.factor.isotropic,
            extra=extra,
            dtype=dtype,
            device=device,
            parameters=self.device,
            world=world,
            truncate=self.truncate,
            frame=None if saved is None else Frame(saved["frame"][0], saved["frame"][1], extra),
            spread=spread,
            journal=journal,
            model=model,
        )
        if objective.rows < K or not 0 < objective.mass < math.inf:
            raise ValueError(
                f"{name} has {objective.rows} rows of total weight {objective.mass * objective.unit:g}, expected at least {K}; "
                "pass more points or use fewer components."
            )
        return replace(objective, frame=replace(objective.frame, columns=columns))


def _initial(start: Any, method: Any, context: Any) -> tuple[Mixture, GMM | None]:
    """Return the initial mixture, and the network of a conditional fit or None."""
    if not isinstance(method, Method):
        raise TypeError(f"method must be a Method such as gmmkeops.Adam(lr=0.05), got {type(method).__name__}.")
    if not isinstance(start, (Mixture, GMM)):
        raise TypeError(
            f"start must be a Mixture, a GMM or a number of components, got {type(start).__name__}; see gmmkeops.initialize."
        )
    model = start if isinstance(start, GMM) and start.context else None
    if model is None and context is not None:
        raise ValueError(
            "context requires a conditional GMM; pass start=GMM(features, context=C), or do not pass context."
        )
    if isinstance(start, GMM):
        with torch.no_grad():
            return start(*([next(start.parameters()).new_zeros(start.context)] if start.context else [])), model
    if start.batch_shape:
        raise ValueError(
            f"start must be one mixture, got a batch of shape {tuple(start.batch_shape)}; fit the mixtures one by one."
        )
    return start, None


def _limits(method: Method[Any], max_iter: Any, tol: Any) -> tuple[int, float]:
    """Validate the maximum number of iterations and the tolerance, with those of the method as defaults."""
    max_iter = as_integer(method.max_iter if max_iter is None else max_iter, "max_iter")
    as_integer(max_iter, "max_iter", 0, clause="must not be negative")
    tol = as_number(method.tol if tol is None else tol, "tol")
    return max_iter, as_number(tol, "tol", 0, clause="must not be negative")


def _with_context(model: GMM, x: Any, context: Any) -> tuple[Any, tuple[str, ...] | None]:
    """Concatenate points and contexts; return them with the names of their columns or None."""
    columns = model.columns
    if context is not None:
        if readable(x):
            raise ValueError(
                "context cannot be passed for points from a file or another source; make the contexts the last columns of x."
            )
        # A rank may have no points; the total number of points is checked later.
        names, others = table_names(x), table_names(context)
        if columns is not None:
            x = table_of(x, columns[: model.features])
            context = table_of(context, columns[model.features :], "context")
        elif names is not None and others is not None:
            columns = names + others
        x = as_points(x, features=model.features, minimum=0)
        c = as_points(context, name="context", features=model.context, minimum=0)
        if len(x) != len(c):
            raise ValueError(f"context must have one row per point, expected {len(x)}, got {len(c)}.")
        x = torch.cat([x.to(torch.promote_types(x.dtype, c.dtype)), c.to(x.device)], 1)
    return x, columns


def _matched(x: Any, weights: Any, columns: tuple[str, ...] | None, world: World) -> tuple[Any, tuple[str, ...] | None]:
    """Match the columns of the points with those of the initial mixture by name; return points, and names or None."""
    if readable(x):
        with renamed("weights", "sample_weight"):
            x = world.share(Source.of(x, weights=weights).matched(columns))
        return x, columns or x.columns
    columns = columns or world.tell(table_names(x))[0]
    world.agree({"columns": columns})
    return table_of(x, columns), None if columns is None else tuple(columns)


def _within(limit: int, mixture: Mixture, x: Any, g: Any, dtype: torch.dtype | None, world: World) -> tuple[Any, Any]:
    """Convert points and weights to a source with small chunks, if a fit in memory would exceed the limit (bytes)."""
    K, D = mixture.n_components, mixture.n_features
    kind = mixture.factor.type_name(tied=mixture.factor.leading == 1 and K > 1)
    if isinstance(x, Source):
        return x.in_chunks(chunk_rows(limit, K, D, kind, torch.float64, x.reader.stored)), g
    # Points in float32 are converted to float64 during the fit if float32 is not accurate enough.
    wanted = estimate_memory(len(x), K, D, covariance_type=kind, dtype=torch.float64)
    if (x.dtype if dtype is None else dtype) == torch.float32:
        wanted += 4 * x.numel()
    (over,) = world.any(wanted > limit)
    if not over:
        return x, g
    return world.share(Source.of(x, weights=g, chunk_rows=chunk_rows(limit, K, D, kind, torch.float64))), None
