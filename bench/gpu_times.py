"""Questions of bench/gpu.py about times: of the engines, of EM iterations, of losses, and of other libraries."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any

from gpu_run import Row, Run, problem, timed


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

    points = None
    for N, K in ((1_000_000, 1000), (10_000_000, 10_000), (100_000_000, 10_000)):
        N, K = run.size(N, K)
        case = cases.Case("lists", "em", "surface", min(N, 10_000_000), K, 3, ())
        if run.device == "cuda" and torch.cuda.get_device_properties(0).total_memory < 16 * N * 3 * 4:
            yield {"N": N, "K": K, "skipped": "the points do not fit into the memory of the device"}
            continue
        if time.perf_counter() > run.until:
            yield {"N": N, "K": K, "skipped": "no time was left"}
            continue
        points = cases.cloud(case) if points is None or len(points) < case.N else points
        start = gk.Mixture.from_parameters(*cases.start(case, points), covariance_type="full").to(run.device)
        x = torch.from_numpy(points).to(run.device)
        if len(x) < N:
            # Ten times as many points of the same surface are made on the device.
            x = x.repeat(N // len(x), 1)
            x += 0.002 * torch.randn(x.shape, generator=torch.Generator(x.device).manual_seed(0), device=x.device)
        sorting = timed(run, lambda: gk.reductions.arrange(x, K, 1e-4))  # noqa: B023
        for name in run.engines:
            if name != "triton" and N > 1_000_000:
                continue
            seconds, result = _fit_seconds(run, x, start, (2, 6), truncate=1e-4, backend=name)
            yield {
                "N": N,
                "K": K,
                "engine": name,
                "sorting ms": 1e3 * sorting,
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
        densities = timed(run, lambda: start.log_prob(arguments[0], truncate=0))  # noqa: B023
        row |= {"log-densities ms": 1e3 * densities, "EM iteration ms": 1e3 * seconds}
        yield row | _profile(run, arguments[0], start)


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
