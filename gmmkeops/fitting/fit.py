"""The function :func:`fit`, which fits a mixture to data."""

from __future__ import annotations

import logging
import numbers
import os
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch

from gmmkeops import reductions
from gmmkeops._checks import ConvergenceWarning, DegenerateWarning, PrecisionWarning, accepts, as_integer, warn
from gmmkeops.components import mind_fork
from gmmkeops.data import (
    World,
    as_generator,
)
from gmmkeops.fitting.checkpoint import Checkpoint
from gmmkeops.fitting.em import EM
from gmmkeops.fitting.facts import facts
from gmmkeops.fitting.initialization import started
from gmmkeops.fitting.journal import Journal
from gmmkeops.fitting.loop import Run
from gmmkeops.fitting.method import Evaluation, Method
from gmmkeops.fitting.result import Ending, FitResult, Report, Start, StartReport, Step
from gmmkeops.fitting.ridge import dominated
from gmmkeops.fitting.task import Task
from gmmkeops.fitting.validation import Validation, split_off
from gmmkeops.models import GMM, Mixture
from gmmkeops.penalties import Penalty
from gmmkeops.reductions import recording

__all__ = ["fit", "too_few_points"]

_logger = logging.getLogger("gmmkeops")


# Numbers of covariance matrices from which a second thread saves time in their factorization.
_MATRICES = 1 << 20

# Argument names of version 0.1, and of other libraries.
_OLD = {"weights": "sample_weight", "callbacks": "callback", "progress": "verbose"}
_WRONG = {
    "epochs": "max_iter",
    "n_iter": "max_iter",
    "batch_size": "method=gmmkeops.EM(batch_size=...)",
    "lr": "method=gmmkeops.Adam(lr=...)",
}


