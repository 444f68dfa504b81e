r"""The loop of all fits: iterations of a method, with tolerance, callbacks, progress, interruption and history.

.. math:: \text{objective} = -\frac{1}{\sum g} \sum_n g_n \log p(x_n) + \text{penalty}, \quad \text{nats per point, data units}
"""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from gmmkeops import reductions
from gmmkeops._checks import ConvergenceWarning, _shown, as_choice, as_fraction, as_integer, as_number, mind_fork
from gmmkeops.data import Source, World, as_dtype, as_points, as_weights, difference, readable, table_names, table_of
from gmmkeops.fitting.checkpoint import Checkpoint, Journal
from gmmkeops.fitting.conditional import Network
from gmmkeops.fitting.data import Memory
from gmmkeops.fitting.frame import Frame
from gmmkeops.fitting.gradient import Gradient
from gmmkeops.fitting.identity import describe, facts_of, marks
from gmmkeops.fitting.memory import as_bytes, chunk_rows, estimate_memory
from gmmkeops.fitting.method import Evaluation, Method, Problem
from gmmkeops.fitting.result import FitResult, Report, Step
from gmmkeops.models import GMM, Mixture
from gmmkeops.penalties import Penalty
from gmmkeops.reductions import recording

__all__ = ["as_functions", "fit"]


def as_functions(value: Any, name: str) -> tuple[Callable[..., Any], ...]:
    """Functions, from one of them or several; None stands for none.

    Raises:
        TypeError: It is neither.
    """
    if value is None or callable(value):
        return () if value is None else (value,)
    several = isinstance(value, (list, tuple)) or (isinstance(value, Iterable) and not hasattr(value, "__array__"))
    found = tuple(value) if several and not isinstance(value, (str, bytes)) else (value,)
    for item in found:
        if not callable(item):
            raise TypeError(f"{name} must be a function or a list of functions, got {_shown(item)}.")
    return found


_logger = logging.getLogger("gmmkeops")

# Settings that may change when a fit is resumed, but not between ranks.
_LIMITS = ("max_iter", "tol", "relative_tol", "patience")

# Number of iterations after which points are regrouped by the mixture: its labels are then much better than the initial ones.
_SETTLED = 4


