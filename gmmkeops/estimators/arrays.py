"""Validation of the points that are passed to an estimator, with the messages that scikit-learn's checks expect."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ContextDecorator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gmmkeops._checks import as_device, renamed
from gmmkeops.components import as_tensor, check_finite
from gmmkeops.data import Source, World, as_weights, readable
from gmmkeops.estimators.contract import column_names

if TYPE_CHECKING:
    from gmmkeops.estimators.base import MixtureEstimator

__all__ = ["as_array", "scikit_learn_names", "training_data", "validated_points"]


class scikit_learn_names(ContextDecorator):
    """Name the arguments X and sample_weight in errors within this context, instead of x and weights."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (TypeError, ValueError)):
            try:
                with renamed("x", "X"), renamed("weights", "sample_weight"):
                    raise error
            except (TypeError, ValueError) as found:
                if found is not error:
                    raise


def training_data(
    estimator: MixtureEstimator, X: Any, sample_weight: Any
) -> tuple[Tensor | Source, Any, Sequence[str] | None, torch.device]:
    """Validate training data; return points (or a source), weights, column names, and the device of the computation."""
    if readable(X):
        with scikit_learn_names():
            source = Source.of(X, weights=sample_weight)
        return source, None, source.columns, as_device(estimator.device) or torch.device("cpu")
    minimum = max(estimator.wanted_components or 1, 2) if World().size == 1 else 0
    x, names = validated_points(estimator, X, fitting=True, minimum=minimum)
    g = as_weights(sample_weight, x, name="sample_weight")
    return x, g, None if names is None else tuple(names), x.device


def validated_points(
    estimator: MixtureEstimator, X: Any, *, fitting: bool = False, minimum: int = 1, finite: bool = True
) -> tuple[Tensor, np.ndarray | None]:
    """Validate points (N, D); return them as a tensor, and the names of their columns.

    Args:
        estimator: The estimator. Unless ``fitting``, the points must have the columns of its fit.
        X: Points in any container of numbers.
        fitting: Whether the points are data for a new fit.
        minimum: Smallest number of points.
        finite: Whether to check that all entries are finite; the methods of a mixture check them, too.

    Raises:
        TypeError, ValueError: The points are not numeric, not finite, not two-dimensional, or have other columns.
    """
    if hasattr(X, "toarray") and hasattr(X, "nnz"):
        raise TypeError("Sparse data was passed, but dense data is required; use X.toarray().")
    if X.dtype.kind == "c" if isinstance(X, np.ndarray) else torch.is_tensor(X) and X.is_complex():
        raise ValueError("Complex data not supported: X has complex numbers; pass real and imaginary parts.")
    x = as_tensor(X, name="X", device=estimator.device)
    names = column_names(X)
    if not fitting:
        estimator._check_names(names)
    if x.ndim != 2:
        raise ValueError(
            f"Expected 2D array, got {x.ndim}D array instead: X has shape {tuple(x.shape)}. Reshape your data with "
            "X.reshape(-1, 1) if it has a single feature, or X.reshape(1, -1) if it is a single sample."
        )
    if x.shape[1] == 0:
        raise ValueError(f"0 feature(s) (shape={tuple(x.shape)}) while a minimum of 1 is required.")
    if not fitting and x.shape[1] != estimator.n_features_in_:
        raise ValueError(
            f"X has {x.shape[1]} features, but {type(estimator).__name__} is expecting {estimator.n_features_in_} features "
            "as input"
        )
    if x.shape[0] < minimum:
        raise ValueError(
            f"X has n_samples={x.shape[0]}, expected at least {minimum}; pass more points"
            + (" or use fewer components." if minimum > 1 else ".")
        )
    if finite:
        check_finite(x, name="X")
    return x.detach(), names


def as_array(values: Tensor, tensors: bool) -> Any:
    """Return values as a tensor if ``tensors``, else as a numpy array."""
    return values if tensors else values.cpu().numpy()
