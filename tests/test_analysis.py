"""Regions, marginals, conditionals, comparison, selection, files and interchange."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import FAMILIES, PEAK, random_mixture
from sklearn.metrics import silhouette_score
from sklearn.mixture import GaussianMixture as Theirs

import gmmkeops as gk


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def distances(mixture, x, labels):
    z = (x - mixture.means[labels])[:, None, :].expand(-1, mixture.components, -1)
    return mixture.factor.whiten(z)[torch.arange(len(x)), labels].norm(dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("low", "high"), [(1.0, 2.0), (3.0, math.inf), (5.0, math.inf), (0.0, 0.5), (20.0, 20.5)])
def test_shells_are_exact(family, low, high):
    """Radii follow the truncated chi law: 20 000 draws, Kolmogorov-Smirnov at chance 1e-6."""
    mixture = random_mixture(family, D=3)
    x, labels = mixture.sample(20_000, return_labels=True, generator=seeded(), std_range=(low, high))
    radius = distances(mixture, x, labels).numpy()
    assert radius.min() >= low * (1 - 1e-9)
    assert radius.max() <= high * (1 + 1e-9)
    chi = scipy.stats.chi(3)
    top, bottom = chi.sf(low), chi.sf(high)
    assert scipy.stats.kstest(radius, lambda r: (top - chi.sf(r)) / (top - bottom)).pvalue > 1e-6
    share = torch.bincount(labels, minlength=4) / 20_000
    assert bool(((share - mixture.weights).abs() < 5 * (mixture.weights / 20_000).sqrt()).all())


def test_confidence_component_and_twenty_points_beyond_five_sigma():
    mixture = random_mixture("full")
    x, labels = mixture.sample(5000, return_labels=True, generator=seeded(), confidence=0.95, component=2)
    assert set(labels.tolist()) == {2}
    radius = distances(mixture, x, labels)
    edge = math.sqrt(scipy.stats.chi2(2).ppf(0.95))
    assert float(radius.max()) <= edge * (1 + 1e-9)
    assert float(radius.max()) > 0.99 * edge
    model = gk.GaussianMixture.from_mixture(mixture, random_state=0)
    far, of = model.sample(20, std_range=(5.0, np.inf))
    assert far.shape == (20, 2)
    assert bool((distances(mixture, torch.from_numpy(far), torch.from_numpy(of)) >= 5).all())
    for bad, message in (
        ({"std_range": (2.0, 1.0)}, "std_range must be"),
        ({"confidence": 1.5}, "confidence must be above 0"),
        ({"component": 9}, "component must be an integer from -4 to 3, got 9"),
        ({"std_range": (60.0, math.inf)}, "contains less probability than float64 can represent"),
        ({"std_range": (4.0, 5.0), "confidence": 0.5}, "ends at 1.177 standard deviations, below 4"),
    ):
        with pytest.raises(ValueError, match=message):
            mixture.sample(3, **bad)


@pytest.mark.parametrize("family", FAMILIES)
def test_marginal_and_condition(family):
    mixture = random_mixture(family, D=4)
    x = mixture.sample(50, generator=seeded())
    keep, known = [3, 1], [0, 2]
    part = mixture.marginal(keep)
    C = mixture.factor.covariances()[:, keep][:, :, keep].expand(4, 2, 2).numpy()
    direct = sum(
        w * scipy.stats.multivariate_normal(m, S).pdf(x[:, keep].numpy())
        for w, m, S in zip(mixture.weights.numpy(), mixture.means[:, keep].numpy(), C, strict=True)
    )
    assert np.allclose(part.log_prob(x[:, keep]).exp().numpy(), direct)
    # p(a | b) p(b) = p(a, b)
    batch = mixture.condition(known, x[:, known])
    assert batch.batch_shape == (50,)
    rest = [1, 3]
    total = batch.log_prob(x[:, rest]) + mixture.marginal(known).log_prob(x[:, known])
    assert torch.allclose(total, mixture.log_prob(x))
    one = mixture.condition(known, x[3, known])
    assert torch.allclose(one.log_prob(x[3, rest]), batch.log_prob(x[:, rest])[3])
    for call, message in (
        (lambda: mixture.marginal([0, 0]), "columns must be distinct"),
        (lambda: mixture.marginal(4), "columns must be distinct"),
        (lambda: mixture.condition([0, 1, 2, 3], x[0]), "at least one column free"),
        (lambda: mixture.condition([0], x[0]), r"values must have shape \(\*, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


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
    with pytest.raises(ValueError, match="2 and 3 features"):
        gk.analysis.kl_divergence(p, random_mixture("full", D=3))


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_keeps_the_moments(family):
    mixture = random_mixture(family, K=5)
    merged = gk.analysis.merge(mixture, [[0, 3], [1, 4]])
    assert merged.components == 3
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
    assert table.best.components == 3
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_files_round_trip(tmp_path, family, dtype):
    mixture = random_mixture(family, D=3, dtype=dtype)
    path = tmp_path / "mixture.safetensors"
    gk.save(mixture, path)
    back = gk.load(path)
    assert repr(back) == repr(mixture)
    assert torch.equal(back.means, mixture.means)
    assert torch.equal(back.factor.U, mixture.factor.U)
    assert back.means.dtype == dtype
    assert [p.name for p in tmp_path.iterdir()] == ["mixture.safetensors"]
    model = gk.GaussianMixture.from_mixture(mixture)
    model.save(path)
    again = gk.GaussianMixture.load(path)
    x = mixture.sample(5).double().numpy()
    assert np.array_equal(again.score_samples(x), model.score_samples(x))


def test_damaged_files_get_one_sentence(tmp_path):
    path = tmp_path / "mixture.safetensors"
    gk.save(random_mixture("full", D=3), path)
    whole = path.read_bytes()
    for size in range(0, len(whole), max(1, len(whole) // 20)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=str(path)):
            gk.load(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        gk.load(tmp_path / "nothing")
    from safetensors.torch import save_file

    header = {"format": "gmmkeops.mixture", "version": 1, "family": "full", "features": 3, "components": 4}
    good = {
        "logits": torch.zeros(4),
        "means": torch.zeros(4, 3),
        "log_diagonal": torch.zeros(4, 3),
        "upper": torch.zeros(4, 3),
    }
    for tensors, changed, message in (
        (good, {"version": 2}, "has version 2"),
        (good, {"family": "round"}, "unknown family 'round'"),
        ({"logits": good["logits"]}, {}, "holds the tensors"),
        (good | {"means": torch.full((4, 3), math.nan)}, {}, "is damaged: means must be finite"),
        (good | {"upper": torch.zeros(4, 2)}, {}, "is damaged: upper must have shape"),
        (good | {"means": torch.zeros(4, 3, dtype=torch.int64)}, {}, "neither float32 nor float64"),
    ):
        save_file(tensors, path, {"gmmkeops.mixture": json.dumps(header | changed)})
        with pytest.raises(ValueError, match=message):
            gk.load(path)
    save_file(good, path)
    with pytest.raises(ValueError, match="holds no gmmkeops mixture"):
        gk.load(path)
    with pytest.raises(TypeError, match="save takes a Mixture"):
        gk.save(3, path)


def test_a_save_cut_short_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "mixture.safetensors"
    old = random_mixture("full")
    gk.save(old, path)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        gk.save(random_mixture("diag"), path)
    assert [p.name for p in tmp_path.iterdir()] == ["mixture.safetensors"]
    assert torch.equal(gk.load(path).means, old.means)


@pytest.mark.parametrize("family", ["full", "tied", "diag", "spherical"])
def test_scikit_learn_both_ways(family):
    x = random_mixture("full", K=3).sample(300, generator=seeded()).numpy()
    theirs = Theirs(3, covariance_type=family, random_state=0).fit(x)
    ours = gk.from_sklearn(theirs)
    assert np.allclose(ours.score_samples(x), theirs.score_samples(x))
    back = gk.to_sklearn(ours)
    assert np.allclose(back.score_samples(x), theirs.score_samples(x))
    assert np.array_equal(back.predict(x), theirs.predict(x))
    assert back.bic(x) == pytest.approx(theirs.bic(x))
    with pytest.raises(ValueError, match="is not fitted"):
        gk.from_sklearn(Theirs())


@pytest.mark.parametrize("family", ["tied_diag", "tied_spherical"])
def test_types_that_scikit_learn_lacks_become_tied(family):
    mixture = random_mixture(family)
    x = mixture.sample(20).numpy()
    assert np.allclose(gk.to_sklearn(mixture).score_samples(x), mixture.log_prob(x).numpy())


def test_estimator_memory_does_not_hold_points_times_components():
    """10⁶ x 30 responsibilities would be 240 MB for each copy; the peak above imports and data stays under 500 MB."""
    code = f"""{PEAK}
import torch, gmmkeops as gk
x = torch.rand(1_000_000, 3)
before = peak()
gk.GaussianMixture(100, max_iter=2, tol=0, random_state=0).fit(x).predict(x)
print((peak() - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 500


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
        f"Selection(models=2, criterion='bic', best: components={best['components']}, covariance_type='diag')"
    )
    shown = table._repr_html_()
    assert shown.count("<tr>") == 3
    assert f"<th>diag</th><th>{best['components']}</th>" in shown
    assert len(str(table).splitlines()) == 3
