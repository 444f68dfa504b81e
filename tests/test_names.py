"""Names that users of scikit-learn, torch and zuko guess, and those of version 0.1; one-line reprs."""

from __future__ import annotations

import copy
import pickle
import warnings

import matplotlib
import numpy as np
import pytest
import torch

import gmmkeops as gk


@pytest.fixture(scope="module")
def x():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(300, 2, generator=generator, dtype=torch.float64) + 4 * (torch.arange(300) % 2)[:, None]


def test_a_number_of_components_starts_a_fit(x):
    short = gk.fit(2, x, generator=0)
    start = gk.initialize(x, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(short.mixture.means, gk.fit(start, x, gk.EM()).mixture.means)
    with pytest.raises(TypeError, match="start must be a Mixture, a GMM or a number of components, got bool"):
        gk.fit(True, x)


def test_seeds_are_taken_where_generators_are(x):
    one = gk.initialize(x, 3, generator=torch.Generator().manual_seed(7))
    for other in ({"generator": 7}, {"random_state": 7}, {"random_state": np.int64(7)}):
        assert torch.equal(one.means, gk.initialize(x, 3, **other).means)
    fits = [
        gk.fit(one, x, gk.EM(batch_size=50), max_iter=2, tol=0, **s) for s in ({"generator": 3}, {"random_state": 3})
    ]
    assert torch.equal(fits[0].mixture.means, fits[1].mixture.means)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (lambda x, w, s: gk.initialise(x, 2), lambda x, w, s: gk.initialize(x, 2)),
        (
            lambda x, w, s: gk.initialize(x, components=2, weights=w),
            lambda x, w, s: gk.initialize(x, 2, sample_weight=w),
        ),
        (lambda x, w, s: gk.initialize(x, 2, runs=1), lambda x, w, s: gk.initialize(x, 2, n_init=1)),
        (lambda x, w, s: gk.fit(s, x, weights=w).mixture, lambda x, w, s: gk.fit(s, x, sample_weight=w).mixture),
        (lambda x, w, s: gk.fit(s, x, progress=False).mixture, lambda x, w, s: gk.fit(s, x, verbose=False).mixture),
        (
            lambda x, w, s: gk.fit(s, x, callbacks=lambda step: True).mixture,
            lambda x, w, s: gk.fit(s, x, callback=lambda step: True).mixture,
        ),
        (
            lambda x, w, s: gk.EM().update(s, x, weights=w)[0],
            lambda x, w, s: gk.EM().update(s, x, sample_weight=w)[0],
        ),
        (
            lambda x, w, s: gk.EM().maximise(s, gk.reductions.moments(x, s.offsets, s.means, s.factor)),
            lambda x, w, s: gk.EM().maximize(s, gk.reductions.moments(x, s.offsets, s.means, s.factor)),
        ),
    ],
)
def test_names_of_version_0_1_warn_and_mean_the_same(x, old, new):
    weights = torch.rand(300, generator=torch.Generator().manual_seed(1))
    start = gk.initialize(x, 2)
    with pytest.warns(DeprecationWarning, match="is deprecated; use") as caught:
        before = old(x, weights, start)
    assert caught[0].filename == __file__
    assert torch.equal(before.means, new(x, weights, start).means)


