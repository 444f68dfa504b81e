"""Fitted attributes always describe the current mixture or do not exist, whatever has been called in whatever order."""

from __future__ import annotations

import copy
import itertools
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.base import clone
from sklearn.mixture import GaussianMixture as Theirs

import gmmkeops as gk

pytestmark = pytest.mark.filterwarnings("ignore::gmmkeops.ConvergenceWarning")


SHAPES = {
    "full": lambda K, D: (K, D, D),
    "tied": lambda K, D: (D, D),
    "diag": lambda K, D: (K, D),
    "spherical": lambda K, D: (K,),
    "tied_diag": lambda K, D: (D,),
    "tied_spherical": lambda K, D: (),
}


@pytest.fixture(scope="module")
def X():
    rng = np.random.default_rng(2)
    return np.r_[
        rng.normal(size=(90, 2)) @ [[1.0, 0.7], [0.0, 0.5]], [5.0, 1.0] + rng.normal(size=(60, 2)) * [0.4, 2.0]
    ]


@pytest.fixture(scope="module")
def batch(X):
    return 0.5 * X[::-1][:70] + [1.0, -2.0]


def whole(covariances, kind, K, D):
    """Covariance matrices (K, D, D)."""
    if kind in ("full", "tied"):
        return np.broadcast_to(covariances, (K, D, D))
    if kind in ("diag", "tied_diag"):
        return np.stack([np.diag(row) for row in np.broadcast_to(covariances, (K, D))])
    return np.stack([value * np.eye(D) for value in np.broadcast_to(covariances, (K,))])


def check(model, kind, X, trained):
    """Everything that is said of the mixture, against densities that are written out."""
    K, D = model.mixture_.n_components, 2
    weights, means = np.asarray(model.weights_), np.asarray(model.means_)
    covariances, precisions = np.asarray(model.covariances_), np.asarray(model.precisions_)
    assert weights.shape == (K,)
    assert means.shape == (K, D)
    assert covariances.shape == precisions.shape == SHAPES[kind](K, D)
    assert np.asarray(model.precisions_cholesky_).shape == covariances.shape
    assert abs(weights.sum() - 1) < 1e-12
    matrices = whole(covariances, kind, K, D)
    assert np.allclose(matrices @ whole(precisions, kind, K, D), np.eye(D), atol=1e-9)
    parts = [np.log(w) + multivariate_normal(m, C).logpdf(X) for w, m, C in zip(weights, means, matrices, strict=True)]
    density = logsumexp(parts, axis=0)
    assert np.allclose(model.score_samples(X), density, rtol=0, atol=1e-9)
    assert model.n_features_in_ == D
    assert hasattr(model, "n_iter_") == hasattr(model, "converged_")
    assert hasattr(model, "lower_bound_") == hasattr(model, "lower_bounds_")
    if hasattr(model, "lower_bound_"):
        assert trained, "there is no training data"
        assert abs(model.lower_bound_ - density.mean()) < 1e-9
        assert len(model.lower_bounds_) == model.n_iter_
    if hasattr(model, "result_"):
        assert torch.equal(model.result_.mixture.means, model.mixture_.means)
        assert (model.result_.converged, model.result_.n_iter) == (model.converged_, model.n_iter_)
        assert abs(model.result_.log_likelihood - density.mean()) < 1e-9


def fitted_names(model):
    """Names of the fitted attributes."""
    return {name for name in dir(model) if name.endswith("_") and not name.startswith("_") and hasattr(model, name)}