def fit(
    start: Mixture | GMM,
    x: Any,
    method: Method[Any],
    *,
    context: Any = None,
    penalty: Penalty | Callable[[Mixture], Any] | None = None,
    weights: Any = None,
    max_iter: int | None = None,
    tol: float | None = None,
    truncate: float | None = None,
    backend: str = "auto",
    dtype: Any = None,
    callbacks: Callable[[Step], Any] | Iterable[Callable[[Step], Any]] = (),
    progress: bool | None = None,
    generator: torch.Generator | None = None,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
    max_memory: int | float | str | None = None,
) -> FitResult:
    r"""Fit a Gaussian mixture to data.

    Minimizes :math:`-\frac{1}{\sum g} \sum_n g_n \log p(x_n) + \text{penalty}` in standardized coordinates, so that the units
    and the origin of the data do not matter, and returns parameters in the units of the data. Components whose expected count
    becomes negligible (below 1e-3 points with gradient methods, 1e-6 with EM) are pruned: they keep their index in the result,
    with a weight of almost zero, and ``result.report`` lists them.

    Args:
        start: Initial mixture: a :class:`~gmmkeops.Mixture`, or a :class:`~gmmkeops.GMM`, whose parameters are set to the result
            at the end.
        x: Points (N, D), data units; the fit runs on their device. Also anything that :meth:`gmmkeops.Source.of` accepts
            (files, memory maps, loaders, functions), which is read chunk by chunk on every pass.
        method: ``gmmkeops.EM(...)``, ``gmmkeops.Adam(...)`` or another method; a gradient method for a GMM with a context.
        context: Contexts c (N, C), for a GMM with a context. If None, they are the last C columns of x.
        penalty: A :class:`~gmmkeops.penalties.Penalty`, or any function of a mixture that returns nats per point.
        weights: Weights g (N,) of the points, not negative; None for equal weights.
        max_iter: Largest number of iterations; None for the method's. With 0 the initial mixture is evaluated and returned.
        tol: Tolerance, nats per point; None for the method's.
        truncate: ε: components whose total contribution to a point's density is certified to be less than this fraction may be
            skipped (:func:`gmmkeops.reductions.arrange`); the report has the resulting error bound. 0 evaluates every pair of
            point and component. None uses 1e-6 for float32 and 1e-12 for float64, where this saves time.
        backend: ``"auto"``, ``"keops"`` or ``"dense"``.
        dtype: Precision of the points, ``"float32"`` or ``"float64"``. By default float32 points are computed in float32 and
            all others in float64. The points are centered in float64 first, so that map coordinates lose no digits in float32.
            If components become so narrow, or points are so far away, that float32 coordinates would change log-densities by
            about 1e-4 nats or more, the fit continues in float64, and the report says so.
        callbacks: Functions of a :class:`Step` that are called after each iteration; the fit ends when one returns True. With
            several ranks, a callback that returns True on any rank ends the fit on all, and ranks wait at most 30 seconds for a
            callback of another rank.
        progress: Whether to show a progress bar; by default only in a terminal.
        generator: Random number generator (minibatches, stochastic assignment). None uses a fixed seed, so that the same call
            gives the same result in every process. Torch's global random state is not used or changed.
        checkpoint: A path, or a :class:`~gmmkeops.Checkpoint`, to which the state is written every minute. If the file exists,
            the fit resumes from it, with the same result as without interruption (bit-identical for EM on a CPU).
        max_memory: Largest memory of the fit beside imports and the given points, in bytes or as text such as "1.5GB". If the
            standardized copy of the points would take more, they are processed chunk by chunk, also if they are in memory.

    Returns:
        A :class:`FitResult`. Ctrl-C ends the fit and returns the best mixture so far. With several ranks this needs an
        interrupt of all ranks; if only some are interrupted, all raise an error that names them.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: Points or weights are invalid; the initial mixture does not match the points; the objective is not finite
            at the initial mixture; the checkpoint belongs to another fit (data, initial mixture, method, penalty, seed of the
            generator, ...); or settings cannot be compared with those of a checkpoint or of another rank.
        RankError: Another rank failed, does not respond, or runs with other settings.

    Warns:
        ConvergenceWarning: The tolerance was not met within ``max_iter``, or the objective became infinite or NaN.
        PrecisionWarning: float32 points are too coarse, or ``reg_covar`` is much larger than the variances.

    Reference:
        Charlier et al. 2021, *Kernel operations on the GPU, with autodiff, without memory overflows*, JMLR 22, for the
        reductions; the methods name their own.

    Example:
        >>> import torch, gmmkeops as gk
        >>> x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)) + 5e6
        >>> x = x.double()
        >>> result = gk.fit(gk.initialise(x, 3), x, gk.Adam(lr=0.05), penalty=gk.penalties.SqrtWeights(0.1), max_iter=50)
        >>> result.n_iter, result.report.engine
        (50, 'dense')
    """
    began = time.perf_counter()
    mind_fork()
    world = World()
    with world.together(), recording():
        mixture = _starting_mixture(start, method)
        extra, columns = 0, start.columns
        if isinstance(start, GMM) and start.context:
            extra = start.context
            x, columns, method, truncate = _conditional(start, x, context, method, truncate)
        elif context is not None:
            raise ValueError("context belongs to a GMM that was constructed with one; pass GMM(features, context=C).")
        max_iter = as_integer(method.max_iter if max_iter is None else max_iter, "max_iter")
        as_integer(max_iter, "max_iter", 0, clause="must not be negative")
        tol = as_number(method.tol if tol is None else tol, "tol")
        as_number(tol, "tol", 0, clause="must not be negative")
        truncate, told = as_fraction(truncate, "truncate"), as_functions(callbacks, "callbacks")
        as_choice(backend, "backend", reductions.BACKENDS)
        settings: dict[str, Any] = {}
        if checkpoint is not None or world.size > 1:
            settings = _settings(mixture, method, penalty, truncate, backend)
        limits = {"max_iter": max_iter, "tol": tol, **{name: getattr(method, name, None) for name in _LIMITS[2:]}}
        given = {"weights": weights, "generator": generator, "checkpoint": checkpoint, "context": context}
        limits |= {name: "none" if value is None else "given" for name, value in given.items()}
        limits |= {
            "columns": str(columns),
            "max_memory": str(max_memory),
            "kind of x": "read" if readable(x) else "in memory",
        }
        world.agree({"call": "fit"} | settings | limits)
        journal = Journal(Checkpoint.of(checkpoint), world)
        saved = None if journal.checkpoint is None else journal.checkpoint.read(mixture.means.device, world)
        frame = None if saved is None else Frame(saved["frame"][0], saved["frame"][1], extra)
        kind = as_dtype(dtype)
        limit = None if max_memory is None else as_bytes(max_memory)
        x, columns = _matched(x, weights, columns, world)
        weights = None if isinstance(x, Source) else weights
        problem = _problem(
            mixture, x, weights, penalty, truncate, backend, kind, generator, world, frame, journal, limit, extra
        )
        problem = replace(problem, frame=replace(problem.frame, columns=columns))
        facts = _facts(problem, mixture, method, settings) if settings else {}
        run = _Run(problem, method, tol, told, began, facts, single=mixture.means.dtype == torch.float32)
        inside = problem.frame.enter(mixture.detach().to(torch.float64))
        if saved is None:
            run.problem = problem.truncated(truncate, inside, max_iter)
            state = method.init(run.problem, inside)
        else:
            state = run.resume(saved)
        bar = _bar(max_iter, progress)
        if bar is not None:
            run.problem = replace(run.problem, show=lambda rows: bar.set_postfix_str(f"{rows} of {problem.rows} rows"))
        try:
            best = run.go(state, max_iter, bar)
        finally:
            if bar is not None:
                bar.close()
        result = _result(best, run)
    if warning := _doubt(run, tol, max_iter):
        warnings.warn(warning, ConvergenceWarning, stacklevel=2)
    if isinstance(start, GMM):
        if extra:
            start.load_state_dict(result.answer.state_dict())
            start.columns = columns
        else:
            start.assign(result.mixture)
    _logger.info("%s", result)
    return result


