"""The contract of the reductions: both engines against a float64 oracle, values, moments and gradients."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import mpmath
import pytest
import torch
from conftest import ENGINES, FAMILIES, HAS_KEOPS, make_case
from hypothesis import given, settings
from hypothesis import strategies as st

from gmmkeops import FullFactor, Moments, PrecisionWarning, reductions
from gmmkeops.reductions.keops import loading as _keops

DTYPES = [torch.float32, torch.float64]
VALUE = {torch.float32: 1e-4, torch.float64: 1e-9}
AGREE = {torch.float32: 1e-5, torch.float64: 1e-12}
CONDITION = {torch.float32: 1e3, torch.float64: 1e6}


def error(got, expected):
    """Largest error relative to max(1, |expected|)."""
    return float(((got.double() - expected).abs() / expected.abs().clamp(min=1)).max())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_contract(engine, dtype, family):
    backend, device = engine
    case = make_case(family, dtype, condition=CONDITION[dtype], device=device)
    truth = case.oracle()
    values = reductions.logsumexp(*case.arguments, backend=backend)
    assert values.dtype == dtype
    assert error(values, truth["values"]) < VALUE[dtype] / 10

    sums = reductions.moments(*case.arguments, backend=backend)
    for name in ("S0", "S1", "S2", "total"):
        assert getattr(sums, name).shape == truth[name].shape
        scale = truth[name].abs().max()
        assert float((getattr(sums, name) - truth[name]).abs().max() / scale) < (
            2e-5 if dtype == torch.float32 else 1e-9
        )

    labels = reductions.argmax(*case.arguments, backend=backend)
    assert torch.equal(labels, truth["e"].argmax(1))
    exponents, components = reductions.topk(*case.arguments, 3, backend=backend)
    assert error(exponents, truth["e"].topk(3).values) < VALUE[dtype] / 10
    assert torch.equal(components[:, 0], labels)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["full", "tied_diag"])
def test_signed_weights_and_point_gradient(engine, dtype, family):
    backend, device = engine
    case = make_case(family, dtype, condition=30.0, device=device)
    g = torch.randn(len(case.x), generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    truth = case.oracle(g)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-11
    sums = reductions.moments(*case.arguments, weights=g, backend=backend)
    for name in ("S0", "S1", "S2"):
        assert float((getattr(sums, name) - truth[name]).abs().max() / truth[name].abs().max()) < tolerance
    x = case.x.clone().requires_grad_()
    (reductions.logsumexp(x, *case.arguments[1:], backend=backend) * g).sum().backward()
    assert float((x.grad - truth["gradient"]).abs().max() / truth["gradient"].abs().max()) < tolerance
    x.grad = None
    reductions.total(x, *case.arguments[1:], weights=g, backend=backend).backward()
    assert float((x.grad - truth["gradient"]).abs().max() / truth["gradient"].abs().max()) < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("D", [1, 2, 7, 16, 32])
def test_dense_in_many_dimensions(dtype, family, D):
    case = make_case(family, dtype, D=D, N=200, condition=CONDITION[dtype], seed=D)
    truth = case.oracle()
    assert error(reductions.logsumexp(*case.arguments, backend="dense"), truth["values"]) < VALUE[dtype]
    sums = reductions.moments(*case.arguments, backend="dense")
    assert float((sums.S2 - truth["S2"]).abs().max() / truth["S2"].abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "K"), [(6, 1), (13, 2), (32, 5)])
def test_few_components_in_many_dimensions(dtype, D, K, monkeypatch):
    """Tiles that do without the features of points: everything that they give, and the same with features."""
    case = make_case("full", dtype, D=D, K=K, N=500, condition=30.0, seed=D)
    g = torch.randn(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    truth = case.oracle(g)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-11

    def everything():
        sums = reductions.moments(*case.arguments, weights=g, backend="dense")
        hard = reductions.moments(*case.arguments, assignment="hard", backend="dense")
        x = case.x.clone().requires_grad_()
        reductions.total(x, *case.arguments[1:], weights=g, backend="dense").backward()
        return sums.S0, sums.S1, sums.S2, sums.total, hard.S0, hard.S1, hard.S2, hard.total, x.grad

    asked = []
    true = reductions.dense.tile.Tile._residuals
    monkeypatch.setattr(
        reductions.dense.tile.Tile, "_residuals", lambda tile: (asked.append(tile.height), true(tile))[1]
    )
    found = everything()
    assert asked
    assert error(reductions.logsumexp(*case.arguments, backend="dense"), truth["values"]) < tolerance
    for value, name in zip(found, ("S0", "S1", "S2"), strict=False):
        assert float((value - truth[name]).abs().max() / truth[name].abs().max()) < tolerance
    assert float((found[-1] - truth["gradient"]).abs().max() / truth["gradient"].abs().max()) < tolerance
    monkeypatch.setattr(reductions.dense.tile, "_FEW", 10**9)
    for value, featured in zip(found, everything(), strict=True):
        assert float((value - featured).abs().max() / featured.abs().max()) < tolerance


def test_few_components_beyond_range():
    """Exponents below float32's range in tiles without features: finite, and the responsibilities too."""
    x, means = torch.full((3, 12), 1e25), torch.zeros(2, 12)
    means[1] += 1e24
    problem = x, torch.zeros(2), means, torch.eye(12).expand(2, 12, 12)
    values = reductions.logsumexp(*problem, backend="dense")
    assert bool(torch.isfinite(values).all())
    assert bool((values < -1e38).all())
    assert bool(torch.isfinite(reductions.moments(*problem, backend="dense").S0).all())


