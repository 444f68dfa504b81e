"""Settings that an estimator and its solver both have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.base import clone

import gmmkeops as gk

pytestmark = pytest.mark.filterwarnings("ignore::gmmkeops.ConvergenceWarning")


@pytest.fixture(scope="module")
def X():
    rng = np.random.default_rng(0)
    return np.r_[rng.normal(size=(150, 2)), rng.normal(size=(250, 2)) * [2.0, 0.5] + [2.0, 1.5]]


def adam(**settings):
    return gk.Adam(lr=0.02, **settings)


@pytest.mark.parametrize(
    ("solver", "params", "iterations"),
    [
        # Given to the solver.
        (gk.EM(tol=0, max_iter=130), {}, 130),
        (gk.EM(max_iter=7, tol=0), {}, 7),
        (gk.EM(max_iter=9, tol=0, accelerate=True), {}, 9),
        (adam(max_iter=33), {}, 33),
        (adam(), {}, 200),
        (gk.Gradient(torch.optim.SGD, max_iter=3), {}, 3),
        (gk.EM(max_iter=8, tol=0, batch_size=100), {}, 8),
        (gk.bayes.VariationalBayes(max_iter=6, tol=0), {}, 6),
        # Given to the estimator.
        (gk.EM(), {"max_iter": 130, "tol": 0}, 130),
        (gk.EM(accelerate=True), {"max_iter": 9, "tol": 0}, 9),
        (adam(), {"max_iter": 13}, 13),
        ("em", {"max_iter": 130, "tol": 0}, 130),
        ("adam", {"max_iter": 13, "tol": 0}, 13),
        (gk.bayes.VariationalBayes(), {"max_iter": 6, "tol": 0}, 6),
        # One of each, or both alike.
        (gk.EM(tol=0), {"max_iter": 17}, 17),
        (gk.EM(max_iter=17), {"tol": 0}, 17),
        (gk.EM(max_iter=17, tol=0), {"max_iter": 17, "tol": 0}, 17),
        (adam(max_iter=17), {"max_iter": 17}, 17),
    ],
)
def test_a_setting_that_is_given_once_holds(X, solver, params, iterations):
    model = gk.GaussianMixture(2, solver=solver, random_state=0, **params)
    assert clone(model).get_params() == model.get_params()
    assert model.fit(X).n_iter_ == iterations
    assert model.set_params(max_iter=params.get("max_iter", 100)).fit(X).n_iter_ == iterations


@pytest.mark.parametrize("tol", [1e-2, 1e-6, 1e-9])
def test_the_tolerance_of_either_place_is_the_same_tolerance(X, tol):
    options = {"random_state": 0, "init_params": "random_from_data"}
    solver = gk.GaussianMixture(2, solver=gk.EM(tol=tol, max_iter=3000), **options).fit(X)
    estimator = gk.GaussianMixture(2, tol=tol, max_iter=3000, **options).fit(X)
    object_too = gk.GaussianMixture(2, solver=gk.EM(), tol=tol, max_iter=3000, **options).fit(X)
    straight = gk.fit(
        gk.GaussianMixture(2, max_iter=0, **options).fit(X).mixture_, torch.from_numpy(X), gk.EM(tol=tol), max_iter=3000
    )
    assert solver.n_iter_ == estimator.n_iter_ == object_too.n_iter_ == straight.n_iter
    assert solver.converged_
    assert np.array_equal(solver.means_, estimator.means_)


@pytest.mark.parametrize(("own", "theirs"), [(0.5, None), (None, 0.5), (0.5, 0.5)])
def test_reg_covar_of_either_place_is_used(X, own, theirs):
    solver = gk.EM() if theirs is None else gk.EM(reg_covar=theirs)
    params = {} if own is None else {"reg_covar": own}
    options = {"init_params": "random_from_data", "tol": 0, "max_iter": 5, "random_state": 0}
    model = gk.GaussianMixture(2, solver=solver, **options, **params)
    start = model.set_params(max_iter=0).fit(X).mixture_
    found = model.set_params(max_iter=5).fit(X).result_.history["objective"]
    expected = gk.fit(start, torch.from_numpy(X), gk.EM(reg_covar=0.5, tol=0), max_iter=5).history["objective"]
    without = gk.fit(start, torch.from_numpy(X), gk.EM(tol=0), max_iter=5).history["objective"]
    assert np.allclose(found, expected, rtol=0, atol=1e-12)
    assert not np.allclose(found, without, atol=1e-3)


@pytest.mark.parametrize(
    ("solver", "params", "name"),
    [
        (gk.EM(tol=1e-9), {"tol": 1e-5}, "tol"),
        (gk.EM(tol=0), {"tol": 1e-5}, "tol"),
        (gk.EM(max_iter=300), {"max_iter": 50}, "max_iter"),
        (gk.EM(reg_covar=0.1), {"reg_covar": 0.2}, "reg_covar"),
        (gk.EM(reg_covar=0), {"reg_covar": 0.2}, "reg_covar"),
        (gk.EM(reg_covar=0.1), {"reg_covar": 0}, "reg_covar"),
        (adam(tol=1e-9), {"tol": 1e-5}, "tol"),
        (adam(max_iter=300), {"max_iter": 50}, "max_iter"),
        (gk.bayes.VariationalBayes(max_iter=30), {"max_iter": 50}, "max_iter"),
        (gk.bayes.VariationalBayes(reg_covar=0.1), {"reg_covar": 0.2}, "reg_covar"),
    ],
)
def test_a_setting_that_is_given_twice_is_an_error(X, solver, params, name):
    model = gk.GaussianMixture(2, solver=solver, **params)
    calls = [model.fit] + ([model.partial_fit] if isinstance(solver, gk.EM) else [])
    for call in calls:
        with pytest.raises(ValueError, match=rf"^{name} has two values: {name}=.* of the solver .*\.$"):
            call(X)
    assert not model.fitted_


@pytest.mark.parametrize("solver", ["adam", gk.Adam(), gk.Gradient(torch.optim.SGD)])
def test_a_setting_that_the_solver_lacks_is_an_error(X, solver):
    with pytest.raises(ValueError, match=r"^reg_covar=0.5 is not supported by solver=.*\.$"):
        gk.GaussianMixture(2, solver=solver, reg_covar=0.5).fit(X)


def test_partial_fit_has_the_solvers_reg_covar(X):
    by_solver = gk.GaussianMixture(2, solver=gk.EM(reg_covar=3.0), random_state=0).partial_fit(X)
    by_estimator = gk.GaussianMixture(2, reg_covar=3.0, random_state=0).partial_fit(X)
    assert np.array_equal(by_solver.covariances_, by_estimator.covariances_)
    assert np.linalg.eigvalsh(by_solver.covariances_).min() >= 3.0 - 1e-12
