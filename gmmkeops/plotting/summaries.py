"""Plots of the objective against iterations, and of information criteria against numbers of components."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gmmkeops._checks import as_choice
from gmmkeops.analysis import CRITERIA, Selection
from gmmkeops.fitting import FitResult
from gmmkeops.plotting.axes import current_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["objective", "selection"]

_LABELS = {
    "icl_hard": "ICL, hard assignments (lower is better)",
    "held_out": "held-out log-likelihood (nats per point, higher is better)",
}


def objective(result: FitResult, *, ax: Axes | None = None, against: str = "iteration", **style: Any) -> list[Any]:
    """Plot the objective of a fit, nats per point, against iterations or seconds.

    Args:
        result: Result of :func:`gmmkeops.fit`.
        ax: Matplotlib axes; None for the current axes.
        against: Horizontal axis: ``"iteration"`` or ``"seconds"``.
        **style: Further arguments of :meth:`matplotlib.axes.Axes.plot`.

    Returns:
        The lines.

    Raises:
        ValueError: ``against`` is neither ``"iteration"`` nor ``"seconds"``.

    Example:
        >>> import matplotlib, torch, gmmkeops as gk
        >>> matplotlib.use("Agg")
        >>> x = torch.linspace(-1, 1, 100).double()[:, None]
        >>> (line,) = gk.plotting.objective(gk.fit(gk.initialize(x, 1), x, gk.EM()))
        >>> line.axes.get_ylabel()
        'objective (nats per point)'
    """
    if not isinstance(against, str) or against not in ("iteration", "seconds"):
        raise ValueError(f"against must be 'iteration' or 'seconds', got {against!r}.")
    if not isinstance(result, FitResult):
        raise TypeError(f"result must be a FitResult, got {type(result).__name__}; pass the result of gmmkeops.fit.")
    ax = current_axes(ax)
    values = result.history["objective"]
    lines = ax.plot(range(len(values)) if against == "iteration" else result.history["seconds"], values, **style)
    ax.set_xlabel(against if against == "iteration" else "time (s)")
    ax.set_ylabel("objective (nats per point)")
    return lines


def selection(table: Selection, *, ax: Axes | None = None, criterion: str | None = None, **style: Any) -> list[Any]:
    """Plot a criterion against the number of components, one line per covariance type, with markers at models that were fitted.

    Args:
        table: Result of :func:`gmmkeops.analysis.select`, or of :func:`gmmkeops.analysis.penalty_path`, whose criterion is
            plotted against the strength.
        ax: Matplotlib axes; None for the current axes.
        criterion: "bic", "aic", "aic3", "icl" or "icl_hard"; by default the criterion of the table.
        **style: Further arguments of :meth:`matplotlib.axes.Axes.plot`.

    Returns:
        The lines, and the circle around the best model; it is the model of the table if its criterion is plotted.

    Raises:
        TypeError: ``table`` is not a Selection.
        ValueError: The criterion is unknown.

    Example:
        >>> import matplotlib, torch, gmmkeops as gk
        >>> matplotlib.use("Agg")
        >>> x = torch.cat([torch.linspace(-1, 1, 99), torch.linspace(9, 11, 99)]).double()[:, None]
        >>> line, circle = gk.plotting.selection(gk.analysis.select(x, [1, 2], ["spherical"]))
        >>> float(circle.get_offsets()[0, 0])  # two components
        2.0
    """
    if not isinstance(table, Selection):
        raise TypeError(
            f"table must be a Selection, got {type(table).__name__}; pass the result of gmmkeops.analysis.select."
        )
    criterion = (
        table.criterion if criterion is None else as_choice(criterion, "criterion", (*CRITERIA, table.criterion))
    )
    ax = current_axes(ax)
    across = "strength" if "strength" in table.rows[0] else "n_components"
    kinds = list(dict.fromkeys(row["covariance_type"] for row in table.rows))
    drawn: list[Any] = []
    for kind, marker in zip(kinds, "os^Dv*" * len(kinds), strict=False):
        rows = [row for row in table.rows if row["covariance_type"] == kind and row[criterion] is not None]
        rows = sorted(rows, key=lambda row: row[across])
        fitted = [i for i, row in enumerate(rows) if row["fitted"]]
        look = {"marker": marker, "markevery": fitted, "label": kind} | style
        drawn += ax.plot([row[across] for row in rows], [row[criterion] for row in rows], **look)
    best = table.rows[table.place]
    if criterion != table.criterion:
        best = min((row for row in table.rows if row[criterion] is not None), key=lambda row: row[criterion])
    drawn.append(ax.scatter([best[across]], [best[criterion]], s=160, facecolors="none", edgecolors="k", zorder=3))
    if across == "strength":
        ax.set_xscale("log")
        ax.set_xlabel("strength of the penalty (nats per point)")
    else:
        ax.set_xlabel("components")
    ax.set_ylabel(_LABELS.get(criterion, f"{criterion.upper()} (lower is better)"))
    ax.legend()
    return drawn
