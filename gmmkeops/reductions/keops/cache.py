"""Cache folders for compiled KeOps formulas, and the detection of damaged files.

A process that is killed during compilation, a full disk or an interrupted copy leaves incomplete files, which KeOps does not
detect: loading an incomplete shared object ends the process with a bus error. Damaged files are renamed (never deleted), so that
KeOps compiles them again. Only this package writes into these folders. If ``KEOPS_CACHE_FOLDER`` is set, they are inside it.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import os
import pickletools
import secrets
import shlex
import struct
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["cache_folder", "compiler_failure", "refusing_damage", "renewed_folder"]

# Keys of the lines of a formula's information file.
_INFORMATION = ["red_formula", "dim", "tagI", "dimy"]

# Maximum number of folders for the same flags, for machines on which no formula can be loaded.
_MOST = 8


def _folders(flags: str) -> list[Path]:
    """List the cache folders for compiler flags and the compiler ``CXX``, in the order in which they are used."""
    compiler = os.environ.get("CXX")
    used = f"{compiler} {flags}" if compiler else flags
    name = f"keops-{hashlib.sha256(used.encode()).hexdigest()[:8]}"
    given = os.environ.get("KEOPS_CACHE_FOLDER")
    if given:
        first = Path(given).absolute() / f"gmmkeops-{name}"
    else:
        first = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gmmkeops" / name
    return [first, *(first.with_name(f"{first.name}-{number}") for number in range(1, _MOST))]


def cache_folder(flags: str) -> Path:
    """Return the cache folder for given compiler flags: the last one that exists, or the first one."""
    folders = _folders(flags)
    return next((folder for folder in reversed(folders) if folder.exists()), folders[0])


def renewed_folder(folder: Path, flags: str) -> Path | None:
    """Repair or replace a cache folder whose formulas cannot be loaded.

    Args:
        folder: A folder that this function or :func:`cache_folder` has returned.
        flags: Compiler flags.

    Returns:
        The same folder if it had damaged files, which are renamed; otherwise the next one. None if there is no other folder, or
        if the folder contains no compiled formulas.
    """
    if not any(path.suffix in (".so", ".pkl") for path in folder.rglob("*")):
        return None
    if _set_damage_aside(folder):
        return folder
    newest = cache_folder(flags)
    if newest != folder:
        return newest
    following = dict(pairwise(_folders(flags))).get(folder)
    try:
        if following is not None:
            following.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return following


def _is_cut_short(path: Path) -> bool:
    """Return whether a shared object is shorter than its headers declare (64-bit ELF files; others are not checked)."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(64)
        if head[:5] != b"\x7fELF\x02"[: len(head)]:
            return False
        if len(head) < 64:
            return True
        order = "<" if head[5] == 1 else ">"
        segments, sections = struct.unpack_from(f"{order}2Q", head, 32)
        width, count, section_width, section_count = struct.unpack_from(f"{order}4H", head, 54)
        file.seek(min(segments, size))
        table = file.read(width * count)
    ends = [segments + width * count, sections + section_width * section_count]
    for at in range(0, len(table) - 39, max(1, width)):
        start, length = (struct.unpack_from(f"{order}Q", table, at + field)[0] for field in (8, 32))
        ends.append(start + length)
    return max(ends) > size


def _set_damage_aside(folder: Path) -> bool:
    """Rename damaged files in a cache folder and the lists of formulas; return whether there were damaged files."""
    damaged = [path for path in folder.rglob("*") if path.suffix in (".so", ".nfo", ".pkl") and _is_damaged(path)]
    sources = [path.with_suffix(".cpp") for path in damaged if path.suffix == ".nfo"]
    lists = list(folder.rglob("*.pkl")) if damaged else []
    for path in {*damaged, *sources, *lists}:
        # Another process may have renamed the file at the same time.
        with suppress(OSError):
            os.replace(path, path.with_name(f"{path.name}.damaged-{secrets.token_hex(4)}"))
    return bool(damaged)


def _is_damaged(path: Path) -> bool:
    try:
        if path.suffix == ".so":
            with open(path, "rb") as file:
                alien = sys.platform == "linux" and file.read(4) != b"\x7fELF"
            return alien or _is_cut_short(path)
        if path.suffix == ".nfo":
            return [line.partition("=")[0] for line in path.read_text().splitlines()] != _INFORMATION
        with open(path, "rb") as file:
            # An incomplete pickle lacks its last operation.
            deque(pickletools.genops(file), 0)
    except OSError:
        return False
    except ValueError:
        return True
    return False


class _Finder:
    """Module finder that raises an ImportError for incomplete compiled formulas, and finds no modules itself."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        if not name.startswith("pykeops_"):
            return
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.origin and _is_cut_short(Path(spec.origin)):
            raise ImportError(f"{spec.origin} is incomplete")


@contextmanager
def refusing_damage() -> Iterator[None]:
    """Raise an ImportError within this context if an incomplete compiled formula is loaded."""
    finder: Any = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def compiler_failure(compiler: str | None, flags: str) -> str | None:
    """Return the reason, one clause, why a C++ compiler cannot build an empty shared object; None if it can."""
    if compiler is None:
        return "no C++ compiler was found (install g++)"
    with tempfile.TemporaryDirectory() as folder:
        command = [*shlex.split(compiler), *shlex.split(flags), "-x", "c++", "-", "-o", str(Path(folder) / "empty.so")]
        try:
            done = subprocess.run(command, input=b"int empty() { return 0; }\n", capture_output=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return f"the C++ compiler {compiler} cannot be run (install g++, or set CXX to a working compiler)"
        if done.returncode == 0 and (Path(folder) / "empty.so").exists():
            return None
    flagged = f" with the flags {os.environ['CXXFLAGS']}" if os.environ.get("CXXFLAGS") else ""
    return (
        f"the C++ compiler {compiler} fails{flagged} with exit status {done.returncode} (install g++, or set CXX to a working "
        "compiler)"
    )
