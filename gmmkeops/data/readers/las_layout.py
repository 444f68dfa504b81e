"""Locations of the points in a LAS or LAZ file, and a check of the sizes that its header declares against the size of the file.

laspy and lazrs do not check these sizes: a damaged size can allocate gigabytes, loop for hours or crash the process. References:
ASPRS 2019, *LAS specification 1.4-R15*; Isenburg 2013, *LASzip: lossless compression of lidar data*, PE&RS 79.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gmmkeops.data.readers.base import Damage

__all__ = ["Layout", "check_las"]

# Size of the header for each minor version of LAS, bytes.
_LAS_HEADERS = {0: 227, 1: 227, 2: 227, 3: 235, 4: 375}

# Size of the fixed part of a variable-length record, bytes.
_RECORD = 54

# Size in bytes of each item that LASzip compresses (0 for any size), and number of layers of layered items.
_ITEMS = {0: 0, 6: 20, 7: 8, 8: 6, 9: 29, 10: 30, 11: 6, 12: 8, 13: 29, 14: 0}

_LAYERS = {10: 9, 11: 1, 12: 2, 13: 1}

# Value of the number of points per chunk in files whose chunks have different lengths.
_VARIABLE = 0xFFFFFFFF

# Largest chunk size, in bytes of decompressed points, for which several chunks are decompressed in parallel.
_CHUNK = 1 << 26


@dataclass(frozen=True)
class Layout:
    """Locations of the points in a LAS or LAZ file.

    Args:
        start: Position of the first point or of the first chunk of compressed points, bytes.
        parallel: Whether chunks are small enough to decompress several of them in parallel.
        laszip: The record that describes the compression; None if points are not compressed.
        chunks: Number of points and bytes of each chunk; None if all chunks have the same number of points.
    """

    start: int
    parallel: bool = True
    laszip: bytes | None = None
    chunks: tuple[tuple[int, int], ...] | None = None


def check_las(path: Path) -> Layout:
    """Check the sizes that a LAS or LAZ file declares; return the locations of its points.

    Raises:
        Damage: A size does not fit the file.
    """
    with open(path, "rb") as file:
        size = path.stat().st_size
        head = file.read(375)
        if head[:4] != b"LASF":
            raise Damage("it does not begin with the signature of LAS files")
        if len(head) < 227:
            raise Damage(f"it has {size} bytes, less than a LAS header")
        minor = head[25]
        header, start, records = struct.unpack_from("<HII", head, 94)
        least = _LAS_HEADERS.get(minor, 375)
        if header < least or len(head) < least or not header <= start <= size:
            raise Damage(f"its header has {header} bytes and its points begin at byte {start} of {size}")
        kind, length, points = struct.unpack_from("<BHI", head, 104)
        if minor >= 4:
            (points,) = struct.unpack_from("<Q", head, 247)
        laszip = _records(file, header, start, records)
        # The two highest bits of the format are set if points are compressed.
        if not kind & 0xC0:
            end = start + points * length
            if length == 0 or end > size:
                raise Damage(f"it has {size} bytes and its header declares {points} points, which end at byte {end}")
            return Layout(start)
        if laszip is None:
            raise Damage("its points are compressed, but the record of the compression is missing")
        return _check_chunks(file, laszip, start, size, points, length)


def _records(file: BinaryIO, first: int, stop: int, count: int) -> bytes | None:
    """Check the variable-length records; return the record that describes the compression, or None."""
    found, place = None, first
    if count * _RECORD > stop - first:
        raise Damage(f"it declares {count} records in {stop - first} bytes")
    for number in range(count):
        file.seek(place)
        head = file.read(_RECORD)
        if len(head) < _RECORD:
            raise Damage(f"it ends within record {number}")
        name, (code, length) = head[2:18].rstrip(b"\0"), struct.unpack_from("<HH", head, 18)
        place += _RECORD + length
        if place > stop:
            raise Damage(f"record {number} ends at byte {place}, after the first point at byte {stop}")
        if (name, code) == (b"laszip encoded", 22204):
            found = file.read(length)
    return found


def _check_chunks(file: BinaryIO, laszip: bytes, start: int, size: int, points: int, length: int) -> Layout:
    """Check the table of compressed chunks, and the sizes of the layers in each chunk."""
    if len(laszip) < 34:
        raise Damage(f"the record of its compression has {len(laszip)} bytes")
    compressor, _, _, _, _, _, chunk, _, _, count = struct.unpack_from("<HHBBHIIqqH", laszip)
    if len(laszip) < 34 + 6 * count:
        raise Damage(f"the record of its compression has {len(laszip)} bytes for {count} items")
    items = [struct.unpack_from("<HHH", laszip, 34 + 6 * i) for i in range(count)]
    if sum(bytes_ for _, bytes_, _ in items) != length or not length:
        raise Damage(f"its points have {length} bytes, but {sum(bytes_ for _, bytes_, _ in items)} when decompressed")
    if any(code not in _ITEMS or _ITEMS[code] not in (0, bytes_) for code, bytes_, _ in items) or chunk == 0:
        raise Damage("the record of its compression contains unknown items")
    file.seek(start)
    place = file.read(8)
    (table,) = struct.unpack("<q", place) if len(place) == 8 else (0,)
    if table == -1:
        # Writers that cannot seek store the position at the end of the file.
        file.seek(size - 8)
        (table,) = struct.unpack("<q", file.read(8))
    first = start + 8
    if not first <= table <= size - 8:
        raise Damage(f"the table of its chunks is at byte {table} of {size}")
    file.seek(table)
    _, chunks = struct.unpack("<II", file.read(8))
    # Each chunk begins with an uncompressed point; some writers append an empty chunk.
    if (chunks - 1) * length > table - first:
        raise Damage(f"it declares {chunks} chunks of points in {table - first} bytes")
    if chunk != _VARIABLE and chunks - -(-points // chunk) not in (0, 1):
        raise Damage(f"it declares {points} points in {chunks} chunks of {chunk}")
    try:
        import lazrs
    except ImportError:
        return Layout(first, False, laszip)
    file.seek(start)
    sizes = lazrs.read_chunk_table(file, lazrs.LazVlr(laszip))
    together = sum(bytes_ for _, bytes_ in sizes)
    if together != table - first:
        raise Damage(f"its chunks have {together} bytes in total, but {table - first} in the file")
    if any(0 < bytes_ < length or (bytes_ == 0 and number < chunks - 1) for number, (_, bytes_) in enumerate(sizes)):
        raise Damage("a chunk is shorter than a point")
    if chunk == _VARIABLE and sum(rows for rows, _ in sizes) != points:
        raise Damage(f"its chunks have {sum(rows for rows, _ in sizes)} points together, its header declares {points}")
    if compressor == 3:
        layers = sum(_LAYERS.get(code, bytes_) for code, bytes_, _ in items)
        for number, (_, bytes_) in enumerate(sizes):
            if not bytes_:
                continue
            file.seek(first + length)
            head = file.read(4 + 4 * layers)
            own = struct.unpack(f"<{layers}I", head[4:]) if len(head) == 4 + 4 * layers else (size,)
            if length + 4 + 4 * layers + sum(own) != bytes_:
                raise Damage(f"the layers of chunk {number} do not fill its {bytes_} bytes")
            first += bytes_
    if chunk == _VARIABLE:
        return Layout(start + 8, True, laszip, tuple((int(rows), int(bytes_)) for rows, bytes_ in sizes))
    return Layout(start + 8, chunk * length <= _CHUNK, laszip)
