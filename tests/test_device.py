"""Tensors on a device: every public path on a fake one, which tells where CUDA would refuse and what it would wait for."""

from __future__ import annotations

import warnings

import fake_keops
import pytest
import torch
from conftest import make_case
from device_paths import PATHS, Scene, generator
from fake_device import fake_device, on_device

import gmmkeops as gk
from gmmkeops.reductions.triton import loading

DRAWING = ("initialize_a_family", "variants_of_em", "variational", "samples", "comparison", "posterior_and_predictive")


@pytest.mark.filterwarnings(
    "ignore:Triton is the faster engine here",
    "ignore::gmmkeops.ConvergenceWarning",
    "ignore::gmmkeops.DegenerateWarning",
    "ignore::gmmkeops.bayes.SamplingWarning",
)
@pytest.mark.parametrize(
    ("name", "deterministic"),
    # Draws and cumulative sums are computed in another way under deterministic algorithms, so that these paths run both ways.
    [*((name, True) for name in PATHS), *((name, False) for name in PATHS if name.split("[")[0] in DRAWING)],
    indirect=["deterministic"],
)
def test_path(monkeypatch, tmp_path, name, deterministic):
    with fake_device(monkeypatch):
        # Without KeOps, of which the fake device has none; some paths have a stand-in.
        fake_keops.install(monkeypatch, tmp_path, reason="there is none on a device that does not exist")
        PATHS[name](Scene(tmp_path))


@pytest.mark.filterwarnings("ignore:Triton is the faster engine here")
def test_generators_of_the_host_decide_on_the_device(monkeypatch, tmp_path):
    with fake_device(monkeypatch):
        scene = Scene(tmp_path)
        draw = lambda source: scene.mixture.sample((20,), generator=source).cpu()  # noqa: E731
        source = generator(3)
        first, second = draw(source), draw(source)
        assert torch.equal(first, draw(generator(3)))
        assert not torch.equal(first, second)
        assert not torch.equal(first, draw(generator(4)))
        for function in (
            lambda g: gk.analysis.kl_divergence(
                scene.mixture, scene.mixture.marginal([1, 0, 2]), samples=100, generator=g
            ),
            lambda g: gk.analysis.silhouette(scene.x, scene.mixture.predict(scene.x), samples=50, generator=g),
        ):
            assert function(generator(5)) == function(generator(5))
            assert function(generator(5)) != function(generator(6))


@pytest.mark.filterwarnings("ignore:Triton is the faster engine here")
@pytest.mark.parametrize("deterministic", [False, True], indirect=True)
def test_draws_follow_the_weights(monkeypatch, deterministic):
    logits = torch.tensor([0.1, 0.0, 0.6, 0.3, 0.0], dtype=torch.float64).log()
    means = torch.arange(5.0, dtype=torch.float64)[:, None]
    with fake_device(monkeypatch):
        factor = gk.SphericalFactor.from_covariances(torch.full((5,), 1e-6, dtype=torch.float64), features=1).to("cuda")
        mixture = gk.Mixture(on_device(logits.clamp(min=-1e4)), on_device(means), factor)
        _, labels = mixture.sample((20_000,), return_labels=True, generator=generator())
        shares = labels.cpu().bincount(minlength=5) / 20_000
        # Stochastic EM gives every point to one component, drawn by its responsibilities.
        flat = gk.Mixture(mixture.logits, on_device(0 * means), factor)
        x = on_device(torch.zeros(20_000, 1, dtype=torch.float64))
        arguments = (x, flat.offsets, flat.means, flat.factor)
        counts = gk.reductions.moments(*arguments, assignment="stochastic", seed=1).S0.cpu()
    for found in (shares, counts / 20_000):
        # Five standard deviations of a share.
        assert float((found - logits.exp()).abs().max()) < 5 * (0.25 / 20_000) ** 0.5
        assert found[1] == found[4] == 0


@pytest.mark.filterwarnings("ignore:Triton is the faster engine here")
def test_rows_are_drawn_on_their_device(monkeypatch):
    x = torch.randn(50_000, 2, generator=generator(), dtype=torch.float64)
    weights = torch.rand(50_000, generator=generator(1), dtype=torch.float64) ** 4
    for g in (None, weights):
        on_host = gk.initialize(x, 4, "kmeans++", sample_weight=g, generator=generator(), n_init=1, backend="dense")
        with fake_device(monkeypatch) as counts:
            points, mass = on_device(x), None if g is None else on_device(g)
            # The same numbers on the device as on the host.
            source = torch.Generator("cuda")
            source.set_state(generator().get_state())
            counts.clear()
            there = gk.initialize(
                points, 4, "kmeans++", sample_weight=mass, generator=source, n_init=1, backend="dense"
            ).to("cpu")
            # Parameters of reductions are validated on the host.
            copied = sum(
                n
                for (what, where), n in counts.synchronizations.items()
                if what == "copy to the host" and not where.startswith("components/transfer.py")
            )
        assert copied <= 4
        assert torch.allclose(there.means, on_host.means)
        assert torch.allclose(there.weights, on_host.weights)


def test_every_fallback_of_an_engine_is_said_once(monkeypatch, tmp_path):
    case = make_case("full", torch.float32, condition=10.0)
    for number in (1, 2):
        missing = [f"{name} is not installed, try {number}" for name in ("triton", "pykeops")]
        with fake_device(monkeypatch):
            monkeypatch.setattr(loading, "unavailable", lambda device, reason=missing[0]: reason)
            fake_keops.install(monkeypatch, tmp_path, reason=missing[1])
            arguments = [on_device(value) for value in (case.x, case.offsets, case.means, case.factor.U)]
            with pytest.warns(UserWarning, match=f"Triton is the faster engine here but {missing[0]}; using the dense"):
                values = gk.reductions.logsumexp(*arguments)
            with pytest.warns(UserWarning, match=f"KeOps was requested but {missing[1]}; using the dense engine"):
                same = gk.reductions.logsumexp(*arguments, backend="keops")
            assert torch.equal(values.cpu(), same.cpu())
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                for backend in ("auto", "keops", "triton"):
                    gk.reductions.moments(*arguments, backend=backend)
