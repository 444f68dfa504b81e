"""Selection of the number of components and of the covariance type by a criterion."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gmmkeops._checks import ConvergenceWarning, DegenerateWarning, FormerKeys, accepts, as_choice, as_integer, renamed
from gmmkeops.analysis.automatic import Choice, choose
from gmmkeops.analysis.criteria import CRITERIA, aic, aic3, anomaly_threshold, bic, criteria, icl, score
from gmmkeops.analysis.silhouette import silhouette
from gmmkeops.components import factor_class
from gmmkeops.data import Source, World, as_generator, as_points, as_weights, readable, table_names
from gmmkeops.fitting import EM, FitResult, Level, Method, fit, initialize
from gmmkeops.models import COMPONENTS, MergeTree, Mixture, html_table

__all__ = ["CRITERIA", "Selection", "aic", "aic3", "anomaly_threshold", "bic", "icl", "score", "select", "silhouette"]

# Columns of the printed table.
_SHOWN = ("covariance_type", "n_components", "n_parameters", "log_likelihood", "bic", "aic", "icl", "n_iter", "seconds")

# Keys of the rows by those of version 0.1.
_FORMER = {"components": "n_components", "parameters": "n_parameters", "iterations": "n_iter"}

# Names of arguments in other libraries, and the arguments that error messages recommend instead.
_WRONG = COMPONENTS | {
    "n_components_range": "n_components=",
    "covariance_type": "covariance_types=, a list",
    "n_init": "runs=",
    "scoring": "criterion=",
}

# Number of points from which the default criterion is the likelihood of held-out points; that of fewer is not precise.
_MANY_POINTS = 1000

# Points per parameter of a component below which the default criterion is AIC3: of 100 simulated mixtures of Gaussians with fewer
# (bench/results/how_many.md) it is right for 63, and BIC for 32. With more points, it chooses too many components more often.
_FEW_PER_PARAMETER = 20

# Maximum number of components that is considered by default.
_MOST = 100


@dataclass(frozen=True, repr=False)
class Selection:
    """Models with their criteria, printed as a table.

    Args:
        rows: One dict for each model with the keys "covariance_type", "n_components", "log_likelihood" (mean, nats per point),
            "n_parameters", "bic", "aic", "aic3", "icl", "icl_hard" (nats, summed over all points), "n_iter", "seconds" (wall
            time), "converged", "fitted". Without a list of numbers of components there is a row for each level of the merge tree,
            and "fitted" tells whether a mixture was fitted to all points. For other levels, the criterion is an estimate from a
            sample after a few EM steps, and other criteria are None; "sound" tells whether no component is too small or too
            narrow. Other mixtures are not chosen; in the printed table, their criterion is in parentheses. With the criterion
            "held_out", "held_out" is the mean log-likelihood of held-out points (nats per point), as is "log_likelihood" of
            levels that were not fitted. Rows of :func:`penalty_path` have the key "strength".
        criterion: Name of the criterion that defines the best model.
        results: Results of the fits, in the order of the rows; None for levels that were not fitted.
        place: Index of the best row.
        reason: Why this row is the best, in a sentence.
        trees: Merge tree of each covariance type, if there was no list of numbers of components. Its leaves are the components
            of the mixture from which the merges began; with "held_out", of the first of the three mixtures.

    Example:
        >>> import torch, gmmkeops as gk
        >>> x = torch.cat([torch.linspace(-1, 1, 99), torch.linspace(9, 11, 99)]).double()[:, None]
        >>> table = gk.analysis.select(x, [1, 2], ["spherical"])
        >>> table
        Selection(models=2, criterion='bic', best: n_components=2, covariance_type='spherical')
        >>> table.best.n_components, [row["n_components"] for row in table.rows]
        (2, [1, 2])
    """

    rows: list[dict[str, Any]]
    criterion: str
    results: list[FitResult | None]
    place: int = 0
    reason: str = ""
    trees: dict[str, MergeTree] = field(default_factory=dict)

    @property
    def result(self) -> FitResult:
        """Result of the fit of the best model."""
        found = self.results[self.place]
        assert found is not None, "the best model is fitted"
        return found

    @property
    def best(self) -> Mixture:
        """Best mixture by the criterion."""
        return self.result.mixture

    def __repr__(self) -> str:
        row = self.rows[self.place]
        best = f"n_components={row['n_components']}, covariance_type={row['covariance_type']!r}"
        return f"Selection(models={len(self.rows)}, criterion={self.criterion!r}, best: {best})"

    def __str__(self) -> str:
        shown, cells = self._shown(), self._cells()
        widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(shown)]
        lines = ["  ".join(name.rjust(width) for name, width in zip(shown, widths, strict=True))]
        for place, line in enumerate(cells):
            mark = "  <- best" if place == self.place else ""
            lines.append("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + mark)
        return "\n".join([*lines, *([self.reason] if self.reason else [])])

    def _repr_html_(self) -> str:
        return html_table(self.reason or repr(self), self._shown(), self._cells(), bold=self.place)

    def _shown(self) -> tuple[str, ...]:
        """Return the columns of the table; levels that were not fitted have only one criterion."""
        if all(result is not None for result in self.results):
            shown = _SHOWN if self.criterion in _SHOWN else (*_SHOWN[:4], self.criterion, *_SHOWN[4:])
            return (shown[0], "strength", *shown[1:]) if "strength" in self.rows[0] else shown
        return (*_SHOWN[:4], self.criterion, "fitted", *_SHOWN[-2:])

    def _cells(self) -> list[list[str]]:
        cells = [[_cell(name, row.get(name)) for name in self._shown()] for row in self.rows]
        place = self._shown().index(self.criterion)
        for row, line in zip(self.rows, cells, strict=True):
            # Such a mixture is not chosen, whatever the value of the criterion is.
            line[place] = line[place] if row.get("sound", True) else f"({line[place]})"
        return cells


def _cell(name: str, value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "yes" if value else ""
    # Nats per point need more decimals than sums over all points.
    decimals = 4 if name in ("log_likelihood", "held_out", "strength") else 2
    return f"{value:.{decimals}f}" if isinstance(value, float) else str(value)


@accepts(
    old={"components": "n_components", "weights": "sample_weight"},
    also={"random_state": "generator"},
    wrong=_WRONG,
)
def select(
    x: Any,
    n_components: Iterable[int] | str = "auto",
    covariance_types: Sequence[str] = ("full",),
    *,
    method: Method[Any] | None = None,
    criterion: str | None = None,
    max_components: int | None = None,
    strategy: str | None = None,
    penalty: Any = None,
    prior: str | None = None,
    sample_weight: Any = None,
    runs: int | None = None,
    generator: torch.Generator | int | None = None,
    **options: Any,
) -> Selection:
    r"""Choose the number of components and the covariance type.

    With ``n_components="auto"``, a mixture with too many components is fitted to a sample. Its components are merged step by
    step, with a few EM steps after each merge, and the criterion is estimated for each of these mixtures, which are called
    levels. In each step, the cheapest merge by each of the three costs of :func:`reduce` is tried, and the one with the best
    objective is kept. The first mixture has 16 components. Their number is doubled until the best level has at most half as many,
    or ``max_components`` is reached. For K components the sample has about 1000 K points, or 40 for each parameter if that is
    more. More points can determine more components, which information criteria take into account, but ``"held_out"`` does not.

    With ``"held_out"``, the sample is divided into three parts, each of which is held out once from a fit and its merges
    (cross-validation). A mixture with the best number of components is then fitted to all points. With other criteria, the best
    level and its neighbors are fitted to all points, until the best fit has no neighbor that is not fitted. Fits with a component
    of fewer than 2 (D + 1) points, or with a very small variance in some direction, are chosen only if there are no others.

    With a list of numbers, a mixture is fitted for each of them.

    Args:
        x: Points (N, D), data units; or any data that :meth:`gmmkeops.Source.of` accepts.
        n_components: ``"auto"``, or a list of numbers of components.
        covariance_types: List of covariance types.
        method: Fitting method. By default EM; for ``"auto"`` its tolerance is 1e-4 nats per point, and its maximum number of
            iterations 1000.
        criterion: ``"bic"``, ``"aic"``, ``"aic3"``, ``"icl"`` or ``"icl_hard"`` (:func:`bic`, :func:`aic`, :func:`aic3`,
            :func:`icl`), or for ``"auto"`` ``"held_out"``: the fewest components whose mean log-likelihood of held-out points is
            lower than the highest one by at most one standard error of the difference. The default is ``"bic"`` for a list. For
            ``"auto"`` it is ``"held_out"`` with at least 1000 points. With fewer, let P be the number of parameters of a
            component: its weight, its mean, and its covariance unless that is tied. The default is ``"aic3"`` if N < 20 P for
            each of the covariance types, and ``"bic"`` otherwise. Points of weight zero do not count here (those of a source do).
        max_components: Largest number of components for ``"auto"``, by default 100. At most N / (2 (D + 1)) components are
            considered.
        strategy: Initial mixtures for a list of numbers, as for :func:`gmmkeops.initialize`; by default ``"auto"``.
        penalty: Penalty of the fits, as for :func:`gmmkeops.fit`. Criteria do not contain it.
        prior: As for :class:`gmmkeops.GaussianMixture`; requires ``n_components="auto"``.
        sample_weight: Weight of each point (N,), or None.
        runs: Number of runs for each initial mixture, for a list of numbers; by default one.
        generator: Random number generator, or a seed. None uses a fixed seed, so that results are reproducible.
        **options: Further arguments of :func:`gmmkeops.fit` but ``checkpoint``, ``validation`` and ``context``.

    Returns:
        A :class:`Selection`, which :func:`gmmkeops.plotting.selection` plots. The fits issue no warnings about convergence and
        small components: the entry "converged" of the rows and ``report.degenerate_components`` of the results replace them.

    Raises:
        TypeError: An argument is unknown or has the wrong type.
        ValueError: The criterion is unknown, a list is empty, or points are invalid.

    Reference:
        Baudry, Raftery, Celeux, Lo and Gottardo 2010, *Combining mixture components for clustering*, Journal of Computational and
        Graphical Statistics 19, for merging as a way to choose.

    Example:
        >>> import torch, gmmkeops as gk
        >>> x = torch.randn(300, 1, generator=torch.Generator().manual_seed(0))
        >>> x[:150] += 8
        >>> gk.analysis.select(x).best.n_components
        2
    """
    automatic = isinstance(n_components, str)
    for name, value, default, wants in (
        ("max_components", max_components, None, True),
        ("prior", prior, None, True),
        ("strategy", strategy, None, False),
        ("runs", runs, None, False),
    ):
        if value is not default and automatic is not wants:
            other = 'n_components="auto"' if wants else "a list of numbers of components"
            raise ValueError(f"{name} requires {other}, got {name}={value!r}; omit it.")
    numbers, types = _checked(n_components, covariance_types, method, options)
    points, g, names, device = given(x, sample_weight)
    generator = as_generator(generator, device)
    options = options if {"verbose", "progress"} & set(options) else options | {"verbose": False}
    if criterion is None:
        criterion = _default(points, g, types) if automatic else "bic"
    as_choice(criterion, "criterion", (*CRITERIA, "held_out"))
    if criterion == "held_out" and not automatic:
        raise ValueError('criterion="held_out" requires n_components="auto"; omit the list, or pass criterion="bic".')
    with warnings.catch_warnings(), renamed("weights", "sample_weight"):
        # Entries of the rows and of the reports replace the warnings.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", DegenerateWarning)
        if not automatic:
            n_init = 1 if runs is None else as_integer(runs, "runs", 1)
            start = {"strategy": "auto" if strategy is None else strategy, "n_init": n_init, "penalty": penalty}
            settings = {"method": method or EM(), "penalty": penalty, "sample_weight": g, **options}
            return _sweep(points, numbers, types, criterion, start, names, generator, settings)
        if prior is not None:
            as_choice(prior, "prior", ("auto",))
        most = _MOST if max_components is None else as_integer(max_components, "max_components", 1)
        choices: dict[str, Choice] = {}
        for kind in types:
            choices[kind] = choose(
                points,
                g,
                kind,
                criterion,
                most,
                method=method,
                penalty=penalty,
                prior=prior,
                names=names,
                generator=generator,
                options=options,
            )
            if choices[kind].interrupted:
                break
    return _chosen(choices, criterion)


def given(x: Any, sample_weight: Any) -> tuple[Any, Tensor | None, Any, torch.device]:
    """Validate points and weights; return points (or the source of this rank), weights, column names and the device."""
    with renamed("weights", "sample_weight"):
        source = Source.of(x, weights=sample_weight) if readable(x) else None
        points: Any = as_points(x) if source is None else source
        g = None if source is not None else as_weights(sample_weight, points, name="sample_weight")
        names = table_names(x) if source is None else source.columns
        if World().size > 1:
            # Each rank has a part of the points.
            points, g = World().share(Source.of(points, weights=g) if source is None else points), None
    return points, g, names, points.device if isinstance(points, Tensor) else torch.device("cpu")


def refuse_single(options: dict[str, Any], name: str) -> None:
    """Raise an error if options of :func:`gmmkeops.fit` are for a single fit."""
    for option in ("checkpoint", "validation", "context", "start"):
        if option in options:
            raise TypeError(
                f"{name} has no argument {option}, since it performs several fits; omit it, or use gmmkeops.fit."
            )


def _default(points: Any, weights: Tensor | None, types: list[str]) -> str:
    """Return the default criterion: the likelihood of held-out points, AIC3 for few points per parameter, or BIC.

    If a component has many parameters, the penalty of BIC for it, as if all points determined them, exceeds what any cluster of
    few points adds to the likelihood.
    """
    D = points.features if isinstance(points, Source) else points.shape[1]
    rows = _rows(points) if weights is None else int((weights > 0).sum())
    if rows >= _MANY_POINTS:
        return "held_out"
    few = [rows < _FEW_PER_PARAMETER * _parameters(kind, D) for kind in types]
    return "aic3" if all(few) else "bic"


def _parameters(covariance_type: str, D: int) -> int:
    """Return the number of parameters that one more component has: weight and mean, and the covariance if it is not tied."""
    kind, tied = factor_class(covariance_type)
    return 1 + D + (0 if tied else kind.count(1, D))


def _rows(points: Any) -> int:
    """Return the number of points of all ranks."""
    if isinstance(points, Tensor):
        return len(points)
    rows = points.survey(1, alone=World().size == 1).rows if points.rows is None else points.rows
    return int(sum(World().tell(rows)))


def _sweep(
    points: Any,
    numbers: list[int],
    types: list[str],
    criterion: str,
    begin: dict[str, Any],
    names: Any,
    generator: torch.Generator,
    settings: dict[str, Any],
) -> Selection:
    """Fit a mixture for each number of components and each covariance type."""
    rows: list[dict[str, Any]] = []
    results: list[FitResult | None] = []
    g = settings["sample_weight"]
    for K in numbers:
        seed = int(torch.randint(1 << 62, (1,), generator=generator, device=generator.device))
        for kind in types:
            # All covariance types use the same random numbers.
            same = torch.Generator(generator.device).manual_seed(seed)
            start = initialize(points, K, covariance_type=kind, sample_weight=g, generator=same, **begin)
            result = fit(start.named(names), points, **settings)
            results.append(result)
            rows.append(_row(kind, result, criteria(result.mixture, points, g, World())))
            if result.report.interrupted:
                break
        if results and results[-1] is not None and results[-1].report.interrupted:
            break
    values = [row[criterion] for row in rows]
    return Selection(rows, criterion, results, values.index(min(values)))


def _chosen(choices: dict[str, Choice], criterion: str) -> Selection:
    """Return the selection from the choice for each covariance type."""
    rows: list[dict[str, Any]] = []
    results: list[FitResult | None] = []
    best = min(choices, key=lambda kind: choices[kind].value)
    place = 0
    for kind, choice in choices.items():
        for n in sorted({*choice.levels.levels, *choice.fits}):
            result, level = choice.fits.get(n), choice.levels.levels.get(n)
            if result is not None:
                row = _row(kind, result, choice.criteria[n])
            else:
                assert level is not None, "numbers are those of levels or fits"
                row = _unfitted(kind, level)
            if n in choice.values:
                row[criterion] = -choice.values[n] if criterion == "held_out" else choice.values[n]
            elif level is not None:
                row[criterion] = level.value
            row["sound"] = choice.is_sound(n)
            if n == choice.best and kind == best:
                place = len(rows)
            rows.append(row)
            results.append(result)
    trees = {kind: choice.levels.trees[0] for kind, choice in choices.items()}
    return Selection(rows, criterion, results, place, choices[best].reason(criterion), trees)


def _checked(
    numbers: Iterable[int] | str, types: Sequence[str], method: Any, options: dict[str, Any]
) -> tuple[list[int], list[str]]:
    """Validate the arguments of a selection; return the numbers of components and the covariance types as lists."""
    if isinstance(numbers, str):
        as_choice(numbers, "n_components", ("auto",))
        numbers = [1]
    if not isinstance(numbers, Iterable) or isinstance(numbers, bytes):
        raise TypeError(
            f'n_components must be "auto" or a list of integers, got {type(numbers).__name__}; pass for example [2, 3, 4].'
        )
    if isinstance(types, (str, bytes)) or not isinstance(types, Iterable):
        raise TypeError(f"covariance_types must be a list of names, got {types!r}; pass for example ['full'].")
    if method is not None and not isinstance(method, Method):
        raise TypeError(f"method must be a Method such as gmmkeops.EM(), got {type(method).__name__}.")
    refuse_single(options, "select")
    unknown = sorted(set(options) - set(inspect.signature(fit).parameters) - set(getattr(fit, "accepted", ())))
    if unknown:
        raise TypeError(f"select and gmmkeops.fit have no argument {unknown[0]!r}; see help(gmmkeops.fit).")
    whole, names = [as_integer(number, "each of n_components", 1) for number in numbers], list(types)
    if not whole or not names:
        raise ValueError("n_components and covariance_types must not be empty; pass at least one of each.")
    return whole, names


def _row(kind: str, result: FitResult, found: dict[str, float]) -> dict[str, Any]:
    """Return the entries of a row: criteria and convergence of a fit."""
    return FormerKeys(
        {
            "covariance_type": kind,
            "n_components": result.mixture.n_components,
            "log_likelihood": result.log_likelihood,
            "n_parameters": result.mixture.parameter_count,
            **{name: found[name] for name in CRITERIA},
            "n_iter": result.n_iter,
            "seconds": result.report.seconds,
            "converged": result.converged,
            "fitted": True,
        },
        _FORMER,
    )


def _unfitted(kind: str, level: Level) -> dict[str, Any]:
    """Return the entries of the row of a level that was not fitted."""
    return {
        "covariance_type": kind,
        "n_components": level.mixture.n_components,
        "log_likelihood": level.log_likelihood,
        "n_parameters": level.mixture.parameter_count,
        **dict.fromkeys(CRITERIA),
        "n_iter": 0,
        "seconds": level.seconds,
        "converged": False,
        "fitted": False,
    }