@accepts(old=_OLD, also={"random_state": "generator"}, wrong=_WRONG)
def fit(
    start: Mixture | GMM | int | Start,
    x: Any,
    method: Method[Any] | None = None,
    *,
    penalty: Penalty | Callable[[Mixture], Any] | None = None,
    sample_weight: Any = None,
    context: Any = None,
    max_iter: int | None = None,
    tol: float | None = None,
    callback: Callable[[Step], Any] | Iterable[Callable[[Step], Any]] = (),
    verbose: bool | None = None,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
    generator: torch.Generator | int | None = None,
    truncate: float | None = None,
    backend: str = "auto",
    dtype: Any = None,
    max_memory: int | float | str | None = None,
    validation: Any = None,
) -> FitResult:
    r"""Fit a Gaussian mixture to data.

    Minimizes :math:`-\frac{1}{\sum g} \sum_n g_n \log p(x_n) + \text{penalty}` in standardized coordinates, so that the origin
    of the data does not matter, nor do their units except for ``reg_covar`` (squared units), and returns parameters in the units
    of the data. Components whose expected count becomes negligible (below 1e-3 points with gradient methods, 1e-6 with EM) are
    pruned: they keep their index in the result, with a weight of almost zero, and ``result.report`` lists them.

    Args:
        start: Initial mixture: a :class:`~gmmkeops.Mixture`; a :class:`~gmmkeops.GMM`, whose parameters are set to the result
            at the end; or a number of components, for which :func:`gmmkeops.initialize` is called.
        x: Points (N, D), data units; the fit runs on their device. Alternatively any source that :meth:`gmmkeops.Source.of`
            accepts (a file, memory map, loader or function), which is read chunk by chunk in every pass.
        method: Algorithm, such as ``gmmkeops.EM(...)`` (the default) or ``gmmkeops.Adam(...)``. A GMM with a context requires a
            gradient method.
        context: Contexts c (N, C), for a GMM with a context. If None, they are the last C columns of x.
        penalty: A :class:`~gmmkeops.penalties.Penalty`, or a function of a mixture that returns a scalar, nats per point.
        sample_weight: Nonnegative weights g (N,) of the points; None for equal weights.
        max_iter: Maximum number of iterations; default: that of the method. With 0 the initial mixture is evaluated and returned.
        tol: Tolerance, nats per point; default: that of the method.
        truncate: ε in [0, 1): components may be skipped if their total contribution to a point's density is less than this
            fraction (:func:`gmmkeops.reductions.arrange`). The report contains the resulting error bound. 0 evaluates every pair
            of point and component. The default is 1e-6 for float32 and 1e-12 for float64, if this saves time, otherwise 0.
        backend: ``"auto"``, ``"native"``, ``"keops"``, ``"triton"`` or ``"dense"``.
        dtype: Precision of the points, ``"float32"`` or ``"float64"``. By default float32 points are processed in float32 and
            all others in float64. The points are centered in float64 first, so that large coordinates lose no precision in
            float32. If components become so narrow, or points are so distant, that float32 coordinates would change
            log-densities by about 1e-4 nats or more, the fit continues in float64, as shown by ``report.dtype``.
        callback: Function of a :class:`Step`, or several functions, called after each iteration; the fit ends when one returns
            True. With several ranks, a callback that returns True on any rank ends the fit on all, and ranks wait at most 30
            seconds for a callback of another rank.
        verbose: Whether to show a progress bar; by default only in a terminal.
        generator: Random number generator or seed (minibatches, stochastic assignment); by default one with a fixed seed, so
            that repeated calls give equal results. Torch's global random state is neither used nor changed.
        checkpoint: A path, or a :class:`~gmmkeops.Checkpoint`, to which the state is written every minute. If the file exists,
            the fit resumes from it, with the same result as without interruption (bit-identical for EM on a CPU).
        max_memory: Limit on the memory of the fit, without imports and the given points, in bytes or as a string such as
            "1.5GB". If the standardized copy of the points would exceed it, the points are processed chunk by chunk.

        validation: Held-out points (M, D), data units; a source of them; or a fraction of x, which is held out at random. The
            result is then the mixture with the highest mean log-likelihood of the held-out points among those of all iterations;
            ``history["validation"]`` contains these values, nats per point. The number of iterations does not change. A given
            initial mixture should not be computed from the held-out points. Not supported for a GMM with a context.

    Returns:
        A :class:`FitResult`. Ctrl-C ends the fit and returns the best mixture so far. With several ranks this needs an
        interrupt of all ranks; if only some are interrupted, all raise an error that names them.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: Points or weights are invalid; the initial mixture does not match the points; the objective is not finite
            at the initial mixture; the checkpoint was written for a different fit (data, initial mixture, method, penalty, seed
            of the generator, ...); or settings cannot be compared with those of a checkpoint or of another rank.
        RankError: Another rank failed, does not respond, or runs with other settings.

    Warns:
        ConvergenceWarning: The tolerance was not met within ``max_iter``, or the objective became infinite or NaN.
        DegenerateWarning: A component has fewer points than its covariance needs: D + 1 for a covariance matrix, two for
            variances. Not issued for tied or frozen covariances, a prior of the covariances, or a penalty that prunes components.
        PrecisionWarning: float32 points are too coarse, or ``reg_covar`` dominates the variances within most components.

    Reference:
        Charlier et al. 2021, *Kernel operations on the GPU, with autodiff, without memory overflows*, JMLR 22, for the
        reductions. The methods have references of their own.

    Example:
        >>> import torch, gmmkeops as gk
        >>> x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)) + 5e6
        >>> x = x.double()
        >>> result = gk.fit(3, x, gk.Adam(lr=0.05), penalty=gk.penalties.SqrtWeights(0.1), max_iter=50)
        >>> result.n_iter, result.report.engine
        (50, 'native')
    """
    began = time.perf_counter()
    mind_fork()
    world = World()
    with world.together(), recording(), reductions.threads_for(x):
        generator = as_generator(generator, "cpu") if isinstance(generator, numbers.Integral) else generator
        if validation is not None and isinstance(start, GMM) and start.context:
            raise ValueError(
                "validation is not supported for a GMM with a context; evaluate held-out points in a callback."
            )
        x, sample_weight, validation = split_off(x, sample_weight, validation, generator)
        others = {"truncate": truncate, "dtype": dtype, "max_memory": max_memory}
        start, found, spread = _begin(start, x, sample_weight, generator, method, penalty, backend, max_iter, others)
        task = Task(
            start,
            method=method,
            penalty=penalty,
            context=context,
            max_iter=max_iter,
            tol=tol,
            callback=callback,
            checkpoint=checkpoint,
            generator=generator,
            truncate=truncate,
            backend=backend,
            dtype=dtype,
            max_memory=max_memory,
        )
        x, columns = task.points(x)
        settings = task.agreed(world, x, sample_weight, columns)
        journal = Journal(Checkpoint.of(checkpoint), world)
        saved = None if journal.checkpoint is None else journal.checkpoint.read(task.device, world)
        objective = task.objective(x, sample_weight, columns, journal, saved, spread)
        held = None if validation is None else Validation.of(validation, objective, columns, world)
        if settings:
            settings = settings | {"validation": None if held is None else held.mark}
        described = facts(objective, task.mixture, settings) if settings else {}
        single = task.mixture.means.dtype == torch.float32
        run = Run(objective, task.method, task.tol, task.callbacks, began, described, single=single, validation=held)
        state = _first(run, task) if saved is None else run.resume(saved)
        bar = _bar(task.max_iter, verbose, run)
        try:
            # Operations of torch are on the parameters only, unless there is a network.
            away = task.device != task.mixture.means.device
            with reductions.one_thread() if task.model is None and (away or _is_small(task.mixture)) else nullcontext():
                best = run.go(state, task.max_iter, bar)
        finally:
            _close(bar, run)
        result = _result(best, run, found)
    if warning := _doubt(run, task.tol, task.max_iter):
        warn(warning, ConvergenceWarning)
    if warning := too_few_points(result):
        warn(warning, DegenerateWarning)
    if run.iterations and (warning := dominated(run.method, run.objective.frame.scale, result.mixture)):
        warn(warning, PrecisionWarning)
    if isinstance(start, GMM):
        _assign(start, result, run.objective.frame.columns)
    _logger.info("%s", result)
    return result


