"""The loop of a fit: iterations of a method until it converges, is stopped, or reaches the maximum number of iterations."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from gmmkeops import reductions
from gmmkeops._checks import FormerKeys
from gmmkeops.data import difference
from gmmkeops.fitting.data import Memory
from gmmkeops.fitting.facts import tensors_of
from gmmkeops.fitting.identity import marks
from gmmkeops.fitting.method import Evaluation, Method
from gmmkeops.fitting.objective import Objective
from gmmkeops.fitting.result import FORMER, Ending, Step
from gmmkeops.fitting.validation import Validation

__all__ = ["Run"]

_logger = logging.getLogger("gmmkeops")

# Number of iterations after which points are regrouped by their component labels, which are then better than the initial ones.
_SETTLED = 4


class Run:
    """The iterations of one call of :func:`gmmkeops.fit`: history, best evaluation, and the reason for the end.

    Args:
        objective: The objective.
        method: The method.
        tol: Tolerance, nats per point.
        callbacks: Functions of a :class:`Step`.
        began: Time at which the fit was called, from ``time.perf_counter``.
        facts: Descriptions of data and settings, which must equal those in a checkpoint.
        single: Whether the initial mixture is float32.
        validation: Mean log-likelihood of held-out points, by which the best mixture is chosen; or None.
    """

    def __init__(
        self,
        objective: Objective,
        method: Method[Any],
        tol: float,
        callbacks: tuple[Callable[[Step], Any], ...],
        began: float,
        facts: dict[str, Any],
        *,
        single: bool,
        validation: Validation | None = None,
    ) -> None:
        self.objective, self.method, self.tol, self.callbacks, self.began = objective, method, tol, callbacks, began
        self.facts, self.single, self.validation = facts, single, validation
        self.best: Evaluation | None = None
        self.history: dict[str, list[float]] = {"objective": [], "log_likelihood": [], "seconds": [], "active": []}
        if validation is not None:
            self.history["validation"] = []
        self.ending = Ending.MAX_ITER
        # Random identifier of this fit, by which its checkpoint files are recognized.
        self.mark = objective.passes.world.tell(os.urandom(8).hex())[0]

    @property
    def iterations(self) -> int:
        """Number of iterations performed."""
        return len(self.history["objective"])

    def snapshot(self, state: Any) -> dict[str, Any]:
        """Return the complete state for a checkpoint, on which all further iterations depend."""
        objective, arranged = self.objective, None
        if isinstance(objective.data, Memory) and objective.data.cloud is not None:
            cloud = objective.data.cloud
            arranged = (cloud.epsilon, objective.data.by, cloud.remember())
        return {
            "facts": self.facts,
            "mark": self.mark,
            "frame": (objective.frame.shift, objective.frame.scale),
            "iteration": self.iterations,
            "history": {name: list(values) for name, values in self.history.items()},
            "seconds": time.perf_counter() - self.began,
            "ending": self.ending.value,
            "state": self.method.pack(state),
            "best": self.best,
            "generator": objective.passes.generator.get_state(),
            "arranged": arranged,
            "dtype": str(objective.data.dtype),
        }

    def resume(self, saved: dict[str, Any]) -> Any:
        """Restore the state of a checkpoint, and return the state of the method.

        Raises:
            ValueError: The checkpoint was written for different data or settings.
        """
        objective, journal = self.objective, self.objective.passes.journal
        for name, value in self.facts.items():
            found = difference(saved["facts"].get(name), value)
            if found is None or (name == "start" and self._ended(saved, value)):
                continue
            assert journal.checkpoint is not None, "it was read from there"
            raise ValueError(
                f"the checkpoint {os.fspath(journal.checkpoint.path)} was written by a fit whose {name} differs "
                f"({found[0]}; here {found[1]}); pass the original {name}, or delete the file to start a new fit."
            )
        # The saved descriptions are kept, also if the initial mixture is the result of the saved fit.
        self.facts = saved["facts"]
        self.history = FormerKeys(saved["history"], FORMER)
        self.best, self.mark = saved["best"], saved["mark"]
        self.began -= saved["seconds"]
        if isinstance(objective.data, Memory) and saved["dtype"] == str(torch.float64):
            objective.data.refine()
        if saved["arranged"] is not None and isinstance(objective.data, Memory):
            epsilon, by, memory = saved["arranged"]
            data = objective.data.arranged(epsilon, by, 1, objective.backend)
            # With another number of ranks, or rows in another order, the kd-tree differs and candidate lists are recomputed.
            alike = saved["ranks"] == objective.passes.world.size == 1 and saved["layout"] == journal.layout
            if data.cloud is not None and alike:
                minima = memory["minima"]
                data.cloud.recall(memory | {"minima": None if minima is None else minima.to(data.device)})
            self.objective = replace(objective, data=data)
        objective.passes.generator.set_state(saved["generator"].cpu())
        journal.recall(saved, objective.device)
        _logger.info("resuming from iteration %d", self.iterations)
        return self.method.unpack(self.objective, saved["state"])

    def _ended(self, saved: dict[str, Any], start: list[float]) -> bool:
        """Return whether ``start`` is the result of the saved fit up to rounding, as it is for a GMM after its fit."""
        reached = self.method.current(self.objective, self.method.unpack(self.objective, saved["state"]))
        best, frame = saved["best"], self.objective.frame
        answers = [tensors_of(reached)]
        if best is not None:
            answers.append(tensors_of(best.mixture if best.answer is None else best.answer))
        found = [marks(parts, frame.shift, frame.scale, single=self.single) for parts in answers]
        return any(difference(answer, start) is None for answer in found)

    def go(self, state: Any, max_iter: int, bar: Any) -> Evaluation:
        """Iterate until convergence, a callback, Ctrl-C or ``max_iter`` ends the fit; return the final evaluation."""
        journal = self.objective.passes.journal
        if self.iterations and self.method.finished(self.history["objective"], self.tol, self.objective):
            self.ending = Ending.CONVERGED
        if bar is not None:
            bar.update(self.iterations)
        steps = self.method.steps(self.objective, state, max_iter - self.iterations)
        try:
            while self.iterations < max_iter and self.ending is Ending.MAX_ITER:
                if self.iterations == _SETTLED:
                    settled = self.objective.settled(self.method.current(self.objective, state))
                    if settled is not self.objective:
                        left = max_iter - self.iterations
                        self.objective, steps = settled, self.method.steps(settled, state, left)
                journal.begin(self.iterations, lambda: self.snapshot(state))  # noqa: B023
                if journal.due:
                    journal.write()
                state, now = next(steps)
                if not math.isfinite(now.objective):
                    self.ending = Ending.DIVERGED
                    break
                self._keep(now)
                self._tell(now, bar)
            if self.ending is not Ending.DIVERGED:
                journal.begin(self.iterations, lambda: self.snapshot(state))
                journal.write()
        except KeyboardInterrupt:
            self.objective.passes.world.interrupted()
            # Some ranks may have completed the last iteration, and others not.
            self.best, self.history = journal.agreed((self.best, self.history), self.objective.device)
            journal.write()
            if self.best is None:
                raise
            self.ending = Ending.INTERRUPTED
        return self._final(state, steps)

    def _keep(self, now: Evaluation) -> None:
        """Keep an evaluation if it is the best so far, by the held-out points if there are any."""
        if self.validation is None:
            better = self.best is None or self.method.returns_last or now.objective < self.best.objective
        else:
            value = self.validation(now.mixture)
            better = self.best is None or value > max(self.history["validation"])
            self.history["validation"].append(value)
        if better:
            self.best = now

    def _final(self, state: Any, steps: Iterator[tuple[Any, Evaluation]]) -> Evaluation:
        """Return the evaluation that is the result of the fit, after the last one of the steps."""
        best = self.best
        if self.ending in (Ending.MAX_ITER, Ending.CONVERGED, Ending.STOPPED):
            # The last step's mixture has not been evaluated yet. It is the result unless the best one is asked for.
            last = self.method.last(self.objective, state, steps)
            slack = 0.0 if best is None else 1e-8 * max(1.0, abs(best.objective))
            if self.validation is not None:
                if best is None or self.validation(last.mixture) > max(self.history["validation"]):
                    best = last
            elif math.isfinite(last.objective) and (
                best is None or not best.exact or self.method.returns_last or last.objective <= best.objective + slack
            ):
                best = last
        if best is None:
            raise ValueError(
                "the objective is not finite at the initial mixture; check the penalty, or pass a start from "
                "gmmkeops.initialize."
            )
        return best

    def _tell(self, now: Evaluation, bar: Any) -> None:
        """Append an iteration to the history, update the progress bar, call the callbacks, and test for the end of the fit."""
        for name, value in (
            ("objective", now.objective),
            ("log_likelihood", now.log_likelihood),
            ("seconds", time.perf_counter() - self.began),
            ("active", len(now.active)),
        ):
            self.history[name].append(value)
        if bar is not None:
            bar.set_postfix(objective=f"{now.objective:.4f}", active=len(now.active), refresh=False)
            bar.update()
        stop = self._is_stopped(now)
        if self.method.finished(self.history["objective"], self.tol, self.objective):
            self.ending = Ending.CONVERGED
        elif stop:
            self.ending = Ending.STOPPED

    def _is_stopped(self, now: Evaluation) -> bool:
        """Call the callbacks of all ranks, and return whether one of them ends the fit."""
        world = self.objective.passes.world
        if not self.callbacks and world.size == 1:
            return False
        step = Step(
            self.iterations - 1,
            now.objective,
            now.log_likelihood,
            now.active.to(self.objective.data.device),
            FormerKeys(self.history, FORMER),
            now,
            self.objective,
        )
        with world.callback(), reductions.user_threads():
            stops = [callback(step) is True for callback in self.callbacks]
        (stop,) = world.any(any(stops))
        return stop
