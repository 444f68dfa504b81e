"""Validation of the points at which mixtures are evaluated: their shapes, and the range of their squared distances."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gmmkeops.components import as_tensor, check_finite, concrete, numbers, ordinary
from gmmkeops.data import table_of
from gmmkeops.reductions import alone, recordable

if TYPE_CHECKING:
    from gmmkeops.models.mixture import Mixture
    from gmmkeops.reductions import Prepared

__all__ = ["as_points_of", "as_rows_of", "broadcast", "check_finite_points", "check_range", "examined", "widened"]

# Largest whitened distance for which overflow need not be considered.
_NEAR = 1e4

# Smallest log-density that each dtype can represent, with a margin.
_LEAST = {torch.float32: -2.9e38, torch.float64: -9e299}


def as_points_of(mixture: Mixture, value: Any) -> Tensor:
    """Convert points (*S, D), or (*S, *B, D) for a batch of mixtures, to a tensor; their values are not checked.

    Raises:
        TypeError: The points are not numeric.
        ValueError: The shape does not match the mixture, or the points are on another device.
    """
    x = recordable(as_tensor(table_of(value, mixture.columns), name="x"))
    if x.ndim == 0 or x.shape[-1] != mixture.n_features:
        raise ValueError(
            f"x must have {mixture.n_features} columns, shape (*, {mixture.n_features}), got {tuple(x.shape)}; "
            "pass the same columns as the model has."
        )
    if x.device != mixture.means.device:
        raise ValueError(f"x is on {x.device}, the mixture on {mixture.means.device}; move one of them with .to().")
    if mixture.batch_shape:
        broadcast(mixture, x[..., 0], x, "points")
    return x


def as_rows_of(mixture: Mixture, value: Any) -> tuple[Tensor, Tensor]:
    """Return points (*S, D) as a tensor, and reshaped to rows (N, D), for one mixture.

    Raises:
        TypeError, ValueError: As :func:`as_points_of`; or this is a batch of mixtures.
    """
    if mixture.batch_shape:
        raise ValueError(
            f"this method needs one mixture, got a batch of shape {tuple(mixture.batch_shape)}; "
            "select one of them first, for example mixture[0]."
        )
    x = as_points_of(mixture, value)
    return x, x if x.ndim == 2 else x.reshape(-1, mixture.n_features)


def broadcast(mixture: Mixture, leading: Tensor, given: Tensor, name: str) -> Tensor:
    """Broadcast the leading dimensions ``leading`` of the tensor ``given`` with the batch of mixtures to (*S, *B)."""
    if not mixture.batch_shape:
        return leading
    # torch.broadcast_shapes imports SymPy, which takes a second and 50 MB.
    try:
        return torch.broadcast_tensors(leading, mixture.logits[..., 0])[0]
    except RuntimeError:
        raise ValueError(
            f"{name} of shape {tuple(given.shape)} do not match a batch of mixtures of shape {tuple(mixture.batch_shape)}; "
            "pass leading dimensions that broadcast with it."
        ) from None


def check_finite_points(mixture: Mixture, x: Tensor) -> None:
    """Raise a ValueError if an entry of the points is not finite, if the mixture validates values."""
    if mixture._validate_args:
        check_finite(x.reshape(-1, mixture.n_features), name="x")


def examined(mixture: Mixture, x: Tensor, parameters: Prepared | None, *, check: bool) -> tuple[Tensor, bool]:
    """Validate that points (*S, D) are finite, and convert them as :func:`widened`.

    Args:
        mixture, x: The mixture and the points.
        parameters: Parameters of the mixture by which one operation on the points may prove that all distances are small.
        check: Whether to raise a ValueError if an entry is not finite.
    """
    if parameters is not None and ordinary(x) and x.numel():
        extent = parameters.extent
        with alone(x):
            low, high = numbers(*x.detach().aminmax())
        # The largest distance of a column is at most the sum of the largest entries, of points and, for a center, twice of means.
        reach = max(-low, high) + 2 * extent.mean
        if mixture.n_features * reach * extent.factor < _NEAR:
            return x, True
    if check:
        check_finite(x.reshape(-1, mixture.n_features), name="x")
    return widened(mixture, x)


def widened(mixture: Mixture, x: Tensor) -> tuple[Tensor, bool]:
    """Convert points to float64 if squared distances might overflow float32; also return whether all distances are small."""
    tensors = (x, mixture.means, *mixture.factor.tensors.values())
    if not x.numel() or not all(concrete(tensor) for tensor in tensors):
        return x, True
    with torch.no_grad():
        means = mixture.means.detach()
        # A difference is at most the sum of two lengths, and the norm of a factor is at most D times its largest entry.
        low, high = means.flatten(0, -2).aminmax(dim=0)
        center = 0.5 * low.double() + 0.5 * high.double()
        least, most = x.detach().reshape(-1, mixture.n_features).aminmax(dim=0)
        reach = torch.maximum(most.double() - center, center - least.double()).amax()
        reach = reach + 0.5 * (high.double() - low.double()).amax()
        largest = float(mixture.n_features * reach * mixture.factor.detach().largest())
    if largest < _NEAR:
        return x, True
    return (x.double() if largest > 1e18 else x), False


def check_range(mixture: Mixture, values: Tensor, x: Tensor) -> None:
    """Raise a ValueError if log-densities (*S, *B) of points (*S, *B, D) exceed the range of their dtype."""
    if not mixture._validate_args or not concrete(values):
        return
    bad = ~(values.detach() > _LEAST[values.dtype])
    if bool(bad.any()):
        place = bad.nonzero()[0].tolist()
        points = x.detach().expand(*bad.shape, mixture.n_features)
        largest, name = float(points[tuple(place)].abs().amax()), str(values.dtype).removeprefix("torch.")
        row = place[0] if len(place) == 1 else tuple(place)
        remedy = "pass float64, or rescale the columns" if name == "float32" else "rescale the columns"
        raise ValueError(
            f"x reaches {largest:.3g} in row {row if place else 0}; its squared distances to all components "
            f"overflow {name}; {remedy}."
        )
