"""Path of fits over the strength of a penalty that prunes components."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from gmmkeops._checks import ConvergenceWarning, DegenerateWarning, as_choice, as_integer, as_number, renamed
from gmmkeops.analysis.criteria import CRITERIA, criteria
from gmmkeops.analysis.selection import Selection, given, refuse_single
from gmmkeops.components import factor_class
from gmmkeops.data import World, as_generator
from gmmkeops.fitting import EM, FitResult, Method, fit, initialize, within_prior
from gmmkeops.penalties import CovariancePrior, Penalty, SqrtWeights

__all__ = ["penalty_path"]

# Default strengths: this many, from and to these multiples of the strength at which the term of an average component in the
# penalty is half of the term of its parameters in BIC, per point.
_COUNT, _WEAKEST, _STRONGEST = 12, 0.1, 30.0

# Method of the fits without the penalty; and ratio of its reg_covar and the smallest variance of a column.
_REFIT = EM(tol=1e-4, max_iter=1000)
_RIDGE = 1e-6


def penalty_path(
    x: Any,
    n_components: int,
    strengths: Iterable[float] | None = None,
    *,
    penalty: Callable[[float], Penalty] = SqrtWeights,
    covariance_type: str = "full",
    prior: str | None = "auto",
    method: Method[Any] | None = None,
    criterion: str = "bic",
    sample_weight: Any = None,
    generator: torch.Generator | int | None = None,
    **options: Any,
) -> Selection:
    r"""Fit a mixture with a penalty that prunes components, for increasing strengths, and choose the strength.

    Each fit begins with the result of the previous one. The components with an expected number of at least one point are then
    fitted without the penalty. The strength with the best criterion of these fits is chosen; of equal ones the weakest. Fits with
    a component of fewer than 2 (D + 1) points are only chosen if there are no others.

    Args:
        x: Points (N, D), data units; or any data that :meth:`gmmkeops.Source.of` accepts.
        n_components: Number of components before the first fit.
        strengths: Strengths, nats per point; they are sorted. The default for :class:`~gmmkeops.penalties.SqrtWeights` are twelve
            strengths from 0.1 to 30 times :math:`K^{3/2} P \log N / (2 N)`, with P parameters per component. At this strength,
            the term of a component of average weight in the penalty equals :math:`P \log N / (2 N)`, half of the term of its
            parameters in the Bayesian information criterion, per point.
        penalty: Function of a strength that returns the penalty.
        covariance_type: As for :func:`gmmkeops.initialize`.
        prior: ``"auto"`` adds a prior of the covariances to the fits with the penalty, for any number of points: D + 2
            pseudo-points with the mean covariance of the components of the initial mixture. Without it (None), components of two
            or three points can become so narrow that no penalty of the weights prunes them.
        method: Fitting method of the fits with the penalty; EM with a tolerance of 1e-4 by default.
        criterion: ``"bic"``, ``"aic"``, ``"aic3"``, ``"icl"`` or ``"icl_hard"``.
        sample_weight: Weight of each point (N,), or None.
        generator: Random number generator, or a seed. None uses a fixed seed.
        **options: Further arguments of :func:`gmmkeops.fit` but ``checkpoint``, ``validation`` and ``context``.

    Returns:
        A :class:`Selection` with a row for each strength ("strength", nats per point). Its results and criteria are those of the
        fits without the penalty; "n_iter", "seconds" and "converged" are those of the fits with the penalty.

    Raises:
        TypeError, ValueError: An argument is invalid, or ``strengths`` is missing for another penalty.

    Example:
        >>> import torch, gmmkeops as gk
        >>> x = torch.randn(300, 1, generator=torch.Generator().manual_seed(0))
        >>> x[:150] += 8
        >>> path = gk.analysis.penalty_path(x, 6)
        >>> path.best.n_components, len(path.rows)
        (2, 12)
    """
    K = as_integer(n_components, "n_components", 1)
    if prior is not None:
        as_choice(prior, "prior", ("auto",))
    as_choice(criterion, "criterion", CRITERIA)
    kind, _ = factor_class(covariance_type)
    refuse_single(options, "penalty_path")
    points, g, names, device = given(x, sample_weight)
    # Effective number of points.
    size = None if g is None else float(g.sum()) ** 2 / float(g.square().sum())
    generator = as_generator(generator, device)
    options = options if {"verbose", "progress"} & set(options) else options | {"verbose": False}
    settings = {"sample_weight": g, "generator": generator, **options}
    with warnings.catch_warnings(), renamed("weights", "sample_weight"):
        # The entry "converged" of the rows replaces the warnings.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", DegenerateWarning)
        start = initialize(
            points, K, covariance_type=covariance_type, sample_weight=g, generator=generator, prior=prior
        )
        mixture = start.named(names)
        added = None if prior is None else CovariancePrior(*within_prior(mixture))
        # In units of the data.
        usual = replace(_REFIT, reg_covar=_RIDGE * float(mixture.variance.min()))
        if strengths is None:
            strengths = _default_strengths(penalty, fit(mixture, points, usual, **(settings | {"max_iter": 0})), kind)
        levels = sorted(as_number(strength, "each of strengths", 0) for strength in strengths)
        if not levels:
            raise ValueError("strengths must not be empty; pass for example [0.1, 1, 10].")
        rows: list[dict[str, Any]] = []
        results: list[FitResult | None] = []
        refits: dict[tuple[int, ...], tuple[FitResult, dict[str, float]]] = {}
        for strength in levels:
            both = penalty(strength) if added is None else penalty(strength) + added
            penalized = fit(mixture, points, method or usual, penalty=both, **settings)
            mixture = penalized.mixture
            counts = mixture.weights * (penalized.report.total_weight if size is None else size)
            # A narrow component keeps its last points, however small its weight is.
            active = tuple((counts >= min(1.0, float(counts.max()))).nonzero()[:, 0].tolist())
            if active not in refits:
                refit = fit(mixture[list(active)], points, usual, **settings)
                refits[active] = refit, criteria(refit.mixture, points, g, World())
            result, found = refits[active]
            results.append(result)
            rows.append(
                {
                    "covariance_type": covariance_type,
                    "strength": strength,
                    "n_components": len(active),
                    "n_parameters": result.mixture.parameter_count,
                    **found,
                    "n_iter": penalized.n_iter,
                    "seconds": penalized.report.seconds,
                    "converged": penalized.converged,
                    "fitted": True,
                }
            )
            if penalized.report.interrupted or result.report.interrupted:
                break
    # A component of few points can have a very high likelihood.
    D = results[0].mixture.n_features if results[0] is not None else 1
    fewest = [
        (result.report.total_weight if size is None else size) * float(result.mixture.weights.min())
        for result in results
        if result
    ]
    sound = [row for row, least in zip(rows, fewest, strict=True) if least >= 2 * (D + 1)] or rows
    place = rows.index(min(sound, key=lambda row: row[criterion]))
    reason = (
        f"strength {levels[place]:.4g}: {criterion.upper()} of the {rows[place]['n_components']} remaining components, fitted "
        f"without the penalty, is the lowest ({rows[place][criterion]:.1f})."
    )
    return Selection(rows, criterion, results, place, reason)


def _default_strengths(penalty: Any, first: FitResult, kind: Any) -> list[float]:
    """Return strengths about the one at which the penalty agrees with BIC."""
    if penalty is not SqrtWeights:
        raise ValueError("strengths must be given for penalties other than SqrtWeights; pass for example [0.1, 1, 10].")
    mixture, N = first.mixture, first.report.total_weight
    K, D = mixture.n_components, mixture.n_features
    middle = K**1.5 * (1 + D + kind.count(1, D)) * math.log(max(N, 2.0)) / (2 * N)
    ratio = (_STRONGEST / _WEAKEST) ** (1 / (_COUNT - 1))
    return [middle * _WEAKEST * ratio**i for i in range(_COUNT)]
