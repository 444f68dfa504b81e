"""The Triton engine, by Triton's interpreter where there is no device: every kernel against float64, and what it leaves out."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import INTERPRETED, make_case, needs_triton
from triton_binaries import all_pairs

from gmmkeops import reductions
from gmmkeops.reductions import choice
from gmmkeops.reductions.derivatives import LogSumExp as Derivative
from gmmkeops.reductions.dispatch import Dispatch
from gmmkeops.reductions.problem import Exponents, factor_tensor
from gmmkeops.reductions.protocol import Argmax, Broken, LogSumExp, PointGradient, Statistics, TopK
from gmmkeops.reductions.triton import columns, engine, loading, partial, products, residuals, tiles, triton

DEVICES = [INTERPRETED, pytest.param(("triton", "cuda"), id="triton-cuda", marks=needs_triton)]
CLOSE = 2e-6
# Tensor cores truncate the terms of a sum to the last bit of the largest one: the largest error of log-sum-exps in these tests is
# 3.02e-6 on an H200 (tied_full, 32 features), where the interpreter, which rounds, has less than 2e-6.
TRUNCATED = {"cpu": 1, "cuda": 2}

pytestmark = pytest.mark.parametrize("on", DEVICES)

# Families, numbers of features and of components. Moments of the last ones are computed by tiles.
FEW = [
    *(("full", D, K) for D, K in zip(range(1, 9), (6, 300, 5, 37, 1, 3, 2, 5), strict=True)),
    *(("tied_full", 4, 6), ("spherical", 1, 3), ("diag", 3, 30), ("diag", 17, 5), ("diag", 32, 3), ("tied_diag", 2, 4)),
    *(("spherical", 2, 50), ("spherical", 9, 6), ("spherical", 32, 2), ("tied_spherical", 3, 7)),
]
MANY = [("full", 9, 3), ("full", 16, 5), ("full", 20, 3), ("tied_full", 32, 2)]
MANY += [(family, D, 2) for family in ("diag", "spherical") for D in (64, 128)]


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    """Chunks of so few rows that small cases have several, the last of which is not full."""
    monkeypatch.setattr(residuals, "_CHUNK", 8)
    monkeypatch.setattr(tiles, "_CHUNK", 64)
    monkeypatch.setattr(choice, "_told", set())


def weights_of(x):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(len(x), generator=generator, dtype=torch.float64).to(x.device)


def evaluated(problem, request, *schedules):
    """The result of a request over all pairs or over schedules, and the minima of these."""
    evaluation = triton.begin(problem, request)
    found = [evaluation.add(schedule) for schedule in schedules or [None]]
    return evaluation.result(), found


def error(found, expected, scale=None):
    """The largest error, relative to max(1, |expected|) or to the largest entry of ``scale``."""
    assert found.shape == expected.shape
    difference = (found.double() - expected).abs()
    return float(
        (difference / expected.abs().clamp(min=1)).max() if scale is None else difference.max() / scale.abs().max()
    )


def check(case, near=CLOSE, same_kernels=True):
    """Compare all requests with the oracle: log-sum-exps relative to max(1, |l|), moments relative to those of |g|."""
    problem, g = Exponents.of(*case.arguments), weights_of(case.x)
    assert triton.unsupported(problem.form, Statistics(g)) is None
    plain, signed, absolute = case.oracle(), case.oracle(g), case.oracle(g.abs())
    best = plain["e"].topk(min(3, len(case.means)))
    (values,), _ = evaluated(problem, LogSumExp())
    assert values.dtype == case.x.dtype
    assert error(values, plain["values"]) <= near
    (S0, S1, S2, total), _ = evaluated(problem, Statistics(g))
    assert error(S0, signed["S0"], absolute["S0"]) <= CLOSE
    # The sum of absolute residuals is at most this, by the Cauchy-Schwarz inequality.
    assert error(S1, signed["S1"], (absolute["S0"].max() * absolute["S2"].abs().max()).sqrt()) <= CLOSE
    assert error(S2, signed["S2"], absolute["S2"]) <= CLOSE
    assert error(total, signed["total"], g.abs() @ plain["values"].abs()) <= CLOSE
    if triton.unsupported(problem.form, PointGradient()) is None:
        (gradient, same), _ = evaluated(problem, PointGradient(g, values=True))
        assert error(gradient, signed["gradient"], signed["gradient"]) <= 2 * CLOSE
        assert torch.equal(same, values) if same_kernels else error(same, plain["values"]) <= near
    (labels,), _ = evaluated(problem, Argmax())
    assert torch.equal(labels, best.indices[:, 0])
    (exponents, components), _ = evaluated(problem, TopK(len(best.values[0])))
    assert error(exponents, best.values) <= 2 * near
    assert torch.equal(components, best.indices)


@pytest.fixture
def slow_double(monkeypatch):
    """A device with slow float64 arithmetic, on which kernels are used for any number of features."""
    monkeypatch.setattr(engine, "_has_fast_double", lambda device: False)


@pytest.fixture
def fast_double(monkeypatch):
    """A device with fast float64 arithmetic, on which products are used for any number of components."""
    monkeypatch.setattr(engine, "_PRODUCT_COMPONENTS", 1)
    monkeypatch.setattr(engine, "_has_fast_double", lambda device: True)


@pytest.mark.parametrize(("family", "features", "components"), FEW)
@pytest.mark.usefixtures("slow_double")
def test_residuals(on, family, features, components):
    check(make_case(family, torch.float32, N=21, K=components, D=features, condition=20.0, seed=3, device=on[1]))


@pytest.mark.parametrize(("family", "features", "components"), MANY)
@pytest.mark.usefixtures("slow_double")
def test_tiles(on, family, features, components):
    case = make_case(family, torch.float32, N=70, K=components, D=features, condition=20.0, device=on[1])
    # The squares of 64 and more residuals have a sum that may be much larger than |l|.
    near = CLOSE if features <= 32 else 3 * CLOSE
    check(case, near * TRUNCATED[on[1]] if "full" in family else near)


@pytest.mark.parametrize(("family", "features", "components"), [*MANY, ("full", 40, 7), ("diag", 200, 35)])
@pytest.mark.usefixtures("fast_double")
def test_products(on, family, features, components, monkeypatch):
    """Moments, and log-sum-exps of many features, by float64 products with a kernel for the sums of exponentials."""
    case = make_case(family, torch.float32, N=70, K=components, D=features, condition=20.0, device=on[1])
    launched = []
    for name in ("logsumexps", "assign"):
        method = getattr(columns.Softmax, name)
        monkeypatch.setattr(
            columns.Softmax, name, lambda *given, name=name, method=method: (launched.append(name), method(*given))[1]
        )
    problem, g = Exponents.of(*case.arguments), weights_of(case.x)
    assert triton.unsupported(problem.form, Statistics(g)) is None
    plain, signed, absolute = case.oracle(), case.oracle(g), case.oracle(g.abs())
    for weights, truth in ((g, signed), (None, plain)):
        (S0, S1, S2, total, values), _ = evaluated(problem, Statistics(weights, values=True))
        assert error(values, plain["values"]) <= CLOSE / 10
        for found, name in ((S0, "S0"), (S1, "S1"), (S2, "S2")):
            assert error(found, truth[name], absolute[name] + plain[name].abs()) <= CLOSE / 2
        assert error(total, truth["total"], g.abs() @ plain["values"].abs()) <= CLOSE / 10
    assert set(launched) == {"assign"}
    launched.clear()
    assert triton.begin(problem, Statistics()).form == "float64 products"
    monkeypatch.setattr(engine, "_PRODUCT_COMPONENTS", 1000)
    has_kernels = features <= (32 if "full" in family else 128)
    assert triton.begin(problem, Statistics()).form == ("residuals" if has_kernels else "float64 products")
    monkeypatch.setattr(engine, "_PRODUCT_COMPONENTS", 1)
    (values,), _ = evaluated(problem, LogSumExp())
    assert error(values, plain["values"]) <= CLOSE
    assert set(launched) == ({"logsumexps"} if features > (16 if "full" in family else 24) else set())


@pytest.mark.usefixtures("fast_double")
def test_products_of_distant_points_and_components_of_no_weight(on):
    """Points that are far from all components have one of them; components of no weight have none."""
    case = make_case("full", torch.float32, N=70, K=40, D=18, device=on[1])
    case.offsets[3::5] = -math.inf
    case.x[7] *= 1e6
    problem = Exponents.of(*case.arguments)
    truth = case.oracle()
    (S0, _, S2, _, values), _ = evaluated(problem, Statistics(values=True))
    assert error(values, truth["values"]) <= CLOSE
    assert error(S0, truth["S0"], truth["S0"]) <= CLOSE
    assert error(S2, truth["S2"], truth["S2"]) <= CLOSE
    assert S0[3::5].abs().max() == 0
    assert error(evaluated(problem, LogSumExp())[0][0], truth["values"]) <= CLOSE


@pytest.mark.parametrize(
    ("family", "features", "fast"),
    [("diag", 20, False), ("diag", 40, True), ("spherical", 100, True), ("tied_diag", 30, False)],
)
def test_products_of_digits(on, family, features, fast, monkeypatch):
    """All pairs of spherical and diagonal factors by products of digits, where they are accurate, rather than float64 ones."""
    called = []
    for owner, name in ((products.Products, "logsumexps"), (products.Products, "moments"), (columns.Softmax, "assign")):
        method = getattr(owner, name)
        spy = lambda *given, name=name, method=method: (called.append(name), method(*given))[1]  # noqa: E731
        monkeypatch.setattr(owner, name, spy)
    monkeypatch.setattr(residuals, "_has_tensor_cores", lambda device: True)
    monkeypatch.setattr(engine, "_has_fast_double", lambda device: fast)
    monkeypatch.setattr(engine, "_PRODUCT_COMPONENTS", 20)
    monkeypatch.setattr(residuals, "_COMPONENTS", 2)
    case = make_case(family, torch.float32, N=70, K=20, D=features, condition=1.0, device=on[1])
    case.x[3] += 1e4
    check(case, 3 * CLOSE if features >= 64 else CLOSE, same_kernels=False)
    assert set(called) == {"logsumexps", "moments"}
    # Components that are narrow compared with the distances of their means.
    called.clear()
    case.means *= 1e3
    check(case, 3 * CLOSE, same_kernels=False)
    assert set(called) == ({"assign"} if fast and features > 24 else set())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("family", "features"), [("diag", 20), ("spherical", 20)])
def test_components_of_small_responsibilities(on, family, features, weighted, monkeypatch):
    """Averages of a component whose responsibilities, or the weights of whose points, are too small for two digits."""
    monkeypatch.setattr(residuals, "_has_tensor_cores", lambda device: True)
    monkeypatch.setattr(residuals, "_COMPONENTS", 2)
    case = make_case(family, torch.float32, N=70, K=20, D=features, condition=1.0, device=on[1])
    g = None
    if weighted:
        labels = case.oracle()["e"].argmax(1)
        g = torch.where(labels == labels[0], 2.0**-33, 1.0).double()
    else:
        case.offsets[3] -= 45
        case.offsets[4] -= 25
    problem, truth = Exponents.of(*case.arguments), case.oracle(g)
    assert residuals.Residuals(problem).products is not None
    (S0, S1, S2, _), _ = evaluated(problem, Statistics(g))
    present = truth["S0"] > 1e-30
    for found, name in ((S1, "S1"), (S2, "S2")):
        shape = (-1,) + (1,) * (found.ndim - 1)
        mean = (found / S0.view(shape))[present]
        expected = (truth[name] / truth["S0"].view(shape))[present]
        assert error(mean, expected) <= 2e-4, name


@pytest.mark.usefixtures("fast_double")
def test_lists_in_many_dimensions(on, monkeypatch):
    """Lists are evaluated by kernels, and where there are none by the dense engine."""
    for D in (20, 40):
        case = make_case("full", torch.float32, N=40, K=5, D=D, condition=20.0, device=on[1])
        problem = Exponents.of(*case.arguments)
        lists = all_pairs(40, 5, [[0, 20], [20, 40]], device=on[1])
        lists = replace(lists, floor=torch.full((2,), -math.inf, dtype=torch.float64, device=on[1]))
        (values,), [(_, minima)] = evaluated(problem, LogSumExp(), lists)
        truth = case.oracle()["values"]
        assert error(values, truth) <= CLOSE
        assert error(minima, torch.stack([truth[:20].min(), truth[20:].min()])) <= CLOSE


def test_responsibilities_of_a_tile(on):
    """The kernel in both dtypes, for numbers of components and of points that are no multiples of its blocks."""
    generator = torch.Generator().manual_seed(0)
    for dtype, (K, N) in itertools.product((torch.float32, torch.float64), ((1, 3), (35, 33), (70, 64))):
        E = 40 * torch.randn(K, N, generator=generator, dtype=dtype).to(on[1])
        g = torch.randn(N, generator=generator, dtype=torch.float64).to(on[1])
        E[0, 0] = -1e30
        expected, softmax = E.double().logsumexp(0), columns.Softmax()
        r = (E.double() - expected).exp()
        negligible = E.double() - E.double().amax(0) < -80.0
        assert error(softmax.logsumexps(E), expected) <= CLOSE
        for weights in (None, g):
            own = E.clone()
            assert error(softmax.assign(own, weights, 80.0), expected) <= CLOSE
            assert error(own, r if weights is None else g * r) <= CLOSE
            assert not own[negligible].any()
    # Rows without a finite sum are found by their log-sum-exps.
    E = torch.zeros(3, 4, dtype=torch.float64, device=on[1])
    E[:, 0], E[1, 1], E[1, 2] = -math.inf, math.inf, math.nan
    assert columns.Softmax().logsumexps(E).isfinite().tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("family", "features"), [("full", 3), ("spherical", 5), ("full", 16), ("diag", 40), ("full", 24)]
)
@pytest.mark.usefixtures("slow_double")
def test_lists_of_all_components_give_the_same_bits(on, family, features):
    # Row ranges begin at a multiple of the rows of a tile and of a chunk.
    rows, first = (170, 128) if features >= 16 else (27, 16)
    case = make_case(family, torch.float32, N=rows, K=6, D=features, condition=20.0, device=on[1])
    problem, g = Exponents.of(*case.arguments), weights_of(case.x)
    whole = evaluated(problem, LogSumExp())[0][0]
    spans = torch.tensor([[0, first], [first, rows]])
    lists = all_pairs(rows, 6, spans, device=on[1])
    requests = [LogSumExp(), Statistics(g)]
    if features < 16:
        requests += [TopK(2), Statistics(), PointGradient(g), Statistics(assignment="stochastic")]
    for request in requests:
        (all_pairs_result, _), (listed, [(_, minima)]) = evaluated(problem, request), evaluated(problem, request, lists)
        assert all(map(torch.equal, all_pairs_result, listed))
        if request == LogSumExp():
            least = torch.stack([whole[start:stop].min() for start, stop in spans.tolist()])
            assert error(minima, least.double()) <= 1e-6


def test_lists_leave_out_components_and_are_repeated(on):
    """Row ranges with a list of some components have the results of these; those with a floor that is too high are repeated."""
    case = make_case("full", torch.float32, N=50, K=7, condition=20.0, device=on[1])
    problem, g = Exponents.of(*case.arguments), weights_of(case.x)
    some, e = torch.tensor([5, 0, 2], device=on[1]), case.oracle()["e"].clone()
    lists = all_pairs(50, 7, [[0, 20], [20, 50]], device=on[1])
    short = type(lists)(
        lists.boxes, torch.cat([some, lists.index[7:]]), lists.pointer.new_tensor([0, 3, 10]), lists.pruned, lists.spans,
        lists.owner, lists.floor.new_tensor([-torch.inf, 1e9]),
    )  # fmt: skip
    again = lists.only(torch.tensor([False, True], device=on[1]))
    left_out = torch.ones(7, dtype=torch.bool, device=on[1])
    left_out[some] = False
    e[:20, left_out] = -torch.inf
    r = g[:, None] * e.softmax(1)
    assert error(evaluated(problem, LogSumExp(), short, again)[0][0], e.logsumexp(1)) <= CLOSE
    assert torch.equal(evaluated(problem, Argmax(), short, again)[0][0], e.argmax(1))
    assert error(evaluated(problem, Statistics(g), short, again)[0][0], r.sum(0), r.abs().sum(0)) <= CLOSE
    (_, components), [(_, minima), _] = evaluated(problem, TopK(4), short, again)
    assert minima[0] == -torch.inf
    assert torch.equal(components[20:], e[20:].topk(4).indices)


@pytest.mark.parametrize("family", ["diag"])
def test_partial_sums_are_computed_in_slabs(on, family, monkeypatch):
    case = make_case(family, torch.float32, N=75, K=5, condition=20.0, device=on[1])
    problem, lists = Exponents.of(*case.arguments), all_pairs(75, 5, [[0, 10], [10, 50], [50, 75]], device=on[1])
    requests = Statistics(), Statistics(assignment="hard")
    before = [evaluated(problem, request, *given)[0] for request in requests for given in ((), (lists,))]
    made = []
    add_up = partial.add_up
    monkeypatch.setattr(partial, "add_up", lambda part, *rest: (made.append(part.shape[1]), add_up(part, *rest)))
    monkeypatch.setattr(partial, "SLAB", 250)
    monkeypatch.setattr(residuals, "SLAB", 250)
    after = [evaluated(problem, request, *given)[0] for request in requests for given in ((), (lists,))]
    assert len(made) >= 4
    assert max(made) <= 25
    for one, other in zip(before, after, strict=True):
        for a, b in zip(one, other, strict=True):
            assert error(a, b, b) <= 1e-12


def test_float64_points_and_narrow_components_are_evaluated_in_float64(on):
    case = make_case("full", torch.float64, N=30, D=3, condition=1e6, device=on[1])
    truth = case.oracle()
    (values,), _ = evaluated(Exponents.of(*case.arguments), LogSumExp())
    assert error(values, truth["values"]) <= 1e-11
    rounded = type(case)(case.x.float(), case.offsets, case.means, case.factor)
    problem, truth = Exponents.of(*rounded.arguments), rounded.oracle()
    (values,), _ = evaluated(problem, LogSumExp())
    assert values.dtype == torch.float32
    assert error(values, truth["values"]) <= 1e-7
    S2 = evaluated(problem, Statistics())[0][2]
    assert error(S2, truth["S2"], truth["S2"]) <= 1e-9


def test_large_coordinates_and_means_between_float32_numbers(on):
    case = make_case("full", torch.float32, N=40, D=3, condition=10.0, shift=3e5, device=on[1])
    means = case.means.double() + 0.01
    moved = type(case)(case.x, case.offsets, means, case.factor)
    truth = moved.oracle()
    (values,), _ = evaluated(Exponents.of(*moved.arguments), LogSumExp())
    assert error(values, truth["values"]) <= CLOSE
    for family in ("full", "diag", "spherical"):
        case = make_case(family, torch.float32, N=40, D=3, condition=10.0, shift=3e5, device=on[1])
        moved = type(case)(case.x, case.offsets, case.means.double() + 0.01, case.factor)
        truth, sums = moved.oracle(), evaluated(Exponents.of(*moved.arguments), Statistics())[0]
        for name, found in zip(("S0", "S1", "S2"), sums, strict=False):
            assert error(found, truth[name], truth[name]) <= CLOSE


@pytest.mark.parametrize("seed", range(3))
def test_rounded_factors_and_constants_do_not_shift_log_sum_exps(on, seed):
    """The factor of a component changes all its squares alike, which adds up over many features."""
    case = make_case("spherical", torch.float32, N=100, K=1, D=128, condition=1.0, seed=seed, device=on[1])
    # Log-sum-exps are small, so that they have small rounding errors themselves.
    shifted = type(case)(case.x, 0 * case.offsets + 64, case.means, case.factor)
    (values,), _ = evaluated(Exponents.of(*shifted.arguments), LogSumExp())
    assert abs(float((values - shifted.oracle()["values"]).mean())) <= 5e-7


def test_factors_that_are_not_triangular_or_are_singular(on):
    case = make_case("full", torch.float32, N=40, D=3, condition=10.0, device=on[1])
    truth = case.oracle()
    Q, _ = torch.linalg.qr(torch.randn(5, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    U = case.factor.matrices().double() @ Q.to(on[1])
    problem = Exponents.of(case.x, case.offsets, case.means, U)
    assert error(evaluated(problem, LogSumExp())[0][0], truth["values"]) <= CLOSE
    assert error(evaluated(problem, Statistics())[0][2], truth["S2"], truth["S2"]) <= CLOSE
    U[1] = 0
    sums, _ = evaluated(Exponents.of(case.x, case.offsets, case.means, U), Statistics())
    assert all(bool(torch.isfinite(part).all()) for part in sums)


def test_points_far_from_all_components(on):
    case = make_case("full", torch.float32, N=40, D=2, condition=10.0, device=on[1])
    case.x[3], case.x[7] = 1e3, torch.tensor([1e12, -1e12])
    problem, g = Exponents.of(*case.arguments), weights_of(case.x)
    dense = choice.dense
    for request in (LogSumExp(), Argmax(), TopK(2), Statistics(g), PointGradient(g), Statistics(g, assignment="hard")):
        expected = dense.begin(problem, request)
        expected.add(None)
        for found, truth in zip(evaluated(problem, request)[0], expected.result(), strict=True):
            assert torch.isfinite(found).all()
            assert error(found, truth.double(), truth.double()) <= CLOSE


def test_points_at_the_end_of_the_range_of_float32(on):
    """The residuals of such points are infinite, or no numbers."""
    case = make_case("full", torch.float32, N=40, D=3, condition=10.0, device=on[1])
    case.x[5], case.x[6] = 3e38, torch.tensor([3e38, -3e38, 3e38])
    problem, g = Exponents.of(*case.arguments), weights_of(case.x)
    assert torch.isfinite(evaluated(problem, LogSumExp())[0][0]).all()
    expected = choice.dense.begin(problem, Statistics(g))
    expected.add(None)
    for found, truth in zip(evaluated(problem, Statistics(g))[0][:3], expected.result(), strict=False):
        assert error(found, truth, truth) <= CLOSE


def test_weights_of_any_size_and_components_of_no_weight(on):
    case = make_case("diag", torch.float32, N=40, K=4, condition=10.0, device=on[1])
    case.offsets[2] = -torch.inf
    problem = Exponents.of(*case.arguments)
    for g in (weights_of(case.x) * 1e200, weights_of(case.x) * 1e-200, weights_of(case.x).exp() ** 60):
        truth, (S0, _, S2, total) = case.oracle(g), evaluated(problem, Statistics(g))[0]
        alive = truth["S0"][[0, 1, 3]]
        assert error(S0[[0, 1, 3]] / alive, torch.ones_like(alive)) <= 1e-4
        assert S0[2] == 0
        assert bool((S2[2] == 0).all())
        assert error(total / truth["total"], torch.ones_like(total)) <= 1e-5


@pytest.mark.parametrize(("family", "features"), [("diag", 3), ("full", 9)])
def test_weights_of_very_different_sizes_with_lists(on, family, features):
    """Moments are computed again, by float64 kernels or the dense engine."""
    case = make_case(family, torch.float32, N=40, K=4, D=features, condition=10.0, device=on[1])
    problem, g = Exponents.of(*case.arguments), weights_of(case.x).exp() ** 60
    lists = all_pairs(40, 4, [[0, 20], [20, 40]], device=on[1])
    again = lists.only(torch.tensor([False, True], device=on[1]))
    # The minimum of the first row range is at its floor up to rounding errors.
    short = replace(lists, floor=torch.stack([case.oracle()["values"][:20].min() - 1e-6, lists.floor.new_tensor(1e9)]))
    expected = evaluated(problem, Statistics(g), lists)[0]
    found = evaluated(problem, Statistics(g), short, again)[0]
    for part, other, truth in zip(found, expected, (case.oracle(g)[name] for name in ("S0", "S1", "S2")), strict=False):
        assert error(part, other, other) <= 1e-12
        assert error(part, truth, truth) <= 1e-5


@pytest.mark.parametrize("k", [1, 16])
def test_equal_exponents_are_taken_in_the_order_of_the_components(on, k):
    x, means, U = torch.zeros(3, 2), torch.ones(20, 2), torch.ones(1, 2)
    equal, larger = torch.zeros(20), torch.zeros(20)
    larger[19] = 1.0
    # A larger exponent moves the others down in their order.
    for offsets, expected in ((equal, list(range(k))), (larger, [19, *range(k - 1)])):
        problem = Exponents.of(*(part.to(on[1]) for part in (x, offsets, means, U)))
        _, components = evaluated(problem, TopK(k))[0]
        assert components.tolist() == [expected] * 3


def test_draws_have_positive_probability(on):
    """Rounding may keep the sum of the responsibilities below the random number."""
    x = torch.zeros(5, 2, device=on[1])
    offsets = torch.tensor([0.0, 1.0, -torch.inf], device=on[1])
    problem = Exponents.of(x, offsets, torch.zeros(3, 2, device=on[1]), torch.ones(1, 2, device=on[1]))
    kernels = residuals.Residuals(problem)
    values, labels = torch.empty_like(x[:, 0]), torch.empty(5, dtype=torch.int32, device=on[1])
    kernels.logsumexps(values, None)
    kernels.draws(values, torch.tensor([1e-30, 0.26, 0.27, 1.0, 1.01], device=on[1]), labels, None)
    assert labels.tolist() == [0, 0, 1, 1, 1]


def test_what_the_engine_does_not_compute(on, monkeypatch):
    case = make_case("diag", torch.float32, N=5, K=20, D=3, device=on[1])
    problem = Exponents.of(*case.arguments)
    assert "16 exponents" in triton.unsupported(problem.form, TopK(17))
    assert triton.unsupported(problem.form, Statistics(assignment="stochastic")) is None
    wide = Exponents.of(*make_case("full", torch.float32, N=5, D=33, device=on[1]).arguments)
    for fast in (False, True):
        monkeypatch.setattr(engine, "_has_fast_double", lambda device, fast=fast: fast)
        assert (triton.unsupported(wide.form, LogSumExp()) is None) == fast
    assert "in 33 dimensions" in triton.unsupported(wide.form, TopK(2))
    many = Exponents.of(*make_case("full", torch.float32, N=5, D=17, device=on[1]).arguments)
    assert "gradients in 17 dimensions" in triton.unsupported(many.form, PointGradient())
    double = Exponents.of(*make_case("full", torch.float64, N=5, D=9, device=on[1]).arguments)
    assert "float32 points only" in triton.unsupported(double.form, LogSumExp())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")
        assert loading.unavailable(torch.device("cpu")) == "it runs on CUDA devices only, not on cpu"
        patch.setattr(loading, "_capability", lambda device: None)
        assert loading.unavailable(torch.device("cuda")) == "torch finds no CUDA device"
        patch.setattr(loading, "_capability", lambda device: (7, 5))
        assert "capability 7.5" in loading.unavailable(torch.device("cuda"))


def test_a_wrong_result_at_the_first_use_is_found(on, monkeypatch):
    case = make_case("full", torch.float32, N=30, device=on[1])
    logsumexps = residuals.Residuals.logsumexps

    def wrong(self, out, schedule):
        found = logsumexps(self, out, schedule)
        out += 1e-3
        return found

    monkeypatch.setattr(residuals.Residuals, "logsumexps", wrong)
    monkeypatch.setitem(choice.ENGINES, "triton", engine.Triton())
    expected = reductions.logsumexp(*case.arguments, backend="dense")
    with pytest.warns(UserWarning, match="Triton was requested but a check of 30 points at its first use found"):
        assert torch.equal(reductions.logsumexp(*case.arguments, backend="triton"), expected)
    assert "check" in choice.ENGINES["triton"].unavailable(case.x.device)
    assert reductions.engine(case.x, "triton") == "dense"


def gradients(case, g, backend, arranged=False):
    """Log-sum-exps and the gradients of their weighted sum with respect to the parameters."""
    x, offsets, means, factor = case.arguments
    if arranged:
        x = reductions.arrange(x, len(means), 1e-6)
    leaves = [part.detach().clone().requires_grad_() for part in (offsets, means, factor_tensor(factor))]
    values = reductions.logsumexp(x, *leaves, backend=backend, truncate=None if arranged else 0)
    values.backward(g.to(values))
    return values.detach(), [leaf.grad for leaf in leaves]


# Evaluations that are not kept, since they hold digits or a float64 copy of the points, and one after which products are faster.
ANEW = ("digits", "products", "narrow", "wide")


@pytest.mark.parametrize("kind", ["full", "diagonal", "lists", "far", "float64", *ANEW])
def test_gradients_take_the_log_sum_exps_that_are_known(on, kind, monkeypatch):
    family = {"diagonal": "diag", "lists": "diag", "digits": "spherical", "products": "spherical"}.get(kind, "full")
    dtype = torch.float64 if kind == "float64" else torch.float32
    D = {"digits": 20, "products": 26, "wide": 12}.get(kind, 2)
    condition = 1e5 if kind == "narrow" else 2.0
    size = {"N": 2049, "K": 40, "spread": 60.0} if kind == "lists" else {"N": 60, "K": 50}
    case = make_case(family, dtype, D=D, condition=condition, device=on[1], **size)
    g, computed = weights_of(case.x), []
    if kind == "far":
        case.x[7] += 1e4
    if kind in ("digits", "products"):
        monkeypatch.setattr(residuals, "_has_tensor_cores", lambda device: True)
    if kind in ("products", "wide"):
        monkeypatch.setattr(engine, "_has_fast_double", lambda device: True)
    before = residuals.Residuals.logsumexps
    monkeypatch.setattr(residuals.Residuals, "logsumexps", lambda *given: (computed.append(1), before(*given))[1])
    reductions.logsumexp(*case.arguments, backend="triton", truncate=0)
    reductions.moments(*case.arguments, backend="triton", truncate=0)
    expected_number = 2 if kind in ANEW[:3] else 1
    for _ in range(2 if kind == "lists" else 0):
        # Lists that are too short are evaluated again. The first call also compares the engines.
        computed.clear()
        reductions.logsumexp(reductions.arrange(case.x, 40, 1e-6), *case.arguments[1:], backend="triton")
        expected_number = len(computed)
    computed.clear()
    sums, add = [], residuals.Residuals.add_sums
    monkeypatch.setattr(residuals.Residuals, "add_sums", lambda *given: (sums.append(given[-1]), add(*given))[1])
    found, own = gradients(case, g, "triton", arranged=kind == "lists")
    assert len(computed) == expected_number
    assert (kind == "wide") == (not sums) or kind in ANEW[:2]
    assert [schedules is not None for schedules in sums] == [kind == "lists"] * len(sums)
    expected, others = gradients(case, g, "dense")
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=5e-6)
    # The terms of the gradients have both signs, and cancel.
    for part, other, scale in zip(own, others, gradients(case, g.abs(), "dense")[1], strict=True):
        assert float((part - other).abs().max()) <= 1e-5 * float(scale.abs().max())


def test_what_a_graph_keeps_is_small_and_is_freed(on):
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)).to(on[1])
    means = torch.randn(50, 2, device=on[1], requires_grad=True)
    dispatch = Dispatch(None, "triton", 0)
    arguments = x, torch.zeros(50, device=on[1]), means, torch.ones(50, 2, device=on[1])
    dispatch.values(*(part.detach() for part in arguments))
    assert dispatch.evaluation is None
    values = Derivative.of(*arguments, dispatch)
    assert dispatch.evaluation is not None
    assert dispatch.anew().evaluation is None
    (values @ torch.arange(4000.0, device=on[1])).backward(retain_graph=True)
    assert dispatch.evaluation is None
    first = means.grad.clone()
    (values @ torch.arange(4000.0, device=on[1])).backward()
    torch.testing.assert_close(means.grad, 2 * first, rtol=1e-5, atol=1e-5 * float(first.abs().max()))


def test_gradients_after_a_launch_that_failed(on, monkeypatch):
    """The dense engine has computed the log-sum-exps, so that those of the kernels must not be used."""
    case = make_case("full", torch.float32, N=30, condition=2.0, device=on[1])
    reductions.logsumexp(*case.arguments, backend="triton")
    reductions.moments(*case.arguments, backend="triton")
    monkeypatch.setattr(loading, "_broken", [])

    def failing(self, out, schedule):
        out.fill_(-3.0)
        loading._broken.append("a kernel cannot be launched")
        raise Broken(loading._broken[-1])

    monkeypatch.setattr(residuals.Residuals, "logsumexps", failing)
    with pytest.warns(UserWarning, match="a kernel cannot be launched"):
        _, own = gradients(case, weights_of(case.x), "triton")
    _, expected = gradients(case, weights_of(case.x), "dense")
    assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))


def test_an_engine_that_has_failed_computes_no_gradients(on, monkeypatch):
    case = make_case("full", torch.float32, N=30, condition=2.0, device=on[1])
    monkeypatch.setattr(loading, "_broken", [])
    offsets, means, factor = case.arguments[1:]
    leaf = means.clone().requires_grad_()
    values = reductions.logsumexp(case.x, offsets, leaf, factor, backend="triton")
    loading._broken.append("a kernel cannot be launched")
    with pytest.warns(UserWarning, match="a kernel cannot be launched"):
        values.sum().backward()
    other = means.clone().requires_grad_()
    reductions.logsumexp(case.x, offsets, other, factor, backend="dense").sum().backward()
    assert torch.equal(leaf.grad, other.grad)


def test_a_wrong_gradient_at_the_first_use_is_found(on, monkeypatch):
    """Moments that are computed from known log-sum-exps are compared, too."""
    case = make_case("full", torch.float32, N=30, condition=2.0, device=on[1])
    add = residuals.Residuals.add_sums
    monkeypatch.setitem(choice.ENGINES, "triton", engine.Triton())
    reductions.logsumexp(*case.arguments, backend="triton")
    monkeypatch.setattr(
        residuals.Residuals, "add_sums", lambda self, sums, *given: (add(self, sums, *given), sums.mul_(2))[0]
    )
    with pytest.warns(UserWarning, match="Triton was requested but a check of 30 points at its first use found"):
        _, own = gradients(case, weights_of(case.x), "triton")
    _, expected = gradients(case, weights_of(case.x), "dense")
    assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))


def test_each_form_is_compared_at_its_first_use(on, monkeypatch):
    """A wrong result of one form is found although another one was used before, for fewer components."""
    monkeypatch.setattr(residuals, "_has_tensor_cores", lambda device: True)
    monkeypatch.setitem(choice.ENGINES, "triton", engine.Triton())
    moments = products.Products.moments
    monkeypatch.setattr(products.Products, "moments", lambda *given: tuple(2 * part for part in moments(*given)))
    case = make_case("spherical", torch.float32, N=40, K=4, D=20, condition=1.0, device=on[1])
    reductions.moments(*case.arguments, backend="triton", truncate=0)
    case = make_case("spherical", torch.float32, N=40, K=16, D=20, condition=1.0, device=on[1])
    with pytest.warns(UserWarning, match="Triton was requested but a check of 40 points at its first use found"):
        sums = reductions.moments(*case.arguments, backend="triton", truncate=0)
    assert float(sums.S0.sum()) == pytest.approx(40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_with_strides(on, dtype):
    case = make_case("full", dtype, N=70, K=3, D=2, condition=10.0, device=on[1])
    wide = torch.rand(140, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(on[1])
    for weights in (wide[::2], torch.ones((), dtype=torch.float64, device=on[1]).expand(70)):
        sums = reductions.moments(*case.arguments, weights=weights, backend="triton", truncate=0)
        assert error(sums.S0, case.oracle(weights)["S0"]) <= CLOSE


def test_lists_none_of_which_is_long_enough(on):
    """No row range of the first schedule is kept."""
    generator = torch.Generator().manual_seed(0)
    x = 100 * torch.rand(2048, 1, generator=generator)
    means, U = torch.linspace(0, 100, 48)[:, None], torch.full((1, 1, 1), 2.0)
    x, means, U = (part.to(on[1]) for part in (x, means, U))
    offsets = torch.zeros(48, device=on[1])
    cloud = reductions.arrange(x, 48, 1e-6)
    reductions.logsumexp(cloud, offsets, means, U, backend="dense")
    cloud.minima = cloud.minima + 60
    found = reductions.moments(cloud, offsets, means, U, backend="triton")
    expected = reductions.moments(x, offsets, means, U, backend="dense", truncate=0)
    assert error(found.S2, expected.S2, expected.S2) <= 1e-5


def test_launches_stay_within_the_limits_of_a_grid(on, monkeypatch):
    """The second axis of a grid has at most 65 535 programs."""
    grids, launch = [], partial.launch
    monkeypatch.setattr(partial, "MOST_CHUNKS", 3)
    for module in (residuals, tiles):
        monkeypatch.setattr(
            module, "launch", lambda *arguments, **options: (grids.append(arguments[3]), launch(*arguments, **options))
        )
    for family, D in (("diag", 2), ("full", 9)):
        case = make_case(family, torch.float32, N=300, K=3, D=D, condition=10.0, device=on[1])
        sums = reductions.moments(*case.arguments, backend="triton", truncate=0)
        assert error(sums.S2, case.oracle()["S2"], case.oracle()["S2"]) <= CLOSE
    assert max(grid[1] for grid in grids if len(grid) > 1) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter compiles nothing")
def test_a_kernel_that_cannot_be_compiled_ends_no_call(on, monkeypatch):
    case = make_case("full", torch.float32, N=30)
    expected = reductions.logsumexp(*case.arguments, backend="dense")
    monkeypatch.setattr(loading, "interpreted", lambda: False)
    monkeypatch.setattr(loading, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(loading, "_broken", [])
    monkeypatch.setattr(engine.loading, "unavailable", lambda device: loading._broken[-1] if loading._broken else None)

    class Kernels:
        def __getattr__(self, name):
            raise RuntimeError("Failed to find C compiler\nand more")

    monkeypatch.setattr(loading, "_kernels", lambda module: {"rows": Kernels()}.get(module, Kernels()))
    monkeypatch.setitem(choice.ENGINES, "triton", engine.Triton())
    with pytest.warns(UserWarning, match=r"Triton was requested but a kernel cannot be compiled .*find C compiler\)"):
        assert torch.equal(reductions.logsumexp(*case.arguments, backend="triton"), expected)


def test_exponents_of_distant_points_in_float64(on):
    x = torch.full((1, 1), 1e20, dtype=torch.float64, device=on[1])
    means = torch.tensor([[0.0], [5e19]], dtype=torch.float64, device=on[1])
    arguments = (x, torch.zeros(2, device=on[1]), means, torch.ones(1, 1, 1, device=on[1]))
    values, labels = reductions.topk(*arguments, 2, backend="triton")
    assert labels.tolist() == [[1, 0]]
    assert values[0].tolist() == pytest.approx([-1.25e39, -5e39])


def test_choice_on_cuda(on, monkeypatch):
    cuda, runs = torch.device("cuda"), {"keops": None, "triton": None}
    for chosen in (choice.keops, triton):
        monkeypatch.setattr(type(chosen), "unavailable", lambda self, device: runs[self.name])

    def names(**options):
        return [reductions.engine(cuda, features=D, **options) for D in (3, 8, 33, 129)]

    monkeypatch.setattr(engine, "_has_fast_double", lambda device: True)
    assert names() == names(full=False) == ["triton"] * 4
    assert reductions.engine(cuda, features=16) == "triton"
    assert names(dtype=torch.float64) == ["triton", "triton", "dense", "dense"]
    monkeypatch.setattr(engine, "_has_fast_double", lambda device: False)
    assert names() == ["triton", "triton", "dense", "dense"]
    assert names(full=False) == ["triton", "triton", "triton", "dense"]
    runs["triton"] = "its library is missing"
    with pytest.warns(UserWarning, match=r"Triton is the faster engine here but its library is missing; using KeOps\."):
        assert names() == ["keops", "keops", "dense", "dense"]
    assert reductions.fallback(cuda, features=3) == "Triton is the faster engine here but its library is missing"
    assert names(full=False) == ["keops", "keops", "dense", "dense"]
    runs["keops"] = "it is missing too"
    assert names() == ["dense"] * 4


def test_triton_is_imported_on_first_use(on):
    code = "import sys, gmmkeops; gmmkeops.reductions.engine(__import__('torch').zeros(2, 2)); print('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