def _matched(x: Any, weights: Any, columns: tuple[str, ...] | None, world: World) -> tuple[Any, tuple[str, ...] | None]:
    """Points with the columns of the initial mixture, matched by name if both have names; and the names, or None."""
    if readable(x):
        x = world.share(Source.of(x, weights=weights).matched(columns))
        return x, columns or x.columns
    columns = columns or world.tell(table_names(x))[0]
    world.agree({"columns": columns})
    return table_of(x, columns), None if columns is None else tuple(columns)


def _problem(
    mixture: Mixture,
    x: Any,
    weights: Any,
    penalty: Any,
    truncate: float | None,
    backend: str,
    dtype: torch.dtype | None,
    generator: torch.Generator | None,
    world: World,
    frame: Frame | None,
    journal: Journal,
    limit: int | None,
    extra: int,
) -> Problem:
    """Check the data and create the problem; the last ``extra`` columns are contexts."""
    K, D, device = mixture.components, mixture.features + extra, mixture.means.device
    alone, name = world.size == 1, "x"
    if isinstance(x, Source):
        name, g = x.name, None
        if x.features != D:
            raise ValueError(f"{name} has {x.features} columns, expected {D} as in the model; pass the same columns.")
    else:
        x = as_points(x, features=D, minimum=K if alone else 0)
        if x.device != device:
            raise ValueError(f"x is on {x.device} but start on {device}; move one with .to().")
        g = as_weights(weights, x, some=alone)
    if limit is not None:
        x, g = _within(limit, mixture, x, g, dtype, world)
    problem = Problem.of(
        x,
        g,
        penalty,
        backend,
        generator,
        isotropic=mixture.factor.isotropic,
        extra=extra,
        dtype=dtype,
        device=device,
        world=world,
        truncate=truncate,
        frame=frame,
        journal=journal,
    )
    if problem.rows < K or not 0 < problem.mass < math.inf:
        raise ValueError(
            f"{name} has {problem.rows} rows of total weight {problem.mass * problem.unit:g}, expected at least {K}; "
            "pass more points or use fewer components."
        )
    return problem


