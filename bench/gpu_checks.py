"""Questions of bench/gpu.py about results: are those of all engines right, and how long do their first calls take?"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from gpu_run import Row, Run, problem


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
    few += [(family, D) for family, D in _COMPARED if engine == "triton" and (family, D) not in few]
    return [(family, D) for family, D in few if most.get(family, D) >= D]


def _first_calls(task: tuple[Run, str, str, int]) -> Row:
    """Call the most frequent requests once, and return the time that it took; then those that :func:`correctness` compares."""
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
        seconds = time.perf_counter() - began
        if (family, D) in _COMPARED:
            list(_compared(run, name, family, D))
    except Exception as error:  # Compilers have errors of their own.
        return {"engine": name, "family": family, "D": D, "skipped": str(error).splitlines()[0]}
    return {"engine": name, "family": family, "D": D, "first calls s": seconds}


def correctness(run: Run) -> Iterator[Row]:
    """Are the results of every request right? Errors relative to max(1, |value|), and of sums to the largest entry."""
    for family, D in _COMPARED[:3] if run.quick else _COMPARED:
        for name in run.engines:
            yield from _compared(run, name, family, D)


def _compared(run: Run, name: str, family: str, D: int) -> Iterator[Row]:
    """Compare the results of an engine with the oracle, also with candidate lists in few dimensions."""
    import torch

    from gmmkeops import reductions

    if name == "keops" and (family, D) not in _FORMULAS:
        return
    arguments = problem(run, 6000, 37, D, family)
    x, K = arguments[0], len(arguments[2])
    g = torch.randn(len(x), generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(x.device)
    truth = oracle(arguments, g)
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
