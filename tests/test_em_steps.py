"""EM steps in the compiled library against the M-step in torch."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

import gmmkeops as gk
from gmmkeops import reductions
from gmmkeops.fitting import EM, Method, Objective
from gmmkeops.fitting.objective import FLOOR
from gmmkeops.fitting.ordinary import Block
from gmmkeops.fitting.population import evaluation
from gmmkeops.fitting.squarem import extrapolated

pytestmark = pytest.mark.skipif(
    reductions.native_unavailable() is not None, reason="the native engine has not been compiled"
)

TYPES = ("full", "tied", "diag", "tied_diag", "spherical", "tied_spherical")


class OneByOne(EM):
    """EM whose steps, and the objective of their result, are all computed in torch."""

    steps = Method.steps

    def evaluate(self, objective, state):
        return evaluation(objective, state.population, state.mixture, state.floored)


class Alone(EM):
    """EM with one step a call of the library."""

    def steps(self, objective, state, most):
        while True:
            block = Block.of(self, objective, state, 1)
            now = block.evaluation(state, 0)
            state = block.after(1)
            yield state, now


def problem(D=3, K=4, N=400, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    means = 3 * torch.randn(K, D, generator=generator, dtype=torch.float64)
    x = (
        means[torch.arange(N) % K]
        + torch.randn(N, D, generator=generator, dtype=torch.float64)
        @ (torch.eye(D) + 0.3 * torch.randn(D, D, generator=generator)).double()
    )
    weights = torch.rand(N, generator=generator, dtype=torch.float64) + 0.1
    return x.to(dtype), weights


def fits(x, start, weights=None, max_iter=25, tol=0.0, penalty=None, **settings):
    """Fit by the library and by torch."""
    return [
        gk.fit(
            start,
            x,
            kind(tol=tol, max_iter=max_iter, **settings),
            sample_weight=weights,
            penalty=penalty,
            verbose=False,
        )
        for kind in (EM, OneByOne)
    ]


def agree(own, expected, rtol=1e-9):
    for name in ("objective", "log_likelihood"):
        assert own.history[name] == pytest.approx(expected.history[name], rel=rtol, abs=rtol)
        assert getattr(own, name) == pytest.approx(getattr(expected, name), rel=rtol, abs=rtol)
    assert own.history["active"] == expected.history["active"]
    for a, b in (
        (own.mixture.weights, expected.mixture.weights),
        (own.mixture.means, expected.mixture.means),
        (own.mixture.factor.covariances(), expected.mixture.factor.covariances()),
    ):
        torch.testing.assert_close(a, b, rtol=100 * rtol, atol=100 * rtol)
    assert own.report.pruned_components == expected.report.pruned_components
    assert own.report.regularized_components == expected.report.regularized_components


def counted(monkeypatch):
    """Count the steps that the library performs."""
    counts = []
    steps = reductions.em_steps

    def counting(*arguments, **settings):
        found = steps(*arguments, **settings)
        counts.append(0 if found is None else len(found))
        return found

    monkeypatch.setattr(reductions, "em_steps", counting)
    return counts


@pytest.mark.parametrize("assignment", ["soft", "hard"])
@pytest.mark.parametrize("max_iter", [0, 1, 3, 4, 5, 20])
def test_the_evaluation_of_the_last_mixture_is_that_of_another_pass(assignment, max_iter, monkeypatch):
    x, weights = problem()
    method, start = gk.EM(assignment=assignment, reg_covar=0.05, tol=0.0), gk.initialize(x, 4, generator=1)
    own = gk.fit(start, x, method, sample_weight=weights, max_iter=max_iter)
    monkeypatch.setattr(gk.EM, "last", lambda self, objective, state, steps: self.evaluate(objective, state))
    expected = gk.fit(start, x, method, sample_weight=weights, max_iter=max_iter)
    assert (own.objective, own.log_likelihood) == (expected.objective, expected.log_likelihood)
    assert torch.equal(own.mixture.means, expected.mixture.means)


def test_a_fit_that_ends_early_performs_few_steps(monkeypatch):
    x, _ = problem()
    converged = gk.fit(gk.initialize(x, 4, generator=1), x, gk.EM(tol=1e-9), max_iter=1000).mixture
    counts = counted(monkeypatch)
    result = gk.fit(converged, x, gk.EM(tol=1e-3))
    assert result.n_iter == 2
    assert counts == [4]
    counts.clear()
    gk.fit(converged, x, gk.EM(tol=0.0), max_iter=40)
    # The last step is the evaluation of the result.
    assert counts == [4, 4, 8, 16, 9]


@pytest.mark.parametrize("covariance_type", TYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("assignment", ["soft", "hard"])
def test_steps_of_all_families_equal_those_in_torch(covariance_type, weighted, assignment, monkeypatch):
    x, weights = problem()
    counts = counted(monkeypatch)
    start = gk.initialize(x, 4, covariance_type=covariance_type, generator=1)
    own, expected = fits(x, start, weights if weighted else None, assignment=assignment, reg_covar=0.05, max_iter=20)
    agree(own, expected)
    assert sum(counts) >= 20


@pytest.mark.parametrize("covariance_type", TYPES)
@pytest.mark.parametrize(
    "prior",
    [
        gk.penalties.InverseWishart(0.7, 5.0),
        gk.penalties.CovariancePrior(0.4, 3.0),
        2 * gk.penalties.InverseWishart(0.7, 5.0) + gk.penalties.CovariancePrior(0.4, 3.0),
    ],
)
def test_priors_of_the_covariances_equal_those_in_torch(covariance_type, prior, monkeypatch):
    x, weights = problem(seed=7)
    counts = counted(monkeypatch)
    start = gk.initialize(x * 3 + 5, 4, covariance_type=covariance_type, generator=1)
    own, expected = fits(x * 3 + 5, start, weights, penalty=prior)
    agree(own, expected)
    assert sum(counts) >= 25


@pytest.mark.parametrize("frozen", ["frozen_weights", "frozen_means", "frozen_covariances"])
@pytest.mark.parametrize("covariance_type", ["full", "tied", "spherical"])
def test_frozen_parameters_equal_those_in_torch(frozen, covariance_type):
    x, weights = problem(seed=2)
    start = gk.initialize(x, 4, covariance_type=covariance_type, generator=1)
    own, expected = fits(x, start, weights, **{frozen: True})
    agree(own, expected)


def test_single_precision_steps_equal_those_in_torch():
    x, weights = problem(N=3000, dtype=torch.float32)
    own, expected = fits(x, gk.initialize(x, 4, generator=1), weights, max_iter=12)
    agree(own, expected, rtol=2e-6)


@pytest.mark.parametrize("D", [1, 2, 5, 17, 32])
@pytest.mark.parametrize("covariance_type", ["full", "diag", "spherical"])
def test_dimensions(D, covariance_type):
    x, _ = problem(D=D, N=700, seed=3)
    own, expected = fits(x, gk.initialize(x, 3, covariance_type=covariance_type, generator=1), max_iter=6)
    agree(own, expected)


@pytest.mark.parametrize("accelerate", [False, True])
def test_results_do_not_depend_on_the_steps_of_a_call(accelerate):
    x, weights = problem(seed=4)
    start = gk.initialize(x, 4, generator=1)
    own, alone = (
        gk.fit(start, x, kind(tol=0, max_iter=30, accelerate=accelerate), sample_weight=weights, verbose=False)
        for kind in (EM, Alone)
    )
    assert own.history["objective"] == alone.history["objective"]
    for name, tensor in own.mixture.factor.tensors.items():
        assert torch.equal(tensor, alone.mixture.factor.tensors[name])
    assert torch.equal(own.mixture.means, alone.mixture.means)


@pytest.mark.parametrize("accelerate", [False, True])
def test_pruned_components_equal_those_in_torch(accelerate):
    x, _ = problem(N=200)
    far = gk.Mixture(
        weights=[0.5, 0.25, 0.25],
        means=torch.cat([x[:2], x[:1] + 1e4]),
        covariances=torch.eye(3, dtype=torch.float64).repeat(3, 1, 1),
    )
    own, expected = fits(x, far, accelerate=accelerate, max_iter=9 if accelerate else 25)
    agree(own, expected)
    assert own.report.pruned_components == (2,)


def slow(seed=0, D=2, N=600):
    """Points of two overlapping clusters, so that EM with three components converges slowly, and their weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    x[: N // 2, 0] += 1.5
    return x, torch.rand(N, generator=generator, dtype=torch.float64) + 0.1


def outcomes(monkeypatch):
    """Record what iterations in torch do: True for an accepted extrapolation, False for a refused one, and None without one."""
    found, objectives = [], []
    look, extrapolate = EM._look, EM._extrapolate

    def looking(*arguments):
        result = look(*arguments)
        objectives.append(result[2])
        return result

    def extrapolating(*arguments):
        objectives.clear()
        result = extrapolate(*arguments)
        found.append(objectives[1] <= objectives[0] if len(objectives) == 2 else None)
        return result

    monkeypatch.setattr(EM, "_look", looking)
    monkeypatch.setattr(EM, "_extrapolate", extrapolating)
    return found


@pytest.mark.parametrize("covariance_type", TYPES)
@pytest.mark.parametrize(
    "settings",
    [
        {"reg_covar": 0.05},
        {"assignment": "hard", "reg_covar": 0.05},
        {"penalty": gk.penalties.InverseWishart(0.7, 5.0)},
        {"frozen_means": True, "frozen_weights": True},
        {"frozen_covariances": True},
    ],
)
def test_accelerated_iterations_equal_those_in_torch(covariance_type, settings, monkeypatch):
    x, weights = slow()
    counts, seen = counted(monkeypatch), outcomes(monkeypatch)
    start = gk.initialize(3 * x + 5, 3, covariance_type=covariance_type, generator=1)
    # Logits need not be normalized.
    start = gk.Mixture(start.logits + 2, start.means, start.factor)
    own, expected = fits(3 * x + 5, start, weights, accelerate=True, max_iter=12, **settings)
    agree(own, expected, rtol=1e-8)
    # Iterations in the library are not seen; one that prunes a component is left to torch.
    assert len(seen) in (12, 13)
    assert sum(counts) >= 12
    assert settings.get("assignment") == "hard" or True in seen


@pytest.mark.parametrize("seed", [0, 1])
def test_a_refused_extrapolation_equals_torch(seed, monkeypatch):
    """With seed 1, extrapolations would be refused without the compensation for changes of the fractions."""
    x, weights = slow(seed)
    seen = outcomes(monkeypatch)
    start = gk.initialize(x, 4, generator=1)
    own, expected = fits(x, start, weights, accelerate=True, max_iter=25, reg_covar=0.05)
    assert {True, False} <= set(seen)
    agree(own, expected, rtol=1e-8)
    assert max(b - a for a, b in itertools.pairwise(own.history["objective"])) < 1e-12


@pytest.mark.parametrize(
    ("D", "dtype", "rtol"), [(1, torch.float64, 1e-8), (9, torch.float64, 1e-8), (3, torch.float32, 1e-5)]
)
def test_accelerated_iterations_of_other_dimensions_and_precisions_equal_torch(D, dtype, rtol):
    x, weights = slow(D=D, N=2000)
    start = gk.initialize(x, 3, generator=1)
    agree(*fits(x.to(dtype), start, weights, accelerate=True, max_iter=6), rtol=rtol)


@pytest.mark.parametrize("covariance_type", ["full", "spherical"])
def test_an_extrapolated_covariance_is_regularized_as_in_torch(covariance_type, monkeypatch):
    """The covariance of a component of equal points shrinks slowly at first, and is extrapolated below the smallest one."""
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:10] = 0
    small = torch.tensor([1.0, 0.03], dtype=torch.float64)
    covariances = small if covariance_type == "spherical" else small[:, None, None] * torch.eye(2).double()
    start = gk.Mixture.from_parameters([0.8, 0.2], [[0.0, 0.0], [0.05, 0.0]], covariances, covariance_type)
    low, extrapolate = [], extrapolated

    def recording(*mixtures):
        found = extrapolate(*mixtures)
        low.append(found is not None and bool(found.factor.floored(FLOOR)[1].any()))
        return found

    monkeypatch.setattr("gmmkeops.fitting.em.extrapolated", recording)
    own, expected = fits(x, start, accelerate=True, max_iter=8, reg_covar=0.0)
    # Once in the fit in torch, and once in that by the library, which leaves the iteration to torch.
    assert sum(low) == 2
    agree(own, expected, rtol=1e-7)


