"""Weighted and stratified samples of the rows of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gmmkeops.data.batch import Batch
from gmmkeops.data.distributed import World
from gmmkeops.data.points import as_points, as_weights, weight_unit
from gmmkeops.data.source import Source, readable
from gmmkeops.data.spread import check_range
from gmmkeops.data.survey import sample

__all__ = ["representatives", "stratified_rows"]


def representatives(
    x: Any, weights: Any, size: int, world: World, minimum: int = 1
) -> tuple[Tensor, Tensor | None, int, Callable[[], Iterable[Batch]]]:
    """Draw a weighted sample (n, D) of the points on all ranks.

    Args:
        x: Points (N, D), or anything that :meth:`gmmkeops.Source.of` accepts.
        weights: Weight of each point (N,), or None.
        size: Maximum number of rows in the sample.
        world: The process group.
        minimum: Smallest admissible number of points.

    Returns:
        The sample (n, D), its weights (n,) or None, the number of points with positive weight, and a function that returns an
        iterator over the chunks of this rank. Extremely large or small weights are divided by a power of two.
    """
    if readable(x) or world.size > 1:
        source = world.share(Source.of(x, weights=weights))
        survey = world.merged(source.survey(size, alone=world.size == 1))
        rows, mass = survey.reservoir.sample()
        unit = weight_unit(survey.mass / max(survey.rows, 1))

        def chunks() -> Iterable[Batch]:
            for chunk in source.chunks():
                yield chunk if chunk.weights is None else replace(chunk, weights=chunk.weights / unit)

        return rows, mass / unit, survey.reservoir.seen, source.chunks if unit == 1 else chunks
    x = as_points(x, minimum=minimum)
    check_range(x)
    g = as_weights(weights, x)
    if g is not None:
        g = g / weight_unit(float(g.max()))
    rows, masses = sample(x, g, size)
    return rows, masses, len(x) if g is None else int((g > 0).sum()), lambda: [Batch(x, g)]


def stratified_rows(count: int, size: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw one index from each of ``size`` equal ranges of ``count`` rows; all indices if there are no more than ``size``."""
    if count <= size:
        return torch.arange(count, device=device)
    u = torch.rand(size, generator=generator, dtype=torch.float64, device=device)
    ticks = (torch.arange(size, dtype=torch.float64, device=device) + u) / size
    return (ticks * count).long().clamp(max=count - 1)
