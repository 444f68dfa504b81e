"""Readers of files by their suffixes, and of several files as one."""

from __future__ import annotations

import os
import warnings
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gmmkeops.data.columns import listed, named_alike
from gmmkeops.data.readers.arrays import Arrays, _Rows
from gmmkeops.data.readers.base import Chunk, ColumnError, Columns, Reader, Unit, reason
from gmmkeops.data.readers.declared import Damage, check_ply
from gmmkeops.data.readers.las import Las, _no_decompressor
from gmmkeops.data.readers.parquet import Parquet

__all__ = ["SUFFIXES", "Files", "open_file"]


class Files(Reader):
    """Reader of several files or arrays, one after the other."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        first = readers[0]
        self.readers = [first]
        for reader in readers[1:]:
            if (reader.names is None) is not (first.names is None):
                with_names, without = (reader, first) if first.names is None else (first, reader)
                raise ValueError(
                    f"the columns of {with_names.name} have names ({listed(with_names.columns)}) and those of "
                    f"{without.name} have none, so they cannot be matched; read these files one by one."
                )
            if reader.features != first.features and reader.names is None:
                raise ValueError(
                    f"{reader.name} has {reader.features} columns but {first.name} has {first.features}; "
                    "select the same ones with columns=."
                )
            if first.names is not None and reader.names is not None and reader.names != first.names:
                named_alike(reader.names, first.names, reader.name, first.name)
                reader = reader.chosen(first.names)
            self.readers.append(reader)
        self.columns, self.known = first.columns, first.known
        self.name = f"{len(readers)} files from {first.name}"
        self.features = first.features
        self.starts = np.concatenate([[0], np.cumsum([reader.rows or 0 for reader in readers])]).tolist()
        self.rows = self.starts[-1]
        self.grain, self.stored = max(reader.grain for reader in readers), max(reader.stored for reader in readers)
        self.paths = tuple(path for reader in readers for path in reader.paths)

    def chosen(self, columns: Sequence[str]) -> Reader:
        if self.known is None:
            return super().chosen(columns)
        return Files([reader.chosen(columns) for reader in self.readers])

    def units(self, size: int) -> list[Unit]:
        return [
            Unit(start + unit.first, unit.rows)
            for start, reader in zip(self.starts, self.readers, strict=False)
            for unit in reader.units(size)
        ]

    def path(self, unit: Unit) -> int:
        return bisect_right(self.starts, unit.first) - 1

    def load(self, unit: Unit) -> Chunk:
        which = self.path(unit)
        reader = self.readers[which]
        try:
            return reader.load(Unit(unit.first - self.starts[which], unit.rows))
        except ColumnError:
            raise
        except Exception as error:
            raise Damage(f"{reader.name}: {reason(error) or 'it is damaged'}") from error


def _npy(path: Path, columns: Columns, classes: Any, weights: Any) -> Reader:
    with open(path, "rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise Damage("it does not begin as .npy files do")
    with warnings.catch_warnings():
        # Parsing a damaged header may cause warnings of Python.
        warnings.simplefilter("ignore")
        whole = np.load(path, mmap_mode="r", allow_pickle=False)
    if whole.dtype.itemsize == 0:
        raise Damage("its rows have no bytes")
    if whole.dtype.names is None and whole.dtype.kind not in "fiub":
        raise ColumnError(f"{path} must be numeric, got dtype {whole.dtype}; convert its columns to numbers first.")
    if not whole.flags.c_contiguous or whole.ndim != 2:
        return Arrays(whole, str(path), columns, weights, path)
    # A placeholder for the file, whose address space does not grow with the file.
    stand_in = np.broadcast_to(np.zeros((), whole.dtype), whole.shape)
    return Arrays(stand_in, str(path), columns, weights, path, _Rows(path, whole.dtype, whole.shape[1], whole.offset))


def _parquet(path: Path, columns: Columns, classes: Any, weights: Any) -> Reader:
    return Parquet(path, columns, weights)


def _las(path: Path, columns: Columns, classes: Any, weights: Any) -> Reader:
    return Las(path, columns, classes, weights)


def _ply(path: Path, columns: Columns, classes: Any, weights: Any) -> Reader:
    from plyfile import PlyData

    check_ply(path)
    data = PlyData.read(path, mmap="r")["vertex"].data
    reader = Arrays(data, str(path), ("x", "y", "z") if columns is None else columns, weights, path)
    reader.known = data.dtype.names if columns is None else reader.known
    return reader


# For each suffix, the function that opens a file, and the extra of this package that installs its library.
SUFFIXES: dict[str, tuple[Callable[[Path, Columns, Any, Any], Reader], str]] = {
    ".npy": (_npy, ""),
    ".parquet": (_parquet, "parquet"),
    ".pq": (_parquet, "parquet"),
    ".las": (_las, "las"),
    ".laz": (_las, "las"),
    ".ply": (_ply, "ply"),
}


def open_file(
    path: str | os.PathLike[str], columns: Columns, classes: Sequence[int] | None, weights: str | int | None
) -> Reader:
    """Open one file with the reader for its suffix.

    Raises:
        FileNotFoundError, ImportError, ValueError: The file does not exist, its library is not installed, or it cannot be read.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{path} has a suffix that is none of {', '.join(SUFFIXES)}; read it yourself and pass an array or a function."
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    if classes is not None and suffix not in (".las", ".laz"):
        raise ValueError(f"classes choose points of LAS and LAZ files, and {path} is neither; leave them out.")
    make, extra = SUFFIXES[suffix]
    try:
        return make(path, columns, classes, weights)
    except ImportError as error:
        raise ImportError(
            f'reading {path} needs {error.name}; type: pip install "gmmkeops[{extra}]"', name=error.name
        ) from None
    except ColumnError:
        raise
    except Exception as error:
        if _no_decompressor(error):
            raise ImportError(f'reading {path} needs lazrs; type: pip install "gmmkeops[las]"') from None
        why = reason(error)
        raise ValueError(
            f"{path} cannot be read as {suffix[1:]}{f' ({why})' if why else ''}; it may be cut short, damaged or of another kind."
        ) from error