class History:
    """A model, what has been called, and what its attributes must therefore be."""

    def __init__(self, X, batch, folder):
        self.X, self.batch, self.folder = X, batch, folder
        options = {"init_params": "random_from_data", "random_state": 0, "max_iter": 4, "tol": 1e-6}
        self.model = gk.GaussianMixture(2, **options)
        self.kind, self.K, self.trained, self.stream = None, None, False, 0

    def told(self, trained, stream):
        self.kind, self.K = self.model.covariance_type, self.model.n_components
        self.trained, self.stream = trained, stream

    def fit(self):
        self.model.fit(self.X)
        self.told(True, 0)

    def partial_fit(self):
        same = (self.kind, self.K) == (self.model.covariance_type, self.model.n_components)
        self.model.partial_fit(self.batch)
        self.told(False, self.stream + 1 if same else 1)
        assert self.model.n_iter_ == self.stream
        assert self.model.converged_ is False

    def warm_start(self):
        self.model.set_params(warm_start=True).fit(self.X)
        self.told(True, 0)

    def more_components(self):
        self.model.set_params(n_components=3)

    def diagonal(self):
        self.model.set_params(covariance_type="diag")

    def tied(self):
        self.model.set_params(covariance_type="tied")

    def save_and_load(self):
        if self.model.fitted_:
            before, params = fitted_names(self.model), repr(self.model)
            self.model.save(self.folder / "m.safetensors")
            self.model = gk.GaussianMixture.load(self.folder / "m.safetensors")
            assert repr(self.model) == params
            assert fitted_names(self.model) == before

    def from_mixture(self):
        if self.model.fitted_ and (self.kind, self.K) == (self.model.covariance_type, self.model.n_components):
            self.model = gk.GaussianMixture.from_mixture(self.model.mixture_, covariance_type=self.kind, random_state=0)
            self.told(False, 0)
            assert not hasattr(self.model, "converged_")

    def pickle(self):
        self.model = pickle.loads(pickle.dumps(self.model))

    def deepcopy(self):
        self.model = copy.deepcopy(self.model)

    def copy(self):
        # What happens to a copy does not happen to the original.
        original, means = self.model, getattr(self.model, "means_", None)
        self.model = copy.copy(self.model)
        copy.copy(original).partial_fit(self.batch)
        assert getattr(self.model, "means_", None) is means

    def clone(self):
        self.model = clone(self.model)
        self.kind, self.K, self.trained, self.stream = None, None, False, 0

    def refused(self):
        with pytest.raises(ValueError, match="finite"):
            self.model.fit(np.full_like(self.X, np.nan))
        with pytest.raises(ValueError, match="finite"):
            self.model.partial_fit(np.full_like(self.X, np.nan))

    def predict(self):
        if self.model.fitted_:
            self.model.predict(self.X)
            self.model.sample(3)


CALLS = [name for name in vars(History) if not name.startswith("_") and name != "told"]


def run(calls, X, batch, folder):
    history = History(X, batch, folder)
    for name in calls:
        getattr(history, name)()
        model = history.model
        assert model.fitted_ == (history.kind is not None), calls
        if model.fitted_:
            assert model.mixture_.n_components == history.K, calls
            assert hasattr(model, "lower_bound_") == history.trained, calls
            check(model, history.kind, X, history.trained)


