"""EM steps on a GPU, several a call: equal to steps one at a time, on the simulated device and on a real one."""

from __future__ import annotations

import contextlib

import fake_keops
import pytest
import torch
from conftest import needs_cuda
from fake_device import fake_device, on_device

import gmmkeops as gk
from gmmkeops import reductions
from gmmkeops.fitting import ordinary
from gmmkeops.reductions import host_steps

pytestmark = [
    pytest.mark.skipif(reductions.native_unavailable() is not None, reason="the library is not compiled"),
    pytest.mark.filterwarnings("ignore::gmmkeops.ConvergenceWarning", "ignore:Triton is the faster engine here"),
]

FAMILIES = ("full", "tied", "diag", "spherical")


def clusters(seed=0, D=3, K=3, N=600):
    generator = torch.Generator().manual_seed(seed)
    means = 4 * torch.randn(K, D, generator=generator, dtype=torch.float64)
    x = means[torch.arange(N) % K] + torch.randn(N, D, generator=generator, dtype=torch.float64)
    return x, torch.rand(N, generator=generator, dtype=torch.float64) + 0.1


def start_of(x, family, K=3):
    """A mixture whose means are a few points; EM needs many iterations from it."""
    D = x.shape[1]
    covariance = {
        "full": torch.eye(D).expand(K, D, D),
        "tied": torch.eye(D),
        "diag": torch.ones(K, D),
        "spherical": torch.ones(K),
    }[family]
    return gk.Mixture(
        weights=torch.ones(K) / K, means=x[:K] + 0.5, covariances=covariance.double(), covariance_type=family
    )


@contextlib.contextmanager
def simulated(monkeypatch, folder):
    """A simulated device without KeOps."""
    with fake_device(monkeypatch) as counts:
        fake_keops.install(monkeypatch, folder, reason="there is none on a device that does not exist")
        yield counts


def one_by_one(monkeypatch):
    """Let fits perform one step a call."""
    monkeypatch.setattr(ordinary.Block, "of", lambda *_, **__: None)


def observed(monkeypatch):
    """A list of the numbers of steps of each call for points on a device."""
    found, own = [], host_steps._on_device

    def spy(*arguments, **options):
        steps = own(*arguments, **options)
        found.append(None if steps is None else len(steps))
        return steps

    monkeypatch.setattr(host_steps, "_on_device", spy)
    return found


def results(result):
    return [
        result.history["objective"],
        result.history["log_likelihood"],
        # Another pass adds the terms in another order.
        pytest.approx(result.objective, rel=1e-14),
        *(part.cpu().tolist() for part in (result.mixture.weights, result.mixture.means, result.mixture.covariances)),
    ]


OPTIONS = {
    "soft": {},
    "hard": {"assignment": "hard"},
    "weights": {"sample_weight": True},
    "float32": {"dtype": "float32"},
    "frozen": {"frozen_means": True},
    "prior": {"penalty": gk.penalties.InverseWishart(0.7, 5.0)},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OPTIONS)
def test_blocks_of_steps_equal_steps_one_at_a_time(monkeypatch, tmp_path, name, family):
    x, g = clusters()
    options = dict(OPTIONS[name])
    method = {each: options.pop(each) for each in ("assignment", "frozen_means") if each in options}
    with simulated(monkeypatch, tmp_path):
        if "sample_weight" in options:
            options["sample_weight"] = on_device(g)
        start, there, calls = start_of(x, family).to("cuda"), on_device(x), observed(monkeypatch)
        fit = lambda: gk.fit(start, there, gk.EM(tol=0.0, **method), max_iter=11, backend="dense", **options)  # noqa: E731
        own = fit()
        assert calls == [4, 4, 4], "eleven iterations, and the evaluation of the result"
        assert own.mixture.means.is_cuda
        found = results(own)
        one_by_one(monkeypatch)
        assert results(fit()) == found
    on_cpu = gk.fit(
        start_of(x, family),
        x,
        gk.EM(tol=0.0, **method),
        max_iter=11,
        backend="dense",
        **options | ({"sample_weight": g} if "sample_weight" in options else {}),
    )
    rtol = 1e-4 if "dtype" in options else 1e-9
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(results(on_cpu)[0]), rtol=rtol, atol=rtol)


