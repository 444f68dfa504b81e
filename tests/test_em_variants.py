"""Variants of EM: frozen, hard, stochastic, stepwise, annealed and accelerated."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from conftest import FAMILIES, cloud, plain_start, random_mixture, rises, tutorial_spiral

import gmmkeops as gk
from gmmkeops import penalties as P
from gmmkeops.fitting import extrapolated


def test_annealing_spares_components_until_it_is_over():
    x = tutorial_spiral(4000, 0)
    start, method = gk.initialize(x, 30), gk.EM(temperature=(0.1, 20), tol=0)
    for penalty in (P.SqrtWeights(20), P.Dirichlet(0.1)):
        cold = gk.fit(start, x, gk.EM(tol=0), penalty=penalty, max_iter=200)
        warm = gk.fit(start, x, method, penalty=penalty, max_iter=200)
        assert set(warm.history["active"][:20]) == {30}
        assert warm.objective < cold.objective + 0.01
    assert 1 < gk.fit(start, x, method, penalty=P.SqrtWeights(20), max_iter=200).report.n_active_components < 30


@pytest.mark.parametrize("accelerate", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_parts_stay(family, accelerate):
    x = cloud(6)
    start = random_mixture(family, K=3, D=2, condition=2.0)
    keep = [True, False, False]
    tied = start.factor.leading == 1
    result = gk.fit(
        start,
        x,
        gk.EM(
            tol=0,
            frozen_weights=keep,
            frozen_means=keep,
            frozen_covariances=True if tied else keep,
            accelerate=accelerate,
        ),
        max_iter=10,
    )
    mixture = result.mixture
    assert torch.allclose(mixture.weights[0], start.weights[0])
    assert torch.allclose(mixture.means[0], start.means[0])
    assert torch.allclose(mixture.factor.covariances()[0], start.factor.covariances()[0])
    assert not torch.allclose(mixture.means[1], start.means[1], atol=1e-3)
    assert rises(result) < 1e-9
    if tied:
        with pytest.raises(ValueError, match="frozen_covariances must be True or False for a tied covariance"):
            gk.fit(start, x, gk.EM(frozen_covariances=keep))


def test_hard_em_with_a_frozen_sphere_is_k_means():
    from sklearn.cluster import KMeans

    x = cloud(7)
    start = plain_start(x, 3, "tied_spherical")
    method = gk.EM(assignment="hard", frozen_covariances=True, frozen_weights=True, tol=0)
    ours = gk.fit(start, x, method, max_iter=60).mixture.means
    theirs = KMeans(3, init=start.means.numpy(), n_init=1, max_iter=60, tol=0, algorithm="lloyd").fit(x.numpy())
    assert np.allclose(ours.numpy(), theirs.cluster_centers_, atol=1e-9)


def test_classification_likelihood_is_monotone():
    for seed in range(10):
        x = cloud(seed)
        result = gk.fit(plain_start(x, 4, "full"), x, gk.EM(assignment="hard", tol=0, reg_covar=0), max_iter=20)
        values = result.history["objective"]
        assert all(b <= a + 1e-9 for a, b in itertools.pairwise(values))
        # The result holds the likelihood of the mixture, not of the classification.
        assert abs(result.log_likelihood - float(result.mixture.log_prob(x).mean())) < 1e-12


def test_stochastic_em_wanders_near_the_optimum_and_repeats():
    x = cloud(8, N=3000)
    start = gk.initialize(x, 3)
    best = gk.fit(start, x, gk.EM(tol=1e-8), max_iter=200)
    runs = [gk.fit(start, x, gk.EM(assignment="stochastic", tol=0), max_iter=30) for _ in range(2)]
    assert runs[0].history["objective"] == runs[1].history["objective"]
    assert torch.equal(runs[0].mixture.means, runs[1].mixture.means)
    assert torch.equal(runs[0].mixture.means, runs[1].mixture.means)
    assert best.log_likelihood - 0.01 < runs[0].log_likelihood < best.log_likelihood + 1e-6


@pytest.mark.parametrize("average", [False, True])
def test_stepwise_em_nears_full_em_in_three_passes(average):
    x = cloud(9, N=20_000)
    start = gk.initialize(x, 3)
    full = gk.fit(start, x, gk.EM(tol=0), max_iter=400)
    method = gk.EM(batch_size=500, average=average, tol=0)
    parts = gk.fit(start, x, method, max_iter=3)
    assert full.log_likelihood - parts.log_likelihood < 1e-3
    assert abs(parts.log_likelihood - float(parts.mixture.log_prob(x).mean())) < 1e-10


def test_partial_fit_follows_a_stream():
    x = cloud(10, N=20_000) + 5e6
    model = gk.GaussianMixture(3, random_state=0)
    for part in x.split(500):
        model.partial_fit(part)
    full = gk.GaussianMixture(3, random_state=0, tol=1e-8, max_iter=300).fit(x)
    assert full.score(x) - model.score(x) < 5e-3
    with pytest.raises(AttributeError, match="partial_fit requires solver="):
        gk.GaussianMixture(2, solver="adam").partial_fit(x)


def test_annealing_escapes_a_bad_start():
    """Three of four components start on one blob; heated they meet in the middle, and come apart one by one."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.tensor([[-6.0], [-3.0], [3.0], [6.0]]).double()
    x = centers[torch.arange(2000) % 4] + 0.5 * torch.randn(2000, 1, generator=generator, dtype=torch.float64)
    start = gk.Mixture.from_parameters([0.25] * 4, [[-6.2], [-6.0], [-5.8], [5.0]], [0.25] * 4, "spherical")
    cold = gk.fit(start, x, gk.EM(tol=1e-6, frozen_covariances=True), max_iter=500)
    method = gk.EM(tol=1e-6, frozen_covariances=True, temperature=(0.002, 1000))
    warm = gk.fit(start, x, method, max_iter=1500)
    assert warm.log_likelihood > cold.log_likelihood + 0.1
    assert torch.allclose(warm.mixture.means.sort(0).values, centers, atol=0.2)
    # Objectives are those of the mixture, not of the heated one.
    assert abs(warm.history["log_likelihood"][0] - float(start.log_prob(x).mean())) < 1e-12


