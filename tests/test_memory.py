"""Memory: the estimate holds, a limit is kept, and running out of it halves the tiles."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PEAK

import gmmkeops as gk
from gmmkeops.reductions.dense import engine as _dense

SCRIPT = f"""{PEAK}
import sys, torch, gmmkeops as gk
n, k, d, limit = *map(int, sys.argv[1:4]), sys.argv[4]
torch.set_num_threads(2)
torch.manual_seed(0)
x = torch.randn(n, d)
small = gk.initialize(x[:30_000], k, "random")
gk.fit(small, x[:1000 + k], gk.EM(), max_iter=1)
before = peak()
result = gk.fit(small, x, gk.EM(tol=0), max_iter=2, max_memory=None if limit == "none" else limit)
print(1024 * (peak() - before), gk.estimate_memory(n, k, d), result.objective)
"""


pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from Linux's /proc")


def measured(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(Path(gk.__file__).parents[1])}
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [float(number) for number in done.stdout.split()]


@pytest.mark.parametrize(("n", "k", "d"), [(8_000_000, 8, 3), (2_000_000, 300, 3), (300_000, 50, 20)])
def test_the_estimate_is_an_upper_one_and_not_far_off(n, k, d):
    peak, estimate, _ = measured(n, k, d, "none")
    assert peak <= estimate
    assert estimate < 3 * peak + (150 << 20)


def test_a_limit_is_kept_and_changes_nothing():
    free, _, objective = measured(8_000_000, 8, 3, "none")
    kept, _, same = measured(8_000_000, 8, 3, "120MiB")
    assert free > 90 << 20
    assert kept < min(120 << 20, free)
    assert same == pytest.approx(objective, abs=1e-6)


READ = f"""{PEAK}
import sys, numpy as np, torch, gmmkeops as gk
kind, path = sys.argv[1:]
rng, rows = np.random.default_rng(0), 2_000_000
torch.set_num_threads(2)

def given(rows):
    def parts():
        for _ in range(0, rows, 20_000):
            yield np.full((20_000, 3), 0.5) + np.arange(20_000)[:, None] % 7, np.ones(20_000)

    if kind == "function":
        return parts
    if kind == "parquet":
        import pyarrow, pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table(dict(zip("xyzw", rng.random((4, rows))))), path)
        return gk.Source.of(path, weights="w")
    wide = np.lib.format.open_memmap(path, "w+", shape=(rows, 12 if kind == "columns" else 3), dtype=np.float64)
    for start in range(0, rows, 20_000):
        wide[start : start + 20_000] = rng.random((20_000, wide.shape[1]))
    wide.flush()
    return gk.Source.of(path, columns=[0, 1, 2])

start = gk.initialize(torch.from_numpy(rng.random((1000, 3))), 8)
gk.fit(start, given(20_000), gk.EM(tol=0), max_iter=1)
source = given(rows)
open("/proc/self/clear_refs", "w").write("5")
before = peak()
gk.fit(start, source, gk.EM(tol=0), max_iter=2, max_memory="120MiB")
print(1024 * (peak() - before))
"""


@pytest.mark.parametrize(
    ("kind", "suffix"), [("function", ""), ("rows", ".npy"), ("columns", ".npy"), ("parquet", ".pq")]
)
def test_a_limit_is_kept_whatever_is_read(kind, suffix, tmp_path):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    environment = {**os.environ, "PYTHONPATH": str(Path(gk.__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", "-c", READ, kind, str(tmp_path / f"points{suffix}")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 120 << 20


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_chunks_are_freed_without_the_garbage_collector(dtype):
    """A chunk in a reference cycle stays in memory until the collector runs, and with it all chunks since its last run."""
    made, most = [], []

    def parts():
        rng = np.random.default_rng(0)
        for _ in range(30):
            part = rng.normal(size=(500, 2))
            made.append(weakref.ref(part))
            most.append(sum(reference() is not None for reference in made))
            yield part

    source = gk.Source.of(parts, chunk_rows=500)
    start = gk.initialize(source, 2)
    most.clear()
    gc.collect()
    gc.disable()
    try:
        gk.fit(start, source, gk.EM(tol=0), max_iter=2, dtype=dtype)
    finally:
        gc.enable()
    # In use, read ahead, and being made.
    assert len(most) >= 60
    assert max(most) <= 4


def test_bad_limits():
    x = torch.randn(500, 2)
    start = gk.initialize(x, 2)
    for limit, says in (("much", "must be a number of bytes"), (-1, "must be positive"), ("1kB", "needs at least")):
        with pytest.raises(ValueError, match=says):
            gk.fit(start, x, gk.EM(), max_memory=limit)


@pytest.mark.parametrize("truncate", [0, 1e-4])
def test_running_out_of_memory_halves_the_tiles(truncate, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40_000, 2, generator=generator) + 9 * torch.randint(0, 6, (40_000, 2), generator=generator)
    start = gk.initialize(x, 70, generator=generator)
    expected = gk.fit(start, x, gk.EM(tol=0), max_iter=3, truncate=truncate, backend="dense")
    tile, sizes = _dense.Tile, []

    def small(problem, rows, pairs, *options):
        sizes.append(pairs)
        if pairs > 5_000:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return tile(problem, rows, pairs, *options)

    monkeypatch.setattr(_dense, "Tile", small)
    found = gk.fit(start, x, gk.EM(tol=0), max_iter=3, truncate=truncate, backend="dense")
    assert max(sizes) > 5_000
    assert torch.allclose(found.mixture.means, expected.mixture.means, atol=1e-9 if truncate == 0 else 1e-6)
    assert torch.equal(found.mixture.predict(x), expected.mixture.predict(x))
    monkeypatch.setattr(_dense, "Tile", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        gk.fit(start, x, gk.EM(), max_iter=1, backend="dense")


@pytest.mark.parametrize("numbers", [(0, 1, 1), (1, -1, 1), (1, 1, 0)])
def test_an_estimate_needs_numbers_of_one_and_more(numbers):
    with pytest.raises(ValueError, match="at least 1"):
        gk.estimate_memory(*numbers)


def test_estimator_memory_does_not_hold_points_times_components():
    """10⁶ x 30 responsibilities would be 240 MB for each copy; the peak above imports and data stays under 500 MB."""
    code = f"""{PEAK}
import torch, gmmkeops as gk
x = torch.rand(1_000_000, 3)
before = peak()
gk.GaussianMixture(100, max_iter=2, tol=0, random_state=0).fit(x).predict(x)
print((peak() - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 500


def test_memory_of_a_gradient_does_not_see_points_times_components():
    """10⁶ x 1000 exponents would be 4 GB in float32; the peak above imports and data stays under 700 MB."""
    code = f"""{PEAK}
import torch, gmmkeops as gk
import torch._dynamo
before = peak()
x = torch.rand(1_000_000, 3)
means = torch.rand(1000, 3, requires_grad=True)
U = (10 * torch.eye(3)).expand(1000, 3, 3).clone().requires_grad_()
(gk.reductions.logsumexp(x, torch.zeros(1000), means, U).mean()).backward()
assert means.grad.abs().max() > 0
print((peak() - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 700
