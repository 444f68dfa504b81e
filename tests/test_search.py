"""Search for an initial mixture: invariance, acceptance of rounds, few points, penalties, reports, and quality of the optimum."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FAMILIES, HAS_NATIVE
from sklearn.datasets import load_wine
from sklearn.metrics import adjusted_rand_score

import gmmkeops as gk
from gmmkeops.fitting import candidates, initialization, kmeans, ordinary, rounds, search
from gmmkeops.fitting.candidates import Candidates
from gmmkeops.fitting.kmeans import agreements, distinct
from gmmkeops.fitting.rounds import Climber, Found
from gmmkeops.fitting.search import Search, has_few_points, prior_of, within_prior

SEARCHES = ("auto", "split-merge", "annealed")
start_of = initialization.start_of


def grid_clusters(seed=0, N=1200, K=6, D=2):
    """Well separated clusters of different sizes and shapes, and their labels."""
    rng = np.random.default_rng(seed)
    places = rng.permuted(np.tile(np.arange(K), (D, 1)), axis=1).T
    labels = rng.choice(K, N, p=np.arange(2, K + 2) / np.arange(2, K + 2).sum())
    spread = rng.uniform(0.4, 1.2, (K, D))
    return torch.from_numpy(12.0 * places[labels] + spread[labels] * rng.standard_normal((N, D))), labels


def overlapping(seed=0, N=1500, D=2):
    rng = np.random.default_rng(seed)
    means, labels = 2.5 * rng.standard_normal((6, D)), rng.integers(6, size=N)
    A = rng.standard_normal((6, D, D)) * 0.6 + np.eye(D)
    return torch.from_numpy(means[labels] + np.einsum("nde,ne->nd", A[labels], rng.standard_normal((N, D))))


def same_partition(a, b):
    pairs = set(zip(a.tolist(), b.tolist(), strict=True))
    return len(pairs) == len(set(a.tolist())) == len(set(b.tolist()))


def objective(mixture, x, penalty=None):
    return gk.fit(mixture, x, gk.EM(reg_covar=0), penalty=penalty, max_iter=0).objective


def sets_of(name):
    datasets = pytest.importorskip("sklearn.datasets")
    x = getattr(datasets, f"load_{name}")().data
    if name == "digits":
        x = x - x.mean(0)
        x = x @ np.linalg.svd(x, full_matrices=False)[2][:12].T
    return x


# Invariance


@pytest.mark.parametrize("strategy", SEARCHES)
def test_equal_calls_give_equal_bits_and_leave_global_states(strategy):
    x = overlapping()
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, report = start_of(x, 4, strategy)
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
        assert random.getstate() == before[2]
        torch.manual_seed(123)
        second, again = start_of(x, 4, strategy)
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(before[0])
    assert torch.equal(first.means, second.means)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.factor.covariances(), second.factor.covariances())
    assert replace(report, seconds=0.0) == replace(again, seconds=0.0)
    assert not torch.equal(first.means, start_of(x, 4, strategy, generator=1)[0].means)


def test_the_order_of_the_rows_matters_only_by_rounding():
    x = overlapping()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    a, b = gk.initialize(x, 5), gk.initialize(x[order], 5)
    torch.testing.assert_close(a.means, b.means, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(a.weights, b.weights, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strategy", SEARCHES)
@pytest.mark.parametrize("scale", [(1e-6, 1e-6), (1e6, 1e6), (3.0, 1.0), (1e-6, 1e6), (1e6, 3e-5)])
def test_units_do_not_change_the_partition(strategy, scale):
    """Five components of six overlapping clusters have many optima, so that a different metric would find a different one."""
    x, s = overlapping(4), torch.tensor(scale, dtype=torch.float64)
    a, b = gk.initialize(x, 5, strategy), gk.initialize(x * s, 5, strategy)
    torch.testing.assert_close(a.means, b.means / s, rtol=1e-3, atol=1e-3)
    assert float((a.predict(x) == b.predict(x * s)).double().mean()) > 0.999


@pytest.mark.parametrize("method", [gk.EM(reg_covar=0), gk.Adam()])
def test_units_do_not_change_the_start_of_a_fit(method):
    x, s = overlapping(5), torch.tensor([1e-6, 1e5], dtype=torch.float64)
    a, b = (gk.fit(5, points, method, max_iter=0) for points in (x, x * s))
    assert b.log_likelihood + float(s.log().sum()) == pytest.approx(a.log_likelihood, abs=1e-6)


def test_units_do_not_change_the_start_of_few_points():
    x, s = torch.from_numpy(sets_of("iris")), torch.tensor([1e-6, 1e6, 7.0, 0.3], dtype=torch.float64)
    a, b = gk.initialize(x, 3, prior="auto"), gk.initialize(x * s, 3, prior="auto")
    torch.testing.assert_close(a.means, b.means / s, rtol=1e-5, atol=1e-5)


def test_shifts_do_not_change_the_partition():
    x = overlapping(6)
    shift = torch.tensor([1e9, -1e9], dtype=torch.float64)
    x = (x + shift) - shift
    a, b = gk.initialize(x, 5), gk.initialize(x + shift, 5)
    assert torch.equal(a.predict(x), b.predict(x + shift))
    torch.testing.assert_close(a.means, b.means - shift, rtol=0, atol=1e-5)


@pytest.mark.parametrize("covariance_type", FAMILIES)
def test_weights_have_the_effect_of_repeated_rows(covariance_type):
    x, _ = grid_clusters(1, 400)
    counts = torch.randint(0, 4, (400,), generator=torch.Generator().manual_seed(1))
    given = {"covariance_type": covariance_type}
    a = gk.initialize(x, 6, sample_weight=counts.double(), **given)
    rows = x.repeat_interleave(counts, 0)
    for b in (gk.initialize(rows, 6, **given), gk.initialize(x, 6, sample_weight=counts * 1e-9, **given)):
        order = [int((a.means - mean).norm(dim=1).argmin()) for mean in b.means]
        assert sorted(order) == list(range(6))
        torch.testing.assert_close(a.means[order], b.means, rtol=0, atol=0.02)
        torch.testing.assert_close(a.weights[order], b.weights, rtol=0, atol=2e-3)
        assert float((a.log_prob(rows) - b.log_prob(rows)).mean()) == pytest.approx(0, abs=1e-3)


def test_a_file_is_searched_as_an_array(tmp_path):
    x = overlapping(2, N=5000)
    np.save(tmp_path / "points.npy", x.numpy())
    source = gk.Source.of(tmp_path / "points.npy", chunk_rows=700)
    assert len(list(source.chunks())) > 5
    (a, one), (b, two) = start_of(x, 5), start_of(source, 5)
    torch.testing.assert_close(a.means, b.means, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(a.factor.covariances(), b.factor.covariances(), rtol=1e-6, atol=1e-6)
    assert (one.points, one.rows) == (two.points, two.rows) == (5000, 5000)


@pytest.mark.parametrize("D", [2, 3])
@pytest.mark.parametrize("covariance_type", FAMILIES)
def test_separated_clusters_are_found(covariance_type, D):
    x, labels = grid_clusters(D, K=6, D=D)
    for strategy in SEARCHES:
        mixture = gk.initialize(x, 6, strategy, covariance_type=covariance_type)
        kind, tied = gk.components.factor_class(covariance_type)
        assert type(mixture.factor) is kind
        assert mixture.factor.leading == (1 if tied else 6)
        assert same_partition(mixture.predict(x), torch.from_numpy(labels))


@pytest.mark.skipif(not HAS_NATIVE, reason="the native engine has not been compiled")
@pytest.mark.parametrize("covariance_type", FAMILIES)
def test_engines_find_the_same_optimum(covariance_type):
    x = overlapping(3, N=800)
    found = []
    for backend in ("native", "dense"):
        start = gk.initialize(x, 5, backend=backend, covariance_type=covariance_type)
        found.append(float(start.log_prob(x).mean()))
    assert found[0] == pytest.approx(found[1], abs=1e-3)


# Acceptance of rounds


def several_calls(monkeypatch, climbs_of=None):
    """Let EM steps and rounds be performed by several calls; or by one again, if the function that performs them is given."""

    def nothing(method, objective, starts, steps, tolerance, rounds=None, clusters=None):
        return ordinary.Climbs(starts, [None] * len(starts)) if clusters is None else None

    monkeypatch.setattr(rounds, "climbs_of", climbs_of or nothing)


def test_rounds_never_increase_the_objective(monkeypatch):
    several_calls(monkeypatch)
    seen, improved, one_round = [], Climber._improved, Climber._round
    values = []

    def spy(self, found, most, native):
        after = improved(self, found, most, native)
        seen.append((found.value, after.value, most))
        return after

    def spy_round(self, before):
        found = one_round(self, before)
        values.append(math.inf if found is None else found.value)
        return found

    monkeypatch.setattr(Climber, "_improved", spy)
    monkeypatch.setattr(Climber, "_round", spy_round)
    x = overlapping(7)
    for seed in range(4):
        seen.clear(), values.clear()
        mixture, report = start_of(x, 7, generator=seed, method=gk.EM(reg_covar=0))
        ((before, after, most),) = seen
        assert after == min([before, *values])
        assert report.rounds == len(values) <= most == 3
        assert -float(mixture.log_prob(x).mean()) == pytest.approx(objective(mixture, x), abs=1e-9)
        # Only the last round may be worse than the one before it.
        path = [before, *values]
        assert path[:-1] == sorted(path[:-1], reverse=True)


def test_a_round_that_is_worse_is_rejected(monkeypatch):
    several_calls(monkeypatch)
    one_round, improved, candidates = Climber._round, Climber._improved, []

    def worse(self, before):
        found = one_round(self, before)
        return replace(found, mixture=found.mixture[[0]], value=candidates[-1].value + 0.1)

    def spy(self, found, most, native):
        candidates.append(found)
        after = improved(self, found, most, native)
        assert after is found
        return after

    monkeypatch.setattr(Climber, "_round", worse)
    monkeypatch.setattr(Climber, "_improved", spy)
    mixture, report = start_of(overlapping(), 5)
    assert mixture.n_components == 5
    assert report.rounds == len(candidates) == 1


def test_a_round_that_leaves_a_component_without_points_is_rejected(monkeypatch):
    several_calls(monkeypatch)
    one_round = Climber._round

    def tiny(self, before):
        found = one_round(self, before)
        m = found.mixture
        logits = m.log_weights.clone()
        logits[0] = -30
        return replace(found, mixture=gk.Mixture(logits, m.means, m.factor), value=found.value - 1)

    monkeypatch.setattr(Climber, "_round", tiny)
    assert float(start_of(overlapping(), 5)[0].weights.min()) > 1e-3


# Penalties


def per_component_mean():
    return gk.penalties.NormalMean(torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), 5.0)


PENALTIES = {
    "none": lambda: None,
    "sqrt": lambda: gk.penalties.SqrtWeights(0.1),
    "dirichlet": lambda: gk.penalties.Dirichlet(5.0),
    "wishart": lambda: gk.penalties.InverseWishart(0.5 * torch.eye(2), 8.0),
    "dirichlet per component": lambda: gk.penalties.Dirichlet(torch.arange(2.0, 7.0)),
    "mean per component": per_component_mean,
    "sum": lambda: gk.penalties.InverseWishart(0.5 * torch.eye(2), 8.0) + 0.5 * gk.penalties.Dirichlet(3.0),
    "bound": lambda: gk.penalties.EigenvalueFloor(0.3),
}


@pytest.mark.parametrize("n_init", [1, 3])
@pytest.mark.parametrize("name", PENALTIES)
def test_the_penalized_objective_is_not_worse_than_that_of_k_means(name, n_init, monkeypatch):
    x, penalty, found, sound = overlapping(8).double(), PENALTIES[name](), [], Climber.sound

    def spy(self, candidates):
        kept = sound(self, candidates)
        found.extend(self.objective.frame.leave(each.mixture) for each in kept)
        return kept

    monkeypatch.setattr(Climber, "sound", spy)
    mixture, report = start_of(x, 5, penalty=penalty, n_init=n_init, method=gk.EM(reg_covar=0))
    values = [objective(each, x, penalty) for each in found]
    assert len(values) == report.candidates >= 2
    assert objective(mixture, x, penalty) <= min(values) + 1e-6
    # Penalties whose arrays have one entry per component do not apply to twice as many components.
    assert (report.rounds == 0) == ("per component" in name)
    if n_init == 1:
        fitted = gk.fit(5, x, gk.EM(reg_covar=0), penalty=penalty, max_iter=300)
        assert fitted.objective <= min(values) + 1e-6


def test_a_penalty_that_only_gradient_methods_support_does_not_count():
    x = overlapping(8)
    penalty = lambda m: 0.01 * m.means.square().sum()  # noqa: E731
    a, b = gk.initialize(x, 5, penalty=penalty), gk.initialize(x, 5)
    assert torch.equal(a.means, b.means)
    result = gk.fit(5, x, gk.Adam(), penalty=penalty, max_iter=5, tol=0)
    assert result.report.start.rounds >= 1
    assert result.objective < objective_of(a, x, penalty)
    with pytest.raises(TypeError, match="EM does not support the penalty"):
        gk.fit(5, x, penalty=penalty)


def objective_of(mixture, x, penalty):
    return float(penalty(mixture) - mixture.log_prob(x).mean())


# Few points per parameter


def captured(monkeypatch):
    """Mixtures of K components that a search with few points has climbed without a prior, data units."""
    plain, climbs = [], Climber.climbs

    def spy(self, mixtures, steps, tolerance):
        found = climbs(self, mixtures, steps, tolerance)
        if self.objective.penalty is None and mixtures[0].n_components == 3:
            plain.extend(self.objective.frame.leave(each.mixture) for each in found)
        return found

    monkeypatch.setattr(Climber, "climbs", spy)
    return plain


def is_sound(mixture, x):
    D = x.shape[1]
    least = np.linalg.eigvalsh(np.cov(x.T.numpy()))[0]
    own = float(torch.linalg.eigvalsh(mixture.factor.covariances()).min())
    return float(mixture.weights.min()) * len(x) >= 2 * (D + 1) and own >= 1e-3 * least


@pytest.mark.parametrize("seed", range(3))
def test_without_a_prior_the_best_likelihood_of_the_sound_candidates_is_chosen(seed, monkeypatch):
    plain = captured(monkeypatch)
    x = torch.from_numpy(sets_of("wine")[:, :6])
    mixture, report = start_of(x, 3, generator=seed, n_init=3, method=gk.EM())
    assert report.prior
    assert len(plain) >= 3
    sound = [float(each.log_prob(x).mean()) for each in plain if is_sound(each, x)]
    assert sound
    assert float(mixture.log_prob(x).mean()) >= max(sound) - 1e-6
    assert float(mixture.weights.min()) * len(x) >= 14 - 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_with_a_prior_the_penalized_objectives_decide(seed, monkeypatch):
    plain, starts, steps, sound, narrowed = captured(monkeypatch), [], [], Climber.sound, Search._narrowed

    def leave(self, found):
        return self.objective.frame.leave(found.mixture)

    def spy_sound(self, candidates):
        kept = sound(self, candidates)
        starts.extend(leave(self, each) for each in kept)
        return kept

    def spy_narrowed(self, climber, found, most):
        after = narrowed(self, climber, found, most)
        steps.append((leave(climber, found), leave(climber, after)))
        return after

    monkeypatch.setattr(Climber, "sound", spy_sound)
    monkeypatch.setattr(Search, "_narrowed", spy_narrowed)
    x = torch.from_numpy(sets_of("wine")[:, :6])
    x = (x - x.mean(0)) / x.std(0)
    mixture, report = start_of(x, 3, generator=seed, n_init=3, prior="auto", method=gk.EM(reg_covar=0))
    assert report.prior
    assert not plain
    ((before, after),) = steps
    wide, narrow = prior_of(x.T.cov(correction=0), 3), gk.penalties.CovariancePrior(*within_prior(before))

    def value(each, prior):
        return float(prior(each, len(x)) - each.log_prob(x).mean())

    assert len(starts) >= 2
    assert value(before, wide) <= min(value(each, wide) for each in starts) + 1e-6
    assert value(after, narrow) <= value(before, narrow) + 1e-9
    assert torch.equal(mixture.means, after.means)


def test_many_points_have_no_prior():
    x = overlapping()
    assert not start_of(x, 5, prior="auto")[1].prior
    a, b = gk.initialize(x, 5, prior="auto"), gk.initialize(x, 5)
    assert torch.equal(a.means, b.means)
    # 5 components of 6 parameters, and 10 points for each of them.
    assert start_of(x[:299], 5)[1].prior
    assert not start_of(x[:300], 5)[1].prior
    assert has_few_points(299, a)
    assert not has_few_points(300, a)


@pytest.mark.parametrize("seed", [4, 9, 11])
def test_a_search_with_many_points_ends_at_an_optimum(seed, monkeypatch):
    x = overlapping(seed)
    method = gk.EM(accelerate=True, tol=1e-8, reg_covar=0)
    for accelerates in (True, False):
        if not accelerates:
            monkeypatch.setattr(Search, "_accelerated", lambda self, climber, found: found)
        start = gk.initialize(x, 6)
        gain = objective(start, x) - gk.fit(start, x, method, max_iter=500).objective
        assert gain < 5e-5 if accelerates else gain > 3e-3


def test_a_search_with_few_points_has_no_accelerated_iterations(monkeypatch):
    seen, accelerated = [], Search._accelerated

    def spy(self, climber, found):
        seen.append(len(self.x))
        return accelerated(self, climber, found)

    monkeypatch.setattr(Search, "_accelerated", spy)
    x = overlapping()
    for count in (299, 300):
        gk.initialize(x[:count], 5)
    assert seen == [300]


def test_an_accelerated_result_with_a_degenerate_component_is_rejected(monkeypatch):
    search = searched(overlapping(4), "full", 6)
    climber = search.climber()
    found = climber.climbs(search.clusters.begun(0), 15, 1e-3)[0]
    reached = search._accelerated(climber, found)
    assert reached.value < found.value - 1e-3
    for bad in ((reached,), (reached, found)):
        means = [each.mixture.means for each in bad]
        monkeypatch.setattr(
            Search, "degenerate", lambda self, mixture, means=means: any(torch.equal(mixture.means, m) for m in means)
        )
        assert search._accelerated(climber, found) is found


def special():
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((60, 2))
    column = normal.copy()
    column[:, 1] = 3.0
    outlier = normal.copy()
    outlier[7] = 1e8
    return {
        "N = K": (normal[:4], 4),
        "N = K + 1": (normal[:5], 4),
        "N = 2K": (normal[:8], 4),
        "equal": (np.ones((20, 2)), 3),
        "two distinct": (np.repeat([[0.0, 1.0], [5.0, 2.0]], 10, 0), 3),
        "two distinct, K = 2": (np.repeat([[0.0, 1.0], [5.0, 2.0]], 10, 0), 2),
        "constant column": (column, 3),
        "constant column far away": (column + 1e9, 3),
        "outlier": (outlier, 3),
        "line": (np.linspace(0, 1, 60)[:, None] * [1.0, 2.0], 3),
        "K = 1": (normal, 1),
        "D = 1": (normal[:, :1], 3),
        "D = 1, many": (rng.standard_normal((500, 1)), 3),
        "D > N": (rng.standard_normal((6, 9)), 2),
        "one point": (normal[:1], 1),
    }


@pytest.mark.parametrize("name", special())
@pytest.mark.parametrize("strategy", SEARCHES)
def test_special_points_have_a_start(name, strategy):
    points, K = special()[name]
    x = torch.from_numpy(points)
    for covariance_type in FAMILIES if strategy == "auto" else ("full", "tied_spherical"):
        for prior in (None, "auto") if strategy == "auto" else (None,):
            mixture, report = start_of(x, K, strategy, covariance_type=covariance_type, prior=prior)
            assert mixture.n_components == K
            assert float(mixture.weights.sum()) == pytest.approx(1)
            assert bool(torch.isfinite(mixture.log_prob(x)).all())
            assert bool(torch.isfinite(mixture.means).all())
            assert report.points == report.rows == len(x)


def test_candidates_with_few_points_are_removed_if_there_are_others():
    x, g = overlapping(), torch.Generator().manual_seed(0)
    options = {"method": None, "penalty": None, "prior": None, "generator": g, "backend": "auto"}
    search = Search(x, None, 3, gk.FullFactor, False, **options)
    own = Climber(search.method, search.plain)

    def candidate(least, value):
        m = gk.Mixture(torch.tensor([least, 500.0, 500.0]).double().log(), torch.zeros(3, 2).double(), identities)
        return Found(m, value, m, m)

    identities = gk.FullFactor.from_factors(torch.eye(2, dtype=torch.float64).expand(3, 2, 2))
    good, tiny, infinite = candidate(10.0, 3.0), candidate(1.0, 1.0), candidate(10.0, -math.inf)
    assert own.sound([tiny, good, infinite]) == [good]
    assert own.sound([tiny, infinite]) == [tiny]
    assert own.sound([infinite]) == [infinite]


def test_runs_alternate_between_kinds_of_candidates(monkeypatch):
    """Runs begin with k-means, k-means++ and random points in turn, each in two metrics."""
    seen, runs_at_once, seeds, em_climb = [], candidates.runs_at_once, candidates.seeds, gk.reductions.em_climb

    def spy_climb(*arguments, clusters=None, **options):
        found = em_climb(*arguments, clusters=clusters, **options)
        seen.extend("kmeans" for _ in (clusters.roots if clusters and found else ()))
        return found

    def spy_kmeans(batch, roots, *arguments):
        seen.extend("kmeans" for _ in roots)
        return runs_at_once(batch, roots, *arguments)

    def spy_seeds(*arguments, spread):
        seen.append("kmeans++" if spread else "random")
        return seeds(*arguments, spread=spread)

    monkeypatch.setattr(gk.reductions, "em_climb", spy_climb)
    monkeypatch.setattr(candidates, "runs_at_once", spy_kmeans)
    monkeypatch.setattr(candidates, "seeds", spy_seeds)
    monkeypatch.setattr(search, "_SAME", 0.0)
    start_of(overlapping(), 5, n_init=4)
    assert seen == [each for each in ("kmeans", "kmeans++", "random", "kmeans") for _ in range(2)]


def test_an_outlier_does_not_hide_the_clusters():
    x, labels = grid_clusters(3, 600, 4)
    x[5] = 1e8
    mixture = gk.initialize(x, 5)
    rest = torch.arange(600) != 5
    found = mixture.predict(x)
    assert same_partition(found[rest], torch.from_numpy(labels)[rest])
    assert int((found == found[5]).sum()) == 1


def test_one_component_has_mean_and_covariance_of_the_points():
    x = overlapping()
    mixture = gk.initialize(x, 1)
    torch.testing.assert_close(mixture.means[0], x.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixture.factor.covariances()[0], torch.cov(x.mT, correction=0), rtol=1e-4, atol=1e-5)


# Reports


def test_several_initializations_end_early():
    x, _ = grid_clusters(2)
    result = gk.GaussianMixture(6, n_init=10, random_state=0).fit(x.numpy()).result_
    start = result.report.start
    assert start.candidates == 4 < 20
    assert len(start_of(x, 6, n_init=1)[0].weights) == 6


@pytest.mark.parametrize(
    ("values", "runs"),
    [
        ([5, 6, 7, 8, 9, 1], 5),
        ([5, 6, 7, 4, 8, 9, 10, 11, 1], 8),
        ([5, 6, 5.0005, 1], 3),
        ([5, 6, 6, 6, 4, 6, 6, 4, 1], 8),
        ([5, 4, 3, 2, 1, 0], 6),
    ],
)
def test_initializations_end_when_the_best_optimum_recurs_or_nothing_is_better_in_four_runs(monkeypatch, values, runs):
    rest = iter(values)
    monkeypatch.setattr(Climber, "_improved", lambda self, found, most, _: replace(found, value=float(next(rest))))
    monkeypatch.setattr(Search, "_accelerated", lambda self, climber, found: found)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(900, 2)))
    _, report = start_of(x, 2, n_init=len(values))
    assert report.candidates == 2 * runs


def test_more_initializations_are_not_worse():
    x = overlapping(9)
    values = [float(gk.initialize(x, 8, n_init=n).log_prob(x).mean()) for n in (1, 2, 5)]
    assert values[0] <= values[1] + 1e-6 <= values[2] + 2e-6


@pytest.mark.parametrize("backend", ["auto", "dense"])
@pytest.mark.parametrize("strategy", SEARCHES)
@pytest.mark.parametrize("penalty", [None, gk.penalties.SqrtWeights(0.1)])
def test_the_report_counts_all_e_steps(backend, strategy, penalty, monkeypatch):
    sweeps, candidates = [], []
    em_steps, moments, clustered = gk.reductions.em_steps, gk.reductions.moments, Candidates._clustered
    em_climb = gk.reductions.em_climb

    def spy_climb(batch, starts, settings, **options):
        found = em_climb(batch, starts, settings, **options)
        if not settings.bare:
            each_step = (3 if settings.accelerate else 1) * len(starts[0][1])
            climbed, after, _ = found or ((), None, ())
            sweeps.extend(each.steps * each_step for each in climbed if each)
            sweeps.append(after.work if after else 0)
            if found and options["clusters"]:
                candidates.extend(options["clusters"].roots)
        return found

    def spy_steps(batch, logits, means, factor, settings, **options):
        found = em_steps(batch, logits, means, factor, settings, **options)
        if found and not settings.bare:
            sweeps.append(len(found) * len(means))
        return found

    def spy_moments(x, offsets, means, factor, **options):
        if options.get("assignment", "soft") == "soft":
            sweeps.append(len(means))
        return moments(x, offsets, means, factor, **options)

    def spy_clustered(self, found):
        candidates.extend(found)
        return clustered(self, found)

    monkeypatch.setattr(gk.reductions, "em_steps", spy_steps)
    monkeypatch.setattr(gk.reductions, "em_climb", spy_climb)
    monkeypatch.setattr(gk.reductions, "moments", spy_moments)
    monkeypatch.setattr(Candidates, "_clustered", spy_clustered)
    x = overlapping(1, N=400)
    report = start_of(x, 4, strategy, backend=backend, penalty=penalty, n_init=2)[1]
    assert report.sweeps == pytest.approx(sum(sweeps) / 4, abs=1e-9)
    assert report.candidates == len(candidates)
    assert (report.rounds > 0) == (strategy != "annealed")
    assert report.strategy == strategy
    assert report.points == report.rows == 400
    assert report.seconds > 0


def test_the_search_runs_on_a_sample_of_many_points(monkeypatch):
    monkeypatch.setattr(candidates, "_CLUSTERED", 1000)
    x, labels = grid_clusters(4, N=20_000)
    mixture, report = start_of(x, 6)
    assert report.points == search.sample_size(6, 2, gk.FullFactor) == 3000
    assert report.rows == 20_000
    assert same_partition(mixture.predict(x), torch.from_numpy(labels))


def test_a_given_start_has_no_report():
    x = overlapping()
    assert gk.fit(gk.initialize(x, 3), x).report.start is None
    assert gk.fit(3, x).report.start.strategy == "auto"
    model = gk.GaussianMixture(3, init_params="kmeans", tol=0.1).fit(x)
    assert model.result_.report.start.strategy == "kmeans"


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("family", ["full", "spherical"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fit_uses_the_spread_that_its_search_has_computed(weighted, family, dtype, monkeypatch):
    calls, spread_of = [], gk.reductions.spread_of

    def counting(*arguments):
        calls.append(arguments)
        return spread_of(*arguments)

    monkeypatch.setattr(gk.reductions, "spread_of", counting)
    x = (overlapping(4, N=300) * torch.tensor([1.0, 30.0]) + 5.0).to(dtype)
    g = torch.rand(300, generator=torch.Generator().manual_seed(0)).double() * 1e20 if weighted else None
    model = gk.GaussianMixture(3, covariance_type=family).fit(x, sample_weight=g)
    assert len(calls) == 1
    start, _ = start_of(x, 3, covariance_type=family, sample_weight=g, method=gk.EM())
    result = gk.fit(start, x, sample_weight=g)
    assert len(calls) == 3
    assert torch.equal(result.mixture.means, model.mixture_.means)
    assert result.history["objective"] == model.result_.history["objective"]
    found = gk.fit(3, x, gk.EM(tol=1.0), sample_weight=g)
    assert len(calls) == 4
    assert found.report.start.strategy == "auto"
    # A search on a part of the points does not know the spread of all points.
    monkeypatch.setattr(candidates, "_CLUSTERED", 100)
    monkeypatch.setattr(search, "_PER_COMPONENT", 50)
    monkeypatch.setattr(search, "_PER_PARAMETER", 1)
    assert gk.fit(3, x, gk.EM(tol=1.0), sample_weight=g).report.start.points < 300
    assert len(calls) == 6


# Quality


def noisy(seed):
    """Eight separated clusters in the plane, and 5 % of noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(8, size=2500)
    angles = np.arange(8) * math.pi / 4
    x = 10 * np.stack([np.cos(angles), np.sin(angles)], 1)[labels]
    x = x + np.stack([rng.uniform(0.3, 0.9, 8), rng.uniform(0.3, 0.9, 8)], 1)[labels] * rng.standard_normal((2500, 2))
    noise = rng.random(2500) < 0.05
    x[noise] = rng.uniform(-15, 15, (int(noise.sum()), 2))
    return x, labels, 8