def test_the_result_of_accelerated_iterations_is_evaluated_by_one_pass(monkeypatch):
    x, _ = problem()
    start, counts = gk.initialize(x, 4, generator=1), counted(monkeypatch)
    accelerated, steps = [], reductions.em_steps

    def recording(*arguments, **settings):
        accelerated.append(arguments[4].accelerate)
        return steps(*arguments, **settings)

    monkeypatch.setattr(reductions, "em_steps", recording)
    result = gk.fit(start, x, EM(tol=0.0, max_iter=9, accelerate=True), verbose=False)
    assert counts == [4, 4, 1, 1]
    assert accelerated == [True, True, True, False]
    again = gk.fit(result.mixture, x, EM(tol=0.0, max_iter=0), verbose=False)
    assert result.log_likelihood == pytest.approx(again.log_likelihood, rel=1e-12)


def m_steps(monkeypatch, x, start, weights=None, max_iter=15, penalty=None, **settings):
    """Fit by E-steps of the dense engine, with M-steps of the library as for points on a GPU, and in torch; count the former."""
    counts = []

    def counting(*arguments):
        found = m_step(*arguments)
        counts.append(0 if found is None else len(found))
        return found

    m_step, method = reductions.native_m_step, EM(tol=0.0, max_iter=max_iter, **settings)
    monkeypatch.setattr(reductions, "native_m_step", counting)
    options = {"sample_weight": weights, "penalty": penalty, "backend": "dense", "verbose": False}
    expected = gk.fit(start, x, method, **options)
    assert not counts
    # As if the points were on another device than the parameters.
    monkeypatch.setattr(Objective, "device", property(lambda objective: None))
    return gk.fit(start, x, method, **options), expected, counts


