"""The reductions: both engines against a float64 oracle, values, moments and gradients."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from conftest import ENGINES, FAMILIES, make_case

from gmmkeops import FullFactor, reductions
from gmmkeops.reductions.dispatch import compute
from gmmkeops.reductions.native.engine import Native
from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.protocol import PointGradient

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


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_values", [False, True])
def test_point_gradient_without_weights_and_with_values(engine, dtype, with_values):
    backend, device = engine
    case = make_case("full", dtype, condition=30.0, device=device)
    problem, truth = Exponents.of(*case.arguments), case.oracle()
    gradient, *values = compute(problem, None, PointGradient(values=with_values), backend)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-11
    assert float((gradient - truth["gradient"]).abs().max() / truth["gradient"].abs().max()) < tolerance
    assert [error(found, truth["values"]) < VALUE[dtype] / 10 for found in values] == [True] * with_values


@pytest.mark.skipif(reductions.native_unavailable() is not None, reason="the native engine is not compiled")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e34])
@pytest.mark.parametrize("family", ["full", "diag", "spherical"])
def test_values_and_point_gradients_take_one_pass(monkeypatch, dtype, size, family):
    case = make_case(family, dtype, condition=30.0)
    g = size * torch.randn(len(case.x), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = case.oracle(g)["gradient"]
    asked, begin = [], Native.begin
    monkeypatch.setattr(Native, "begin", lambda self, *args: (asked.append(args[1]), begin(self, *args))[1])
    x = case.x.clone().requires_grad_()
    values = reductions.logsumexp(x, *case.arguments[1:], backend="native", truncate=0)
    values.backward(g.to(dtype))
    assert asked == [PointGradient(values=True)]
    away = (x.grad.double() - expected).abs().max() / expected.abs().max()
    assert float(away) < (2e-5 if dtype == torch.float32 else 1e-11)
    alone = reductions.logsumexp(*case.arguments, backend="native", truncate=0)
    assert error(values.detach(), alone.double()) < (1e-5 if dtype == torch.float32 else 1e-13)
    # A second backward pass with other arguments is not taken from the first one.
    other = reductions.logsumexp(x + 1, *case.arguments[1:], backend="native", truncate=0)
    assert not torch.allclose(
        torch.autograd.grad(other.sum(), x)[0],
        torch.autograd.grad(reductions.logsumexp(x, *case.arguments[1:], backend="native", truncate=0).sum(), x)[0],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("D", [1, 2, 7, 16, 32])
def test_dense_in_many_dimensions(dtype, family, D):
    case = make_case(family, dtype, D=D, N=200, condition=CONDITION[dtype], seed=D)
    truth = case.oracle()
    assert error(reductions.logsumexp(*case.arguments, backend="dense"), truth["values"]) < VALUE[dtype]
    sums = reductions.moments(*case.arguments, backend="dense")
    assert float((sums.S2 - truth["S2"]).abs().max() / truth["S2"].abs().max()) < 1e-5


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
    with pytest.raises(
        ValueError, match="backend must be one of 'auto', 'native', 'keops', 'triton', 'dense', got 'gpu'"
    ):
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


@pytest.mark.parametrize(("weight", "u"), [(1e39, 1e-2), (1e-40, 1e4)])
def test_point_gradients_for_weights_beyond_float32(weight, u):
    """The product of a weight and a slope is in the range of float32, though the weight is not."""
    x, g = torch.full((4, 1), 1e-3, requires_grad=True), torch.full((4,), weight, dtype=torch.float64)
    reductions.total(x, torch.zeros(1), torch.zeros(1, 1), torch.full((1, 1), u), weights=g, truncate=0).backward()
    assert torch.allclose(x.grad.double() / (weight * u * u), -x.detach().double(), rtol=1e-5)