@pytest.mark.parametrize(
    ("value", "old", "new"),
    [
        (lambda s, x: s, "components", "n_components"),
        (lambda s, x: s, "features", "n_features"),
        (lambda s, x: gk.GMM(2, n_components=3), "components", "n_components"),
        (lambda s, x: gk.GMM(2, n_components=3), "carried", "rescaled"),
        (lambda s, x: gk.reductions.moments(x, s.offsets, s.means, s.factor), "centres", "centers"),
        (lambda s, x: gk.reductions.moments(x, s.offsets, s.means, s.factor), "recentre", "recenter"),
        (lambda s, x: gk.data, "Chunk", "Batch"),
        (lambda s, x: gk.fit(s, x).report, "dead_components", "pruned_components"),
        (lambda s, x: gk.fit(s, x).report, "live_components", "n_active_components"),
        (lambda s, x: gk.fit(s, x).report, "floors_hit", "regularized_components"),
        (lambda s, x: gk.fit(s, x).report, "mass", "total_weight"),
        (lambda s, x: gk.fit(s, x).report, "pairs", "evaluated_fraction"),
    ],
)
def test_attributes_of_version_0_1_warn_and_mean_the_same(x, value, old, new):
    value = value(gk.initialize(x, 2), x)
    with pytest.warns(DeprecationWarning, match=f"{old} is deprecated; use {new}") as caught:
        before = getattr(value, old)
    assert [w.filename for w in caught] == [__file__]
    assert before is getattr(value, new) or before == getattr(value, new)


def test_second_moments_of_version_0_1_warn(x):
    z = x[:4]
    for ndim, kind in ((3, gk.FullFactor), (2, gk.DiagonalFactor), (1, gk.SphericalFactor)):
        with pytest.warns(DeprecationWarning, match="outer is deprecated"):
            assert torch.equal(gk.components.moments.outer(z, ndim), kind.outer(z))
        with pytest.warns(DeprecationWarning, match="like is deprecated"):
            assert torch.equal(gk.components.moments.like(z[:2], ndim), kind.second_moments(z[:2]))


def test_keys_of_version_0_1_warn_and_mean_the_same(x):
    steps = []
    table = gk.analysis.select(x, [1, 2], callback=steps.append)
    row, history = table.rows[1], table.results[1].history
    pairs = [(row, "components", "n_components"), (row, "parameters", "n_parameters"), (row, "iterations", "n_iter")]
    pairs += [(history, "live", "active"), (steps[-1].history, "live", "active")]
    for values, old, new in pairs:
        assert old not in values
        with pytest.warns(DeprecationWarning, match=f"'{old}' is deprecated; use '{new}'") as caught:
            assert values[old] == values[new]
        assert caught[0].filename == __file__
    for values in (row, copy.deepcopy(row), pickle.loads(pickle.dumps(row))):
        assert values == dict(row)
        with pytest.raises(KeyError, match="nonsense"):
            values["nonsense"]
    with pytest.warns(DeprecationWarning, match="live is deprecated; use active"):
        assert steps[-1].live is steps[-1].active


def rough_products():
    """The log-density of float32 points for which float32 products are not accurate enough."""
    means = torch.tensor([[-1e4, 0, 0], [0, 0, 0], [1e4, 1e4, 1e4]])
    x = torch.randn(9000, 3, generator=torch.Generator().manual_seed(0)) + means.repeat(3000, 1)
    m = gk.Mixture.from_parameters([0.5, 0.3, 0.2], means.double(), [1.0, 2.0, 0.5], "spherical")
    torch.set_float32_matmul_precision("high")
    try:
        m.log_prob(x, backend="dense")
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("call", "category"),
    [
        (lambda x: gk.fit(2, x, gk.EM(tol=1e-12), max_iter=1), gk.ConvergenceWarning),
        (lambda x: gk.fit(2, x, max_iter=2, tol=1e-12, random_state=0), gk.ConvergenceWarning),
        (lambda x: gk.fit(gk.initialize(x, 2), x, gk.Adam(), max_iter=2, tol=1e-12), gk.ConvergenceWarning),
        (lambda x: gk.GaussianMixture(3, max_iter=2, tol=1e-12).fit(x.numpy()), gk.ConvergenceWarning),
        (lambda x: gk.GaussianMixture(3, max_iter=2, tol=1e-12).fit_predict(x.numpy()), gk.ConvergenceWarning),
        (
            lambda x: gk.BayesianGaussianMixture(n_components=3, max_iter=2, tol=1e-12).fit(x.numpy()),
            gk.ConvergenceWarning,
        ),
        (lambda x: gk.fit(1, x, gk.EM(reg_covar=1e9)), gk.PrecisionWarning),
        (lambda x: gk.fit(1, (x + 5e6).float()), gk.PrecisionWarning),
        (lambda x: gk.fit(1, (x + 5e6).float(), gk.Adam(), max_iter=2), gk.PrecisionWarning),
        (lambda x: gk.GaussianMixture(1).fit((x + 5e6).float().numpy()), gk.PrecisionWarning),
        (lambda x: gk.GaussianMixture(1, reg_covar=1e9).fit(x.numpy()), gk.PrecisionWarning),
        (lambda x: rough_products(), gk.PrecisionWarning),
    ],
)
def test_warnings_name_the_line_of_the_user(x, call, category):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(x)
    assert any(issubclass(warning.category, category) for warning in caught)
    assert {warning.filename for warning in caught} == {__file__}


