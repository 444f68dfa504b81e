"""Sweeps that leave components out: what they leave is never more than they certify, in both engines."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from conftest import ENGINES, FAMILIES, make_case, make_factor

import gmmkeops as gk
from gmmkeops import reductions
from gmmkeops.reductions import arrangement
from gmmkeops.reductions.truncation import bounds as _lists
from gmmkeops.reductions.truncation import tree as _boxes

# What rounding may add to either side of a comparison, relative to max(1, |ℓ|).
ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-12}

# Largest differences of float32 moments from those of the dense engine, relative to the largest one. First moments by Triton
# differ by 1.1e-6 on the interpreter; devices also approximate exponentials.
FLOAT32 = {"dense": 2e-7, "keops": 3e-5, "native": 2e-6, "triton": 4e-6}


def surface(N, seed=0):
    """A closed surface in three dimensions with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    u, v = 2 * math.pi * torch.rand(2, N, generator=generator, dtype=torch.float64)
    R = 1 + 0.3 * torch.sin(3 * u) + 0.1 * torch.cos(7 * v)
    x = torch.stack(
        [(2 + R / 2 * v.cos()) * u.cos(), (2 + R / 2 * v.cos()) * u.sin(), R / 2 * v.sin() + 0.3 * torch.sin(2 * u)], 1
    )
    return x + 0.005 * torch.randn(N, 3, generator=generator, dtype=torch.float64)


def patches(x, K, seed=0):
    """A full mixture of K components, each a neighborhood of one point of the cloud."""
    return gk.initialize(x, K, "kmeans++", generator=torch.Generator().manual_seed(seed))