def crowded(seed):
    """Twenty overlapping clusters in the plane."""
    rng = np.random.default_rng(seed)
    means, labels = 4 * rng.standard_normal((20, 2)), rng.integers(20, size=3000)
    A = rng.standard_normal((20, 2, 2))
    return means[labels] + np.einsum("nde,ne->nd", A[labels], rng.standard_normal((3000, 2))), labels, 20


def wide(seed):
    """Fifty separated clusters with eight columns."""
    rng = np.random.default_rng(seed)
    means, labels = 4 * rng.standard_normal((50, 8)), rng.integers(50, size=5000)
    A = np.eye(8) + 0.3 * rng.standard_normal((50, 8, 8))
    return means[labels] + np.einsum("nde,ne->nd", A[labels], rng.standard_normal((5000, 8))), labels, 50


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("points", [noisy, crowded, wide])
def test_the_optimum_is_as_good_as_that_of_the_truth_and_of_scikit_learn(points, seed):
    mixture = pytest.importorskip("sklearn.mixture")
    x, labels, K = points(seed)
    own = gk.fit(K, x).log_likelihood
    with np.errstate(all="ignore"):
        theirs = mixture.GaussianMixture(K, random_state=seed).fit(x).score(x)
    assert own >= theirs - 0.002
    if points is not crowded:
        truth = np.stack([x[labels == k].mean(0) for k in range(K)])
        covariances = np.stack([np.cov(x[labels == k].T) for k in range(K)])
        weights = np.bincount(labels) / len(x)
        assert own >= gk.fit(gk.Mixture(weights=weights, means=truth, covariances=covariances), x).log_likelihood - 0.01