@pytest.mark.filterwarnings("ignore::gmmkeops.DegenerateWarning")
@pytest.mark.parametrize("first", CALLS)
def test_every_pair_of_calls(first, X, batch, tmp_path):
    for second in CALLS:
        run(["fit", first, second], X, batch, tmp_path)
        run([first, second, "partial_fit"], X, batch, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::gmmkeops.DegenerateWarning")
@pytest.mark.parametrize("first", CALLS)
def test_every_three_calls(first, X, batch, tmp_path):
    for rest in itertools.product(CALLS, repeat=2):
        run([first, *rest], X, batch, tmp_path)


def test_a_stream_after_a_fit_begins_at_the_fit(X, batch):
    old = gk.GaussianMixture(2, random_state=0).partial_fit(10 * X).partial_fit(10 * X).fit(X)
    new = gk.GaussianMixture(2, random_state=0).fit(X)
    fitted = new.mixture_
    expected, memory = gk.EM().update(fitted, torch.from_numpy(batch))
    for model in (old, new):
        assert np.allclose(model.partial_fit(batch).means_, expected.means.numpy(), atol=1e-12)
    expected, _ = gk.EM().update(expected, torch.from_numpy(X), memory)
    for model in (old, new):
        assert np.allclose(model.partial_fit(X).means_, expected.means.numpy(), atol=1e-9)
        assert np.allclose(model.covariances_, expected.factor.covariances().numpy(), atol=1e-9)


@pytest.mark.parametrize("weights", ["dirichlet_process", "dirichlet_distribution"])
@pytest.mark.parametrize(
    "change",
    [
        {"n_components": 4},
        {"covariance_type": "diag"},
        {"covariance_type": "tied"},
        {"covariance_type": "spherical"},
        {"weight_concentration_prior_type": "other"},
        {"n_components": 2, "covariance_type": "diag"},
        {"max_iter": 9},
    ],
)
def test_a_bayesian_warm_start_after_a_change(X, weights, change):
    other = {"dirichlet_process": "dirichlet_distribution"}.get(weights, "dirichlet_process")
    change = {name: other if value == "other" else value for name, value in change.items()}
    options = {"random_state": 0, "max_iter": 5, "weight_concentration_prior_type": weights, "init_params": "kmeans"}
    model = gk.BayesianGaussianMixture(n_components=3, warm_start=True, **options).fit(X)
    model.set_params(**change).fit(X)
    afresh = gk.BayesianGaussianMixture(**({"n_components": 3} | options | change)).fit(X)
    K, kind = model.n_components, model.covariance_type
    assert model.covariances_.shape == SHAPES[kind](K, 2)
    assert model.means_.shape == (K, 2)
    sticks = model.weight_concentration_prior_type == "dirichlet_process"
    assert isinstance(model.weight_concentration_, tuple) is sticks
    assert len(model.lower_bounds_) == model.n_iter_
    if change == {"max_iter": 9}:
        assert model.lower_bound_ > afresh.lower_bounds_[4]
    else:
        assert np.array_equal(model.means_, afresh.means_)
        assert model.lower_bound_ == afresh.lower_bound_


@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
def test_conversion_after_a_change_converts_the_mixture(X, kind):
    for K in (1, 2):
        theirs = Theirs(K, covariance_type=kind, random_state=0).fit(X)
        ours = gk.from_sklearn(theirs)
        check(ours, kind, X, trained=False)
        assert ours.covariances_.shape == theirs.covariances_.shape
        assert (ours.converged_, ours.n_iter_) == (theirs.converged_, theirs.n_iter_)
        ours.set_params(covariance_type="diag" if kind != "diag" else "full", n_components=5)
        back = gk.to_sklearn(ours)
        assert back.covariance_type == kind
        assert np.allclose(back.score_samples(X), theirs.score_samples(X))


def test_files_of_mixtures_know_of_no_fit(X, tmp_path):
    fitted = gk.GaussianMixture(2, covariance_type="tied").fit(X)
    gk.save(fitted.mixture_, tmp_path / "m.safetensors")
    for model in (
        gk.GaussianMixture.load(tmp_path / "m.safetensors"),
        gk.GaussianMixture.from_mixture(fitted.mixture_),
    ):
        check(model, "tied", X, trained=False)
        for name in ("converged_", "n_iter_", "lower_bound_", "lower_bounds_", "result_"):
            assert not hasattr(model, name)
    with pytest.raises(ValueError, match=r"^covariance_type must be 'tied' as in the mixture, got 'full'; omit it\.$"):
        gk.GaussianMixture.from_mixture(fitted.mixture_, covariance_type="full")


def test_ctrl_c_ends_all_initializations(X, monkeypatch):
    """The fits so far are the result."""
    from gmmkeops.estimators import base

    calls = []

    def interrupted(*args, **options):
        calls.append(1)
        result = gk.fit(*args, **options)
        return replace(result, report=replace(result.report, interrupted=len(calls) == 2))

    monkeypatch.setattr(base, "fit", interrupted)
    model = gk.GaussianMixture(2, n_init=5, init_params="kmeans", random_state=0).fit(X)
    assert len(calls) == 2
    assert model.fitted_