@pytest.mark.parametrize("covariance_type", TYPES)
@pytest.mark.parametrize(
    "settings",
    [
        {"reg_covar": 0.05},
        {"penalty": gk.penalties.InverseWishart(0.7, 5.0)},
        {"frozen_means": True, "frozen_weights": True},
        {"frozen_covariances": True},
        {"assignment": "hard"},
        {"accelerate": True},
    ],
)
def test_m_steps_from_moments_equal_those_in_torch(covariance_type, settings, monkeypatch):
    x, weights = problem(seed=3)
    start = gk.initialize(x, 4, covariance_type=covariance_type, generator=1)
    own, expected, counts = m_steps(monkeypatch, x, start, weights, **settings)
    agree(own, expected)
    assert sum(counts) >= 15


def test_m_steps_that_prune_are_left_to_torch(monkeypatch):
    x, _ = problem(N=200)
    start = gk.Mixture(
        weights=[0.5, 0.25, 0.25],
        means=torch.cat([x[:2], x[:1] + 1e4]),
        covariances=torch.eye(3, dtype=torch.float64).repeat(3, 1, 1),
    )
    own, expected, counts = m_steps(monkeypatch, x, start)
    agree(own, expected)
    assert own.report.pruned_components == (2,)
    assert counts[0] == 0
    assert sum(counts) == len(counts) - 1