@pytest.mark.parametrize("seed", range(5))
def test_iris(seed):
    model = gk.GaussianMixture(3, random_state=seed).fit(sets_of("iris"))
    assert model.score(sets_of("iris")) >= -1.21
    assert model.result_.report.start.prior


@pytest.mark.parametrize(("name", "K"), [("iris", 3), ("wine", 3), ("digits", 10)])
def test_no_component_has_few_points(name, K):
    x = sets_of(name)
    for seed in range(10):
        weights = gk.GaussianMixture(K, random_state=seed).fit(x).weights_
        assert weights.min() * len(x) >= 2 * (x.shape[1] + 1)


# The parameter prior of the estimator


def test_the_estimator_adds_the_prior_if_points_are_few():
    x = sets_of("wine")[:, :6]
    plain, added = (
        gk.GaussianMixture(3, prior=prior, random_state=0, tol=1e-6, max_iter=1000) for prior in (None, "auto")
    )
    plain.fit(x), added.fit(x)
    assert plain.lower_bound_ == pytest.approx(plain.score(x), abs=1e-9)
    assert abs(added.lower_bound_ - added.score(x)) > 0.01
    start = gk.initialize(x, 3, prior="auto", generator=0)
    assert within_prior(start)[1] == 8
    assert plain.score(x) > added.score(x)
    many = np.concatenate([x + 1e-3 * np.random.default_rng(seed).standard_normal(x.shape) for seed in range(6)])
    one, two = (gk.GaussianMixture(3, prior=prior, random_state=0).fit(many) for prior in (None, "auto"))
    assert np.array_equal(one.means_, two.means_)
    assert two.lower_bound_ == one.lower_bound_


