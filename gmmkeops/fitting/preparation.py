"""Preparation of a fit: conversion of validated points to standardized coordinates, and creation of the objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gmmkeops.data import Source, World, check_range, fingerprint, sample, weight_unit
from gmmkeops.fitting.data import Data, Memory, Stream
from gmmkeops.fitting.frame import Frame
from gmmkeops.fitting.identity import describe
from gmmkeops.fitting.journal import Journal
from gmmkeops.fitting.objective import Objective
from gmmkeops.fitting.passes import Passes
from gmmkeops.models import GMM
from gmmkeops.penalties import as_penalty

__all__ = ["prepared"]


@dataclass(frozen=True)
class _Survey:
    """Summary of all points, on which standardized coordinates and penalties depend.

    Args:
        rows: Number of points on all ranks.
        mass: Total weight, in units of ``unit``.
        effective: Effective number of points, (Σ g)² / Σ g².
        unit: Power of two by which the weights are divided.
        cloud: A sample of the points (n, D), and their weights (n,) or None.
        single: Whether all points are float32.
        fingerprint: Hash of the points and weights, or None without a checkpoint.
    """

    rows: int
    mass: float
    effective: float
    unit: float
    cloud: tuple[Tensor, Tensor | None]
    single: bool
    fingerprint: int | None

    @classmethod
    def of_tensor(cls, x: Tensor, weights: Tensor | None, *, marked: bool, checked: bool) -> _Survey:
        """Summarize points (N, D) and weights (N,) in memory; with ``marked``, compute the fingerprint."""
        if not checked:
            check_range(x)
        unit = 1.0 if weights is None else weight_unit(float(weights.max()))
        scaled = weights if weights is None or unit == 1 else weights / unit
        mass = float(len(x)) if scaled is None else float(scaled.sum())
        effective = mass if scaled is None else mass**2 / float(scaled.square().sum())
        mark = fingerprint(x, weights) if marked else None
        return cls(len(x), mass, effective, unit, sample(x, scaled), x.dtype == torch.float32, mark)

    @classmethod
    def of_source(cls, source: Source, world: World, device: torch.device) -> _Survey:
        """Summarize a source on all ranks, in one pass."""
        survey = world.merged(source.survey(alone=world.size == 1))
        unit = weight_unit(survey.mass / max(survey.rows, 1))
        mass = survey.mass / unit
        points, masses = survey.reservoir.sample()
        masses = masses / unit
        if unit == 1:
            effective = mass**2 / max(survey.squares, 1e-300)
        else:
            # Sums of squared weights may overflow or underflow; they are estimated from the sample of scaled weights.
            effective = survey.rows * float(masses.mean()) ** 2 / max(float(masses.square().mean()), 1e-300)
        cloud = points.to(device), masses.to(device)
        return cls(survey.rows, mass, effective, unit, cloud, survey.single, survey.fingerprint)


def prepared(
    x: Tensor | Source,
    weights: Tensor | None,
    penalty: Any,
    backend: str,
    generator: torch.Generator | int | None,
    *,
    isotropic: bool,
    extra: int = 0,
    dtype: torch.dtype | None = None,
    device: Any = None,
    parameters: torch.device | None = None,
    world: World | None = None,
    truncate: float | None = 0,
    frame: Frame | None = None,
    spread: tuple[Tensor, Tensor] | None = None,
    journal: Journal | None = None,
    model: GMM | None = None,
) -> Objective:
    """Create the objective for validated points (N, D) in data units, whose last ``extra`` columns are contexts.

    If ``frame`` is None, the transformation to standardized coordinates is computed from the points, whose trimmed means and
    standard deviations are ``spread``, if they are known. It and the parameters are on the device ``parameters``, by default that
    of the points.
    """
    world = World.alone() if world is None else world
    journal = Journal(None, world) if journal is None else journal
    device = x.device if isinstance(x, Tensor) else torch.device("cpu" if device is None else device)
    generator = world.generator(generator, device)
    source = x if isinstance(x, Source) else world.share(Source.of(x, weights=weights)) if world.size > 1 else None
    if source is None:
        assert isinstance(x, Tensor), "only points in memory have no source"
        # The range of the points has been checked when their spread was computed.
        survey = _Survey.of_tensor(x, weights, marked=journal.checkpoint is not None, checked=spread is not None)
    else:
        survey = _Survey.of_source(source, world, device)
    if frame is None:
        known = spread if survey.cloud[0] is x else None
        frame = Frame.of(*survey.cloud, isotropic=isotropic, extra=extra, spread=known).to(parameters or device)
    if journal.checkpoint is not None:
        rows_at_once = 0 if source is None else source.size
        seen = survey.cloud[0] if source is None else survey.cloud[0].cpu()
        journal.fingerprint = survey.fingerprint
        journal.layout = f"{describe(sample(seen, None)[0])}, {rows_at_once} rows at a time"
    data: Data
    if isinstance(x, Tensor):
        first = 0
        if source is not None:
            part, first = source.slice, source.first
            x, weights = x[part], None if weights is None else weights[part]
        weights = weights if weights is None or survey.unit == 1 else weights / survey.unit
        data = Memory.of(x, weights, frame, x.dtype if dtype is None else dtype, truncate, first)
    else:
        kept = torch.float32 if survey.single else torch.float64
        data = Stream(x, frame, kept if dtype is None else dtype, device, truncate, survey.unit)
    return Objective(
        data,
        survey.rows,
        survey.mass,
        survey.effective,
        frame,
        None if penalty is None else as_penalty(penalty),
        backend,
        Passes(world, journal, generator),
        survey.unit,
        model,
    )
