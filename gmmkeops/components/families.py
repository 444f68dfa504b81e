"""The names of the covariance families."""

from __future__ import annotations

from gmmkeops.components.base import Factor
from gmmkeops.components.diagonal import DiagonalFactor
from gmmkeops.components.full import FullFactor
from gmmkeops.components.spherical import SphericalFactor

__all__ = ["factor_class"]

_FAMILIES: dict[str, tuple[type[Factor], bool]] = {
    "full": (FullFactor, False),
    "diag": (DiagonalFactor, False),
    "diagonal": (DiagonalFactor, False),
    "spherical": (SphericalFactor, False),
    "tied": (FullFactor, True),
    "tied_full": (FullFactor, True),
    "tied_diag": (DiagonalFactor, True),
    "tied_diagonal": (DiagonalFactor, True),
    "tied_spherical": (SphericalFactor, True),
}


def factor_class(covariance_type: str) -> tuple[type[Factor], bool]:
    """The factor class and whether it is tied, for a covariance type's name.

    Raises:
        ValueError: The name is unknown.
    """
    try:
        return _FAMILIES[covariance_type]
    except (KeyError, TypeError):
        shown = repr(covariance_type) if isinstance(covariance_type, (str, int)) else type(covariance_type).__name__
        names = ", ".join(repr(name) for name in _FAMILIES)
        raise ValueError(f"covariance_type must be one of {names}, got {shown}.") from None
