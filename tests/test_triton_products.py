"""Triton kernels of matrix products for many dimensions: log-sum-exps and moments against float64, and when they are accurate."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import INTERPRETED, Case, make_case, needs_triton

from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.triton import partial, products
from gmmkeops.reductions.triton.digit_parameters import Parameters
from gmmkeops.reductions.triton.products import Products, Tiling
from gmmkeops.reductions.triton.residuals import NO_SHARE, Residuals

DEVICES = [INTERPRETED, pytest.param(("triton", "cuda"), id="triton-cuda", marks=needs_triton)]
CLOSE = 2e-6
# Tensor cores truncate the terms of a sum two bits below the last bit of the largest one: the largest error of log-sum-exps
# in these tests is 2.96e-6 on an H200 (diagonal, 32 features), where the interpreter, which rounds, has less than 2e-6.
TRUNCATED = {"cpu": 1, "cuda": 2}
SMALL = Tiling(32, 32, 4, 2, columns=64, chunk=64)

pytestmark = pytest.mark.parametrize("on", DEVICES)


def weights_of(x):
    """Weights of both signs, some of which are zero."""
    weights = torch.randn(len(x), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    weights[::5] = 0
    return weights.to(x.device)


def kernels(case, tiling=SMALL):
    problem = Exponents.of(*case.arguments)
    parameters = Parameters.of(problem)
    assert parameters is not None
    return Products(problem, parameters, tiling, tiling)


def is_accurate(problem):
    return Parameters.of(problem) is not None


def log_sum_exps(case, tiling=SMALL):
    """Log-sum-exps in base 2, as the kernels compute them, and in nats."""
    found = torch.full((len(case.x),), math.nan, device=case.x.device)
    some = kernels(case, tiling)
    some.logsumexps(found)
    return found, Residuals(some.problem).scale.nats(found)


def error(found, expected, scale=None):
    """The largest error, relative to max(1, |expected|) or to the largest entry of ``scale``."""
    assert found.shape == expected.shape
    difference = (found.double() - expected).abs()
    return float(
        (difference / expected.abs().clamp(min=1)).max() if scale is None else difference.max() / scale.abs().max()
    )


def check_moments(case, found, g=None, close=CLOSE):
    """Compare moments with the oracle, relative to those of the absolute weights."""
    truth = case.oracle(g)
    scale = truth if g is None else case.oracle(g.abs())
    assert error(found[0], truth["S0"], scale["S0"]) <= close
    # The sum of absolute residuals is at most this, by the Cauchy-Schwarz inequality.
    assert error(found[1], truth["S1"], (scale["S0"].max() * scale["S2"].abs().max()).sqrt()) <= close
    assert error(found[2], truth["S2"], scale["S2"]) <= close


def check(case, tiling=SMALL):
    some, g = kernels(case, tiling), weights_of(case.x)
    values, nats = log_sum_exps(case, tiling)
    # The squares of 64 and more residuals have a sum that may be much larger than |l|.
    near = CLOSE * TRUNCATED[case.x.device.type] if case.x.shape[1] < 64 else 3 * CLOSE
    assert error(nats, case.oracle()["values"]) <= near
    check_moments(case, some.moments(values, None))
    check_moments(case, some.moments(values, g.float()), g)


@pytest.mark.parametrize(
    ("family", "features", "components", "points"),
    [
        ("spherical", 17, 5, 70), ("spherical", 33, 1, 33), ("spherical", 64, 40, 64), ("spherical", 128, 3, 100),
        ("tied_spherical", 20, 4, 50), ("diag", 17, 5, 70), ("diag", 32, 40, 64), ("diag", 64, 3, 100),
        ("diag", 24, 1, 31), ("tied_diag", 40, 4, 50),
    ],
)  # fmt: skip
def test_products(on, family, features, components, points):
    spread = 2.0 if "spherical" in family else 0.5
    settings = {"condition": 4.0, "spread": spread, "seed": 2, "device": on[1]}
    check(make_case(family, torch.float32, N=points, K=components, D=features, **settings))


@pytest.mark.parametrize(("family", "features"), [("spherical", 48), ("diag", 20)])
def test_sizes_of_the_device(on, family, features):
    case = make_case(family, torch.float32, N=150, K=9, D=features, condition=4.0, spread=1.0, device=on[1])
    values = torch.empty(150, device=on[1])
    some = kernels(case, None)
    some.logsumexps(values)
    check_moments(case, some.moments(values, None))


@pytest.mark.parametrize(("family", "features", "spread"), [("spherical", 40, 5.0), ("diag", 40, 1.0)])
def test_large_coordinates(on, family, features, spread):
    case = make_case(family, torch.float32, N=60, K=5, D=features, condition=2.0, shift=1e4, spread=1.0, device=on[1])
    # Means between float32 numbers, and points that are not near one of them.
    check(Case(case.x, case.offsets, case.means.double() + 1e-4, case.factor))
    check(make_case(family, torch.float32, N=60, K=5, D=features, condition=2.0, spread=spread, seed=1, device=on[1]))


@pytest.mark.parametrize("family", ["spherical", "diag"])
def test_values_are_those_of_residuals(on, family):
    """Base-2 log-sum-exps are relative to the same number, so that each class computes moments from values of the other one."""
    case = make_case(family, torch.float32, N=60, K=5, D=24, condition=2.0, device=on[1])
    case = Case(case.x, case.offsets + 500, case.means, case.factor)
    some, (values, _) = kernels(case), log_sum_exps(case)
    other = torch.empty_like(values)
    residuals = Residuals(some.problem)
    residuals.logsumexps(other, None)
    assert error(values, other.double()) <= 2 * CLOSE
    check_moments(case, residuals.moments(values, None, None), close=10 * CLOSE)
    check_moments(case, some.moments(other, None), close=10 * CLOSE)


@pytest.mark.parametrize(("family", "chunk"), [("spherical", 32), ("diag", 64)])
def test_points_are_split_in_slabs(on, family, chunk, monkeypatch):
    """Slabs of rows that are not multiples of a chunk, and that hold several chunks."""
    case = make_case(family, torch.float32, N=700, K=3, D=20, condition=2.0, device=on[1])
    g, tiling = weights_of(case.x), replace(SMALL, chunk=chunk)
    whole, _ = log_sum_exps(case, tiling)
    before = kernels(case, tiling).moments(whole, g.float())
    # Several launches for points that have all been split.
    monkeypatch.setattr(partial, "SLAB", 4 * 68 * 3 * 2)
    for one, other in zip(before, kernels(case, tiling).moments(whole, g.float()), strict=True):
        assert torch.equal(one, other)
    monkeypatch.setattr(products, "_SLAB", 1)
    assert kernels(case)._slab == 256
    values, _ = log_sum_exps(case, tiling)
    assert torch.equal(values, whole)
    for one, other in zip(before, kernels(case, tiling).moments(values, g.float()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["spherical", "diag"])
def test_digits_represent_points(on, family):
    """The sums of the digits are the entries of the points, and their first digits are integers."""
    case = make_case(family, torch.float32, N=40, K=3, D=20, condition=2.0, shift=3.0, device=on[1])
    a, factor = kernels(case)._arrays.grid[:, :20].double()
    # Entries near the largest ones.
    large = torch.tensor([2001.3, 2046.9, -2045.2, -1.5] if family == "diag" else [3001.3, 3500.9, -2051.2, -1.5])
    case.x[:4, 5] = (a[5] + large.double().to(on[1]) / factor[5]).float()
    some = kernels(case)
    points = some._all
    z = (case.x.double() - a) * factor
    square = z.square() / 2048
    digits = points.digits.double()
    assert digits.shape[1] == 256
    assert torch.equal(digits[0], digits[0].round())
    assert float(digits[1].abs().max()) <= 2
    found = digits.sum(0)[:40]
    assert float((found[:, :20] - z).abs().max()) <= 2.0**-22 + 2.0**-24 * float(z.abs().max())
    assert bool((digits[:, 40:] == 0).all())
    if family == "diag":
        assert float((found[:, 32:52] - square).abs().max()) <= 2.0**-20 + 2.0**-23 * float(square.max())
    else:
        exact = digits[0, :40].square().sum(1)
        assert torch.equal(points.numbers[0, :40].double(), exact)
        assert error(points.numbers.double().sum(0)[:40] / z.square().sum(1), torch.ones_like(exact)) <= 1e-7


@pytest.mark.parametrize("family", ["spherical", "diag"])
def test_sums_of_integers_are_exact(on, family):
    """For points up to 310 nats from a component, sums of products of integers, and integers of points, are below 2**24."""
    spread = 8.0 if family == "spherical" else 2.0
    case = make_case(family, torch.float32, N=40, K=6, D=32, condition=4.0, spread=spread, device=on[1])
    far = Case(case.x, case.offsets, case.means, case.factor)
    generator = torch.Generator().manual_seed(1)
    y = torch.nn.functional.normalize(torch.randn(40, 32, generator=generator, dtype=torch.float64), dim=1) * 25.0
    labels = torch.arange(40) % 6
    U = case.factor.to(torch.float64).matrices().diagonal(dim1=1, dim2=2).expand(6, -1)
    far.x = (case.means.double()[labels] + (y.to(on[1]) / U[labels])).float()
    some = kernels(far)
    points, p = some._all, some._arrays
    one, other = points.digits[0, :40].double(), p.digits[0, :6].double()[labels]
    J = p.numbers[2, :6].double()[labels] + points.numbers[0, :40].double()
    partial = torch.cat([J[:, None], J[:, None] + (one * other).cumsum(1)], 1)
    assert float(partial.abs().max()) <= 2**24
    assert float(p.digits[0].abs().max()) <= 8 * 2048
    assert error(log_sum_exps(far)[1], far.oracle()["values"]) <= CLOSE


@pytest.mark.parametrize("family", ["spherical", "diag"])
def test_points_out_of_range(on, family):
    """Their log-sum-exps are so small that the engine computes them by other kernels; they may have no part in moments."""
    case = make_case(family, torch.float32, N=40, K=3, D=20, condition=2.0, device=on[1])
    case.x[3], case.x[7] = 1e12, torch.full((20,), -3e38)
    values, nats = log_sum_exps(case)
    kept = torch.ones(40, dtype=torch.bool, device=on[1])
    kept[[3, 7]] = False
    assert bool((~(values[~kept] > -1e20)).all())
    assert error(nats[kept], case.oracle()["values"][kept]) <= CLOSE
    found = kernels(case).moments(values.masked_fill(~kept, NO_SHARE), None)
    check_moments(Case(case.x[kept], case.offsets, case.means, case.factor), found)


@pytest.mark.parametrize("family", ["spherical", "diag"])
def test_components_of_no_weight_and_weights_of_any_size(on, family):
    case = make_case(family, torch.float32, N=40, K=4, D=20, condition=2.0, device=on[1])
    case.offsets[2] = -torch.inf
    values, nats = log_sum_exps(case)
    assert error(nats, case.oracle()["values"]) <= CLOSE
    for g in (1e6 * weights_of(case.x), 1e-6 * weights_of(case.x), torch.zeros(40, dtype=torch.float64, device=on[1])):
        S0, S1, S2 = kernels(case).moments(values, g.float())
        for part in (S0, S1, S2):
            assert bool((part[2] == 0).all())
        kept = Case(
            case.x, case.offsets[[0, 1, 3]], case.means[[0, 1, 3]], case.factor.replace(
                **{name: t[[0, 1, 3]] for name, t in case.factor.tensors.items()}
            )
        )  # fmt: skip
        if bool((g != 0).any()):
            check_moments(kept, [part[[0, 1, 3]] for part in (S0, S1, S2)], g)
        else:
            assert all(bool((part == 0).all()) for part in (S0, S1, S2))


@pytest.mark.parametrize(
    ("family", "features", "narrow"), [("spherical", 20, 3e-3), ("spherical", 128, 1e-2), ("diag", 64, 2e-2)]
)
def test_narrow_components_are_refused(on, family, features, narrow):
    """Components are made narrower until ``is_accurate`` is false; where it is true, errors are within the limits."""
    widths, errors = [], []
    for width in (1.0, 0.3, 0.1, 0.03, 0.01, 0.003):
        case = make_case(
            family, torch.float32, N=40, K=5, D=features, condition=2.0, spread=1.0 / width, seed=4, device=on[1]
        )
        if is_accurate(Exponents.of(*case.arguments)):
            widths.append(width)
            values, nats = log_sum_exps(case)
            errors.append(error(nats, case.oracle()["values"]))
            g = weights_of(case.x)
            check_moments(case, kernels(case).moments(values, g.float()), g)
        else:
            assert width < 1
    assert min(widths) > narrow
    assert max(errors) <= 3 * CLOSE


def test_other_problems_are_refused(on):
    def of(family, D, **settings):
        return Exponents.of(*make_case(family, torch.float32, N=5, D=D, device=on[1], **settings).arguments)

    assert is_accurate(of("spherical", 128, condition=2.0))
    assert is_accurate(of("diag", 64, condition=2.0))
    assert not is_accurate(of("spherical", 129, condition=2.0))
    assert not is_accurate(of("diag", 65, condition=2.0))
    assert not is_accurate(of("full", 20, condition=2.0))
    # A single narrow component among wide ones.
    problem = of("spherical", 32, condition=2.0)
    U = problem.U.clone()
    U[1] *= 100
    assert not is_accurate(replace(problem, U=U, host=None))
    # Factors that are zero.
    assert not is_accurate(replace(problem, U=0 * U, host=None))
    for family in ("spherical", "diag"):
        problem = of(family, 32, condition=2.0)
        U = problem.U.clone()
        U[1] = 0
        assert not is_accurate(replace(problem, U=U, host=None))
