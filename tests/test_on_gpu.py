"""Fits on a real GPU: every method, streams, chunks, candidate lists, several processes and the command line."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import needs_cuda

import gmmkeops as gk
from gmmkeops.components import transfer_memory

pytestmark = [*needs_cuda, pytest.mark.filterwarnings("ignore::gmmkeops.ConvergenceWarning")]


def points(N=30_000, D=3, K=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    means = 5 * torch.randn(K, D, generator=generator, dtype=torch.float64)
    return (means[torch.arange(N) % K] + torch.randn(N, D, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.fixture(scope="module")
def start():
    return gk.initialize(points(), 4, generator=0)


def close(found, expected, tolerance):
    torch.testing.assert_close(
        torch.tensor(found.history["objective"]),
        torch.tensor(expected.history["objective"]),
        rtol=tolerance,
        atol=tolerance,
    )


METHODS = {
    "em": gk.EM(tol=0),
    "hard": gk.EM(assignment="hard", tol=0),
    "accelerated": gk.EM(accelerate=True, tol=0),
    "adam": gk.Adam(tol=0),
    "natural": gk.Adam(natural_gradient=True, lr=0.3, tol=0),
}


def test_numbers_between_the_devices_are_in_memory_that_is_used_again():
    for device, size, locked in (("cuda", 1000, True), ("cuda", 1 << 23, False), ("cpu", 1000, False)):
        assert transfer_memory((size,), torch.device(device)).is_pinned() == locked


@pytest.mark.parametrize("name", METHODS)
def test_methods_equal_those_on_the_cpu(name, start):
    x = points()
    found = gk.fit(start.to("cuda"), x.cuda(), METHODS[name], max_iter=6, generator=1)
    assert found.mixture.means.is_cuda
    close(found, gk.fit(start, x, METHODS[name], max_iter=6, generator=1), 2e-5)


@pytest.mark.parametrize(
    "method",
    [
        gk.EM(assignment="stochastic", tol=0),
        gk.EM(temperature=(0.5, 3), tol=0),
        gk.EM(batch_size=4000, tol=0),
        gk.Adam(batch_size=4000, tol=0),
        gk.EM(refine=True, tol=0),
    ],
    ids=["stochastic", "annealed", "stepwise", "minibatches", "refine"],
)
def test_methods_with_random_numbers(method, start):
    """Random numbers differ between devices; the same seed gives the same bits on one."""
    x = points()
    first, second = (gk.fit(start.to("cuda"), x.cuda(), method, max_iter=4, generator=1) for _ in range(2))
    assert first.history["objective"] == second.history["objective"]
    expected = gk.fit(start, x, method, max_iter=4, generator=1)
    assert first.log_likelihood == pytest.approx(expected.log_likelihood, abs=0.05)


def test_penalties_and_weights(start):
    x, g = points(), torch.rand(30_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.1
    penalty = gk.penalties.SqrtWeights(0.02) + gk.penalties.NormalMean(0.0, 3.0) + gk.penalties.InverseWishart(0.7, 5.0)
    settings = {"penalty": penalty, "max_iter": 6}
    found = gk.fit(start.to("cuda"), x.cuda(), gk.EM(tol=0), sample_weight=g.cuda(), **settings)
    close(found, gk.fit(start, x, gk.EM(tol=0), sample_weight=g, **settings), 2e-5)


def test_many_parameters_of_adam(start, monkeypatch):
    """Many parameters are on the device, where one kernel performs the step of Adam."""
    from gmmkeops.fitting import method as module

    monkeypatch.setattr(module, "_FEW", 1)
    x = points()
    found = gk.fit(start.to("cuda"), x.cuda(), gk.Adam(tol=0), max_iter=6)
    close(found, gk.fit(start, x, gk.Adam(tol=0), max_iter=6), 2e-5)


def test_variational_bayes(start):
    x = points()
    found = gk.fit(start.to("cuda"), x.cuda(), gk.bayes.VariationalBayes(tol=0), max_iter=6)
    close(found, gk.fit(start, x, gk.bayes.VariationalBayes(tol=0), max_iter=6), 2e-5)


@pytest.mark.parametrize("method", ["em", "adam"])
def test_candidate_lists(method):
    generator = torch.Generator().manual_seed(0)
    angle = 2 * torch.pi * torch.rand(60_000, generator=generator, dtype=torch.float64)
    height = torch.randn(60_000, generator=generator, dtype=torch.float64)
    x = torch.stack([angle.cos(), angle.sin(), 3 * height], 1)
    x = (x + 0.01 * torch.randn(x.shape, generator=generator, dtype=torch.float64)).float()
    start = gk.initialize(x, 200, "random_from_data", generator=0)
    there = start.to("cuda")
    found = gk.fit(there, x.cuda(), METHODS[method], max_iter=6, truncate=1e-6)
    assert found.report.evaluated_fraction < 0.7
    assert found.report.certificate <= 1.01e-6
    close(found, gk.fit(there, x.cuda(), METHODS[method], max_iter=6, truncate=0), 1e-4)


def test_files_are_read_in_chunks(start, tmp_path):
    """The chunks are copied from page-locked memory while the kernels of the previous one run."""
    x = points(N=200_000)
    np.save(tmp_path / "x.npy", x.numpy())
    source = gk.Source.of(tmp_path / "x.npy")
    found = gk.fit(start.to("cuda"), source, gk.EM(tol=0), max_iter=5)
    close(found, gk.fit(start, x, gk.EM(tol=0), max_iter=5), 2e-5)


def test_estimators(tmp_path):
    x = points()
    model = gk.GaussianMixture(4, random_state=0, device="cuda").fit(x.numpy())
    other = gk.GaussianMixture(4, random_state=0).fit(x.numpy())
    assert model.score(x.numpy()) == pytest.approx(other.score(x.numpy()), abs=1e-4)
    labels = torch.as_tensor(model.predict(x.numpy()))
    # Components may have another order.
    assert len(torch.unique(torch.stack([labels, torch.as_tensor(other.predict(x.numpy()))]), dim=1)[0]) < 12
    samples, _ = model.sample(100)
    assert len(samples) == 100


def test_densities_of_a_mixture_that_changes(start):
    """Copies of parameters are not used after a change in place."""
    x, mixture = points().cuda(), start.to("cuda")
    before = mixture.log_prob(x)
    with torch.no_grad():
        mixture.means.data.add_(0.5)
    after = mixture.log_prob(x)
    torch.testing.assert_close(after.cpu(), mixture.to("cpu").log_prob(x.cpu()), rtol=1e-5, atol=1e-5)
    assert float((after - before).abs().max()) > 0.1


def test_gradients_of_losses(start):
    """The gradients of a total and of a mean of log-densities equal those on the CPU, for parameters and points."""
    x, found = points(N=2000), {}
    for device in ("cpu", "cuda"):
        there = start.to(device)
        leaves = [
            part.detach().clone().requires_grad_()
            for part in (there.logits, there.means, *there.factor.tensors.values())
        ]
        rows = x.to(device, copy=True).requires_grad_()
        mixture = gk.Mixture(leaves[0], leaves[1], gk.FullFactor(*leaves[2:]))
        (-mixture.log_prob(rows).mean()).backward()
        again = gk.Mixture(leaves[0], leaves[1], gk.FullFactor(*leaves[2:]))
        (-gk.reductions.total(rows.detach(), again.offsets, again.means, again.factor) / 3e3).backward()
        found[device] = [part.grad.cpu() for part in (*leaves, rows)]
    for own, expected in zip(found["cuda"], found["cpu"], strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6)


def environment():
    """The package may not be installed."""
    paths = [str(Path(gk.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def ranks(count, script, folder, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)),
        *("--master-addr", "127.0.0.1", "--master-port", str(port), *script, *map(str, arguments)),
    ]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


SCRIPT = """
import sys
import torch, torch.distributed as dist
import gmmkeops as gk

