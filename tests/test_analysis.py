"""Analysis: criteria, selection, silhouettes, distances between mixtures, merging, and the names of their arguments."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import FAMILIES, random_mixture
from sklearn.metrics import silhouette_score
from sklearn.mixture import GaussianMixture as Theirs

import gmmkeops as gk


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_distances_between_mixtures():
    """Closed forms for single Gaussians, within 5 standard errors."""
    p = gk.Mixture.from_parameters([1.0], [[0.0, 0.0]], [[1.0, 4.0]], "diag")
    q = gk.Mixture.from_parameters([1.0], [[1.0, 0.0]], [[2.0, 4.0]], "diag")
    closed = 0.5 * (0.5 + 0.5 - 1 + math.log(2))
    value, error = gk.analysis.kl_divergence(p, q, generator=seeded())
    assert abs(value - closed) < 5 * error
    assert error < 0.01
    same = gk.analysis.jensen_shannon(p, p, generator=seeded())
    assert same.value == pytest.approx(0, abs=1e-12)
    far = gk.Mixture.from_parameters([1.0], [[100.0, 0.0]], [[1.0, 4.0]], "diag")
    assert gk.analysis.jensen_shannon(p, far, generator=seeded()).value == pytest.approx(math.log(2))
    shifted = gk.Mixture.from_parameters([1.0], [[1.0, 0.0]], [[1.0, 4.0]], "diag")
    value, error = gk.analysis.total_variation(p, shifted, generator=seeded())
    assert abs(value - (2 * scipy.stats.norm.cdf(0.5) - 1)) < 5 * error
    with pytest.raises(ValueError, match="got 2 and 3"):
        gk.analysis.kl_divergence(p, random_mixture("full", D=3))


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_keeps_the_moments(family):
    mixture = random_mixture(family, K=5)
    merged = gk.analysis.merge(mixture, [[0, 3], [1, 4]])
    assert merged.n_components == 3
    assert torch.allclose(merged.mean, mixture.mean)
    assert torch.allclose(merged.covariance_matrix, mixture.covariance_matrix)
    assert torch.allclose(merged.means[2], mixture.means[2])
    with pytest.raises(ValueError, match="groups must be disjoint"):
        gk.analysis.merge(mixture, [[0, 1], [1, 2]])


def test_criteria_and_threshold():
    x = random_mixture("full", K=3).sample(500, generator=seeded())
    theirs = Theirs(3, random_state=0).fit(x.numpy())
    mixture = gk.from_sklearn(theirs).mixture_
    assert gk.analysis.bic(mixture, x) == pytest.approx(theirs.bic(x.numpy()))
    assert gk.analysis.aic(mixture, x) == pytest.approx(theirs.aic(x.numpy()))
    entropy = scipy.stats.entropy(theirs.predict_proba(x.numpy()), axis=1).sum()
    assert gk.analysis.icl(mixture, x) == pytest.approx(theirs.bic(x.numpy()) + 2 * entropy)
    doubled = torch.full((500,), 2.0)
    assert gk.analysis.bic(mixture, x, sample_weight=doubled) == pytest.approx(
        gk.analysis.bic(mixture, torch.cat([x, x]))
    )
    cut = gk.analysis.anomaly_threshold(mixture, x, 5)
    assert cut == pytest.approx(np.percentile(theirs.score_samples(x.numpy()), 5))
    with pytest.raises(ValueError, match="percentile must be"):
        gk.analysis.anomaly_threshold(mixture, x, 101)


@pytest.mark.parametrize(
    ("family", "parameters"),
    # Weights (3) and means (8), and covariances: one of all components if they are tied.
    [("full", 23), ("tied", 14), ("diag", 19), ("tied_diag", 13), ("spherical", 15), ("tied_spherical", 12)],
)
def test_the_penalty_of_aic3_is_three_for_each_parameter(family, parameters):
    mixture = random_mixture(family, K=4)
    x = mixture.sample(300, generator=seeded())
    g = torch.rand(300, generator=seeded(1)).double()
    for weights, total in ((None, 300.0), (g, float(g.sum()))):
        loss = -2 * total * gk.analysis.score(mixture, x, sample_weight=weights)
        found = gk.analysis.aic3(mixture, x, sample_weight=weights)
        assert found == pytest.approx(loss + 3 * parameters)
        # AIC3 equals BIC where the logarithm of the total weight is 3.
        difference = gk.analysis.bic(mixture, x, sample_weight=weights) - found
        assert difference == pytest.approx(parameters * (math.log(total) - 3))


def test_a_component_without_weight_counts_in_aic3():
    mixture = random_mixture("full", K=3)
    x = mixture.sample(100, generator=seeded())
    logits = torch.cat([mixture.logits, torch.full((1,), -math.inf).double()])
    means = torch.cat([mixture.means, mixture.means[:1]])
    covariances = mixture.factor.covariances()
    more = gk.Mixture(logits, means, gk.FullFactor.from_covariances(torch.cat([covariances, covariances[:1]])))
    assert gk.analysis.aic3(more, x) == pytest.approx(gk.analysis.aic3(mixture, x) + 3 * 6)


def test_silhouette():
    generator = seeded()
    x = torch.randn(600, 2, generator=generator)
    labels = torch.arange(600) % 3
    x = x + 4.0 * labels[:, None]
    exact, centroid = gk.analysis.silhouette(x, labels, samples=None)
    assert exact == pytest.approx(silhouette_score(x.numpy(), labels.numpy()), abs=1e-6)
    sampled, same = gk.analysis.silhouette(x, labels, samples=300)
    assert abs(sampled - exact) < 0.05
    assert same == centroid
    assert 0.4 < centroid < 1
    with pytest.raises(ValueError, match="at least two clusters"):
        gk.analysis.silhouette(x, torch.zeros(600))


def test_selection_finds_three_full_components():
    means = torch.tensor([[-6.0, 0.0], [0.0, 0.0], [6.0, 0.0]]).double()
    C = torch.tensor([[[1.0, 0.9], [0.9, 1.0]], [[1.0, -0.9], [-0.9, 1.0]], [[0.2, 0.0], [0.0, 2.0]]]).double()
    x = gk.Mixture.from_parameters([0.3, 0.3, 0.4], means, C).sample(3000, generator=seeded())
    table = gk.analysis.select(x, range(1, 6), ["full", "tied", "diag", "spherical"])
    assert len(table.rows) == len(table.results) == 20
    assert table.best.n_components == 3
    assert table.best.factor.family == "full"
    text = str(table)
    assert text.count("\n") == 20
    assert text.count("<- best") == 1
    row = table.rows[8]
    assert row["bic"] == pytest.approx(gk.analysis.bic(table.results[8].mixture, x))
    with pytest.raises(ValueError, match="criterion must be"):
        gk.analysis.select(x, [1], criterion="gut")
    with pytest.raises(ValueError, match="components and covariance_types must not be empty"):
        gk.analysis.select(x, [])


@pytest.mark.filterwarnings("ignore:weights is deprecated:DeprecationWarning")
def test_sample_weight_and_random_state_beside_the_older_names():
    mixture = random_mixture("full")
    x = mixture.sample(60, generator=torch.Generator().manual_seed(0))
    g = torch.rand(60, generator=torch.Generator().manual_seed(1)).double()
    for function in (gk.analysis.score, gk.analysis.bic, gk.analysis.aic, gk.analysis.icl):
        with pytest.warns(DeprecationWarning, match="use sample_weight"):
            older = function(mixture, x, weights=g)
        assert function(mixture, x, sample_weight=g) == older != function(mixture, x)
    with pytest.warns(DeprecationWarning, match="use sample_weight"):
        older = gk.standard_errors(mixture, x, robust=False, joint=False, weights=g)
    found = gk.standard_errors(mixture, x, robust=False, joint=False, sample_weight=g)
    assert torch.equal(found.means, older.means)
    other = random_mixture("full", seed=1)
    for function in (gk.analysis.kl_divergence, gk.analysis.jensen_shannon, gk.analysis.total_variation):
        given = function(mixture, other, samples=50, generator=torch.Generator().manual_seed(3))
        for seed in (3, np.int64(3)):
            assert function(mixture, other, samples=50, random_state=seed) == given
        assert function(mixture, other, samples=50, random_state=4) != given
    tables = [
        gk.analysis.select(x, [1, 2], sample_weight=g, random_state=3, max_iter=3),
        gk.analysis.select(
            x, n_components=[1, 2], sample_weight=g, generator=torch.Generator().manual_seed(3), max_iter=3
        ),
        gk.analysis.select(x, n_components=[1, 2], sample_weight=g, generator=3, max_iter=3),
    ]
    with pytest.warns(DeprecationWarning, match="components is deprecated; use n_components"):
        tables.append(gk.analysis.select(x, components=[1, 2], sample_weight=g, generator=3, max_iter=3))
    assert len({tuple(row["bic"] for row in table.rows) for table in tables}) == 1
    labels = mixture.predict(x)
    assert gk.analysis.silhouette(x, labels, samples=20, random_state=3) == gk.analysis.silhouette(
        x, labels, samples=20, generator=torch.Generator().manual_seed(3)
    )


@pytest.mark.filterwarnings("ignore:weights is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m, x: gk.analysis.bic(m, x, sample_weight=-x[:, 0].abs()), ValueError, "^sample_weight must"),
        (lambda m, x: gk.standard_errors(m, x, sample_weight=[1.0]), ValueError, "^sample_weight must"),
        (lambda m, x: gk.analysis.select(x, [1], sample_weight=[1.0]), ValueError, "^sample_weight must"),
        (lambda m, x: gk.analysis.select(x, n_clusters=[1]), TypeError, "no argument n_clusters; pass n_components="),
        (lambda m, x: gk.analysis.select(x, k=[1]), TypeError, "select has no argument k; pass n_components="),
        (
            lambda m, x: gk.analysis.select(x, [1], covariance_type="full"),
            TypeError,
            "pass covariance_types=, a list",
        ),
        (lambda m, x: gk.analysis.kl_divergence(m, m, n_samples=9), TypeError, "no argument n_samples; pass samples="),
        (
            lambda m, x: gk.analysis.bic(m, x, sample_weight=x, weights=x),
            TypeError,
            "both sample_weight and weights",
        ),
    ],
)
def test_names_of_other_libraries_get_the_right_one(call, kind, message):
    mixture = random_mixture("full")
    with pytest.raises(kind, match=message):
        call(mixture, mixture.sample(30, generator=torch.Generator().manual_seed(0)))


def test_older_names_warn():
    mixture = random_mixture("full")
    x = mixture.sample(30, generator=torch.Generator().manual_seed(0))
    with pytest.warns(DeprecationWarning, match="weights is deprecated; use sample_weight") as caught:
        gk.analysis.score(mixture, x, weights=torch.ones(30))
    assert caught[0].filename == __file__


def test_results_in_one_line_and_as_tables():
    mixture = gk.Mixture(weights=[1.0], means=[[0.0]], covariances=[1.0], covariance_type="spherical")
    x = mixture.sample(100, generator=torch.Generator().manual_seed(0))
    assert repr(gk.standard_errors(mixture, x)) == "StandardErrors(components=1, features=1, joint=True, points=100)"
    assert repr(gk.analysis.kl_divergence(mixture, mixture)) == "Estimate(value=0.0, error=0.0)"
    table = gk.analysis.select(x, [1, 2], ["diag"], max_iter=2)
    best = min(table.rows, key=lambda row: row["bic"])
    assert repr(table) == (
        f"Selection(models=2, criterion='bic', best: n_components={best['n_components']}, covariance_type='diag')"
    )
    shown = table._repr_html_()
    assert shown.count("<tr>") == 3
    assert f"<th>diag</th><th>{best['n_components']}</th>" in shown
    assert len(str(table).splitlines()) == 3
