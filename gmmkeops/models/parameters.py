"""Conversion of weights, means and covariances in scikit-learn's shapes, and validation of the parameters of a mixture."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gmmkeops.components import Factor, as_tensor, check_finite, concrete, factor_class

__all__ = ["as_logits", "as_means_and_factor", "check_shapes", "check_values", "log_weights"]


def log_weights(weights: Tensor) -> Tensor:
    """Compute the logarithms of weights; a zero gives -inf, with a gradient of zero instead of infinity."""
    none = weights == 0
    return weights.masked_fill(none, 1.0).log().masked_fill(none, -math.inf)


def as_logits(weights: Any, means: Any) -> tuple[Tensor, Tensor]:
    """Convert weights to log-weights (*B, K), and means to a tensor (*B, K, D) on the same device.

    Raises:
        ValueError: Shapes do not match, or weights are negative, not finite, or do not sum to one.
    """
    weights = as_tensor(weights, name="weights")
    means = as_tensor(means, name="means").to(weights.device)
    if means.ndim < 2 or weights.shape != means.shape[:-1]:
        raise ValueError(
            f"weights must have shape (K,) and means (K, D), got {tuple(weights.shape)} and {tuple(means.shape)}."
        )
    check_finite(weights, name="weights", rows="component")
    if concrete(weights) and bool((weights < 0).any()):
        place = (weights < 0).nonzero()[0].tolist()
        raise ValueError(
            f"weights must not be negative, got {float(weights[tuple(place)]):.6g} in component {place[-1]}."
        )
    total = weights.detach().sum(-1, dtype=torch.float64)
    if concrete(weights) and total.numel() and float((total - 1).abs().amax()) > 1e-4:
        wrong = float(total.flatten()[(total - 1).abs().flatten().argmax()])
        raise ValueError(f"weights must sum to one, got {wrong:.6g}; divide them by their sum.")
    return log_weights(weights), means


def as_means_and_factor(means: Any, covariances: Any, covariance_type: str) -> tuple[Tensor, Factor]:
    """Convert means to a tensor (*B, K, D), and covariances in scikit-learn's shapes to precision factors.

    Raises:
        ValueError: Shapes do not match, or a covariance is not positive definite.
    """
    kind, tied = factor_class(covariance_type)
    means = as_tensor(means, name="means")
    covariances = as_tensor(covariances, name="covariances").to(means.device)
    *batch, K, D = means.shape
    leading = () if tied else (K,)
    shape = (*batch, *leading, *kind.spread_shape(D))
    if tuple(covariances.shape) != shape:
        raise ValueError(
            f"covariances must have shape {shape} for covariance_type={covariance_type!r} with K={K} and D={D}, "
            f"got {tuple(covariances.shape)}."
        )
    covariances = covariances.unsqueeze(len(batch)) if tied else covariances
    return means, kind.from_covariances(covariances, features=D)


def check_shapes(logits: Tensor, means: Tensor, factor: Factor) -> None:
    """Raise an error unless shapes and devices of logits (*B, K), means (*B, K, D) and factors match.

    Raises:
        TypeError: The factor is not a :class:`Factor`.
        ValueError: Shapes or devices do not match.
    """
    if not isinstance(factor, Factor):
        raise TypeError(
            f"factor must be a Factor, got {type(factor).__name__}; pass Mixture(weights=..., means=..., covariances=..., "
            "covariance_type=...) for covariances."
        )
    shape = means.shape
    if len(shape) < 2 or logits.shape != shape[:-1] or shape[-2] == 0:
        raise ValueError(
            f"logits must have shape (*B, K) and means (*B, K, D) with K > 0, got {tuple(logits.shape)} and "
            f"{tuple(means.shape)}."
        )
    batch, K, D = shape[:-2], shape[-2], shape[-1]
    if factor.features != D or factor.leading not in (1, K) or factor.batch_shape != batch:
        raise ValueError(
            f"factor must have batch {tuple(batch)}, leading dimension {K} or 1 and {D} features to match the means, "
            f"got batch {tuple(factor.batch_shape)}, leading dimension {factor.leading} and {factor.features}."
        )
    if not logits.device == means.device == factor.device:
        raise ValueError(
            f"logits are on {logits.device}, means on {means.device} and the factor on {factor.device}; "
            "move all to one device with .to()."
        )


def check_values(logits: Tensor, means: Tensor, factor: Factor) -> None:
    """Raise a ValueError if means or factors are not finite, or logits are NaN, +inf, or all -inf."""
    check_finite(means, name="means", rows="component")
    if concrete(logits):
        if bool(torch.isnan(logits).any()) or bool((logits == math.inf).any()):
            raise ValueError("logits must not be NaN or +inf; pass finite log-weights, or -inf for a weight of zero.")
        if bool((logits == -math.inf).all(-1).any()):
            raise ValueError(
                "logits must be finite for at least one component, got -inf for all; pass finite log-weights."
            )
    for name, tensor in factor.tensors.items():
        check_finite(tensor, name=f"the factor's {name}", rows="component")
