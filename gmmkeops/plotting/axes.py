"""Matplotlib axes, and the extent of a plot."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gmmkeops._checks import as_number
from gmmkeops.models import Mixture, as_mixture

__all__ = ["bounds", "current_axes", "mixture_of", "sides"]


def current_axes(ax: Any) -> Any:
    """Return the given axes, or the current axes of matplotlib."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.gca()


def mixture_of(value: Any) -> Mixture:
    """Return the mixture to plot: the value itself, or that of a fitted estimator or of the result of a fit.

    Raises:
        TypeError, ValueError: The value has no mixture, or a batch of mixtures.
    """
    for name in ("mixture_", "mixture"):
        if not isinstance(value, Mixture) and hasattr(value, name):
            value = getattr(value, name)
    return as_mixture(value)


def sides(extent: Any) -> tuple[float, float, float, float]:
    """Validate an extent; return its left, right, bottom and top sides.

    Raises:
        ValueError: The extent is empty, or not four numbers.
    """
    found = list(extent) if isinstance(extent, Iterable) and not isinstance(extent, (str, bytes)) else []
    found = [as_number(side, "each side of extent") for side in found]
    if len(found) != 4 or not (found[0] < found[1] and found[2] < found[3]):
        raise ValueError(f"extent must be (left, right, bottom, top) with left < right, bottom < top, got {extent}.")
    left, right, bottom, top = found
    return left, right, bottom, top


def bounds(mixture: Mixture) -> tuple[list[float], list[float]]:
    """Return the smallest and largest coordinates (D,) within three standard deviations of components above weight 0.001."""
    means = mixture.means.detach()
    deviation = mixture.factor.covariances().detach().diagonal(dim1=-2, dim2=-1).sqrt()
    heavy = mixture.weights.detach() > 1e-3
    return (means - 3 * deviation)[heavy].amin(0).tolist(), (means + 3 * deviation)[heavy].amax(0).tolist()
