"""Damaged files: each is one sentence that names the file; none ends the process, takes its memory, or is read for ever."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gmmkeops as gk

LAZ = {"old.laz": (3, "1.2"), "new.laz": (7, "1.4"), "all.laz": (10, "1.4")}

# Reads each file that it is given, in less memory than a damaged size may ask for; one line about each.
READ = """
import resource, sys, warnings
import gmmkeops as gk, torch, laspy, lazrs, plyfile, pyarrow.parquet
gk.EM
torch.set_num_threads(1)
warnings.simplefilter("error")
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
for path in sys.stdin.read().split():
    print(path, flush=True)
    try:
        gk.load(path) if path.endswith(".safetensors") else gk.Source.of(path).survey()
        print("read", flush=True)
    except ValueError as error:
        text = str(error)
        print("refused" if path in text and len(text.splitlines()) == 1 else repr(error), flush=True)
    except BaseException as error:
        print(repr(error), flush=True)
"""


def read(paths, timeout=300):
    """What a process says about each of the files, and where it ended."""
    environment = {**os.environ, "PYTHONPATH": str(Path(gk.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READ],
        input="\n".join(map(str, paths)),
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (lines[-1:], done.stderr[-500:])
    return dict(zip(lines[::2], lines[1::2], strict=True))


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """A small file of every format."""
    laspy, plyfile = pytest.importorskip("laspy"), pytest.importorskip("plyfile")
    pytest.importorskip("lazrs")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path_factory.mktemp("valid")
    x = np.random.default_rng(0).normal(size=(300, 3)).round(3)
    np.save(folder / "c.npy", x)
    np.save(folder / "fortran.npy", np.asfortranarray(x.astype(np.float32)))
    for name, compression in (("zstd.parquet", "zstd"), ("plain.parquet", "none")):
        table = pa.table({name: x[:, d].round(1) for d, name in enumerate("xyz")})
        pq.write_table(table, folder / name, row_group_size=130, compression=compression)
    for name, (point_format, version) in {"old.las": (3, "1.2"), "new.las": (7, "1.4"), **LAZ}.items():
        header = laspy.LasHeader(point_format=point_format, version=version)
        header.scales = np.full(3, 0.001)
        if name == "new.laz":
            header.add_extra_dim(laspy.ExtraBytesParams("quality", "f4"))
        scan = laspy.LasData(header)
        scan.x, scan.y, scan.z = x.T
        scan.write(str(folder / name))
    vertices, faces = np.empty(300, [(name, "f4") for name in "xyz"]), np.ones(40, [("vertex_indices", "i4", (3,))])
    for d, name in enumerate("xyz"):
        vertices[name] = x[:, d]
    elements = [plyfile.PlyElement.describe(vertices, "vertex"), plyfile.PlyElement.describe(faces, "face")]
    plyfile.PlyData(elements).write(str(folder / "binary.ply"))
    plyfile.PlyData(elements[::-1]).write(str(folder / "faces.ply"))
    plyfile.PlyData(elements[:1], text=True).write(str(folder / "text.ply"))
    gk.save(gk.initialize(x, 2).named(["x", "y", "z"]), folder / "m.safetensors")
    return folder


def damaged(data, generator):
    """Some bytes cut off, changed, repeated, lost or added; mostly where sizes are declared."""
    data, size = bytearray(data), len(data)
    edges = [
        generator.randrange(min(size, 420)),
        size - 1 - generator.randrange(min(size, 500)),
        generator.randrange(size),
    ]
    place = generator.choices(edges, [6, 2, 2])[0]
    kind, width = generator.randrange(6), generator.choice([1, 2, 4, 8])
    if kind == 0:
        del data[place:]
    elif kind == 1:
        data[place : place + width] = generator.choice([b"\xff", b"\x7f", b"\x80", b"\0"]) * width
    elif kind == 2:
        data[place] = generator.randrange(256)
    elif kind == 3:
        other = generator.randrange(size)
        data[place : place + width] = data[other : other + width]
    elif kind == 4:
        del data[place : place + width]
    else:
        data[place:place] = generator.randbytes(width)
    return bytes(data)


def scatter(valid, folder, count, seed):
    generator = random.Random(seed)
    paths = []
    for original in sorted(valid.iterdir()):
        data = original.read_bytes()
        for number in range(count):
            paths.append(folder / f"{number}-{original.name}")
            paths[-1].write_bytes(damaged(data, generator))
    return paths


def check(paths):
    said = read(paths)
    assert set(said) == set(map(str, paths))
    wrong = {path: text for path, text in said.items() if text not in ("read", "refused")}
    assert not wrong, wrong
    assert "refused" in said.values()


def test_damaged_files_are_refused_in_one_sentence(valid, tmp_path):
    assert set(read(valid.iterdir()).values()) == {"read"}
    check(scatter(valid, tmp_path, 12, seed=0))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_damaged_files(valid, tmp_path, seed):
    check(scatter(valid, tmp_path, 200, seed))


def laszip(data):
    """Where the record that describes the compression begins, and the bytes of the first point and of the chunk table."""
    (start,) = struct.unpack_from("<I", data, 96)
    return data.index(b"laszip encoded") - 2 + 54, start, struct.unpack_from("<q", data, start)[0]


def changes(data):
    """Sizes of a LAZ file, one at a time, as a damaged file may declare them."""
    record, start, table = laszip(data)
    new = data[25] >= 4
    points = ("<Q", 247) if new else ("<I", 107)
    yield "chunks", [("<I", table + 4, 2**32 - 1)]
    yield "some more chunks", [("<I", table + 4, 60)]
    yield "variable chunks", [("<I", record + 12, 2**32 - 1)]
    yield "points", [(*points, 2**31)]
    yield "points of one chunk", [(*points, 2**32 - 2), ("<I", record + 12, 2**32 - 2)]
    yield "records", [("<I", 100, 2**32 - 1)]
    yield "items", [("<H", record + 32, 65535)]
    yield "size of an item", [("<H", record + 36, 9999)]
    yield "start", [("<I", 96, 2**32 - 1)]
    yield "table", [("<q", start, 2**62)]
    yield "table at the end", [("<q", start, -1)]
    yield "length of points", [("<H", 105, 65535)]
    if new:
        (length,) = struct.unpack_from("<H", data, 105)
        yield "layer", [("<I", start + 8 + length + 8, 2**32 - 1)]


def test_laz_files_whose_sizes_are_too_large(valid, tmp_path):
    """The decompressor would ask for 16 bytes per chunk, or for all points of a chunk, and end the process."""
    paths = []
    for name in LAZ:
        for what, values in changes((valid / name).read_bytes()):
            data = bytearray((valid / name).read_bytes())
            for form, place, value in values:
                struct.pack_into(form, data, place, value)
            paths.append(tmp_path / f"{what.replace(' ', '-')}-{name}")
            paths[-1].write_bytes(data)
    assert read(paths) == {str(path): "refused" for path in paths}


@pytest.mark.skipif(
    not (Path(__file__).parents[2] / "shared/data/lone_star.laz").exists(), reason="the real scan is not here"
)
def test_a_real_scan_with_too_many_chunks(tmp_path):
    data = bytearray((Path(__file__).parents[2] / "shared/data/lone_star.laz").read_bytes())
    struct.pack_into("<I", data, laszip(data)[2] + 4, 2**32 - 1)
    path = tmp_path / "scan.laz"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"scan\.laz cannot be read as laz \(it declares 4294967295 chunks"):
        gk.Source.of(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "rows.ply",
            b"element vertex 99999999999999999\nproperty float x\nproperty float y\nproperty float z\nend_header\n",
        ),
        ("list.ply", b"element face 1\nproperty list uint double i\nelement vertex 0\nproperty float x\nend_header\n"),
        ("header.ply", b"comment x\n" * 100),
        ("none.npy", b"{'descr': 'V0', 'fortran_order': False, 'shape': (4611686018427387904, 2), }\n"),
        ("many.npy", b"{'descr': '<f8', 'fortran_order': False, 'shape': (4611686018427387904, 3), }\n"),
        ("empty.npy", b"{'descr': '<f8', 'fortran_order': False, 'shape': (4611686018427387904, 0), }\n"),
        ("minus.npy", b"{'descr': '<f8', 'fortran_order': False, 'shape': (-3, 3), }\n"),
        ("text.npy", b"{'descr': '<U4', 'fortran_order': False, 'shape': (1, 1), }\n"),
        ("python.npy", b"{'descr': '<f8', 'fortran_order': False, 'shape': '\\d', }\n"),
    ],
)
def test_headers_that_promise_what_no_file_holds(name, content, tmp_path):
    for kind in (b"ascii", b"binary_little_endian") if name.endswith("ply") else (b"",):
        start = b"ply\nformat " + kind + b" 1.0\n"
        if name.endswith("npy"):
            start = b"\x93NUMPY\x01\0" + struct.pack("<H", len(content))
        (tmp_path / name).write_bytes(start + content + b"\xff" * 64)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
            gk.Source.of(tmp_path / name).survey()
        assert len(str(caught.value).splitlines()) == 1


def test_a_parquet_file_whose_rows_do_not_fit_its_pages(valid, tmp_path):
    """The footer says how many rows a group has, and so do its pages."""
    data = (valid / "plain.parquet").read_bytes()
    # Of 130 rows, in the varints of the footer: 260, as they count twice.
    footer = data.rindex(b"\x84\x02")
    assert footer > len(data) - 2000
    found = []
    for value in (b"\x86\x02", b"\xff\x7f", b"\x83\x02", b"\x00\x02"):
        path = tmp_path / f"{len(found)}.parquet"
        path.write_bytes(data[:footer] + value + data[footer + 2 :])
        found.append(path)
    said = read(found)
    assert said == {str(path): "refused" for path in found}


def test_text_of_other_libraries_stays_away(valid, tmp_path):
    data = (valid / "zstd.parquet").read_bytes()
    path = tmp_path / "x.parquet"
    path.write_bytes(data[:-60] + b"\xff" * 52 + data[-8:])
    with pytest.raises(
        ValueError, match=r"^\S*x\.parquet cannot be read as parquet; it may be truncated, damaged"
    ) as caught:
        gk.Source.of(path)
    assert "thrift" not in str(caught.value)


def test_chunks_of_different_lengths_are_found(tmp_path):
    """As files in COPC order have them; the points are those of the file that is not compressed."""
    laspy, lazrs = pytest.importorskip("laspy"), pytest.importorskip("lazrs")
    header = laspy.LasHeader(point_format=6, version="1.4")
    header.scales = np.full(3, 0.001)
    scan = laspy.LasData(header)
    x = np.random.default_rng(0).normal(size=(1000, 3)).round(3)
    scan.x, scan.y, scan.z = x.T
    scan.write(str(tmp_path / "plain.las"))
    plain = (tmp_path / "plain.las").read_bytes()
    (start,) = struct.unpack_from("<I", plain, 96)
    kind = lazrs.LazVlr.new_for_compression(6, 0, True)
    record = bytes(kind.record_data())
    head = bytearray(plain[:start])
    struct.pack_into("<II", head, 96, start + 54 + len(record), struct.unpack_from("<I", head, 100)[0] + 1)
    head[104] |= 0x80
    with open(tmp_path / "copc.laz", "wb") as file:
        file.write(head + struct.pack("<H16sHH32s", 0, b"laszip encoded", 22204, len(record), b"") + record)
        compressor = lazrs.LasZipCompressor(file, kind)
        points = np.frombuffer(plain[start : start + 1000 * 30], np.uint8)
        for first, stop in ((0, 300), (300, 333), (333, 360), (360, 1000)):
            compressor.compress_many(points[30 * first : 30 * stop])
            compressor.finish_current_chunk()
        compressor.done()
    for rows in (7, 64, 100, 333, 1000, None):
        source = gk.Source.of(tmp_path / "copc.laz", chunk_rows=rows)
        chunks = list(source.chunks())
        assert np.allclose(np.concatenate([chunk.points.numpy() for chunk in chunks]), x, rtol=0, atol=1e-9)
        assert sum(len(chunk.points) for chunk in chunks) == source.survey().rows == 1000
    halves = [gk.Source.of(tmp_path / "copc.laz", chunk_rows=64).shared(rank, 2) for rank in range(2)]
    both = np.concatenate([chunk.points.numpy() for half in halves for chunk in half.chunks()])
    assert np.allclose(both, x, rtol=0, atol=1e-9)