def test_one_meaning_of_both_spellings(x):
    for one, other in (("kmeans", "k-means"), ("kmeans++", "k-means++")):
        assert torch.equal(gk.initialize(x, 3, one).means, gk.initialize(x, 3, other).means)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: gk.initialize(x, n_clusters=2), "initialize has no argument n_clusters; pass n_components"),
        (lambda x: gk.initialize(x, k=2), "initialize has no argument k; pass n_components"),
        (lambda x: gk.fit(2, x, epochs=3), "fit has no argument epochs; pass max_iter"),
        (lambda x: gk.fit(2, x, lr=0.1), r"fit has no argument lr; pass method=gmmkeops.Adam\(lr=...\)"),
        (lambda x: gk.fit(2, x, sample_weight=x[:, 0], weights=x[:, 0]), "got both sample_weight and weights"),
    ],
)
def test_wrong_guesses_name_the_right_one(x, call, message):
    with pytest.raises(TypeError, match=message):
        call(x)


def test_a_source_is_made_by_its_class(x):
    source = gk.Source(x.numpy(), chunk_rows=100)
    assert repr(source) == "Source(x: 300 rows, 2 columns)"
    assert gk.Source.of(source) is source
    assert sum(len(chunk) for chunk in source.chunks()) == 300
    with pytest.raises(TypeError, match="already a Source"):
        gk.Source(source)
    for other in (copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        assert repr(other) == repr(source)


def test_reprs_are_one_line(x):
    result = gk.fit(2, x, max_iter=200)
    assert repr(result).startswith("FitResult(converged after ")
    assert repr(gk.EM()) == "EM()"
    assert repr(gk.EM(tol=1e-6, frozen_means=[True, False])) == "EM(frozen_means=[True, False], tol=1e-06)"
    assert repr(gk.Adam(lr=0.05)) == "Adam(lr=0.05)"
    assert repr(gk.Adam(lr=0.1, batch_size=100)) == "Adam(lr=0.1, batch_size=100)"
    assert repr(gk.bayes.VariationalBayes(concentration=2.0)) == "VariationalBayes(concentration=2.0)"
    means = torch.distributions.Normal(0.0, 10.0)
    prior = gk.bayes.Prior(1, weights=torch.ones(1), means=means, scales=1.0, covariance_type="spherical")
    assert repr(prior) == "Prior(1 spherical components in 1 dimensions; unknown: means)"
    draws = gk.bayes.gibbs(prior, x[:, :1], draws=5, warmup=1, progress=False)
    for value in (result, prior, draws, gk.Source(x.numpy())):
        assert "\n" not in repr(value)
        assert len(repr(value)) < 200


def test_pictures_of_estimators_and_results(x):
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    model = gk.GaussianMixture(2, random_state=0).fit(x.numpy())
    for shown in (model, model.result_):
        assert gk.plotting.density(shown, levels=0)["image"].get_array().shape == (200, 200)
        assert len(gk.plotting.ellipses(shown)) == 2
        assert gk.plotting.pairs(shown).shape == (2, 2)
        plt.close("all")
    with pytest.raises(TypeError, match="mixture must be a Mixture"):
        gk.plotting.ellipses(3)
