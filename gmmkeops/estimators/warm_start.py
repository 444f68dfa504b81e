"""Warm starts: the history of a fitted mixture, and the test of convergence that includes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gmmkeops.fitting import Method, Step

__all__ = ["Continuation", "Trace"]

# Relative rounding error of mean log-likelihoods, also in float32.
_SAME = 1e-5


@dataclass(frozen=True)
class Trace:
    """History of the fits of an estimator, which a warm start continues.

    Args:
        objectives: Objectives of the iterations, nats per point.
        log_likelihood: Mean log-likelihood of the fitted mixture, nats per point.
        settings: Description of the method and the penalty of the fits.
    """

    objectives: list[float]
    log_likelihood: float
    settings: str


class Continuation:
    """Callback that tests a warm start for convergence, including the iterations of the earlier fits.

    A warm start of one iteration can thus compare its objective with an earlier one. The tolerance of the fit itself is set to
    zero.

    Args:
        method: Method of the fit, with its final tolerance.
        earlier: History of the earlier fits, or None.

    Attributes:
        earlier: History of the earlier fits; None if the fit itself tests for convergence.
        converged: Whether the iterations have converged.
        objectives: Objectives of the earlier iterations, nats per point; empty if the earlier fits used other points.
    """

    def __init__(self, method: Method[Any], earlier: Trace | None) -> None:
        # An annealed fit starts again at a high temperature, where objectives are not comparable with the earlier ones.
        self.earlier = None if getattr(method, "temperature", None) is not None else earlier
        self.method, self.converged = method, False
        self.objectives = [] if self.earlier is None else self.earlier.objectives

    @property
    def callbacks(self) -> tuple[Callable[[Step], bool], ...]:
        """This callback, if there are earlier fits."""
        return () if self.earlier is None else (self,)

    def __call__(self, step: Step) -> bool:
        assert self.earlier is not None, "it is a callback of warm starts only"
        before, now = self.earlier.log_likelihood, step.history["log_likelihood"][0]
        if abs(now - before) > max(self.method.tol, _SAME * max(1.0, abs(before))):
            self.objectives = []
        objectives = [*self.objectives, *step.history["objective"]]
        self.converged = self.method.finished(objectives, self.method.tol, step._objective)
        return self.converged