@pytest.mark.parametrize("accelerate", [False, True])
@pytest.mark.parametrize("covariance_type", ["full", "diag", "spherical"])
def test_singular_covariances_equal_those_in_torch(covariance_type, accelerate):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    x[:20] = x[0] + 20
    start = gk.initialize(x, 2, covariance_type=covariance_type, generator=1)
    own, expected = fits(x, start, reg_covar=0.0, max_iter=8, accelerate=accelerate)
    agree(own, expected, rtol=1e-7)
    assert own.report.regularized_components


def test_steps_continue_after_one_in_torch(monkeypatch):
    x, _ = problem(N=200)
    far = gk.Mixture(
        weights=[0.5, 0.25, 0.25],
        means=torch.cat([x[:2], x[:1] + 1e4]),
        covariances=torch.eye(3, dtype=torch.float64).repeat(3, 1, 1),
    )
    counts = counted(monkeypatch)
    gk.fit(far, x, EM(tol=0, max_iter=10), verbose=False)
    assert counts[0] == 0
    assert sum(counts) >= 9


def test_coarse_points_are_converted_as_in_torch():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 2, generator=generator)
    x[:250] = 1 + 1e-6 * x[:250]
    start = gk.initialize(x, 2, generator=1)
    own, expected = fits(x, start, max_iter=10, reg_covar=0.0)
    assert own.report.dtype == expected.report.dtype == "float64"
    agree(own, expected, rtol=1e-6)


