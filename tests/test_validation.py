"""Held-out points of a fit: which mixture is kept, how points are split off, and what is not supported."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gmmkeops as gk
from gmmkeops.fitting import split_off


def few_points(seed=0, N=60, D=4):
    """Points so few that the likelihood of others falls while EM continues."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, generator=generator).double(), torch.randn(500, D, generator=generator).double()


@pytest.mark.parametrize(
    "method", [gk.EM(tol=0), gk.EM(tol=0, accelerate=True), gk.Adam(lr=0.05, tol=0), gk.EM(batch_size=20, tol=0)]
)
def test_the_kept_mixture_is_the_best_of_all_iterations(method):
    x, other = few_points()
    start = gk.initialize(x, 4, "kmeans")
    seen = []
    result = gk.fit(start, x, method, validation=other, max_iter=40, callback=lambda step: seen.append(step.mixture))
    values = result.history["validation"]
    assert len(values) == len(result.history["objective"]) == 40
    exact = [gk.analysis.score(mixture, other) for mixture in seen]
    assert values == pytest.approx(exact, abs=1e-8)
    kept = gk.analysis.score(result.mixture, other)
    assert kept >= max(exact) - 1e-9
    plain = gk.fit(start, x, method, max_iter=40)
    assert kept > gk.analysis.score(plain.mixture, other)
    # The reported likelihood is that of the training points under the kept mixture; with minibatches a mean over their updates.
    tolerance = 0.05 if method.batch_size else 1e-9
    assert result.log_likelihood == pytest.approx(gk.analysis.score(result.mixture, x), abs=tolerance)


def test_a_fraction_is_held_out():
    x, _ = few_points(N=100)
    result = gk.fit(3, x, gk.EM(tol=0), validation=0.25, max_iter=10, generator=3)
    left, g, held = split_off(x, None, 0.25, 3)
    assert (len(left), g, len(held.x), held.weights) == (75, None, 25, None)
    both = torch.cat([left, held.x])
    assert torch.equal(both[both[:, 0].argsort()], x[x[:, 0].argsort()])
    assert result.report.total_weight == 75
    assert max(result.history["validation"]) <= gk.analysis.score(result.mixture, held.x) + 1e-9


def test_weights_are_split_with_the_points():
    x, _ = few_points(N=100)
    weights = torch.arange(1.0, 101.0).double()
    left, g, held = split_off(x, weights, 0.3, 0)
    for part, own in ((left, g), (held.x, held.weights)):
        rows = [int((x == row).all(1).nonzero()) for row in part]
        assert own.tolist() == [row + 1.0 for row in rows]
    result = gk.fit(2, x, validation=0.3, sample_weight=weights, generator=0)
    expected = gk.analysis.score(result.mixture, held.x, sample_weight=held.weights)
    # The last mixture may be better than those of all iterations.
    best = max(result.history["validation"])
    assert expected == pytest.approx(best, abs=1e-8) or expected > best


def test_tables_keep_the_names_of_their_columns():
    pandas = pytest.importorskip("pandas")
    x, other = few_points()
    names = ["a", "b", "c", "d"]
    table = pandas.DataFrame(x.numpy(), columns=names)
    reversed_other = pandas.DataFrame(other.numpy(), columns=names)[names[::-1]]
    plain = gk.fit(gk.initialize(x, 2, "kmeans"), x, gk.EM(tol=0), validation=other, max_iter=9)
    found = gk.fit(gk.initialize(table, 2, "kmeans"), table, gk.EM(tol=0), validation=reversed_other, max_iter=9)
    assert found.history["validation"] == plain.history["validation"]
    split = gk.fit(2, table, gk.EM(tol=0), validation=0.2, max_iter=3)
    assert split.mixture.columns == tuple(names)


def test_held_out_points_from_a_file(tmp_path):
    x, other = few_points()
    np.save(tmp_path / "other.npy", other.numpy())
    start = gk.initialize(x, 3, "kmeans")
    found = gk.fit(start, x, gk.EM(tol=0), validation=tmp_path / "other.npy", max_iter=9)
    plain = gk.fit(start, x, gk.EM(tol=0), validation=other, max_iter=9)
    assert found.history["validation"] == pytest.approx(plain.history["validation"], abs=1e-10)