def random(N, K, D, family="full", condition=10.0, seed=0, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(N, D, generator=generator, dtype=torch.float64)
    factor = make_factor(family, K, D, condition, generator).rescale(torch.full((D,), 1 / scale, dtype=torch.float64))
    means = torch.rand(K, D, generator=generator, dtype=torch.float64)
    return x, gk.Mixture(torch.randn(K, generator=generator, dtype=torch.float64), means, factor)


def scenes():
    """Clouds and mixtures that try the bounds in different ways."""
    x = surface(20_000)
    yield "surface", x, patches(x, 200)
    yield "random", *random(20_000, 150, 3)
    generator = torch.Generator().manual_seed(2)
    centers = 20 * torch.randn(40, 2, generator=generator, dtype=torch.float64)
    x = centers[torch.randint(40, (10_000,), generator=generator)]
    x = x + torch.randn(10_000, 2, generator=generator, dtype=torch.float64)
    x[:5] += 1e6
    yield "clusters and outliers", x, patches(x[5:], 64)
    # Components a millionth as thick as the boxes are wide, crossing many of them.
    yield "thin", *random(20_000, 100, 3, condition=1e14, scale=1.0)
    yield "ill conditioned", *random(10_000, 100, 3, condition=1e10, scale=0.3)
    x, mixture = random(10_000, 128, 2)
    logits = torch.linspace(-690, 0, 128, dtype=torch.float64)
    yield "weights over 300 orders", x, gk.Mixture(logits, mixture.means, mixture.factor)
    logits[::3] = -math.inf
    yield "dead components", x, gk.Mixture(logits, mixture.means, mixture.factor)
    x, mixture = random(8_000, 100, 3, "tied_spherical", scale=0.03)
    yield "map coordinates", x + 5e6, gk.Mixture(mixture.logits, mixture.means + 5e6, mixture.factor)
    x, mixture = random(5_000, 64, 2)
    U = mixture.factor.matrices() * torch.logspace(0, 100, 64, dtype=torch.float64)[:, None, None]
    yield "factors over 100 orders", x, gk.Mixture(mixture.logits, mixture.means, gk.FullFactor.from_factors(U))
    x = torch.zeros(6_000, 3, dtype=torch.float64)
    x[:, 0] = torch.linspace(0, 1, 6_000)
    x[3_000:] = x[2_999]
    yield "a line and repeated points", x, random(1, 80, 3, scale=0.01)[1]
    generator = torch.Generator().manual_seed(3)
    x = torch.tan(3.14159 * (torch.rand(8_000, 1, generator=generator, dtype=torch.float64) - 0.5))
    yield "one dimension, heavy tails", x, patches(x, 100)


SCENES = {name: (x, mixture) for name, x, mixture in scenes()}


def arguments(mixture):
    return mixture.offsets, mixture.means, mixture.factor


@pytest.mark.parametrize("epsilon", [1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SCENES)
def test_certificate_is_never_violated(name, dtype, epsilon):
    x, mixture = SCENES[name]
    x = x.to(dtype)
    truth = reductions.logsumexp(x, *arguments(mixture), truncate=0)
    cloud = reductions.arrange(x, mixture.n_components, epsilon)
    for _ in range(2):  # from a sampled guess, then from the minima of the sweep before
        values = reductions.logsumexp(cloud, *arguments(mixture), backend="dense")
        assert cloud.certificate <= -math.log1p(-epsilon) * (1 + 1e-9)
        lost = (truth - values).double()
        rounding = ROUNDING[dtype] * truth.double().abs().clamp(min=1)
        if dtype == torch.float64 and name in (
            "thin",
            "ill conditioned",
            "clusters and outliers",
            "factors over 100 orders",
        ):
            # Two orders of the same products: condition times the epsilon of float64.
            rounding = rounding * 1e3
        assert bool((lost >= -rounding).all())
        assert bool((lost <= cloud.certificate + rounding).all())
    # Whatever the truncation, single exponents are exact.
    labels = reductions.argmax(x, *arguments(mixture), truncate=0)
    found = reductions.argmax(cloud, *arguments(mixture), backend="dense")
    assert float((labels != found).double().mean()) < 1e-3  # ties of components that coincide
    k = 5
    exponents = reductions.topk(x, *arguments(mixture), k, truncate=0)[0].double()
    best = reductions.topk(cloud, *arguments(mixture), k, backend="dense")[0].double()
    assert bool(((exponents - best).abs() <= 1e3 * ROUNDING[dtype] * exponents.abs().clamp(min=1)).all())


def test_scenes_are_truncated_where_they_can_be():
    """The tests above would prove little if nothing were left out."""
    shares = {}
    for name, (x, mixture) in SCENES.items():
        cloud = reductions.arrange(x, mixture.n_components, 1e-4)
        reductions.logsumexp(cloud, *arguments(mixture), backend="dense")
        shares[name] = cloud.share
    assert shares["surface"] < 0.3
    assert sum(share < 0.6 for share in shares.values()) >= 6, shares


def test_a_wrong_bound_would_be_noticed(monkeypatch):
    """A bound that forgets the extent of the box is caught by the comparison that the tests make."""
    x, mixture = SCENES["surface"]
    truth = reductions.logsumexp(x, *arguments(mixture), truncate=0)
    true = _lists.Bounds.of

    def careless(self, boxes, which, index):
        points = _boxes.Boxes(boxes.center, boxes.axes, 0 * boxes.half, 0 * boxes.semi, boxes.reach)
        return true(self, points, which, index)

    monkeypatch.setattr(_lists.Bounds, "of", careless)
    monkeypatch.setattr(_lists, "unavailable", lambda: "it has no such bound")
    cloud = reductions.arrange(x, mixture.n_components, 1e-4)
    values = reductions.logsumexp(cloud, *arguments(mixture), backend="dense")
    assert float((truth - values).max()) > cloud.certificate + 1e-6


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_and_gradients(engine, dtype):
    backend, device = engine
    x, mixture = SCENES["surface"]
    x, mixture = x.to(device, dtype), mixture.to(device)
    g = torch.rand(len(x), generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    # float32 shares of a list and of all components are summed in another order.
    tolerance = 1e-8 if dtype == torch.float64 else FLOAT32[backend]
    # Rows are not a multiple of the boxes, so some points are repeated: they must count once.
    for rows in (slice(None), slice(0, 19_997)):
        cloud = reductions.arrange(x[rows], mixture.n_components, 1e-10)
        for weights in (None, g[rows]):
            truth = reductions.moments(x[rows], *arguments(mixture), weights=weights, backend="dense", truncate=0)
            sums = reductions.moments(cloud, *arguments(mixture), weights=weights, backend=backend)
            assert cloud.share < 0.3
            for name in ("S0", "S1", "S2", "total", "mass"):
                a, b = getattr(truth, name), getattr(sums, name)
                assert float((a - b).abs().max() / a.abs().max()) < tolerance, name
    points = x.clone().requires_grad_()
    values = reductions.logsumexp(points, *arguments(mixture), backend=backend, truncate=1e-10)
    (values * g).sum().backward()
    expected = x.clone().requires_grad_()
    (reductions.logsumexp(expected, *arguments(mixture), backend="dense", truncate=0) * g).sum().backward()
    error = (points.grad - expected.grad).abs().max() / expected.grad.abs().max()
    assert float(error) < (1e-4 if dtype == torch.float32 else 1e-8)


@pytest.mark.parametrize("engine", ENGINES)
def test_labels_and_largest_in_both_engines(engine):
    backend, device = engine
    x, mixture = SCENES["surface"]
    x, mixture = x.to(device), mixture.to(device)
    cloud = reductions.arrange(x, mixture.n_components, 1e-3)
    labels = reductions.argmax(x, *arguments(mixture), backend="dense", truncate=0)
    assert torch.equal(reductions.argmax(cloud, *arguments(mixture), backend=backend), labels)
    expected, which = reductions.topk(x, *arguments(mixture), 3, backend="dense", truncate=0)
    found, indices = reductions.topk(cloud, *arguments(mixture), 3, backend=backend)
    assert float((expected - found).abs().max()) < 1e-9
    assert torch.equal(which, indices)


@pytest.mark.parametrize("engine", ENGINES)
def test_more_are_asked_for_than_live(engine):
    backend, device = engine
    x, mixture = SCENES["surface"]
    x, mixture = x.to(device), mixture.to(device)
    offsets = torch.full_like(mixture.offsets, -math.inf)
    offsets[:2] = 0
    arguments = (offsets, mixture.means, mixture.factor)
    expected, _ = reductions.topk(x, *arguments, 3, backend="dense", truncate=0)
    found, _ = reductions.topk(x, *arguments, 3, backend=backend, truncate=1e-3)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("assignment", ["hard", "stochastic"])
def test_assignments(assignment):
    x, mixture = SCENES["surface"]
    cloud = reductions.arrange(x, mixture.n_components, 1e-6)
    options = {"assignment": assignment, "seed": 3, "backend": "dense"}
    sums = reductions.moments(cloud, *arguments(mixture), **options)
    truth = reductions.moments(x, *arguments(mixture), **options, truncate=0)
    assert cloud.share < 0.3
    if assignment == "hard":
        torch.testing.assert_close(sums.S2, truth.S2, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(sums.total, truth.total)
    else:
        # Other tiles draw other labels: counts agree within five standard deviations (chance to fail below 1e-4).
        soft = reductions.moments(x, *arguments(mixture), truncate=0).S0
        assert bool(((sums.S0 - soft).abs() <= 5 * soft.sqrt() + 1).all())
        assert float(sums.S0.sum()) == pytest.approx(len(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_fits_with_truncation_follow_exact_ones(family):
    x = surface(20_000)
    start = gk.initialize(x, 100, "kmeans++", covariance_type=family)
    penalty = gk.penalties.SqrtWeights(0.01)
    g = torch.rand(len(x), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {"penalty": penalty, "sample_weight": g, "max_iter": 5}
    exact = gk.fit(start, x, gk.EM(tol=0), truncate=0, **options)
    short = gk.fit(start, x, gk.EM(tol=0), truncate=1e-9, **options)
    assert short.report.evaluated_fraction < 0.6
    assert 0 <= short.report.certificate <= 1.0001e-9
    assert exact.report.truncate == exact.report.certificate == 0
    assert exact.report.evaluated_fraction == 1
    torch.testing.assert_close(short.mixture.means, exact.mixture.means, rtol=0, atol=1e-6)
    assert short.objective == pytest.approx(exact.objective, abs=1e-7)


@pytest.mark.parametrize("method", [gk.EM(accelerate=True, tol=0), gk.EM(batch_size=10_000, tol=0), gk.Adam(0.01)])
def test_methods_combine_with_truncation(method):
    x = surface(20_000)
    start = gk.initialize(x, 100, "kmeans++")
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    exact = gk.fit(start, x, method, truncate=0, max_iter=5, generator=generators[0])
    short = gk.fit(start, x, method, truncate=1e-8, max_iter=5, generator=generators[1])
    assert short.report.evaluated_fraction < 0.5
    assert short.objective == pytest.approx(exact.objective, abs=1e-5)


def test_many_dimensions_group_by_label():
    generator = torch.Generator().manual_seed(0)
    centers = 3 * torch.randn(40, 16, generator=generator, dtype=torch.float64)
    x = centers[torch.randint(40, (20_000,), generator=generator)]
    x = x + torch.randn(20_000, 16, generator=generator, dtype=torch.float64)
    start = gk.initialize(x, 40, "kmeans", covariance_type="diag")
    exact = gk.fit(start, x, gk.EM(tol=0), truncate=0, max_iter=6)
    short = gk.fit(start, x, gk.EM(tol=0), truncate=1e-9, max_iter=6)
    assert short.report.evaluated_fraction < 0.5
    assert short.objective == pytest.approx(exact.objective, abs=1e-7)


def test_em_stays_monotone_within_the_certificate():
    x = surface(20_000).float()
    start = gk.initialize(x, 150, "random")
    result = gk.fit(start, x, gk.EM(tol=0), truncate=1e-4, max_iter=25)
    objective = result.history["objective"]
    assert all(b <= a + 1e-4 for a, b in pairwise(objective))
    assert result.report.evaluated_fraction < 0.5


def test_lists_of_moving_components_are_valid():
    """The estimates come from the last parameters; what they neglect stays within the certificate."""
    x = surface(20_000)
    mixture = gk.fit(patches(x, 200), x, gk.EM(tol=0), truncate=0, max_iter=30).mixture
    cloud = reductions.arrange(x, 200, 1e-6)
    direction = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for step in range(6):
        moved = gk.Mixture(mixture.logits, mixture.means + 2e-3 * step * direction, mixture.factor)
        values = reductions.logsumexp(cloud, *arguments(moved), backend="dense")
        lost = reductions.logsumexp(x, *arguments(moved), truncate=0, backend="dense") - values
        assert float(lost.min()) >= -1e-12
        assert float(lost.max()) <= cloud.certificate + 1e-12 <= 1.0001e-6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("D", [1, 2, 3, 4, 6])
def test_compiled_lists_are_those_of_the_formulas(D, family, monkeypatch):
    """Leaves without lists, limits of -inf and below the range, sums and single bounds."""
    if reductions.native_unavailable() is not None:
        pytest.skip("the native engine is not compiled")
    for K, single in ((5, False), (300, False), (300, True)):
        case = make_case(family, torch.float32, N=9000, K=K, D=D, condition=5.0 if D > 1 else 1.0, spread=10.0)
        cloud = _boxes.Cloud.tree(case.x, 200)
        problem = reductions.problem.Exponents.of(cloud.points, *case.arguments[1:])
        limit = -5 - 20 * torch.rand(cloud.boxes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        limit[::5], limit[1], limit[2] = math.inf, -math.inf, -1e300
        found = _lists.candidate_lists(cloud, problem, limit, single=single)
        with monkeypatch.context() as patch:
            patch.setattr(_lists, "unavailable", lambda: "the formulas are asked for")
            expected = _lists.candidate_lists(cloud, problem, limit, single=single)
        for name in ("boxes", "index", "pointer", "spans", "owner"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert torch.allclose(found.pruned, expected.pruned, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("points", "components", "sweeps", "sorts"),
    [
        # Measured on an H200: log-densities 1.9 ms, sorting 31 ms; an iteration over all pairs 3.7 ms, over lists 23 ms.
        (10**6, 1000, 1, False),
        (10**6, 1000, 100, False),
        # An iteration over lists takes 20 ms, and sorting 0.11 s; all pairs would take about 240 ms.
        (10**7, 10**4, 100, True),
        (10**7, 10**4, 1, False),
        (10**8, 10**5, 1, True),
        (10**8, 10, 1000, False),
        (10**7, 10**4, 0, False),
    ],
)
def test_points_are_sorted_on_a_gpu_where_that_saves_time(points, components, sweeps, sorts):
    x = torch.empty(points, 3, device="meta")
    assert arrangement._pays(x.device.type, x.shape, components, sweeps, labeled=False) is sorts
    # Small problems on a GPU are not sorted where those on a CPU are.
    assert arrangement._pays("cpu", (10**6, 3), 1000, 100, labeled=False)


def test_automatic_truncation():
    x = surface(60_000).float()
    mixture = patches(x, 200)
    assert isinstance(reductions.arrange(x, 200), torch.Tensor)  # one sweep does not pay for the boxes
    cloud = reductions.arrange(x, 200, sweeps=100)
    assert cloud.epsilon == 1e-6
    assert reductions.arrange(x.double(), 200, sweeps=100).epsilon == 1e-12
    assert isinstance(reductions.arrange(x, 200, 0, sweeps=100), torch.Tensor)
    result = gk.fit(mixture, x, gk.EM(tol=0), max_iter=10)
    assert result.report.truncate == 1e-6
    assert "of all pairs" in str(result)
    estimator = gk.GaussianMixture(200, max_iter=10, tol=0, init_params="k-means++", truncate=1e-4, random_state=0).fit(
        x
    )
    assert estimator.result_.report.truncate == 1e-4
    exact = mixture.log_prob(x, truncate=0)
    assert float((exact - mixture.log_prob(x, truncate=1e-3)).abs().max()) < 1.1e-3
    probabilities, _ = mixture.responsibilities(x, k=3, truncate=1e-6)
    torch.testing.assert_close(probabilities, mixture.responsibilities(x[:], k=3, truncate=0)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad", [-0.1, 1.0, "much", math.nan])
def test_bad_truncation_is_one_sentence(bad):
    x = torch.randn(100, 2)
    with pytest.raises(ValueError, match="truncate must be None or a number from 0 to below 1"):
        gk.fit(gk.initialize(x, 2), x, gk.EM(), truncate=bad)


@pytest.mark.parametrize("N", [1, 2, 5, 1023, 1025, 4099])
@pytest.mark.parametrize("D", [1, 2, 5])
def test_clouds_keep_every_point_once(N, D):
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(3, (N,), generator=torch.Generator().manual_seed(1))
    for cloud in (_boxes.Cloud.tree(x, 64), _boxes.Cloud.grouped(x, labels, 64)):
        assert torch.equal(cloud.leave(cloud.points), x)
        assert torch.equal(cloud.enter(torch.ones(N)).sum(), torch.tensor(float(N)))
        assert int(cloud.starts.diff().max()) <= 64
        boxes = cloud.levels[-1]
        for box, (a, b) in enumerate(cloud.spans(torch.arange(cloud.boxes)).tolist()):
            t = (cloud.points[a:b].double() - boxes.center[box]) @ boxes.axes[box]
            assert bool((t.abs() <= boxes.half[box] + 1e-12).all())
            inside = (t / boxes.semi[box].clamp(min=1e-300)).square()
            assert bool((inside[:, boxes.semi[box] > 1e-12].sum(1) <= 1 + 1e-9).all())
