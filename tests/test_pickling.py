"""Everything that users hold survives pickle, deep copies and a fork; what a file holds can be loaded."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from torch.distributions import Dirichlet, Normal

import gmmkeops as gk

COPIES = [
    pytest.param(lambda value: pickle.loads(pickle.dumps(value)), id="pickle"),
    pytest.param(copy.deepcopy, id="deepcopy"),
    pytest.param(copy.copy, id="copy"),
]


def points(rows=600):
    rng = np.random.default_rng(5)
    return np.r_[rng.normal(size=(rows // 2, 2)) @ [[1.0, 0.5], [0.0, 0.4]], 4 + rng.normal(size=(rows - rows // 2, 2))]


def blocks():
    return iter(np.array_split(points(), 5))


def source(kind, folder):
    x = points()
    if kind == "array":
        return gk.Source.of(x, weights=np.arange(1.0, 601.0), chunk_rows=100)
    if kind == "tensor":
        return gk.Source.of(torch.from_numpy(x).float(), chunk_rows=100)
    if kind == "function":
        return gk.Source.of(blocks, chunk_rows=100)
    if kind == "loader":
        return gk.Source.of(torch.utils.data.DataLoader(torch.from_numpy(x), batch_size=90), chunk_rows=100)
    if kind == "table":
        return gk.Source.of(pd.DataFrame(x, columns=["a", "b"]), chunk_rows=100)
    np.save(folder / "x.npy", x)
    if kind == "npy":
        return gk.Source.of(folder / "x.npy", chunk_rows=100)
    if kind == "columns of npy":
        return gk.Source.of(folder / "x.npy", columns=[1], weights=None, chunk_rows=100)
    if kind == "fortran npy":
        np.save(folder / "f.npy", np.asfortranarray(x))
        return gk.Source.of(folder / "f.npy", chunk_rows=100)
    if kind == "memory map":
        return gk.Source.of(np.load(folder / "x.npy", mmap_mode="r"), chunk_rows=100)
    if kind == "part of a memory map":
        return gk.Source.of(np.load(folder / "x.npy", mmap_mode="r")[50:450], chunk_rows=100)
    if kind == "columns of a memory map":
        return gk.Source.of(np.load(folder / "x.npy", mmap_mode="r")[::3, ::-1], chunk_rows=100)
    if kind == "private memory map":
        mapped = np.load(folder / "x.npy", mmap_mode="c")
        mapped[3] = 7.0
        return gk.Source.of(mapped, chunk_rows=100)
    if kind == "structured memory map":
        rows = np.zeros(600, [("x", "f4"), ("time", "i8"), ("y", "f4")])
        rows["x"], rows["y"] = x.T
        np.save(folder / "s.npy", rows)
        return gk.Source.of(np.load(folder / "s.npy", mmap_mode="r"), columns=["x", "y"], chunk_rows=100)
    if kind == "parquet":
        pytest.importorskip("pyarrow")
        pd.DataFrame(x, columns=["a", "b"]).to_parquet(folder / "x.parquet", index=False)
        return gk.Source.of([folder / "x.parquet", folder / "x.parquet"], chunk_rows=100)
    if kind == "las":
        laspy = pytest.importorskip("laspy")
        file = laspy.LasData(laspy.LasHeader(point_format=0, version="1.2"))
        file.x, file.y, file.z = x[:, 0], x[:, 1], x.sum(1)
        file.write(folder / "x.las")
        return gk.Source.of(folder / "x.las", chunk_rows=100)
    plyfile = pytest.importorskip("plyfile")
    rows = np.zeros(600, [("x", "f4"), ("y", "f4"), ("z", "f4")])
    rows["x"], rows["y"] = x.T
    plyfile.PlyData([plyfile.PlyElement.describe(rows, "vertex")]).write(folder / "x.ply")
    return gk.Source.of(folder / "x.ply", chunk_rows=100)


SOURCES = [
    "array",
    "tensor",
    "function",
    "loader",
    "table",
    "npy",
    "columns of npy",
    "fortran npy",
    "memory map",
    "part of a memory map",
    "columns of a memory map",
    "private memory map",
    "structured memory map",
    "parquet",
    "las",
    "ply",
]


def contents(found):
    return [
        (chunk.points.tolist(), None if chunk.weights is None else chunk.weights.tolist()) for chunk in found.chunks()
    ]


@pytest.mark.parametrize("make_copy", COPIES)
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_is_copied(tmp_path, kind, used, make_copy):
    original = source(kind, tmp_path)
    if used:
        original.survey()
        # Half of a pass leaves readers in the middle of their files.
        next(original.chunks())
    twin = make_copy(original)
    expected = contents(original)
    assert contents(twin) == expected
    assert contents(make_copy(twin)) == expected
    assert twin.survey().fingerprint == original.survey().fingerprint
    assert twin.features == original.features
    assert contents(original) == expected


@pytest.mark.parametrize("kind", ["npy", "memory map", "part of a memory map"])
def test_a_copy_of_a_source_names_the_file_and_holds_no_points(tmp_path, kind):
    found = source(kind, tmp_path)
    assert len(pickle.dumps(found)) < 4000 < points().nbytes
    # The copy notices that the file has changed, as the original does.
    found.survey()
    twin = pickle.loads(pickle.dumps(found))
    np.save(tmp_path / "x.npy", 2 * points(700))
    with pytest.raises(ValueError, match="changed while it was read"):
        list(twin.chunks())


def objects():
    x = torch.from_numpy(points())
    start = gk.Mixture.from_parameters(
        [0.3, 0.7], [[0.0, 0.0], [4.0, 4.0]], [[[1.0, 0.2], [0.2, 2.0]], [[3.0, 0], [0, 1]]]
    )
    few = {"max_iter": 3, "tol": 0}
    network = gk.GMM(1, context=1, n_components=2)
    prior = gk.bayes.Prior(
        2, weights=Dirichlet(torch.tensor([1.5, 2.0])), means=Normal(torch.zeros(2, 1), 3.0), scales=torch.tensor([0.5, 0.8]),
        covariance_type="spherical",
    )  # fmt: skip
    result = gk.fit(start, x, gk.EM(), **few)
    vb = gk.fit(start, x, gk.bayes.VariationalBayes(), **few)
    density = lambda mixture: mixture.log_prob(x)  # noqa: E731
    again = lambda method: gk.fit(start, x, method, **few).mixture.log_prob(x)  # noqa: E731
    penalized = lambda penalty: gk.fit(start, x, gk.EM(), penalty=penalty, **few).mixture.log_prob(x)  # noqa: E731
    yield from (
        (start, density),
        (start.named(["a", "b"]), lambda m: (m.columns, m.log_prob(x))),
        (gk.GMM(2, n_components=3), lambda model: model().log_prob(x)),
        (network, lambda model: model(x[:5, :1]).log_prob(x[:5, 1:].float())),
        (result, lambda r: (r.mixture.log_prob(x), r.history, r.report, r.objective, str(r))),
        (vb, lambda r: (r.mixture.log_prob(x), r.posterior.predictive().log_prob(x), r.history)),
        (vb.posterior, lambda q: q.sample(3, torch.Generator().manual_seed(0)).log_prob(x[0])),
        (vb.posterior.predictive(), density),
        *((method, again) for method in (
            gk.EM(assignment="hard"), gk.EM(frozen_means=[True, False]), gk.Adam(lr=0.1, batch_size=100),
            gk.Adam(betas=(0.8, 0.9)),
            gk.Gradient(torch.optim.SGD), gk.bayes.VariationalBayes(means=[0.0, 1.0]),
            gk.bayes.VariationalBayes(begin=vb.posterior),
        )),
        *((penalty, penalized) for penalty in (
            gk.penalties.SqrtWeights(0.1), gk.penalties.Dirichlet(2.0), gk.penalties.NormalMean(torch.tensor([1.0, 2.0]), 3.0),
            2 * gk.penalties.SqrtWeights(0.1) + gk.penalties.WeightEntropy(0.1), gk.penalties.EigenvalueFloor(0.5),
        )),
        (gk.Checkpoint("fit.ckpt", every=3.0), lambda c: (str(c.path), c.every)),
        (prior, lambda p: list(p.sample(3, torch.Generator().manual_seed(0)).values())),
        (
            gk.bayes.gibbs(prior, x[:60, :1], draws=20, warmup=2, progress=False),
            lambda d: (d.log_prob(x[:, :1]), d.sample(4, generator=torch.Generator().manual_seed(0))),
        ),
        (gk.analysis.select(x, [1, 2]), lambda s: (str(s), s.best.log_prob(x))),
        (gk.standard_errors(result.mixture, x, joint=False), lambda e: vars(e)),
        (gk.reductions.arrange(x, 2, 1e-3), lambda cloud: start.log_prob(x)),
        (
            gk.reductions.moments(x, start.offsets, start.means, start.factor),
            lambda m: (m.S0, m.S1, m.S2, m.total, m.mass),
        ),
    )  # fmt: skip
    for model in (
        gk.GaussianMixture(2, solver=gk.Adam(), **few).fit(points()),
        gk.GaussianMixture(2, penalty=gk.penalties.Dirichlet(2.0), max_iter=9).fit(x),
        gk.GaussianMixture(2).partial_fit(points()),
        gk.GaussianMixture.from_mixture(start),
        gk.BayesianGaussianMixture(n_components=2, **few).fit(points()),
    ):
        yield model, lambda m: (m.score_samples(points()), m.sample(5)[0], m.get_params().keys(), m.fit(x).means_)


def flat(value):
    if isinstance(value, dict):
        return [part for item in value.values() for part in flat(item)]
    if isinstance(value, (list, tuple)):
        return [part for item in value for part in flat(item)]
    return [np.asarray(value.detach() if isinstance(value, torch.Tensor) else value)]


@pytest.mark.filterwarnings("ignore::gmmkeops.ConvergenceWarning", "ignore::gmmkeops.bayes.SamplingWarning")
@pytest.mark.parametrize("make_copy", COPIES[:2])
def test_everything_else_is_copied(make_copy):
    for original, use in objects():
        # The copy is used first: using the original must not be what makes it work.
        twin = make_copy(original)
        found, expected = flat(use(twin)), flat(use(original))
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert np.array_equal(a, b), type(original).__name__


FORK = r"""
import os, signal, sys, time, warnings
import numpy as np, torch, gmmkeops as gk

