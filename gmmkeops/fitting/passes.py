"""Passes over the data of a fit, with error bounds, progress and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeVar

import torch

from gmmkeops.components import Moments
from gmmkeops.data import Batch, World
from gmmkeops.fitting.data import Data, Stream
from gmmkeops.fitting.journal import Journal, SweepStatistics

__all__ = ["Passes"]

S = TypeVar("S")


@dataclass
class Passes:
    """The passes of a fit over its data, on all ranks.

    Args:
        world: The ranks.
        journal: State that is written to checkpoints.
        generator: Random number generator, in the same state on all ranks.
        show: Function that is called with the number of rows read in a pass over a source, or None.
        statistics: Error bounds and counts of the last pass over all points.
    """

    world: World
    journal: Journal
    generator: torch.Generator
    show: Callable[[int], None] | None = None
    statistics: SweepStatistics = field(default_factory=SweepStatistics)

    def seed(self) -> int:
        """Draw a seed, which is equal on all ranks."""
        return int(torch.randint(1 << 62, (1,), generator=self.generator, device=self.generator.device))

    def total(
        self, data: Data, nothing: Callable[[], Moments], sums_of: Callable[[Batch], tuple[Any, bool, Moments]]
    ) -> Moments:
        """Sum the moments of all points over all ranks, in one pass that checkpoints save and resume.

        Args:
            data: The points of this rank in standardized coordinates.
            nothing: Function that returns the moments of no points.
            sums_of: Function of a batch that returns its points as they were evaluated, whether float32 points were evaluated in
                float64, and their moments.
        """
        if self.journal.replay:
            return self.journal.replay.pop(0)
        sums, statistics, behind = self.journal.resumed()
        for number, batch in enumerate(data.batches(behind), behind + 1):
            if not len(batch):
                continue
            self.world.look()
            points, wide, part = sums_of(batch)
            statistics.wide = max(statistics.wide, float(wide))
            statistics.add(points, len(part.S0))
            sums = part if sums is None else sums + part
            if isinstance(data, Stream):
                self.journal.tick(sums, statistics, number)
                if self.show is not None:
                    self.show(batch.first + len(batch))
        sums = self.world.added(nothing() if sums is None else sums)
        vars(self.statistics).update(vars(statistics))
        self.journal.swept(sums)
        return sums

    def seen(self, batch: Batch, components: int) -> None:
        """Store the counts of a pass that evaluated every pair of a point in memory and a component."""
        statistics = SweepStatistics()
        statistics.add(batch.points, components)
        vars(self.statistics).update(vars(statistics))

    def fold(
        self,
        data: Data,
        size: int,
        state: S,
        update: Callable[[S, list[Batch]], S],
        pack: Callable[[S], Any] = lambda state: state,
        unpack: Callable[[Any], S] = lambda packed: packed,
    ) -> S:
        """Update a state by each batch of one shuffled pass. Checkpoints are written between batches.

        Every rank performs the same number of updates; a rank without remaining points performs them with empty lists.

        Args:
            data: The points of this rank in standardized coordinates.
            size: Number of points in a batch, summed over all ranks.
            state: State before the first batch.
            update: Function of the state and of a list with at most one batch of this rank; it returns the next state.
            pack, unpack: Convert the state to a value that a checkpoint can store, and back.
        """
        batches = data.minibatches(-(-size // self.world.size), self.seed() + self.world.rank)
        inside, self.journal.inside = self.journal.inside, None
        behind = 0 if inside is None else inside["batches"]
        if inside is not None:
            state = unpack(inside["memo"])
        for number in count(1):
            batch = next(batches, None)
            more, due = self.world.any(batch is not None, self.world.rank == 0 and self.journal.due)
            if not more:
                break
            if number <= behind:
                if number == behind and inside is not None:
                    self.generator.set_state(inside["generator"].cpu())
                continue
            state = update(state, [] if batch is None else [batch])
            if due:
                memo = {"batches": number, "memo": pack(state), "generator": self.generator.get_state()}
                self.journal.write(memo)
        return state
