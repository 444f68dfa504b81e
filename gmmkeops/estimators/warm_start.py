"""Warm starts: the iterations that led to a fitted mixture, and the test of convergence that continues them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gmmkeops.fitting import Method, Step

__all__ = ["Continuation", "Trace"]

# Largest relative difference of mean log-likelihoods of the same mixture and points, also in float32.
_SAME = 1e-5


@dataclass(frozen=True)
class Trace:
    """The iterations that led to the mixture of an estimator, for warm starts that continue them.

    Args:
        objectives: The objective of each iteration, nats per point.
        log_likelihood: Mean log-likelihood of the mixture that they led to, nats per point.
        settings: Method and penalty of the fits.
    """

    objectives: list[float]
    log_likelihood: float
    settings: str


class Continuation:
    """Callback that tests a warm start for convergence, together with the iterations that it continues.

    Without them, a fit of one iteration could not compare its objective with an earlier one. The tolerance of the fit itself is
    set to zero.

    Args:
        method: Method of the fit, with its final tolerance.
        earlier: The iterations that are continued, or None.

    Attributes:
        earlier: The fit that is continued; None if there is none, and the fit tests for convergence itself.
        converged: Whether the iterations have converged.
        objectives: Objectives of the earlier iterations, nats per point; empty if they belong to other points.
    """

    def __init__(self, method: Method[Any], earlier: Trace | None) -> None:
        # A warm start of an annealed fit begins with a high temperature again, for which objectives are not comparable.
        self.earlier = None if getattr(method, "temperature", None) is not None else earlier
        self.method, self.converged = method, False
        self.objectives = [] if self.earlier is None else self.earlier.objectives

    def __call__(self, step: Step) -> bool:
        if self.earlier is not None:
            before, now = self.earlier.log_likelihood, step.history["log_likelihood"][0]
            if abs(now - before) > max(self.method.tol, _SAME * max(1.0, abs(before))):
                self.objectives = []
            objectives = [*self.objectives, *step.history["objective"]]
            self.converged = self.method.finished(objectives, self.method.tol, step._objective)
        return self.converged
