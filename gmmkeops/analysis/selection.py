"""Selection of the number of components and of the covariance type by an information criterion."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gmmkeops._checks import ConvergenceWarning, FormerKeys, accepts, as_choice, as_integer, renamed
from gmmkeops.analysis.criteria import CRITERIA, aic, anomaly_threshold, bic, icl, score
from gmmkeops.analysis.silhouette import silhouette
from gmmkeops.data import Source, as_generator, as_points, readable, table_names
from gmmkeops.fitting import EM, FitResult, Method, fit, initialize
from gmmkeops.models import COMPONENTS, Mixture, html_table

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


@dataclass(frozen=True, repr=False)
class Selection:
    """Fitted models with their information criteria, printed as a table.

    Args:
        rows: One dict for each model with the keys "covariance_type", "n_components", "log_likelihood" (mean, nats per point),
            "n_parameters", "bic", "aic", "icl", "n_iter", "seconds", "converged".
        criterion: Name of the criterion that defines the best model.
        results: Results of the fits, in the order of the rows.

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
    results: list[FitResult]

    @property
    def best(self) -> Mixture:
        """Mixture with the lowest criterion."""
        return self.results[self._place()].mixture

    def _place(self) -> int:
        """Return the index of the row with the lowest criterion."""
        values = [row[self.criterion] for row in self.rows]
        return values.index(min(values))

    def __repr__(self) -> str:
        row = self.rows[self._place()]
        best = f"n_components={row['n_components']}, covariance_type={row['covariance_type']!r}"
        return f"Selection(models={len(self.rows)}, criterion={self.criterion!r}, best: {best})"

    def __str__(self) -> str:
        least = min(row[self.criterion] for row in self.rows)
        cells = self._cells()
        widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(_SHOWN)]
        lines = ["  ".join(name.rjust(width) for name, width in zip(_SHOWN, widths, strict=True))]
        for row, line in zip(self.rows, cells, strict=True):
            mark = "  <- best" if row[self.criterion] == least else ""
            lines.append("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + mark)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return html_table(repr(self), _SHOWN, self._cells(), bold=self._place())

    def _cells(self) -> list[list[str]]:
        values = ([row[name] for name in _SHOWN] for row in self.rows)
        return [[f"{value:.2f}" if isinstance(value, float) else str(value) for value in row] for row in values]


@accepts(
    old={"components": "n_components", "weights": "sample_weight"},
    also={"random_state": "generator"},
    wrong=_WRONG,
)
def select(
    x: Any,
    n_components: Iterable[int],
    covariance_types: Sequence[str] = ("full",),
    *,
    method: Method[Any] | None = None,
    criterion: str = "bic",
    sample_weight: Any = None,
    runs: int = 3,
    generator: torch.Generator | int | None = None,
    **options: Any,
) -> Selection:
    """Fit all combinations of numbers of components and covariance types, and compute their information criteria.

    For each number of components, the k-means centers are computed once on a sample and used for all covariance types.

    Args:
        x: Points (N, D), data units; or any data that :meth:`gmmkeops.Source.of` accepts.
        n_components: List of numbers of components.
        covariance_types: List of covariance types.
        method: Fitting method; ``gmmkeops.EM()`` by default.
        criterion: ``"bic"``, ``"aic"`` or ``"icl"``.
        sample_weight: Weight of each point (N,), or None.
        runs: Number of runs of k-means for each initial mixture.
        generator: Random number generator, or a seed. None uses a fixed seed, so that results are reproducible.
        **options: Further arguments of :func:`gmmkeops.fit`.

    Returns:
        A :class:`Selection`, which :func:`gmmkeops.plotting.selection` plots.

    Raises:
        TypeError: An argument is unknown or has the wrong type.
        ValueError: The criterion is unknown, a list is empty, or points are invalid.

    Example:
        >>> import torch, gmmkeops as gk
        >>> x = torch.randn(300, 1, generator=torch.Generator().manual_seed(0))
        >>> x[:150] += 8
        >>> gk.analysis.select(x, [1, 2, 3]).best.n_components
        2
    """
    numbers, types = _checked(n_components, covariance_types, criterion, method, options)
    with renamed("weights", "sample_weight"):
        source = Source.of(x, weights=sample_weight) if readable(x) else None
    points, g = (as_points(x), sample_weight) if source is None else (source, None)
    names = table_names(x) if source is None else source.columns
    device = points.device if isinstance(points, Tensor) else torch.device("cpu")
    generator = as_generator(generator, device)
    options = options if {"verbose", "progress"} & set(options) else options | {"verbose": False}
    rows: list[dict[str, Any]] = []
    results = []
    for K in numbers:
        seed = int(torch.randint(1 << 62, (1,), generator=generator, device=device))
        for kind in types:
            same = torch.Generator(device).manual_seed(seed)
            with warnings.catch_warnings(), renamed("weights", "sample_weight"):
                # The entry "converged" of the rows replaces the warnings.
                warnings.simplefilter("ignore", ConvergenceWarning)
                start = initialize(
                    points, K, "kmeans", covariance_type=kind, sample_weight=g, n_init=runs, generator=same
                )
                start = start.named(names)
                result = fit(start, points, method or EM(), sample_weight=g, **options)
            results.append(result)
            rows.append(FormerKeys({"covariance_type": kind, "n_components": K, **_row(result, points, g)}, _FORMER))
    return Selection(rows, criterion, results)


def _checked(
    numbers: Iterable[int], types: Sequence[str], criterion: str, method: Any, options: dict[str, Any]
) -> tuple[list[int], list[str]]:
    """Validate the arguments of a selection; return the numbers of components and the covariance types as lists."""
    as_choice(criterion, "criterion", CRITERIA)
    if not isinstance(numbers, Iterable) or isinstance(numbers, (str, bytes)):
        raise TypeError(
            f"n_components must be a list of integers, got {type(numbers).__name__}; pass for example [2, 3, 4]."
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


def _row(result: FitResult, points: Any, weights: Any) -> dict[str, Any]:
    """Compute the entries of a row: criteria and convergence of a fit."""
    mixture = result.mixture
    return {
        "log_likelihood": result.log_likelihood,
        "n_parameters": mixture.parameter_count,
        "bic": bic(mixture, points, sample_weight=weights),
        "aic": aic(mixture, points, sample_weight=weights),
        "icl": icl(mixture, points, sample_weight=weights),
        "n_iter": result.n_iter,
        "seconds": result.report.seconds,
        "converged": result.converged,
    }
