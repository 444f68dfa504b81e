"""Choice of the number of components: levels of a merge tree, judged by a criterion, and fits of the best ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gmmkeops.analysis.criteria import criteria, sample_criteria
from gmmkeops.components import factor_class
from gmmkeops.data import Source, World, representatives
from gmmkeops.fitting import (
    EM,
    FitResult,
    Judge,
    Level,
    Levels,
    Method,
    Search,
    find_levels,
    fit,
    has_few_points,
    sample_size,
    shared_mixture,
    sound_levels,
    start_of,
    within_prior,
)
from gmmkeops.models import Mixture
from gmmkeops.penalties import CovariancePrior, Penalty, as_penalty

__all__ = ["Choice", "choose"]

# Number of parts of a sample in cross-validation, each of which is held out once.
_FOLDS = 3

# Number of searches for a better optimum of each number of components whose information criterion is compared.
_SEARCHES = 2

# Relative difference of log-likelihoods that are equal up to rounding.
_TIE = 1e-9


class _LabelJudge(Judge):
    """AIC, AIC3, or ICL with the entropy of the responsibilities or with hard assignments."""

    def __init__(self, criterion: str, *args: Any) -> None:
        super().__init__(*args)
        self.criterion = criterion

    def level(self, mixtures: tuple[Mixture, ...], seconds: float = 0.0) -> Level:
        (mixture,) = mixtures
        likelihood, found = sample_criteria(mixture, self.x, self.weights, self.total)
        value = found[self.criterion] + self.optimism(mixture)
        return Level(mixtures, likelihood, value, seconds)


class _HeldOutJudge(Judge):
    """Mean log-likelihood of points in cross-validation, and the fewest components within one standard error of the best.

    Args:
        x: Points (n, D), data units.
        weights: Relative weights (n,), or None.
        folds: Rows of the points that are held out from each sample.
    """

    def __init__(self, x: Tensor, weights: Tensor | None, folds: list[Tensor]) -> None:
        rows = torch.cat(folds)
        own = None if weights is None else weights[rows]
        super().__init__(x[rows], own, 1.0, 1.0)
        # Share of each point in a mean.
        self.shares = x.new_full((len(rows),), 1 / len(rows), dtype=torch.float64) if own is None else own / own.sum()
        self.parts = [x[fold] for fold in folds]

    def level(self, mixtures: tuple[Mixture, ...], seconds: float = 0.0) -> Level:
        found = [mixture.log_prob(part).double() for mixture, part in zip(mixtures, self.parts, strict=True)]
        densities = torch.cat(found)
        likelihood = self.mean(densities)
        return Level(mixtures, likelihood, -likelihood, seconds, densities)

    def best(self, levels: dict[int, Level]) -> int:
        levels = sound_levels(levels)
        top = self.lowest(levels)
        for n in sorted(levels):
            loss, error = self.loss(levels[top], levels[n])
            # Equal levels differ by rounding errors.
            if loss <= error + _TIE * max(1.0, abs(levels[top].value)):
                return n
        return top

    def loss(self, one: Level, other: Level) -> tuple[float, float]:
        """Return how much the mean log-likelihood of one level exceeds that of another, and the standard error of this."""
        assert one.densities is not None, "this judge has computed them"
        assert other.densities is not None, "this judge has computed them"
        loss = one.densities - other.densities
        mean = self.mean(loss)
        return mean, math.sqrt(float((self.shares * (loss - mean)).square().sum()))


@dataclass(frozen=True)
class Choice:
    """The levels of one covariance type, and the fits of the best ones.

    Args:
        levels: The levels.
        fits: Results of the fits by their numbers of components.
        values: Criteria by numbers of components (lower is better): of the fits, or for "held_out" of the levels.
        best: Number of components of the best fit.
        criteria: All criteria of the fits, by their numbers of components.
        excluded: Numbers of components of fits that were excluded, since a component of theirs has very few points or is very
            narrow.
        interrupted: Whether Ctrl-C ended a fit, after which there were no others.
    """

    levels: Levels
    fits: dict[int, FitResult]
    values: dict[int, float]
    best: int
    criteria: dict[int, dict[str, float]]
    excluded: frozenset[int] = frozenset()
    interrupted: bool = False

    @property
    def value(self) -> float:
        """Criterion of the best fit (lower is better)."""
        return self.values[self.best]

    def reason(self, criterion: str) -> str:
        """Say in a sentence why this number of components was chosen."""
        best, judge, levels = self.best, self.levels.judge, self.levels.levels
        if isinstance(judge, _HeldOutJudge):
            top = judge.lowest(sound_levels(levels))
            loss, error = judge.loss(levels[top], levels[best])
            if top == best:
                return (
                    f"{_counted(best)}: the mean log-likelihood of held-out points is the highest ({-self.value:.4f} nats per "
                    "point)."
                )
            return (
                f"{_counted(best)}: the fewest whose mean log-likelihood of held-out points is within one standard error of the "
                f"highest, that of {_counted(top)} (difference {loss:.4f}, its standard error {error:.4f} nats per point)."
            )
        others = ", ".join(
            f"{_counted(n)}: {self.values[n]:.1f}"
            + (", excluded since a component is too small or too narrow" if n in self.excluded else "")
            for n in sorted(self.fits)
            if n != best
        )
        named = criterion.upper().replace("_HARD", " with hard assignments")
        least = (
            "the lowest of the fits that were not excluded" if self.excluded else "the lowest of the fits to all points"
        )
        reason = f"{_counted(best)}: {named} is {least} ({self.value:.1f}" + (f"; {others})." if others else ").")
        lower = (
            n for n, level in levels.items() if n not in self.fits and level.value < self.value and not level.sound
        )
        if any(lower):
            reason += (
                " Values in parentheses are those of mixtures with a component that is too small or too narrow, which are not "
                "chosen."
            )
        return reason

    def is_sound(self, n: int) -> bool:
        """Return whether no component of the mixture of n components is too small or too narrow."""
        if n in self.fits:
            return n not in self.excluded
        return self.levels.levels[n].sound


def choose(
    x: Any,
    weights: Any,
    covariance_type: str,
    criterion: str,
    most: int,
    *,
    method: Method[Any] | None,
    penalty: Any,
    prior: str | None,
    names: Any,
    generator: torch.Generator,
    options: dict[str, Any],
) -> Choice:
    """Choose the number of components for one covariance type.

    Args:
        x: Points (N, D), data units, or a source.
        weights: Weights (N,), or None.
        covariance_type, penalty, prior: As for :func:`gmmkeops.initialize`.
        criterion: Name of the criterion.
        most: Maximum number of components.
        method: Fitting method; None for EM.
        names: Names of the columns, or None.
        generator: Random number generator.
        options: Further arguments of :func:`gmmkeops.fit`.
    """
    kind, tied = factor_class(covariance_type)
    D = x.features if isinstance(x, Source) else x.shape[1]
    world = World()
    rows, mass, count, _ = representatives(x, weights, sample_size(most, D, kind), world)
    total = _total(x, weights, count, world)
    if total < D + 1 <= count:
        raise ValueError(
            f"sample_weight has a total of {total:.3g} for {count} points, but weights count as numbers of points in criteria; "
            "multiply the weights, for example so that their mean is one."
        )
    most = max(1, min(most, count // (2 * (D + 1))))
    effective = count if mass is None else count * float(mass.mean()) ** 2 / float(mass.square().mean())
    backend, em = options.get("backend", "auto"), method if isinstance(method, EM) else None
    settings: Any = {"penalty": penalty, "prior": prior, "generator": generator, "backend": backend, "method": em}

    def search(index: Tensor, K: int) -> Search:
        return Search(rows[index], None if mass is None else mass[index], K, kind, tied, **settings)

    def stage(K: int) -> tuple[tuple[Search, ...], Judge]:
        order = torch.randperm(len(rows), generator=generator, device=rows.device)[: sample_size(2 * K, D, kind)]
        if criterion == "held_out":
            folds = [fold.sort().values for fold in order.tensor_split(_FOLDS)]
            rest = [torch.cat(folds[:i] + folds[i + 1 :]).sort().values for i in range(_FOLDS)]
            return tuple(search(part, K) for part in rest), _HeldOutJudge(rows, mass, folds)
        order = order.sort().values
        size = (rows[order], None if mass is None else mass[order], total, len(order) / count)
        judge = Judge(*size) if criterion == "bic" else _LabelJudge(criterion, *size)
        return (search(order, K),), judge

    held_out = criterion == "held_out"
    if held_out and count < 2 * _FOLDS:
        raise ValueError(
            f'criterion="held_out" requires at least {2 * _FOLDS} points, got {count}; pass criterion="bic".'
        )
    verbose = options.get("verbose", False)
    levels = find_levels(stage, most, verbose=verbose)
    # In units of the data, as the search.
    solver = method or EM(tol=1e-4, max_iter=1000, reg_covar=levels.searches[0].method.reg_covar)

    def fitted(start: Mixture) -> FitResult:
        added = _prior(penalty, prior, count, start)
        return fit(start.named(names), x, solver, penalty=added, sample_weight=weights, generator=generator, **options)

    def searched(n: int) -> FitResult:
        start, _ = start_of(
            x,
            n,
            covariance_type=covariance_type,
            sample_weight=weights,
            n_init=1 if held_out else _SEARCHES,
            **settings,
        )
        return fitted(start)

    def degenerate(result: FitResult) -> bool:
        search = levels.searches[0]
        return search.degenerate(search.plain.frame.enter(result.mixture), effective)

    best = world.tell(levels.best)[0]
    if held_out:
        result = searched(best)
        found = {best: criteria(result.mixture, x, weights, world)}
        values = {n: each.value for n, each in levels.levels.items()}
        return Choice(levels, {best: result}, values, best, found, interrupted=result.report.interrupted)
    fits: dict[int, FitResult] = {}
    values = {}
    found = {}
    center, best, sound = best, 0, []
    while best != center:
        best = center
        if best == levels.most < most:
            # The criterion of fits decreases beyond the levels.
            levels = find_levels(stage, most, 2 * levels.most, verbose=verbose)
        for n in range(max(best - 1, 1), min(best + 1, levels.most) + 1):
            if n not in fits:
                ways = [fitted(shared_mixture(levels.at(n), world, rows.device)), searched(n)]
                good = [result for result in ways if not degenerate(result)]
                fits[n] = min(good or ways, key=lambda result: result.objective)
                found[n] = criteria(fits[n].mixture, x, weights, world)
                values[n] = found[n][criterion]
                sound += [n] if good else []
                if any(result.report.interrupted for result in ways):
                    least = min(sound or values, key=lambda n: values[n])
                    return Choice(levels, fits, values, least, found, interrupted=True)
        center = world.tell(min(sound or values, key=lambda n: values[n]))[0]
    return Choice(levels, fits, values, best, found, frozenset(fits) - frozenset(sound) - {best})


def _counted(n: int) -> str:
    return f"{n} component" + ("s" if n > 1 else "")


def _prior(penalty: Any, prior: str | None, count: int, start: Mixture) -> Penalty | Any:
    """Return the penalty of a fit, with the prior of the covariances if there are few points."""
    if prior is None or start.n_components == 1 or not has_few_points(count, start):
        return penalty
    added = CovariancePrior(*within_prior(start))
    return added if penalty is None else as_penalty(penalty) + added


def _total(x: Any, weights: Any, count: int, world: World) -> float:
    """Return the total weight of all points of all ranks."""
    if isinstance(x, Source):
        return float(world.merged(x.survey(1, alone=world.size == 1)).mass)
    return float(count) if weights is None else float(torch.as_tensor(weights).double().sum())