gk.distributed.join()
start = gk.load("start.safetensors").to("cuda")
result = gk.fit(start, "x.npy", gk.EM(tol=0), max_iter=5)
if dist.get_rank() == 0:
    print("RESULT", dist.get_backend(), dist.get_world_size(), result.history["objective"][-1])
dist.destroy_process_group()
"""


@pytest.mark.parametrize(("count", "backend"), [(1, "nccl"), (2, "gloo")])
def test_processes_on_one_gpu(count, backend, start, tmp_path):
    """One process a device uses NCCL; two that share one use gloo."""
    x = points()
    np.save(tmp_path / "x.npy", x.numpy())
    gk.save(start, tmp_path / "start.safetensors")
    (tmp_path / "script.py").write_text(SCRIPT)
    (line,) = [line for line in ranks(count, ["script.py"], tmp_path).splitlines() if line.startswith("RESULT")]
    _, name, size, value = line.split()
    assert (name, int(size)) == (backend, count)
    assert float(value) == pytest.approx(gk.fit(start, x, gk.EM(tol=0), max_iter=5).history["objective"][-1], abs=2e-5)


def test_the_command_line(tmp_path):
    np.save(tmp_path / "x.npy", points().numpy())
    command = [sys.executable, "-m", "gmmkeops.cli"]
    fit = ["fit", "x.npy", "-k", "4", "--device", "cuda", "--out", "m.safetensors", "--quiet"]
    for arguments in (fit, ["score", "m.safetensors", "x.npy"], ["doctor"]):
        done = subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert gk.load(tmp_path / "m.safetensors").n_components == 4
