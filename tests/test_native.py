"""The native engine: every instruction set against float64 oracles, its accuracy, and its behavior as a library."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAMILIES, interrupted, make_case

from gmmkeops import reductions
from gmmkeops.components import FullFactor
from gmmkeops.reductions import choice, library
from gmmkeops.reductions.native import engine, native
from gmmkeops.reductions.problem import Exponents

pytestmark = pytest.mark.skipif(reductions.native_unavailable() is not None, reason="the native engine is not compiled")

ROOT = Path(__file__).parent.parent
SETS = [name for name, number in library._SETS.items() if library._library().gmmkeops_supports(number)]
NATIVE = {"backend": "native", "truncate": 0}


@pytest.fixture(params=SETS)
def instructions(request, monkeypatch):
    """Each instruction set of this machine, in full covariances of any dimension."""
    monkeypatch.setenv("GMMKEOPS_ISA", request.param)
    monkeypatch.setattr(engine, "_MANY", 1 << 30)
    assert reductions.instruction_set() == request.param


def error(found, expected, scale=None):
    """Largest error: relative to the largest entry of ``scale``, or to max(1, |expected|) for each entry."""
    away = (found.double() - expected).abs()
    return float(
        (away / expected.abs().clamp(min=1)).max()
        if scale is None
        else away.max() / scale.abs().max().clamp(min=1e-300)
    )


def check(case, g, tolerance, **options):
    """Compare every request with the oracle; sums are compared with those of the absolute weights."""
    x, *parameters = case.arguments
    signed, absolute, k = case.oracle(g), case.oracle(g.abs()), min(3, len(case.means))
    largest = signed["e"].topk(k).values
    found = {"values": error(reductions.logsumexp(*case.arguments, **options), signed["values"])}
    sums = reductions.moments(*case.arguments, weights=g, **options)
    for name in ("S0", "S1", "S2"):
        found[name] = error(getattr(sums, name), signed[name], absolute[name])
    # Log-sum-exps of both signs cancel.
    found["total"] = error(sums.total, signed["total"], (g.abs() * signed["values"].abs().clamp(min=1)).sum())
    labels = reductions.argmax(*case.arguments, **options)
    found["labels"] = error(signed["e"].gather(1, labels[:, None])[:, 0], largest[:, 0])
    exponents, components = reductions.topk(*case.arguments, k, **options)
    found["top"] = max(error(exponents, largest), error(signed["e"].gather(1, components), largest))
    points = x.clone().requires_grad_()
    reductions.total(points, *parameters, weights=g, **options).backward()
    found["gradient"] = error(points.grad, signed["gradient"], absolute["gradient"])
    assert {name: value for name, value in found.items() if not value <= tolerance} == {}


def check_values(case, tolerance, **options):
    """Compare log-sum-exps, relative to max(1, |ℓ|, |c|): the quadratic form that the offset c of the likeliest component
    cancels cannot be more accurate than the numbers that it is computed with."""
    truth = case.oracle()
    size = case.offsets.double()[truth["e"].argmax(1)].abs()
    away = (reductions.logsumexp(*case.arguments, **options).double() - truth["values"]).abs()
    assert float((away / torch.maximum(size, truth["values"].abs()).clamp(min=1)).max()) <= tolerance


def random_case(number):
    """A problem of random sizes, of which few are multiples of a vector or of a block."""
    generator = np.random.default_rng(number)
    dtype = (torch.float32, torch.float64)[number % 2]
    D = int(generator.choice([1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 16, 17, 33]))
    sizes = {
        "N": int(generator.choice([1, 7, 15, 16, 17, 63, 65, 300, 513, 700])),
        "K": int(generator.integers(1, 40)),
        "D": D,
    }
    family = FAMILIES[int(generator.integers(len(FAMILIES)))]
    spread = float(generator.choice([0.5, 2.0, 20.0]))
    case = make_case(
        family, dtype, condition=float(generator.choice([2.0, 50.0, 1e3])), seed=number, spread=spread, **sizes
    )
    return case, torch.as_tensor(generator.standard_normal(sizes["N"])) * 10 ** generator.uniform(-6, 6)


def check_random(numbers):
    for number in numbers:
        case, g = random_case(number)
        check(case, g, 4e-5 if case.x.dtype == torch.float32 else 1e-9, **NATIVE)
        # Without fused multiplications and additions, products are rounded once more.
        single = 5e-6 if reductions.instruction_set() == "base" else 3e-6
        check_values(case, single if case.x.dtype == torch.float32 else 1e-12, **NATIVE)


@pytest.mark.parametrize("first", range(0, 500, 100))
def test_random_problems(first, instructions):
    check_random(range(first, first + 100))


@pytest.mark.slow
def test_ten_thousand_random_problems(instructions):
    check_random(range(500, 10_000))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lists(dtype, family, instructions):
    """Lists of few components leave out most pairs, and their lengths are no multiples of a block."""
    case = make_case(family, dtype, N=6000, K=40, D=2, condition=10.0, spread=20.0)
    g = torch.randn(6000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    check(case, g, 4e-5 if dtype == torch.float32 else 1e-9, backend="native", truncate=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_assignments(dtype, instructions):
    # Components of this condition are evaluated in float64 though points are float32.
    case = make_case("full", dtype, N=3000, K=6, D=5, condition=1e4)
    e, g = case.oracle()["e"], torch.rand(3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = e.argmax(1)
    hard = reductions.moments(*case.arguments, weights=g, assignment="hard", **NATIVE)
    z = case.x.double() - case.means.double()[labels]
    for k in range(6):
        own = labels == k
        assert torch.allclose(hard.S0[k], g[own].sum(), rtol=1e-12)
        assert torch.allclose(hard.S1[k], g[own] @ z[own], atol=1e-3)
        assert torch.allclose(hard.S2[k], (g[own, None] * z[own]).mT @ z[own], atol=1e-3)
    assert torch.allclose(hard.total, g @ e.amax(1), rtol=1e-5)

    case = make_case("full", dtype, N=3000, K=6, D=5, condition=100.0, spread=0.7)
    r, count = case.oracle()["e"].softmax(1), 40
    drawn = torch.stack(
        [reductions.moments(*case.arguments, assignment="stochastic", seed=s, **NATIVE).S0 for s in range(count)]
    )
    assert bool((drawn.sum(1) == 3000).all())
    # The mean of independent counts; five standard errors.
    assert bool(((drawn.mean(0) - r.sum(0)).abs() <= 5 * ((r * (1 - r)).sum(0) / count).sqrt()).all())
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("condition", [1e3, 1e6])
@pytest.mark.parametrize("D", [3, 10])
def test_float32_log_sum_exps_of_narrow_components(D, condition):
    """Components that magnify rounding errors are evaluated in float64."""
    case = make_case("full", torch.float32, N=2000, K=8, D=D, condition=condition)
    expected = case.oracle()["values"]
    away = (reductions.logsumexp(*case.arguments, **NATIVE).double() - expected).abs()
    assert float((away / (expected.abs() + D)).max()) < (2e-6 if condition == 1e3 else 1e-5)


@pytest.mark.parametrize("exponent", [2, 4, 7, 10])
def test_outliers(exponent):
    """Residuals are taken about each component's own mean, so that rows at any distance keep their digits."""
    case = make_case("full", torch.float32, N=200, K=5, D=3, condition=10.0)
    x = case.x.clone()
    x[::7] *= 10.0**exponent
    case.x = x
    expected = case.oracle()
    assert error(reductions.logsumexp(*case.arguments, **NATIVE), expected["values"]) < 1e-6
    sums = reductions.moments(*case.arguments, **NATIVE)
    assert error(sums.S0, expected["S0"], expected["S0"]) < 1e-5
    assert error(sums.S2, expected["S2"], expected["S2"]) < 1e-5


