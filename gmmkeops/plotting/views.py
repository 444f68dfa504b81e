"""Three-dimensional mixtures as shaded ellipsoids, and the coordinates of points in such a view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gmmkeops._checks import as_integer, as_number
from gmmkeops.data import as_points
from gmmkeops.models import principal_axes
from gmmkeops.plotting.axes import current_axes, mixture_of, sides
from gmmkeops.plotting.rendering import by_height, camera, rendered

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ellipsoids", "view"]


def ellipsoids(
    mixture: Any,
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
    """Plot shaded ellipsoids of a three-dimensional mixture, one per component, in orthographic projection.

    Both axes are lengths in the plane of the view, data units. :func:`view` gives the coordinates of points in this plane.

    Args:
        mixture: One mixture in three dimensions, or a fitted estimator of one.
        ax: Matplotlib axes; None for the current axes.
        deviations: Radius of the ellipsoids, standard deviations.
        minimum_weight: Smallest weight of a component that is drawn.
        color: One color, or one color per component; by default a color map of the third coordinate.
        azimuth, elevation: Direction of the viewer, degrees, as in matplotlib's three-dimensional axes.
        extent: (left, right, bottom, top) in the plane of the view, data units; by default the extent of the mixture.
        resolution: Height of the image, pixels.

    Returns:
        The image.

    Raises:
        ValueError: The mixture is not three-dimensional, or the extent is empty.

    Example:
        >>> import matplotlib, gmmkeops as gk
        >>> matplotlib.use("Agg")
        >>> m = gk.Mixture.from_parameters([0.3, 0.7], [[0.0, 0.0, 0.0], [0.0, 4.0, 0.0]], [1.0, 1.0], "spherical")
        >>> gk.plotting.ellipsoids(m, azimuth=0, elevation=0).get_extent()  # the second column to the right, the third up
        [-2.0, 6.0, -2.0, 2.0]
    """
    from matplotlib.colors import to_rgba_array

    W, means, scales, R = principal_axes(mixture_of(mixture))
    deviations, resolution = as_number(deviations, "deviations", 0, above=True), as_integer(resolution, "resolution", 1)
    azimuth, elevation = as_number(azimuth, "azimuth"), as_number(elevation, "elevation")
    minimum_weight = as_number(minimum_weight, "minimum_weight")
    shown = (minimum_weight <= W) & (W > 0)
    colors = by_height(means) if color is None else to_rgba_array(color)[:, :3]
    colors = np.broadcast_to(colors, (len(W), 3))[shown]
    turn = camera(azimuth, elevation)
    means, axes = means[shown] @ turn.T, turn @ R[shown]
    covariances = axes * (scales[shown] ** 2)[:, None] @ axes.transpose(0, 2, 1)
    if extent is None:
        reach = deviations * np.sqrt(covariances.diagonal(axis1=1, axis2=2))
        low, high = (means - reach).min(0).round(12), (means + reach).max(0).round(12)
        extent = low[0], high[0], low[1], high[1]
    extent = sides(extent)
    # Supersampling by a factor of two smooths the edges.
    picture = rendered(means, covariances, colors, deviations, extent, 2 * resolution)
    rows, columns = (size - size % 2 for size in picture.shape[:2])
    picture = picture[:rows, :columns].reshape(rows // 2, 2, columns // 2, 2, 4).mean((1, 3))
    picture[..., :3] /= np.maximum(picture[..., 3:], 1e-12)
    ax = current_axes(ax)
    drawn = ax.imshow(picture, extent=extent, origin="lower", interpolation="bilinear")
    ax.set(xlabel="horizontal", ylabel="vertical")
    return drawn


def view(x: Any, *, azimuth: float = -60.0, elevation: float = 35.0) -> Any:
    """Compute the coordinates of points in the view of :func:`ellipsoids`.

    Args:
        x: Points (N, 3), data units.
        azimuth, elevation: As for :func:`ellipsoids`, degrees.

    Returns:
        A tensor (N, 3), float64, data units: coordinates to the right, up and towards the viewer.

    Raises:
        TypeError, ValueError: The points are not numeric, do not have three columns, or are not finite.

    Example:
        >>> import gmmkeops as gk
        >>> gk.plotting.view([[1.0, 2.0, 3.0]], azimuth=0, elevation=0).tolist()
        [[2.0, 3.0, 1.0]]
    """
    x = as_points(x, features=3).detach().cpu().double()
    azimuth, elevation = as_number(azimuth, "azimuth"), as_number(elevation, "elevation")
    return x @ torch.from_numpy(camera(azimuth, elevation)).T
