r"""Pictures of mixtures and fits: densities, covariance ellipses, objectives.

Every function draws into ``ax`` (the current axes if left out), changes no matplotlib default, and returns the artists.
An ellipse at r standard deviations is :math:`\{\mu + r L u : |u| = 1\}` with :math:`\Sigma = L L^\top`; in two dimensions
it holds :math:`1 - e^{-r^2/2}` of its component.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gmmkeops._checks import as_choice, as_integer, as_number
from gmmkeops.analysis import CRITERIA, Selection
from gmmkeops.data import as_points, stratified_rows, table_of
from gmmkeops.fitting import FitResult
from gmmkeops.models import Mixture, as_mixture, principal_axes
from gmmkeops.plotting.ellipsoids import by_height, camera, rendered

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["density", "ellipses", "ellipsoids", "objective", "pairs", "points", "selection", "view"]


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.gca()


def _plane(mixture: Mixture) -> None:
    if as_mixture(mixture).features != 2:
        raise ValueError(f"this picture needs one mixture in 2 dimensions, got {mixture}; plot a marginal of it.")


def density(
    mixture: Mixture,
    *,
    ax: Axes | None = None,
    extent: Sequence[float] | None = None,
    resolution: int = 200,
    levels: int = 41,
    log: bool = False,
    cmap: str = "Blues",
) -> dict[str, Any]:
    """Heat map of a two-dimensional density under contours of its logarithm.

    Args:
        mixture: One mixture in two dimensions.
        ax: Matplotlib axes.
        extent: (left, right, bottom, top), data units; by default all components to three standard deviations.
        resolution: Pixels along each side.
        levels: Number of log-contours; 0 draws none.
        log: Colour by log-density rather than by density.
        cmap: Matplotlib colour map.

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
    _plane(mixture)
    ax = _axes(ax)
    left, right, bottom, top = _sides(_extent(mixture) if extent is None else extent)
    resolution, levels = as_integer(resolution, "resolution", 1), as_integer(levels, "levels", 0)
    # Pixel centres, so that the image and the contours agree.
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
        # Beyond this the logarithm falls like a parabola and its contours only crowd the picture.
        low, high = max(values.min(), values.max() - 20.0), values.max()
        if high > low:
            contours = ax.contour(
                u, v, values, levels=np.linspace(low, high, levels), colors="k", linewidths=0.4, alpha=0.5
            )
    return {"image": image, "contours": contours}


def _sides(extent: Any) -> tuple[float, float, float, float]:
    """The four sides of a picture that is not empty."""
    sides = list(extent) if isinstance(extent, Iterable) and not isinstance(extent, (str, bytes)) else []
    sides = [as_number(side, "each side of extent") for side in sides]
    if len(sides) != 4 or not (sides[0] < sides[1] and sides[2] < sides[3]):
        raise ValueError(f"extent must be (left, right, bottom, top) with left < right, bottom < top, got {extent}.")
    left, right, bottom, top = sides
    return left, right, bottom, top


def _extent(mixture: Mixture) -> tuple[float, float, float, float]:
    means = mixture.means.detach()
    deviation = mixture.factor.covariances().detach().diagonal(dim1=-2, dim2=-1).sqrt()
    heavy = mixture.weights.detach() > 1e-3
    low = (means - 3 * deviation)[heavy].amin(0).tolist()
    high = (means + 3 * deviation)[heavy].amax(0).tolist()
    return low[0], high[0], low[1], high[1]


