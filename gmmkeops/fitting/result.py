"""Result and report of a fit, and the argument of callbacks."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch

from gmmkeops._checks import FormerKeys, FormerName
from gmmkeops.fitting.method import Evaluation
from gmmkeops.fitting.objective import Objective
from gmmkeops.models import Mixture

__all__ = ["Ending", "FitResult", "Report", "Start", "StartReport", "Step"]


class Ending(enum.StrEnum):
    """Reason why a fit ended.

    The fit has converged, performed ``max_iter`` iterations, was stopped by a callback, diverged, or was interrupted by Ctrl-C.

    Example:
        >>> import torch, gmmkeops as gk
        >>> x = torch.linspace(-1, 1, 100).double()[:, None]
        >>> gk.fit(gk.initialize(x, 1), x, gk.EM()).ending
        <Ending.CONVERGED: 'converged'>
    """

    CONVERGED = "converged"
    MAX_ITER = "max_iter"
    STOPPED = "stopped"
    DIVERGED = "diverged"
    INTERRUPTED = "interrupted"


# Keys of the history by those of version 0.1.
FORMER = {"live": "active"}

_ENDED = {
    Ending.CONVERGED: "converged",
    Ending.MAX_ITER: "stopped at max_iter",
    Ending.STOPPED: "stopped by a callback",
    Ending.DIVERGED: "diverged",
    Ending.INTERRUPTED: "interrupted",
}


@dataclass(frozen=True)
class StartReport:
    """How an initial mixture was found.

    Args:
        strategy: Name of the strategy.
        candidates: Number of candidates from which the search started.
        rounds: Number of rounds of splitting and merging.
        sweeps: Number of E-steps over K components and all points of the sample; E-steps with 2K components count twice,
            and an accelerated iteration counts as three E-steps.
        points: Number of points of the sample.
        rows: Number of all points.
        prior: Whether the objective of the search contained a prior of the covariances.
        seconds: Wall time.
    """

    strategy: str
    candidates: int
    rounds: int
    sweeps: float
    points: int
    rows: int
    prior: bool
    seconds: float


class Start(NamedTuple):
    """An initial mixture, and what is known about the points from the search for it.

    Args:
        mixture: The mixture, data units.
        report: How it was found; None if it was given.
        spread: Centers and standard deviations (D,) of the columns of all points, as
            :func:`~gmmkeops.data.spread.trimmed_spread` computes them; None if they are not known.
    """

    mixture: Mixture
    report: StartReport | None = None
    spread: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass(frozen=True)
class Report:
    """Report of a fit: engine, precision, error bounds, pruned and regularized components.

    Args:
        pruned_components: Indices of components that were pruned because their expected count became negligible.
        n_active_components: Number of active components.
        regularized_components: Indices of components whose covariance was regularized at least once.
        engine: ``"native"``, ``"keops"``, ``"triton"`` or ``"dense"``. What the numbers of an engine are not accurate enough for,
            such as distant points, is left to the dense engine.
        device: Device of the computation.
        dtype: Precision of the points (parameters are float64).
        total_weight: Total weight of the points.
        truncate: ε of the truncation; 0 if every pair of point and component was evaluated.
        certificate: Upper bound on the truncation error of the log-density of each point, nats. Truncation only decreases
            log-densities.
        evaluated_fraction: Fraction of all point-component pairs that were evaluated in the last pass.
        seconds: Wall time, including validation and standardization of the data.
        interrupted: Whether Ctrl-C ended the fit.
        degenerate_components: Indices of components that have fewer points than their covariance needs: D + 1 for a covariance
            matrix, two for variances. Empty with a prior of the covariances, or a penalty that prunes components.
        start: How the initial mixture was found; None if it was given.
        fallback: Reason why the fastest engine, or the one that was requested, was not used; None if it was.
    """

    pruned_components: tuple[int, ...]
    n_active_components: int
    regularized_components: tuple[int, ...]
    engine: str
    device: str
    dtype: str
    total_weight: float
    truncate: float
    certificate: float
    evaluated_fraction: float
    seconds: float
    interrupted: bool
    degenerate_components: tuple[int, ...] = ()
    start: StartReport | None = None
    fallback: str | None = None

    dead_components = FormerName("pruned_components")
    live_components = FormerName("n_active_components")
    floors_hit = FormerName("regularized_components")
    mass = FormerName("total_weight")
    pairs = FormerName("evaluated_fraction")


@dataclass(frozen=True, repr=False)
class FitResult:
    """Result of a fit: the mixture, its objective, and the history of the iterations.

    Args:
        mixture: Fitted mixture with all K components, float64, data units: that of the last iteration for methods that decrease
            the objective in every step, such as EM, and the best one for others, such as Adam.
        objective: Mean negative log-likelihood plus penalty of the mixture, nats per point.
        log_likelihood: Mean log-likelihood of the mixture, nats per point.
        ending: Reason why the fit ended.
        n_iter: Number of iterations performed.
        history: Lists with one entry per iteration: "objective" and "log_likelihood" (nats per point, of the mixture at the
            beginning of the iteration; with minibatches a mean over the batches), "seconds" since the call, "active" (number of
            active components), with ``validation`` also "validation" (mean log-likelihood of the held-out points, nats per
            point). For EM "objective" includes the effect of ``reg_covar`` (:class:`~gmmkeops.EM`).
        report: Engine, dtype, error bounds, pruned and regularized components.
        answer: Full result of methods that fit more than a mixture: the posterior, a :class:`gmmkeops.bayes.NormalWishart` with
            the expectation ``mixture`` (``objective`` is then the negative evidence lower bound); or the conditional
            :class:`~gmmkeops.GMM`, whose mixture at the average context is ``mixture``. None for other methods.

    Example:
        >>> import torch, gmmkeops as gk
        >>> x = torch.linspace(-1, 1, 100).double()[:, None]
        >>> result = gk.fit(gk.initialize(x, 1), x, gk.EM())
        >>> result.converged, result.mixture, result.report.n_active_components
        (True, Mixture(components=1, features=1, factor=full), 1)
        >>> len(result.history["objective"]) == result.n_iter
        True
    """

    mixture: Mixture
    objective: float
    log_likelihood: float
    ending: Ending
    n_iter: int
    history: dict[str, list[float]]
    report: Report
    answer: Any = None

    def __post_init__(self) -> None:
        # Files contain the value of the enumeration.
        object.__setattr__(self, "ending", Ending(self.ending))
        object.__setattr__(self, "history", FormerKeys(self.history, FORMER))

    @property
    def converged(self) -> bool:
        """Whether the fit has converged within the tolerance."""
        return self.ending is Ending.CONVERGED

    @property
    def posterior(self) -> Any:
        """Posterior distribution fitted by variational Bayes; None for other methods."""
        return self.answer

    def __repr__(self) -> str:
        return (
            f"FitResult({self.ending.value} after {self.n_iter} iterations, log_likelihood={self.log_likelihood:.4f}, "
            f"{self.mixture!r})"
        )

    def __str__(self) -> str:
        r, K = self.report, self.mixture.n_components
        fraction, bound = r.evaluated_fraction, r.certificate
        return (
            f"{_ENDED[self.ending]} after {self.n_iter} iterations in {r.seconds:.2f} s on {r.device} ({r.engine}, {r.dtype}): "
            f"objective {self.objective:.4f}, mean log-likelihood {self.log_likelihood:.4f} nats per point, "
            f"{r.n_active_components} of {K} components active"
        ) + (f"; {fraction:.2%} of all pairs evaluated, error at most {bound:.0e} nats" if fraction < 1 else "")


@dataclass(frozen=True)
class Step:
    """State of a fit after an iteration, which is passed to callbacks.

    Args:
        iteration: Number of the iteration, from 0.
        objective: Objective of ``mixture``, nats per point.
        log_likelihood: Mean log-likelihood of ``mixture``, nats per point.
        active: Indices of the active components, int64.
        history: As in :class:`FitResult`, up to this iteration.
    """

    iteration: int
    objective: float
    log_likelihood: float
    active: torch.Tensor
    history: dict[str, list[float]]
    _evaluation: Evaluation = field(repr=False)
    _objective: Objective = field(repr=False)

    live = FormerName("active")

    @cached_property
    def mixture(self) -> Mixture:
        """Mixture at the beginning of the iteration, to which the objective belongs; float64, data units."""
        return self._objective.leave(self._evaluation.mixture)