warnings.simplefilter("ignore")
torch.set_num_threads(2)
rng = np.random.default_rng(5)
X = np.r_[rng.normal(size=(20000, 3)), 4 + rng.normal(size=(20000, 3))]
x = torch.from_numpy(X)
start = gk.initialize(x, 3)
source = gk.Source.of(X, chunk_rows=9000)
unused = gk.Source.of(X, chunk_rows=9000)
model = gk.GaussianMixture(2, max_iter=2).fit(X)
straight = gk.fit(start, x, gk.EM(), max_iter=2, tol=0).mixture
gk.fit(start, source, gk.EM(), max_iter=2, tol=0)
(x @ torch.ones(3, 500, dtype=torch.float64)).exp().sum()  # torch's own threads have worked
with_keops = sys.argv[1] == "keops"
if with_keops:
    gk.fit(start, x[:2000], gk.EM(), max_iter=1, backend="keops")

def same(mixture):
    assert (mixture.means - straight.means).abs().max() < 1e-9

calls = {
    "log_prob": lambda: start.log_prob(x),
    "sample": lambda: start.sample(100_000),
    "initialize": lambda: gk.initialize(x, 3),
    "fit": lambda: same(gk.fit(start, x, gk.EM(), max_iter=2, tol=0).mixture),
    "dense fit": lambda: same(gk.fit(start, x, gk.EM(), max_iter=2, tol=0, backend="dense").mixture),
    "Adam": lambda: gk.fit(start, x, gk.Adam(batch_size=20000), max_iter=1),
    "used source": lambda: same(gk.fit(start, source, gk.EM(), max_iter=2, tol=0).mixture),
    "new source": lambda: same(gk.fit(start, unused, gk.EM(), max_iter=2, tol=0).mixture),
    "survey": lambda: gk.Source.of(X).survey(),
    "estimator": lambda: model.set_params(warm_start=True).fit(X).predict(X),
    "score": lambda: model.score(X),
}

