"""Sources: every kind of storage gives the same fit as memory, and what is wrong with one is said with numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PEAK

import gmmkeops as gk
from gmmkeops.data.survey import Reservoir, fingerprint, sample

CENTRES = np.array([[0.0, 0, 0], [4, 0, 1], [0, 5, -2], [-3, 2, 4]])


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(0)
    parts = [rng.normal(center, 0.5 + 0.2 * k, (10_000, 3)) for k, center in enumerate(CENTRES)]
    out = np.concatenate(parts).astype(np.float32)
    rng.shuffle(out)
    return out


@pytest.fixture(scope="module")
def start(x):
    return gk.initialize(x, 4, generator=torch.Generator().manual_seed(0))


def difference(a, b):
    pairs = [(a.weights, b.weights), (a.means, b.means), (a.factor.covariances(), b.factor.covariances())]
    return max(float((p - q).abs().max()) for p, q in pairs)


def npy(x, folder):
    np.save(folder / "x.npy", x)
    return folder / "x.npy"


def fortran(x, folder):
    np.save(folder / "x.npy", np.asfortranarray(x))
    return str(folder / "x.npy")


def memmap(x, folder):
    return np.load(npy(x, folder), mmap_mode="r")


def shards(x, folder):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for i, part in enumerate(np.array_split(x, 5)):
        table = pa.table({name: part[:, d] for d, name in enumerate("xyz")})
        pq.write_table(table, folder / f"part-{i}.parquet", row_group_size=3000)
    return str(folder / "part-*.parquet")


def folder_of_files(x, folder):
    shards(x, folder)
    return folder


def ply(x, folder):
    plyfile = pytest.importorskip("plyfile")
    rows = np.empty(len(x), [("x", "f4"), ("y", "f4"), ("z", "f4"), ("red", "u1")])
    for d, name in enumerate("xyz"):
        rows[name] = x[:, d]
    plyfile.PlyData([plyfile.PlyElement.describe(rows, "vertex")]).write(str(folder / "x.ply"))
    return folder / "x.ply"


def function(x, folder):
    return lambda: (x[i : i + 777] for i in range(0, len(x), 777))


def loader(x, folder):
    data = torch.utils.data.TensorDataset(torch.from_numpy(x))
    return torch.utils.data.DataLoader(data, batch_size=4000, shuffle=True)


STORAGES = [npy, fortran, memmap, shards, folder_of_files, ply, function, loader]


@pytest.mark.parametrize("storage", STORAGES, ids=lambda f: f.__name__)
def test_every_storage_gives_the_fit_of_memory(storage, x, start, tmp_path):
    source = gk.Source.of(storage(x, tmp_path), chunk_rows=7001)
    expected = gk.fit(start, x, gk.EM(tol=0), max_iter=5)
    found = gk.fit(start, source, gk.EM(tol=0), max_iter=5)
    assert difference(found.mixture, expected.mixture) < 1e-6
    assert found.objective == pytest.approx(expected.objective, abs=1e-6)
    assert found.report.dtype == "float32"


def las(x, folder, suffix=".las"):
    laspy = pytest.importorskip("laspy")
    header = laspy.LasHeader(point_format=3, version="1.2")
    header.scales, header.offsets = np.full(3, 0.001), np.array([640_000.0, 5_400_000.0, 0.0])
    cloud = laspy.LasData(header)
    cloud.x, cloud.y, cloud.z = (x.astype(np.float64) + header.offsets).T
    cloud.classification = np.arange(len(x)) % 3
    cloud.write(str(folder / f"x{suffix}"))
    return folder / f"x{suffix}"


@pytest.mark.parametrize("suffix", [".las", ".laz"])
def test_scans_keep_their_millimetres(x, tmp_path, suffix):
    path = las(x, tmp_path, suffix)
    cloud = x.astype(np.float64).round(3) + np.array([640_000.0, 5_400_000.0, 0.0])
    start = gk.initialize(cloud, 4, generator=torch.Generator().manual_seed(0))
    expected = gk.fit(start, cloud, gk.EM(tol=0), max_iter=5)
    for dtype in (None, "float32"):
        found = gk.fit(start, gk.Source.of(path, chunk_rows=9000), gk.EM(tol=0), max_iter=5, dtype=dtype)
        assert difference(found.mixture, expected.mixture) < (1e-8 if dtype is None else 1e-5)
    chosen = gk.Source.of(path, classes=[1], columns=["z", "x"])
    rows = torch.cat([chunk.points for chunk in chosen.chunks()])
    assert np.allclose(rows.numpy(), cloud[1::3][:, [2, 0]], atol=1e-6)


@pytest.mark.parametrize("method", [gk.Adam(), gk.EM(tol=0, accelerate=True), gk.EM(tol=0, assignment="hard")])
def test_every_method_reads_sources(method, x, start, tmp_path):
    source = gk.Source.of(npy(x, tmp_path), chunk_rows=9000)
    penalty = gk.penalties.SqrtWeights(0.1)
    expected = gk.fit(start, x, method, max_iter=4, penalty=penalty)
    found = gk.fit(start, source, method, max_iter=4, penalty=penalty)
    assert difference(found.mixture, expected.mixture) < 1e-6


def test_three_stepwise_passes_come_within_a_thousandth_of_a_nat(x, start, tmp_path):
    """Also where the rows are sorted, as a scan's are."""
    path = npy(x[np.lexsort(x.T)], tmp_path)
    exact = gk.fit(start, x, gk.EM(tol=1e-8), max_iter=200)
    for method in (gk.EM(batch_size=2000, tol=0), gk.Adam(batch_size=2000)):
        generator = torch.Generator().manual_seed(0)
        found = gk.fit(start, gk.Source.of(path, chunk_rows=10_000), method, max_iter=3, generator=generator)
        # Sixty steps of Adam are a beginning.
        assert found.objective - exact.objective < (1e-3 if isinstance(method, gk.EM) else 0.02)


