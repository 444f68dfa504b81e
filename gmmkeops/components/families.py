"""Lookup of component families by name."""

from __future__ import annotations

from gmmkeops.components.base import FAMILIES, Factor

__all__ = ["factor_class", "families"]


def factor_class(covariance_type: str) -> tuple[type[Factor], bool]:
    """Return the family of a covariance type, and whether its covariance is tied.

    Raises:
        ValueError: The name is unknown.
    """
    try:
        return FAMILIES[covariance_type]
    except (KeyError, TypeError):
        shown = repr(covariance_type) if isinstance(covariance_type, (str, int)) else type(covariance_type).__name__
        names = ", ".join(map(repr, sorted(FAMILIES, key=lambda name: (name.startswith("tied"), name != "full", name))))
        raise ValueError(f"covariance_type must be one of {names}, got {shown}.") from None


def families() -> dict[str, type[Factor]]:
    """Return all families, by their names in files."""
    return {kind.family: kind for kind, _ in FAMILIES.values()}