@pytest.fixture
def high(monkeypatch):
    """float32 products are asked for; gives whether each worker's tiles took float64 ones."""
    precise = []

    def tile(*arguments):
        precise.append(arguments[-1])
        return reductions.dense.tile.Tile(*arguments)

    monkeypatch.setattr(reductions.dense.engine, "Tile", tile)
    torch.set_float32_matmul_precision("high")
    yield precise
    torch.set_float32_matmul_precision("highest")


DEVICES = [engine for engine in ENGINES if engine.id.startswith("dense")]


@pytest.mark.parametrize("engine", DEVICES)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("family", "D", "K"), [(f, 3, 5) for f in FAMILIES] + [("full", 12, 2), ("full", 8, 40)])
def test_float32_products(engine, split, family, D, K, high, monkeypatch):
    """Everything with float32 products, whole or in the parts that tensor cores take: near the oracle, though not as near."""
    if split:
        monkeypatch.setattr(reductions.dense.products, "_on_tensor_cores", lambda a: a.dtype == torch.float32)
    case = make_case(family, torch.float32, N=9000, D=D, K=K, condition=4.0, device=engine[1])
    g = torch.randn(9000, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(engine[1])
    # Weights of both signs cancel in the sums; rounding is relative to the sums of their sizes.
    truth, absolute = case.oracle(g), case.oracle(g.abs())
    values = reductions.logsumexp(*case.arguments, backend="dense")
    assert error(values, truth["values"]) < 1e-4
    sums = reductions.moments(*case.arguments, weights=g, backend="dense")
    for name in ("S0", "S1", "S2", "total"):
        assert float((getattr(sums, name) - truth[name]).abs().max() / absolute[name].abs().max()) < 2e-5
    assert high.count(False) >= 2 * 2  # and the samples that were looked at
    ones = reductions.moments(*case.arguments, assignment="hard", backend="dense")
    assert torch.equal(ones.S0, torch.bincount(truth["e"].argmax(1), minlength=K).double())
    # Labels and gradients in the points are precise whatever is asked for.
    high.clear()
    assert torch.equal(reductions.argmax(*case.arguments, backend="dense"), truth["e"].argmax(1))
    assert all(high)


@pytest.mark.parametrize("size", [2.0**-830, 2.0**830])
def test_float32_products_of_weights_of_any_size(size, high):
    case = make_case("full", torch.float32, N=9000, condition=10.0)
    g = torch.rand(9000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain, sums = (reductions.moments(*case.arguments, weights=g * factor, backend="dense") for factor in (1.0, size))
    for name in ("S0", "S1", "S2", "total"):
        assert torch.equal(getattr(sums, name) / size, getattr(plain, name))
    assert high.count(False) > 1


def test_float32_products_of_lists(high):
    case = make_case("diag", torch.float32, N=20_000, K=300, D=2, condition=10.0)
    assert error(reductions.logsumexp(*case.arguments, truncate=1e-7, backend="dense"), case.oracle()["values"]) < 1e-4
    assert high.count(False) > 1


def test_float32_products_that_will_not_do(high):
    """Thin components far from the middle: it is said, and float64 products are taken."""
    x = 500 + 0.05 * torch.randn(9000, 2, generator=torch.Generator().manual_seed(0))
    problem = x, torch.zeros(2), torch.tensor([[500.0, 500.0], [-500.0, -500.0]]), torch.full((2, 2), 20.0)
    with pytest.warns(PrecisionWarning, match=r"allows float32 products, .* would change by more than 5e-05 \* max"):
        sums = reductions.moments(*problem, backend="dense")
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(sums.S2, reductions.moments(*problem, backend="dense").S2)


def test_products_in_parts():
    """Three products of eleven bits keep what one of them loses."""
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    exact, scale = a.double() @ b.double(), a.abs().double() @ b.abs().double()
    once = reductions.dense.products._rounded(a) @ reductions.dense.products._rounded(b)
    assert float(((once - exact).abs() / scale).max()) > 1e-5
    assert float(((reductions.dense.products.split_product(a, b) - exact).abs() / scale).max()) < 2**-21
    head, rest = reductions.dense.products._parts(a)
    assert float(((head.double() + rest.double()) / a.double() - 1).abs().max()) < 2**-22
    bits = head.view(torch.int32) & 0x1FFF
    assert int(bits.abs().max()) == 0


KEOPS = [engine for engine in ENGINES if engine.id.startswith("keops")]


@pytest.mark.parametrize("engine", KEOPS)
@pytest.mark.parametrize(
    ("dtype", "D"), [(torch.float32, 1), (torch.float64, 1), (torch.float32, 10), (torch.float64, 32)]
)
def test_keops_in_other_dimensions(engine, dtype, D):
    backend, device = engine
    case = make_case("full", dtype, D=D, N=200, condition=CONDITION[dtype], seed=D, device=device)
    assert error(reductions.logsumexp(*case.arguments, backend=backend), case.oracle()["values"]) < VALUE[dtype]


@pytest.mark.parametrize("engine", KEOPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_engines_agree(engine, dtype, family):
    backend, device = engine
    # Moderate covariances: where a component is far thinner than its distance, float32 residuals differ by more.
    case = make_case(family, dtype, N=9000, condition=10.0, device=device)
    ours = reductions.logsumexp(*case.arguments, backend="dense")
    theirs = reductions.logsumexp(*case.arguments, backend=backend)
    assert error(theirs, ours.double()) < AGREE[dtype]
    a = reductions.moments(*case.arguments, backend="dense")
    b = reductions.moments(*case.arguments, backend=backend)
    for name in ("S0", "S1", "S2"):
        scale = getattr(a, name).abs().max()
        assert float((getattr(a, name) - getattr(b, name)).abs().max() / scale) < AGREE[dtype]


@pytest.mark.parametrize("engine", ENGINES)
def test_far_from_the_origin(engine):
    backend, device = engine
    case = make_case("full", torch.float64, condition=1e6, shift=5e6, device=device)
    # In exact differences: the oracle subtracts before it multiplies.
    assert error(reductions.logsumexp(*case.arguments, backend=backend), case.oracle()["values"]) < 1e-9


def test_against_mpmath():
    mpmath.mp.dps = 50
    case = make_case("full", torch.float64, N=6, K=4, D=4, condition=1e6, shift=5e6)
    U = case.factor.U
    for n, value in enumerate(reductions.logsumexp(*case.arguments).tolist()):
        terms = []
        for k in range(4):
            z = [mpmath.mpf(float(case.x[n, d])) - mpmath.mpf(float(case.means[k, d])) for d in range(4)]
            y = [sum(mpmath.mpf(float(U[k, d, i])) * z[d] for d in range(4)) for i in range(4)]
            terms.append(mpmath.exp(mpmath.mpf(float(case.offsets[k])) - sum(v * v for v in y) / 2))
        truth = mpmath.log(sum(terms))
        assert abs(value - truth) <= 1e-9 * max(1, abs(truth))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", ["full", "diag", "spherical", "tied_full"])
def test_gradcheck(engine, family):
    backend, device = engine
    case = make_case(family, torch.float64, N=12, K=3, condition=4.0, device=device)
    inputs = [tensor.clone().requires_grad_() for tensor in (*case.arguments[:3], case.factor.U.detach())]
    assert torch.autograd.gradcheck(lambda *a: reductions.logsumexp(*a, backend=backend), inputs)
    g = torch.linspace(-1, 2, 12, dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(lambda *a: reductions.total(*a, weights=g, backend=backend), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_and_threads_change_nothing(dtype, monkeypatch):
    case = make_case("full", dtype, N=5000, K=40)
    whole = reductions.moments(*case.arguments, backend="dense")
    again = reductions.moments(*case.arguments, backend="dense")
    assert torch.equal(whole.S2, again.S2)
    monkeypatch.setattr(reductions.dense.engine, "_TILE_CPU", 4096)
    monkeypatch.setattr(reductions.dense.engine, "_PAIRS_PER_THREAD", 1000)
    tiled = reductions.moments(*case.arguments, backend="dense")
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert float((whole.S2 - tiled.S2).abs().max() / whole.S2.abs().max()) < tolerance
    ones = reductions.logsumexp(*case.arguments, backend="dense")
    assert float((ones.sum(dtype=torch.float64) - tiled.total).abs() / tiled.total.abs()) < tolerance
    threads = torch.get_num_threads()
    for _ in range(20):
        assert torch.equal(ones, reductions.logsumexp(*case.arguments, backend="dense"))
    assert torch.get_num_threads() == threads


def test_float32_sums_keep_their_digits():
    """10⁶ equal terms: a running float32 sum would be 1 % off."""
    x = torch.full((1_000_000, 1), 0.1)
    exact = float(x[0, 0].double())
    for backend, tolerance in (("dense", 1e-12), ("native", 1e-6)):
        sums = reductions.moments(x, torch.zeros(1), torch.zeros(1, 1), torch.ones(1, 1), backend=backend)
        assert abs(float(sums.S1[0, 0]) / (1e6 * exact) - 1) < tolerance
        assert abs(float(sums.S2[0]) / (1e6 * exact**2) - 1) < tolerance


def test_thin_component_far_away_in_float32():
    """500 m from the center, σ = 5 cm: expanded float32 squares are wrong 18-fold, ours are right."""
    generator = torch.Generator().manual_seed(0)
    x = (0.05 * torch.randn(20_000, 2, generator=generator, dtype=torch.float64) + 500).float()
    far = torch.cat([x, torch.full((10, 2), -500.0)])
    means, U = torch.tensor([[500.0, 500.0], [-500.0, -500.0], [-500.0, -500.0]]), torch.full((3, 2), 20.0)
    sums = reductions.moments(far, torch.zeros(3), means, U)
    truth = (x.double() - 500).square().sum(0)
    assert float((sums.S2[0] / truth - 1).abs().max()) < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_components_without_weight_and_points_beyond_range(engine):
    backend, device = engine
    kind = {"dtype": torch.float32, "device": device}
    x = torch.tensor([[0.0, 0.0, 0.0], [1e25, 0.0, 0.0]], **kind)
    offsets = torch.tensor([-math.inf, 0.0], **kind)
    means, U = torch.zeros(2, 3, **kind), torch.ones(2, 3, **kind)
    values = reductions.logsumexp(x, offsets, means, U, backend=backend)
    assert bool(torch.isfinite(values).all())
    assert abs(float(values[0])) < 1e-6
    assert float(values[1]) < -1e37
    sums = reductions.moments(x[:1], offsets, means, U, backend=backend)
    assert sums.S0.tolist() == [0.0, 1.0]


def test_hard_moments_are_sums_over_clusters():
    case = make_case("full", torch.float32)
    labels = case.oracle()["e"].argmax(1)
    g = torch.rand(len(case.x), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = reductions.moments(*case.arguments, weights=g, assignment="hard")
    for k in range(5):
        z = (case.x[labels == k] - case.means[k]).double()
        h = g[labels == k]
        assert torch.allclose(sums.S0[k], h.sum())
        assert torch.allclose(sums.S1[k], h @ z, atol=1e-4)
        assert torch.allclose(sums.S2[k], (h[:, None] * z).mT @ z, atol=1e-4)
    assert torch.allclose(sums.total, g @ case.oracle()["e"].amax(1), rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_threads_share_the_work(family):
    """Each thread adds up tiles of its own: what three find together is what one finds."""
    case = make_case(family, torch.float64, N=320_000, condition=10.0)
    x, *rest = case.arguments
    g = torch.rand(len(x), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points, threads = x.clone().requires_grad_(), torch.get_num_threads()
    found = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            sums = reductions.moments(x, *rest, weights=g)
            values = reductions.logsumexp(points, *rest)
            (slope,) = torch.autograd.grad((g * values).sum(), points)
            found.append([sums.S0, sums.S1, sums.S2, sums.total, values.detach(), slope])
            found[-1] += [*reductions.topk(x, *rest, 2), reductions.argmax(x, *rest)]
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*found, strict=True):
        assert torch.allclose(one, three, rtol=1e-9, atol=1e-9)


def test_draws_of_many_tiles_are_independent():
    """The mass of one of two equal components is binomial; tiles that draw alike would spread it several times as far."""
    N, factor = 200_000, torch.ones(2, 1, dtype=torch.float64)
    x, means = torch.zeros(N, 2, dtype=torch.float64), torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    offsets = torch.zeros(2, dtype=torch.float64)
    masses = torch.stack(
        [
            reductions.moments(x, offsets, means, factor, assignment="stochastic", seed=10**6 * seed).S0
            for seed in range(20)
        ]
    )
    assert bool((masses.sum(1) == N).all())
    deviations = (masses[:, 0] - N / 2) / (N / 4) ** 0.5
    # A χ² of 20 degrees of freedom is beyond 60 once in 100 000 times.
    assert float(deviations.square().sum()) < 60


def test_stochastic_moments_are_draws():
    """20 000 copies of three points; each count is within 5 standard deviations but for chance 6e-7 per entry."""
    case = make_case("full", torch.float64, N=3, condition=10.0)
    r = (case.oracle()["e"] - case.oracle()["values"][:, None]).exp()
    x = case.x.repeat(20_000, 1)
    sums = reductions.moments(x, *case.arguments[1:], assignment="stochastic", seed=1)
    expected, deviation = 20_000 * r.sum(0), (20_000 * r * (1 - r)).sum(0).sqrt()
    assert bool(((sums.S0 - expected).abs() <= 5 * deviation + 1e-9).all())
    assert torch.equal(sums.S0, sums.S0.round())
    assert abs(float(sums.total - 20_000 * case.oracle()["values"].sum())) < 1e-6
    again = reductions.moments(x, *case.arguments[1:], assignment="stochastic", seed=1)
    assert torch.equal(again.S2, sums.S2)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 299), st.sampled_from(FAMILIES))
def test_parts_add_up_about_any_centers(seed, cut, family):
    case = make_case(family, torch.float64, seed=seed, condition=10.0)
    whole = reductions.moments(*case.arguments)
    x, *rest = case.arguments
    first, second = reductions.moments(x[:cut], *rest), reductions.moments(x[cut:], *rest)
    away = second.recenter(second.centers + torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)).double())
    for both in (first + away, (away + first).recenter(whole.centers)):
        for name in ("S0", "S1", "S2", "total", "mass"):
            assert torch.allclose(getattr(both, name), getattr(whole, name), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ndim", [3, 2, 1])
def test_recentered_moments_are_those_about_the_other_centers(ndim):
    generator = torch.Generator().manual_seed(3)
    x, old, new = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (50, 4, 4))
    r = torch.rand(50, 4, generator=generator, dtype=torch.float64)

    def about(centers):
        z = x[:, None] - centers
        S2 = torch.einsum("nk,nkd,nke->kde", r, z, z)
        S2 = S2 if ndim == 3 else S2.diagonal(dim1=1, dim2=2)
        S2 = S2.sum(1) if ndim == 1 else S2
        return Moments(r.sum(0), torch.einsum("nk,nkd->kd", r, z), S2, centers, r.sum(), r.sum())

    found, right = about(old).recenter(new), about(new)
    for name in ("S0", "S1", "S2", "centers"):
        assert torch.allclose(getattr(found, name), getattr(right, name), rtol=1e-12, atol=1e-12)


def test_a_decayed_sum_is_that_of_lighter_points():
    x, *rest = make_case("full", torch.float64, seed=1).arguments
    decayed = 0.3 * reductions.moments(x, *rest)
    lighter = reductions.moments(x, *rest, weights=torch.full((len(x),), 0.3, dtype=torch.float64))
    for name in ("S0", "S1", "S2", "total", "mass"):
        assert torch.allclose(getattr(decayed, name), getattr(lighter, name), rtol=1e-9, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(FAMILIES))
def test_integer_weights_are_repetition(seed, family):
    case = make_case(family, torch.float64, seed=seed, N=50, condition=10.0)
    x, *rest = case.arguments
    counts = torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(seed))
    weighted = reductions.moments(x, *rest, weights=counts)
    repeated = reductions.moments(x.repeat_interleave(counts, 0), *rest) if int(counts.sum()) else weighted * 0
    for name in ("S0", "S1", "S2", "total", "mass"):
        assert torch.allclose(getattr(weighted, name), getattr(repeated, name), rtol=1e-9, atol=1e-9)


GOOD = (torch.zeros(4, 2), torch.zeros(3), torch.zeros(3, 2), torch.ones(3, 2))


def bad(position, value):
    return (*GOOD[:position], value, *GOOD[position + 1 :])


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (bad(0, torch.tensor([[0.0, math.nan]])), ValueError, "x must be finite, got NaN at row 0, column 1"),
        (bad(0, torch.tensor([[0.0, 1.0], [math.inf, 1.0]])), ValueError, "got inf at row 1, column 0"),
        (bad(0, torch.zeros(4)), ValueError, r"shape \(N, D\), got \(4,\); use x\[:, None\]"),
        (bad(0, torch.zeros(0, 2)), ValueError, "x has no rows"),
        (bad(0, torch.zeros(4, 3)), ValueError, "x has 3 columns, expected 2"),
        (bad(0, torch.zeros(4, 2, dtype=torch.complex64)), TypeError, "x must be real"),
        (bad(0, [["a", "b"]]), TypeError, "x must be numeric"),
        (bad(1, torch.zeros(2)), ValueError, r"offsets must have shape \(3,\)"),
        (bad(1, torch.full((3,), math.nan)), ValueError, "offsets must not be NaN"),
        (bad(2, torch.full((3, 2), math.inf)), ValueError, "means must be finite, got inf at component 0"),
        (bad(2, torch.zeros(3, 2, device="meta")), ValueError, "x is on cpu but the parameters are on meta"),
        (bad(3, torch.ones(2, 2)), ValueError, "factor must have shape"),
        (bad(3, torch.ones(3, 2, 3)), ValueError, "factor must have shape"),
        (bad(3, torch.full((3, 2), math.nan)), ValueError, "factor must be finite"),
    ],
)
def test_bad_input_gets_one_sentence(arguments, kind, message):
    for function in (reductions.logsumexp, reductions.moments, reductions.argmax, reductions.total):
        with pytest.raises(kind, match=message):
            function(*arguments)