def test_starts_and_estimators_read_sources(x, tmp_path):
    path = npy(x, tmp_path)
    for strategy, most in (("kmeans", 1e-12), ("auto", 1e-6)):
        start, same = (
            gk.initialize(data, 4, strategy, generator=torch.Generator().manual_seed(3)) for data in (path, x)
        )
        assert difference(start, same) < most
    model, same = (gk.GaussianMixture(4, random_state=0).fit(data) for data in (path, x))
    assert difference(model.mixture_, same.mixture_) < 1e-6
    assert model.score(path) == pytest.approx(same.score(x), abs=1e-6)
    assert np.allclose(model.score_samples(path), same.score_samples(x), atol=1e-5)
    assert (model.predict(str(path)) == same.predict(x)).mean() > 0.9999
    for name in ("bic", "aic", "icl"):
        assert getattr(model, name)(path) == pytest.approx(getattr(same, name)(x), rel=1e-7)
    table = gk.analysis.select(path, [3, 4], generator=torch.Generator().manual_seed(0))
    assert table.best.n_components == 4
    low = gk.analysis.anomaly_threshold(same.mixture_, path)
    assert low == pytest.approx(gk.analysis.anomaly_threshold(same.mixture_, x), abs=1e-5)


def test_array_weights_and_row_numbers_hold_across_chunks(tmp_path):
    """Every chunk takes its own part of the weights, and messages count rows from the first row of all."""
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(500, 2)) * [1.0, 3.0], rng.uniform(0.2, 3.0, 500)
    np.save(tmp_path / "x.npy", x)
    one = gk.Mixture.from_parameters([1.0], [[0.0, 0.0]], [[1.0, 1.0]], "diag")
    for data in (tmp_path / "x.npy", x):
        source = gk.Source.of(data, weights=g, chunk_rows=64)
        found = gk.fit(one, source, gk.EM(reg_covar=0, tol=0), max_iter=2).mixture
        mean = np.average(x, axis=0, weights=g)
        assert np.allclose(found.means[0], mean, rtol=1e-12)
        assert np.allclose(found.variance, np.average((x - mean) ** 2, axis=0, weights=g), rtol=1e-12)
        for value, message in ((-1.0, "must not be negative, got -1.0 at row 333"), (np.nan, "got NaN at row 333")):
            wrong = g.copy()
            wrong[333] = value
            with pytest.raises(ValueError, match=message):
                gk.fit(one, gk.Source.of(data, weights=wrong, chunk_rows=64), gk.EM())
    x[444, 1] = np.inf
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(ValueError, match="got inf at row 444, column 1"):
        gk.fit(one, gk.Source.of(tmp_path / "x.npy", chunk_rows=64), gk.EM())


