"""Validation of what users pass: settings, and containers of numbers; and the warnings of the package."""

from gmmkeops._checks.settings import as_choice, as_device, as_fraction, as_integer, as_number, as_shape, renamed, shown
from gmmkeops._checks.tensors import as_tensor, check_dense, check_finite, check_unmasked, concrete, mind_fork
from gmmkeops._checks.warnings import ConvergenceWarning, PrecisionWarning

# The name that fitting/loop.py imports.
_shown = shown

__all__ = [
    "ConvergenceWarning",
    "PrecisionWarning",
    "as_choice",
    "as_device",
    "as_fraction",
    "as_integer",
    "as_number",
    "as_shape",
    "as_tensor",
    "check_dense",
    "check_finite",
    "check_unmasked",
    "concrete",
    "mind_fork",
    "renamed",
    "shown",
]