def test_other_refusals():
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'native', 'keops', 'dense', got 'gpu'"):
        reductions.logsumexp(*GOOD, backend="gpu")
    with pytest.raises(ValueError, match="k must be between 1 and the 3 components"):
        reductions.topk(*GOOD, 4)
    with pytest.raises(ValueError, match=r"weights must have shape \(4,\)"):
        reductions.moments(*GOOD, weights=torch.ones(3))


def test_gradients_come_in_the_dtype_of_each_input():
    case = make_case("full", torch.float32, N=20)
    U = FullFactor.from_factors(case.factor.U.double()).U.detach().requires_grad_()
    means = case.means.clone().requires_grad_()
    found = torch.autograd.grad(reductions.total(case.x, case.offsets, means, U), (means, U), create_graph=True)
    assert [gradient.dtype for gradient in found] == [torch.float32, torch.float64]
    (gradient,) = torch.autograd.grad(found[1].sum(), means)
    assert gradient.dtype == torch.float32


def test_missing_keops_is_said_once_and_replaced(monkeypatch):
    monkeypatch.setitem(_keops._state, "reason", "pykeops is not installed (pip install pykeops)")
    monkeypatch.setattr(reductions.choice, "_warned", set())
    with pytest.warns(UserWarning, match="KeOps was requested but pykeops is not installed"):
        values = reductions.logsumexp(*GOOD, backend="keops")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(values, reductions.logsumexp(*GOOD, backend="keops"))
        assert torch.equal(values, reductions.logsumexp(*GOOD))