@pytest.mark.parametrize("accelerate", [False, True])
def test_convergence_and_callbacks_see_every_step(accelerate):
    x, _ = problem(seed=5)
    start, method = gk.initialize(x, 4, generator=1), EM(tol=0, max_iter=40, accelerate=accelerate)
    seen = []
    result = gk.fit(start, x, method, callback=lambda step: seen.append(step) or step.iteration == 20, verbose=False)
    assert result.n_iter == len(seen) == 21
    for step in (seen[0], seen[7], seen[20]):
        again = gk.fit(step.mixture, x, EM(tol=0, max_iter=0), verbose=False)
        assert again.log_likelihood == pytest.approx(step.log_likelihood, rel=1e-9)
    own, expected = fits(x, start, max_iter=500, tol=1e-3, accelerate=accelerate)
    assert own.n_iter == expected.n_iter
    assert own.converged


@pytest.mark.parametrize("accelerate", [False, True])
def test_a_checkpoint_within_a_call_resumes_with_the_same_bits(tmp_path, accelerate):
    x, _ = problem(seed=6)
    start, method = gk.initialize(x, 4, generator=1), EM(tol=0, max_iter=30, accelerate=accelerate)
    whole = gk.fit(start, x, method, verbose=False)
    path = os.fspath(tmp_path / "fit.ckpt")

    def stop(step):
        if step.iteration == 12:
            raise KeyboardInterrupt

    gk.fit(start, x, method, callback=stop, checkpoint=path, verbose=False)
    resumed = gk.fit(start, x, method, checkpoint=path, verbose=False)
    assert resumed.n_iter == 30
    assert resumed.history["objective"] == whole.history["objective"]
    assert torch.equal(resumed.mixture.means, whole.mixture.means)


def test_no_step_for_other_engines(monkeypatch):
    x, _ = problem()
    start = gk.initialize(x, 4, generator=1)
    counts = counted(monkeypatch)
    gk.fit(start, x, EM(max_iter=3, tol=0), backend="dense", verbose=False)
    assert sum(counts) == 0


@pytest.mark.parametrize("accelerate", [False, True])
def test_threads_change_no_bit_of_steps_in_many_dimensions(accelerate):
    """Factorizations are shared between threads from about a million operations on."""
    x, _ = problem(D=48, K=20, N=3000)
    start = gk.Mixture(
        torch.zeros(20), x[:20], gk.FullFactor.from_factors(torch.eye(48).double().expand(20, 48, 48).contiguous())
    )
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            method = EM(tol=0, max_iter=4, reg_covar=1e-3, accelerate=accelerate)
            found.append(gk.fit(start, x, method, verbose=False).mixture)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].means, found[1].means)
    assert torch.equal(found[0].factor.U, found[1].factor.U)


@pytest.mark.parametrize("D", [33, 64, 100])
def test_steps_in_many_dimensions_equal_torch(D):
    x, weights = problem(D=D, K=3, N=1200)
    start = gk.Mixture(
        torch.zeros(3), x[:3], gk.FullFactor.from_factors(torch.eye(D).double().expand(3, D, D).contiguous())
    )
    prior = gk.penalties.CovariancePrior(torch.eye(D).double(), D + 2.0)
    for penalty in (None, prior):
        agree(*fits(x, start, weights, max_iter=6, penalty=penalty))
