"""What several test files share: a float64 oracle written out in full, random problems, and who can run where."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import signal
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.distributions import Distribution

import gmmkeops as gk

if not torch.cuda.is_available():
    # Triton's interpreter runs its kernels on the CPU. The variable must be set before Triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# For scripts in processes of their own, kB: ru_maxrss may be that of the process they were forked from.
PEAK = """
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""
HAS_KEOPS = importlib.util.find_spec("pykeops") is not None
FAMILIES = [f"{tied}{family}" for tied in ("", "tied_") for family in ("full", "diag", "spherical")]

needs_keops = [pytest.mark.keops, pytest.mark.skipif(not HAS_KEOPS, reason="pykeops is not installed")]
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
HAS_NATIVE = gk.reductions.native_unavailable() is None
needs_native = [pytest.mark.skipif(not HAS_NATIVE, reason="the native engine has not been compiled")]
needs_interpreter = [
    pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs on the CUDA device"),
]
needs_triton = [*needs_interpreter[:1], *needs_cuda]
ENGINES = [
    pytest.param(("native", "cpu"), id="native-cpu", marks=needs_native),
    pytest.param(("dense", "cpu"), id="dense-cpu"),
    pytest.param(("keops", "cpu"), id="keops-cpu", marks=needs_keops),
    pytest.param(("dense", "cuda"), id="dense-cuda", marks=needs_cuda),
    pytest.param(("keops", "cuda"), id="keops-cuda", marks=[*needs_keops, *needs_cuda]),
    pytest.param(("triton", "cuda"), id="triton-cuda", marks=needs_triton),
]
# Kernels of Triton, run by its interpreter.
INTERPRETED = pytest.param(("triton", "cpu"), id="triton-cpu", marks=needs_interpreter)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark tests by Triton's interpreter as slow: tied factors, and candidate lists except for one family."""
    for item in items:
        listed = "triton-cpu-lists" in item.name or ("too_short" in item.name and "triton-cpu" in item.name)
        tied = "[tied" in item.name and "triton-cpu" in item.name and "test_every_request" in item.name
        if tied or (listed and "test_every_request[full-dtype0" not in item.name):
            item.add_marker(pytest.mark.slow)


@dataclass
class Case:
    """Points and parameters of one family in one dtype, with everything about them worked out densely in float64."""

    x: torch.Tensor
    offsets: torch.Tensor
    means: torch.Tensor
    factor: gk.Factor

    @property
    def arguments(self):
        return self.x, self.offsets, self.means, self.factor

    def oracle(self, weights=None):
        x, c, mu = self.x.double(), self.offsets.double(), self.means.double()
        U = self.factor.to(torch.float64).matrices().expand(len(mu), -1, -1)
        z = x[:, None] - mu
        y = torch.einsum("kde,nkd->nke", U, z)
        e = c - 0.5 * y.square().sum(-1)
        values = e.logsumexp(1)
        g = torch.ones_like(values) if weights is None else weights.double()
        r = g[:, None] * (e - values[:, None]).exp()
        S2 = torch.einsum("nk,nkd,nke->kde", r, z, z)
        family = self.factor.family
        if family != "full":
            S2 = S2.diagonal(dim1=1, dim2=2)
        if family == "spherical":
            S2 = S2.sum(-1)
        P = U @ U.mT
        return {
            "e": e,
            "values": values,
            "S0": r.sum(0),
            "S1": torch.einsum("nk,nkd->kd", r, z),
            "S2": S2,
            "total": g @ values,
            "gradient": -torch.einsum("nk,kde,nke->nd", r, P, z),
        }


def without_rows(rows, weights, count):
    """A mask (count,) of the other rows, and weights (ones if None) that are zero at these."""
    mask = torch.ones(count, dtype=torch.bool)
    mask[rows] = False
    g = torch.ones(count, dtype=torch.float64) if weights is None else weights.clone()
    g[~mask] = 0
    return mask, g


def make_factor(covariance_type, K, D, condition, generator):
    """Random factors of such a condition number, each with a determinant of its own.

    Where all determinants are the same, a wrong log-determinant cancels and no test can see it.
    """
    kind, tied = gk.components.factor_class(covariance_type)
    lead = 1 if tied else K
    random = {"generator": generator, "dtype": torch.float64}
    log_eigenvalues = -math.log(condition) * torch.rand(lead, D, **random)
    if D > 1:
        log_eigenvalues[:, 0], log_eigenvalues[:, 1] = 0.0, -math.log(condition)
    log_eigenvalues += 1.4 * (torch.rand(lead, 1, **random) - 0.5)
    if kind is gk.FullFactor:
        Q, _ = torch.linalg.qr(torch.randn(lead, D, D, **random))
        return kind.from_factors(Q * (-0.5 * log_eigenvalues).exp()[:, None, :])
    if kind is gk.DiagonalFactor:
        return kind.from_covariances(log_eigenvalues.exp())
    return kind.from_covariances(log_eigenvalues[:, -1].exp(), features=D)


