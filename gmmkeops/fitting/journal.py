"""State of a fit within an iteration and within a pass, for checkpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gmmkeops._checks import warn
from gmmkeops.components import Moments
from gmmkeops.data import World
from gmmkeops.fitting.checkpoint import Checkpoint
from gmmkeops.fitting.state_file import state_bytes, state_of
from gmmkeops.models import write_whole
from gmmkeops.reductions import Truncation

__all__ = ["Journal", "SweepStatistics"]

_logger = logging.getLogger("gmmkeops")


@dataclass
class SweepStatistics:
    """Error bounds and counts of the truncation in the last pass over all points.

    Args:
        epsilon: Largest ε of the pass.
        certificate: Upper bound on the truncation error of the log-density of each point, nats.
        pairs, evaluated: Number of point-component pairs, and number of evaluated pairs.
        wide: 1 if some points were computed in float64 because float32 was not accurate enough, else 0.
    """

    epsilon: float = 0.0
    certificate: float = 0.0
    pairs: float = 0.0
    evaluated: float = 0.0
    wide: float = 0.0

    def add(self, x: Tensor | Truncation, components: int) -> None:
        """Add the counts and error bounds of a reduction over points or their kd-tree."""
        pairs = float(len(x) * components)
        self.pairs += pairs
        if isinstance(x, Tensor):
            self.evaluated += pairs
            return
        self.evaluated += x.share * pairs
        self.epsilon = max(self.epsilon, x.epsilon)
        self.certificate = max(self.certificate, x.certificate)

    @property
    def numbers(self) -> list[float]:
        """List of all fields."""
        return [self.epsilon, self.certificate, self.pairs, self.evaluated, self.wide]

    def of_all(self, world: World) -> SweepStatistics:
        """Combine the statistics of all ranks."""
        said = world.tell(self.numbers)
        epsilon, certificate, pairs, evaluated, wide = zip(*said, strict=True)
        return SweepStatistics(max(epsilon), max(certificate), sum(pairs), sum(evaluated), max(wide))


class Journal:
    """State of a fit that is written to its checkpoint. Without a checkpoint, all methods do nothing.

    Args:
        checkpoint: The checkpoint, or None.
        world: The ranks; rank 0 writes the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint | None, world: World) -> None:
        self.checkpoint, self.world = checkpoint, world
        self.last = time.monotonic()
        # Description of the order of the rows and of the chunk size. Partial sums are valid for these only.
        self.layout = ""
        # Hash of the points and weights.
        self.fingerprint: int | None = None
        # State at the beginning of the current iteration, and the results of its finished passes.
        self.snapshot: Any = None
        self.written = False
        self.iteration = 0
        self.finished: list[Moments] = []
        # Results from a checkpoint that have not been used yet.
        self.replay: list[Moments] = []
        self.partial: Any = None
        self.inside: Any = None
        # Error numbers of failed writes; a warning is issued once per error number.
        self.causes: set[int | None] = set()

    @property
    def due(self) -> bool:
        """Whether the time since the last write exceeds ``Checkpoint.every``."""
        return self.checkpoint is not None and time.monotonic() - self.last >= self.checkpoint.every

    def begin(self, iteration: int, snapshot: Callable[[], Any]) -> None:
        """Store the state at the beginning of an iteration; ``snapshot`` returns it."""
        if self.checkpoint is not None:
            self.iteration, self.snapshot, self.written = iteration, snapshot(), False
            self.finished = list(self.replay)

    def write(self, inside: Any = None) -> None:
        """Write the state at the beginning of the iteration, its finished passes, and the state within a pass."""
        checkpoint = self.checkpoint
        if checkpoint is None or self.snapshot is None:
            return
        if self.world.rank == 0:
            # A state within a pass that was read from a checkpoint remains valid until it is used.
            inside = self.inside if inside is None else inside
            tree = {**self.snapshot, "finished": self.finished, "inside": inside, "ranks": self.world.size}
            tree["layout"] = self.layout
            self.written = self._tried(Path(checkpoint.path), lambda: checkpoint.write(tree))
        else:
            self.written = True
        self.last = time.monotonic()

    def _tried(self, path: Path, write: Callable[[], None]) -> bool:
        """Try to write, and return whether that succeeded. A failure causes a warning, once per error number."""
        try:
            write()
        except OSError as error:
            if error.errno not in self.causes:
                self.causes.add(error.errno)
                warn(
                    f"the checkpoint {path} could not be written ({error.strerror or error}); the fit continues, and tries again "
                    "at the next checkpoint.",
                    UserWarning,
                )
            return False
        return True

    def agreed(self, tree: Any, device: Any) -> Any:
        """Return the value of rank 0 on all ranks."""
        return tree if self.world.size == 1 else state_of(self.world.gather_bytes(state_bytes(tree))[0], device)

    def recall(self, saved: Any, device: Any) -> None:
        """Restore finished passes, and the state within a pass if the ranks and the order of the rows are the same."""
        if self.checkpoint is None:
            return
        self.iteration, self.replay = saved["iteration"], list(saved["finished"])
        if saved["ranks"] != self.world.size or saved["layout"] != self.layout:
            return
        self.inside = saved["inside"]
        path = self.checkpoint.part(self.world.rank)
        if path.exists():
            try:
                part = state_of(path.read_bytes(), device)
            except (ValueError, OSError) as error:
                _logger.warning("the checkpoint %s is damaged (%s); repeating the current pass", path, error)
                return
            if part["place"] == [self.iteration, len(self.replay), self.world.size, saved["mark"], self.layout]:
                self.partial = part

    def swept(self, sums: Moments) -> None:
        """Store the result of a finished pass of this iteration."""
        if self.checkpoint is not None:
            self.finished.append(sums)
            self.written = False

    def resumed(self) -> tuple[Moments | None, SweepStatistics, int]:
        """Return the partial sums, statistics and number of batches from which this pass resumes."""
        part, self.partial = self.partial, None
        if part is None:
            return None, SweepStatistics(), 0
        return part["sums"], SweepStatistics(*part["statistics"]), part["batches"]

    def tick(self, sums: Moments, statistics: SweepStatistics, batches: int) -> None:
        """Write the partial sums of a pass over a source if a write is due."""
        if not self.due or self.checkpoint is None or self.snapshot is None:
            return
        if not self.written:
            self.write()
        place = [self.iteration, len(self.finished), self.world.size, self.snapshot["mark"], self.layout]
        tree = {"place": place, "sums": sums, "statistics": statistics.numbers, "batches": batches}
        path = self.checkpoint.part(self.world.rank)
        self._tried(path, lambda: write_whole(path, state_bytes(tree)))
        self.last = time.monotonic()
