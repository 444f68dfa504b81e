"""Reader of the vertices of PLY files.

The sizes that the header declares are first checked against the size of the file. plyfile does not check them, so that a
damaged header could allocate gigabytes. Reference: Turk 1994, *The PLY polygon file format*.
"""

from __future__ import annotations

from pathlib import Path

from gmmkeops.data.readers.arrays import Arrays
from gmmkeops.data.readers.base import Columns, Damage, Weights

__all__ = ["ply"]

# Sizes of the types of PLY properties, bytes.
_TYPES = {
    **dict.fromkeys((b"char", b"uchar", b"int8", b"uint8"), 1),
    **dict.fromkeys((b"short", b"ushort", b"int16", b"uint16"), 2),
    **dict.fromkeys((b"int", b"uint", b"int32", b"uint32", b"float", b"float32"), 4),
    **dict.fromkeys((b"double", b"float64"), 8),
}

# Largest number of bytes of a PLY header.
_HEADER = 1 << 20


def ply(path: Path, columns: Columns = None, weights: Weights = None) -> Arrays:
    """Return a reader of the vertices of a PLY file, by default of x, y and z.

    Raises:
        Damage, ValueError, OSError: The file is damaged.
        ColumnError: A column does not exist, or is not numeric.
        ImportError: plyfile is not installed.
    """
    from plyfile import PlyData

    _check_header(path)
    vertices = PlyData.read(path, mmap="r")["vertex"].data
    return Arrays(vertices, str(path), columns, weights, path=path, default=("x", "y", "z"))


def _check_header(path: Path) -> None:
    """Check that the file is large enough for the rows that its header declares.

    Raises:
        Damage: The header is not that of a PLY file, or a size does not fit the file.
    """
    size, text, needed, count, least = path.stat().st_size, False, 0, 0, 0
    with open(path, "rb") as file:
        head, end, _ = file.read(_HEADER).partition(b"end_header")
    lines = head.splitlines()
    if not lines or lines[0].split() != [b"ply"]:
        raise Damage("it does not begin with the signature of PLY files")
    if not end:
        raise Damage("its header does not end")
    for line in lines:
        words = line.split()
        if words[:1] == [b"format"]:
            text = words[1:2] == [b"ascii"]
        elif words[:1] == [b"element"]:
            needed, least = needed + count * least, 0
            if len(words) != 3 or not words[2].isdigit() or len(words[2]) > 18:
                raise Damage(f"its header says {line[:60].decode('ascii', 'backslashreplace')!r}")
            count = int(words[2])
        elif words[:1] == [b"property"]:
            # A list takes at least the bytes of its length; in text files a number takes at least two characters.
            kind = words[2 if words[1:2] == [b"list"] else 1 :][:1]
            if not kind or kind[0] not in _TYPES:
                raise Damage(f"its header says {line[:60].decode('ascii', 'backslashreplace')!r}")
            least += 2 if text else _TYPES[kind[0]]
    needed += len(head) + len(end) + 1 + count * least
    # In a text file, the last number needs no separator.
    if needed > size + text:
        raise Damage(f"it has {size} bytes and its header declares at least {needed}")