def _begin(
    start: Any,
    x: Any,
    sample_weight: Any,
    generator: Any,
    method: Any,
    penalty: Any,
    backend: str,
    max_iter: Any,
    others: dict[str, Any],
) -> tuple[Any, StartReport | None, tuple[torch.Tensor, torch.Tensor] | None]:
    """Return the initial mixture or model, how it was found, and the spread of the points, as in :class:`Start`.

    A number of components is searched for.
    """
    if isinstance(start, Start):
        return start
    if not isinstance(start, numbers.Integral) or isinstance(start, bool):
        return start, None, None
    options: dict[str, Any] = {"sample_weight": sample_weight, "generator": generator, "backend": backend}
    found = method.start(x, as_integer(start, "start", 1), **options, **others) if isinstance(method, Method) else None
    if found is not None:
        return *found, None
    em = method if isinstance(method, EM) else None
    iterations = em.max_iter if em is not None and max_iter is None else max_iter
    options |= {"method": em, "iterations": iterations if isinstance(iterations, numbers.Integral) else 0}
    return started(x, int(start), penalty=penalty, **options)


def _is_small(mixture: Mixture) -> bool:
    """Return whether a second thread saves no time in operations on the parameters of a mixture."""
    return mixture.means.numel() * (mixture.n_features if mixture.factor.coupled else 1) < _MATRICES


def _first(run: Run, task: Task) -> Any:
    """Sort the points if truncation saves time, and return the initial state of the method."""
    inside = run.objective.frame.enter(task.mixture.detach().to(torch.float64))
    run.objective = run.objective.truncated(task.truncate, inside, task.max_iter)
    return task.method.init(run.objective, inside)


def _assign(model: GMM, result: FitResult, columns: tuple[str, ...] | None) -> None:
    """Set the parameters of a GMM to the result of its fit."""
    if model.context:
        model.load_state_dict(result.answer.state_dict())
        model.columns = columns
    else:
        model.assign(result.mixture)


def _doubt(run: Run, tol: float, max_iter: int) -> str:
    """Return the text of the ConvergenceWarning of a run, or an empty string."""
    if run.ending is Ending.MAX_ITER and tol > 0 and max_iter > 0 and run.iterations == max_iter:
        return f"the fit did not converge to tol={tol:g} within {max_iter} iterations; increase max_iter or tol."
    if run.ending is Ending.DIVERGED:
        return (
            f"the objective became infinite or NaN at iteration {run.iterations}; the best mixture before it is returned. "
            "A smaller learning rate usually helps."
        )
    return ""


