r"""Variational Bayes: coordinate ascent on the evidence lower bound.

.. math::

    r_{nk} \propto \exp\bigl(E \log \pi_k + \tfrac12 E \log |\Lambda_k| - \tfrac{D}{2\kappa_k}
        - \tfrac12 \lVert U_k^\top (x_n - m_k) \rVert^2\bigr), \qquad
    q(\theta) = \text{conjugate update of the prior by the sufficient statistics of } r

References: Bishop 2006, *Pattern Recognition and Machine Learning*, §10.2; Blei and Jordan 2006 for the Dirichlet process;
Hoffman, Blei, Wang and Paisley 2013, *Stochastic variational inference*, JMLR 14, for minibatches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from gmmkeops._checks import as_choice, as_number
from gmmkeops.bayes.variational.normal_wishart import NormalWishart
from gmmkeops.bayes.variational.start import best_level
from gmmkeops.components import Moments, as_tensor, check_finite
from gmmkeops.fitting import Evaluation, Method, Objective, StartReport, check_settings, known
from gmmkeops.models import Mixture

__all__ = ["VariationalBayes"]

_WEIGHTS = ("dirichlet_process", "dirichlet_distribution")


@known("VariationalBayes")
@dataclass(frozen=True)
class _State:
    """Posterior in standardized coordinates, number of minibatches, and running average of their sufficient statistics."""

    posterior: NormalWishart
    batches: int = 0
    memory: Moments | None = None


@dataclass(frozen=True, repr=False)
class VariationalBayes(Method[_State]):
    r"""Fit a posterior distribution over mixtures; the ``posterior`` of the result is a :class:`NormalWishart`.

    The objective is the negative evidence lower bound per point, with all constants. Components are not pruned: the posterior
    of a component without points equals its prior, and its weight is close to zero. With a number of components instead of an
    initial mixture, :func:`gmmkeops.fit` compares posteriors from k-means and from mixtures with fewer components, with at most
    100 iterations each, and begins with the mixture of the best one.

    Args:
        weights: Prior on the weights: ``"dirichlet_process"`` (truncated at K) or ``"dirichlet_distribution"``.
        concentration: Concentration of the prior on the weights (or on each stick-breaking fraction); default: 1 / K.
        mean_precision: Prior κ, the number of points to which the prior on the means is equivalent.
        means: Prior mean (D,), data units; default: mean of the data.
        degrees: Prior degrees of freedom ν > D - 1; default: D.
        covariances: Prior scatter :math:`W^{-1}`: (D, D) for full and tied precisions, (D,) for diagonal ones, a number for
            spherical ones, squared data units; default: covariance of the data.
        begin: Initial posterior, data units; default: computed from the responsibilities of the initial mixture.
        batch_size: Number of points per natural-gradient step, or None for all points. An iteration is one pass over the data.
        step_exponent, step_offset: Step size schedule of minibatches, as for :class:`~gmmkeops.EM`.
        reg_covar: Constant added to the variances, squared data units.
        accelerate: Whether to extrapolate after every two steps by SQUAREM (Varadhan and Roland 2008, Scandinavian Journal of
            Statistics 35). An extrapolation that decreases the bound is discarded. An iteration then takes three passes over the
            data. Not combined with ``batch_size``.
        max_iter: Maximum number of iterations, if not passed to :func:`gmmkeops.fit`.
        tol: Tolerance, nats per point. The fit has converged when the evidence lower bound per point has changed by less than
            this over ``patience`` iterations. If components lose their weight slowly, the bound can still increase by more
            later; therefore the default is small.
        relative_tol: Tolerance as a fraction of the bound.
        patience: Number of iterations over which the change is measured.

    Raises:
        ValueError: An argument out of its range, or a penalty, since the priors take its place.

    Reference:
        Blei and Jordan 2006, *Variational inference for Dirichlet process mixtures*, Bayesian Analysis 1; in minibatches:
        Hoffman, Blei, Wang and Paisley 2013, *Stochastic variational inference*, JMLR 14.

    Example:
        >>> import torch, gmmkeops as gk
        >>> x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0)).double()
        >>> x[:150] += 10
        >>> result = gk.fit(gk.initialize(x, 6), x, gk.bayes.VariationalBayes(concentration=0.01), max_iter=500)
        >>> int((result.mixture.weights > 0.01).sum())
        2
    """

    returns_last: ClassVar[bool] = True

    weights: str = "dirichlet_process"
    concentration: float | None = None
    mean_precision: float = 1.0
    means: Any = None
    degrees: float | None = None
    covariances: Any = None
    begin: NormalWishart | None = None
    batch_size: int | None = None
    step_exponent: float = 0.6
    step_offset: float = 2.0
    accelerate: bool = False
    reg_covar: float = 1e-6
    max_iter: int = 1000
    tol: float = 1e-6
    relative_tol: float = 0.0
    patience: int = 1

    def __post_init__(self) -> None:
        as_choice(self.weights, "weights", _WEIGHTS)
        for name in ("concentration", "mean_precision", "degrees"):
            value = getattr(self, name)
            if value is not None or name == "mean_precision":
                as_number(value, name, 0, above=True)
        check_settings(self)
        if self.accelerate and self.batch_size:
            raise ValueError("accelerate=True requires passes over all points; omit batch_size or accelerate.")
        if self.begin is not None and not isinstance(self.begin, NormalWishart):
            raise TypeError(
                f"begin must be a NormalWishart or None, got {type(self.begin).__name__}; pass the posterior of a FitResult."
            )

    @property
    def portable(self) -> bool:
        return True

    def start(
        self, x: Any, n_components: int, *, covariance_type: str = "full", **options: Any
    ) -> tuple[Mixture, StartReport] | None:
        if self.begin is not None:
            return None
        return best_level(x, n_components, self, covariance_type, **options)

    def init(self, objective: Objective, mixture: Mixture) -> _State:
        if objective.penalty is not None:
            raise ValueError(
                f"VariationalBayes does not accept a penalty, got {type(objective.penalty).__name__}; set its priors instead."
            )
        if objective.unit != 1:
            raise ValueError(
                "weights must be counts of points, which VariationalBayes adds to the pseudo-counts of its prior; got a total "
                f"of {objective.mass * objective.unit:.3g}, so divide them by their mean."
            )
        prior = self._prior(objective, mixture)
        if self.begin is not None:
            given = self.begin.to(mixture.means.device).mapped(objective.frame.enter)
            if given.mixture.means.shape != mixture.means.shape:
                raise ValueError(
                    f"begin must have means of shape {tuple(mixture.means.shape)}, as the initial mixture, got "
                    f"{tuple(given.mixture.means.shape)}; pass a posterior of the same size."
                )
            return _State(replace(given, prior=prior))
        sums = objective.moments(mixture.offsets, mixture.means, mixture.factor)
        if prior.sticks:
            # Stick-breaking weights decrease in expectation, so the bound is largest for components in order of decreasing
            # weight (Kurihara, Welling and Teh 2007, Collapsed variational Dirichlet process mixture models).
            sums = sums.select(sums.S0.argsort(descending=True, stable=True))
        return _State(prior.updated(sums, self._ridge(objective)))

    def _prior(self, objective: Objective, mixture: Mixture) -> NormalWishart:
        """Build the prior in standardized coordinates."""
        K, D, kind = mixture.n_components, mixture.n_features, type(mixture.factor)
        leading, frame = mixture.factor.leading, objective.frame
        wide: Any = {"dtype": torch.float64, "device": mixture.means.device}
        nu = float(D if self.degrees is None else self.degrees)
        if not nu > D - 1:
            raise ValueError(f"degrees must be above {D - 1} for data with {D} columns, got {nu:g}; increase it.")
        scale = kind.compact(torch.outer(frame.scale, frame.scale))
        if self.means is None or self.covariances is None:
            mean, covariance = _of_data(objective, mixture)
        if self.means is not None:
            mean = as_tensor(self.means, name="means", **wide)
            if mean.shape != (D,):
                raise ValueError(f"means of the prior must have shape ({D},), got {tuple(mean.shape)}.")
            check_finite(mean, name="means", rows="column")
            mean = (mean - frame.shift) / frame.scale
        if self.covariances is not None:
            covariance = as_tensor(self.covariances, name="covariances", **wide)
            shape = kind.spread_shape(D)
            if tuple(covariance.shape) != shape:
                raise ValueError(f"covariances of the prior must have shape {shape}, got {tuple(covariance.shape)}.")
            kind.from_covariances(covariance[None], features=D)  # raises an error for invalid covariances
            covariance = covariance / scale
        alpha = 1.0 / K if self.concentration is None else float(self.concentration)
        a = torch.full((K,), alpha, **wide)
        return NormalWishart.of(
            kind,
            torch.stack([torch.ones_like(a), a]) if self.weights == "dirichlet_process" else a,
            torch.full((K,), float(self.mean_precision), **wide),
            mean.expand(K, D),
            torch.full((leading,), nu, **wide),
            (covariance / nu).expand(leading, *covariance.shape),
        )

    def _ridge(self, objective: Objective) -> Tensor:
        return objective.frame.variances(self.reg_covar)

    def step(self, objective: Objective, state: _State) -> tuple[_State, Evaluation]:
        if self.batch_size is not None:
            return self._pass(objective, state)
        found = self._update(objective, state.posterior)
        if self.accelerate:
            found = self._extrapolated(objective, state.posterior, found)
        posterior, bound, sums = found
        return replace(state, posterior=posterior), self._evaluation(objective, posterior, bound, sums, exact=True)

    def _update(self, objective: Objective, q: NormalWishart) -> tuple[NormalWishart, Tensor, Moments]:
        """Return the next posterior, its bound, and the sufficient statistics from which it was computed."""
        sums = self._moments(objective, q)
        return *q.bound(sums, self._ridge(objective)), sums

    def _extrapolated(
        self, objective: Objective, before: NormalWishart, first: tuple[NormalWishart, Tensor, Moments]
    ) -> tuple[NormalWishart, Tensor, Moments]:
        """Perform a second step, and extrapolate by SQUAREM; return the better one."""
        second = self._update(objective, first[0])
        leap = NormalWishart.extrapolated(before, first[0], second[0])
        if leap is None:
            return second
        third = self._update(objective, leap)
        return third if bool(third[1] >= second[1]) else second

    def _moments(self, objective: Objective, q: NormalWishart, batch: Any = None) -> Moments:
        return objective.moments(q.offsets, q.mixture.means, q.mixture.factor, batch)

    def _evaluation(
        self, objective: Objective, q: NormalWishart, bound: Tensor, sums: Moments, *, exact: bool
    ) -> Evaluation:
        """Build the evaluation of a posterior from its lower bound and sufficient statistics."""
        volume = objective.frame.log_volume
        value = volume - float(bound) / objective.mass
        return Evaluation(q.mixture, value, float(sums.total / sums.mass) - volume, exact=exact, answer=q)

    def _pass(self, objective: Objective, state: _State) -> tuple[_State, Evaluation]:
        """Perform one pass of natural-gradient steps over shuffled minibatches."""
        assert self.batch_size is not None, "a pass is made of batches"

        def update(reached: tuple[_State, list[Any]], batch: Any) -> tuple[_State, list[Any]]:
            state, values = reached
            q = state.posterior
            assert q.prior is not None, "posteriors have priors"
            sums = self._moments(objective, q, batch)
            if not float(sums.mass) > 0:
                return reached
            found = objective.mass / float(sums.mass) * float(sums.total) - float(q.divergence())
            m = q.mixture
            before = Moments.expected(m.weights, m.means, m.factor) if state.memory is None else state.memory
            memory = before.blended(sums, (state.batches + self.step_offset) ** -self.step_exponent)
            posterior = q.prior.updated(memory * objective.mass, self._ridge(objective))
            values = [*values, (found, float(sums.total), float(sums.mass))]
            return _State(posterior, state.batches + 1, memory), values

        values: list[Any] = []
        state, values = objective.passes.fold(objective.data, self.batch_size, (state, values), update)
        bounds, totals, masses = zip(*values, strict=True)
        seen = Moments.nothing(state.posterior.mixture.means, type(state.posterior.mixture.factor))
        seen = replace(seen, total=seen.total + sum(totals), mass=seen.mass + sum(masses))
        bound = torch.tensor(sum(bounds) / len(bounds), dtype=torch.float64)
        return state, self._evaluation(objective, state.posterior, bound, seen, exact=False)

    def evaluate(self, objective: Objective, state: _State) -> Evaluation:
        """Compute the lower bound of the posterior with its optimal responsibilities, in one pass over the data."""
        q = state.posterior
        sums = self._moments(objective, q)
        return self._evaluation(objective, q, sums.total - q.divergence(), sums, exact=True)

    def finished(self, objectives: list[float], tol: float, objective: Objective) -> bool:
        """Return whether the bound changed by less than a tolerance, nats per point."""
        return self._still(objectives, 1, self._tolerance(objectives, tol))

    def answer(self, objective: Objective, found: Any) -> NormalWishart:
        return found.mapped(objective.frame.leave).to(objective.data.device)

    def current(self, objective: Objective, state: _State) -> Mixture:
        return state.posterior.mixture


def _of_data(objective: Objective, mixture: Mixture) -> tuple[Tensor, Tensor]:
    """Compute mean (D,) and unbiased covariance (in the shape of the family) of the data, standardized coordinates."""
    D, kind = mixture.n_features, type(mixture.factor)
    center = mixture.means.new_zeros(1, D)
    unit = kind.from_covariances(kind.compact(torch.eye(D).to(center))[None], features=D)
    sums = objective.moments(center.new_zeros(1), center, unit)
    covariance = sums.scatters[0] * float(sums.mass) / max(float(sums.mass) - 1, 1e-300)
    return sums.means[0], kind.mean_scatter(covariance, D)
