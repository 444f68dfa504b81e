"""Row count, total weight and checksums of one pass over the data, compared with those of the first pass."""

from __future__ import annotations

import torch

from gmmkeops.data.chunks import Chunk
from gmmkeops.data.survey import Survey

__all__ = ["Tally"]

# Largest difference between sums of the same numbers in another order, as a fraction of the sum of their absolute values.
_ROUNDING = 1e-11

# Numbers that are summed at a time.
_SUMMED = 1 << 16


class Tally:
    """Number of rows, total weight, sum of all coordinates and sum of their absolute values, added up chunk by chunk."""

    def __init__(self) -> None:
        self.rows, self.mass, self.total, self.magnitude = 0, 0.0, 0.0, 0.0

    def add(self, chunk: Chunk) -> None:
        """Add the rows of a chunk."""
        self.rows += len(chunk.points)
        self.mass += chunk.mass
        for part in chunk.points.split(max(1, _SUMMED // chunk.points.shape[1])):
            self.total += float(part.sum(dtype=torch.float64))
            self.magnitude += float(part.abs().sum(dtype=torch.float64))

    def compare(self, survey: Survey, name: str) -> None:
        """Raise a ValueError if the rows differ from those of the first pass over the data ``name``."""
        if self.rows != survey.rows:
            raise ValueError(
                f"{name} gave {self.rows} rows on this pass and {survey.rows} on the first; "
                "it must give the same points each time."
            )
        if abs(self.total - survey.total[0]) > _ROUNDING * max(survey.total[1], self.magnitude):
            raise ValueError(
                f"{name} gave other numbers on this pass (their sum is {self.total!r}) than on the first "
                f"({survey.total[0]!r}); it must give the same points each time."
            )
