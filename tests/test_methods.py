"""The contract of methods, which a new one inherits by a line in the list METHODS."""

from __future__ import annotations

import copy
import itertools
import pickle
from dataclasses import dataclass

import pytest
import torch
from conftest import random_mixture

import gmmkeops as gk
from gmmkeops.fitting import Ending, Evaluation, Method


@dataclass(frozen=True)
class MeanShift(Method):
    """A method of this test: each mean moves to the mean of its points, all else stays. Its state is a mixture."""

    max_iter: int = 50
    tol: float = 1e-6
    relative_tol: float = 0.0
    patience: int = 1

    def init(self, objective, mixture):
        return mixture

    def step(self, objective, state):
        sums = objective.moments(state.offsets, state.means, state.factor)
        likelihood = float(sums.total / sums.mass) - objective.frame.log_volume
        now = Evaluation(state, float(objective.penalized(state)) - likelihood, likelihood)
        return gk.Mixture(state.logits, sums.means, state.factor), now

    def current(self, objective, state):
        return state


METHODS = {
    "mean shift": MeanShift(),
    "EM": gk.EM(),
    "accelerated EM": gk.EM(accelerate=True),
    "classification EM": gk.EM(assignment="hard"),
    "stochastic EM": gk.EM(assignment="stochastic"),
    "stepwise EM": gk.EM(batch_size=100),
    "annealed EM": gk.EM(temperature=(0.5, 3)),
    "averaged EM": gk.EM(batch_size=100, average=True),
    "Adam": gk.Adam(lr=0.02),
    "Adam on batches": gk.Adam(lr=0.02, batch_size=100),
    "scheduled SGD": gk.Gradient(
        lambda p: torch.optim.SGD(p, lr=0.05), lambda o: torch.optim.lr_scheduler.StepLR(o, 3)
    ),
    "variational Bayes": gk.bayes.VariationalBayes(),
    "stochastic variational Bayes": gk.bayes.VariationalBayes(batch_size=100),
}
# Only these decrease the objective that they report in each step.
MONOTONE = ("mean shift", "EM", "accelerated EM", "classification EM", "variational Bayes")


@pytest.fixture(scope="module")
def data():
    truth = random_mixture("full", K=3, D=2)
    x = 40 * truth.sample((600,), generator=torch.Generator().manual_seed(0)) + 7
    return gk.initialize(x, 3, "random"), x


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore::gmmkeops.ConvergenceWarning")
class TestMethod:
    """The loop, checkpoints and estimators rely on these properties of a method."""

    def test_reports_the_objective_of_its_mixtures(self, name, data):
        start, x = data
        seen = []
        result = gk.fit(start, x, METHODS[name], tol=0, max_iter=6, callback=lambda step: seen.append(step) and None)
        assert result.n_iter == len(seen) == len(result.history["objective"]) == 6
        assert result.ending is Ending.MAX_ITER
        assert not result.converged
        if "variational" not in name:
            assert result.log_likelihood == pytest.approx(float(result.mixture.log_prob(x).mean()), abs=1e-9)
            assert result.objective == pytest.approx(-result.log_likelihood, abs=1e-9)
        exact = METHODS[name].batch_size is None if hasattr(METHODS[name], "batch_size") else True
        if exact and not any(word in name for word in ("annealed", "classification", "variational")):
            assert seen[3].log_likelihood == pytest.approx(float(seen[3].mixture.log_prob(x).mean()), abs=1e-9)
        objectives = torch.tensor(result.history["objective"], dtype=torch.float64)
        if name in MONOTONE:
            assert bool((objectives.diff() <= 1e-12).all())
        assert float(objectives[-1]) < float(objectives[0])

    def test_resumes_from_any_iteration(self, name, data, tmp_path):
        """The result is that of a fit that was not interrupted, bit by bit."""
        start, x = data
        whole = gk.fit(start, x, METHODS[name], tol=0, max_iter=6)
        keep = gk.Checkpoint(tmp_path / "fit.ckpt", every=0)
        gk.fit(start, x, METHODS[name], tol=0, max_iter=2, checkpoint=keep)
        resumed = gk.fit(start, x, METHODS[name], tol=0, max_iter=6, checkpoint=keep)
        assert resumed.history["objective"] == whole.history["objective"]
        assert torch.equal(resumed.mixture.means, whole.mixture.means)
        assert torch.equal(resumed.mixture.factor.U, whole.mixture.factor.U)

    def test_is_interrupted_within_an_iteration(self, name, data, tmp_path):
        """Also between two batches of a pass; the checkpoint then continues there."""
        start, x = data
        whole = gk.fit(start, x, METHODS[name], tol=0, max_iter=4)
        keep = gk.Checkpoint(tmp_path / "fit.ckpt", every=0)
        method, calls = METHODS[name], []
        moments = gk.fitting.objective.Objective.moments

        def interrupted(self, *args, **kwargs):
            calls.append(0)
            if len(calls) == 8:
                raise OSError("the machine went down")
            return moments(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gk.fitting.objective.Objective, "moments", interrupted)
            try:
                gk.fit(start, x, method, tol=0, max_iter=4, checkpoint=keep)
            except OSError:
                assert len(calls) == 8
        resumed = gk.fit(start, x, method, tol=0, max_iter=4, checkpoint=keep)
        assert resumed.history["objective"] == whole.history["objective"]
        assert torch.equal(resumed.mixture.means, whole.mixture.means)

    def test_starts_and_ends_as_it_is_told(self, name, data):
        start, x = data
        nothing = gk.fit(start, x, METHODS[name], max_iter=0)
        assert nothing.n_iter == 0
        if "variational" not in name:
            assert torch.allclose(nothing.mixture.means, start.means)
        stopped = gk.fit(start, x, METHODS[name], tol=0, callback=lambda step: step.iteration == 2, max_iter=9)
        assert (stopped.ending, stopped.n_iter) == (Ending.STOPPED, 3)

    def test_is_a_value(self, name):
        method = METHODS[name]
        assert copy.deepcopy(method) == method or "SGD" in name
        if "SGD" not in name:
            assert pickle.loads(pickle.dumps(method)) == method


@pytest.mark.filterwarnings("ignore::gmmkeops.ConvergenceWarning")
def test_every_setting_makes_another_method(data):
    """No two methods of the list end at the same mixture, so that none of their settings is ignored."""
    start, x = data
    means = [gk.fit(start, x, method, tol=0, max_iter=3).mixture.means for method in METHODS.values()]
    assert all(not torch.allclose(a, b, rtol=1e-6) for a, b in itertools.combinations(means, 2))
