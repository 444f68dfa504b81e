"""The start of a search in the compiled library: spread of the columns, white metric, and k-means with EM steps after it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import HAS_NATIVE

import gmmkeops as gk
from gmmkeops import reductions
from gmmkeops.data import trimmed_spread
from gmmkeops.fitting import metric, search
from gmmkeops.fitting.candidates import Candidates
from gmmkeops.fitting.initialization import start_of, started
from gmmkeops.fitting.objective import FLOOR
from gmmkeops.fitting.rounds import Found
from gmmkeops.reductions.native import columns, kmeans, rounds

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the native engine has not been compiled")


def clusters(N, D, K, seed=0, distance=3.0):
    """Clusters of different covariances."""
    rng = np.random.default_rng(seed)
    A = 0.4 * rng.standard_normal((K, D, D)) + np.eye(D)
    labels = rng.integers(K, size=N)
    x = distance * rng.standard_normal((K, D))[labels] + np.einsum("nde,ne->nd", A[labels], rng.standard_normal((N, D)))
    return torch.from_numpy(x)


def weighted(x, seed=0):
    """Weights, of which some are zero."""
    g = torch.rand(len(x), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    g[::7] = 0
    return g


def search_of(x, K, **settings):
    generator = torch.Generator().manual_seed(0)
    own = {"method": None, "penalty": None, "prior": None, "generator": generator, "backend": "auto"}
    return search.Search(x, None, K, gk.FullFactor, False, **own | settings)


# Spread


def natively(monkeypatch, x, weights=None):
    """The spread that the library computes, or None where it leaves it to torch."""
    asked = []
    monkeypatch.setattr(columns, "trimmed_spread", lambda *given: asked.append(given))
    found = columns.spread_of(x, weights)
    return None if asked else found


@pytest.mark.parametrize("N", [2, 5, 300])
@pytest.mark.parametrize("D", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("outliers", [0, 1])
@pytest.mark.parametrize("some", [False, True])
def test_the_spread_is_that_of_torch(N, D, dtype, outliers, some, monkeypatch):
    x = clusters(N, D, 3) * torch.logspace(-3, 3, D, dtype=torch.float64) + 1e4
    x[N // 2 : N // 2 + outliers] += 1e6
    x, g = x.to(dtype), weighted(x) if some and N > 2 else None
    found, expected = natively(monkeypatch, x, g), trimmed_spread(x, g)
    assert found is not None
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float64
        torch.testing.assert_close(one, other, rtol=1e-11, atol=0)


def test_several_rounds_of_trimming(monkeypatch):
    """Each outlier hides the smaller ones."""
    x = clusters(400, 2, 2)
    x[:6, 0] = torch.tensor([1e3, 1e5, 1e7, 1e9, 1e11, 1e13])
    found, expected = natively(monkeypatch, x), trimmed_spread(x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert float(found[1].max()) < 20


@pytest.mark.parametrize("case", ["constant", "huge", "tiny", "many", "columns"])
def test_what_the_library_leaves_to_torch(case, monkeypatch):
    x = clusters(300, 2, 2)
    if case == "constant":
        x[:, 1] = 7.0
    elif case in ("huge", "tiny"):
        x *= 1e151 if case == "huge" else 1e-160
    elif case == "many":
        x = clusters(60_000, 4, 1)
    else:
        # Not contiguous, which is no reason.
        x = clusters(300, 4, 2)[:, ::2]
    left = natively(monkeypatch, x) is None
    assert left == (case != "columns")
    monkeypatch.undo()
    if case in ("huge", "tiny"):
        with pytest.raises(ValueError, match="rescale the columns"):
            columns.spread_of(x)
    else:
        for one, other in zip(columns.spread_of(x), trimmed_spread(x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


# White metric


@pytest.mark.parametrize("D", [1, 2, 3, 15, 16, 17, 33, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("some", [False, True])
def test_the_white_metric_is_that_of_torch(D, dtype, some, monkeypatch):
    z = clusters(150, D, 2)
    z = ((z - z.mean(0)) / z.std(0)).to(dtype)
    # One point is clipped, and one column is constant.
    z[3, 0] = 40.0
    z[:, D // 2] = 0.0 if D > 1 else z[:, 0]
    g = weighted(z) if some else None
    assert columns.native_white(z, g, 10.0, 1e-6) is not None
    covariance, root = metric.white_metric(z, g)
    monkeypatch.setattr(reductions, "native_white", lambda *_: None)
    expected, other = metric.white_metric(z, g)
    torch.testing.assert_close(covariance, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(root, other, rtol=1e-6, atol=1e-9)
    assert torch.equal(root, root.triu())
    torch.testing.assert_close(root.T @ covariance @ root, torch.eye(D).double(), rtol=0, atol=1e-8)


# k-means, and EM steps from its clusters, in one call


def both_ways(monkeypatch, call):
    """Results of a function with one call of the library for clusters and EM steps, and with several calls."""
    in_one_call, used = Candidates.in_one_call, []

    def spy(*given, clusters=None, **options):
        found = em_climb(*given, clusters=clusters, **options)
        used.append(clusters is not None and found is not None)
        return found

    em_climb = reductions.em_climb
    monkeypatch.setattr(reductions, "em_climb", spy)
    one = call()
    assert any(used)
    used.clear()
    monkeypatch.setattr(Candidates, "in_one_call", lambda *_: None)
    other = call()
    assert not any(used)
    monkeypatch.setattr(Candidates, "in_one_call", in_one_call)
    return one, other


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("family", ["full", "diag", "spherical"])
@pytest.mark.parametrize(
    ("N", "D", "K", "distance"),
    [
        (60, 1, 1, 3),
        (200, 1, 4, 2),
        (200, 3, 4, 1),
        (300, 3, 3, 30),
        (1500, 2, 4, 2),
        (1000, 64, 2, 3),
        (2000, 20, 4, 5),
    ],
)
def test_one_call_finds_what_several_ones_find(N, D, K, distance, family, some, monkeypatch):
    """Also where components are too many for the points, or the library evaluates points in float32."""
    if family != "full" and D > 1 and K > 1:
        pytest.skip("clusters in the white metric need full covariances in one call")
    x = clusters(N, D, K, N + D, distance)
    settings = {"covariance_type": family, "sample_weight": weighted(x) if some else None, "method": gk.EM()}

    def call():
        generator = torch.Generator().manual_seed(5)
        return *start_of(x, K, generator=generator, **settings), generator.get_state()

    (one, report, state), (other, expected, after) = both_ways(monkeypatch, call)
    assert torch.equal(state, after)
    assert replace(report, seconds=0) == replace(expected, seconds=0)
    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.means, other.means)
    for name, tensor in one.factor.tensors.items():
        assert torch.equal(tensor, other.factor.tensors[name])


def test_copies_of_clusters_are_no_candidates(monkeypatch):
    """The clusters of both metrics are the same if they are well separated."""
    x, kept = clusters(300, 3, 3, distance=30), []
    searched = search.Climber.searched_from_clusters

    def spy(*given):
        kept.append(searched(*given))
        return kept[-1]

    monkeypatch.setattr(search.Climber, "searched_from_clusters", spy)
    assert start_of(x, 3)[1].candidates == 2
    assert start_of(clusters(300, 3, 6, distance=1), 6)[1].candidates == 2
    assert [len(candidates) for candidates, _ in kept] == [1, 2]


@pytest.mark.parametrize("column", ["any", "equal means", "constant"])
def test_copies_are_found_in_any_order(column):
    """Also if the first column does not tell the components from each other."""
    x = clusters(1200, 6, 5, seed=1, distance=30)
    labels = gk.initialize(x, 5).predict(x)
    assert len(set(labels.tolist())) == 5
    if column == "constant":
        x[:, 0] = 0
    elif column == "equal means":
        for k in range(5):
            own = (labels == k).nonzero()[:, 0]
            half = len(own) // 2
            noise = torch.randn(half, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
            x[own, 0] = torch.cat([noise, -noise, torch.zeros(len(own) - 2 * half)])
    one = search_of(x, 5)
    found = one.climber().searched_from_clusters(*one.clusters.in_one_call(0, True), 15, 1e-3, 0)
    # A constant column is left to torch.
    assert (found is None) == (column == "constant")
    assert found is None or len(found[0]) == 1
    assert len(search_of(x, 5).clusters.begun(0)) == 1


def test_later_runs_use_the_points_of_the_first_one(monkeypatch):
    """The first run finds that float32 points are too coarse; k-means of the fourth one then uses those in float64."""
    x = clusters(1000, 20, 1) * 1e-2 + 100 * torch.from_numpy(np.eye(4, 20))[torch.arange(1000) % 4]
    monkeypatch.setattr(search, "_SAME", 0.0)
    one, other = both_ways(monkeypatch, lambda: gk.initialize(x, 4, n_init=4))
    assert torch.equal(one.means, other.means)
    clusters_of = search_of(x, 4).clusters
    assert clusters_of.x.dtype == torch.float32
    exact = clusters_of.objective.whole().exact()
    assert clusters_of.x is clusters_of._batch.points is exact.points


@pytest.mark.parametrize("case", ["empty cluster", "coarse points"])
def test_what_one_call_does_not_find_is_found_by_several(case, monkeypatch):
    calls, found = [], []
    searched, several, begun = search.Climber.searched_from_clusters, search.Climber.searched, Candidates.begun

    def spy(*given):
        found.append(searched(*given))
        return found[-1]

    def spy_begun(*given):
        calls.append(given)
        return begun(*given)

    monkeypatch.setattr(search.Climber, "searched_from_clusters", spy)
    monkeypatch.setattr(Candidates, "begun", spy_begun)
    if case == "empty cluster":
        # Fewer different points than clusters.
        x = clusters(3, 2, 1).repeat(40, 1)
        start, report = start_of(x, 5)
        assert found == [None]
        assert len(calls) == 1
    else:
        # Narrow clusters: the library finds them in float32, in which it must not evaluate their mixtures.
        x = clusters(1000, 20, 1)
        x = x * 1e-2 + 100 * torch.from_numpy(np.eye(4, 20))[torch.arange(1000) % 4]
        monkeypatch.setattr(search.Climber, "searched", lambda *given: calls.append(0) or several(*given))
        start, report = start_of(x, 4, method=gk.EM(reg_covar=0))
        assert len(calls) == 1
        assert found[0] is not None
        assert start.predict(x[:8]).tolist() == start.predict(x[:4]).tolist() * 2
    assert report.candidates == 2
    assert bool(start.log_prob(x).isfinite().all())


@pytest.mark.parametrize("D", [2, 5])
def test_equal_points_in_a_column_of_a_cluster(D, monkeypatch):
    """A cluster of few points whose values in a column are equal gets its variance there from the others, as in torch."""
    x = clusters(120, D, 3, distance=6)
    x[:3] = 40.0 + torch.arange(3.0)[:, None] * torch.arange(D)
    candidates = search_of(x, 4).clusters
    fast = candidates.begun(0)[0]
    candidates.generator.manual_seed(0)
    monkeypatch.setattr(Candidates, "_by_one_step", lambda *_: None)
    slow = candidates.begun(0)[0]
    assert float(slow.weights.min()) * 120 == pytest.approx(3)
    torch.testing.assert_close(fast.weights, slow.weights)
    torch.testing.assert_close(fast.means, slow.means)
    torch.testing.assert_close(fast.factor.covariances(), slow.factor.covariances(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
@pytest.mark.parametrize(("N", "D"), [(1, 1), (5, 3), (50, 16), (51, 17), (66, 40), (30, 100)])
def test_points_times_a_metric(N, D, isa, monkeypatch):
    """k-means in a metric finds the clusters of the points times its matrix."""
    monkeypatch.setenv("GMMKEOPS_ISA", isa)
    if reductions.native_unavailable() is not None:
        pytest.skip("this machine lacks the instruction set")
    x = clusters(N, D, 2)
    root = (0.3 * torch.randn(D, D, generator=torch.Generator().manual_seed(1)).double()).triu() + torch.eye(D)
    settings = {"runs": 1, "candidates": 2, "iterations": 1, "relative": 0.0, "backend": "auto"}
    results = []
    for points, matrix in ((x, root), (x @ root, torch.eye(D).double())):
        generator = torch.Generator().manual_seed(0)
        batch = gk.data.Batch(points)
        found = kmeans.kmeans_runs(batch, matrix[None], min(N, 2), generator, **settings)
        results.append(found[0][0].centers)
    torch.testing.assert_close(results[0] @ root, results[1], rtol=1e-9, atol=1e-9)


def test_memory_errors_name_the_call(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(columns, "run", lambda *_: 1)
        with pytest.raises(MemoryError, match="statistics of 50 points"):
            columns.spread_of(clusters(50, 2, 1))
    monkeypatch.setattr(rounds, "run", lambda *_, **__: 1)
    with pytest.raises(MemoryError, match="EM steps"):
        gk.fit(2, clusters(60_000, 4, 1))


# The fit after a search


def test_results_are_on_the_cpu_whatever_the_default_device_is():
    """The library writes to their memory."""
    x = clusters(300, 3, 2)
    expected = columns.spread_of(x), columns.native_white(x, None, 10.0, 1e-6)
    with torch.device("meta"):
        found = columns.spread_of(x), columns.native_white(x, None, 10.0, 1e-6)
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("max_iter", [7, np.int64(7)])
def test_integers_of_numpy_are_numbers_of_iterations(max_iter):
    x = clusters(300, 10, 3, distance=30)
    sweeps = [gk.fit(3, x, gk.EM(), max_iter=count).report.start.sweeps for count in (7, max_iter)]
    assert sweeps[0] == sweeps[1] == gk.fit(3, x, gk.EM(max_iter=max_iter)).report.start.sweeps


@pytest.mark.parametrize(
    ("method", "iterations", "steps"),
    [
        (gk.EM(), 100, 0),
        (gk.EM(), 1, 1),
        (gk.EM(), 0, 1),
        (gk.EM(assignment="hard"), 100, 1),
        (gk.EM(accelerate=True), 100, 1),
    ],
)
def test_only_plain_steps_replace_the_step_without_the_prior(method, iterations, steps):
    x = clusters(300, 10, 3, distance=30)
    found = started(x, 3, method=method, iterations=iterations).report
    whole = started(x, 3, method=gk.EM()).report
    assert whole.prior
    # The sweep after a step computes its objective.
    assert whole.sweeps - found.sweeps == (0 if steps else 2)


def test_fits_are_the_same_without_the_step():
    """The initial mixtures differ by the prior."""
    x = clusters(300, 10, 3, distance=30)
    short, long = (started(x, 3, method=gk.EM(), iterations=n).mixture for n in (100, 0))
    before, after = (float(mixture.log_prob(x).mean()) for mixture in (short, long))
    assert after - before > 0.1
    results = [gk.fit(mixture, x) for mixture in (short, long)]
    assert results[0].log_likelihood == pytest.approx(results[1].log_likelihood, abs=1e-9)
    assert results[0].log_likelihood > after - 1e-9


def test_thin_components_of_many_points_are_sound():
    """Well separated components may be thin. Another candidate of a lower likelihood must not replace them."""
    x = clusters(1500, 8, 6, seed=8, distance=4.0)
    model = gk.GaussianMixture(6, random_state=1).fit(x)
    widths = [float(np.linalg.eigvalsh(covariance)[0]) for covariance in model.covariances_]
    assert min(widths) < 1e-4 * float(np.linalg.eigvalsh(np.cov(x.numpy().T))[0])
    assert model.result_.log_likelihood > -12.5


# Clusters of few points


def test_one_call_averages_covariances_of_small_clusters_with_a_pooled_one():
    x = clusters(300, 2, 3, distance=6)
    x[:6] = 40 + x[:6] / 4
    one = search_of(x, 4)
    candidates, best = one.climber().searched_from_clusters(*one.clusters.in_one_call(0, False), 15, 1e-3, 0)
    expected = search_of(x, 4).clusters.begun(0)
    assert len(candidates) == len(expected) == 1
    assert float(expected[0].weights.min()) * 300 == pytest.approx(6)
    assert torch.equal(best.origin.factor.covariances(), expected[0].factor.covariances())


@pytest.mark.parametrize("alone", [False, True])
def test_one_call_performs_no_steps_from_a_sole_mixture_that_remains_as_it_is(alone, monkeypatch):
    em_climb, found = reductions.em_climb, []
    monkeypatch.setattr(reductions, "em_climb", lambda *a, **k: found.append(em_climb(*a, **k)) or found[-1])
    one = search_of(clusters(300, 3, 3, distance=30), 3)
    climber = one.climber()
    climber.searched_from_clusters(*one.clusters.in_one_call(0, alone), 15, 1e-3, 3)
    assert len(found[0].origins) == 1
    assert (found[0].reached == [None]) == (found[0].rounds is None) == (not alone)
    assert (climber.work > 0) == alone


@pytest.mark.parametrize(("noise", "known"), [(1e-12, False), (1e-9, True)])
@pytest.mark.parametrize("family", ["full", "diag"])
def test_a_variance_that_is_rounding_is_left_to_torch(noise, known, family):
    """In a column whose values are equal up to rounding, the pooled covariance has no typical variance."""
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[20:, 0] += 30
    x[:, 1] = 1000 + noise * x[:, 1]
    means = torch.tensor([[0.0, 1000.0], [30.0, 1000.0]], dtype=torch.float64)
    kind = gk.FullFactor if family == "full" else gk.DiagonalFactor
    factor = kind.from_covariances(kind.compact(torch.eye(2).double().expand(2, 2, 2)), features=2)
    settings = reductions.StepSettings(
        40.0, means.new_zeros(2), FLOOR, 0.005, assignment="hard", bare=True, pool=reductions.Pool(1.0, 0.2, 1e-6, 10.0)
    )
    found = reductions.em_climb(
        gk.data.Batch(x), [(means.new_zeros(2), means, factor)], settings, steps=1, tolerance=-math.inf, after=True
    )
    assert (found.reached[0] is not None) == known


def test_a_cluster_of_one_point_gets_the_least_weight(monkeypatch):
    """A hundredth of the average weight, as in torch."""
    x = clusters(600, 2, 3, distance=6)
    x[0] = 100.0
    by_one_step, used = Candidates._by_one_step, []

    def spy(*given):
        used.append(by_one_step(*given))
        return used[-1]

    monkeypatch.setattr(Candidates, "_by_one_step", spy)
    fast = search_of(x, 4).clusters.begun(0)[0]
    assert None not in used[0]
    monkeypatch.setattr(Candidates, "_by_one_step", lambda *_: None)
    slow = search_of(x, 4).clusters.begun(0)[0]
    assert float(slow.weights.min()) == pytest.approx(0.0025, rel=0.01)
    torch.testing.assert_close(fast.weights, slow.weights, rtol=1e-9, atol=0)
    torch.testing.assert_close(fast.factor.covariances(), slow.factor.covariances(), rtol=1e-6, atol=1e-12)


def test_what_one_call_does_not_find_leaves_the_generator_unchanged():
    x = clusters(3, 2, 1).repeat(40, 1)
    one = search_of(x, 5)
    state = one.generator.get_state()
    assert one.climber().searched_from_clusters(*one.clusters.in_one_call(0, True), 15, 1e-3, 0) is None
    assert torch.equal(one.generator.get_state(), state)


def test_a_separated_component_of_few_points_is_not_sound():
    """Its likelihood is higher than that of the other candidate, which has large components."""
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:4] = 5 + 0.1 * x[:4]
    one = search_of(x, 2)
    z = one.plain.data.x.double()
    small = gk.Mixture(
        weights=[0.04, 0.96],
        means=torch.stack([z[:4].mean(0), z[4:].mean(0)]),
        covariances=torch.stack([z[:4].T.cov(), z[4:].T.cov()]),
    )
    # Equal components remain equal.
    large = gk.Mixture(weights=[0.5, 0.5], means=z.mean(0).expand(2, 2), covariances=z.T.cov().expand(2, 2, 2))
    found = [Found(each, 0.0, each, each, separated) for each, separated in ((small, True), (large, False))]
    climber = one.climber()
    best = one._by_likelihood(climber, found[:1], found[1:])
    assert one.degenerate(small)
    assert not one.degenerate(large)
    assert float(best.mixture.weights.min()) > 0.4
    assert float(small.log_prob(z).mean()) > float(large.log_prob(z).mean())
