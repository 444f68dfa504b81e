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
    """A fitted mixture and how it came about.

    Args:
        mixture: The last mixture for methods whose every step lowers their objective, such as EM; for others, such as Adam,
            the best one. All K components, float64, data units.
        objective: Its mean negative log-likelihood plus penalty, nats per point.
        log_likelihood: Its mean log-likelihood, nats per point.
        converged: Whether the tolerance was met.
        n_iter: Iterations done.
        history: Lists with one entry per iteration: "objective", "log_likelihood" (nats per point, of the mixture that
            the iteration started from; with minibatches a running mean), "seconds" since the start, "live" components.
            "objective" is what the steps lower: for EM it includes the effect of ``reg_covar`` (:class:`~gmmkeops.EM`).
        report: What happened on the way.
        answer: What the mixture is a part of, where there is more: the :class:`gmmkeops.bayes.NormalWishart` whose expectation
            it is (the objective is then minus its lower bound), or the conditional :class:`~gmmkeops.GMM` whose mixture of an
            average context it is.

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
        """The answer of a Bayesian method."""
        return self.answer

    def __str__(self) -> str:
        r, K = self.report, self.mixture.components
        end = "interrupted" if r.interrupted else "converged" if self.converged else "stopped"
        return (
            f"{end} after {self.n_iter} iterations in {r.seconds:.2f} s on {r.device} ({r.engine}, {r.dtype}): "
            f"objective {self.objective:.4f}, mean log-likelihood {self.log_likelihood:.4f} nats per point, "
            f"{r.live_components} of {K} components live"
        ) + (
            f"; {r.pairs:.2%} of all pairs evaluated, error at most {r.certificate:.0e} nats" if r.pairs < 1 else ""
        )


@dataclass(frozen=True)
class Step:
    """What a callback sees of an iteration.

    Args:
        iteration: From 0.
        objective: Nats per point, of ``mixture``.
        log_likelihood: Nats per point, of ``mixture``.
        live: Indices of the live components.
        history: As in :class:`FitResult`, up to here.
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
        """The mixture that the objective belongs to, in the user's units, float64."""
        return self._problem.frame.leave(self._evaluation.mixture)