def test_a_step_that_is_not_ordinary_ends_a_block(monkeypatch, tmp_path):
    """A component far from all points is pruned by a step in torch; the next steps are tried one at a time for a while."""
    x, _ = clusters()
    first = start_of(x, "full")
    means = torch.cat([first.means, torch.full((1, 3), 60.0, dtype=torch.float64)])
    start = gk.Mixture(
        weights=torch.ones(4) / 4,
        means=means,
        covariances=torch.eye(3).double().expand(4, 3, 3),
        covariance_type="full",
    )
    with simulated(monkeypatch, tmp_path):
        calls = observed(monkeypatch)
        fit = lambda: gk.fit(start.to("cuda"), on_device(x), gk.EM(tol=0.0), max_iter=14, backend="dense")  # noqa: E731
        own = fit()
        # Eight steps follow one at a time, and blocks after them.
        assert calls == [0, 6]
        assert own.history["active"] == [4] + [3] * 13
        one_by_one(monkeypatch)
        assert results(fit()) == results(own)


def test_a_climb_ends_at_its_tolerance(monkeypatch, tmp_path):
    """The steps of one call end as those of several calls do."""
    x, g = clusters()
    with simulated(monkeypatch, tmp_path):
        there, start = gk.data.Batch(on_device(x), on_device(g)), start_of(x, "full")
        settings = reductions.StepSettings(float(g.sum()), torch.full((3,), 1e-6, dtype=torch.float64), 1e-12, -1.0)

        def steps(**options):
            return reductions.em_steps(
                there, start.logits, start.means, start.factor, settings, backend="dense", **options
            )

        all_of_them = steps(limit=30)
        values = [
            cost - total / settings.mass for cost, total in zip(all_of_them.costs, all_of_them.totals, strict=True)
        ]
        tolerance = 1e-4
        ends = next(t for t in range(1, 30) if values[t - 1] - values[t] < tolerance)
        assert 1 < ends < 29
        found = steps(limit=30, tolerance=tolerance)
        assert len(found) == ends + 1
        assert found.totals == all_of_them.totals[: ends + 1]
        relative = steps(limit=30, tolerance=0.0, relative=tolerance / abs(values[ends]))
        assert ends - 1 <= len(relative) <= ends + 2
        assert relative.totals == all_of_them.totals[: len(relative)]
        assert len(steps(limit=0)) == 0


def test_fits_resume_in_the_middle_of_a_block(monkeypatch, tmp_path):
    x, _ = clusters()
    with simulated(monkeypatch, tmp_path):
        start, there = start_of(x, "full").to("cuda"), on_device(x)
        fit = lambda n, **options: gk.fit(start, there, gk.EM(tol=0.0), max_iter=n, backend="dense", **options)  # noqa: E731
        whole = fit(9)
        saved = gk.Checkpoint(tmp_path / "fit.ckpt", every=0)
        fit(6, checkpoint=saved)
        assert results(fit(9, checkpoint=saved)) == results(whole)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("D", [2, 3, pytest.param(16, id="products"), pytest.param(40, id="digits")])
@pytest.mark.parametrize("backend", ["dense", pytest.param("triton", marks=needs_cuda)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.gpu
def test_steps_on_a_real_device(monkeypatch, family, D, backend, dtype):
    x, g = clusters(D=D, K=20, N=4000)
    x, start = x.to(dtype), start_of(x, family, K=20)
    fit = lambda there, **options: gk.fit(  # noqa: E731
        start.to(there), x.to(there), gk.EM(tol=0.0, reg_covar=0.01), sample_weight=g.to(there), max_iter=8, **options
    )
    calls = observed(monkeypatch)
    own, expected = fit("cuda", backend=backend), fit("cpu", backend="dense")
    assert sum(calls) >= 9
    rtol = 1e-4 if dtype == torch.float32 else 1e-8
    torch.testing.assert_close(
        torch.tensor(own.history["objective"]), torch.tensor(expected.history["objective"]), rtol=rtol, atol=rtol
    )