def _within(limit: int, mixture: Mixture, x: Any, g: Any, dtype: torch.dtype | None, world: World) -> tuple[Any, Any]:
    """Points and weights, as a source with small enough chunks if a fit in memory would exceed the limit (bytes)."""
    K, D = mixture.components, mixture.features
    kind = mixture.factor.type_name(tied=mixture.factor.leading == 1 and K > 1)
    if isinstance(x, Source):
        return x.in_chunks(chunk_rows(limit, K, D, kind, torch.float64, x.reader.stored)), g
    # Points in float32 are converted to float64 during the fit if float32 is not accurate enough.
    wanted = estimate_memory(len(x), K, D, covariance_type=kind, dtype=torch.float64)
    if (x.dtype if dtype is None else dtype) == torch.float32:
        wanted += 4 * x.numel()
    (over,) = world.any(wanted > limit)
    if not over:
        return x, g
    return world.share(Source.of(x, weights=g, chunk_rows=chunk_rows(limit, K, D, kind, torch.float64))), None


def _settings(
    mixture: Mixture, method: Method[Any], penalty: Any, truncate: float | None, backend: str
) -> dict[str, Any]:
    """Return descriptions of the settings, which must be equal on all ranks and when a fit is resumed."""
    network = f", {describe([str(method.model), method.model.epsilon])}" if isinstance(method, Network) else ""
    return {
        "model": f"{mixture.components} components in {mixture.features} dimensions, {mixture.factor.family}, "
        f"{mixture.factor.leading} factors{network}",
        "method": facts_of(method, "method", skip=(*_LIMITS, "model")),
        "penalty": facts_of(penalty, "penalty") if isinstance(penalty, Penalty) else describe(penalty, "penalty"),
        "truncate": describe(truncate, "truncate"),
        "backend": describe(backend, "backend"),
    }


