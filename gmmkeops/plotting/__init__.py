"""Plots of mixtures and fits with matplotlib: densities, covariance ellipses, objectives.

Every function draws into ``ax`` (by default the current axes) and returns the artists. Matplotlib's defaults are not changed.
"""

from gmmkeops.plotting.densities import density, ellipses, pairs, points
from gmmkeops.plotting.rendering import by_height as by_height
from gmmkeops.plotting.rendering import surfaces as surfaces
from gmmkeops.plotting.summaries import objective, selection
from gmmkeops.plotting.views import ellipsoids, view

__all__ = [
    "density",
    "ellipses",
    "ellipsoids",
    "objective",
    "pairs",
    "points",
    "selection",
    "view",
]
