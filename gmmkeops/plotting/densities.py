r"""Two-dimensional plots: densities, covariance ellipses, points, and all pairs of columns.

An ellipse at r standard deviations is :math:`\{\mu + r L u : |u| = 1\}` with :math:`\Sigma = L L^\top`. In two dimensions
it contains the fraction :math:`1 - e^{-r^2/2}` of the probability of its component.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gmmkeops._checks import as_integer, as_number
from gmmkeops.data import as_points, stratified_rows, table_of
from gmmkeops.models import Mixture
from gmmkeops.plotting.axes import bounds, current_axes, mixture_of, sides

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["density", "ellipses", "pairs", "points"]


def _in_the_plane(value: Any) -> Mixture:
    """Return the mixture to plot, which must have two dimensions."""
    mixture = mixture_of(value)
    if mixture.n_features != 2:
        raise ValueError(f"this plot needs one mixture in 2 dimensions, got {mixture}; plot a marginal of it.")
    return mixture


def density(
    mixture: Any,
    *,
    ax: Axes | None = None,
    extent: Sequence[float] | None = None,
    resolution: int = 200,
    levels: int = 41,
    log: bool = False,
    cmap: str = "Blues",
) -> dict[str, Any]:
    """Plot a two-dimensional density as a heat map with contours of its logarithm.

    Args:
        mixture: One mixture in two dimensions, or a fitted estimator of one.
        ax: Matplotlib axes; None for the current axes.
        extent: (left, right, bottom, top), data units; by default three standard deviations around all components.
        resolution: Number of pixels along each side.
        levels: Number of contours of the log-density; 0 for no contours.
        log: Whether colors show the log-density instead of the density.
        cmap: Matplotlib color map.

    Returns:
        ``{"image": AxesImage, "contours": ContourSet or None}``.

    Raises:
        ValueError: The mixture is not two-dimensional, or the extent is empty.

    Example:
        >>> import matplotlib, gmmkeops as gk
        >>> matplotlib.use("Agg")
        >>> m = gk.Mixture.from_parameters([0.3, 0.7], [[0.0, 0.0], [4.0, 0.0]], [1.0, 2.0], "spherical")
        >>> drawn = gk.plotting.density(m, extent=(-4, 10, -5, 5))
        >>> drawn["image"].get_array().shape
        (200, 200)
    """
    mixture = _in_the_plane(mixture)
    ax = current_axes(ax)
    if extent is None:
        low, high = bounds(mixture)
        extent = low[0], high[0], low[1], high[1]
    left, right, bottom, top = sides(extent)
    resolution, levels = as_integer(resolution, "resolution", 1), as_integer(levels, "levels", 0)
    # The density is evaluated at pixel centers, so that the image and the contours match.
    step = (np.arange(resolution) + 0.5) / resolution
    u, v = left + (right - left) * step, bottom + (top - bottom) * step
    grid = torch.from_numpy(np.stack(np.meshgrid(u, v), -1)).to(mixture.means.device)
    with torch.no_grad():
        values = mixture.log_prob(grid).cpu().numpy()
    image = ax.imshow(
        values if log else np.exp(values),
        extent=(left, right, bottom, top),
        origin="lower",
        cmap=cmap,
        aspect="auto",
        interpolation="bilinear",
    )
    contours = None
    if levels:
        # The log-density decreases quadratically at larger distances, where contours would be too dense.
        low, high = max(values.min(), values.max() - 20.0), values.max()
        if high > low:
            contours = ax.contour(
                u, v, values, levels=np.linspace(low, high, levels), colors="k", linewidths=0.4, alpha=0.5
            )
    return {"image": image, "contours": contours}


def ellipses(
    mixture: Any,
    *,
    ax: Axes | None = None,
    deviations: float = 2.0,
    minimum_weight: float = 1e-3,
    color: Any = "#d95f02",
    **style: Any,
) -> list[Any]:
    """Plot one covariance ellipse per component; ellipses of small weights are fainter.

    Args:
        mixture: One mixture in two dimensions, or a fitted estimator of one.
        ax: Matplotlib axes; None for the current axes.
        deviations: Radius of the ellipses, standard deviations.
        minimum_weight: Smallest weight of a component that is drawn.
        color: Edge color.
        **style: Further arguments of :class:`matplotlib.patches.Ellipse`.

    Returns:
        The ellipses.

    Raises:
        ValueError: The mixture is not two-dimensional.

    Example:
        >>> import matplotlib, gmmkeops as gk
        >>> matplotlib.use("Agg")
        >>> m = gk.Mixture.from_parameters([0.3, 0.7], [[0.0, 0.0], [4.0, 0.0]], [1.0, 2.0], "spherical")
        >>> len(gk.plotting.ellipses(m))
        2
    """
    from matplotlib.patches import Ellipse

    mixture = _in_the_plane(mixture)
    deviations = as_number(deviations, "deviations", 0, above=True)
    minimum_weight = as_number(minimum_weight, "minimum_weight")
    ax = current_axes(ax)
    weights = mixture.weights.detach().cpu()
    values, vectors = torch.linalg.eigh(mixture.factor.covariances().detach().cpu().expand(len(weights), 2, 2))
    patches = []
    for k in (weights >= minimum_weight).nonzero()[:, 0].tolist():
        angle = float(torch.rad2deg(torch.atan2(vectors[k, 1, 1], vectors[k, 0, 1])))
        height, width = (2 * deviations * values[k].sqrt()).tolist()
        look = {"fill": False, "edgecolor": color, "linewidth": 1.5} | style
        look.setdefault("alpha", 0.35 + 0.65 * float(weights[k] / weights.max()))
        patches.append(ax.add_patch(Ellipse(tuple(mixture.means[k].tolist()), width, height, angle=angle, **look)))
    ax.autoscale_view()
    return patches


def points(x: Any, *, ax: Axes | None = None, limit: int = 20_000, color: Any = "k", **style: Any) -> Any:
    """Plot at most ``limit`` two-dimensional points as a scatter plot.

    More than ``limit`` points are divided into ``limit`` equal ranges, and one point of each range is drawn, the same in
    every call. The size of the dots decreases with their number.

    Args:
        x: Points (N, 2), data units.
        ax: Matplotlib axes; None for the current axes.
        limit: Maximum number of points that are drawn.
        color: Color of the dots, one for all or one per point.
        **style: Further arguments of :meth:`matplotlib.axes.Axes.scatter`.

    Returns:
        The collection of dots.

    Raises:
        TypeError, ValueError: The points are not numeric, do not have two columns, or are not finite.

    Example:
        >>> import matplotlib, torch, gmmkeops as gk
        >>> matplotlib.use("Agg")
        >>> len(gk.plotting.points(torch.randn(10**5, 2), limit=1000).get_offsets())
        1000
    """
    x, limit = as_points(x, features=2).detach().cpu(), as_integer(limit, "limit", 1)
    rows = stratified_rows(len(x), limit, torch.Generator().manual_seed(0), x.device)
    if isinstance(color, np.ndarray | torch.Tensor) and len(color) == len(x):
        color = color[rows.numpy()]
    x = x[rows]
    look = {"s": max(0.5, min(20.0, 10_000 / len(x))), "linewidths": 0} | style
    return current_axes(ax).scatter(x[:, 0], x[:, 1], c=color, **look)


def pairs(
    mixture: Any,
    x: Any = None,
    *,
    names: Sequence[str] | None = None,
    axes: Any = None,
    limit: int = 5000,
    deviations: float = 2.0,
) -> Any:
    """Plot marginal densities of all columns on the diagonal, and ellipses (and points) of pairs of columns below it.

    Args:
        mixture: One mixture in at least two dimensions, or a fitted estimator of one.
        x: Points (N, D) that are also drawn, data units; or None.
        names: Labels of the columns, with their units.
        axes: Array (D, D) of axes; None for a new figure.
        limit: Maximum number of points in a panel.
        deviations: Radius of the ellipses, standard deviations.

    Returns:
        The array of axes.

    Raises:
        ValueError: The mixture has a single column, or is a batch.

    Example:
        >>> import matplotlib, gmmkeops as gk
        >>> matplotlib.use("Agg")
        >>> m = gk.Mixture.from_parameters([0.3, 0.7], [[0.0, 0.0], [4.0, 0.0]], [1.0, 2.0], "spherical")
        >>> gk.plotting.pairs(m, names=["width (m)", "height (m)"]).shape
        (2, 2)
    """
    mixture = mixture_of(mixture)
    D = mixture.n_features
    if D < 2:
        raise ValueError(
            f"pairs needs one mixture in at least 2 dimensions, got {mixture}; use density for a marginal."
        )
    limit, deviations = as_integer(limit, "limit", 1), as_number(deviations, "deviations", 0, above=True)
    if names is not None and (isinstance(names, str) or not hasattr(names, "__len__") or len(names) != D):
        raise ValueError(f"names must be a list of {D} names, one per column, got {names!r}.")
    if axes is None:
        import matplotlib.pyplot as plt

        axes = plt.subplots(D, D, figsize=(2.2 * D, 2.2 * D), layout="constrained", squeeze=False)[1]
    data = None if x is None else as_points(table_of(x, mixture.columns), features=D).detach().cpu()
    names = [f"x{d}" for d in range(D)] if names is None else names
    for row in range(D):
        for column in range(D):
            ax = axes[row][column]
            if column > row:
                ax.set_axis_off()
                continue
            if column == row:
                _marginal(mixture.marginal(row), None if data is None else data[:, row], ax)
            else:
                if data is not None:
                    points(data[:, [column, row]], ax=ax, limit=limit, s=2, alpha=0.3)
                ellipses(mixture.marginal([column, row]), ax=ax, deviations=deviations)
            ax.tick_params(labelbottom=row == D - 1, labelleft=column == 0 and row > 0)
            if row == D - 1:
                ax.set_xlabel(names[column])
            if column == 0 and row > 0:
                ax.set_ylabel(names[row])
    return axes


def _marginal(mixture: Mixture, x: torch.Tensor | None, ax: Any) -> None:
    (low,), (high,) = bounds(mixture)
    grid = torch.linspace(low, high, 400, dtype=torch.float64, device=mixture.means.device)
    with torch.no_grad():
        ax.plot(grid.cpu(), mixture.log_prob(grid[:, None]).exp().cpu(), color="#1f78b4")
    if x is not None:
        ax.hist(x.numpy(), bins=60, range=(low, high), density=True, color="0.8")
    ax.set_yticks([])
