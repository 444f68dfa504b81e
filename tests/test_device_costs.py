"""Kernels, host synchronizations and copies to the device of one iteration of a fit, and of one chunk of a source."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import replace

import fake_keops
import fake_triton
import pytest
import torch
from conftest import HAS_TRITON
from fake_device import CUDA, count_kernel, counted_apart, fake_device, on_device

import gmmkeops as gk
from gmmkeops.components import m_step, transferred
from gmmkeops.data import Batch
from gmmkeops.fitting import em as em_module
from gmmkeops.fitting import method as method_module
from gmmkeops.reductions import dispatch, native_unavailable
from gmmkeops.reductions import problem as problem_module
from gmmkeops.reductions.comparison import Comparison
from gmmkeops.reductions.dense import dense
from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.protocol import LogSumExp, PointGradient, Statistics, TopK
from gmmkeops.reductions.triton import engine, triton
from gmmkeops.reductions.truncation.passes import evaluate
from gmmkeops.reductions.truncation.tree import Cloud
from gmmkeops.reductions.truncation.truncation import Truncation

pytestmark = pytest.mark.filterwarnings(
    "ignore:Triton is the faster engine here", "ignore::gmmkeops.ConvergenceWarning"
)

METHODS = {
    "em": gk.EM,
    "em_accelerated": lambda **options: gk.EM(accelerate=True, **options),
    "em_hard": lambda **options: gk.EM(assignment="hard", **options),
    "adam": gk.Adam,
    "natural": lambda **options: gk.Adam(natural_gradient=True, **options),
    "variational": gk.bayes.VariationalBayes,
}
FAMILIES = ("full", "tied", "diag", "spherical")

PENALTIES = {
    "weights": gk.penalties.SqrtWeights(0.02) + gk.penalties.Dirichlet(1.5),
    "means": gk.penalties.NormalMean(torch.tensor([0.5, -1.0, 0.25]), 3.0) + gk.penalties.NormalMean(0.0, 2.0),
    "conjugate": gk.penalties.NormalInverseWishart(torch.ones(3), 2.0, 0.5, 5.0) + gk.penalties.SqrtWeights(0.02),
    "prunes": 420 * gk.penalties.Dirichlet(0.5),
}

# Kernels, synchronizations and copies to the device of an iteration with one pass, around its engine: the moments are packed and
# copied to the host. The parameters are copied to the device when the engine first uses them.
AROUND = {"kernels": 2, "synchronizations": 1, "uploads": 0}
# With weights, their sum.
WEIGHTED = AROUND | {"kernels": 3}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def points(dimensions=3):
    means = torch.tensor([[0.0, 0, 0], [5, 1, 0], [0, 6, 2]], dtype=torch.float64)
    x = means[torch.randint(3, (600,), generator=generator())]
    return (x + torch.randn(600, 3, generator=generator(1), dtype=torch.float64))[:, :dimensions]


def start(x, family="full"):
    """A mixture of three components about the first points."""
    variances = torch.ones(3, 3, dtype=torch.float64)
    covariances = {
        "full": torch.diag_embed(variances),
        "tied": torch.eye(3),
        "diag": variances,
        "spherical": variances[:, 0],
    }
    return gk.Mixture(
        weights=[0.5, 0.25, 0.25],
        means=x[[0, 10, 20]],
        covariances=covariances[family].double(),
        covariance_type=family,
    )


@contextlib.contextmanager
def device(monkeypatch, folder):
    """A fake device without KeOps; the counts around the engine, and those of the engine."""
    with fake_device(monkeypatch) as counts:
        fake_keops.install(monkeypatch, folder, reason="there is none on a device that does not exist")
        yield counts, counted_apart(monkeypatch, dispatch, "evaluate")


def of_an_iteration(counts, fit, numbers=(6, 10)):
    """The counts of a function of a number of iterations, for one of them; points may be regrouped after the first four."""
    found = []
    for steps in numbers:
        for each in counts:
            each.clear()
        fit(steps)
        found.append([each.totals for each in counts])
    print(f"{numbers[1]} iterations:", *(each.report(60) for each in counts), sep="\n")
    more = numbers[1] - numbers[0]
    return [{what: (late[what] - early[what]) / more for what in early} for early, late in zip(*found, strict=True)]


def check(costs, bounds):
    for what, bound in bounds.items():
        assert costs[what] <= bound, f"{what}: {costs[what]}, at most {bound}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_an_iteration_copies_moments_and_parameters_only(monkeypatch, tmp_path, name, family):
    x = points()
    with device(monkeypatch, tmp_path) as counts:
        mixture, there = start(x, family).to("cuda"), on_device(x)

        def fit(steps):
            found = gk.fit(mixture, there, METHODS[name](tol=0.0), max_iter=steps, backend="dense")
            assert found.mixture.means.is_cuda

        around, engine = of_an_iteration(counts, fit)
    passes = 3 if name == "em_accelerated" else 1
    check(around, {what: passes * bound for what, bound in AROUND.items()})
    # The dense engine is a reference; a compiled one needs fewer kernels, and no synchronization.
    check(engine, {"kernels": 70 * passes, "synchronizations": 2 * passes, "uploads": passes})


@pytest.mark.parametrize(
    ("name", "options", "bounds"),
    [
        ("em", {"dtype": "float32"}, AROUND),
        ("em", {"sample_weight": True}, WEIGHTED),
        ("em", {"penalty": gk.penalties.SqrtWeights(0.01)}, AROUND),
        ("em", {"penalty": gk.penalties.NormalInverseWishart(torch.ones(3), 2.0, 0.5, 5.0)}, AROUND),
        ("adam", {"dtype": "float32"}, AROUND),
        ("adam", {"sample_weight": True}, WEIGHTED),
        ("adam", {"penalty": gk.penalties.SqrtWeights(0.01) + gk.penalties.PrecisionRidge(0.1)}, AROUND),
        # The indices of the active components, and the mixture in units of the data if it is asked for.
        ("em", {"callback": lambda step: step.mixture}, AROUND | {"uploads": 6}),
        ("em", {"validation": 0.2}, {what: 2 * bound for what, bound in AROUND.items()}),
    ],
)
def test_options_cost_no_synchronization(monkeypatch, tmp_path, name, options, bounds):
    x = points()
    with device(monkeypatch, tmp_path) as counts:
        mixture, there = start(x).to("cuda"), on_device(x)
        if "sample_weight" in options:
            options = options | {
                "sample_weight": on_device(torch.rand(600, generator=generator(), dtype=torch.float64))
            }
        fit = lambda steps: gk.fit(mixture, there, METHODS[name](tol=0.0), max_iter=steps, backend="dense", **options)  # noqa: E731
        around, _ = of_an_iteration(counts, fit)
    check(around, bounds)


@pytest.mark.parametrize("name", ["em", "adam"])
def test_the_budget_holds_with_a_compiled_engine(monkeypatch, tmp_path, name):
    x = points()
    with fake_device(monkeypatch) as counts:
        fake_keops.install(monkeypatch, tmp_path)
        # A reduction is one kernel, whatever operations the stand-in performs for it.
        apart = counted_apart(monkeypatch, fake_keops.LazyTensor, "_reduced")
        mixture, there = start(x).to("cuda"), on_device(x)
        fit = lambda steps: gk.fit(mixture, there, METHODS[name](tol=0.0), max_iter=steps, backend="keops")  # noqa: E731
        costs, _ = of_an_iteration((counts, apart), fit)
    # The host waits for the rows that are far, and for the moments.
    check(costs, {"kernels": 40, "synchronizations": 2, "uploads": 1})


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.filterwarnings("ignore::gmmkeops.DegenerateWarning")
@pytest.mark.parametrize(
    ("name", "family", "options", "bounds"),
    [
        # Log-sum-exps, rows that are not far, zeros, moments, their total, the sum of the values and the largest one.
        ("em", "full", {}, (7, 1, 1)),
        ("em", "diag", {}, (7, 1, 1)),
        ("em", "tied", {}, (7, 1, 1)),
        ("em", "full", {"sample_weight": True}, (16, 1, 1)),
        # The parameters are copied to the device in float64, too.
        ("em_hard", "full", {}, (26, 2, 2)),
        ("adam", "spherical", {}, (7, 1, 1)),
    ],
)
def test_the_budget_holds_with_triton(monkeypatch, name, family, options, bounds):
    """Few points, since the interpreter takes milliseconds for each."""
    x = points().float()
    with fake_device(monkeypatch) as counts:
        fake_triton.install(monkeypatch)
        mixture, there = start(x.double(), family).to("cuda"), on_device(x[:48])
        if "sample_weight" in options:
            g = torch.rand(48, generator=generator(), dtype=torch.float64)
            options = options | {"sample_weight": on_device(g)}
        method = METHODS[name](tol=0.0)
        fit = lambda steps: gk.fit(mixture, there, method, max_iter=steps, backend="triton", truncate=0, **options)  # noqa: E731
        # The first evaluation is compared with the dense engine.
        fit(1)
        (costs,) = of_an_iteration((counts,), fit)
        assert sum(n for (what, _), n in counts.kernels.items() if what in ("logsumexps", "largest")) >= 8
    check(costs, dict(zip(AROUND, bounds, strict=True)))


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.filterwarnings("ignore::gmmkeops.DegenerateWarning")
@pytest.mark.parametrize(
    ("name", "family", "weighted"),
    [
        ("em", "full", True),
        ("em", "tied", False),
        ("em", "diag", False),
        ("em_hard", "spherical", True),
        ("adam", "full", False),
    ],
)
def test_a_fit_with_triton_is_that_on_the_host(monkeypatch, name, family, weighted):
    x = points()[:60].float()
    # Some distributions of weights leave a component without points.
    g = 0.5 + torch.rand(60, generator=generator(), dtype=torch.float64) if weighted else None
    method, mixture = METHODS[name](tol=0.0), start(x.double(), family)
    expected = gk.fit(mixture, x, method, max_iter=4, backend="dense", sample_weight=g)
    with fake_device(monkeypatch):
        fake_triton.install(monkeypatch)
        g = None if g is None else on_device(g)
        found = gk.fit(
            mixture.to("cuda"), on_device(x), method, max_iter=4, backend="triton", truncate=0, sample_weight=g
        )
        found, history = found.mixture.to("cpu"), found.history["objective"]
    torch.testing.assert_close(found.means, expected.mixture.means, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.covariances, expected.mixture.covariances, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.weights, expected.mixture.weights, rtol=1e-4, atol=1e-4)
    assert history == pytest.approx(expected.history["objective"], rel=1e-5)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_log_sum_exps_wait_for_few_parameters_once(monkeypatch):
    x = points()[:21].float()
    mixture = start(x.double())
    given = mixture.offsets, mixture.means, mixture.factor.U
    with fake_device(monkeypatch) as counts:
        fake_triton.install(monkeypatch)
        there = [on_device(part) for part in (x, *given)]
        options = {"backend": "triton", "truncate": 0}
        gk.reductions.logsumexp(*there, **options)
        counts.clear()
        found = gk.reductions.logsumexp(*there, **options)
        print(counts.report())
        # One wait for points and parameters, and one for the numbers that decide about far rows.
        check(counts.totals, {"kernels": 9, "synchronizations": 2, "uploads": 1})
        found = found.cpu()
        for name, broken in (("means", 1), ("factor", 2), ("offsets", 0)):
            wrong = list(given)
            wrong[broken] = wrong[broken].clone()
            wrong[broken].view(-1)[-1] = torch.nan
            with pytest.raises(ValueError, match=name):
                gk.reductions.logsumexp(there[0], *map(on_device, wrong), **options)
        for number in (torch.nan, torch.inf):
            wrong_points = x.clone()
            wrong_points[7, 1] = number
            with pytest.raises(ValueError, match=r"x must be finite, got .* at row 7, column 1"):
                gk.reductions.logsumexp(on_device(wrong_points), *there[1:], **options)
        # The sum of finite points may be beyond the range of float32.
        large = on_device(torch.full_like(x, 3e38))
        assert gk.reductions.logsumexp(large, *there[1:], **options).shape == (21,)
    torch.testing.assert_close(found, gk.reductions.logsumexp(x, *given, backend="dense"), rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("family", ["full", "diag", "spherical"])
def test_triton_packs_parameters_on_either_device(monkeypatch, family):
    x = points()
    mixture = start(x, family)
    x, g = x[:20].float(), torch.randn(20, generator=generator(), dtype=torch.float64)
    x[3] = 1e6
    given = mixture.offsets.double(), mixture.means + 1e-9, mixture.factor.U
    requests = LogSumExp(), Statistics(), Statistics(g), PointGradient(g), Statistics(g, assignment="hard"), TopK(2)
    expected = [evaluate(dense, Exponents.of(x, *given), request) for request in requests]
    with fake_device(monkeypatch):
        fake_triton.install(monkeypatch)
        there, on_gpu = on_device(x), on_device(g)
        problems = [Exponents.of(Batch(there), *given), *[Exponents.of(there, *map(on_device, given))] * 2]
        assert all(problem.host is not None for problem in problems)
        results = []
        for problem, many in zip(problems, (10_000, 10_000, 0), strict=True):
            monkeypatch.setattr(engine, "_MANY", many)
            monkeypatch.setattr(problem_module, "_SERIAL", many)
            for request in requests:
                moved = replace(request, weights=on_gpu) if getattr(request, "weights", None) is not None else request
                results.append([part.cpu() for part in evaluate(triton, problem, moved)])
    count = len(requests)
    for first, same, other, truths in zip(results, results[count:], results[2 * count :], expected, strict=False):
        for part, copied, packed, truth in zip(first, same, other, truths, strict=True):
            assert torch.equal(part, copied)
            torch.testing.assert_close(part, packed, rtol=1e-6, atol=1e-5)
            torch.testing.assert_close(part.double(), truth.double(), rtol=1e-5, atol=2e-5)


def clusters(rows):
    """Points in clusters that are far from one another, and parameters of eight components with most pairs negligible."""
    centers = 40.0 * torch.arange(8, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3, 0.0])
    x = centers[torch.arange(rows) % 8] + torch.randn(rows, 3, generator=generator(), dtype=torch.float64)
    U = torch.eye(3, dtype=torch.float64).expand(8, 3, 3) * torch.linspace(0.5, 1, 8)[:, None, None]
    return x.float(), (torch.linspace(-1, 0, 8, dtype=torch.float64), centers, U)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize(("rows", "levels"), [(32, 1), (16, 2)])
@pytest.mark.parametrize("weighted", [False, True])
def test_candidate_lists_with_triton_wait_twice(monkeypatch, rows, levels, weighted):
    x, given = clusters(200)
    g = torch.rand(200, generator=generator(), dtype=torch.float64) if weighted else None
    expected = evaluate(dense, Exponents.of(x, *given), Statistics(g))
    with fake_device(monkeypatch) as counts:
        fake_triton.install(monkeypatch)
        blocks = Truncation(Cloud.tree(on_device(x), rows), 1e-6)
        problem, blocks = dispatch.setup(blocks, *given, None)
        weights = blocks.cloud.enter(torch.ones_like(problem.x[:200, 0]).double() if g is None else on_device(g))
        weights = weights if weighted or len(problem.x) > 200 else None
        evaluate(triton, problem, Statistics(weights), blocks)
        counts.clear()
        found = evaluate(triton, problem, Statistics(weights), blocks)
        assert blocks.share < 0.5
        assert len(blocks.cloud.levels) == levels
        print(counts.report(50))
        # A kernel and a sum for each level; the sizes of the lists are read, and the check of the lists.
        check(
            counts.totals,
            {"kernels": (24 if weights is None else 26) + 2 * levels, "synchronizations": 2, "uploads": 1},
        )
        found = [part.cpu() for part in found]
    for part, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(part, truth, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.filterwarnings("ignore::gmmkeops.DegenerateWarning")
@pytest.mark.parametrize("name", ["em", "adam"])
def test_the_budget_holds_with_triton_and_lists(monkeypatch, name):
    x, (_, centers, _) = clusters(104)
    # Leaves of few points, since the interpreter takes milliseconds for each.
    tree = Cloud.tree.__func__
    monkeypatch.setattr(Cloud, "tree", classmethod(lambda cls, x, rows: tree(cls, x, 13)))
    options = {"truncate": 1e-6, "backend": "triton"}
    covariances = torch.eye(3).expand(8, 3, 3)
    start = gk.Mixture(weights=torch.ones(8) / 8, means=centers, covariances=covariances, covariance_type="full")
    method = METHODS[name](tol=0.0)
    expected = gk.fit(start, x, method, max_iter=4, backend="dense", truncate=0)
    with fake_device(monkeypatch) as counts:
        fake_triton.install(monkeypatch)
        mixture, there = start.to("cuda"), on_device(x)
        gk.fit(mixture, there, method, max_iter=1, **options)
        results = []
        fit = lambda steps: results.append(gk.fit(mixture, there, method, max_iter=steps, **options))  # noqa: E731
        (costs,) = of_an_iteration((counts,), fit, (2, 4))
        assert sum(n for (what, _), n in counts.kernels.items() if what == "refine") >= 4
        assert results[1].report.evaluated_fraction < 0.5
        objective = results[1].history["objective"]
    check(costs, {"kernels": 40, "synchronizations": 2, "uploads": 2})
    # Adam divides gradients by their sizes, so that rounding errors of small ones are enlarged.
    assert objective == pytest.approx(expected.history["objective"], rel=1e-5 if name == "em" else 1e-4)


def test_tensors_of_several_dtypes_are_copied_in_one_transfer(monkeypatch):
    given = [torch.arange(6.0)[::2], torch.rand(2, 2).double().T, torch.tensor([7]), torch.empty(0), torch.tensor(2.0)]
    given.append(torch.ones(1).expand(3))
    with fake_device(monkeypatch) as counts:
        found = transferred(given, CUDA)
        assert counts.totals == {"kernels": 0, "synchronizations": 0, "uploads": 1}
        found = transferred(found, torch.device("cpu"))
    for one, other in zip(given, found, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["em", "adam"])
def test_a_minibatch_costs_no_more_than_a_pass(monkeypatch, tmp_path, name):
    x = points()
    with device(monkeypatch, tmp_path) as counts:
        mixture, there = start(x).to("cuda"), on_device(x)
        method = METHODS[name](tol=0.0, batch_size=100)
        fit = lambda steps: gk.fit(mixture, there, method, max_iter=steps, backend="dense")  # noqa: E731
        around, _ = of_an_iteration(counts, fit)
    # Six batches, of which each selects its rows, and the permutation of the rows, with its seed and the first rows of batches.
    check(around, {"kernels": 6 * 3 + 6, "synchronizations": 6 + 2, "uploads": 6})


def test_steps_of_a_stream_copy_moments_and_parameters_only(monkeypatch, tmp_path):
    x = points()
    with device(monkeypatch, tmp_path) as (counts, _):
        mixture, there = start(x).to("cuda"), on_device(x)
        mixture, memory = gk.EM().update(mixture, there, backend="dense")
        assert mixture.means.is_cuda
        assert memory[0].S2.is_cuda
        counts.clear()
        gk.EM().update(mixture, there, memory, backend="dense")
        gk.EM().maximize(mixture, memory[0])
        places = {where.split(":")[0] for _, where in counts.kernels}
    # No operation of the M-step.
    assert not places & {"components/m_step.py", "components/moments.py", "components/full.py", "fitting/em.py"}
    assert counts.totals["synchronizations"] <= 18


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_search_for_an_initial_mixture_climbs_on_the_cpu(monkeypatch, tmp_path, dtype):
    with device(monkeypatch, tmp_path) as (counts, _):
        there = on_device(points().to(dtype))
        counts.clear()
        assert gk.initialize(there, 3, generator=generator()).means.is_cuda
        places = {where.split(":")[0] for _, where in counts.kernels}
    assert not places & {"components/m_step.py", "fitting/em.py"}


# Kernels and synchronizations around the engine if there are many parameters, which gradient methods have on the device.
MANY = {"kernels": 40, "synchronizations": 2, "uploads": 1}


def with_many_parameters(monkeypatch):
    """Let few parameters be treated as many ones are."""
    monkeypatch.setattr(method_module, "_FEW", 1)
    monkeypatch.setattr(problem_module, "_SERIAL", 0)


@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"sample_weight": True}], ids=["", "float32", "weights"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["em", "em_accelerated", "em_hard", "adam", "natural"])
def test_the_budget_holds_for_many_parameters(monkeypatch, tmp_path, name, family, options):
    x = points()
    with_many_parameters(monkeypatch)
    with device(monkeypatch, tmp_path) as counts:
        mixture, there = start(x, family).to("cuda"), on_device(x)
        if "sample_weight" in options:
            options = {"sample_weight": on_device(torch.rand(600, generator=generator(), dtype=torch.float64))}
        fit = lambda steps: gk.fit(mixture, there, METHODS[name](tol=0.0), max_iter=steps, backend="dense", **options)  # noqa: E731
        around, _ = of_an_iteration(counts, fit)
    passes = 3 if name == "em_accelerated" else 1
    check(around, {what: passes * bound for what, bound in (MANY if name in ("adam", "natural") else AROUND).items()})


@pytest.mark.parametrize("family", ["full", "diag"])
def test_the_budget_of_adam_holds_with_a_penalty_on_the_weights(monkeypatch, tmp_path, family):
    x = points()
    with_many_parameters(monkeypatch)
    with device(monkeypatch, tmp_path) as counts:
        mixture, there = start(x, family).to("cuda"), on_device(x)
        options = {"penalty": gk.penalties.SqrtWeights(0.02), "backend": "dense"}
        fit = lambda steps: gk.fit(mixture, there, gk.Adam(tol=0.0), max_iter=steps, **options)  # noqa: E731
        around, _ = of_an_iteration(counts, fit)
    check(around, MANY)


@pytest.mark.parametrize("penalty", ["weights", "means", "conjugate"])
def test_penalties_cost_em_nothing_for_many_parameters(monkeypatch, tmp_path, penalty):
    x = points()
    with_many_parameters(monkeypatch)
    with device(monkeypatch, tmp_path) as counts:
        mixture, there = start(x).to("cuda"), on_device(x)
        options = {"penalty": PENALTIES[penalty], "backend": "dense"}
        fit = lambda steps: gk.fit(mixture, there, gk.EM(tol=0.0), max_iter=steps, **options)  # noqa: E731
        around, _ = of_an_iteration(counts, fit)
    check(around, AROUND)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_a_fit_on_the_device_is_that_on_the_host(monkeypatch, tmp_path, name, family, many):
    x = points()
    method = METHODS[name](tol=0.0)
    expected = gk.fit(start(x, family), x, method, max_iter=6, backend="dense")
    if many:
        with_many_parameters(monkeypatch)
    with device(monkeypatch, tmp_path):
        found = gk.fit(start(x, family).to("cuda"), on_device(x), method, max_iter=6, backend="dense")
        mixture = found.mixture.to("cpu")
    assert torch.allclose(mixture.means, expected.mixture.means, rtol=1e-10, atol=1e-10)
    assert torch.allclose(mixture.weights, expected.mixture.weights, rtol=1e-10)
    assert torch.allclose(mixture.covariances, expected.mixture.covariances, rtol=1e-10, atol=1e-10)
    assert found.history["objective"] == pytest.approx(expected.history["objective"], rel=1e-10)
    assert found.report.pruned_components == expected.report.pruned_components


def equal_fits(found, expected):
    mixture = found.mixture.to("cpu")
    for name in ("means", "weights", "covariances"):
        torch.testing.assert_close(getattr(mixture, name), getattr(expected.mixture, name), rtol=1e-9, atol=1e-9)
    assert found.history["objective"] == pytest.approx(expected.history["objective"], rel=1e-9)
    assert found.history["active"] == expected.history["active"]
    assert found.report.pruned_components == expected.report.pruned_components
    assert found.report.dtype == expected.report.dtype


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("natural", [False, True])
def test_gradient_steps_on_the_device_prune_as_on_the_host(monkeypatch, tmp_path, natural, family):
    # The weight of the last component decreases in every step, and is negligible after some of them.
    x, method = points(), gk.Adam(0.3, natural_gradient=natural)
    mixture = start(x, family)
    means = torch.cat([mixture.means[:2], torch.full((1, 3), 30.0).double()])
    mixture = gk.Mixture(torch.tensor([0.0, 0.0, -11.0]).double(), means, mixture.factor)
    options = {"max_iter": 20, "backend": "dense", "penalty": gk.penalties.SqrtWeights(0.1)}
    expected = gk.fit(mixture, x, method, **options)
    assert [expected.history["active"][t] for t in (3, -1)] == [3, 2]
    with_many_parameters(monkeypatch)
    with device(monkeypatch, tmp_path):
        equal_fits(gk.fit(mixture.to("cuda"), on_device(x), method, **options), expected)


@pytest.mark.filterwarnings("ignore::gmmkeops.DegenerateWarning")
@pytest.mark.parametrize("floor", [None, 0.3], ids=["refines", "bounds"])
@pytest.mark.parametrize("family", ["full", "diag", "spherical"])
def test_gradient_steps_on_the_device_refine_points_or_bound_covariances(monkeypatch, tmp_path, family, floor):
    # A component of equal points becomes too narrow for float32 points, or for the bound.
    x = points()
    x = torch.cat([x, x.new_full((50, 3), 9.0)]).float()
    mixture = start(x.double(), family)
    mixture = gk.Mixture(mixture.logits, torch.cat([mixture.means[:2], x[-1:].double()]), mixture.factor)
    penalty = None if floor is None else gk.penalties.EigenvalueFloor(floor)
    method, options = gk.Adam(1.0), {"max_iter": 45, "backend": "dense", "penalty": penalty}
    expected = gk.fit(mixture, x, method, **options)
    assert bool(expected.report.regularized_components) == (floor is not None)
    assert expected.report.dtype == ("float64" if floor is None else "float32")
    with_many_parameters(monkeypatch)
    with device(monkeypatch, tmp_path):
        equal_fits(gk.fit(mixture.to("cuda"), on_device(x), method, **options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("natural", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gradient_fit_on_the_device_resumes_bit_by_bit(monkeypatch, tmp_path, family, natural, dtype):
    x, method = points().to(dtype), gk.Adam(0.1, natural_gradient=natural)
    options = {"backend": "dense", "penalty": gk.penalties.SqrtWeights(0.1)}
    mixture = start(x.double(), family)
    # The last component is pruned in the fifth iteration.
    logits = torch.tensor([0.0, 0.0, -12.2], dtype=torch.float64)
    mixture = gk.Mixture(logits, torch.cat([mixture.means[:2], mixture.means[2:] + 50]), mixture.factor)
    with_many_parameters(monkeypatch)
    with device(monkeypatch, tmp_path):
        fit = lambda steps, **more: gk.fit(mixture.to("cuda"), on_device(x), method, max_iter=steps, **options, **more)  # noqa: E731
        expected = fit(8)
        for steps in (2, 4, 5, 6, 8):
            found = fit(steps, checkpoint=tmp_path / "fit")
        one, other = expected.mixture.to("cpu"), found.mixture.to("cpu")
    assert found.history["objective"] == expected.history["objective"]
    assert found.history["active"] == expected.history["active"]
    assert expected.history["active"][-1] == 2
    assert torch.equal(one.means, other.means)
    assert torch.equal(one.covariances, other.covariances)


def test_a_gradient_fit_resumes_on_another_device(monkeypatch, tmp_path):
    x, method = points(), gk.Adam()
    options = {"backend": "dense", "checkpoint": tmp_path / "fit"}
    expected = gk.fit(start(x), x, method, max_iter=6, backend="dense")
    with_many_parameters(monkeypatch)
    gk.fit(start(x), x, method, max_iter=2, **options)
    with device(monkeypatch, tmp_path) as (counts, _):
        gk.fit(start(x).to("cuda"), on_device(x), method, max_iter=4, **options)
        assert sum(n for (what, _), n in counts.kernels.items() if what == "_fused_adam_") == 2
    equal_fits(gk.fit(start(x), x, method, max_iter=6, **options), expected)


@pytest.mark.parametrize("frozen", [None, "frozen_weights", "frozen_means", "frozen_covariances"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_library_maximizes_with_penalties(monkeypatch, tmp_path, penalty, family, frozen):
    x, steps = points(), []
    method = gk.EM(tol=0.0, **({} if frozen is None else {frozen: True}))
    options = {
        "max_iter": 6,
        "backend": "dense",
        "penalty": PENALTIES[penalty],
        "sample_weight": 0.5 + x[:, 0].sigmoid(),
    }
    expected = gk.fit(start(x, family), x, method, **options)
    monkeypatch.setattr(em_module, "m_step", lambda *args, **more: steps.append(args) or m_step(*args, **more))
    with device(monkeypatch, tmp_path):
        options["sample_weight"] = on_device(options["sample_weight"])
        found = gk.fit(start(x, family).to("cuda"), on_device(x), method, **options)
        mixture = found.mixture.to("cpu")
    for name in ("means", "weights", "covariances"):
        torch.testing.assert_close(getattr(mixture, name), getattr(expected.mixture, name), rtol=1e-10, atol=1e-10)
    assert found.history["objective"] == pytest.approx(expected.history["objective"], rel=1e-10)
    pruned = found.report.pruned_components
    assert pruned == expected.report.pruned_components
    assert bool(pruned) == (penalty == "prunes" and frozen != "frozen_weights")
    # The M-step of torch is needed only after components have been pruned.
    assert bool(steps) <= bool(pruned)


@pytest.mark.parametrize("name", ["em", "adam", "variational"])
def test_a_resumed_fit_costs_the_same(monkeypatch, tmp_path, name):
    x = points()
    with device(monkeypatch, tmp_path) as counts:
        mixture, there = start(x).to("cuda"), on_device(x)
        fit = lambda steps: gk.fit(  # noqa: E731
            mixture, there, METHODS[name](tol=0.0), max_iter=steps, backend="dense", checkpoint=tmp_path / "fit"
        )
        fit(2)
        counts[0].clear()
        fit(6)
    of_iterations = sum(
        n for (_, where), n in counts[0].kernels.items() if where.startswith(("fitting/em", "components/m"))
    )
    assert of_iterations == 0
    # Four iterations, and the evaluation of the result.
    transfers = [
        n for (what, where), n in counts[0].synchronizations.items() if where.startswith("components/transfer")
    ]
    assert sum(transfers) <= 5 + 2


def test_penalties_and_methods_of_the_user_receive_tensors_of_the_device(monkeypatch, tmp_path):
    x = points()

    class Ridge(gk.penalties.Dirichlet):
        def __call__(self, mixture, points=1.0):
            assert mixture.means.is_cuda
            return super().__call__(mixture, points)

        def m_step(self, mixture, points):
            assert mixture.means.is_cuda
            return super().m_step(mixture, points)

    def of_means(mixture):
        assert mixture.means.is_cuda
        return mixture.means.square().sum()

    def sgd(tensors):
        tensors = list(tensors)
        assert all(tensor.is_cuda for tensor in tensors)
        return torch.optim.SGD(tensors, lr=0.01)

    with device(monkeypatch, tmp_path):
        mixture, there = start(x).to("cuda"), on_device(x)
        options = {"max_iter": 2, "backend": "dense"}
        gk.fit(mixture, there, gk.EM(), penalty=2 * (Ridge(2.0) + gk.penalties.SqrtWeights(0.1)), **options)
        gk.fit(mixture, there, gk.Adam(), penalty=of_means, **options)
        gk.fit(mixture, there, gk.Gradient(sgd), **options)


def test_callbacks_receive_tensors_of_the_device(monkeypatch, tmp_path):
    x, seen = points(), []

    def callback(step):
        seen.append((step.active.device.type, step.mixture.means.device.type, step.mixture.factor.device.type))

    with device(monkeypatch, tmp_path):
        gk.fit(start(x).to("cuda"), on_device(x), gk.EM(), max_iter=2, backend="dense", callback=callback)
    assert seen == [("cuda", "cuda", "cuda")] * 2


def test_chunks_of_a_source_are_copied_from_page_locked_memory(monkeypatch, tmp_path):
    x = points()
    with device(monkeypatch, tmp_path) as counts:
        mixture, source = start(x).to("cuda"), gk.Source(x.numpy(), chunk_rows=200)
        waited = torch.cuda.current_stream().waited
        gk.fit(mixture, source, gk.EM(tol=0.0), max_iter=8, backend="dense")
        # The thread that loads the chunks runs at any time.
        uploads, synchronizations = (
            sum((getattr(each, what) for each in counts), start=Counter()) for what in ("uploads", "synchronizations")
        )
    # Nine passes over three chunks, the last pass for the result. Chunks are copied from page-locked memory only.
    place = lambda counter, what: sum(n for (name, where), n in counter.items() if what in (name, where.split(":")[0]))  # noqa: E731
    assert place(uploads, "fitting/data.py") == place(uploads, "copy from page-locked memory") == 9 * 3
    # The kernels of each chunk wait for its copy, and the host waits for the moments of the chunk only.
    assert len(waited) == len(set(map(id, waited))) == 9 * 3
    assert place(synchronizations, "components/transfer.py") <= 9 * 3 + 1
    assert place(synchronizations, "fitting/data.py") == place(synchronizations, "fitting/frame.py") - 1 == 0


needs_digits = pytest.mark.skipif(
    not HAS_TRITON or native_unavailable() is not None, reason="Triton is not installed, or the library is not compiled"
)


def groups(rows, components, features):
    """Points in groups about components that are far from one another, and a spherical mixture of them."""
    means = 3.0 * torch.randn(components, features, generator=generator(), dtype=torch.float64)
    noise = torch.randn(rows, features, generator=generator(1), dtype=torch.float64)
    x = (means[torch.arange(rows) % components] + noise).float()
    weights, variances = torch.ones(components) / components, torch.ones(components).double()
    return x, gk.Mixture(weights=weights.double(), means=means, covariances=variances, covariance_type="spherical")


# Kernels of an iteration: split, log-sum-exps, moments and their total; rows that are not far, zeros, sum and largest value. With
# weights: their extreme sizes, their quotients, and log-densities.
DIGITS, WEIGHTED_DIGITS = (8, 1, 1), (26, 1, 1)


@needs_digits
@pytest.mark.filterwarnings("ignore::gmmkeops.DegenerateWarning")
@pytest.mark.parametrize(("weighted", "bounds"), [(False, DIGITS), (True, WEIGHTED_DIGITS)])
def test_the_budget_holds_with_products_of_digits(monkeypatch, weighted, bounds):
    x, mixture = groups(96, 16, 128)
    g = 0.5 + torch.rand(96, generator=generator(), dtype=torch.float64) if weighted else None
    # Frozen covariances remain wide enough for digits.
    method = gk.EM(tol=0.0, frozen_covariances=True)
    expected = gk.fit(mixture, x, method, max_iter=3, backend="dense", sample_weight=g)
    with fake_device(monkeypatch) as counts:
        fake_triton.install(monkeypatch)
        options = {"backend": "triton", "truncate": 0, "sample_weight": None if g is None else on_device(g)}
        there, results = on_device(x), []
        mixture = mixture.to("cuda")
        fit = lambda steps: results.append(gk.fit(mixture, there, method, max_iter=steps, **options))  # noqa: E731
        # The first evaluation is compared with the dense engine.
        fit(1)
        (costs,) = of_an_iteration((counts,), fit, (1, 3))
        assert sum(n for (what, _), n in counts.kernels.items() if what == "split") >= 3
        found = results[-1].mixture.to("cpu")
    check(costs, dict(zip(AROUND, bounds, strict=True)))
    torch.testing.assert_close(found.means, expected.mixture.means, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.weights, expected.mixture.weights, rtol=1e-5, atol=1e-6)


def without_arithmetic(monkeypatch):
    """Let kernels of digits return the sums of components that remain as they are, since the interpreter would take minutes."""

    def launched(kernel, grid):
        def run(*arguments, **constants):
            count_kernel(kernel._name)
            held = [part.held if isinstance(part, torch.Tensor) else part for part in arguments]
            with torch.utils._python_dispatch._disable_current_modes():
                if kernel._name == "logsumexps":
                    held[4].fill_(-100.0)
                elif kernel._name == "moments":
                    digits, part, rows, K, chunks = held[2], held[7], held[8], held[9], grid[1]
                    means = -0.5 * digits.double().sum(0)[:K]
                    each = 2.0**14 * rows / K / chunks
                    sums = torch.cat([means * each, torch.full((K, 1), each), torch.zeros(K, 3)], 1)
                    part[: chunks * K] = sums.float().repeat(chunks, 1)
                elif kernel._name == "add_partial_sums":
                    held[1].add_(held[0].reshape(held[5], -1).double().sum(0))

        return run

    monkeypatch.setattr(fake_triton._Kernel, "__getitem__", launched)
    monkeypatch.setattr(Comparison, "once", lambda *_: None)


@needs_digits
@pytest.mark.parametrize("components", [1024, 6000])
def test_the_budget_holds_for_many_parameters_of_digits(monkeypatch, components):
    x, mixture = groups(4 * components, components, 128)
    with fake_device(monkeypatch) as counts:
        fake_triton.install(monkeypatch)
        without_arithmetic(monkeypatch)
        mixture, there = mixture.to("cuda"), on_device(x)
        method = gk.EM(tol=0.0)
        fit = lambda steps: gk.fit(mixture, there, method, max_iter=steps, backend="triton", truncate=0)  # noqa: E731
        (costs,) = of_an_iteration((counts,), fit, (1, 3))
        assert sum(n for (what, _), n in counts.kernels.items() if what == "split") >= 3
    # Moments are computed in several pieces.
    kernels = DIGITS[0] if components == 1024 else 40
    check(costs, dict(zip(AROUND, (kernels, *DIGITS[1:]), strict=True)))


@needs_digits
@pytest.mark.parametrize(("components", "bounds"), [(1024, (12, 3, 1)), (4000, (125, 6, 0))])
def test_log_sum_exps_of_digits_wait_for_parameters_once(monkeypatch, components, bounds):
    """Parameters on the device are copied to the CPU, unless there are very many."""
    x, mixture = groups(500, components, 128)
    with fake_device(monkeypatch) as counts:
        fake_triton.install(monkeypatch)
        without_arithmetic(monkeypatch)
        given = [on_device(part) for part in (x, mixture.offsets, mixture.means, mixture.factor.U)]
        gk.reductions.logsumexp(*given, backend="triton", truncate=0)
        counts.clear()
        gk.reductions.logsumexp(*given, backend="triton", truncate=0)
        print(counts.report(60))
        check(counts.totals, dict(zip(AROUND, bounds, strict=True)))


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_a_mixture_keeps_its_parameters_until_they_change(monkeypatch):
    x = points()[:21].float()
    with fake_device(monkeypatch) as counts:
        fake_triton.install(monkeypatch)
        mixture, there = start(x.double()).to("cuda"), on_device(x)
        options = {"backend": "triton", "truncate": 0}

        def check_densities():
            found = mixture.log_prob(there, **options)
            torch.testing.assert_close(
                found.cpu(), mixture.to("cpu").log_prob(x, backend="dense"), rtol=1e-5, atol=1e-5
            )

        check_densities()
        counts.clear()
        mixture.log_prob(there, **options)
        print(counts.report())
        # Waits for the comparison of the parameters, for the range of the points, and for the numbers that decide about far rows.
        check(counts.totals, {"kernels": 15, "synchronizations": 3, "uploads": 1})
        mixture.means.data[1, 0] += 2.0
        check_densities()
        with torch.no_grad():
            mixture.logits.copy_(on_device(torch.tensor([0.0, 1.0, 2.0])))
        check_densities()
        # The parameters are replaced by others, which have the same numbers in other shapes.
        one = gk.Mixture(
            weights=torch.ones(4) / 4,
            means=torch.arange(4.0)[:, None],
            covariances=torch.eye(1),
            covariance_type="tied",
        )
        other = one.to("cuda")
        single = on_device(x[:, :1].contiguous())
        other.log_prob(single, **options)
        numbers = torch.cat([one.logits, one.means[:, 0], one.factor.tensors["log_diagonal"].view(-1)])
        other.logits, other.means = on_device(numbers[:3]), on_device(numbers[3:6, None])
        other.factor = other.factor.replace(
            log_diagonal=on_device(numbers[6:, None]), upper=on_device(torch.empty(3, 0))
        )
        expected = gk.Mixture(numbers[:3], numbers[3:6, None], gk.FullFactor(numbers[6:, None], torch.empty(3, 0)))
        torch.testing.assert_close(
            other.log_prob(single, **options).cpu(), expected.log_prob(x[:, :1], backend="dense"), rtol=1e-5, atol=1e-5
        )
