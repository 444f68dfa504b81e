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
from gmmkeops.analysis.criteria import CRITERIA, aic, anomaly_threshold, bic, criteria, icl, score
from gmmkeops.analysis.silhouette import silhouette
from gmmkeops.data import Source, World, as_generator, as_points, as_weights, readable, table_names
from gmmkeops.fitting import EM, FitResult, Level, Method, fit, initialize
from gmmkeops.models import COMPONENTS, MergeTree, Mixture, html_table

__all__ = ["CRITERIA", "Selection", "aic", "anomaly_threshold", "bic", "icl", "score", "select", "silhouette"]

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

# Numbers of points and columns from which the default criterion is the likelihood of held-out points. It is more often right than
# BIC, which counts all parameters of a small component as if all points determined them, but it needs many points to be precise.
_MANY_POINTS, _MANY_COLUMNS = 2000, 16

# Maximum number of components that is considered by default.
_MOST = 100


@dataclass(frozen=True, repr=False)
class Selection:
    """Models with their criteria, printed as a table.

    Args:
        rows: One dict for each model with the keys "covariance_type", "n_components", "log_likelihood" (mean, nats per point),
            "n_parameters", "bic", "aic", "icl", "icl_hard", "n_iter", "seconds", "converged". Without a list of numbers of
            components there is a row for each level of the merge tree: "fitted" tells whether the level was fitted to
            convergence. Other levels have the criterion of a few EM steps on a sample, and None for other criteria. With the
            criterion "held_out", "held_out" is the mean log-likelihood of held-out points (nats per point), as is
            "log_likelihood" of levels that were not fitted.
        criterion: Name of the criterion that defines the best model.
        results: Results of the fits, in the order of the rows; None for levels that were not fitted.
        place: Index of the best row.
        reason: Why this row is the best, in a sentence.
        trees: Merge tree of each covariance type, if there was no list of numbers of components; their leaves are the components
            of the first fit.

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
        if all(result is not None for result in self.results) and self.criterion in _SHOWN:
            return (_SHOWN[0], "strength", *_SHOWN[1:]) if "strength" in self.rows[0] else _SHOWN
        return (*_SHOWN[:4], self.criterion, "fitted", *_SHOWN[-2:])

    def _cells(self) -> list[list[str]]:
        return [[_cell(name, row.get(name)) for name in self._shown()] for row in self.rows]


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
    max_components: int = _MOST,
    strategy: str = "auto",
    penalty: Any = None,
    prior: str | None = None,
    sample_weight: Any = None,
    runs: int = 1,
    generator: torch.Generator | int | None = None,
    **options: Any,
) -> Selection:
    r"""Choose the number of components and the covariance type.

    With ``n_components="auto"``, a mixture with too many components is fitted to a sample. Then components are merged one after
    the other, by the best of three costs (:func:`reduce`), with a few EM steps after each merge. The criterion is computed for
    each of these levels. The number of components of the first fit is doubled until the best level has at most half of them. With
    ``"held_out"`` there are three samples, from each of which another third of the points is held out (cross-validation), and a
    mixture with the best number of components is then fitted to all points. With other criteria the best level and its neighbors
    are fitted to all points, and the best of these fits is chosen. With a list of numbers, a mixture is fitted for each of them.

    Args:
        x: Points (N, D), data units; or any data that :meth:`gmmkeops.Source.of` accepts.
        n_components: ``"auto"``, or a list of numbers of components.
        covariance_types: List of covariance types.
        method: Fitting method; by default EM, with a tolerance of 1e-4 for ``"auto"``.
        criterion: ``"bic"``, ``"aic"``, ``"icl"`` or ``"icl_hard"`` (:func:`bic`, :func:`aic`, :func:`icl`), or for ``"auto"``
            ``"held_out"``: the fewest components whose mean log-likelihood of held-out points is within one standard error of the
            best. The default is ``"bic"``, but ``"held_out"`` for ``"auto"`` with at least 2000 points or 16 columns, where it
            was right more often on data with known numbers of clusters.
        max_components: Largest number of components for ``"auto"``, which considers at most one for 2 (D + 1) points.
        strategy: Initial mixtures for a list of numbers, as for :func:`gmmkeops.initialize`.
        penalty: Penalty of the fits, as for :func:`gmmkeops.fit`. Criteria do not contain it.
        prior: As for :class:`gmmkeops.GaussianMixture`; for ``"auto"`` only.
        sample_weight: Weight of each point (N,), or None.
        runs: Number of runs for each initial mixture, for a list of numbers.
        generator: Random number generator, or a seed. None uses a fixed seed, so that results are reproducible.
        **options: Further arguments of :func:`gmmkeops.fit`.

    Returns:
        A :class:`Selection`, which :func:`gmmkeops.plotting.selection` plots.

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
    numbers, types = _checked(n_components, covariance_types, method, options)
    with renamed("weights", "sample_weight"):
        source = Source.of(x, weights=sample_weight) if readable(x) else None
        points: Any = as_points(x) if source is None else source
        g = None if source is not None else as_weights(sample_weight, points, name="sample_weight")
    names = table_names(x) if source is None else source.columns
    device = points.device if isinstance(points, Tensor) else torch.device("cpu")
    generator = as_generator(generator, device)
    options = options if {"verbose", "progress"} & set(options) else options | {"verbose": False}
    if criterion is None:
        features = points.features if isinstance(points, Source) else points.shape[1]
        criterion = "held_out" if automatic and (features >= _MANY_COLUMNS or _many(points)) else "bic"
    as_choice(criterion, "criterion", (*CRITERIA, *(["held_out"] if automatic else [])))
    with warnings.catch_warnings(), renamed("weights", "sample_weight"):
        # The entry "converged" of the rows replaces the warnings.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", DegenerateWarning)
        if not automatic:
            if prior is not None:
                raise ValueError(f'prior={prior!r} requires n_components="auto"; pass penalty= instead.')
            start = {"strategy": strategy, "n_init": as_integer(runs, "runs", 1), "penalty": penalty}
            settings = {"method": method or EM(), "penalty": penalty, "sample_weight": g, **options}
            return _sweep(points, numbers, types, criterion, start, names, generator, settings)
        if prior is not None:
            as_choice(prior, "prior", ("auto",))
        most = as_integer(max_components, "max_components", 1)
        choices = {
            kind: choose(
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
            for kind in types
        }
    return _chosen(choices, criterion, points, g)


def _many(points: Any) -> bool:
    """Return whether there are many points on all ranks; a source is assumed to have many."""
    return isinstance(points, Source) or sum(World().tell(len(points))) >= _MANY_POINTS


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
            rows.append(_row(kind, result, points, g))
    values = [row[criterion] for row in rows]
    return Selection(rows, criterion, results, values.index(min(values)))


def _chosen(choices: dict[str, Choice], criterion: str, points: Any, g: Any) -> Selection:
    """Return the selection from the choice for each covariance type."""
    rows: list[dict[str, Any]] = []
    results: list[FitResult | None] = []
    best = min(choices, key=lambda kind: choices[kind].value)
    place = 0
    for kind, choice in choices.items():
        for n in sorted({*choice.levels.levels, *choice.fits}):
            result, level = choice.fits.get(n), choice.levels.levels.get(n)
            if result is not None:
                row = _row(kind, result, points, g)
            else:
                assert level is not None, "numbers are those of levels or fits"
                row = _unfitted(kind, level)
            if n in choice.values:
                row[criterion] = -choice.values[n] if criterion == "held_out" else choice.values[n]
            elif level is not None:
                row[criterion] = level.value
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
    unknown = sorted(set(options) - set(inspect.signature(fit).parameters) - set(getattr(fit, "accepted", ())))
    if unknown:
        raise TypeError(f"select and gmmkeops.fit have no argument {unknown[0]!r}; see help(gmmkeops.fit).")
    whole, names = [as_integer(number, "each of n_components", 1) for number in numbers], list(types)
    if not whole or not names:
        raise ValueError("n_components and covariance_types must not be empty; pass at least one of each.")
    return whole, names


def _row(kind: str, result: FitResult, points: Any, weights: Any) -> dict[str, Any]:
    """Compute the entries of a row: criteria and convergence of a fit."""
    return FormerKeys(
        {
            "covariance_type": kind,
            "n_components": result.mixture.n_components,
            "log_likelihood": result.log_likelihood,
            "n_parameters": result.mixture.parameter_count,
            **{
                name: value
                for name, value in criteria(result.mixture, points, sample_weight=weights).items()
                if name in CRITERIA
            },
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