def _degenerate(run: Run, best: Evaluation) -> tuple[int, ...]:
    """Return the components that have fewer points than their covariance needs.

    A covariance matrix is singular for fewer than D + 1 points, and variances for fewer than two. There is no such limit for
    common, frozen and given covariances, and for those with a prior. A penalty that prunes components makes some of them small.
    """
    mixture, objective = best.mixture, run.objective
    frozen = getattr(run.method, "frozen_covariances", False)
    if (
        best.answer is not None
        or mixture.tied
        or mixture.n_components == 1
        or frozen is not False
        or not run.iterations
    ):
        return ()
    if objective.penalty is not None:
        try:
            penalty = objective.penalty
            if penalty.prunes or penalty.bounds or objective.surrogate(mixture).scatter is not None:
                return ()
        except TypeError:
            # A function of a mixture may be a prior of the covariances.
            return ()
    # Expected numbers of points are sums of probabilities, so that they are rounded.
    points = (mixture.weights[best.active] * objective.count).round()
    return tuple(best.active[points < _fewest(mixture)].tolist())


def _fewest(mixture: Mixture) -> int:
    """Return the number of points that the covariance of a component needs."""
    return mixture.n_features + 1 if mixture.factor.coupled else 2


def too_few_points(result: FitResult) -> str:
    """Return the text of the DegenerateWarning of a result, or an empty string."""
    few = result.report.degenerate_components
    if not few:
        return ""
    shown = ", ".join(map(str, few[:5])) + (f" (and {len(few) - 5} more)" if len(few) > 5 else "")
    one = len(few) == 1
    named, own = (
        (f"component {shown} is", "its covariance") if one else (f"components {shown} are", "their covariances")
    )
    limit = f"{_fewest(result.mixture)} points" + ("" if one else " each")
    return (
        f"{named} expected to have fewer than {limit}, too few for {own}; use fewer components, a prior "
        '(GaussianMixture(prior="auto"), gmmkeops.penalties.CovariancePrior), or another covariance type.'
    )


def _result(best: Evaluation, run: Run, start: StartReport | None) -> FitResult:
    """Build the result of a run, in data units, with its report."""
    objective, data = run.objective, run.objective.data
    value, likelihood = best.objective, best.log_likelihood
    if best.answer is None:
        with torch.no_grad():
            if not best.exact:
                likelihood = -float(objective.negative_log_likelihood(best.mixture))
            value = float(objective.penalized(best.mixture)) - likelihood
    active = set(best.active.tolist())
    statistics = objective.passes.statistics.of_all(objective.passes.world)
    described: dict[str, Any] = {
        "features": data.features,
        "full": best.mixture.factor.coupled,
        "dtype": torch.float64 if statistics.wide else data.dtype,
        "assignment": getattr(run.method, "assignment", "soft"),
    }
    report = Report(
        pruned_components=tuple(k for k in range(best.mixture.n_components) if k not in active),
        n_active_components=len(active),
        regularized_components=() if best.floored is None else tuple(best.floored.nonzero()[:, 0].tolist()),
        engine=reductions.engine(data.device, objective.backend, **described),
        device=str(data.device),
        dtype=str(described["dtype"]).removeprefix("torch."),
        total_weight=objective.mass * objective.unit,
        truncate=statistics.epsilon,
        certificate=statistics.certificate,
        evaluated_fraction=statistics.evaluated / statistics.pairs if statistics.pairs else 1.0,
        seconds=time.perf_counter() - run.began,
        interrupted=run.ending is Ending.INTERRUPTED,
        degenerate_components=_degenerate(run, best),
        start=start,
        fallback=reductions.fallback(data.device, objective.backend, **described),
    )
    answer = run.method.answer(objective, best.answer)
    mixture = objective.leave(best.mixture)
    return FitResult(mixture, value, likelihood, run.ending, run.iterations, run.history, report, answer)


def _bar(total: int, verbose: bool | int | None, run: Run) -> Any:
    """Create a progress bar, which also shows the number of rows read from a source; None if it is disabled."""
    if verbose is not None and not verbose:
        return None
    from tqdm.auto import tqdm

    bar = tqdm(total=total, desc="fit", unit="it", disable=None if verbose is None else False)
    if bar.disable:
        return None
    rows = run.objective.rows
    run.objective.passes.show = lambda seen: bar.set_postfix_str(f"{seen} of {rows} rows")
    return bar


def _close(bar: Any, run: Run) -> None:
    """Close a progress bar; if the fit has converged, it is shown as complete."""
    if bar is None:
        return
    if run.ending is Ending.CONVERGED:
        bar.total = bar.n
        bar.refresh()
    bar.close()