@pytest.mark.filterwarnings("ignore:The fit did not converge")
def test_the_prior_holds_for_given_parameters_and_warm_starts():
    """Its value is part of the lower bound, whichever way the initial mixture was found."""
    x = sets_of("wine")[:, :6]
    first = gk.GaussianMixture(3, prior="auto", random_state=0).fit(x)
    given = {"weights_init": first.weights_, "means_init": first.means_, "precisions_init": first.precisions_}
    again = gk.GaussianMixture(3, prior="auto", max_iter=1, tol=0, **given).fit(x)
    plain = gk.GaussianMixture(3, max_iter=1, tol=0, **given).fit(x)
    assert abs(again.lower_bound_ - first.lower_bound_) < 0.1
    assert abs(plain.lower_bound_ - first.lower_bound_) > 0.2
    before = first.lower_bound_
    warm = first.set_params(warm_start=True, tol=1e-9, max_iter=3).fit(x)
    assert abs(warm.lower_bound_ - before) < 0.1
    with pytest.raises(ValueError, match="partial_fit does not support prior='auto'"):
        gk.GaussianMixture(3, prior="auto").partial_fit(x)


def test_the_prior_and_a_penalty_are_added():
    x = sets_of("wine")[:, :6]
    penalty = gk.penalties.Dirichlet(20.0)
    model = gk.GaussianMixture(3, prior="auto", penalty=penalty, random_state=0).fit(x)
    without = gk.GaussianMixture(3, penalty=penalty, random_state=0).fit(x)
    assert float(penalty(without.mixture_, len(x))) == pytest.approx(without.score(x) - without.lower_bound_, abs=1e-9)
    assert model.score(x) - model.lower_bound_ > float(penalty(model.mixture_, len(x))) + 0.01
    alone = gk.GaussianMixture(3, prior="auto", random_state=0).fit(x)
    strong = gk.GaussianMixture(3, prior="auto", penalty=gk.penalties.Dirichlet(1e6), random_state=0).fit(x)
    assert np.ptp(strong.weights_) < 1e-3 < 1e-2 < np.ptp(alone.weights_)


def test_the_prior_improves_the_held_out_likelihood_of_wine():
    x = sets_of("wine")[:, :6]
    rng, gains = np.random.default_rng(0), []
    for _ in range(40):
        order = rng.permutation(len(x))
        train, test = x[order[:142]], x[order[142:]]
        scores = [gk.GaussianMixture(3, prior=prior, random_state=0).fit(train).score(test) for prior in (None, "auto")]
        gains.append(scores[1] - scores[0])
    assert np.mean(gains) > 0.02
    assert np.mean(np.array(gains) > 0) > 0.6