def test_components_without_points_have_no_mass():
    """Exponentials below the normal numbers are exactly zero, not clamped."""
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    means = torch.tensor([[0.0, 0.0], [1e4, 1e4]])
    for dtype in (torch.float32, torch.float64):
        sums = reductions.moments(x.to(dtype), torch.zeros(2), means, torch.ones(1, 2), **NATIVE)
        assert float(sums.S0[1]) == 0
        assert not sums.S1[1].any()
        assert not sums.S2[1].any()


@pytest.mark.parametrize(("N", "K", "D"), [(100_000, 7, 5), (6000, 80, 48)], ids=["many points", "few points"])
@pytest.mark.parametrize("family", ["full", "diag", "spherical"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_number_of_threads_changes_no_bit(dtype, family, N, K, D):
    case = make_case(family, dtype, N=N, K=K, D=D, condition=10.0)
    g = torch.rand(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sums = reductions.moments(*case.arguments, weights=g, **NATIVE)
            found.append([sums.S0, sums.S1, sums.S2, sums.total, reductions.logsumexp(*case.arguments, **NATIVE)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_calls_of_several_threads_at_the_same_time():
    """They share the threads that the library keeps, and get the same bits as one call after the other."""
    cases = [
        make_case(f, torch.float32, N=40_000, K=8 + i, D=3, condition=10.0) for i, f in enumerate(["full", "diag"] * 4)
    ]
    before = torch.get_num_threads()

    def computed(case):
        # The number of threads belongs to the calling thread.
        torch.set_num_threads(3)
        return [reductions.logsumexp(*case.arguments, **NATIVE), reductions.moments(*case.arguments, **NATIVE).S2]

    try:
        expected = [computed(case) for case in cases]
        with ThreadPoolExecutor(max_workers=8) as pool:
            found = list(pool.map(computed, cases * 12))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for i, own in enumerate(found) for a, b in zip(own, expected[i % 8], strict=True))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the system does not list threads")
def test_threads_of_a_call_serve_the_next_ones():
    case = make_case("full", torch.float32, N=40_000, K=8, D=3, condition=10.0)
    before, numbers = torch.get_num_threads(), []
    try:
        torch.set_num_threads(3)
        for _ in range(50):
            reductions.moments(*case.arguments, **NATIVE)
            numbers.append(len(os.listdir("/proc/self/task")))
    finally:
        torch.set_num_threads(before)
    assert numbers[0] == numbers[-1] == max(numbers)


FORK = """
import os, signal, threading, torch, gmmkeops as gk

torch.set_num_threads(3)
x, means = torch.randn(100_000, 3), torch.randn(20, 3)
call = lambda: gk.reductions.logsumexp(x, torch.zeros(20), means, torch.eye(3)[None], backend="native", truncate=0)
expected = call()
# Another thread is within a call at each fork.
running = True
def repeat():
    while running:
        call()
thread = threading.Thread(target=repeat)
thread.start()
failed = 0
for _ in range(10):
    child = os.fork()
    if child == 0:
        # A call that waits for threads of the parent would never end.
        signal.alarm(20)
        torch.set_num_threads(3)
        same = all(torch.equal(call(), expected) for _ in range(3))
        tasks = "/proc/self/task"
        os._exit(0 if same and (not os.path.exists(tasks) or len(os.listdir(tasks)) > 1) else 1)
    failed += os.waitpid(child, 0)[1] != 0
running = False
thread.join()
print(failed)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_threads_of_its_own():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, check=False)
    assert done.stdout == "0\n", done.stderr


def test_denormal_numbers_outside_of_the_call_remain():
    case = make_case("full", torch.float32)
    reductions.moments(*case.arguments, **NATIVE)
    assert float(np.float32(1e-40) * np.float32(1.0)) > 0
    assert float(torch.tensor(1e-40) * 1.0) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_totals_for_any_number_of_points(instructions, dtype):
    generator = torch.Generator().manual_seed(0)
    means, U = torch.randn(3, 2, generator=generator), torch.ones(3, 1)
    for N in (1, 3, 5, 31, 513, 515, 548, 1027):
        x = torch.randn(N, 2, generator=generator).to(dtype)
        own, expected = (
            reductions.moments(x, torch.zeros(3), means, U, backend=backend, truncate=0)
            for backend in ("native", "dense")
        )
        assert float(own.total) == pytest.approx(float(expected.total), rel=1e-5 if dtype == torch.float32 else 1e-12)


def test_interruption_within_a_second():
    x = torch.randn(1_000_000, 8, generator=torch.Generator().manual_seed(0))
    means = torch.randn(4000, 8, generator=torch.Generator().manual_seed(1))
    arguments = x, torch.zeros(4000), means, torch.eye(8).expand(1, 8, 8)
    interrupted(lambda: reductions.moments(*arguments, **NATIVE), 1.0)
    # The engine still works.
    assert float(
        reductions.moments(x[:100], torch.zeros(4000), means, torch.ones(1, 8), **NATIVE).S0.sum()
    ) == pytest.approx(100)


def test_too_little_memory():
    script = """
import resource, torch, gmmkeops as gk
K, D = 3000, 200
arguments = torch.randn(9, D), torch.zeros(K), torch.randn(K, D), torch.ones(1, 1)
gk.reductions.logsumexp(*arguments, backend="native")
U = torch.eye(D).double().expand(1, D, D)
size = int(open("/proc/self/status").read().split("VmSize:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + 2**30 * 3 // 2, -1))
try:
    gk.reductions.moments(*arguments[:3], U, backend="native", truncate=0)
except (MemoryError, RuntimeError) as error:
    print(type(error).__name__, error)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "memory" in done.stdout


@pytest.fixture
def fresh(monkeypatch):
    """An engine that has compared nothing yet, and no warning that was given before."""
    monkeypatch.setattr(native._comparison, "_done", set())
    monkeypatch.setattr(native._comparison, "failure", None)
    monkeypatch.setattr(native, "_begun", set())
    monkeypatch.setattr(choice, "_told", set())
    library._chosen.cache_clear()
    yield
    library._chosen.cache_clear()


def test_without_the_library_the_dense_engine_runs(fresh, monkeypatch):
    case = make_case("full", torch.float64)
    expected = reductions.logsumexp(*case.arguments, backend="dense")
    monkeypatch.setattr(library, "_library", lambda: "its library has not been compiled (c++ was not found)")
    library._chosen.cache_clear()
    reason = r"its library has not been compiled \(c\+\+ was not found\)"
    with pytest.warns(UserWarning, match=f"The native engine is the faster engine here but {reason}; using the dense"):
        assert reductions.engine(case.x) == "dense"
    # Each reason is reported once.
    assert torch.equal(reductions.logsumexp(*case.arguments), expected)
    assert torch.equal(reductions.logsumexp(*case.arguments, backend="native"), expected)
    assert re.fullmatch(f"The native engine was requested but {reason}", reductions.fallback(case.x, "native"))


def test_unknown_instruction_set(fresh, monkeypatch):
    monkeypatch.setenv("GMMKEOPS_ISA", "mmx")
    assert reductions.native_unavailable() == "GMMKEOPS_ISA is 'mmx', expected one of avx512, avx2, base"


def test_wrong_results_are_noticed_at_the_first_use(fresh, monkeypatch):
    case = make_case("full", torch.float64)
    expected = reductions.logsumexp(*case.arguments, backend="dense")
    evaluate = engine._Evaluation.result
    monkeypatch.setattr(engine._Evaluation, "result", lambda self: tuple(part + 1 for part in evaluate(self)))
    with pytest.warns(UserWarning, match="The native engine is the faster engine here but a check of 256") as record:
        assert torch.equal(reductions.logsumexp(*case.arguments), expected)
    assert record[0].filename == __file__
    assert len(record) == 1
    assert torch.equal(reductions.logsumexp(*case.arguments), expected)


def test_steps_for_far_points_do_not_count_as_a_first_use(fresh, monkeypatch):
    case = make_case("full", torch.float32, condition=10.0)
    evaluate = engine._Evaluation.result
    monkeypatch.setattr(engine._Evaluation, "result", lambda self: tuple(part + 1 for part in evaluate(self)))
    for x, runs in ((case.x + 1e6, True), (case.x, False)):
        problem = Exponents.of(x, *case.arguments[1:])
        assert native.runs(x, True, "native", lambda problem=problem: problem) is runs


def test_signals_do_not_need_the_main_thread():
    case = make_case("full", torch.float32, N=200_000, K=100, D=6, condition=10.0)
    found = []
    thread = threading.Thread(target=lambda: found.append(reductions.logsumexp(*case.arguments, **NATIVE)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], reductions.logsumexp(*case.arguments, **NATIVE))


def test_installation_without_a_compiler(tmp_path):
    """A failed compilation leaves a note that doctor shows, and is an error where the library is required."""
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path / "o"),
    ]
    environment = os.environ | {"CXX": "no-such-compiler"}
    environment.pop("GMMKEOPS_REQUIRE_NATIVE", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "gmmkeops" / "reductions" / "native"
    assert "no-such-compiler" in (folder / "unbuilt.txt").read_text()
    assert not (folder / "_native.so").exists()
    required = environment | {"GMMKEOPS_REQUIRE_NATIVE": "1"}
    assert subprocess.run(command, cwd=ROOT, env=required, capture_output=True, check=False).returncode != 0


def test_small_problems_take_microseconds():
    """300 points and three components: the call itself, without the checks of its arguments."""
    case = make_case("full", torch.float32, N=300, K=3, D=2, condition=10.0)
    problem = reductions.problem.Exponents.of(*case.arguments)
    request = reductions.protocol.Statistics()
    native.begin(problem, request).add(None)
    began, best = time.process_time(), math.inf
    while time.process_time() - began < 0.2:
        start = time.perf_counter()
        evaluation = native.begin(problem, request)
        evaluation.add(None)
        best = min(best, time.perf_counter() - start)
    assert best < 300e-6


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_signs_of_a_factor_count_in_how_much_it_magnifies_errors(sign):
    """The inverse of a triangular matrix of ones and minus ones grows as 2^D, and that of its absolute values does not."""
    D = 24
    U = torch.eye(D, dtype=torch.float64) + sign * torch.ones(D, D, dtype=torch.float64).triu(1)
    y = torch.randn(200, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.linalg.solve_triangular(U, y, upper=True, left=False).float()
    rows, columns = torch.triu_indices(D, D, 1)
    factor = FullFactor(U.diagonal().log()[None], U[rows, columns][None])
    zeros = torch.zeros(1, D, dtype=torch.float64)
    found = reductions.logsumexp(x, zeros[:, 0], zeros, factor, backend="native", truncate=0)
    expected = -0.5 * (x.double() @ U).square().sum(1)
    offset = found.double() - expected
    torch.testing.assert_close(offset, offset.median().expand_as(offset), rtol=0, atol=1e-4)
