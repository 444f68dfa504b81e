r"""Pictures of mixtures and fits: densities, covariance ellipses, objectives.

Every function draws into ``ax`` (the current axes if left out), changes no matplotlib default, and returns the artists.
An ellipse at r standard deviations is :math:`\{\mu + r L u : |u| = 1\}` with :math:`\Sigma = L L^\top`; in two dimensions
it holds :math:`1 - e^{-r^2/2}` of its component.
"""

from gmmkeops.plotting.ellipsoids import by_height as by_height
from gmmkeops.plotting.ellipsoids import surfaces as surfaces
from gmmkeops.plotting.figures import density, ellipses, ellipsoids, objective, pairs, points, selection, view

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