def test_a_checkpoint_resumes_with_the_same_result(tmp_path):
    x, other = few_points()
    start, path = gk.initialize(x, 4, "kmeans"), tmp_path / "c"
    whole = gk.fit(start, x, gk.EM(tol=0), validation=other, max_iter=30)
    gk.fit(start, x, gk.EM(tol=0), validation=other, max_iter=12, checkpoint=path)
    resumed = gk.fit(start, x, gk.EM(tol=0), validation=other, max_iter=30, checkpoint=path)
    assert resumed.history["validation"] == whole.history["validation"]
    assert torch.equal(resumed.mixture.means, whole.mixture.means)
    with pytest.raises(ValueError, match="whose validation differs"):
        gk.fit(start, x, gk.EM(tol=0), validation=other[:-1], max_iter=40, checkpoint=path)


def test_the_estimator_keeps_the_best_too():
    x, other = few_points()
    model = gk.GaussianMixture(4, tol=0, max_iter=30, validation=other, init_params="kmeans").fit(x)
    values = model.result_.history["validation"]
    assert model.score(other) >= max(values) - 1e-9
    fraction = gk.GaussianMixture(2, validation=0.2, random_state=0).fit(x.numpy())
    assert fraction.result_.report.total_weight == 48
    with pytest.raises(ValueError, match="partial_fit does not support validation"):
        model.partial_fit(x)


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        (0.0, "fraction between 0 and 1"),
        (1.5, "fraction between 0 and 1"),
        (0.001, "holds out 0 of 60"),
        (torch.zeros(3, 2), "validation has 2 columns, expected 4"),
        (torch.full((3, 4), float("nan")), "validation"),
    ],
)
def test_wrong_points_get_one_sentence(validation, message):
    x, _ = few_points()
    with pytest.raises(ValueError, match=message):
        gk.fit(2, x, validation=validation)


def test_what_is_not_supported_raises(tmp_path):
    x, other = few_points()
    np.save(tmp_path / "x.npy", x.numpy())
    with pytest.raises(ValueError, match="requires points in memory"):
        gk.fit(2, tmp_path / "x.npy", validation=0.2)
    model = gk.GMM(2, n_components=3, context=2)
    with pytest.raises(ValueError, match="not supported for a GMM with a context"):
        gk.fit(model, x, gk.Adam(), validation=other, max_iter=2)


def test_the_best_of_several_fits_is_that_of_the_held_out_points():
    x, other = few_points()
    options = {"init_params": "random", "random_state": 2, "tol": 0, "max_iter": 20, "validation": other}
    best = gk.GaussianMixture(4, n_init=4, **options).fit(x)
    start = gk.GaussianMixture(4, n_init=1, **options).fit(x)
    assert best.score(other) >= start.score(other) - 1e-9
    singles = [gk.GaussianMixture(4, n_init=runs, **options).fit(x).score(other) for runs in range(1, 5)]
    assert singles == sorted(singles)


def test_a_checkpoint_with_held_out_points_is_not_continued_without(tmp_path):
    x, other = few_points()
    start, path = gk.initialize(x, 3, "kmeans"), tmp_path / "c"
    gk.fit(start, x, gk.EM(tol=0), validation=other, max_iter=3, checkpoint=path)
    with pytest.raises(ValueError, match="whose validation differs"):
        gk.fit(start, x, gk.EM(tol=0), max_iter=5, checkpoint=path)


def test_held_out_points_need_weight():
    x, _ = few_points(N=100)
    weights = torch.zeros(100).double()
    weights[split_off(x, torch.arange(100.0), 0.1, 1)[1].long()] = 1.0
    with pytest.raises(ValueError, match="held-out points have a total weight of zero"):
        gk.fit(2, x, sample_weight=weights, validation=0.1, generator=1)