def _facts(problem: Problem, mixture: Mixture, method: Method[Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return readable descriptions of the data and of the initial mixture, which must be equal when a fit is resumed."""
    frame = problem.frame
    if isinstance(method, Network):
        start = _tensors(method.model.carried(frame.shift, frame.scale).state_dict())
    else:
        start = _parts(frame.enter(mixture.detach().to(torch.float64)))
    facts = settings | {
        "data": f"{problem.rows} rows of {problem.data.features} columns, total weight {problem.mass * problem.unit:.9g}, "
        f"fingerprint {problem.fingerprint}",
        "dtype": str(problem.data.dtype),
        "generator": f"seed {problem.generator.initial_seed()}",
        "start": marks(start, frame.shift, frame.scale),
    }
    problem.world.agree(facts)
    return facts


def _parts(mixture: Mixture) -> list[torch.Tensor]:
    """The parameters of a mixture in standardized coordinates, with log-weights of at least -1000."""
    return [mixture.log_weights.clamp(min=-1e3), mixture.means, *mixture.factor.tensors.values()]


def _tensors(answer: Any) -> list[torch.Tensor]:
    """The parameters of a network, or the mixture of a posterior."""
    return list(answer.values()) if isinstance(answer, dict) else _parts(answer.mixture)


def _starting_mixture(start: Any, method: Any) -> Mixture:
    if not isinstance(method, Method):
        raise TypeError(f"method must be a Method such as gmmkeops.Adam(lr=0.05), got {type(method).__name__}.")
    if not isinstance(start, (Mixture, GMM)):
        raise TypeError(f"start must be a Mixture or a GMM, got {type(start).__name__}; see gmmkeops.initialise.")
    if isinstance(start, GMM):
        with torch.no_grad():
            return start(next(start.parameters()).new_zeros(start.context)) if start.context else start()
    mixture = start
    if mixture.batch_shape:
        raise ValueError(
            f"fit takes one mixture, got a batch of shape {tuple(mixture.batch_shape)}; fit them one by one."
        )
    return mixture


def _conditional(
    model: GMM, x: Any, context: Any, method: Method[Any], truncate: float | None
) -> tuple[Any, tuple[str, ...] | None, Method[Any], float]:
    """Points and contexts as one array, the names of its columns or None, and the method for the network."""
    if not isinstance(method, Gradient):
        raise ValueError(
            f"a GMM with a context is fitted by gradient, got {type(method).__name__}; pass gmmkeops.Adam(lr=1e-3)."
        )
    if truncate:
        raise ValueError(
            "truncate cannot be used for a GMM with a context, in which each point has its own mixture; leave it out."
        )
    columns = model.columns
    if context is not None:
        if readable(x):
            raise ValueError(
                "contexts of points from a file or another source must be the last columns of x; leave context out."
            )
        # A rank may have no points; that there are some in total is checked later.
        names, others = table_names(x), table_names(context)
        if columns is not None:
            x = table_of(x, columns[: model.features])
            context = table_of(context, columns[model.features :], "context")
        elif names is not None and others is not None:
            columns = names + others
        x = as_points(x, features=model.features, minimum=0)
        c = as_points(context, name="context", features=model.context, minimum=0)
        if len(x) != len(c):
            raise ValueError(f"context must have a row for each of the {len(x)} points, got {len(c)}.")
        x = torch.cat([x.to(torch.promote_types(x.dtype, c.dtype)), c.to(x.device)], 1)
    return x, columns, Network.of(model, method), 0


class _Run:
    """State of one call of fit: history, best evaluation, and reason for the end."""

    def __init__(
        self,
        problem: Problem,
        method: Method[Any],
        tol: float,
        callbacks: tuple[Callable[[Step], Any], ...],
        began: float,
        facts: dict[str, Any],
        *,
        single: bool,
    ) -> None:
        self.problem, self.method, self.tol, self.callbacks, self.began = problem, method, tol, callbacks, began
        self.facts, self.single = facts, single
        self.best: Evaluation | None = None
        self.history: dict[str, list[float]] = {"objective": [], "log_likelihood": [], "seconds": [], "live": []}
        self.ending = "finished"
        # Random identifier of this fit, by which its checkpoint files are recognized.
        self.mark = problem.world.tell(os.urandom(8).hex())[0]

    @property
    def iterations(self) -> int:
        return len(self.history["objective"])

    def snapshot(self, state: Any) -> dict[str, Any]:
        """The complete state for a checkpoint, on which all further iterations depend."""
        problem = self.problem
        arranged = None
        if isinstance(problem.data, Memory) and problem.data.cloud is not None:
            cloud = problem.data.cloud
            arranged = (cloud.epsilon, problem.data.by, cloud.remember())
        return {
            "facts": self.facts,
            "mark": self.mark,
            "frame": (problem.frame.shift, problem.frame.scale),
            "iteration": self.iterations,
            "history": {name: list(values) for name, values in self.history.items()},
            "seconds": time.perf_counter() - self.began,
            "ending": self.ending,
            "state": self.method.pack(state),
            "best": self.best,
            "generator": problem.generator.get_state(),
            "arranged": arranged,
            "dtype": str(problem.data.dtype),
        }

    def resume(self, saved: dict[str, Any]) -> Any:
        """Restore the state of a checkpoint, and return the state of the method.

        Raises:
            ValueError: The checkpoint was written by a fit of other data or with other settings.
        """
        problem = self.problem
        for name, value in self.facts.items():
            found = difference(saved["facts"].get(name), value)
            if found is None or (name == "start" and self._ended(saved, value)):
                continue
            assert problem.journal.checkpoint is not None, "it was read from there"
            raise ValueError(
                f"the checkpoint {os.fspath(problem.journal.checkpoint.path)} is of another {name} "
                f"({found[0]}; here {found[1]}); pass the same, or delete it to begin anew."
            )
        # The saved facts remain valid: the mixture that the fit had reached is no other start.
        self.facts = saved["facts"]
        self.history, self.best, self.mark = saved["history"], saved["best"], saved["mark"]
        self.began -= saved["seconds"]
        if isinstance(problem.data, Memory) and saved["dtype"] == str(torch.float64):
            problem.data.refine()
        if saved["arranged"] is not None and isinstance(problem.data, Memory):
            epsilon, by, memory = saved["arranged"]
            data = problem.data.arranged(epsilon, by, 1, problem.backend)
            # With another number of ranks, or rows in another order, the kd-tree differs and candidate lists are recomputed.
            alike = saved["ranks"] == problem.world.size == 1 and saved["layout"] == problem.journal.layout
            if data.cloud is not None and alike:
                data.cloud.recall(memory)
            self.problem = replace(problem, data=data)
        problem.generator.set_state(saved["generator"].cpu())
        problem.journal.recall(saved, problem.data.device)
        _logger.info("resuming from iteration %d", self.iterations)
        return self.method.unpack(self.problem, saved["state"])

    def _ended(self, saved: dict[str, Any], start: list[float]) -> bool:
        """Whether ``start`` is the result of the saved fit up to rounding; a GMM is its own result after a fit."""
        population, live, _ = self.method.current(self.problem, self.method.unpack(self.problem, saved["state"]))
        best, frame = saved["best"], self.problem.frame
        answers = [_parts(population.whole(live))]
        if best is not None:
            answers.append(_parts(best.mixture) if best.answer is None else _tensors(best.answer))
        found = [marks(parts, frame.shift, frame.scale, single=self.single) for parts in answers]
        return any(difference(answer, start) is None for answer in found)

    def go(self, state: Any, max_iter: int, bar: Any) -> Evaluation:
        """Iterate until convergence, a callback, Ctrl-C or ``max_iter`` ends the fit; return the final evaluation."""
        journal = self.problem.journal
        if self.iterations and self.method.finished(self.history["objective"], self.tol, self.problem):
            self.ending = "converged"
        if bar is not None:
            bar.update(self.iterations)
        try:
            while self.iterations < max_iter and self.ending == "finished":
                if self.iterations == _SETTLED:
                    self.problem = self.problem.settled(self.method.current(self.problem, state)[1])
                journal.begin(self.iterations, lambda: self.snapshot(state))  # noqa: B023
                if journal.due:
                    journal.write()
                state, now = self.method.step(self.problem, state)
                if not math.isfinite(now.objective):
                    self.ending = "diverged"
                elif self.best is None or self.method.returns_last or now.objective < self.best.objective:
                    self.best = now
                if self.ending != "diverged":
                    self._tell(now, bar)
            if self.ending != "diverged":
                journal.begin(self.iterations, lambda: self.snapshot(state))
                journal.write()
        except KeyboardInterrupt:
            self.problem.world.interrupted()
            # Some ranks may have completed the last iteration, and others not.
            self.best, self.history = journal.agreed((self.best, self.history), self.problem.data.device)
            journal.write()
            if self.best is None:
                raise
            self.ending = "interrupted"
        best = self.best
        if self.ending in ("finished", "converged", "stopped"):
            # The last step's mixture has not been evaluated yet. It is the result unless the best one is asked for.
            last = self.method.evaluate(self.problem, state)
            slack = 0.0 if best is None else 1e-8 * max(1.0, abs(best.objective))
            if math.isfinite(last.objective) and (
                best is None or not best.exact or self.method.returns_last or last.objective <= best.objective + slack
            ):
                best = last
        if best is None:
            raise ValueError(
                "the objective is not finite at the initial mixture; check the penalty, or start from gmmkeops.initialise."
            )
        return best

    def _tell(self, now: Evaluation, bar: Any) -> None:
        """Append an iteration to the history, update the progress bar, call the callbacks, and test for the end of the fit."""
        for name, value in (
            ("objective", now.objective),
            ("log_likelihood", now.log_likelihood),
            ("seconds", time.perf_counter() - self.began),
            ("live", len(now.live)),
        ):
            self.history[name].append(value)
        if bar is not None:
            bar.set_postfix(objective=f"{now.objective:.4f}", live=len(now.live), refresh=False)
            bar.update()
        history = self.history
        step = Step(self.iterations - 1, now.objective, now.log_likelihood, now.live, history, now, self.problem)
        with self.problem.world.callback():
            stops = [callback(step) is True for callback in self.callbacks]
        (stop,) = self.problem.world.any(any(stops))
        if self.method.finished(history["objective"], self.tol, self.problem):
            self.ending = "converged"
        elif stop:
            self.ending = "stopped"


def _doubt(run: _Run, tol: float, max_iter: int) -> str:
    """Text of the ConvergenceWarning of a run; empty if there is none."""
    if run.ending == "finished" and tol > 0 and max_iter > 0 and run.iterations == max_iter:
        return f"the fit did not converge to tol={tol:g} within {max_iter} iterations; raise max_iter or tol."
    if run.ending == "diverged":
        return (
            f"the objective became infinite or NaN at iteration {run.iterations}; the best mixture before it is returned. "
            "A smaller learning rate usually helps."
        )
    return ""


def _result(best: Evaluation, run: _Run) -> FitResult:
    problem = run.problem
    objective, likelihood = best.objective, best.log_likelihood
    if best.answer is None:
        with torch.no_grad():
            if not best.exact:
                likelihood = -float(problem.negative_log_likelihood(best.mixture))
            objective = float(problem.penalised(best.mixture)) - likelihood
    live = set(best.live.tolist())
    ledger = problem.ledger.of_all(problem.world)
    full = best.mixture.factor.coupled
    report = Report(
        dead_components=tuple(k for k in range(best.mixture.components) if k not in live),
        live_components=len(live),
        floors_hit=tuple(best.floored.nonzero()[:, 0].tolist()),
        engine=reductions.engine(problem.data.device, problem.backend, features=problem.data.features, full=full),
        device=str(problem.data.device),
        dtype="float64" if ledger.wide else str(problem.data.dtype).removeprefix("torch."),
        mass=problem.mass * problem.unit,
        truncate=ledger.epsilon,
        certificate=ledger.certificate,
        pairs=ledger.looked / ledger.pairs if ledger.pairs else 1.0,
        seconds=time.perf_counter() - run.began,
        interrupted=run.ending == "interrupted",
    )
    mixture = problem.frame.leave(best.mixture)
    converged = run.ending == "converged"
    answer = run.method.answer(best.answer, problem.frame)
    return FitResult(mixture, objective, likelihood, converged, run.iterations, run.history, report, answer)


def _bar(total: int, progress: bool | None) -> Any:
    if progress is False:
        return None
    from tqdm.auto import tqdm

    bar = tqdm(total=total, desc="fit", unit="it", disable=None if progress is None else False)
    return None if bar.disable else bar
