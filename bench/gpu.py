"""Checks of all results on a CUDA device, and times of the engines there, in ten minutes.

    python bench/gpu.py                       all questions, results in bench/results/gpu.json
    python bench/gpu.py --only engines lists  some of them; the others keep their former answers
    python bench/gpu.py --device cpu --quick  small sizes on a CPU, to check this script

It installs nothing and needs no network. Packages that are missing are named, and questions that need them are skipped. The
answers are written after each question, so that a run that is cut short keeps what it has measured. ``bench/report.py`` makes
tables and a plot of them. Times are wall times of calls that wait for the device, the best of three after a first call.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

# Packages that gmmkeops, or a part of it, needs, and what is skipped without them.
NEEDED = ("torch", "numpy", "tqdm", "matplotlib", "safetensors")
OPTIONAL = {
    "pykeops": "the KeOps engine and tutorial",
    "triton": "the Triton engine",
    "flash_gmm": "Flash-GMM (its file on PYTHONPATH, from github.com/IBM/Flash-GMM)",
    "gmmxx": "GMMXX (its module on PYTHONPATH, from github.com/OpsiClear/GMMXX)",
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Settings of a run.

    Args:
        device: Type of the device.
        quick: Whether to use small sizes.
        until: Time, by ``time.perf_counter``, after which no further question is begun.
    """

    device: str
    quick: bool
    until: float

    def size(self, points: int, components: int) -> tuple[int, int]:
        """Numbers of points and components: those given, or small ones."""
        return (min(points, 2000), min(components, 8)) if self.quick else (points, components)

    def synchronize(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    @property
    def engines(self) -> tuple[str, ...]:
        """Names of the engines that can run on the device."""
        import torch

        from gmmkeops import reductions

        x = torch.zeros(1, 2, device=self.device)
        return tuple(name for name in reductions.BACKENDS[1:] if reductions.unavailable(name, x) is None)


def timed(run: Run, call: Callable[[], Any]) -> float:
    """Return the wall time of a call and of the work that it has queued, seconds."""
    from gmmkeops.cli.race import seconds_of

    def waiting() -> None:
        call()
        run.synchronize()

    return seconds_of(waiting)


def problem(run: Run, N: int, K: int, D: int, family: str = "full", seed: int = 0) -> tuple[Any, ...]:
    """Return points, offsets, means and factors of random components, each with a covariance of its own."""
    import torch

    import gmmkeops as gk

    N, K = run.size(N, K)
    generator, there = (torch.Generator(device).manual_seed(seed) for device in ("cpu", run.device))
    means = 3 * torch.randn(K, D, generator=generator)
    x = means.to(run.device)[torch.randint(K, (N,), generator=there, device=run.device)]
    x += torch.randn(N, D, generator=there, device=run.device)
    kind, tied = gk.components.factor_class(family)
    lead = 1 if tied else K
    scale = 0.7 + 0.6 * torch.rand(lead, 1, generator=generator)
    if kind is gk.FullFactor:
        upper = torch.randn(lead, D, D, generator=generator).triu(1) * (0.3 / D**0.5)
        values = upper + torch.diag_embed(scale * (0.8 + 0.4 * torch.rand(lead, D, generator=generator)))
    else:
        values = scale * (0.8 + 0.4 * torch.rand(lead, D, generator=generator))
        values = values if kind is gk.DiagonalFactor else values[:, 0]
    factor = kind.from_factors(values) if kind is gk.FullFactor else kind.from_covariances(values**-2, features=D)
    offsets = torch.randn(K, generator=generator) + factor.log_determinant()
    return tuple(part.to(run.device) for part in (x, offsets, means, factor))


def oracle(arguments: tuple[Any, ...], weights: Any) -> dict[str, Any]:
    """Compute all results from an N x K x D array of float64."""
    import torch

    x, c, means, factor = arguments
    x, c, means = x.double(), c.double(), means.double()
    family = factor.family
    U = factor.to(torch.float64).matrices().expand(len(means), -1, -1)
    z = x[:, None] - means
    e = c - 0.5 * torch.einsum("kde,nkd->nke", U, z).square().sum(-1)
    values = e.logsumexp(1)
    r = weights[:, None] * (e - values[:, None]).exp()
    S2 = torch.einsum("nk,nkd,nke->kde", r, z, z)
    S2 = S2 if family == "full" else S2.diagonal(dim1=1, dim2=2)
    return {
        "e": e,
        "values": values,
        "S0": r.sum(0),
        "S1": torch.einsum("nk,nkd->kd", r, z),
        "S2": S2.sum(1) if family == "spherical" else S2,
        "total": weights @ values,
        "gradient": -torch.einsum("nk,kde,nke->nd", r, U @ U.mT, z),
    }


# Families and numbers of features of the problems whose results are compared; KeOps compiles formulas for the first of each.
_COMPARED = (
    ("full", 3),
    ("diag", 3),
    ("spherical", 3),
    ("full", 2),
    ("full", 8),
    ("tied_full", 4),
    ("diag", 32),
    ("full", 16),
    ("diag", 64),
    ("spherical", 128),
)
_FORMULAS = (("full", 3), ("diag", 3))


def compilation(run: Run) -> Iterator[Row]:
    """How long do the first calls take, in which kernels are compiled? In as many processes as there are cores."""
    if run.device == "cpu":
        yield {"skipped": "the kernels for CUDA are not compiled for this device"}
        return
    tasks = [(run, name, *form) for name in run.engines if name != "dense" for form in _forms(name)]
    if not tasks:
        yield {"skipped": "no engine compiles kernels here"}
        return
    # KeOps compiles parts of itself at its first formula; other processes would do the same at the same time.
    first = next((task for task in tasks if task[1] == "keops"), tasks[0])
    yield _first_calls(first)
    tasks.remove(first)
    workers = max(1, min(len(tasks), len(os.sched_getaffinity(0)) - 1))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_first_calls, tasks)


