"""Blocks of rows, numbered among all rows, and their regrouping into chunks of a given size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from gmmkeops.data.batch import Batch

__all__ = ["Unit", "cut", "grouped", "joined", "resized"]


@dataclass(frozen=True)
class Unit:
    """Row range that is loaded in one step.

    Args:
        first: Index of the first row among all rows of the reader.
        rows: Number of rows before filtering.
    """

    first: int
    rows: int


def cut(first: int, stop: int, size: int) -> list[Unit]:
    """Split the rows from ``first`` to ``stop`` into units of at most ``size`` rows."""
    return [Unit(start, min(size, stop - start)) for start in range(first, stop, size)]


def grouped(units: list[Unit], size: int) -> list[list[Unit]]:
    """Group consecutive units that are read together, so that each group has about ``size`` rows."""
    groups: list[list[Unit]] = []
    room = 0
    for unit in units:
        if unit.rows > room:
            groups.append([])
            room = size
        groups[-1].append(unit)
        room -= unit.rows
    return groups


def joined(chunks: list[Batch]) -> Batch:
    """Concatenate chunks to one chunk, which starts at the first row of the first chunk."""
    if len(chunks) == 1:
        return chunks[0]
    weights = None
    if any(chunk.weights is not None for chunk in chunks):
        one = torch.ones((), dtype=torch.float64)
        weights = torch.cat([one.expand(len(c.points)) if c.weights is None else c.weights for c in chunks])
    return Batch(torch.cat([chunk.points for chunk in chunks]), weights, chunks[0].first)


def resized(chunks: Iterator[Batch], size: int) -> Iterator[Batch]:
    """Number the rows, and split or join chunks so that each has about ``size`` rows."""
    few: list[Batch] = []
    first = rows = 0
    for chunk in chunks:
        for start in range(0, len(chunk.points), size):
            part = slice(start, start + size)
            few.append(Batch(chunk.points[part], None if chunk.weights is None else chunk.weights[part]))
            rows += len(few[-1].points)
            if rows >= size:
                yield replace(joined(few), first=first)
                few, first, rows = [], first + rows, 0
    if few:
        yield replace(joined(few), first=first)