def make_case(covariance_type, dtype, *, N=300, K=5, D=3, condition=1e3, seed=0, shift=0.0, spread=2.0, device="cpu"):
    """Means of ``spread`` units, points around them, covariances of the given condition."""
    generator = torch.Generator().manual_seed(seed)
    random = {"generator": generator, "dtype": torch.float64}
    means = shift + spread * torch.randn(K, D, **random)
    factor = make_factor(covariance_type, K, D, condition, generator)
    labels = torch.randint(K, (N,), generator=generator)
    x = means[labels] + factor.unwhiten(torch.randn(N, D, **random), labels if factor.leading > 1 else labels * 0)
    offsets = torch.randn(K, **random) + factor.log_determinant()
    # The oracle must see the numbers that the engine sees, so they are rounded first.
    return Case(x.to(device, dtype), offsets.to(device, dtype), means.to(device, dtype), factor.to(device).to(dtype))


def spiral(N=10_000, K=30, seed=0):
    """The KeOps tutorial's data and start."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.linspace(0, 2 * math.pi, N + 1)[:-1]
    x = torch.stack((0.5 + 0.4 * (t / 7) * t.cos(), 0.5 + 0.3 * t.sin()), 1)
    x = x + 0.02 * torch.randn(N, 2, generator=generator)
    means = torch.rand(K, 2, generator=generator)
    return x, gk.Mixture(torch.ones(K), means, gk.FullFactor.from_factors(15 * torch.eye(2).expand(K, 2, 2)))


def random_mixture(covariance_type, K=4, D=2, dtype=torch.float64, seed=0, condition=10.0):
    generator = torch.Generator().manual_seed(seed)
    factor = make_factor(covariance_type, K, D, condition, generator).to(dtype)
    logits = torch.randn(K, generator=generator, dtype=torch.float64).to(dtype)
    return gk.Mixture(logits, 2 * torch.randn(K, D, generator=generator, dtype=torch.float64).to(dtype), factor)


def cloud(seed=0, N=300, K=3, D=2):
    rng = np.random.RandomState(seed)
    return torch.from_numpy(4 * rng.randn(K, D)[rng.randint(K, size=N)] + rng.randn(N, D))


def plain_start(x, K, family):
    """Points of the cloud, unit covariances, equal weights."""
    kind, tied = gk.components.factor_class(family)
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(len(x)))[:K]
    lead = 1 if tied else K
    zeros = torch.zeros(lead, x.shape[1], dtype=torch.float64)
    factor = kind(zeros) if kind is not gk.SphericalFactor else kind(zeros[:, :1], x.shape[1])
    return gk.Mixture(torch.zeros(K, dtype=torch.float64), x[rows], factor)


def rises(result):
    """Largest rise of the objective from one iteration to the next."""
    values = result.history["objective"] + [result.objective]
    return max([b - a for a, b in itertools.pairwise(values)], default=0.0)


def tutorial_spiral(N, seed):
    generator = torch.Generator().manual_seed(seed)
    t = torch.linspace(0, 2 * math.pi, N + 1)[:-1].double()
    x = torch.stack((0.5 + 0.4 * (t / 7) * t.cos(), 0.5 + 0.3 * t.sin()), 1)
    return x + 0.02 * torch.randn(N, 2, generator=generator, dtype=torch.float64)


def blobs(N=600, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0]])
    return centers[torch.randint(3, (N,), generator=generator)] + torch.randn(N, 2, generator=generator)


def batch_of(family, batch, K=3, D=2, seed=0):
    """A batch of mixtures, no two components of which are alike."""
    generator = torch.Generator().manual_seed(seed)
    number = math.prod(batch)
    factor = make_factor(family, max(1, number) * K, D, 10.0, generator)
    lead = 1 if family.startswith("tied") else K
    parts = {name: t.expand(max(1, number) * K, *t.shape[1:]) for name, t in factor.tensors.items()}
    parts = {name: t[: number * lead].reshape(*batch, lead, *t.shape[1:]) for name, t in parts.items()}
    draw = lambda *shape: torch.randn(*batch, *shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return gk.Mixture(draw(K), 2 * draw(K, D), factor.replace(**parts))


# Families by the names of Zuko.
ZUKO = [(family, tied) for family in ("full", "diagonal", "spherical") for tied in (False, True)]


def elongated_blobs(N=3000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0]])
    labels = torch.randint(3, (N,), generator=generator)
    return centers[labels] + torch.randn(N, 2, generator=generator) * torch.tensor([0.5, 1.0])


@pytest.fixture
def checks():
    """The default of torch for checks, as it was before the test; torch.compile changes it for good."""
    before = Distribution._validate_args
    yield
    Distribution.set_default_validate_args(before)


@pytest.fixture
def unchecked(checks):
    Distribution.set_default_validate_args(False)


@pytest.fixture
def deterministic(request):
    """The setting of torch's deterministic algorithms, put back afterwards."""
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


def interrupted(call, after):
    """Assert that Ctrl-C ends a call within a second; it is sent ``after`` seconds."""
    sent = []

    def interrupt():
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(after, interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        call()
    assert time.monotonic() - sent[0] < 1.0
