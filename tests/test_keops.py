"""The KeOps engine's own matters: padding rows, memory of partial sums, streams and devices of CUDA."""

from __future__ import annotations

import subprocess
import sys
import warnings
import weakref
from types import SimpleNamespace

import fake_keops
import pytest
import torch
from conftest import ENGINES, HAS_KEOPS, make_case
from fake_device import fake_device, on_device
from torch.utils._python_dispatch import TorchDispatchMode

from gmmkeops import reductions
from gmmkeops.reductions.keops import loading as _keops

KEOPS = [engine for engine in ENGINES if engine.values[0][0] == "keops"]


def assert_equal_moments(found, expected, tolerance):
    for name in ("S0", "S1", "S2", "total"):
        want = getattr(expected, name)
        assert torch.isfinite(getattr(found, name)).all(), name
        assert float((getattr(found, name) - want).abs().max()) <= tolerance * float(want.abs().max()), name


@pytest.mark.parametrize("engine", KEOPS)
@pytest.mark.parametrize(
    ("dtype", "family", "scale"),
    [(torch.float32, "full", 1e-15), (torch.float64, "full", 1e-106), (torch.float32, "tied_diag", 1e-14)],
)
def test_padding_rows_of_narrow_components_add_nothing(engine, dtype, family, scale):
    # Batches of 2732 rows leave one over: padding, which lies at the origin, where the densities of these components overflow.
    backend, device = engine
    case = make_case(family, torch.float64, N=8195, condition=10.0)
    x = (scale * (case.x - case.means[2])).to(dtype)
    offsets = case.offsets - 3 * torch.tensor(scale, dtype=torch.float64).log()
    means, U = scale * (case.means - case.means[2]), case.factor.U / scale
    weights = 0.5 + torch.rand(len(x), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = reductions.moments(x.double(), offsets, means, U, weights=weights, backend="dense")
    arguments = [value.to(device) for value in (x, offsets, means, U)]
    found = reductions.moments(*arguments, weights=weights.to(device), backend=backend)
    for name in ("S0", "S1", "S2", "total"):
        value, want = getattr(found, name).cpu(), getattr(expected, name)
        assert torch.isfinite(value).all(), name
        assert float((value - want).abs().max()) < (1e-4 if dtype == torch.float32 else 1e-9) * float(want.abs().max())
    assert abs(float(found.S0.sum() / weights.sum()) - 1) < 1e-5


class LiveMemory(TorchDispatchMode):
    """The most bytes that tensors made in this context have held at one time."""

    def __init__(self):
        super().__init__()
        self.live, self.most, self.known = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    size = self.known[storage.data_ptr()] = storage.nbytes()
                    self.live += size
                    self.most = max(self.most, self.live)
                    weakref.finalize(storage, self.free, storage.data_ptr(), size)
        return out

    def free(self, pointer, size):
        if self.known.pop(pointer, None) is not None:
            self.live -= size


@pytest.mark.parametrize(("N", "K", "D"), [(3_000_000, 10_000, 1), (5000, 90_000, 8)])
def test_partial_sums_of_moments_take_little_memory(monkeypatch, tmp_path, N, K, D):
    # Reductions give zeros at once: only the memory around them is looked at. All partial sums at once would take 260 and 97 MB.
    outputs = []
    fake_keops.install(monkeypatch, tmp_path, computes=False, watch=lambda out: outputs.append(out.numel()))
    x, means, U = torch.zeros(N, D), torch.zeros(K, D), torch.ones(1, D, D)
    with LiveMemory() as memory:
        sums = reductions.moments(x, torch.zeros(K), means, U, backend="keops", truncate=0)
    assert sums.S2.shape == (K, D, D)
    assert 12 * max(outputs[1:]) <= 1 << 26
    assert memory.most < (64 + 20) * 2**20 + 40 * x.numel() + 60 * sums.S2.numel()


def assert_equal_sums(found, expected, tolerance):
    for name in ("S0", "S1", "S2", "total"):
        value, want = getattr(found, name).cpu(), getattr(expected, name)
        assert float((value - want).abs().max()) <= tolerance * float(want.abs().max()), name


def test_moments_of_several_slabs_of_rows(monkeypatch, tmp_path):
    # On a GPU so few rows are cut into a thousand batches, whose sums take 83 MB.
    outputs = []
    case = make_case("full", torch.float64, N=2001, K=192, D=7, condition=10.0)
    weights = torch.rand(2001, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = reductions.moments(*case.arguments, weights=weights, backend="dense")
    with fake_device(monkeypatch):
        fake_keops.install(monkeypatch, tmp_path, watch=lambda out: outputs.append(out.numel()))
        arguments = on_device(case.x), on_device(case.offsets), on_device(case.means), on_device(case.factor.U)
        found = reductions.moments(*arguments, weights=on_device(weights), backend="keops")
        found = type(found)(
            *(part.cpu() for part in (found.S0, found.S1, found.S2, found.centers, found.total, found.mass))
        )
    assert len(outputs) == 3
    assert 12 * max(outputs) <= 1 << 26
    assert_equal_sums(found, expected, 1e-12)


def test_moments_of_several_slabs_of_components(monkeypatch, tmp_path):
    generator = torch.Generator().manual_seed(0)
    K, D = 50_000, 14
    x, means = (torch.randn(rows, D, generator=generator, dtype=torch.float64) for rows in (3, K))
    offsets = torch.randn(K, generator=generator, dtype=torch.float64)
    U = torch.eye(D, dtype=torch.float64) + 0.2 * torch.randn(1, D, D, generator=generator, dtype=torch.float64)
    fake_keops.install(monkeypatch, tmp_path)
    expected = reductions.moments(x, offsets, means, U, backend="dense", truncate=0)
    found = reductions.moments(x, offsets, means, U, backend="keops", truncate=0)
    # Every component's own sums, not only the largest.
    assert torch.allclose(found.S2, expected.S2, rtol=1e-9, atol=1e-12)
    assert_equal_sums(found, expected, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("engine", KEOPS)
def test_truncated_sweeps_of_several_slabs(engine):
    # Lists of 512 boxes hold more components than fit into one slab.
    backend, device = engine
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(300_000, 3, generator=generator)
    means = torch.rand(4000, 3, generator=generator)
    U = (8 + 8 * torch.rand(4000, 1, 1, generator=generator)) * (
        torch.eye(3) + 0.1 * torch.randn(4000, 3, 3, generator=generator)
    )
    offsets = torch.randn(4000, generator=generator)
    arguments = [value.to(device) for value in (x, offsets, means, U)]
    cloud = reductions.arrange(arguments[0], 4000, 1e-3)
    found = reductions.moments(cloud, *arguments[1:], backend=backend)
    assert 300_000 * 4000 * cloud.share / 586 * 10 * 12 > 1 << 26
    expected = reductions.moments(x, offsets, means, U, backend="dense", truncate=1e-3)
    assert_equal_sums(found, expected, 3e-3)
    values = reductions.logsumexp(cloud, *arguments[1:], backend=backend).cpu()
    assert float((values - reductions.logsumexp(x, offsets, means, U, truncate=1e-3)).abs().max()) < 2e-3


def test_keops_waits_for_torch_on_the_device_of_the_points(monkeypatch, tmp_path):
    events = []

    class Device:
        def __init__(self, device):
            self.device = torch.device(device)

        def __enter__(self):
            events.append(("enter", self.device))

        def __exit__(self, *failure):
            events.append(("leave", self.device))

    def stream(device=None):
        return SimpleNamespace(
            synchronize=lambda: events.append(("wait", torch.device(device), counts.totals["kernels"]))
        )

    case = make_case("full", torch.float32, N=300, condition=10.0)
    with fake_device(monkeypatch) as counts:
        monkeypatch.setattr(torch.cuda, "device", Device)
        # Operations of the default stream need no wait.
        monkeypatch.setattr(torch.cuda, "current_stream", stream)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: None)
        # The dense stand-in computes before it is seen; one that gives zeros is seen right after the call.
        watch = lambda out: events.append(("reduce", counts.totals["kernels"]))  # noqa: E731
        fake_keops.install(monkeypatch, tmp_path, computes=False, watch=watch)
        x, offsets, means, U = (on_device(v) for v in (case.x, case.offsets, case.means, case.factor.U))
        x = x.requires_grad_()
        reductions.logsumexp(x, offsets, means, U, backend="keops").sum().backward()
        reductions.moments(x.detach(), offsets, means, U, backend="keops")
        cloud = reductions.arrange(on_device(case.x.repeat(20, 1)), 5, 1e-3)
        reductions.logsumexp(cloud, offsets, means, U, backend="keops")
    reduced = [number for number, event in enumerate(events) if event[0] == "reduce"]
    assert len(reduced) >= 5
    depth = 0
    for number, event in enumerate(events):
        depth += {"enter": 1, "leave": -1}.get(event[0], 0)
        if event[0] == "reduce":
            assert depth == 1
            before = events[number - 1]
            # Only the memory of the result is made between the two.
            assert before[:2] == ("wait", torch.device("cuda:0"))
            assert event[1] - before[2] <= 1
    assert depth == 0


GOOD = (torch.zeros(4, 2), torch.zeros(3), torch.zeros(3, 2), torch.ones(3, 2))


def test_missing_keops_is_said_once_and_replaced(monkeypatch):
    monkeypatch.setitem(_keops._state, "reason", "pykeops is not installed (pip install pykeops)")
    monkeypatch.setattr(reductions.choice, "_told", set())
    with pytest.warns(UserWarning, match="KeOps was requested but pykeops is not installed"):
        values = reductions.logsumexp(*GOOD, backend="keops")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(values, reductions.logsumexp(*GOOD, backend="keops"))
        assert torch.equal(values, reductions.logsumexp(*GOOD))


@pytest.mark.keops
@pytest.mark.skipif(not HAS_KEOPS, reason="no pykeops")
def test_keops_is_quiet_and_leaves_the_environment_alone(tmp_path):
    code = """
import os, torch, gmmkeops as gk
before = dict(os.environ)
a = torch.zeros(4, 2), torch.zeros(3), torch.zeros(3, 2), torch.ones(3, 2)
gk.reductions.logsumexp(*a, backend="keops")
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
pid = os.fork()
if pid == 0:
    try:
        gk.reductions.logsumexp(*a, backend="keops")
    except RuntimeError as error:
        os._exit(0 if "'spawn'" in str(error) else 1)
    os._exit(2)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_a_compiler_without_a_shared_library_is_not_used_for_cuda(tmp_path, monkeypatch):
    """Compilers print the path of a library, or its name alone if there is none."""
    for said, refused in (("libstdc++.so", True), ("/usr/lib/libstdc++.so", False)):
        script = tmp_path / f"g++-{refused}"
        script.write_text(f'#!/bin/sh\ntest "$1" = -print-file-name=libstdc++.so && echo {said}\n')
        script.chmod(0o700)
        reason = _keops._without_shared_library(str(script))
        assert (reason is not None) == refused
        assert reason is None or f"{script} links the library of C++ statically" in reason
    for other in (str(tmp_path / "missing"), "g++ 'x", "  "):
        assert _keops._without_shared_library(other) is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert _keops._without_shared_library(f"{tmp_path}/g++-True -O1") is None
