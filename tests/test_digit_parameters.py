"""Parameters of digits that the compiled library packs, and its moments, against those of torch and the dense engine."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import HAS_TRITON, make_case, without_rows
from fake_device import CUDA, fake_device, on_device

from gmmkeops import reductions
from gmmkeops.reductions.dense import dense
from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.protocol import Argmax, LogSumExp, Statistics
from gmmkeops.reductions.triton import digit_parameters, engine, products, residuals, triton
from gmmkeops.reductions.triton.digit_parameters import Parameters
from gmmkeops.reductions.triton.digits import Grid
from gmmkeops.reductions.triton.products import Tiling
from gmmkeops.reductions.triton.residuals import Residuals
from gmmkeops.reductions.truncation.passes import evaluate

pytestmark = pytest.mark.skipif(reductions.native_unavailable() is not None, reason="the library is not compiled")
interpreted = pytest.mark.skipif(
    not HAS_TRITON or torch.cuda.is_available(), reason="Triton is not installed, or runs on the CUDA device"
)

SHAPES = [
    *(("spherical", 17, 1), ("spherical", 32, 255), ("spherical", 33, 300), ("spherical", 128, 300), ("spherical", 64, 2)),
    *(("tied_spherical", 20, 256), ("tied_spherical", 128, 3), ("tied_diag", 17, 257), ("tied_diag", 40, 2)),
    *(("diag", 17, 300), ("diag", 32, 1), ("diag", 33, 256), ("diag", 64, 100), ("diag", 64, 300)),
]  # fmt: skip


def problem_of(family, features, components, spread=1.0, seed=0, shift=0.0):
    settings = {"condition": 4.0, "spread": spread, "seed": seed, "shift": shift}
    case = make_case(family, torch.float32, N=4, K=components, D=features, **settings)
    # Numbers that float32 rounds.
    noise = torch.randn(case.means.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Exponents.of(case.x, case.offsets, case.means.double() + 1e-9 * noise, case.factor)


def packed_by_torch(problem):
    grid = Grid.of(problem)
    return Parameters._of_torch(problem, grid) if grid.is_accurate() else None


def compare(problem):
    """Compare all arrays; digits, means and grid have the same bits."""
    found, expected = Parameters.of(problem), packed_by_torch(problem)
    if expected is None:
        assert found is None
        return None
    one, other = found.arrays, expected.arrays
    assert one.memory.shape == other.memory.shape
    for name in ("digits", "centers", "grid"):
        assert getattr(one, name).dtype == getattr(other, name).dtype
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.equal(found.means, expected.means)
    assert torch.equal(found.factor, expected.factor)
    # The sum of squares is rounded in another order, and so may be its nearest integer.
    K, (c, w, J), (_, _, other_J) = len(problem.means), one.numbers.double(), other.numbers.double()
    assert torch.equal(one.numbers[1], other.numbers[1])
    assert torch.equal(one.numbers[:, K:], other.numbers[:, K:])
    assert float((J - other_J).abs().max()) <= 1
    torch.testing.assert_close(J[:K] + found.square, other_J[:K] + expected.square, rtol=1e-13, atol=1e-9)
    shift = w[:K] * (found.square - expected.square)
    torch.testing.assert_close(c[:K] + shift, other.numbers[0, :K].double(), rtol=2e-7, atol=1e-6)
    return found


@pytest.mark.parametrize(("family", "features", "components"), SHAPES)
def test_arrays_equal_those_of_torch(family, features, components):
    problem = problem_of(family, features, components)
    far, heavy = problem.offsets + 1e3, problem.offsets.clone()
    heavy[-1] = -1e30
    found = compare(problem)
    assert found is not None
    assert found.arrays.digits.shape[1] % 256 == 0
    assert components == 1 or bool((found.arrays.digits.abs().amax((1, 2)) > 0).all())
    # Exponents relative to the usual one, a component of zero weight, wide and narrow components, and coordinates of other sizes.
    for other in (replace(problem, offsets=far), replace(problem, offsets=heavy), replace(problem, U=0.3 * problem.U)):
        compare(other)
    for scale in (2.0**-90, 1e-3, 1e4, 2.0**90):
        found = compare(replace(problem, means=problem.means * scale, U=problem.U / scale))
        assert found is not None or components < 3
    shifted = problem_of(family, features, components, shift=1e3)
    compare(replace(shifted, center=torch.full((features,), 7.0, dtype=torch.float64)))


@pytest.mark.parametrize("family", ["spherical", "diag"])
def test_digits_in_the_middle_of_two_numbers(family):
    """Many entries are as far from the next smaller float16 number as from the next larger one."""
    generator = torch.Generator().manual_seed(0)
    D, K = (17, 64) if family == "spherical" else (64, 64)
    whole = torch.randint(-600, 600, (K, D), generator=generator).double()
    rest = torch.randint(-(1 << 13), 1 << 13, (K, D), generator=generator).double()
    # Entries m with few binary digits after the point, and a range of them that is centered.
    means = whole + rest * 2.0 ** -torch.randint(1, 15, (K, D), generator=generator).double()
    means[0], means[1] = 600.0, -600.0
    means = means.clamp(-600, 600) * (1 if family == "spherical" else 1 / 64)
    U = torch.full((K, 1 if family == "spherical" else D), 0.05, dtype=torch.float64)
    U = U if family == "spherical" else U.mul(4)
    problem = Exponents.of(torch.zeros(1, D), torch.zeros(K), means, U)
    found = compare(problem)
    assert found is not None
    entries = found.arrays.digits[0].double().abs()
    assert float(entries.max()) > 500


@pytest.mark.parametrize(("family", "features"), [("spherical", 17), ("spherical", 128), ("diag", 20), ("diag", 64)])
def test_the_decision_about_accuracy_is_that_of_torch(family, features):
    decisions = []
    for components in (5, 70):
        for seed in range(3):
            for spread in torch.logspace(-1, 2, 40, base=10.0).tolist():
                problem = problem_of(family, features, components, spread, seed)
                decisions.append(Parameters.of(problem) is not None)
                assert decisions[-1] == Grid.of(problem).is_accurate()
    assert 0.1 < sum(decisions) / len(decisions) < 0.9


@pytest.mark.parametrize("family", ["spherical", "diag"])
def test_parameters_that_are_refused(family):
    problem = problem_of(family, 20, 5)
    assert Parameters.of(problem) is not None
    for value in (0.0, torch.inf, torch.nan, 1e3):
        U = problem.U.clone()
        U[1] = value
        for other in (replace(problem, U=U), replace(problem, U=torch.full_like(U, value))):
            assert packed_by_torch(other) is None
            assert Parameters.of(other) is None
    for value in (torch.inf, -torch.inf, torch.nan, 1e200):
        means = problem.means.clone()
        means[3, 2] = value
        assert packed_by_torch(replace(problem, means=means)) is None
        assert Parameters.of(replace(problem, means=means)) is None
    for scale, is_accurate in ((2.0**-115, False), (2.0**-80, True), (2.0**80, True), (2.0**115, False)):
        other = replace(problem, means=problem.means * scale, U=problem.U / scale)
        assert (packed_by_torch(other) is not None) == is_accurate
        assert (Parameters.of(other) is not None) == is_accurate
    full = replace(problem, U=torch.eye(20, dtype=torch.float64).expand(5, 20, 20))
    assert Parameters.of(full) is None


@pytest.mark.parametrize(("family", "features", "components"), SHAPES)
def test_moments_of_sums_equal_those_of_torch(family, features, components, monkeypatch):
    # Wide components, whose unit and factor differ from one, and coordinates that differ from the reference point.
    problem = problem_of(family, features, components, spread=3.0, shift=5.0)
    problem = replace(problem, U=problem.U / 7)
    parameters = Parameters.of(problem)
    generator = torch.Generator().manual_seed(0)
    W = parameters.arrays.digits.shape[2]
    sums = torch.randn(components, W + 4, generator=generator, dtype=torch.float64)
    found = parameters.moments(sums, 0.3)
    monkeypatch.setattr(digit_parameters, "reason", lambda: "it has not been compiled")
    for own, truth in zip(found, parameters.moments(sums, 0.3), strict=True):
        assert own.shape == truth.shape
        assert float((own - truth).abs().max()) <= 1e-13 * float(truth.abs().max())


@pytest.mark.parametrize(("family", "features", "components"), [("spherical", 128, 10_000), ("diag", 64, 20_000)])
def test_results_do_not_depend_on_the_number_of_threads(family, features, components, monkeypatch):
    # Enough components for several threads, of which one has the extreme coordinates of all.
    problem = problem_of(family, features, components, spread=0.5)
    problem.means[1] = 5.0
    problem = replace(problem, U=problem.U / 2)
    results = []
    for threads in (1, 7):
        monkeypatch.setattr(digit_parameters, "cores", lambda threads=threads: threads)
        found = Parameters.of(problem)
        W = found.arrays.digits.shape[2]
        sums = torch.linspace(1, 2, components * (W + 4), dtype=torch.float64).view(components, -1)
        results.append([found.arrays.memory, found.means, found.factor, found.square, *found.moments(sums, 1.0)])
    for one, several in zip(*results, strict=True):
        assert torch.equal(one, several)
    assert torch.equal(found.factor, Grid.of(problem).factor.expand(features))


def test_parameters_on_the_cpu_are_copied_in_one_transfer(monkeypatch):
    problem = problem_of("diag", 20, 5)
    with fake_device(monkeypatch) as counts:
        found = Parameters.of(problem).arrays
        there = found.at(CUDA)
        assert counts.totals == {"kernels": 0, "synchronizations": 0, "uploads": 1}
        parameters = Parameters.of(problem).beside(there)
        assert counts.totals["uploads"] == 2
        assert parameters.arrays is there
        assert parameters.means.is_cuda
        for name in ("digits", "centers", "numbers", "grid"):
            assert getattr(there, name).is_cuda
            assert torch.equal(getattr(there, name).cpu(), getattr(found, name))


def test_parameters_on_the_device_are_copied_unless_there_are_many(monkeypatch):
    problem = problem_of("spherical", 128, 16)
    sizes = (16, True), (1024, True), (4000, False)
    with fake_device(monkeypatch):
        for components, is_few in sizes:
            parts = [problem.offsets[:1].expand(components), problem.means[:1].expand(components, 128)]
            given = [
                on_device(part) for part in (problem.x, *parts, problem.U[:1].expand(components, 1), problem.center)
            ]
            there = Exponents(*given)
            assert (engine._placed(there, LogSumExp()).host is not None) == is_few
            # Parameters that are on the CPU remain there.
            host = Exponents(problem.x[:0], *parts, problem.U[:1].expand(components, 1), problem.center)
            assert engine._placed(Exponents.of_host(given[0], host), Statistics()).host is host
        few = replace(there, means=there.means[:16], offsets=there.offsets[:16], U=there.U[:16])
        # Without the library, torch packs few parameters only.
        monkeypatch.setattr(engine, "reason", lambda: "it has not been compiled")
        assert engine._placed(few, LogSumExp()).host is not None
        assert engine._placed(Exponents.of_host(given[0], host), Statistics()).host is None


SMALL = Tiling(32, 32, 4, 2, columns=64, chunk=64)


@pytest.fixture
def tensor_cores(monkeypatch):
    """Products of digits on the interpreter, in small tiles."""
    monkeypatch.setattr(residuals, "_has_tensor_cores", lambda device: True)
    monkeypatch.setattr(products, "_value_tiling", lambda device: SMALL)
    monkeypatch.setattr(products, "_sum_tiling", lambda device, width: SMALL)


def requested(family, features, spread=1.0, components=16, points=60):
    case = make_case(family, torch.float32, N=points, K=components, D=features, condition=2.0, spread=spread, seed=3)
    problem = Exponents.of(*case.arguments)
    assert Residuals(problem).products is not None
    return problem


def weights_of(problem):
    return torch.randn(len(problem.x), generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def at_once(monkeypatch, problem, weights=None):
    """The moments on the CPU, and how often numbers were read before they were computed."""
    reads, numbers = [], engine._Evaluation._numbers
    request = Statistics(weights, on_cpu=True)
    evaluation = triton.begin(problem, request)
    assert evaluation.form == "digits"
    monkeypatch.setattr(engine._Evaluation, "_numbers", lambda self, given: reads.append(1) or numbers(self, given))
    evaluation.add(None)
    found = evaluation.result()
    monkeypatch.setattr(engine._Evaluation, "_numbers", numbers)
    return found, len(reads)


def check_moments(found, problem, weights=None, close=3e-6):
    """Compare moments with the dense engine, relative to those for the absolute weights."""
    wide = replace(problem, x=problem.x.double())
    truth = evaluate(dense, wide, Statistics(weights))
    absolute = evaluate(dense, wide, Statistics(None if weights is None else weights.abs()))
    scales = absolute[0].max(), absolute[0].max().sqrt() * absolute[2].abs().max().sqrt(), absolute[2].abs().max()
    for part, expected, scale in zip(found[:3], truth[:3], scales, strict=True):
        assert part.dtype == torch.float64
        assert float((part - expected.view(part.shape)).abs().max() / scale) <= close
    assert float((found[3] - truth[3]).abs() / absolute[3].abs().clamp(min=1)) <= close


CASES = [("spherical", 128), ("diag", 20), ("tied_spherical", 40), ("tied_diag", 40)]


@interpreted
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize(("family", "features"), CASES)
def test_moments_are_computed_before_numbers_are_read(tensor_cores, family, features, is_weighted, monkeypatch):
    problem = requested(family, features)
    weights = 3 * weights_of(problem) if is_weighted else None
    for shift in (0.0, 500.0):
        moved = replace(problem, offsets=problem.offsets + shift)
        found, reads = at_once(monkeypatch, moved, weights)
        assert not reads
        check_moments(found, moved, weights)


@interpreted
@pytest.mark.parametrize(("family", "features"), CASES[:2])
def test_log_sum_exps_and_moments_that_remain_on_the_device(tensor_cores, family, features):
    problem = requested(family, features)
    weights = weights_of(problem)
    (values,) = evaluate(triton, problem, LogSumExp())
    (expected,) = evaluate(dense, replace(problem, x=problem.x.double()), LogSumExp())
    assert float(((values - expected) / expected.abs().clamp(min=1)).abs().max()) <= 6e-6
    for g in (None, weights):
        check_moments(evaluate(triton, problem, Statistics(g)), problem, g)


@interpreted
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize(("family", "features"), CASES[:2])
def test_rows_that_are_far_are_added(tensor_cores, family, features, is_weighted, monkeypatch):
    problem = requested(family, features)
    problem.x[3], problem.x[7], problem.x[11] = 1e3, 3e30, 200.0
    weights = weights_of(problem) if is_weighted else None
    found, reads = at_once(monkeypatch, problem, weights)
    assert not reads
    truth = evaluate(dense, replace(problem, x=problem.x.double()), Statistics(weights))
    for part, expected in zip(found, truth, strict=True):
        assert float((part - expected).abs().max() / expected.abs().max()) <= 3e-6
    # Without these rows the moments are right, too; their own ones are larger by many orders of magnitude.
    index, g = without_rows([3, 7, 11], weights, len(problem.x))
    found, reads = at_once(monkeypatch, problem, g)
    assert not reads
    check_moments(found, problem.rows(index), g[index])


@interpreted
@pytest.mark.parametrize("is_far", [False, True])
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize(("family", "features"), [("spherical", 20), ("diag", 40)])
def test_weak_components_are_computed_by_residuals(tensor_cores, family, features, is_weighted, is_far, monkeypatch):
    """Responsibilities of less than 2^-39 are lost in sums of digits."""
    problem = requested(family, features, points=90)
    labels = evaluate(dense, problem, Argmax())[0]
    problem = problem.rows((labels != 4) & (labels != 9))
    S0, offsets = evaluate(dense, problem, Statistics())[0], problem.offsets.clone()
    for k, wanted in ((4, 1e-10), (9, 1e-14)):
        offsets[k] -= (S0[k] / wanted).log()
    # Exponents are relative to other numbers than those of the weak components only.
    problem = replace(problem, offsets=offsets + 500)
    if is_far:
        problem.x[5] = 3e38
    weights = weights_of(problem).abs() if is_weighted else None
    if is_far:
        weights = torch.ones(len(problem.x), dtype=torch.float64) if weights is None else weights
        weights[5] = 0
    found, reads = at_once(monkeypatch, problem, weights)
    assert not reads
    kept = torch.arange(len(problem.x)) != 5 if is_far else slice(None)
    few = problem.rows(kept)
    truth = evaluate(dense, replace(few, x=few.x.double()), Statistics(None if weights is None else weights[kept]))
    assert 0 < float(truth[0][4]) < 1e-9
    for part, expected in zip(found[:3], truth[:3], strict=True):
        for k in (4, 9):
            assert float((part[k] - expected[k]).abs().max()) <= 2e-5 * float(expected[k].abs().max())
    if not is_far:
        check_moments(found, problem, weights)
    for part, other in zip(found, evaluate(triton, problem, Statistics(weights)), strict=True):
        torch.testing.assert_close(part, other, rtol=1e-7, atol=1e-9)


@interpreted
@pytest.mark.parametrize("case", ["large", "small", "very different", "zero", "infinite"])
def test_moments_that_must_be_computed_in_another_way(tensor_cores, case, monkeypatch):
    problem = requested("spherical", 20)
    weights = weights_of(problem)
    if case == "very different":
        weights = (weights - weights.max()).exp() ** 60
    elif case == "infinite":
        problem.x[5] = 3e38
    else:
        weights = weights * {"large": 1e200, "small": 1e-200, "zero": 0.0}[case]
    found, reads = at_once(monkeypatch, problem, weights)
    assert (reads > 0) == (case in ("large", "small", "very different"))
    if case == "infinite":
        assert math.isfinite(float(found[0].sum()))
        return
    assert all(bool(part.isfinite().all()) for part in found)
    if case == "zero":
        assert all(bool((part == 0).all()) for part in found)
    else:
        check_moments(found, problem, weights)