def ellipses(
    mixture: Mixture,
    *,
    ax: Axes | None = None,
    deviations: float = 2.0,
    minimum_weight: float = 1e-3,
    color: Any = "#d95f02",
    **style: Any,
) -> list[Any]:
    """One ellipse per component, at so many standard deviations, the fainter the lighter its weight.

    Args:
        mixture: One mixture in two dimensions.
        ax: Matplotlib axes.
        deviations: Radius, standard deviations.
        minimum_weight: Components with less weight are left out.
        color: Edge colour.
        **style: Passed on to :class:`matplotlib.patches.Ellipse`.

    Returns:
        The ellipses drawn.

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

    _plane(mixture)
    deviations = as_number(deviations, "deviations", 0, above=True)
    minimum_weight = as_number(minimum_weight, "minimum_weight")
    ax = _axes(ax)
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


def ellipsoids(
    mixture: Mixture,
    *,
    ax: Axes | None = None,
    deviations: float = 2.0,
    minimum_weight: float = 0.0,
    color: Any = None,
    azimuth: float = -60.0,
    elevation: float = 35.0,
    extent: Sequence[float] | None = None,
    resolution: int = 600,
) -> Any:
    """A mixture in space as shaded ellipsoids, one per component, seen from far away without perspective.

    Both axes are lengths in the plane of the view, data units, so :func:`view` lays points over the picture.

    Args:
        mixture: One mixture in three dimensions.
        ax: Matplotlib axes.
        deviations: Radii, standard deviations.
        minimum_weight: Components with less weight are left out.
        color: One colour, or one per component (K of them); by default by the third coordinate.
        azimuth, elevation: From where, degrees, as matplotlib's three-dimensional axes count them.
        extent: (left, right, bottom, top) in the plane of the view, data units; by default the whole mixture.
        resolution: Pixels from bottom to top.

    Returns:
        The image drawn.

    Raises:
        ValueError: The mixture is not three-dimensional, or the extent is empty.

    Example:
        >>> import matplotlib, gmmkeops as gk
        >>> matplotlib.use("Agg")
        >>> m = gk.Mixture.from_parameters([0.3, 0.7], [[0.0, 0.0, 0.0], [0.0, 4.0, 0.0]], [1.0, 1.0], "spherical")
        >>> gk.plotting.ellipsoids(m, azimuth=0, elevation=0).get_extent()  # the second column across, the third up
        [-2.0, 6.0, -2.0, 2.0]
    """
    from matplotlib.colors import to_rgba_array

    W, means, scales, R = principal_axes(mixture)
    deviations, resolution = as_number(deviations, "deviations", 0, above=True), as_integer(resolution, "resolution", 1)
    azimuth, elevation = as_number(azimuth, "azimuth"), as_number(elevation, "elevation")
    minimum_weight = as_number(minimum_weight, "minimum_weight")
    shown = (minimum_weight <= W) & (W > 0)
    colours = by_height(means) if color is None else to_rgba_array(color)[:, :3]
    colours = np.broadcast_to(colours, (len(W), 3))[shown]
    turn = camera(azimuth, elevation)
    means, axes = means[shown] @ turn.T, turn @ R[shown]
    covariances = axes * (scales[shown] ** 2)[:, None] @ axes.transpose(0, 2, 1)
    if extent is None:
        reach = deviations * np.sqrt(covariances.diagonal(axis1=1, axis2=2))
        low, high = (means - reach).min(0).round(12), (means + reach).max(0).round(12)
        extent = low[0], high[0], low[1], high[1]
    extent = _sides(extent)
    # Twice as fine, and averaged, so that borders are smooth.
    picture = rendered(means, covariances, colours, deviations, extent, 2 * resolution)
    rows, columns = (size - size % 2 for size in picture.shape[:2])
    picture = picture[:rows, :columns].reshape(rows // 2, 2, columns // 2, 2, 4).mean((1, 3))
    picture[..., :3] /= np.maximum(picture[..., 3:], 1e-12)
    ax = _axes(ax)
    drawn = ax.imshow(picture, extent=extent, origin="lower", interpolation="bilinear")
    ax.set(xlabel="across the view", ylabel="up the view")
    return drawn


def view(x: Any, *, azimuth: float = -60.0, elevation: float = 35.0) -> Any:
    """Where points in space lie in the picture that :func:`ellipsoids` draws.

    Args:
        x: Points (N, 3), data units.
        azimuth, elevation: As for :func:`ellipsoids`, degrees.

    Returns:
        A tensor (N, 3), float64: across the view, up it, and towards the viewer, data units.

    Raises:
        TypeError, ValueError: Points that are not numeric, not of three columns, or not finite.

    Example:
        >>> import gmmkeops as gk
        >>> gk.plotting.view([[1.0, 2.0, 3.0]], azimuth=0, elevation=0).tolist()
        [[2.0, 3.0, 1.0]]
    """
    x = as_points(x, features=3).detach().cpu().double()
    azimuth, elevation = as_number(azimuth, "azimuth"), as_number(elevation, "elevation")
    return x @ torch.from_numpy(camera(azimuth, elevation)).T


def points(x: Any, *, ax: Axes | None = None, limit: int = 20_000, color: Any = "k", **style: Any) -> Any:
    """Scatter of a two-dimensional cloud, thinned to ``limit`` points, dots the smaller the more there are.

    One row is drawn from each of as many stretches of the cloud, always the same ones.

    Args:
        x: Points (N, 2), data units.
        ax: Matplotlib axes.
        limit: Draw at most so many.
        color: Colour of the dots, one or one per point.
        **style: Passed on to :meth:`matplotlib.axes.Axes.scatter`.

    Returns:
        The collection drawn.

    Raises:
        TypeError, ValueError: Points that are not numeric, not of two columns, or not finite.

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
    return _axes(ax).scatter(x[:, 0], x[:, 1], c=color, **look)