def test_weights_from_a_column_an_array_or_pairs(x, start, tmp_path):
    g = np.random.default_rng(1).integers(0, 3, len(x)).astype(np.float32)
    expected = gk.fit(start, x, gk.EM(tol=0), sample_weight=g, max_iter=4)
    np.save(tmp_path / "w.npy", np.column_stack([x, g]))
    column = gk.Source.of(tmp_path / "w.npy", weights=3)
    pairs = gk.Source.of(lambda: ((x[i : i + 999], g[i : i + 999]) for i in range(0, len(x), 999)), chunk_rows=5000)
    for found in (
        gk.fit(start, column, gk.EM(tol=0), max_iter=4),
        gk.fit(start, pairs, gk.EM(tol=0), max_iter=4),
        gk.fit(start, npy(x, tmp_path), gk.EM(tol=0), sample_weight=g, max_iter=4),
    ):
        assert difference(found.mixture, expected.mixture) < 1e-6


def test_what_can_be_read_once_is_refused_at_once(x, start):
    with pytest.raises(TypeError, match="can be read only once"):
        gk.fit(start, (part for part in [x]), gk.EM())
    with pytest.raises(TypeError, match="can be read only once"):
        gk.GaussianMixture(4).fit(iter([x]))
    once = iter([x, x])
    with pytest.raises(TypeError, match="the same iterator twice"):
        gk.fit(start, lambda: once, gk.EM())


def test_a_function_that_changes_its_mind_is_told_the_numbers(x, start):
    calls = []

    def fewer():
        calls.append(None)
        yield x[:30_000]
        if len(calls) < 4:
            yield x[30_000:]

    with pytest.raises(ValueError, match="30000 rows on this pass and 40000 on the first"):
        gk.fit(start, fewer, gk.EM())
    shift = iter(range(100))
    with pytest.raises(ValueError, match="other numbers on this pass"):
        gk.fit(start, lambda: iter([x + next(shift)]), gk.EM())


@pytest.mark.parametrize("change", ["cut", "grown", "rewritten", "gone"])
def test_a_file_that_changes_under_a_fit_is_an_error(change, x, start, tmp_path):
    path = npy(x, tmp_path)

    def spoil(step):
        if step.iteration == 1:
            size = path.stat().st_size
            if change == "cut":
                os.truncate(path, size - 1200)
            elif change == "grown":
                with path.open("ab") as file:
                    file.write(b"more")
            elif change == "rewritten":
                data = path.read_bytes()
                path.write_bytes(data[:-4] + b"\0\0\0\0")
                os.utime(path, (1, 1))
            else:
                path.unlink()

    with pytest.raises(ValueError, match=r"changed while it was read|no longer exists"):
        gk.fit(start, gk.Source.of(path, chunk_rows=9000), gk.EM(tol=0), callback=spoil)


@pytest.mark.parametrize("storage", [npy, shards, ply, las, lambda x, d: las(x, d, ".laz")])
def test_every_truncation_is_one_clear_error(storage, x, start, tmp_path):
    storage(x, tmp_path)
    path = sorted(tmp_path.iterdir())[0]
    whole = path.read_bytes()
    for place in np.linspace(0, len(whole) - 1, 20).astype(int):
        path.write_bytes(whole[:place])
        with pytest.raises(ValueError, match="cannot be read") as caught:
            gk.fit(start, path, gk.EM(), max_iter=1)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value).strip()


def test_bad_numbers_are_named_by_their_row(x, start, tmp_path):
    bad = x.copy()
    bad[31_234, 1] = np.nan
    with pytest.raises(ValueError, match="row 31234, column 1"):
        gk.fit(start, gk.Source.of(npy(bad, tmp_path), chunk_rows=4000), gk.EM())