def _forms(engine: str) -> list[tuple[str, int]]:
    """List the families and numbers of features for which the questions below use an engine."""
    most = {"full": 12, "diag": 32} if engine == "keops" else {"full": 32, "diag": 128}
    few = [("full", D) for D in (*range(2, 9), 12, 16, 32)] + [("diag", D) for D in (3, 4, 16, 32, 64, 128)]
    return [(family, D) for family, D in few if most[family] >= D]


def _first_calls(task: tuple[Run, str, str, int]) -> Row:
    """Call every request once; return the time that it took."""
    from gmmkeops import reductions

    run, name, family, D = task
    # Triton compiles other code for integers that are multiples of 16: as in the questions below, N is one and K is not. With so
    # many components, products of digits are used as there.
    x, *parameters = problem(run, 8192, 72, D, family)
    options: Row = {"backend": name, "truncate": 0}
    began = time.perf_counter()
    try:
        reductions.logsumexp(x, *parameters, **options)
        reductions.moments(x, *parameters, **options)
        reductions.argmax(x, *parameters, **options)
    except Exception as error:  # Compilers have errors of their own.
        return {"engine": name, "family": family, "D": D, "skipped": str(error).splitlines()[0]}
    return {"engine": name, "family": family, "D": D, "first calls s": time.perf_counter() - began}