def test_acceleration_never_rises_and_needs_fewer_passes():
    saved = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2000, 2, generator=generator, dtype=torch.float64)
        x[:1000, 0] += 1.5
        start = plain_start(x, 3, "full")
        # An accelerated iteration reads the points three times: fewer readings lead further.
        slow = gk.fit(start, x, gk.EM(tol=0), max_iter=300)
        fast = gk.fit(start, x, gk.EM(tol=0, accelerate=True), max_iter=70)
        assert rises(fast) < 1e-10
        saved.append(fast.log_likelihood - slow.log_likelihood)
    assert np.median(saved) > 1e-5


def test_a_prior_weighs_against_all_points_when_they_come_in_batches():
    """Batches stand for all points: the prior's 1000 points pull as they do against the 4000 of a full pass."""
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    penalty = P.NormalMean(torch.tensor([6.0, 6.0]), 1000.0)
    start = gk.Mixture.from_parameters([1.0], [[0.0, 0.0]], [[[1.0, 0.0], [0.0, 1.0]]])
    batches = gk.fit(start, x, gk.EM(batch_size=200, tol=0), penalty=penalty, max_iter=10).mixture
    # (4000 · mean + 1000 · 6) / 5000
    assert torch.allclose(batches.means[0], (4000 * x.mean(0) + 6000) / 5000, atol=0.05)


def test_an_average_over_batches_is_far_less_noisy_than_the_last_one():
    """Both are about the points' mean; a running average with other weights than 1 / n keeps the last batches' noise."""
    x = torch.randn(2000, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = gk.Mixture.from_parameters([1.0], torch.zeros(1, 30).double(), torch.ones(1, 30).double(), "diag")
    last, average = (
        gk.fit(start, x, gk.EM(batch_size=20, average=average, tol=0), max_iter=5).mixture.means[0] - x.mean(0)
        for average in (False, True)
    )
    assert float(average.norm()) < 0.3 * float(last.norm())


def poor():
    """Points of six clusters, and a start with two components in one of them and two clusters in one component."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.tensor([[0, 0], [8, 0], [0, 8], [8, 8], [20, 0], [20, 8]]).double()
    x = centers[torch.arange(1200) % 6] + torch.randn(1200, 2, generator=generator, dtype=torch.float64)
    means = torch.cat([centers[:4], centers[:2] + 0.5])
    return x, gk.Mixture(torch.zeros(6).double(), means, gk.FullFactor(torch.zeros(6, 2).double()))


@pytest.mark.parametrize("options", [{}, {"backend": "dense"}, {"penalty": gk.penalties.SqrtWeights(0.01)}])
def test_refinement_leaves_a_local_optimum(options):
    x, start = poor()
    plain = gk.fit(start, x, gk.EM(), max_iter=500, **options)
    refined = gk.fit(start, x, gk.EM(refine=True), max_iter=500, **options)
    assert refined.objective < plain.objective - 0.1
    assert refined.mixture.n_components == 6


def test_refinement_is_not_worse_and_keeps_the_best_optimum():
    x, _ = poor()
    best = gk.fit(6, x, gk.EM(tol=1e-8), max_iter=2000)
    again = gk.fit(best.mixture, x, gk.EM(refine=True, tol=1e-8), max_iter=2000)
    assert again.objective <= best.objective + 1e-7


def test_refinement_uses_components_without_weight():
    x, start = poor()
    logits = start.logits.clone()
    logits[4:] = -float("inf")
    dead = gk.Mixture(logits, start.means, start.factor)
    plain = gk.fit(dead, x, gk.EM(), max_iter=300)
    refined = gk.fit(dead, x, gk.EM(refine=True), max_iter=300)
    assert plain.report.n_active_components == 4
    assert refined.report.n_active_components == 6
    assert refined.objective < plain.objective - 0.1


@pytest.mark.parametrize(
    "settings", [{"batch_size": 10}, {"assignment": "hard"}, {"temperature": (0.5, 3)}, {"frozen_means": True}]
)
def test_refinement_is_not_silently_combined(settings):
    with pytest.raises(ValueError, match="refine=True cannot be combined"):
        gk.EM(refine=True, **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_extrapolation_to_infinite_precisions_is_discarded(family):
    """The covariance of a component that loses its weight may be extrapolated to nothing."""
    first = random_mixture(family, 3, 2)
    shrinking = [
        gk.Mixture(first.logits, first.means, first.factor.replace(**{**first.factor.tensors, "log_diagonal": logs}))
        for logs in (first.factor.tensors["log_diagonal"] + change for change in (0.0, 300.0, 560.0))
    ]
    assert extrapolated(*shrinking) is None
    slowly = [
        gk.Mixture(first.logits, first.means, first.factor.replace(**{**first.factor.tensors, "log_diagonal": logs}))
        for logs in (first.factor.tensors["log_diagonal"] + change for change in (0.0, 3.0, 5.6))
    ]
    assert extrapolated(*slowly) is not None