def test_the_prior_is_a_parameter(tmp_path):
    x = sets_of("wine")[:, :6]
    model = gk.GaussianMixture(3, prior="auto")
    assert model.get_params()["prior"] == "auto"
    assert gk.GaussianMixture().prior is None
    assert gk.GaussianMixture().init_params == "auto"
    clone = pytest.importorskip("sklearn.base").clone(model)
    assert clone.prior == "auto"
    model.fit(x).save(tmp_path / "model.safetensors")
    loaded = gk.GaussianMixture.load(tmp_path / "model.safetensors")
    assert loaded.prior == "auto"
    assert loaded.lower_bound_ == model.lower_bound_
    assert loaded.result_.report.start == model.result_.report.start
    assert np.array_equal(clone.fit(x).means_, model.means_)


@pytest.mark.parametrize("prior", ["Auto", "wishart", 3, True])
def test_invalid_priors_are_refused(prior):
    x = overlapping()
    for call in (lambda: gk.GaussianMixture(3, prior=prior).fit(x), lambda: gk.initialize(x, 3, prior=prior)):
        with pytest.raises((ValueError, TypeError), match="prior must be") as error:
            call()
        assert "auto" in str(error.value)
        assert "\n" not in str(error.value)


# The native engine


native = pytest.mark.skipif(gk.reductions.native_unavailable() is not None, reason="the native engine is not compiled")


def searched(x, family, K, weights=None, method=None, seed=0):
    return Search(
        x, weights, K, *gk.components.factor_class(family), method=method, penalty=None, prior=None,
        generator=torch.Generator().manual_seed(seed), backend="auto",
    )  # fmt: skip


def clumps(D, N, weighted):
    """Four clusters of different sizes, and weights or None."""
    normal = {"generator": torch.Generator().manual_seed(D * N), "dtype": torch.float64}
    scales = torch.linspace(0.5, 2, D, dtype=torch.float64)
    labels = torch.multinomial(torch.tensor([0.1, 0.2, 0.3, 0.4]), N, True, generator=normal["generator"])
    x = 3 * torch.randn(4, D, **normal)[labels] + scales * torch.randn(N, D, **normal)
    return x, torch.rand(N, **normal) + 0.5 if weighted else None


def assert_equal_mixtures(one, other, atol=1e-8):
    assert torch.allclose(one.weights, other.weights, atol=atol)
    assert torch.allclose(one.means, other.means, atol=atol)
    assert torch.allclose(one.factor.covariances(), other.factor.covariances(), atol=atol)


@native
@pytest.mark.parametrize("family", ["full", "diag", "spherical"])
@pytest.mark.parametrize(("D", "N"), [(1, 400), (3, 2000), (3, 120), (9, 2000)])
@pytest.mark.parametrize("weighted", [False, True])
def test_native_rounds_equal_those_of_several_calls(family, D, N, weighted, monkeypatch):
    x, weights = clumps(D, N, weighted)
    search = searched(x, family, 5, weights)
    assert (search.objective.penalty is not None) == search.few
    climber, starts = search.climber(), search.clusters.begun(1)
    results, climbs_of, calls = [], rounds.climbs_of, []

    def counted(*arguments):
        calls.append(climbs_of(*arguments))
        return calls[-1]

    for most in (1, 3, 8):
        results.clear(), calls.clear()
        for whole in (True, False):
            climber.work = climber.rounds = 0
            several_calls(monkeypatch, counted if whole else None)
            candidates, found = climber.searched(starts, 5, 0.0, most)
            place = next((i for i, each in enumerate(candidates) if each is found), None)
            results.append((found, place, len(candidates), climber.work, climber.rounds))
        assert len(calls) == 1
        assert calls[0].rounds.ended
        (fast, *fast_counts), (slow, *slow_counts) = results
        assert fast_counts == slow_counts
        assert fast.value == pytest.approx(slow.value, abs=1e-9)
        assert_equal_mixtures(fast.origin, slow.origin)
        assert_equal_mixtures(fast.mixture, slow.mixture)


@native
def test_native_rounds_end_as_those_of_several_calls(monkeypatch):
    """Rounds end since they are worse, since they gain little, since a component is too small, or since there are no more."""
    climbs_of, endings = rounds.climbs_of, set()
    for seed in range(6):
        x = overlapping(seed, N=60 if seed % 2 else 600)
        for K in (3, 6):
            search = searched(x, "full", K, method=gk.EM(reg_covar=1e-3), seed=seed)
            own = Climber(search.method, search.plain)
            start, results = search.clusters.begun(0)[0], []
            for whole in (True, False):
                own.rounds = own.work = 0
                several_calls(monkeypatch, climbs_of if whole else None)
                (before,), found = own.searched([start], 15, 1e-3, 3)
                results.append((found, found is before, own.rounds, own.work))
            (fast, *fast_counts), (slow, *slow_counts) = results
            assert fast_counts == slow_counts
            assert fast.value == pytest.approx(slow.value, abs=1e-8)
            endings.add((fast_counts[0], own.rounds))
    assert len(endings) >= 3


@native
@pytest.mark.parametrize("family", ["full", "diag", "spherical"])
@pytest.mark.parametrize("D", [1, 3])
def test_rounds_of_well_separated_clusters_end_early(family, D, monkeypatch):
    """After three steps with 2 K components nothing has moved; the other steps would not change that."""
    generator = torch.Generator().manual_seed(D)
    labels = torch.arange(600) % 3
    x = torch.randn(600, D, generator=generator).double() + 60.0 * labels[:, None]
    own = searched(x, family, 3)
    climber = own.climber()
    start, climbs_of, results = own.clusters.begun(0)[0], rounds.climbs_of, []
    climber.climbs([start], 15, 1e-6)
    climbed, founds = climber.work, []
    for whole, early in ((True, True), (False, True), (True, False)):
        climber.work = climber.rounds = 0
        monkeypatch.setattr(rounds, "_EARLY", (3, 3e-3) if early else (0, 0.0))
        several_calls(monkeypatch, climbs_of if whole else None)
        (found,), after = climber.searched([start], 15, 1e-6, 3)
        founds.append(found)
        results.append((after, climber.work, climber.rounds))
    (fast, work, count), (slow, *others), (complete, whole_work, _) = results
    assert fast == replace(founds[0], separated=True)
    assert slow == replace(founds[1], separated=True)
    assert complete is founds[2]
    assert (work, count) == (climbed + 3 * 6, 1) == tuple(others)
    assert whole_work > work
    assert complete.value == pytest.approx(found.value, abs=1e-5)


def separated(seed, N, D, K):
    """Clusters at distances of at least twelve standard deviations, which differ in all columns."""
    rng = np.random.default_rng(seed)
    centers = 12.0 * np.array([rng.permutation(K) for _ in range(D)]).T
    return torch.from_numpy(centers[rng.integers(K, size=N)] + rng.standard_normal((N, D)))


@pytest.fixture
def every_round(monkeypatch):
    """Function that lets searches perform second rounds even if the components are well separated, without a third metric."""
    improved = Climber._improved

    def let():
        monkeypatch.setattr(Climber, "_improved", lambda *given: replace(improved(*given), separated=False))
        monkeypatch.setattr(search, "_COLUMNS", math.inf)

    return let


@pytest.mark.parametrize("prior", [None, "auto"])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("N", "D", "K"), [(90, 2, 2), (300, 10, 3), (200, 4, 3)])
def test_well_separated_components_need_no_second_rounds(N, D, K, whole, prior, monkeypatch, every_round):
    """The result is that of all rounds."""
    x = separated(N, N, D, K)
    if not whole:
        several_calls(monkeypatch)
    fast, report = start_of(x, K, prior=prior)
    every_round()
    slow, others = start_of(x, K, prior=prior)
    assert report.prior
    assert (report.rounds, others.rounds) == (1, 2)
    assert report.sweeps < others.sweeps
    assert_equal_mixtures(fast, slow, atol=1e-5)


def test_a_fit_of_separated_components_reaches_the_same_optimum_without_steps_on_the_likelihood(every_round):
    x = separated(0, 300, 10, 3)
    fast = gk.GaussianMixture(3, random_state=0).fit(x)
    assert fast.result_.report.start.rounds == 1
    every_round()
    slow = gk.GaussianMixture(3, random_state=0).fit(x)
    assert slow.result_.report.start.sweeps > fast.result_.report.start.sweeps + 8
    assert fast.lower_bound_ == pytest.approx(slow.lower_bound_, abs=1e-8)


@pytest.mark.filterwarnings("ignore::gmmkeops.ConvergenceWarning")
def test_what_follows_a_search_begins_without_the_prior():
    """The prior of the search is much wider than well separated components, of which a fit may perform few steps or none."""
    x = separated(0, 300, 10, 3)
    assert start_of(x, 3, method=gk.EM())[1].prior
    best = gk.fit(3, x, gk.EM(tol=1e-8)).log_likelihood
    few = [
        gk.fit(3, x, gk.EM(max_iter=0)).log_likelihood,
        gk.fit(3, x, gk.EM(assignment="hard", max_iter=0)).log_likelihood,
        gk.fit(3, x, gk.EM(batch_size=100, average=True, max_iter=1)).log_likelihood,
        gk.GaussianMixture(3, random_state=0).partial_fit(x).score(x),
    ]
    assert min(few) > best - 0.05
    assert max(few) < best + 1e-6