def correctness(run: Run) -> Iterator[Row]:
    """Are the results of every request right? Errors relative to max(1, |value|), and of sums to the largest entry."""
    import torch

    from gmmkeops import reductions

    for family, D in _COMPARED[:3] if run.quick else _COMPARED:
        arguments = problem(run, 6000, 37, D, family)
        x, K = arguments[0], len(arguments[2])
        g = torch.randn(len(x), generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(x.device)
        truth = oracle(arguments, g)
        for name in run.engines:
            if name == "keops" and (family, D) not in _FORMULAS:
                continue
            for lists in (False, True) if D <= 4 and K > 1 else (False,):
                row: Row = {"family": family, "D": D, "engine": name, "lists": lists}
                reason = reductions.unavailable(name, x, full="full" in family)
                if reason is None:
                    points = reductions.arrange(x, K, 1e-10) if lists else x
                    options = {"backend": name} | ({} if lists else {"truncate": 0})
                    found = errors((points, *arguments[1:]), g, truth, options, x)
                    # Another engine computes what this one cannot, and replaces it if its first results are wrong.
                    reason = reductions.unavailable(name, x, full="full" in family)
                    if not has_gradients(name, x, arguments):
                        found["point gradient"] = None
                yield row | ({"skipped": reason} if reason is not None else found)


def has_gradients(name: str, x: Any, arguments: tuple[Any, ...]) -> bool:
    """Return whether an engine computes gradients of the points by itself."""
    from gmmkeops.reductions.choice import ENGINES
    from gmmkeops.reductions.problem import Exponents
    from gmmkeops.reductions.protocol import PointGradient

    return ENGINES[name].unsupported(Exponents.of(x, *arguments[1:]).form, PointGradient()) is None


def errors(arguments: tuple[Any, ...], g: Any, truth: dict[str, Any], options: Row, x: Any) -> Row:
    """Compute the largest error of each request."""
    from gmmkeops import reductions

    def near(found: Any, expected: Any) -> float:
        return float(((found.double() - expected).abs() / expected.abs().clamp(min=1)).max())

    def relative(found: Any, expected: Any) -> float:
        return float((found.double() - expected).abs().max() / expected.abs().max())

    sums = reductions.moments(*arguments, weights=g, **options)
    hard = reductions.moments(*arguments, assignment="hard", **options)
    best, labels = truth["e"].max(1)
    top, _ = reductions.topk(*arguments, min(3, truth["e"].shape[1]), **options)
    counts = labels.bincount(minlength=truth["e"].shape[1])
    points = x.clone().requires_grad_()
    if arguments[0] is x:
        reductions.total(points, *arguments[1:], weights=g, **options).backward()
    return {
        "log-sum-exp": near(reductions.logsumexp(*arguments, **options), truth["values"]),
        "largest exponents": near(top, truth["e"].topk(top.shape[1]).values),
        "wrong labels": int((reductions.argmax(*arguments, **options) != labels).sum()),
        "S0": relative(sums.S0, truth["S0"]),
        "S1": relative(sums.S1, truth["S1"]),
        "S2": relative(sums.S2, truth["S2"]),
        "total": near(sums.total, truth["total"]),
        "hard counts": float((hard.S0 - counts).abs().max()),
        "hard total": near(hard.total, best.sum()),
        "point gradient": None if points.grad is None else relative(points.grad, truth["gradient"]),
    }


def engines(run: Run) -> Iterator[Row]:
    """Which engine is faster in few dimensions? Times are milliseconds for 10⁶ points and 10³ components."""
    for D in (2, 3) if run.quick else range(2, 9):
        yield from _compared(run, 1_000_000, 1000, D, "full")
    for D in (3,) if run.quick else (4, 16, 32):
        yield from _compared(run, 1_000_000, 1000, D, "diag")


def dimensions(run: Run) -> Iterator[Row]:
    """Which engine is faster in many dimensions, where tensor cores compute the products?"""
    for family, D in (
        (("full", 9),) if run.quick else (("full", 12), ("full", 16), ("full", 32), ("diag", 64), ("spherical", 128))
    ):
        yield from _compared(run, 1_000_000, 1000, D, family, limit=16)


def _compared(run: Run, N: int, K: int, D: int, family: str, limit: int = 32) -> Iterator[Row]:
    """Time log-sum-exps, moments and labels by each engine."""
    from gmmkeops import reductions

    arguments = problem(run, N, K, D, family)
    x = arguments[0]
    for name in run.engines:
        if name == "keops" and (limit < D or run.device == "cpu"):
            continue
        row: Row = {"family": family, "D": D, "N": len(x), "K": len(arguments[2]), "engine": name}
        if (reason := reductions.unavailable(name, x, full="full" in family)) is not None:
            yield row | {"skipped": reason}
            continue
        options: Row = {"backend": name, "truncate": 0}
        try:
            yield row | {
                "log-sum-exp ms": 1e3 * timed(run, lambda: reductions.logsumexp(*arguments, **options)),  # noqa: B023
                "moments ms": 1e3 * timed(run, lambda: reductions.moments(*arguments, **options)),  # noqa: B023
                "labels ms": 1e3 * timed(run, lambda: reductions.argmax(*arguments, **options)),  # noqa: B023
                "auto": reductions.engine(x, full="full" in family),
            }
            if (reason := reductions.unavailable(name, x, full="full" in family)) is not None:
                yield row | {"skipped": f"the times above are those of another engine: {reason}"}
        except Exception as error:  # Compilers have errors of their own.
            yield row | {"skipped": str(error).splitlines()[0]}


def batches(run: Run) -> Iterator[Row]:
    """How many rows should a partial sum of KeOps have?"""
    from gmmkeops import reductions
    from gmmkeops.reductions.keops import formulas

    if "keops" not in run.engines or run.device == "cpu":
        yield {"skipped": "KeOps does not run on this device"}
        return
    arguments, former = problem(run, 1_000_000, 1000, 3), formulas._ROWS_PER_SUM
    try:
        for rows in (1024, 2048, 4096, 8192, 16384):
            formulas._ROWS_PER_SUM = rows
            call = timed(run, lambda: reductions.moments(*arguments, backend="keops", truncate=0))
            yield {"rows": rows, "moments ms": 1e3 * call}
    finally:
        formulas._ROWS_PER_SUM = former


def tiles(run: Run) -> Iterator[Row]:
    """How large should the tiles of the dense engine be?"""
    from gmmkeops import reductions
    from gmmkeops.reductions.dense import engine

    arguments = problem(run, 1_000_000, 1000, 16)
    name, backend = ("_TILE_CUDA", "auto") if run.device == "cuda" else ("_TILE_CPU", "dense")
    former = getattr(engine, name)
    try:
        for power in range(22, 24 if run.quick else 28):
            setattr(engine, name, 1 << power)
            engine._entries.cache_clear()
            call = timed(run, lambda: reductions.moments(*arguments, backend=backend, truncate=0))
            yield {"pairs of a tile": 1 << power, "moments ms": 1e3 * call}
    finally:
        setattr(engine, name, former)
        engine._entries.cache_clear()


def _fit_seconds(
    run: Run, x: Any, start: Any, iterations: tuple[int, int] = (2, 12), **options: Any
) -> tuple[float, Any]:
    """Return the wall time of an EM iteration, the set-up excluded, and the last result."""
    import gmmkeops as gk

    results = []

    def fit(count: int) -> None:
        results.append(gk.fit(start, x, gk.EM(tol=0), max_iter=count, verbose=False, **options))

    return _difference(run, fit, iterations), results[-1]


def _mixture(arguments: tuple[Any, ...]) -> Any:
    import gmmkeops as gk

    return gk.Mixture(arguments[1] * 0, arguments[2], arguments[3])


def lists(run: Run) -> Iterator[Row]:
    """How long does an EM iteration over candidate lists take, on the points of a surface?"""
    import cases
    import torch

    import gmmkeops as gk

    for N, K in ((1_000_000, 1000), (10_000_000, 10_000), (100_000_000, 10_000)):
        N, K = run.size(N, K)
        case = cases.Case("lists", "em", "surface", min(N, 10_000_000), K, 3, ())
        if run.device == "cuda" and torch.cuda.get_device_properties(0).total_memory < 16 * N * 3 * 4:
            yield {"N": N, "K": K, "skipped": "the points do not fit into the memory of the device"}
            continue
        if time.perf_counter() > run.until:
            yield {"N": N, "K": K, "skipped": "no time was left"}
            continue
        points = cases.cloud(case)
        start = gk.Mixture.from_parameters(*cases.start(case, points), covariance_type="full").to(run.device)
        x = torch.from_numpy(points).to(run.device)
        if len(x) < N:
            # Ten times as many points of the same surface are made on the device.
            x = x.repeat(N // len(x), 1)
            x += 0.002 * torch.randn(x.shape, generator=torch.Generator(x.device).manual_seed(0), device=x.device)
        for name in run.engines:
            if name != "triton" and N > 1_000_000:
                continue
            seconds, result = _fit_seconds(run, x, start, (2, 6), truncate=1e-4, backend=name)
            yield {
                "N": N,
                "K": K,
                "engine": name,
                "EM iteration ms": 1e3 * seconds,
                "pairs evaluated": result.report.evaluated_fraction,
            }


def iteration(run: Run) -> Iterator[Row]:
    """How long does an EM iteration take, how many kernels does it launch, and how much of the time is the device idle?"""
    sizes = (
        (1_000_000, 1000, 3, "full"),
        (1_000_000, 1000, 16, "full"),
        (1_000_000, 1024, 128, "spherical"),
        (10_000, 10, 2, "full"),
    )
    for N, K, D, family in sizes[:1] if run.quick else sizes:
        arguments = problem(run, N, K, D, family)
        start = _mixture(arguments)
        seconds, result = _fit_seconds(run, arguments[0], start, truncate=0)
        row: Row = {
            "N": len(arguments[0]),
            "K": len(arguments[2]),
            "D": D,
            "family": family,
            "engine": result.report.engine,
        }
        yield row | {"EM iteration ms": 1e3 * seconds} | _profile(run, arguments[0], start)


def _profile(run: Run, x: Any, start: Any) -> Row:
    """Count the kernels of an EM iteration, and the time in which they run, from the difference of two fits."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    import gmmkeops as gk

    if run.device != "cuda":
        return {}
    found = []
    for count in (2, 12):
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            gk.fit(start, x, gk.EM(tol=0), max_iter=count, verbose=False, truncate=0)
            torch.cuda.synchronize()
        kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        waits = [event for event in profiler.events() if "Synchronize" in event.name]
        found.append((len(kernels), sum(event.device_time for event in kernels), len(waits)))
    kernels_, busy, waits_ = ((last - first) / 10 for first, last in zip(*found, strict=True))
    return {"kernels": kernels_, "kernels ms": busy / 1e3, "synchronizations": waits_}


def setup(run: Run) -> Iterator[Row]:
    """How long does a fit of 10⁷ points take before its first iteration?"""
    import gmmkeops as gk

    N, K = run.size(10_000_000, 100)
    arguments = problem(run, N, K, 3)
    start = _mixture(arguments)
    calls = {
        "fit without iterations": lambda: gk.fit(start, arguments[0], gk.EM(tol=0), max_iter=0, verbose=False),
        "k-means++": lambda: gk.initialize(arguments[0], K, "kmeans++", generator=0),
        "search": lambda: gk.initialize(arguments[0], K, generator=0),
    }
    for name, call in calls.items():
        yield {"N": N, "K": K, "D": 3, "what": name, "seconds": timed(run, call)}


def loss(run: Run) -> Iterator[Row]:
    """How long do a loss and its gradient take, by us and by the formula of the KeOps tutorial?"""
    import adapters
    import cases

    N, K = run.size(1_000_000, 1000)
    for D in (2, 3):
        case = cases.Case("loss", "loss", "uniform", N, K, D, (), device=run.device)
        x = cases.cloud(case)
        for peer in ("gmmkeops", "GMM module", "KeOps tutorial"):
            row: Row = {"N": N, "K": K, "D": D, "peer": peer}
            if peer == "KeOps tutorial" and ("keops" not in run.engines or run.device == "cpu"):
                yield row | {"skipped": "KeOps does not run on this device"}
                continue
            call = adapters.LOSS[peer](case, x)
            yield row | {"loss and gradient ms": 1e3 * timed(run, call), "loss": call()}


def peers(run: Run) -> Iterator[Row]:
    """How long does an EM iteration of other GPU libraries take? Their files must be given."""
    import adapters
    import cases

    # The sizes for which these libraries publish times.
    for N, K, D, family, others in (
        (1_000_000, 1024, 128, "spherical", ("Flash-GMM", "Flash-GMM, H100", "GMMXX")),
        (1 << 20, 32, 8, "full", ("GMMXX",)),
        (1 << 20, 64, 32, "diag", ("GMMXX",)),
    ):
        N, K = run.size(N, K)
        case = cases.Case("peers", "em", "clusters", N, K, D, (), family, run.device)
        x = cases.cloud(case)
        for peer in ("gmmkeops, every pair", *others):
            row: Row = {"N": N, "K": K, "D": D, "family": family, "peer": peer}
            module = None if peer.startswith("gmmkeops") else peer.split(",")[0].lower().replace("-", "_")
            if module is not None and importlib.util.find_spec(module) is None:
                yield row | {"skipped": f"{module} is not on PYTHONPATH"}
                continue
            try:
                start = cases.start(case, x)
                fit = _gmmxx(case, x) if module == "gmmxx" else adapters.EM[peer](case, x, start)
                yield row | {"EM iteration ms": 1e3 * _difference(run, fit, (2, 12))}
            except Exception as error:  # Their compilers have errors of their own.
                said = [line for line in str(error).splitlines() if line.strip()]
                yield row | {"skipped": f"{type(error).__name__}: {said[0] if said else 'no message'}"}


def _difference(run: Run, fit: Callable[[int], Any], iterations: tuple[int, int]) -> float:
    """Return the wall time of an iteration from two fits, so that the set-up does not count."""
    fit(1)
    seconds = []
    for count in iterations:
        began = time.perf_counter()
        fit(count)
        run.synchronize()
        seconds.append(time.perf_counter() - began)
    return (seconds[1] - seconds[0]) / (iterations[1] - iterations[0])


def _gmmxx(case: Any, x: Any) -> Callable[[int], Any]:
    """GMMXX from initial parameters of its own, since it takes no others."""
    import torch
    from gmmxx import GMMXX

    points = torch.from_numpy(x).to(case.device)

    def fit(iterations: int) -> Any:
        settings = {"init_params": "random", "random_state": 0, "compute_labels_on_fit": False}
        model = GMMXX(n_components=case.K, max_iter=iterations, tol=0.0, covariance_type=case.family, **settings)
        return model.fit(points)

    return fit


QUESTIONS: dict[str, Callable[[Run], Iterator[Row]]] = {
    question.__name__: question
    for question in (
        compilation,
        correctness,
        engines,
        dimensions,
        batches,
        tiles,
        lists,
        iteration,
        setup,
        loss,
        peers,
    )
}


def missing() -> dict[str, str]:
    """Name the packages that cannot be imported, and what is skipped without them."""
    return {name: what for name, what in OPTIONAL.items() if importlib.util.find_spec(name) is None}


def environment(device: str) -> Row:
    """Describe the device and the versions of the packages."""
    import torch

    found: Row = {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": "CPU",
        "missing": missing(),
    }
    for name in ("triton", "pykeops"):
        if name not in found["missing"]:
            import importlib.metadata

            found[name] = importlib.metadata.version(name)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "memory GiB": round(properties.total_memory / 2**30, 1),
            "CUDA": torch.version.cuda,
        }
    return found


def answer(run: Run, question: Callable[[Run], Iterator[Row]]) -> Row:
    """Ask a question; rows that were measured before a failure are kept."""
    began, found = time.perf_counter(), {"question": (question.__doc__ or "").strip(), "rows": []}
    if began > run.until:
        return found | {"skipped": "no time was left"}
    try:
        for row in question(run):
            found["rows"].append(row)
            print("  " + ", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    except Exception as error:  # Other questions must still be answered.
        found["failure"] = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
        print(f"  failed: {found['failure']}", flush=True)
    return found | {"seconds": round(time.perf_counter() - began, 1)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--only", nargs="+", choices=tuple(QUESTIONS), help="ask only these questions")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which no question is begun")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    options = parser.parse_args(arguments)
    if absent := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"gmmkeops needs {', '.join(absent)}, which this Python ({sys.executable}) does not have.")
        return 1
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA device; `python -m gmmkeops.cli doctor` says what is missing.")
        return 1
    run = Run(options.device, options.quick, time.perf_counter() + options.budget)
    former = json.loads(options.json.read_text()) if options.only and options.json.exists() else {"questions": {}}
    record = {"environment": environment(options.device), "questions": former["questions"]}
    for name, what in record["environment"]["missing"].items():
        print(f"{name} is missing: {what} is skipped.")
    for name in options.only or QUESTIONS:
        print(f"{name}: {(QUESTIONS[name].__doc__ or '').strip()}", flush=True)
        record["questions"][name] = answer(run, QUESTIONS[name])
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    failed = [name for name, found in record["questions"].items() if "failure" in found]
    print(f"wrote {options.json}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