def refused():
    try:
        gk.fit(start, x[:2000], gk.EM(), max_iter=1, backend="keops")
    except RuntimeError as error:
        assert "forked" in str(error) and "backend='dense'" in str(error), error
    else:
        raise AssertionError("KeOps ran")
    gk.fit(start, x[:2000], gk.EM(), max_iter=1, backend="dense")

if with_keops:
    calls = {"keops": refused, "dense fit": calls["dense fit"]}
wrong = []
for name, call in calls.items():
    child = os.fork()
    if child == 0:
        code = 1
        try:
            call()
            code = 0
        finally:
            os._exit(code)
    end = time.monotonic() + 60
    done = 0
    while not done and time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    if not done:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        wrong.append(f"{name} hangs")
    elif status:
        wrong.append(f"{name} fails")
assert torch.get_num_threads() == 2, "the parent keeps its threads"
print(wrong)
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork on this system")
@pytest.mark.parametrize("engine", ["dense", pytest.param("keops", marks=pytest.mark.keops)])
def test_a_forked_process_computes(engine):
    if engine == "keops":
        pytest.importorskip("pykeops")
    done = subprocess.run([sys.executable, "-c", FORK, engine], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_where_it_would_be_written(tmp_path, dtype):
    full = gk.Mixture.from_parameters([0.4, 0.6], [[0.0, 1.0], [3.0, 2.0]], [1.0, 4.0], "spherical")
    half = full.to(dtype)
    with pytest.raises(ValueError, match=r"^save writes float32 and float64 mixtures, got torch\.b?float16; .*\.$"):
        gk.save(half, tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []
    for kind in (torch.float32, torch.float64):
        gk.save(full.to(kind), tmp_path / "m.safetensors")
        assert torch.equal(gk.load(tmp_path / "m.safetensors").means, full.means.to(kind))