def test_a_penalty_counts_in_the_search_for_one_component():
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0)).double() * torch.tensor([1.0, 2.0, 3.0])
    penalty = gk.penalties.CovariancePrior(5 * torch.eye(3), 100.0)
    optimum = gk.fit(1, x, gk.EM(tol=1e-10, reg_covar=0), penalty=penalty)
    for found in (gk.initialize(x, 1, penalty=penalty), gk.fit(1, x, penalty=penalty, max_iter=0).mixture):
        torch.testing.assert_close(found.covariances, optimum.mixture.covariances, rtol=1e-4, atol=1e-4)
        assert float((found.covariances[0] - gk.initialize(x, 1).covariances[0]).abs().max()) > 0.2


@native
@pytest.mark.parametrize(("N", "D"), [(120, 2), (400, 8)])
def test_a_wrong_arrangement_of_separated_clusters_is_improved(N, D, monkeypatch):
    """One component covers two clusters, and two components share one: halves are exchanged, and no round is left out."""
    x, K = separated(D, N, D, 4), 4
    labels = gk.initialize(x, K).predict(x)
    assert len(set(labels.tolist())) == K
    truth = torch.stack([x[labels == k].mean(0) for k in range(K)])
    shared = x[labels == 3]
    far = shared[:, 0] > shared[:, 0].median()
    wrong = torch.stack([x[(labels == 0) | (labels == 1)].mean(0), truth[2], shared[far].mean(0), shared[~far].mean(0)])
    begun = Candidates.begun

    def mixed(self, run):
        centers = (wrong - self.objective.frame.shift) / self.objective.frame.scale
        return self._clustered([(centers, None)])

    monkeypatch.setattr(Candidates, "begun", mixed)
    monkeypatch.setattr(Candidates, "in_one_call", lambda *_: None)
    found, report = start_of(x, K)
    monkeypatch.setattr(Candidates, "begun", begun)
    assert report.rounds >= 2
    gaps = (found.means[:, None] - truth).norm(dim=2)
    assert sorted(gaps.argmin(0).tolist()) == list(range(K))
    assert float(gaps.amin(0).max()) < 0.5


@pytest.mark.parametrize("K", [2, 3, 5, 6])
def test_other_numbers_of_components_than_clusters_are_searched_as_well(K, every_round):
    """There are four separated clusters, so that components cover several of them, or share one."""
    x = separated(4, 400, 6, 4)
    fast = gk.initialize(x, K, generator=K)
    every_round()
    assert objective(fast, x) <= objective(gk.initialize(x, K, generator=K), x) + 1e-4


@native
@pytest.mark.parametrize("D", [2, 5, 20])
@pytest.mark.parametrize("shape", ["any", "equal", "last"])
def test_components_are_split_along_their_longest_axis(D, shape, monkeypatch):
    """The axis is that of torch. If all variances are equal there is none, and the round takes any axis."""
    generator = torch.Generator().manual_seed(D)
    x = torch.randn(500, D, generator=generator, dtype=torch.float64)
    if shape != "any":
        corners = torch.cat([torch.eye(D), -torch.eye(D)]).double()
        x = corners.repeat(100, 1)
    if shape == "last":
        x[:, -1] *= 3
    own = searched(torch.cat([x, x + 100]), "full", 2, method=gk.EM(reg_covar=0))
    climber = Climber(own.method, own.plain)
    found, results = climber.climbed(own.clusters.begun(0)[0], 5, 0.0), []
    monkeypatch.setattr(rounds, "_EARLY", (0, 0.0))
    climbs_of = rounds.climbs_of
    for whole in (True, False):
        climber.rounds = 0
        several_calls(monkeypatch, climbs_of if whole else None)
        results.append(climber.searched([found.mixture], 0, 0.0, 1)[1])
        assert climber.rounds == 1
        assert results[-1].value <= found.value
    if shape != "equal":
        assert_equal_mixtures(*(each.mixture for each in results))


def test_mixtures_of_the_same_clusters_are_improved_once():
    """Their components may be in another order; means that are not finite are no copies."""
    identities = gk.FullFactor.from_factors(torch.eye(2, dtype=torch.float64).expand(2, 2, 2))

    def of(*means):
        return gk.Mixture(torch.zeros(2).double(), torch.tensor(means).double(), identities, validate_args=False)

    one, turned = of([0.0, 1.0], [2.0, 3.0]), of([2.0, 3.0], [0.0, 1.0])
    other, unknown = of([0.0, 1.0], [2.0, 3.1]), of([math.nan, 1.0], [2.0, 3.0])
    found = rounds.without_copies([one, turned, unknown, other, one])
    assert [id(each) for each in found] == [id(one), id(unknown), id(other)]


@native
def test_candidates_that_are_too_narrow_for_float32_are_improved_in_float64(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 20, generator=generator).double()
    x[:, 1] = x[:, 0] + 1e-4 * x[:, 1]
    x[2000:] += 9
    own = searched(x, "full", 2)
    assert own.plain.data.dtype == torch.float32
    climber, climbs_of, found = own.climber(), rounds.climbs_of, []
    monkeypatch.setattr(rounds, "climbs_of", lambda *given: found.append(climbs_of(*given)) or found[-1])
    reached = climber.climbs(own.clusters.begun(0), 15, 1e-3)
    assert None not in found[0].reached
    assert own.plain.data.dtype == torch.float64
    several_calls(monkeypatch)
    single = climber.climbs([each.origin for each in reached], 15, 1e-3)
    for one, other in zip(reached, single, strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-9)


