"""The contract of the engines: every request against a float64 oracle, by all engines and by one that is written here."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import pytest
import torch
from conftest import ENGINES, FAMILIES, INTERPRETED, Case, make_case

import gmmkeops as gk
from gmmkeops import reductions
from gmmkeops.reductions import choice
from gmmkeops.reductions import comparison as comparison_module
from gmmkeops.reductions.comparison import Comparison
from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.protocol import Argmax, Broken, LogSumExp, PointGradient, Statistics, TopK

# A new engine is tested by one more line.
ALL = [*ENGINES, INTERPRETED, pytest.param(("toy", "cpu"), id="toy-cpu")]
DTYPES = [torch.float32, torch.float64]
CLOSE = {torch.float32: 2e-5, torch.float64: 1e-9}
EPSILON = 1e-10


class Toy:
    """An engine that stores N x K arrays of float64."""

    name, title = "toy", "The toy engine"
    one_pass = False

    def unavailable(self, device):
        return None

    def unsupported(self, form, request):
        stochastic = isinstance(request, Statistics) and request.assignment == "stochastic"
        return "the toy engine draws no labels" if stochastic else None

    def begin(self, problem, request):
        return ToyEvaluation(problem, request)


class ToyEvaluation:
    def __init__(self, problem, request):
        self.problem, self.request = problem, request
        self.U = problem.U if problem.is_full else torch.diag_embed(problem.U.expand_as(problem.means))
        self.z = (problem.x.double() - problem.center)[:, None] - problem.means
        self.all = problem.offsets - 0.5 * torch.einsum("kde,nkd->nke", self.U, self.z).square().sum(-1)
        self.e = torch.full_like(self.all, -math.inf)

    def add(self, schedule):
        if schedule is None:
            self.e = self.all
            return None
        for (start, stop), owner in zip(schedule.spans.tolist(), schedule.owner.tolist(), strict=True):
            listed = schedule.index[schedule.pointer[owner] : schedule.pointer[owner + 1]]
            self.e[start:stop, listed] = self.all[start:stop, listed]
        k = self.request.rank
        values = self.e.topk(k).values[:, -1] if k else self.e.logsumexp(1)
        return schedule, schedule.minima(values[schedule.rows])

    def result(self):
        e, z, dtype = self.e, self.z, self.problem.x.dtype
        values = e.logsumexp(1)
        r = (e - values[:, None]).exp()
        match self.request:
            case LogSumExp():
                return (values.to(dtype),)
            case Argmax():
                return (e.argmax(1),)
            case TopK(k=k):
                return e.topk(k).values.to(dtype), e.topk(k).indices
            case PointGradient(weights=g, values=with_values):
                g = torch.ones_like(values) if g is None else g
                after = (values.to(dtype),) if with_values else ()
                return (-torch.einsum("n,nk,kde,nke->nd", g, r, self.U @ self.U.mT, z).to(dtype), *after)
            case Statistics(weights=g, assignment=assignment):
                if assignment == "hard":
                    values, r = e.amax(1), torch.nn.functional.one_hot(e.argmax(1), e.shape[1]).double()
                g = torch.ones_like(values) if g is None else g
                r = g[:, None] * r
                S2 = torch.einsum("nk,nkd,nke->kde", r, z, z)
                S2 = S2 if self.problem.is_full else S2.diagonal(dim1=1, dim2=2)
                S2 = S2.sum(1) if self.problem.U.shape[1:] == (1,) else S2
                return r.sum(0), torch.einsum("nk,nkd->kd", r, z), S2, g @ values


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    monkeypatch.setitem(choice.ENGINES, "toy", Toy())
    monkeypatch.setattr(choice, "_told", set())


@pytest.fixture
def log(monkeypatch):
    """A function that starts to record what an engine is asked: its requests, and the schedules of each."""

    def start(name):
        kind, asked = type(choice.ENGINES[name]), []
        begin = kind.begin

        def recorded(self, problem, request):
            evaluation, schedules = begin(self, problem, request), []
            add = evaluation.add
            evaluation.add = lambda schedule: (schedules.append(schedule), add(schedule))[1]
            # The first guesses of a truncation come from a few points, by the dense engine.
            if len(problem.x) >= 300:
                asked.append((request, schedules))
            return evaluation

        monkeypatch.setattr(kind, "begin", recorded)
        return asked

    return start


@dataclass
class Scene:
    """A case with weights of both signs, and its oracle without them, with them, and with their absolute values."""

    case: Case
    weights: torch.Tensor
    plain: dict[str, torch.Tensor]
    signed: dict[str, torch.Tensor]
    absolute: dict[str, torch.Tensor]

    @property
    def x(self):
        return self.case.x

    @property
    def parameters(self):
        return self.case.arguments[1:]

    def sorted(self):
        return reductions.arrange(self.x, len(self.case.means), EPSILON)


@functools.cache
def scene(family, dtype, truncated, device, backend="dense"):
    """A small case, or one of separated components, in which candidate lists leave out most of the pairs."""
    size = {"N": 12_001, "K": 40, "condition": 10.0, "spread": 20.0} if truncated else {"condition": 30.0}
    if truncated and (backend, device) == ("triton", "cpu"):
        size |= {"N": 2049, "D": 2, "spread": 60.0}
    case = make_case(family, dtype, device=device, **size)
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(len(case.x), generator=generator, dtype=torch.float64).to(device)
    return Scene(case, g, case.oracle(), case.oracle(g), case.oracle(g.abs()))


def assert_close(found, expected, tolerance, scale=None):
    """Equal shapes, and errors relative to the largest entry of ``scale`` (by default of what is expected)."""
    assert found.shape == expected.shape
    scale = expected if scale is None else scale
    assert float((found.double() - expected).abs().max()) <= tolerance * float(scale.abs().max())


def assert_near(found, expected, tolerance):
    """Equal shapes, and errors relative to max(1, |expected|)."""
    assert found.shape == expected.shape
    assert float(((found.double() - expected).abs() / expected.abs().clamp(min=1)).max()) <= tolerance


@pytest.mark.parametrize("truncated", [False, True], ids=["whole", "lists"])
@pytest.mark.parametrize("engine", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_request(engine, dtype, family, truncated, log):
    backend, device = engine
    s = scene(family, dtype, truncated, device, backend)
    options = {"backend": backend, "truncate": EPSILON if truncated else 0}
    assert reductions.engine(s.x, backend) == backend
    asked = log(backend)

    values = reductions.logsumexp(s.x, *s.parameters, **options)
    assert values.dtype == dtype
    assert_near(values, s.plain["values"], CLOSE[dtype] / 2)

    labels = s.plain["e"].argmax(1)
    assert torch.equal(reductions.argmax(s.x, *s.parameters, **options), labels)
    for k in (1, 3):
        exponents, components = reductions.topk(s.x, *s.parameters, k, **options)
        assert exponents.dtype == dtype
        assert_near(exponents, s.plain["e"].topk(k).values, CLOSE[dtype] / 2)
        assert_near(s.plain["e"].gather(1, components), s.plain["e"].topk(k).values, CLOSE[dtype] / 2)
        assert torch.equal(components[:, 0], labels)

    for weights, truth, scale in ((None, s.plain, s.plain), (s.weights, s.signed, s.absolute)):
        sums = reductions.moments(s.x, *s.parameters, weights=weights, **options)
        for name in ("S0", "S1", "S2", "total"):
            assert getattr(sums, name).dtype == torch.float64
            assert_close(getattr(sums, name), truth[name], CLOSE[dtype], scale[name])
        assert float(sums.mass) == pytest.approx(float(len(s.x) if weights is None else weights.sum()))

    points = s.x.clone().requires_grad_()
    reductions.total(points, *s.parameters, weights=s.weights, **options).backward()
    assert points.grad.dtype == dtype
    assert_close(points.grad, s.signed["gradient"], CLOSE[dtype])

    assert {type(request) for request, _ in asked} == {LogSumExp, Argmax, TopK, Statistics, PointGradient}
    # The third largest exponents are so far below the largest that nothing can be left out for them.
    lists = [schedule is not None for request, schedules in asked for schedule in schedules if request != TopK(3)]
    assert all(lists) if truncated else not any(lists)


@pytest.mark.parametrize("truncated", [False, True], ids=["whole", "lists"])
@pytest.mark.parametrize("engine", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_assignments_by_this_engine_or_the_dense_one(engine, dtype, truncated):
    backend, device = engine
    s = scene("full", dtype, truncated, device, backend)
    e, g = s.plain["e"], s.weights
    options = {"backend": backend, "truncate": EPSILON if truncated else 0}
    hard = reductions.moments(s.x, *s.parameters, weights=g, assignment="hard", **options)
    labels = e.argmax(1)
    z = s.x.double() - s.case.means.double()[labels]
    sizes = torch.zeros_like(hard.S0).index_add_(0, labels, g.abs())
    assert_close(hard.S0, torch.zeros_like(hard.S0).index_add_(0, labels, g), 1e-12, sizes)
    assert_close(hard.S1, torch.zeros_like(hard.S1).index_add_(0, labels, g[:, None] * z), CLOSE[dtype], sizes)
    assert_close(hard.total, g @ e.amax(1), CLOSE[dtype], g.abs() @ e.amax(1).abs())
    drawn = reductions.moments(s.x, *s.parameters, assignment="stochastic", seed=3, **options)
    r = e.softmax(1)
    # Each count is a sum of independent draws; the chance that one of them is five deviations off is below 1e-4.
    assert bool(((drawn.S0 - r.sum(0)).abs() <= 5 * (r * (1 - r)).sum(0).sqrt() + 1).all())
    assert torch.equal(drawn.S0, drawn.S0.round())
    assert float(drawn.S0.sum()) == len(s.x)


@pytest.mark.parametrize("engine", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_leaves_whose_lists_are_too_short_are_evaluated_again(engine, dtype, log):
    backend, device = engine
    s = scene("full", dtype, True, device, backend)
    cloud = s.sorted()
    reductions.logsumexp(cloud, *s.parameters, backend=backend)
    asked = log(backend)

    def spoil():
        """Guesses of the minima that are too high, except that of the first leaf, whose results must be kept."""
        cloud.minima = cloud.minima + 60 * (torch.arange(len(cloud.minima), device=device) > 0)

    spoil()
    sums = reductions.moments(cloud, *s.parameters, weights=s.weights, backend=backend)
    for name in ("S0", "S1", "S2", "total"):
        assert_close(getattr(sums, name), s.signed[name], CLOSE[dtype], s.absolute[name])
    spoil()
    assert_near(reductions.logsumexp(cloud, *s.parameters, backend=backend), s.plain["values"], CLOSE[dtype] / 2)
    assert 0 <= cloud.certificate <= EPSILON * (1 + 1e-6)
    assert len(asked) == 2
    for _, (first, second, *_) in asked:
        rows = [int(schedule.spans.diff(dim=1).sum()) for schedule in (first, second)]
        assert 0 < rows[1] < rows[0] == len(cloud.cloud.points)


class Fragile(Toy):
    """A toy engine that breaks at its first evaluation, or only at its end."""

    name, title = "fragile", "The fragile engine"

    def __init__(self, method):
        self.method, self.reason = method, None

    def unavailable(self, device):
        return self.reason

    def begin(self, problem, request):
        evaluation = super().begin(problem, request)

        def fail(*_):
            self.reason = "it has lost its library"
            raise Broken(self.reason)

        setattr(evaluation, self.method, fail)
        return evaluation


@pytest.mark.parametrize("method", ["add", "result"])
@pytest.mark.parametrize("truncated", [False, True], ids=["whole", "lists"])
def test_an_engine_that_breaks_is_replaced_with_one_warning(method, truncated, monkeypatch):
    monkeypatch.setitem(choice.ENGINES, "fragile", Fragile(method))
    s = scene("full", torch.float64, truncated, "cpu")
    options = {"truncate": EPSILON if truncated else 0}
    message = "The fragile engine was requested but it has lost its library; using the dense engine."
    with pytest.warns(UserWarning, match=message):
        assert_close(reductions.moments(s.x, *s.parameters, backend="fragile", **options).S2, s.plain["S2"], 1e-9)
    assert_close(reductions.moments(s.x, *s.parameters, backend="fragile", **options).S2, s.plain["S2"], 1e-9)
    assert reductions.engine(s.x, "fragile") == "dense"


def test_a_request_that_an_engine_does_not_compute_is_left_to_the_dense_one(log):
    s = scene("full", torch.float64, False, "cpu")
    toy, dense = log("toy"), log("dense")
    options = {"assignment": "stochastic", "seed": 1}
    found = reductions.moments(s.x, *s.parameters, backend="toy", **options)
    assert not toy
    assert [type(request) for request, _ in dense] == [Statistics]
    assert torch.equal(found.S2, reductions.moments(s.x, *s.parameters, backend="dense", **options).S2)


REQUESTS = [
    LogSumExp(),
    TopK(2),
    Argmax(),
    Statistics(),
    Statistics(assignment="hard"),
    Statistics(assignment="stochastic", seed=1),
    PointGradient(torch.ones(300)),
]


class Distorted:
    """An evaluation one of whose results is wrong in one place, by an error relative to its largest entry."""

    def __init__(self, evaluation, place, error=1e-2):
        self.evaluation, self.place, self.error = evaluation, place, error

    def add(self, schedule):
        return self.evaluation.add(schedule)

    def result(self):
        found = [part.clone() for part in self.evaluation.result()]
        part = found[self.place].view(-1)
        part[len(part) // 2] += self.error * (1 + part.abs().max())
        return tuple(found)


@pytest.mark.parametrize("request_", REQUESTS, ids=repr)
@pytest.mark.parametrize("family", ["full", "spherical"])
def test_the_first_results_are_compared_with_float64(request_, family):
    case = make_case(family, torch.float32, condition=10.0)
    problem, toy = Exponents.of(*case.arguments), Toy()
    right = Comparison(toy.begin)
    right.once(problem, request_)
    assert right.failure is None
    soft = isinstance(request_, Statistics) and request_.assignment == "soft"
    for place in (0, 1, 2) if soft else (0,):
        asked = []

        def begin(problem, request, asked=asked, place=place):
            asked.append((problem.shape[0], type(request)))
            return Distorted(toy.begin(problem, request), place)

        wrong = Comparison(begin)
        with pytest.raises(Broken, match="a check of 256 points at its first use found a relative error of"):
            wrong.once(problem, request_)
        assert wrong.failure is not None
        # Once for each kind of request and problem.
        wrong.once(problem, request_)
        assert [rows for rows, _ in asked] == [256]


# Engines that run on the CPU, each of which a new comparison takes part in.
COMPARED = [param for param in ALL if param.values[0][1] == "cpu" and "dense" not in param.id]


@pytest.mark.parametrize("engine", COMPARED)
@pytest.mark.parametrize(("dtype", "far"), [(torch.float32, 1e25), (torch.float32, 3e38), (torch.float64, 1e200)])
def test_points_beyond_the_range_of_a_dtype_are_no_errors(engine, dtype, far):
    """Their exponents are infinite, limited to the range or not computed at all."""
    x = torch.tensor([[0.1, 0.2, 0.0], [far, 0.0, 0.0]], dtype=dtype)
    offsets, means, U = torch.tensor([-math.inf, 0.0]), torch.zeros(2, 3), torch.ones(2, 3)
    chosen = choice.ENGINES[engine[0]]
    assert chosen.unavailable(x.device) is None
    comparison = Comparison(type(chosen)().begin)
    for points in (x, x[1:], x.flip(0)):
        problem = Exponents.of(points, offsets, means, U)
        for request in (LogSumExp(), TopK(1), TopK(2), Statistics(), PointGradient()):
            comparison._done.clear()
            comparison.once(problem, request)
    assert comparison.failure is None


def test_engines_are_compared_at_points_near_the_components():
    """Points that are far from all components do not count as a first use, and do not hide errors at others."""
    case = make_case("full", torch.float32, condition=10.0)
    toy, far = Toy(), case.x + 1e6
    for request in (LogSumExp(), Statistics(), PointGradient()):
        for place in (0, 1, 2) if request == Statistics() else (0,):
            comparison = Comparison(lambda *given, place=place: Distorted(toy.begin(*given), place))
            comparison.once(Exponents.of(far, *case.arguments[1:]), request)
            assert comparison.failure is None
            mixed = Exponents.of(torch.cat([case.x[:40], far[40:80]]), *case.arguments[1:])
            with pytest.raises(Broken, match="a check of 40 points at its first use found"):
                comparison.once(mixed, request)


@pytest.mark.parametrize("request_", [LogSumExp(), TopK(2), Statistics(), PointGradient()], ids=repr)
def test_a_result_that_is_not_a_number_is_found(request_):
    case, toy = make_case("full", torch.float32, condition=10.0), Toy()
    for place in (0, 1, 2) if request_ == Statistics() else (0,):
        comparison = Comparison(lambda *given, place=place: Distorted(toy.begin(*given), place, math.nan))
        with pytest.raises(Broken, match="found a relative error of nan in"):
            comparison.once(Exponents.of(*case.arguments), request_)


def test_exponents_that_cancel_their_offsets_are_right():
    """A float32 square of 3000 nats has an error of 3e-4, which is more than 1e-4 times its difference from an equal offset."""

    class Rounded(Toy):
        def begin(self, problem, request):
            evaluation = super().begin(problem, request)
            evaluation.all += 1e-7 * (evaluation.all - problem.offsets)
            return evaluation

    means, U = torch.tensor([[0.0], [1.0]]), torch.full((2, 1), 77.46)
    comparison = Comparison(Rounded().begin)
    comparison.once(Exponents.of(means, torch.full((2,), 3000.0), means, U), TopK(2))
    assert comparison.failure is None


@pytest.mark.parametrize("request_", [LogSumExp(), TopK(1)])
def test_a_narrow_component_elsewhere_hides_no_error(request_):
    """The offset of a component that these points have nothing to do with is thousands of nats."""

    class Shifted(Toy):
        def begin(self, problem, request):
            evaluation = super().begin(problem, request)
            evaluation.all += 0.05
            return evaluation

    U = torch.tensor([[1e4], [1.0]]).expand(2, 100).contiguous()
    means = torch.tensor([[50.0], [0.0]]).expand(2, 100).contiguous()
    x = torch.randn(256, 100, generator=torch.Generator().manual_seed(0))
    comparison = Comparison(Shifted().begin)
    with pytest.raises(Broken):
        comparison.once(Exponents.of(x, U.log().sum(1), means, U), request_)


def test_points_that_are_all_far_are_compared_seldom(monkeypatch):
    calls, near = [], comparison_module._near
    monkeypatch.setattr(comparison_module, "_near", lambda problem: calls.append(1) or near(problem))
    comparison = Comparison(Toy().begin)
    means, U = torch.zeros(1, 2), torch.ones(1, 2)
    far, close = (Exponents.of(torch.full((20, 2), number), torch.zeros(1), means, U) for number in (1e4, 0.5))
    assert not any(comparison.once(far, LogSumExp()) for _ in range(10))
    assert len(calls) == 4, "calls 1, 2, 4 and 7"
    assert any(comparison.once(close, LogSumExp()) for _ in range(20))


def test_gradients_that_cancel_are_right():
    """Midway between two components the gradient is a difference of equal terms."""
    means = torch.tensor([[1.57, 2.2], [1.17, 1.8]])
    x, U = means.mean(0, keepdim=True), torch.eye(2).expand(2, 2, 2)
    for backend in ("native", "toy"):
        comparison = Comparison(choice.ENGINES[backend].begin)
        for dtype in (torch.float32, torch.float64):
            comparison.once(Exponents.of(x.to(dtype), torch.zeros(2), means, U), PointGradient())
        assert comparison.failure is None


def test_residuals_of_points_that_are_equal_to_means_are_rounding_errors():
    x = torch.tensor([[-0.8, -1.0], [1.2, 1.0]]).double().repeat_interleave(10, 0)
    means = (x[[0, 10, 0]] * (1 + torch.tensor([1e-16, -1e-16, 3e-16])[:, None])).contiguous()
    for backend in ("native", "toy"):
        comparison = Comparison(choice.ENGINES[backend].begin)
        for scale in (1.0, 1e-9, 1e9):
            U = 4 * torch.eye(2).double().expand(3, 2, 2) / scale
            comparison._done.clear()
            comparison.once(Exponents.of(scale * x, torch.zeros(3).double(), scale * means, U), Statistics())
        assert comparison.failure is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_of_equal_points_are_right(dtype):
    """Squares of residuals that are no normal numbers are zero in kernels."""
    tiny = torch.finfo(dtype).tiny ** 0.5
    means = torch.tensor([[0.0, 0.0], [5e-9, -5e-9], [0.3, 0.3]], dtype=torch.float64) * tiny
    for family in ((2, 2), (2,), (1,)):
        U = 900 * (torch.eye(2) if len(family) == 2 else torch.ones(family)).double().expand(3, *family)
        for backend in ("native", "toy"):
            comparison = Comparison(choice.ENGINES[backend].begin)
            comparison.once(
                Exponents.of(torch.zeros(100, 2, dtype=dtype), torch.zeros(3).double(), means, U), Statistics()
            )
            assert comparison.failure is None


def test_each_kind_of_request_and_family_is_compared(monkeypatch):
    asked = []

    def begin(problem, request):
        asked.append((request, tuple(problem.U.shape[1:])))
        return Toy().begin(problem, request)

    comparison = Comparison(begin)
    for family in ("diag", "spherical"):
        problem = Exponents.of(*make_case(family, torch.float32, condition=10.0).arguments)
        for request in (Statistics(assignment="hard"), Statistics(torch.ones(300)), Statistics(), TopK(1), TopK(2)):
            comparison.once(problem, request)
    kinds = [TopK(1), Statistics(), TopK(2)]
    assert asked == [(kind, shape) for shape in ((3,), (1,)) for kind in kinds]


@pytest.mark.parametrize("engine", [param for param in ENGINES if "dense" not in param.id])
def test_every_compiled_engine_is_compared(engine, monkeypatch):
    backend, device = engine
    case, asked = make_case("full", torch.float32, condition=10.0, device=device), []
    monkeypatch.setattr(
        choice.ENGINES[backend]._comparison, "once", lambda *arguments: asked.append(type(arguments[1]))
    )
    reductions.logsumexp(*case.arguments, backend=backend)
    reductions.moments(*case.arguments, backend=backend)
    assert asked == [LogSumExp, Statistics]
    monkeypatch.setattr(choice.ENGINES[backend]._comparison, "failure", "its results are wrong")
    with pytest.warns(UserWarning, match="was requested but its results are wrong; using the dense engine"):
        assert reductions.engine(case.x, backend) == "dense"


@pytest.mark.parametrize("features", [1, 3, 8, 9, 32, 33, 200])
@pytest.mark.parametrize("full", [True, False])
def test_the_table_has_a_line_for_every_problem(features, full):
    for device in ("cpu", "cuda", "mps"):
        names = choice._preferred(device, full, features, "auto")
        assert names[-1] == "dense"
        assert set(names) <= set(choice.ENGINES)
        lines = [line for line in choice.TABLE if line.device == device and line.full == full]
        assert bool(lines) == (device != "mps")
        first = next((line for line in lines if features <= line.features), None)
        assert names == (("dense",) if first is None else first.engines)
    assert all(any(sign.isdigit() for sign in line.figure) for line in choice.TABLE)


def test_the_engine_of_a_fit_and_its_reason_are_reported(monkeypatch, caplog):
    monkeypatch.setitem(choice.ENGINES, "keops", Fragile("add"))
    s = scene("full", torch.float64, False, "cpu")
    fit = {"max_iter": 2, "verbose": False, "truncate": 0}
    start = gk.initialize(s.x, 3, "kmeans", generator=0)
    report = gk.fit(start, s.x, gk.EM(tol=0), **fit).report
    assert (report.engine, report.fallback) == ("native" if report.engine == "native" else "dense", None)
    with pytest.warns(UserWarning, match="The fragile engine was requested but it has lost its library; using"):
        report = gk.fit(start, s.x, gk.EM(tol=0), backend="keops", **fit).report
    assert report.engine == "dense"
    assert report.fallback == "The fragile engine was requested but it has lost its library"
    monkeypatch.setitem(choice.ENGINES, "keops", Toy())
    with caplog.at_level("INFO", "gmmkeops"):
        for _ in range(2):
            report = gk.fit(start, s.x, gk.EM(tol=0, assignment="stochastic"), backend="keops", **fit).report
    assert (report.engine, report.fallback) == ("dense", "the toy engine draws no labels")
    assert [line.message for line in caplog.records].count(
        "the toy engine draws no labels; using the dense engine."
    ) == 1