def test_refusals(x, start, tmp_path):
    path = npy(x, tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        gk.Source.of(tmp_path / "none.npy")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        gk.Source.of(str(tmp_path / "*.laz"))
    with pytest.raises(ValueError, match=r"one of the suffixes \.npy"):
        gk.Source.of("points.xyz")
    with pytest.raises(ValueError, match="has no column 'a'"):
        gk.Source.of(path, columns=["a"])
    with pytest.raises(ValueError, match="expected 3"):
        gk.fit(start, gk.Source.of(path, columns=[0, 1]), gk.EM())
    with pytest.raises(ValueError, match="LAS and LAZ"):
        gk.Source.of(path, classes=[2])
    with pytest.raises(ValueError, match="one per row"):
        gk.fit(start, path, gk.EM(), sample_weight=np.ones(3))
    with pytest.raises(ValueError, match="rows of total weight"):
        gk.fit(start, lambda: iter([x[:2]]), gk.EM())


def test_a_missing_library_is_named_with_its_remedy(tmp_path, monkeypatch):
    (tmp_path / "x.las").write_bytes(b"LASF")
    monkeypatch.setitem(sys.modules, "laspy", None)
    with pytest.raises(ImportError, match=r'pip install "gmmkeops\[las\]"'):
        gk.Source.of(tmp_path / "x.las")


def test_the_sample_is_the_same_however_rows_are_cut(x):
    points = torch.from_numpy(x)
    g = torch.rand(len(x), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows, mass = sample(points, g, 500)
    pieces, merged = Reservoir(500), Reservoir(500)
    for first in reversed(range(0, len(x), 7777)):
        pieces.add(points[first : first + 7777], g[first : first + 7777], first)
    other = Reservoir(500)
    merged.add(points[:9000], g[:9000], 0)
    other.add(points[9000:], g[9000:], 9000)
    merged.merge(*other.parts(), other.seen)
    for reservoir in (pieces, merged):
        assert torch.equal(reservoir.sample()[0], rows)
        assert torch.equal(reservoir.sample()[1], mass)
        assert reservoir.seen == int((g > 0).sum())
    # Unbiased: 200 samples of 100 heavy-tailed masses; the mean of an estimated sum is within 5 standard errors of it
    # (chance below 1e-6).
    heavy = torch.rand(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** -0.7
    sums = []
    for run in range(200):
        reservoir = Reservoir(100)
        reservoir.add(torch.zeros(300, 1), heavy, 10_000 * run)
        sums.append(float(reservoir.sample()[1].sum()))
    assert abs(np.mean(sums) - float(heavy.sum())) < 5 * np.std(sums) / np.sqrt(200)


def test_the_fingerprint_knows_rows_in_any_order(x):
    points = torch.from_numpy(x)
    mark = fingerprint(points, None)
    assert mark == fingerprint(points.flip(0).double(), None)
    halves = fingerprint(points[:100], None) + fingerprint(points[100:], None)
    assert mark == halves % (1 << 64)
    swapped = points.clone()
    swapped[0, 0], swapped[0, 1] = points[0, 1], points[0, 0]
    assert mark != fingerprint(swapped, None)
    assert mark != fingerprint(points, torch.ones(len(x), dtype=torch.float64))


SCRIPT = f"""{PEAK}
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int({{limit}}), int({{limit}})))
import torch, gmmkeops as gk
torch.set_num_threads(2)
start = gk.load(sys.argv[1])
result = gk.fit(start, {{data}}, gk.EM(tol=0), max_iter=2)
gk.save(result.mixture, sys.argv[3])
print(peak())
"""


def test_memory_does_not_grow_with_the_rows(x, start, tmp_path):
    """A memory map of 192 MB in a process that may take little more than its imports; to the model of the small one."""
    path = tmp_path / "big.npy"
    big = np.lib.format.open_memmap(path, "w+", np.float32, (16_000_000, 3))
    for first in range(0, len(big), len(x)):
        big[first : first + len(x)] = x
    big.flush()
    del big
    gk.save(start, tmp_path / "start.safetensors")
    environment = {**os.environ, "PYTHONPATH": str(Path(gk.__file__).parents[1])}
    script = SCRIPT.format(limit=1.2e9, data="sys.argv[2]")
    command = [sys.executable, "-c", script, tmp_path / "start.safetensors", path, tmp_path / "out.safetensors"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = gk.fit(start, x, gk.EM(tol=0), max_iter=2).mixture
    assert difference(gk.load(tmp_path / "out.safetensors"), expected) < 1e-6
    # Imports take 270 MB, the file's own pages up to 192; readers and their chunks come and go.
    assert float(done.stdout) < 800 * 1024
