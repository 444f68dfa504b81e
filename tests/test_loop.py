"""The loop of a fit: callbacks, interruptions, divergence, the progress bar, and every way to end."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from conftest import blobs, random_mixture

import gmmkeops as gk
from gmmkeops.fitting import Ending


def test_callbacks_see_and_stop():
    x = blobs()
    seen = []

    def watch(step):
        seen.append(step.iteration)
        expected = -step.mixture.log_prob(x.double()).mean()
        assert abs(float(expected) - step.objective) < 1e-5
        return step.iteration == 4

    result = gk.fit(gk.initialize(x, 3), x, gk.Adam(), callback=[watch], max_iter=50)
    assert seen == [0, 1, 2, 3, 4]
    assert result.n_iter == 5


def test_interrupt_returns_the_best_so_far(caplog):
    x = blobs()

    def interrupt(step):
        if step.iteration == 3:
            raise KeyboardInterrupt

    with caplog.at_level(logging.INFO, logger="gmmkeops"):
        result = gk.fit(gk.initialize(x, 3), x, gk.Adam(), callback=interrupt, max_iter=50)
    assert result.report.interrupted
    assert result.objective == min(result.history["objective"])
    assert "interrupted after 4 iterations" in caplog.text


def test_divergence_returns_the_best_with_a_warning():
    x = blobs()
    with pytest.warns(gk.ConvergenceWarning, match="became infinite or NaN"):
        result = gk.fit(gk.initialize(x, 3), x, gk.Gradient(lambda p: torch.optim.SGD(p, lr=1e300)), max_iter=20)
    assert math.isfinite(result.objective)
    assert bool(torch.isfinite(result.mixture.means).all())


def test_no_iterations_look_at_the_start():
    x = blobs().double()
    start = gk.initialize(x, 3)
    for method in (gk.Adam(), gk.EM()):
        result = gk.fit(start, x, method, max_iter=0)
        assert result.n_iter == 0
        assert torch.allclose(result.mixture.means, start.means)
        assert abs(result.log_likelihood - float(start.log_prob(x).mean())) < 1e-12


def test_progress_bar(capsys):
    x = blobs()
    gk.fit(gk.initialize(x, 2), x, gk.Adam(), max_iter=3, verbose=True)
    shown = capsys.readouterr().err
    assert "objective=" in shown
    assert "active=2" in shown
    assert "3/3" in shown
    gk.fit(gk.initialize(x, 2), x, gk.Adam(), max_iter=3)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.fixture(scope="module")
def data():
    truth = random_mixture("full", K=3, D=2)
    x = truth.sample((600,), generator=torch.Generator().manual_seed(0))
    return gk.initialize(x, 3, "random"), x


def test_ends_of_fits(data):
    start, x = data
    assert gk.fit(start, x, gk.EM(), max_iter=2000).ending is Ending.CONVERGED
    with pytest.warns(gk.ConvergenceWarning, match="infinite or NaN"):
        diverged = gk.fit(start, x, gk.Gradient(lambda p: torch.optim.SGD(p, lr=1e9)), max_iter=30)
    assert diverged.ending is Ending.DIVERGED

    def press(step):
        if step.iteration == 1:
            raise KeyboardInterrupt

    interrupted = gk.fit(start, x, gk.EM(tol=0), callback=press)
    assert interrupted.ending is Ending.INTERRUPTED
    assert interrupted.ending == "interrupted"
    assert interrupted.report.interrupted


def test_the_bar_of_a_converged_fit_is_complete(data, monkeypatch):
    """A notebook shows a bar that ends early in red."""
    import tqdm.auto

    bars = []

    class Bar(tqdm.auto.tqdm):
        def close(self):
            bars.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    start, x = data
    result = gk.fit(start, x, gk.EM(), max_iter=2000, verbose=True)
    assert bars[0] == (result.n_iter, result.n_iter)