@pytest.mark.keops
@pytest.mark.skipif(not HAS_KEOPS, reason="no pykeops")
def test_keops_is_quiet_and_leaves_the_environment_alone(tmp_path):
    code = """
import os, torch, gmmkeops as gk
before = dict(os.environ)
a = torch.zeros(4, 2), torch.zeros(3), torch.zeros(3, 2), torch.ones(3, 2)
gk.reductions.logsumexp(*a, backend="keops")
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
pid = os.fork()
if pid == 0:
    try:
        gk.reductions.logsumexp(*a, backend="keops")
    except RuntimeError as error:
        os._exit(0 if "'spawn'" in str(error) else 1)
    os._exit(2)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


@pytest.mark.keops
@pytest.mark.skipif(not HAS_KEOPS, reason="no pykeops")
def test_a_damaged_cache_heals_itself(tmp_path):
    code = """
import torch, gmmkeops as gk
from gmmkeops.reductions.keops import loading as _keops
a = torch.zeros(4, 1), torch.zeros(3), torch.zeros(3, 1), torch.ones(3, 1)
print(float(gk.reductions.logsumexp(*a, backend="keops")[0]))
print(_keops._state["lock"].parent)
"""
    environment = {k: v for k, v in os.environ.items() if k != "KEOPS_CACHE_FOLDER"} | {"XDG_CACHE_HOME": str(tmp_path)}

    def run():
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment
        )

    first = run()
    assert first.returncode == 0, first.stderr
    value, folder = first.stdout.split()
    assert abs(float(value) - math.log(3)) < 1e-6
    damaged = list(Path(folder).glob("*.pkl"))
    assert damaged
    for path in damaged:
        path.write_bytes(path.read_bytes()[:10])
    second = run()
    assert second.returncode == 0, second.stderr
    assert second.stdout == first.stdout
    # A compiler that was killed leaves the end of its file unwritten, which would be a bus error on loading it.
    formulas = [path for path in Path(folder).rglob("*.so") if path.stat().st_size > 1000]
    assert formulas
    for path in formulas:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    third = run()
    assert third.returncode == 0, third.stderr
    assert third.stdout == first.stdout
