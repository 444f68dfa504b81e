"""The contract of readers: every storage gives the same points and weights, in any order, and refuses the same things."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

import gmmkeops as gk
from gmmkeops.data.batch import Batch
from gmmkeops.data.chunks import Unit
from gmmkeops.data.readers import formats
from gmmkeops.data.readers.base import ColumnError, Reader

N, SIZE, BAD = 500, 64, 333
NAMES = ("x", "y", "z", "w")


class Lines(Reader):
    """A toy reader: names of columns in the first line of a text file, then the numbers of one row per line."""

    def __init__(self, path, columns=None, weights=None):
        self.name, self.paths = str(path), (path,)
        head, *lines = path.read_text().splitlines()
        self.head, self.rows = head.split(","), len(lines)
        self.choose(self.head, columns, weights)

    def load(self, unit):
        lines = self.paths[0].read_text().splitlines()[1 + unit.first :][: unit.rows]
        table = np.array([line.split(",") for line in lines], np.float64)
        return self.assembled(lambda column: table[:, self.head.index(column)])


class Parts:
    """A function that can be pickled: it gives pairs of points and weights."""

    def __init__(self, rows):
        self.rows = rows

    def __call__(self):
        return ((part[:, :3], part[:, 3]) for part in np.array_split(self.rows, 9))


def fields(rows):
    out = np.empty(len(rows), [(name, "f4") for name in NAMES])
    for d, name in enumerate(NAMES):
        out[name] = rows[:, d]
    return out


def array(rows, folder):
    return rows, {"weights": 3}


def tensor(rows, folder):
    return torch.from_numpy(rows), {"weights": 3}


def structured(rows, folder):
    return fields(rows), {"weights": "w"}


def table(rows, folder):
    return pytest.importorskip("pandas").DataFrame(rows, columns=NAMES), {"weights": "w"}


def npy(rows, folder):
    np.save(folder / "rows.npy", rows)
    return folder / "rows.npy", {"weights": 3}


def npy_by_columns(rows, folder):
    return npy(np.asfortranarray(rows), folder)


def npy_structured(rows, folder):
    return npy(fields(rows), folder)[0], {"weights": "w"}


def memory_map(rows, folder):
    return np.load(npy(rows, folder)[0], mmap_mode="r"), {"weights": 3}


def ply(rows, folder):
    plyfile = pytest.importorskip("plyfile")
    plyfile.PlyData([plyfile.PlyElement.describe(fields(rows), "vertex")]).write(folder / "rows.ply")
    return folder / "rows.ply", {"weights": "w"}


def parquet(rows, folder, name="rows", order=NAMES):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = pa.table({column: rows[:, NAMES.index(column)] for column in order})
    pq.write_table(columns, folder / f"{name}.parquet", row_group_size=150)
    return folder / f"{name}.parquet", {"weights": "w"}


def las(rows, folder, suffix=".las"):
    laspy = pytest.importorskip("laspy")
    header = laspy.LasHeader(point_format=3, version="1.2")
    header.scales = np.full(3, 2.0**-10)
    cloud = laspy.LasData(header)
    cloud.x, cloud.y, cloud.z = rows[:, :3].astype(np.float64).T
    cloud.intensity = rows[:, 3].astype(np.uint16)
    cloud.write(str(folder / f"rows{suffix}"))
    return folder / f"rows{suffix}", {"weights": "intensity"}


def laz(rows, folder):
    pytest.importorskip("lazrs")
    return las(rows, folder, ".laz")


def several_files(rows, folder):
    """Files whose columns are in different orders."""
    parquet(rows[:210], folder, "part-1")
    parquet(rows[210:], folder, "part-2", NAMES[::-1])
    return str(folder / "part-*.parquet"), {"weights": "w"}


def lines(rows, folder):
    text = [",".join(NAMES), *(",".join(map(repr, row)) for row in rows.astype(float).tolist())]
    (folder / "rows.lines").write_text("\n".join(text))
    return folder / "rows.lines", {"weights": "w"}


def function(rows, folder):
    return Parts(rows), {}


def loader(rows, folder):
    data = torch.utils.data.TensorDataset(torch.from_numpy(rows[:, :3].copy()), torch.from_numpy(rows[:, 3].copy()))
    return torch.utils.data.DataLoader(data, batch_size=77), {}


MEMORY = [array, tensor, structured, table]
FILES = [npy, npy_by_columns, npy_structured, memory_map, ply, parquet, las, laz, several_files, lines]
STREAMS = [function, loader]
# LAS files store coordinates and intensities as integers, which are neither NaN nor negative.
FLOATS = [make for make in MEMORY + FILES + STREAMS if make not in (las, laz)]


@pytest.fixture
def rows():
    """Points and weights (N, 4) that every format can represent exactly."""
    rng = np.random.default_rng(0)
    points = np.round(rng.normal(size=(N, 3)) * [1, 8, 64] * 1024) / 1024
    return np.column_stack([points, rng.integers(1, 6, N)]).astype(np.float32)


@pytest.fixture(autouse=True)
def suffix(monkeypatch):
    monkeypatch.setitem(formats.SUFFIXES, ".lines", (Lines, ""))


def source(make, rows, folder):
    data, options = make(rows, folder)
    return gk.Source.of(data, chunk_rows=SIZE, **options)


def contents(chunks):
    """Points and weights of chunks as rows (N, 4), in the order of their numbers."""
    chunks = sorted(chunks, key=lambda chunk: chunk.first)
    assert [chunk.first for chunk in chunks] == np.cumsum([0, *(len(chunk.points) for chunk in chunks[:-1])]).tolist()
    return torch.cat([torch.column_stack([chunk.points.double(), chunk.weights]) for chunk in chunks]).numpy()


@pytest.mark.parametrize("make", MEMORY + FILES + STREAMS)
def test_points_and_weights(make, rows, tmp_path):
    data = source(make, rows, tmp_path)
    chunks = list(data.chunks())
    assert np.array_equal(contents(chunks), rows)
    assert len(chunks) > 3
    assert max(len(chunk.points) for chunk in chunks) <= 150
    assert {chunk.points.dtype for chunk in chunks} == {torch.float64 if make in (las, laz, lines) else torch.float32}
    assert data.features == 3
    assert data.columns in (None, ("x", "y", "z"))


@pytest.mark.parametrize("make", MEMORY + FILES + STREAMS)
def test_survey_counts_rows_and_weights(make, rows, tmp_path):
    survey = source(make, rows, tmp_path).survey()
    assert (survey.rows, survey.mass) == (N, float(rows[:, 3].sum()))
    assert survey.squares == float((rows[:, 3] ** 2).sum())
    assert survey.fingerprint == source(array, rows, tmp_path).survey().fingerprint


@pytest.mark.parametrize("size", [1, 7, 64, 10**6])
@pytest.mark.parametrize("make", MEMORY + FILES)
def test_units_in_any_order(make, size, rows, tmp_path):
    reader = source(make, rows, tmp_path).reader
    units = reader.units(size)
    # Each row is in one unit.
    assert [row for unit in units for row in range(unit.first, unit.first + unit.rows)] == list(range(N))
    assert reader.rows == N
    for i in np.random.default_rng(size).permutation(len(units))[:40]:
        unit = units[i]
        chunk = reader.load(unit)
        found = torch.column_stack([chunk.points.double(), chunk.weights.double()]).numpy()
        assert np.array_equal(found, rows[unit.first : unit.first + unit.rows])


@pytest.mark.parametrize("make", MEMORY + FILES)
def test_a_pass_in_random_order_reads_every_row_once(make, rows, tmp_path):
    data = source(make, rows, tmp_path)
    order = data.shuffled(torch.Generator().manual_seed(0))
    chunks = list(data.chunks(order=order))
    assert sum(len(chunk.points) for chunk in chunks) == N
    found = torch.cat([torch.column_stack([chunk.points.double(), chunk.weights]) for chunk in chunks]).numpy()
    assert np.array_equal(found[np.lexsort(found.T)], rows[np.lexsort(rows.T)])


@pytest.mark.parametrize("column", [1, 3])
@pytest.mark.parametrize("make", FLOATS)
def test_numbers_that_are_not_finite_are_refused_by_their_row(make, column, rows, tmp_path):
    rows[BAD, column] = np.nan
    place = f"row {BAD}, column {column}" if column < 3 else f"row {BAD}"
    with pytest.raises(ValueError, match=f"must be finite, got NaN at {place} "):
        source(make, rows, tmp_path).survey()


@pytest.mark.parametrize("make", FLOATS)
def test_negative_weights_are_refused_by_their_row(make, rows, tmp_path):
    rows[BAD, 3] = -1
    with pytest.raises(ValueError, match=f"must not be negative, got -1.0 at row {BAD}"):
        source(make, rows, tmp_path).survey()


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda data: pickle.loads(pickle.dumps(data))])
@pytest.mark.parametrize("make", MEMORY + FILES + STREAMS)
def test_copies_read_the_same(make, copied, rows, tmp_path):
    data = source(make, rows, tmp_path)
    # The original has read a part of its file; copies read from the beginning.
    next(iter(data.chunks()))
    twin = copied(data)
    assert np.array_equal(contents(twin.chunks()), rows)
    assert np.array_equal(contents(data.chunks()), rows)
    assert twin.survey().fingerprint == data.survey().fingerprint


@pytest.mark.parametrize("make", [make for make in MEMORY + FILES if make not in (array, tensor)])
def test_columns_are_chosen_by_name_or_index(make, rows, tmp_path):
    data, options = make(rows, tmp_path)
    names = make not in (npy, npy_by_columns, memory_map)
    wanted = ["z", "x"] if names else [2, 0]
    found = gk.Source.of(data, columns=wanted, **options)
    assert np.array_equal(contents(found.chunks())[:, :2], rows[:, [2, 0]])
    assert found.columns == (("z", "x") if names else None)
    with pytest.raises(ColumnError, match="has no column 'q'"):
        gk.Source.of(data, columns=["x", "q"] if names else [0, "q"], **options)
    if names:
        matched = found.matched(["x", "z"])
        assert np.array_equal(contents(matched.chunks())[:, :2], rows[:, [0, 2]])


def test_every_suffix_has_a_case():
    made = {"parquet": ".parquet .pq", "las": ".las", "laz": ".laz", "npy": ".npy", "ply": ".ply", "lines": ".lines"}
    cases = {make.__name__ for make in FILES}
    assert {suffix for name in cases & set(made) for suffix in made[name].split()} == set(formats.SUFFIXES)


def test_the_contract_sees_a_reader_that_is_wrong(rows, tmp_path, monkeypatch):
    """A reader that forgets the first row of a unit, and one that swaps two columns."""
    load = Lines.load
    monkeypatch.setattr(Lines, "load", lambda self, unit: load(self, Unit(unit.first + 1, unit.rows - 1)))
    with pytest.raises(AssertionError):
        test_points_and_weights(lines, rows, tmp_path)
    swapped = lambda self, unit: Batch(load(self, unit).points[:, [1, 0, 2]], load(self, unit).weights)  # noqa: E731
    monkeypatch.setattr(Lines, "load", swapped)
    with pytest.raises(AssertionError):
        test_units_in_any_order(lines, 64, rows, tmp_path)