def objective(result: FitResult, *, ax: Axes | None = None, against: str = "iteration", **style: Any) -> list[Any]:
    """Loss curve of a fit: objective in nats per point, against iterations or seconds.

    Args:
        result: What :func:`gmmkeops.fit` returned.
        ax: Matplotlib axes.
        against: ``"iteration"`` or ``"seconds"``.
        **style: Passed on to :meth:`matplotlib.axes.Axes.plot`.

    Returns:
        The lines drawn.

    Raises:
        ValueError: ``against`` is neither.

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
        raise TypeError(f"result must be a FitResult, got {type(result).__name__}; pass what gmmkeops.fit returned.")
    ax = _axes(ax)
    values = result.history["objective"]
    lines = ax.plot(range(len(values)) if against == "iteration" else result.history["seconds"], values, **style)
    ax.set_xlabel(against if against == "iteration" else "time (s)")
    ax.set_ylabel("objective (nats per point)")
    return lines


def selection(table: Selection, *, ax: Axes | None = None, criterion: str | None = None, **style: Any) -> list[Any]:
    """A criterion against the number of components, one line per covariance type, the best model circled.

    Args:
        table: What :func:`gmmkeops.analysis.select` returned.
        ax: Matplotlib axes.
        criterion: "bic", "aic" or "icl"; the table's own if left out.
        **style: Passed on to :meth:`matplotlib.axes.Axes.plot`.

    Returns:
        The lines drawn, then the circle.

    Raises:
        TypeError: The table is something else.
        ValueError: The criterion is none of these.

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
            f"table must be a Selection, got {type(table).__name__}; pass what gmmkeops.analysis.select returned."
        )
    criterion = table.criterion if criterion is None else as_choice(criterion, "criterion", CRITERIA)
    ax = _axes(ax)
    kinds = list(dict.fromkeys(row["covariance_type"] for row in table.rows))
    drawn: list[Any] = []
    for kind, marker in zip(kinds, "os^Dv*" * len(kinds), strict=False):
        rows = sorted((row for row in table.rows if row["covariance_type"] == kind), key=lambda row: row["components"])
        look = {"marker": marker, "label": kind} | style
        drawn += ax.plot([row["components"] for row in rows], [row[criterion] for row in rows], **look)
    best = min(table.rows, key=lambda row: row[criterion])
    drawn.append(
        ax.scatter([best["components"]], [best[criterion]], s=160, facecolors="none", edgecolors="k", zorder=3)
    )
    ax.set_xlabel("components")
    ax.set_ylabel(f"{criterion.upper()} (lower is better)")
    ax.legend()
    return drawn


def pairs(
    mixture: Mixture,
    x: Any = None,
    *,
    names: Sequence[str] | None = None,
    axes: Any = None,
    limit: int = 5000,
    deviations: float = 2.0,
) -> Any:
    """Every pair of columns: the exact marginal densities on the diagonal, ellipses (and points) below it.

    Args:
        mixture: One mixture in at least two dimensions.
        x: Points (N, D) to draw as well, data units.
        names: Column names, with their units.
        axes: A D x D array of axes; a new figure if left out.
        limit: Draw at most so many points in a panel.
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
    D = as_mixture(mixture).features
    if D < 2:
        raise ValueError(f"pairs needs one mixture in at least 2 dimensions, got {mixture}.")
    limit, deviations = as_integer(limit, "limit", 1), as_number(deviations, "deviations", 0, above=True)
    if names is not None and (isinstance(names, str) or not hasattr(names, "__len__") or len(names) != D):
        raise ValueError(f"names must be a list of {D} names, one per column, got {names!r}.")
    if axes is None:
        import matplotlib.pyplot as plt

        axes = plt.subplots(D, D, figsize=(2.2 * D, 2.2 * D), layout="constrained", squeeze=False)[1]
    cloud = None if x is None else as_points(table_of(x, mixture.columns), features=D).detach().cpu()
    names = [f"x{d}" for d in range(D)] if names is None else names
    for row in range(D):
        for column in range(D):
            ax = axes[row][column]
            if column > row:
                ax.set_axis_off()
                continue
            if column == row:
                _marginal(mixture.marginal(row), None if cloud is None else cloud[:, row], ax)
            else:
                if cloud is not None:
                    points(cloud[:, [column, row]], ax=ax, limit=limit, s=2, alpha=0.3)
                ellipses(mixture.marginal([column, row]), ax=ax, deviations=deviations)
            ax.tick_params(labelbottom=row == D - 1, labelleft=column == 0 and row > 0)
            if row == D - 1:
                ax.set_xlabel(names[column])
            if column == 0 and row > 0:
                ax.set_ylabel(names[row])
    return axes


def _marginal(mixture: Mixture, x: torch.Tensor | None, ax: Any) -> None:
    mean, deviation = mixture.means.detach()[:, 0], mixture.factor.covariances().detach()[:, 0, 0].sqrt()
    heavy = mixture.weights.detach() > 1e-3
    low, high = float((mean - 3 * deviation)[heavy].min()), float((mean + 3 * deviation)[heavy].max())
    grid = torch.linspace(low, high, 400, dtype=torch.float64, device=mean.device)
    with torch.no_grad():
        ax.plot(grid.cpu(), mixture.log_prob(grid[:, None]).exp().cpu(), color="#1f78b4")
    if x is not None:
        ax.hist(x.numpy(), bins=60, range=(low, high), density=True, color="0.8")
    ax.set_yticks([])
