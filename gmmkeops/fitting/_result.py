"""What a fit answers: the mixture and how it came about; and what callbacks see on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from gmmkeops.fitting._method import Evaluation, Problem
from gmmkeops.mixture import Mixture

__all__ = ["FitResult", "Report", "Step"]


@dataclass(frozen=True)
class Report:
    """What happened on the way.

    Args:
        dead_components: Components that ended with less than a thousandth of a point, and left the work.
        live_components: How many did not.
        floors_hit: Components whose covariance was held up by a bound at least once.
        engine: ``"dense"`` or ``"keops"``.
        device: Where the fit ran.
        dtype: What the points were computed in (parameters are float64).
        mass: Total weight of the points.
        truncate: The ε of the truncation, 0 where every pair was looked at.
        certificate: Most that truncation may have taken from any point's log-likelihood under ``mixture``, nats; what is
            lost is never negative.
        pairs: Share of all pairs of point and component that the last sweep looked at.
        seconds: Wall time, checks and frame included.
        interrupted: Whether Ctrl-C ended it.
    """

    dead_components: tuple[int, ...]
    live_components: int
    floors_hit: tuple[int, ...]
    engine: str
    device: str
    dtype: str
    mass: float
    truncate: float
    certificate: float
    pairs: float
    seconds: float
    interrupted: bool


@dataclass(frozen=True)
class FitResult:
    """Result of a fit: the mixture, its objective, and the history of the iterations.

    Args:
        mixture: The fitted mixture with all K components, float64, data units: the last one for methods that decrease the
            objective in every step, such as EM, and the best one for others, such as Adam.
        objective: Mean negative log-likelihood plus penalty of the mixture, nats per point.
        log_likelihood: Mean log-likelihood of the mixture, nats per point.
        converged: Whether the tolerance was met.
        n_iter: Number of iterations performed.
        history: Lists with one entry per iteration: "objective", "log_likelihood" (nats per point, of the mixture that
            the iteration started from; with minibatches a running mean), "seconds" since the start, "live" (the number of
            active components). For EM "objective" includes the effect of ``reg_covar`` (:class:`~gmmkeops.EM`).
        report: Engine, dtype, error bounds, pruned and regularized components.
        answer: The full result of methods that fit more than a mixture: the :class:`gmmkeops.bayes.NormalWishart` posterior,
            whose expectation is ``mixture`` (the objective is then minus the lower bound), or the conditional
            :class:`~gmmkeops.GMM`, whose mixture at an average context is ``mixture``. None for other methods.

    Example:
        >>> import torch, gmmkeops as gk
        >>> x = torch.linspace(-1, 1, 100).double()[:, None]
        >>> result = gk.fit(gk.initialise(x, 1), x, gk.EM())
        >>> result.converged, result.mixture, result.report.live_components
        (True, Mixture(components=1, features=1, factor=full), 1)
        >>> len(result.history["objective"]) == result.n_iter
        True
    """

    mixture: Mixture
    objective: float
    log_likelihood: float
    converged: bool
    n_iter: int
    history: dict[str, list[float]]
    report: Report
    answer: Any = None

    @property
    def posterior(self) -> Any:
        """The posterior that a Bayesian method has fitted; None for other methods."""
        return self.answer

    def __str__(self) -> str:
        r, K = self.report, self.mixture.components
        end = "interrupted" if r.interrupted else "converged" if self.converged else "stopped"
        return (
            f"{end} after {self.n_iter} iterations in {r.seconds:.2f} s on {r.device} ({r.engine}, {r.dtype}): "
            f"objective {self.objective:.4f}, mean log-likelihood {self.log_likelihood:.4f} nats per point, "
            f"{r.live_components} of {K} components live"
        ) + (f"; {r.pairs:.2%} of all pairs evaluated, error at most {r.certificate:.0e} nats" if r.pairs < 1 else "")


@dataclass(frozen=True)
class Step:
    """State of a fit after an iteration, as callbacks receive it.

    Args:
        iteration: Number of the iteration, from 0.
        objective: Objective of ``mixture``, nats per point.
        log_likelihood: Mean log-likelihood of ``mixture``, nats per point.
        live: Indices of the active components, int64.
        history: As in :class:`FitResult`, up to this iteration.
    """

    iteration: int
    objective: float
    log_likelihood: float
    live: torch.Tensor
    history: dict[str, list[float]]
    _evaluation: Evaluation = field(repr=False)
    _problem: Problem = field(repr=False)

    @cached_property
    def mixture(self) -> Mixture:
        """Mixture at the beginning of the iteration, to which the objective belongs; float64, data units."""
        return self._problem.frame.leave(self._evaluation.mixture)
