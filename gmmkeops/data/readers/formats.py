"""Selection of the reader for each kind of data, and the table of file formats by suffix.

A new file format needs a reader in a module of its own, and an entry in :data:`SUFFIXES`.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gmmkeops.data.columns import table_names
from gmmkeops.data.readers.arrays import Arrays, Table
from gmmkeops.data.readers.base import ColumnError, Columns, Reader, Weights, reason
from gmmkeops.data.readers.files import Files
from gmmkeops.data.readers.las import Las
from gmmkeops.data.readers.npy import npy
from gmmkeops.data.readers.parquet import Parquet
from gmmkeops.data.readers.ply import ply
from gmmkeops.data.readers.streams import Streams

__all__ = ["SUFFIXES", "external", "open_file", "reader_of"]

# For each suffix: the reader (called with a path, columns and column of weights), and the extra that installs its library.
SUFFIXES: dict[str, tuple[Callable[..., Reader], str]] = {
    ".npy": (npy, ""),
    ".parquet": (Parquet, "parquet"),
    ".pq": (Parquet, "parquet"),
    ".las": (Las, "las"),
    ".laz": (Las, "las"),
    ".ply": (ply, "ply"),
}


def external(x: Any) -> bool:
    """Return whether data are read chunk by chunk, rather than passed as numbers in memory.

    Raises:
        TypeError: The data can be read only once (an iterator).
    """
    if isinstance(x, Iterator):
        raise TypeError(
            f"x is a {type(x).__name__}, which can be read only once, but a fit reads the data several times; "
            "pass a function that returns a new iterator at each call."
        )
    if isinstance(x, (str, os.PathLike, np.memmap, torch.utils.data.DataLoader)):
        return True
    if isinstance(x, (list, tuple)):
        return len(x) > 0 and all(isinstance(item, (str, os.PathLike)) for item in x)
    return callable(x) and not hasattr(x, "__array__")


def reader_of(x: Any, columns: Columns = None, weights: Weights = None, classes: Any = None) -> Reader | Streams:
    """Return the reader of data in memory, files, a loader or a function.

    Raises:
        TypeError, ImportError, OSError, ValueError: As for :meth:`gmmkeops.Source.of`.
    """
    if not external(x):
        return Arrays(x, "x", columns, weights) if table_names(x) is None else Table(x, "x", columns, weights)
    if isinstance(x, np.memmap):
        return Arrays(x, f"the memory map of {x.filename}", columns, weights)
    if isinstance(x, torch.utils.data.DataLoader):
        return Streams(_Again(x), "the DataLoader", fields=True)
    if callable(x):
        return Streams(x, f"the function {getattr(x, '__name__', type(x).__name__)}")
    files = [path for item in (x if isinstance(x, (list, tuple)) else [x]) for path in _paths(item)]
    readers = [open_file(path, columns, weights, classes) for path in files]
    return readers[0] if len(readers) == 1 else Files(readers)


@dataclass(frozen=True)
class _Again:
    """Callable that returns the same iterable at each call.

    Args:
        iterable: An iterable that can be iterated over repeatedly.
    """

    iterable: Any

    def __call__(self) -> Any:
        return self.iterable


def _paths(item: str | os.PathLike[str]) -> list[Path]:
    """Return the sorted files of a path, a folder or a glob pattern."""
    path = Path(item)
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not found:
            raise FileNotFoundError(f"the folder {path} contains no files with the suffixes {', '.join(SUFFIXES)}.")
        return found
    if not path.exists() and any(sign in str(item) for sign in "*?["):
        names = sorted(glob.glob(str(item), recursive=True))
        if not names:
            raise FileNotFoundError(f"no file matches {item}.")
        return [Path(name) for name in names]
    return [path]


def open_file(path: Path, columns: Columns = None, weights: Weights = None, classes: Any = None) -> Reader:
    """Open one file with the reader for its suffix.

    Raises:
        FileNotFoundError, ImportError, ValueError: The file does not exist, its library is not installed, or it cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{path} must have one of the suffixes {', '.join(SUFFIXES)}; load the file and pass an array or a function."
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; check the path.")
    if classes is not None and suffix not in (".las", ".laz"):
        raise ValueError(f"classes= is only supported for LAS and LAZ files, got {path}; omit classes.")
    reader, extra = SUFFIXES[suffix]
    try:
        return reader(path, columns, weights, **({} if classes is None else {"classes": classes}))
    except ImportError as error:
        raise ImportError(
            f'reading {path} requires {error.name}; run: pip install "gmmkeops[{extra}]"', name=error.name
        ) from None
    except ColumnError:
        raise
    except Exception as error:
        why = reason(error)
        raise ValueError(
            f"{path} cannot be read as {suffix[1:]}{f' ({why})' if why else ''}; it may be truncated, damaged or another format."
        ) from error