@native
@pytest.mark.parametrize("whole", [True, False])
def test_rounds_go_on_if_other_pairs_are_merged(whole, monkeypatch):
    """Each component covers two of four clusters, and the best pairs of clusters are others."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.tensor([[0.0, 0.0], [8.0, 40.0], [8.0, 0.0], [0.0, 40.0]], dtype=torch.float64)
    x = torch.cat([corner + torch.randn(200, 2, generator=generator).double() for corner in corners])
    own = searched(x, "full", 2)
    climber = Climber(own.method, own.plain)
    z = own.plain.data.x
    means = torch.stack([z[:400].mean(0), z[400:].mean(0)])
    covariances = torch.stack([z[:400].T.cov(correction=0), z[400:].T.cov(correction=0)])
    wrong = gk.Mixture(torch.zeros(2).double(), means, gk.FullFactor.from_covariances(covariances))
    found = climber.climbed(wrong, 0, 0.0)
    if not whole:
        several_calls(monkeypatch)
    assert climber.searched([found.mixture], 0, 0.0, 1)[1].value < found.value - 0.1


@native
def test_a_component_without_points_ends_native_rounds():
    """A round with a smaller component than before, and than D + 1 points, is rejected though its objective is better."""
    x = torch.cat([overlapping(1, N=300).double(), torch.full((1, 2), 60.0, dtype=torch.float64)])
    search = searched(x, "full", 2, method=gk.EM(reg_covar=1e-2))
    own = Climber(search.method, search.plain)
    found = own.climbed(search.clusters.begun(1)[0], 0, 0.0)
    larger = gk.Mixture(torch.zeros(2).double(), found.mixture.means, found.mixture.factor)
    found = replace(found, mixture=larger, active=larger)
    settings = {"split": (10, 1e-3), "merged": (15, 1e-4), "gain": 1e-3, "tie": 1e-7, "most": 1}
    native = rounds.climbs_of(own.method, own.objective, [larger], 0, 0.0, settings)
    after = own._round(found)
    assert after.value < native.reached[0][1]
    assert (native.pair is not None) == (own.least(after) >= min(3, own.least(found)))


@native
@pytest.mark.parametrize("family", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize("weighted", [False, True])
def test_native_climbs_equal_steps_of_several_calls(family, weighted, monkeypatch):
    x, weights = clumps(3, 700, weighted)
    search = searched(x, family, 4, weights)
    climber = search.climber()
    starts = [mixture for run in range(2) for mixture in search.clusters.begun(run)]
    results, climbs_of = [], rounds.climbs_of
    for whole in (True, False):
        climber.work = 0
        several_calls(monkeypatch, climbs_of if whole else None)
        found = climber.climbs(starts, 12, 1e-3) + climber.climbs(starts[:1], 0, 0.0)
        results.append((found, climber.work))
    (fast, fast_work), (slow, slow_work) = results
    assert fast_work == slow_work
    for one, other in zip(fast, slow, strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-12)
        assert one.origin is other.origin
        assert_equal_mixtures(one.mixture, other.mixture, atol=1e-12)
    assert_equal_mixtures(fast[-1].mixture, starts[0], atol=1e-12)


@native
def test_one_of_several_climbs_may_need_several_calls():
    """A component on a single point has a singular covariance; the other mixture is not affected."""
    x, _ = clumps(2, 200, False)
    search = searched(x, "full", 3, method=gk.EM(reg_covar=0))
    own = Climber(search.method, search.plain)
    good = search.clusters.begun(0)[0]
    z = search.plain.data.x
    scales = torch.tensor([1.0, 1.0, 1e-6]).double()[:, None, None]
    tiny = gk.Mixture(
        torch.zeros(3).double(),
        torch.stack([z[0], z[1], z[2]]),
        gk.FullFactor.from_covariances(torch.eye(2).double() * scales**2),
    )
    settings = {"split": (10, 1e-3), "merged": (15, 1e-4), "gain": 1e-3, "tie": 1e-7, "most": 1}
    native = rounds.climbs_of(own.method, own.objective, [good, tiny], 15, 1e-3, settings)
    first, second = native.reached
    # The objective of the second mixture is not known, so that no rounds follow.
    assert native.rounds is None
    assert first is not None
    assert second is None
    found = own.climbs([good, tiny], 15, 1e-3)
    assert found[0].value == first[1]
    assert math.isfinite(found[1].value)


@native
def test_rounds_begin_with_the_best_mixture_though_steps_from_another_one_need_several_calls(monkeypatch):
    """The first rounds of the best one are performed at once, too."""
    x, _ = clumps(2, 300, False)
    own = searched(x, "full", 3, method=gk.EM(reg_covar=0))
    climber, good, z = Climber(own.method, own.plain), own.clusters.begun(0)[0], own.plain.data.x
    scales = torch.tensor([1.0, 1.0, 1e-6]).double()[:, None, None]
    tiny = gk.Mixture(
        torch.zeros(3).double(), z[:3].double(), gk.FullFactor.from_covariances(torch.eye(2).double() * scales**2)
    )
    calls, climbs_of = [], rounds.climbs_of
    monkeypatch.setattr(rounds, "climbs_of", lambda *given: calls.append(climbs_of(*given)) or calls[-1])
    monkeypatch.setattr(Climber, "sound", lambda self, found: found[:1])
    alone = climber.searched([good], 15, 1e-3, 3)[1]
    calls.clear()
    found = climber.searched([good, tiny], 15, 1e-3, 3)[1]
    assert [call.rounds is None for call in calls] == [True, False]
    assert_equal_mixtures(found.mixture, alone.mixture)
    assert found.value == alone.value


@native
def test_rounds_use_the_objective_that_is_known():
    """After a step with a prior, the fractions in the reg_covar term contain the points of the prior."""
    x = overlapping(2, N=120)
    own = searched(x, "full", 4, method=gk.EM(reg_covar=0.5))
    climber = own.climber()
    found = climber.climbed(own.clusters.begun(0)[0], 5, 0.0)
    again = climber.climbed(found.mixture, 0, 0.0)
    assert abs(again.value - found.value) > 1e-3
    native, work = climber._native_rounds(replace(found, value=-100.0), 1), climber.work
    assert (native.rounds.value, native.rounds.ended, native.pair) == (-100.0, True, None)
    assert climber.work == work
    assert climber._native_rounds(found, 1).rounds.value <= found.value


@native
@pytest.mark.parametrize("backend", ["native", "dense"])
def test_a_huge_change_of_the_reg_covar_term_takes_no_digits(backend, monkeypatch):
    """The objective of steps of several calls is that of one call, though the term is 1e30 times as large at first."""
    rng = np.random.default_rng(1)
    x = torch.from_numpy(np.stack([rng.normal(size=40) + 3 * (np.arange(40) % 2), np.zeros(40)], 1))
    own = searched(x, "full", 2, method=gk.EM(reg_covar=0.01))
    climber, start = own.climber(), own.clusters.begun(0)[0]
    narrow = start.factor.log_diagonal + torch.tensor([0.0, 30.0], dtype=torch.float64)
    start = gk.Mixture(start.logits, start.means, gk.FullFactor(narrow, start.factor.upper))
    fast = climber.climbed(start, 5, -math.inf)
    several_calls(monkeypatch)
    slow = Climber(own.method, replace(climber.objective, backend=backend)).climbed(start, 5, -math.inf)
    assert abs(fast.value) < 100
    assert slow.value == pytest.approx(fast.value, abs=1e-8)


@native
def test_a_round_that_is_not_ordinary_takes_several_calls():
    """Points on a line make covariances singular; common covariances, and a single one, are left to several calls."""
    line = torch.linspace(0, 1, 300, dtype=torch.float64)[:, None] * torch.ones(2, dtype=torch.float64)
    settings = {"split": (10, 1e-3), "merged": (15, 1e-4), "gain": 1e-3, "tie": 1e-7, "most": 2}
    for x, family, K in ((line, "full", 3), (overlapping(1, N=300), "tied", 3), (overlapping(1, N=300), "full", 1)):
        search = searched(x, family, K, method=gk.EM(reg_covar=0))
        climber = search.climber()
        found = climber.climbed(search.clusters.begun(0)[0], 5, 0.0)
        native = rounds.climbs_of(climber.method, climber.objective, [found.mixture], 0, 0.0, settings)
        assert native.rounds is None
        after = climber.searched([found.mixture], 0, 0.0, 2)[1]
        assert after.value <= found.value


@native
@pytest.mark.parametrize("family", ["full", "diag", "spherical"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("D", [1, 2, 6])
def test_native_clusters_are_regularized_as_by_torch(family, weighted, D, monkeypatch):
    """With few points in a cluster, covariances are averaged with a pooled one, to which a wide cluster contributes less."""
    x, weights = clumps(D, 90, weighted)
    x[:6] *= 8
    one_step, pooled = Candidates._by_one_step, set()
    for K in (2, 5, 9):
        search = searched(x, family, K, weights)
        mixtures = []
        for fast in (True, False):
            search.generator.manual_seed(K)
            monkeypatch.setattr(Candidates, "_by_one_step", one_step if fast else lambda *_: None)
            mixtures.append(search.clusters.begun(0))
        for one, other in zip(*mixtures, strict=True):
            small = float(other.weights.min()) * search.plain.count <= 4 * (D + 1)
            pooled.add(small)
            if small:
                assert_equal_mixtures(one, other, atol=1e-10)
    assert True in pooled


@native
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("D", "N", "K"), [(1, 50, 3), (2, 400, 7), (5, 160, 4), (3, 12, 12), (2, 2000, 40)])
def test_native_seeds_equal_those_of_torch(D, N, K, weighted, monkeypatch):
    x, weights = clumps(D, N, True)
    mass = weights if weighted else torch.ones_like(weights)
    results, chosen = [], gk.reductions.chosen_seeds
    for fast in (True, False):
        generator = torch.Generator().manual_seed(K)
        monkeypatch.setattr(gk.reductions, "chosen_seeds", chosen if fast else lambda *_: None)
        results.append((kmeans.seeds(x, mass, K, generator, spread=True), generator.get_state()))
    (one, state), (other, after) = results
    assert torch.equal(one, other)
    assert torch.equal(state, after)
    assert len(torch.unique(one, dim=0)) == K


def test_an_inertia_below_zero_is_zero_up_to_rounding(monkeypatch):
    """With as many centers as points, sums of squares are rounding errors of any sign."""
    monkeypatch.setattr(gk.reductions, "chosen_seeds", lambda *_: None)
    x = torch.tensor([[0.0, 1.0], [3.0, 0.3], [0.7, 7.0]], dtype=torch.float64)
    found = kmeans.kmeans(x, torch.ones(3).double(), 3, torch.Generator().manual_seed(0), "dense", 3)
    assert torch.allclose(found.sort(0).values, x.sort(0).values)
    monkeypatch.setattr(kmeans, "lloyd", lambda cast, *_: (cast, -2e-16))
    found = kmeans.kmeans(x, torch.ones(3).double(), 3, torch.Generator().manual_seed(0), "dense", 3)
    assert torch.allclose(found.sort(0).values, x.sort(0).values)


@native
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("D", "N", "K"), [(1, 50, 3), (2, 400, 7), (5, 160, 1), (3, 12, 12), (2, 700, 40)])
def test_runs_of_kmeans_at_once_equal_single_ones(D, N, K, weighted, monkeypatch):
    x, weights = clumps(D, N, weighted)
    if weighted:
        weights[::7] = 0
    # Equal points are merged.
    x = torch.cat([x, x[: N // 3]])
    weights = torch.cat([weights, weights[: N // 3]]) if weighted else None
    search_of, runs_at_once, results = (lambda: searched(x, "full", K, weights, seed=K)), candidates.runs_at_once, []
    for fast in (True, False):
        own = search_of()
        monkeypatch.setattr(candidates, "runs_at_once", runs_at_once if fast else lambda *_: None)
        results.append(
            (
                [each for runs in own.clusters._kmeans(3, own.clusters._roots) for each in runs],
                own.generator.get_state(),
            )
        )
    (several, state), (single, after) = results
    assert torch.equal(state, after)
    assert len(several) == 3 * (1 if D == 1 or K == 1 else 2)
    for one, other in zip(several, single, strict=True):
        assert torch.allclose(one.centers, other.centers, atol=1e-9)
        assert torch.equal(one.labels, other.labels)


@native
def test_runs_of_kmeans_with_more_centers_than_points(monkeypatch):
    """Clusters become empty, whose centers stay where they are."""
    x = torch.tensor([[0.0, 1.0], [5.0, 2.0], [1.0, 7.0]], dtype=torch.float64).repeat(4, 1)
    runs_at_once, results = candidates.runs_at_once, []
    for fast in (True, False):
        own = searched(x, "diag", 5)
        monkeypatch.setattr(candidates, "runs_at_once", runs_at_once if fast else lambda *_: None)
        results.append([each.centers for runs in own.clusters._kmeans(1, own.clusters._roots) for each in runs])
    for one, other in zip(*results, strict=True):
        assert len(one.round(decimals=6).unique(dim=0)) == 3
        assert torch.allclose(one, other, atol=1e-12)


@native
def test_native_seeds_of_few_different_points():
    """After all points are centers, some are chosen again."""
    x = torch.tensor([[0.0, 1.0], [5.0, 2.0]], dtype=torch.float64)
    chosen = gk.reductions.chosen_seeds(x, torch.ones(2).double(), 4, 3, torch.Generator().manual_seed(0))
    assert sorted(set(chosen.tolist())) == [0, 1]


@native
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("iterations", [1, 4, 30])
def test_lloyd_iterations_in_the_library_equal_single_ones(weighted, iterations, monkeypatch):
    x, weights = clumps(3, 500, True)
    mass = weights if weighted else torch.ones_like(weights)
    results, em_steps = [], gk.reductions.em_steps
    for fast in (True, False):
        monkeypatch.setattr(gk.reductions, "em_steps", em_steps if fast else lambda *_, **__: None)
        results.append(kmeans.lloyd(x, mass, x[:6], "auto", iterations))
    (one, inertia), (other, expected) = results
    assert inertia == pytest.approx(expected, rel=1e-12)
    assert torch.allclose(one, other, atol=1e-12)


@native
def test_lloyd_iterations_go_on_after_an_empty_cluster():
    x, weights = clumps(2, 300, True)
    far = torch.cat([x[:3], torch.full((1, 2), 1e3, dtype=torch.float64)])
    centers, inertia = kmeans.lloyd(x, weights, far, "auto")
    three, expected = kmeans.lloyd(x, weights, x[:3], "auto")
    assert inertia == pytest.approx(expected, rel=1e-9)
    assert torch.allclose(centers[:3], three, atol=1e-9)


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 9])
def test_different_points_are_sorted_as_by_numpy(columns):
    rng = np.random.default_rng(columns)
    for most in (2, 5, 1000):
        x = rng.integers(most, size=(300, columns)).astype(float)
        x[:, : columns // 2] = 1.0
        expected, counts = np.unique(x, axis=0, return_counts=True)
        rows, mass = kmeans.distinct(torch.from_numpy(x), None)
        assert np.array_equal(rows, expected)
        assert np.array_equal(mass, counts)


def test_the_best_sound_candidate_is_that_of_all_sound_ones():
    rng, m = np.random.default_rng(0), gk.Mixture(torch.zeros(1), torch.zeros(1, 1), gk.FullFactor(torch.zeros(1, 1)))
    for _ in range(300):
        values = rng.integers(4, size=6) + rng.choice([0.0, 3e-8], size=6)
        found = [Found(m, float(value), m, m) for value in values]
        good = {id(each) for each in found if rng.random() < 0.4}
        expected = [each for each in found if id(each) in good]
        seen = []

        def sound(each, good=good, seen=seen):
            seen.append(each)
            return id(each) in good

        best = rounds.best_sound(found, sound)
        assert best is (rounds.best_of(expected) if expected else None)


@native
def test_large_clusters_are_not_regularized():
    x, _ = clumps(2, 2000, False)
    search = searched(x, "full", 3)
    for mixture in search.clusters.begun(0):
        labels = mixture.predict(search.plain.data.x)
        assert int(torch.bincount(labels).min()) > 12
    z = search.plain.data.x
    centers = search.clusters.begun(0)[0].means
    labels = torch.cdist(z, centers).argmin(1)
    (found,) = search.clusters._clustered([(centers, None)])
    for k in range(3):
        own = z[labels == k]
        assert torch.allclose(found.means[k], own.mean(0), atol=1e-12)
        assert torch.allclose(found.factor.covariances()[k], own.T.cov(correction=0), atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*did not converge")
def test_many_components_of_few_points_are_found_as_well_as_by_kmeans():
    """Points near a closed surface: the prior of the search is much wider than its components."""
    generator = torch.Generator().manual_seed(0)
    u, v = 2 * math.pi * torch.rand(2, 12_000, generator=generator, dtype=torch.float64)
    rim = 2 + (0.5 + 0.15 * (3 * u).sin()) * v.cos()
    x = torch.stack([rim * u.cos(), rim * u.sin(), 0.5 * v.sin() + 0.3 * (2 * u).sin()], 1)
    x = x + 0.005 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    found = {}
    for strategy in ("auto", "kmeans"):
        start = gk.initialize(x, 200, strategy, generator=0)
        found[strategy] = gk.fit(start, x, gk.EM(max_iter=60), verbose=False).log_likelihood
    assert found["auto"] >= found["kmeans"] + 0.012


@pytest.mark.parametrize(
    ("D", "K", "prior", "candidates"), [(3, 310, None, 3), (3, 290, None, 2), (4, 310, None, 2), (3, 310, "auto", 2)]
)
def test_many_components_of_few_points_may_be_the_clusters_of_the_given_coordinates(D, K, prior, candidates):
    """In up to three dimensions there are no rounds, since they gain little."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 1.0, 0.01, 1.0]).double()[:D]
    x = torch.rand(40 * K, D, generator=generator, dtype=torch.float64) * scale
    report = start_of(x, K, prior=prior)[1]
    assert report.candidates == candidates
    assert (report.rounds == 0) == (candidates == 3)
    assert report.prior == (candidates == 2)
    own = Search(
        x, None, K, gk.FullFactor, False, method=None, penalty=None, prior=prior, generator=generator, backend="auto"
    )
    if candidates == 3:
        *_, given = own.clusters._roots
        # Distances are those of the given coordinates, up to one factor.
        ratios = given.diagonal() / own.plain.frame.scale
        assert float(ratios.max() / ratios.min()) == pytest.approx(1, abs=1e-12)
        assert torch.equal(given, given.diagonal().diag())


