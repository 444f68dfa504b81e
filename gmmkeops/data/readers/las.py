"""Reader of LAS and LAZ laser scans."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from gmmkeops.data.batch import Batch
from gmmkeops.data.chunks import Unit, cut
from gmmkeops.data.readers.base import Columns, Damage, Reader, Weights
from gmmkeops.data.readers.las_layout import check_las

__all__ = ["Las"]

# Names of the coordinates, which are read by default.
_XYZ = ("x", "y", "z")


class Las(Reader):
    """Reader of a LAS or LAZ file; coordinates are float64 with scales and offsets applied."""

    def __init__(
        self, path: Path, columns: Columns = None, weights: Weights = None, classes: Sequence[int] | None = None
    ) -> None:
        import laspy

        self.name, self.paths = str(path), (path,)
        layout = check_las(path)
        # Very large chunks are decompressed point by point, to limit the memory.
        backend = None if layout.parallel else (laspy.LazBackend.Lazrs, laspy.LazBackend.Laszip)
        self._open = partial(laspy.open, read_evlrs=False, laz_backend=backend)
        try:
            with self._open(path) as file:
                header = file.header
        except laspy.LaspyException as error:
            if "LazBackend" in str(error):
                raise ImportError(name="lazrs") from None
            raise
        self.rows = int(header.point_count)
        self.layout, self.header = layout, header
        # First row and byte offset of each chunk, if chunks have different numbers of points.
        self.starts = [(0, layout.start)]
        for rows, size in layout.chunks or ():
            first, place = self.starts[-1]
            self.starts.append((first + rows, place + size))
        names = [*_XYZ, *header.point_format.dimension_names]
        self.choose(names, columns, weights, default=_XYZ)
        self.grain = 50_000 if header.are_points_compressed else 1
        self.stored = int(header.point_format.size)
        self.classes = None if classes is None else np.asarray(list(classes))

    def units(self, size: int) -> list[Unit]:
        if self.layout.chunks is None:
            return super().units(size)
        # Only very large chunks are split, since other chunks can only be decompressed as a whole.
        found: list[Unit] = []
        for (first, _), (stop, _) in pairwise(self.starts):
            if found and stop - found[-1].first <= size:
                found[-1] = Unit(found[-1].first, stop - found[-1].first)
            elif stop > first:
                found += cut(first, stop, stop - first if stop - first <= 2 * size else size)
        return found

    def _points(self, unit: Unit) -> Any:
        """Read the points of a unit as a laspy record."""
        if self.layout.chunks is None:
            with self._open(self.paths[0]) as file:
                file.seek(unit.first)
                return file.read_points(unit.rows)
        # lazrs (0.8.2) seeks to wrong points if chunks have different lengths, so the position is computed here.
        import lazrs
        from laspy.point.record import PackedPointRecord, ScaleAwarePointRecord

        begin = bisect_right(self.starts, unit.first, key=lambda start: start[0]) - 1
        end = bisect_left(self.starts, unit.first + unit.rows, key=lambda start: start[0])
        (first, place), (last, stop) = self.starts[begin], self.starts[end]
        with open(self.paths[0], "rb") as raw:
            raw.seek(place)
            data = raw.read(stop - place)
        out = np.zeros((last - first) * self.header.point_format.size, np.uint8)
        lazrs.decompress_points_with_chunk_table(data, self.layout.laszip, out, list(self.layout.chunks[begin:end]))
        array = PackedPointRecord.from_buffer(out, self.header.point_format).array
        array = array[unit.first - first :][: unit.rows]
        return ScaleAwarePointRecord(array, self.header.point_format, self.header.scales, self.header.offsets)

    def load(self, unit: Unit) -> Batch:
        try:
            found = self._points(unit)
        except BaseException as error:
            # The decompressor raises a PanicException, which is not an Exception, for damaged data.
            if type(error).__name__ == "PanicException":
                raise Damage("its compressed points are damaged") from None
            raise
        if len(found) != unit.rows:
            raise Damage(f"it ends after {unit.first + len(found)} of the {self.rows} points that its header declares")
        if self.classes is not None:
            found = found[np.isin(np.asarray(found["classification"]), self.classes)]
        # The attributes of the record apply scales and offsets.
        return self.assembled(lambda name: np.asarray(getattr(found, name) if name in _XYZ else found[name]))
