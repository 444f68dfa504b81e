"""Few parameters on the CPU: how they are validated, packed as records, and used for moments in one transfer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, HAS_TRITON, make_case, without_rows

import gmmkeops as gk
from gmmkeops import reductions
from gmmkeops.components import Moments, factor_class
from gmmkeops.data import ROUNDING, Batch
from gmmkeops.reductions import choice, host_moments
from gmmkeops.reductions import problem as problem_module
from gmmkeops.reductions.host_moments import mixture_moments
from gmmkeops.reductions.library import OUT_OF_MEMORY
from gmmkeops.reductions.native import steps
from gmmkeops.reductions.problem import Exponents, Extent
from gmmkeops.reductions.protocol import LogSumExp, Statistics
from gmmkeops.reductions.triton import compiled, engine, residuals, triton
from gmmkeops.reductions.triton.compiled import CompiledRecords
from gmmkeops.reductions.triton.packing import Packed, family_of
from gmmkeops.reductions.triton.residuals import Residuals
from gmmkeops.reductions.truncation.passes import evaluate

pytestmark = pytest.mark.skipif(reductions.native_unavailable() is not None, reason="the library is not compiled")
interpreted = pytest.mark.skipif(
    not HAS_TRITON or torch.cuda.is_available(), reason="Triton is not installed, or runs on the CUDA device"
)

CASES = [
    *(("full", D, K) for D, K in zip(range(1, 9), (6, 13, 5, 1, 3, 2, 4, 1), strict=True)),
    *(("tied_full", 4, 6), ("tied_full", 2, 1), ("spherical", 1, 3), ("diag", 1, 4), ("diag", 3, 7), ("diag", 32, 1)),
    *(("tied_diag", 2, 4), ("spherical", 2, 8), ("spherical", 32, 2), ("tied_spherical", 3, 7)),
]


@pytest.fixture
def without_library(monkeypatch):
    """A function that lets torch pack the parameters."""
    return lambda: monkeypatch.setattr(compiled, "reason", lambda: "it has not been compiled")


def problem_of(family, features, components, dtype, shift=0.0):
    case = make_case(family, dtype, N=40, K=components, D=features, condition=30.0, shift=shift)
    # Numbers that float32 rounds.
    noise = torch.randn(case.means.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    means = case.means.double() * (1 + 2e-8 * noise)
    return Exponents.of(case.x, case.offsets, means, case.factor)


def test_memory_that_is_exhausted(monkeypatch):
    """Calls of the library that end early leave their results undefined, or those of a former call."""
    mixture = gk.Mixture(
        weights=[0.5, 0.5], means=torch.eye(2).double(), covariances=torch.eye(2).double().expand(2, 2, 2)
    )
    parameters = host_moments.HostParameters.of(mixture.factor, 2, Batch(torch.zeros(3, 2)))
    given = mixture.logits, mixture.means, mixture.factor.tensors
    assert parameters.exponents(*given) is not None
    for module in (host_moments, problem_module):
        monkeypatch.setattr(module, "run", lambda *_, **__: OUT_OF_MEMORY)
    assert parameters.exponents(*given) is None
    means = torch.tensor([[0.0, 1.0], [torch.nan, 0.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="means must be finite"):
        reductions.logsumexp(torch.zeros(3, 2), torch.zeros(2), means, torch.ones(1, 2), backend="dense")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("family", "features", "components"), CASES)
def test_records_equal_those_of_torch(family, features, components, dtype, without_library):
    given = problem_of(family, features, components, dtype)
    parameters = given.offsets, given.means, given.U
    far, heavy = torch.full_like(given.offsets, 1e3), given.offsets.clone()
    heavy[-1] = -1e30
    problems = [
        given,
        problem_of(family, features, components, dtype, shift=1e5),
        # Exponents relative to the usual one, a component of zero weight, and a factor of zero.
        replace(given, offsets=far),
        replace(given, offsets=heavy),
        *([] if given.is_full else [replace(given, U=torch.zeros_like(given.U))]),
    ]
    assert all(part.device.type == "cpu" for part in parameters)
    found = [Residuals(problem) for problem in problems]
    assert all(kernels.compiled is not None for kernels in found)
    packed = [(kernels.compiled, kernels.packed, kernels.condition()) for kernels in found]
    without_library()
    eps = torch.finfo(dtype).eps
    for problem, (library, own, condition) in zip(problems, packed, strict=True):
        other = Residuals(problem)
        assert other.compiled is None
        theirs = other.packed
        assert own.records.shape == theirs.records.shape
        assert own.records.dtype == dtype
        assert own.family == theirs.family
        torch.testing.assert_close(own.records, theirs.records, rtol=2 * eps, atol=1e-12)
        torch.testing.assert_close(own.rest, theirs.rest, rtol=0, atol=0)
        assert (library.base, library.usual) == (float(other.scale.base), float(other.scale.usual))
        assert condition == pytest.approx(other.condition(), rel=1e-12)


@pytest.mark.parametrize(("family", "features", "components"), CASES)
def test_moments_of_sums_equal_those_of_torch(family, features, components, monkeypatch):
    # Coordinates are so large that the means differ from the rounded ones by about 1e-3.
    problem = problem_of(family, features, components, torch.float32, shift=1e4)
    kernels = Residuals(problem)
    sums = torch.randn(kernels.sums_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = kernels.compiled.moments(problem, sums)
    monkeypatch.setattr(Residuals, "add_sums", lambda self, into, *_: into.copy_(sums))
    for own, truth in zip(found, kernels.moments(problem.x[:, 0], None, None), strict=True):
        assert own.shape == truth.shape
        torch.testing.assert_close(own, truth, rtol=1e-11, atol=1e-11)


def test_factors_that_are_singular_or_not_triangular():
    problem = problem_of("full", 3, 4, torch.float32)
    U = problem.U.clone()
    U[2, 1, 1] = 0
    assert Residuals(replace(problem, U=U)).compiled.condition == torch.inf
    U = problem.U.clone()
    U[1, 2, 0] = 1e-200
    assert CompiledRecords.of(replace(problem, U=U), "full", 4) is None
    condition, is_triangular = Residuals(replace(problem, U=U)).condition()
    assert not is_triangular
    assert condition == pytest.approx(Residuals(problem).condition()[0], rel=1e-9)


def test_parameters_of_another_device_are_packed_there():
    problem = problem_of("diag", 3, 4, torch.float32)
    away = Exponents(
        *(part.to("meta") for part in (problem.x, problem.offsets, problem.means, problem.U, problem.center))
    )
    assert CompiledRecords.of(away, "diagonal", 4) is None
    assert CompiledRecords.of(replace(away, host=problem), "diagonal", 4) is not None


@pytest.mark.parametrize("shift", [0.0, 3.0, 30.0, 1e4])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 3), (5, 1), (7, 4), (2, 64)])
def test_extents_equal_those_of_torch(sizes, shift):
    generator = torch.Generator().manual_seed(0)
    K, D = sizes
    random = {"generator": generator, "dtype": torch.float64}
    means, U, offsets = shift + torch.randn(K, D, **random), torch.randn(K, D, D, **random), torch.randn(K, **random)
    cases = [(means, U, offsets)]
    for broken in range(3):
        for value in (torch.nan, torch.inf, -torch.inf):
            case = [part.clone() for part in (means, U, offsets)]
            case[broken].view(-1)[-1] = value
            cases.append(tuple(case))
    for means, U, offsets in cases:
        found, expected = Extent.of(means, U, offsets), Extent.of(means, U)
        assert found.offsets is not None
        truths = expected.mean, expected.factor, *offsets.aminmax()
        for own, truth in zip((found.mean, found.factor, *found.offsets), truths, strict=True):
            assert own == pytest.approx(float(truth), nan_ok=True)
        assert found.central == expected.central
    assert Extent.of(means[:, :0], U, offsets).central


MIXTURES = [(family, D) for family in FAMILIES for D in (1, 2, 9)]


@pytest.mark.parametrize("assignment", ["soft", "hard"])
@pytest.mark.parametrize(("family", "features"), MIXTURES)
def test_moments_of_a_mixture(family, features, assignment):
    case = make_case(family, torch.float64, N=60, K=4, D=features, condition=20.0)
    logits = torch.randn(4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    mixture = gk.Mixture(logits, case.means, case.factor)
    weights = _weights(case)
    for g in (None, weights):
        batch = Batch(case.x, g, rounding=torch.full((features,), 1e-9, dtype=torch.float64))
        parameters = mixture.logits, mixture.means, mixture.factor
        found = mixture_moments(batch, *parameters, mass=float(batch.mass), assignment=assignment, backend="dense")
        arguments = mixture.offsets, mixture.means, mixture.factor
        expected = reductions.moments(batch, *arguments, assignment=assignment, backend="dense")
        for name in ("S0", "S1", "S2", "centers", "total", "mass"):
            own, truth = getattr(found, name), getattr(expected, name)
            torch.testing.assert_close(own, truth, rtol=1e-10, atol=1e-10)


def test_mixtures_whose_parameters_are_converted_in_another_way():
    case = make_case("full", torch.float64, N=60, K=4, D=3, condition=20.0)
    logits, means, factor = torch.zeros(4, dtype=torch.float64), case.means, case.factor
    batch = Batch(case.x)
    moments = lambda logits, means, factor, batch=batch: mixture_moments(batch, logits, means, factor, mass=60.0)  # noqa: E731
    assert moments(logits, means, factor) is not None
    changed = lambda part, value: part.clone().index_fill_(0, torch.tensor([1]), value)  # noqa: E731
    assert moments(changed(logits, -torch.inf), means, factor) is None
    assert moments(changed(logits, torch.nan), means, factor) is None
    for value in (torch.nan, torch.inf):
        assert moments(logits, changed(means, value), factor) is None
        for name, part in factor.tensors.items():
            assert moments(logits, means, factor.replace(**factor.tensors | {name: changed(part, value)})) is None
    # Means that are far from the origin have another center, and the rounding errors of the points may be too large.
    assert moments(logits, means + 1e4, factor) is None
    U = factor.U.norm(dim=2).amax(0)
    limits = {False: 0.99, True: 1.01}
    for is_coarse, size in limits.items():
        one = torch.zeros(3, dtype=torch.float64)
        one[0] = size * ROUNDING / U[0]
        assert (moments(logits, means, factor, Batch(case.x, rounding=one)) is None) == is_coarse
    assert moments(logits.float(), means, factor) is None
    assert moments(logits, means.requires_grad_(), factor) is None


def _at_once(monkeypatch, problem, request):
    """The result of a request, after the first use; and how often numbers were read before the moments were computed."""
    monkeypatch.setattr(residuals, "_CHUNK", 8)
    monkeypatch.setattr(choice, "_told", set())
    reads = []
    numbers = engine._Evaluation._numbers
    triton.begin(problem, request)
    monkeypatch.setattr(engine._Evaluation, "_numbers", lambda self, weights: reads.append(1) or numbers(self, weights))
    return evaluate(triton, problem, request), len(reads)


def _weights(problem):
    return torch.randn(len(problem.x), generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def _compare(found, truth, weights, problem):
    """Compare moments with the dense engine, relative to those for the absolute weights."""
    absolute = evaluate(choice.dense, problem, Statistics(None if weights is None else weights.abs()))
    scales = absolute[0].max(), (absolute[0].max() * absolute[2].abs().max()).sqrt(), absolute[2].abs().max()
    for part, expected, scale in zip(found[:3], truth[:3], scales, strict=True):
        assert part.shape == expected.shape
        assert part.dtype == torch.float64
        assert float((part - expected).abs().max() / scale) <= 3e-6
    assert float((found[3] - truth[3]).abs() / absolute[3].abs().clamp(min=1)) <= 3e-6


@interpreted
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("family", "features"), [("full", 3), ("tied_full", 2), ("diag", 4), ("spherical", 2)])
def test_moments_are_computed_before_numbers_are_read(family, features, dtype, is_weighted, monkeypatch):
    problem = problem_of(family, features, 5, dtype)
    weights = _weights(problem) if is_weighted else None
    # Exponents relative to zero, and to the usual one.
    for shift in (0.0, 500.0):
        moved = replace(problem, offsets=problem.offsets + shift)
        request = Statistics(weights, on_cpu=True)
        found, reads = _at_once(monkeypatch, moved, request)
        assert not reads
        _compare(found, evaluate(choice.dense, moved, request), weights, moved)


@interpreted
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("shift", [0.0, 500.0])
def test_rows_that_are_far_are_added(shift, is_weighted, monkeypatch):
    problem = problem_of("full", 2, 5, torch.float32)
    problem.x[3], problem.x[7], problem.x[11] = 1e3, torch.tensor([1e12, -1e12]), 60.0
    problem = replace(problem, offsets=problem.offsets + shift)
    weights = _weights(problem) if is_weighted else None
    request = Statistics(weights, on_cpu=True)
    values = evaluate(choice.dense, problem, LogSumExp())[0] - shift
    assert int((values < -engine.DEEPEST).sum()) == 3
    found, reads = _at_once(monkeypatch, problem, request)
    assert not reads
    truth = evaluate(choice.dense, problem, request)
    for part, expected in zip(found, truth, strict=True):
        assert float((part - expected).abs().max() / expected.abs().max()) <= 3e-6
    # Without these rows the moments are right, too; their own ones are larger by many orders of magnitude.
    index, g = without_rows([3, 7, 11], weights, len(problem.x))
    found, reads = _at_once(monkeypatch, problem, Statistics(g, on_cpu=True))
    assert not reads
    few = problem.rows(index)
    _compare(found, evaluate(choice.dense, few, Statistics(g[index])), g[index], few)


@interpreted
def test_responsibilities_of_a_row_that_is_far(monkeypatch):
    """Their float32 exponents have errors of about 0.2 nats."""
    means, U = torch.tensor([[-0.5, 0.0], [0.5, 0.0]]), torch.eye(2).expand(2, 2, 2)
    problem = Exponents.of(torch.tensor([[0.2, 2000.0], [0.1, 0.3]]), torch.zeros(2), means, U)
    found, reads = _at_once(monkeypatch, problem, Statistics(on_cpu=True))
    assert not reads
    expected = torch.softmax(torch.tensor([[-0.1, 0.1], [-0.05, 0.05]], dtype=torch.float64), 1).sum(0)
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=0)


@interpreted
@pytest.mark.parametrize("case", ["end of the range", "infinite", "large", "small", "very different", "zero"])
def test_moments_that_must_be_computed_in_another_way(case, monkeypatch):
    problem = problem_of("full", 3, 4, torch.float32)
    weights = _weights(problem)
    if case == "infinite":
        # Whitened residuals are infinite, but the exponents are numbers.
        problem = replace(problem, U=3 * torch.eye(3, dtype=torch.float64).expand(4, 3, 3))
        problem.x[5] = 3e38
    elif case == "end of the range":
        problem.x[5], problem.x[6] = 3e38, torch.tensor([3e38, -3e38, 3e38])
    elif case == "very different":
        # The largest weight is of ordinary size.
        weights = (weights - weights.max()).exp() ** 60
    elif case == "zero":
        weights = 0 * weights
    else:
        weights = weights * (1e200 if case == "large" else 1e-200)
    request = Statistics(weights, on_cpu=True)
    found, reads = _at_once(monkeypatch, problem, request)
    assert (reads > 0) == (case != "zero")
    # The total at the end of the range is beyond that of float32.
    count = 3 if case in ("end of the range", "infinite") else 4
    for part, expected in zip(found[:count], evaluate(choice.dense, problem, request)[:count], strict=True):
        assert float((part - expected).abs().max()) <= 3e-6 * float(expected.abs().max())


@interpreted
@pytest.mark.parametrize("family", ["full", "diag", "spherical"])
def test_without_the_library(family, monkeypatch, without_library):
    problem = problem_of(family, 3, 5, torch.float32)
    without_library()
    monkeypatch.setattr(engine, "reason", lambda: "it has not been compiled")
    weights = _weights(problem)
    assert isinstance(Residuals(problem).packed, Packed)
    assert family_of(problem) == {"diag": "diagonal"}.get(family, family)
    for request in (Statistics(weights, on_cpu=True), Statistics(on_cpu=True)):
        found, reads = _at_once(monkeypatch, problem, request)
        assert reads
        _compare(found, evaluate(choice.dense, problem, request), request.weights, problem)


@pytest.mark.parametrize("family", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize(("K", "D"), [(2000, 8), (40_000, 2)])
def test_number_of_threads_changes_no_bit(monkeypatch, family, K, D):
    g = torch.Generator().manual_seed(0)
    kind, tied = factor_class(family)
    A = torch.randn(1 if tied else K, D, D, generator=g, dtype=torch.float64)
    factor = kind.from_covariances(kind.compact(A @ A.mT + torch.eye(D)), features=D)
    means = torch.randn(K, D, generator=g, dtype=torch.float64)
    logits = torch.rand(K, generator=g, dtype=torch.float64)
    S0 = 1 + torch.rand(K, generator=g, dtype=torch.float64)
    S1 = 0.1 * torch.randn(K, D, generator=g, dtype=torch.float64)
    S2 = factor.second_moments(S0[:, None, None] * torch.diag_embed(0.5 + S1.square()))
    sums = Moments(S0, S1, S2, means, S0.sum(), S0.sum())
    settings = reductions.StepSettings(float(S0.sum()), torch.full((D,), 1e-6).double(), 1e-28, 0.0)
    counts = torch.ones(factor.leading, dtype=torch.float64)
    exponents = Exponents.of(means[:1].float(), logits, means, factor)
    name = {"diag": "diagonal", "tied": "full"}.get(family, family)
    results = []
    for threads in (1, 5):
        for module in (steps, compiled, host_moments):
            monkeypatch.setattr(module, "cores", lambda threads=threads: threads)
        (step,) = [reductions.native_m_step(sums, logits, means, factor, settings, counts, 0.0)]
        assert len(step) == 1
        records = compiled.CompiledRecords.of(exponents, name, 8)
        rows = 1 + D + S2[0].numel() if family not in ("full", "tied") else 1 + D + D * (D + 1) // 2
        moments = records.moments(exponents, torch.linspace(1, 2, rows * K, dtype=torch.float64).view(rows, K))
        given = []
        monkeypatch.setattr(host_moments, "statistics", lambda problem, *_, **__: given.append(problem.host) or sums)  # noqa: B023
        reductions.mixture_moments(Batch(means[:1].float()), logits, means, factor, mass=1.0)
        results.append(
            [
                step.logits(1),
                step.means(1),
                *step.factor(1).tensors.values(),
                step.counts(1),
                torch.tensor([step.costs[0], step.drifts[1]]),
                records.records[:K],
                records.rest,
                torch.tensor([records.base, records.usual, records.condition]),
                *moments,
                given[0].offsets,
                given[0].U,
            ]
        )
    for one, several in zip(*results, strict=True):
        assert torch.equal(one, several)
    torch.testing.assert_close(
        results[0][-1], factor.matrices().expand(K, D, D) if name == "full" else factor.U.expand(K, -1)
    )