@pytest.mark.parametrize("weighted", [False, True])
def test_equal_points_are_merged_and_sorted(weighted):
    rng = np.random.default_rng(0)
    for levels in (1, 2, 5, 1000):
        x = rng.integers(levels, size=(200, 3)).astype(float)
        x[::3, 1] += rng.random(67)
        g = rng.integers(3, size=200).astype(float) if weighted else None
        kept, mass = (x, np.ones(200)) if g is None else (x[g > 0], g[g > 0])
        expected, place = np.unique(kept, axis=0, return_inverse=True)
        points, total = distinct(torch.from_numpy(x), None if g is None else torch.from_numpy(g))
        np.testing.assert_array_equal(points.numpy(), expected)
        np.testing.assert_array_equal(total.numpy(), np.bincount(place.reshape(-1), mass))


def test_agreement_is_the_adjusted_rand_index():
    rng = np.random.default_rng(0)
    parts = [rng.integers(4, size=60) for _ in range(3)] + [np.arange(60) // 15]
    parts.append((parts[-1] + 1) % 4)
    parts.append(np.zeros(60, dtype=np.int64))
    found = agreements([torch.from_numpy(part) for part in parts], 4)
    assert [len(row) for row in found] == [0, 1, 2, 3, 4, 5]
    for i, row in enumerate(found):
        for j, value in enumerate(row):
            assert value == pytest.approx(adjusted_rand_score(parts[i], parts[j]), abs=1e-12)
    assert found[4][3] == 1
    assert agreements([torch.zeros(5, dtype=torch.int64)] * 2, 1) == [[], [1.0]]


def test_with_few_points_only_metrics_count_in_which_runs_agree(monkeypatch):
    """178 wines of 13 columns, for 3 components of 105 parameters; k-means finds other clusters in each run on white points."""
    x, y = load_wine(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)

    def found():
        return [adjusted_rand_score(y, gk.GaussianMixture(3, random_state=i).fit(x).predict(x)) for i in range(12)]

    assert min(found()) > 0.7
    monkeypatch.setattr(candidates, "_AGREEMENT", -1.0)
    assert min(found()) < 0.6


@pytest.mark.parametrize(("N", "D", "K"), [(20, 50, 2), (6, 5, 2), (10, 20, 3)])
def test_few_points_without_any_clusters_have_a_start(N, D, K):
    """All runs of k-means may agree less than random partitions."""
    for seed in range(40):
        x = np.random.default_rng(seed).normal(size=(N, D))
        assert gk.initialize(x, K, generator=seed).n_components == K
