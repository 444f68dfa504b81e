"""Moments for soft assignments on the CPU, from sums that are copied from the device in one transfer.

The kernels are launched before the numbers are known that decide how to compute the moments: whether rows are far from all
components, and whether weights are of very different sizes.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from gmmkeops.components import transferred
from gmmkeops.reductions.accuracy import DEEPEST
from gmmkeops.reductions.dense import dense
from gmmkeops.reductions.protocol import Result, Statistics
from gmmkeops.reductions.triton.packing import LN2, Scale
from gmmkeops.reductions.triton.products import SCALE, relative
from gmmkeops.reductions.triton.residuals import NO_SHARE, Residuals
from gmmkeops.reductions.truncation.passes import evaluate

__all__ = [
    "LOWEST",
    "RATIO",
    "add_values",
    "converted",
    "extreme_sizes",
    "moments_on_cpu",
    "ratio_and_unit",
    "suffices",
]

# Exponents, base 2, above which kernels are exact: their running maximum begins at -1e38.
LOWEST = -9.9e37

# Number above all exponents and below NO_SHARE.
_LARGEST = 1e29

# Largest ratio of weights whose products with responsibilities float32 holds, and largest binary exponents of weights that are
# not divided by their size.
RATIO, _ORDINARY = 2.0**50, 20


def extreme_sizes(weights: Tensor) -> list[Tensor]:
    """Return the least positive and the largest absolute value of weights (N,), two scalars."""
    sizes = weights.abs()
    return [sizes.masked_fill(sizes == 0, math.inf).amin(), sizes.amax()]


def ratio_and_unit(least: float, most: float) -> tuple[float, float]:
    """Return the ratio of the extreme sizes of weights, and the number by which weights are divided."""
    exponent = math.frexp(most)[1] if math.isfinite(most) else 0
    unit = 1.0 if abs(exponent) <= _ORDINARY else math.ldexp(1.0, min(max(exponent, -1000), 1000))
    return most / least, unit


def suffices(kernels: Residuals, request: Statistics, by_products: bool) -> bool:
    """Return whether the moments are computed on the CPU from the sums of kernels, if no row is far.

    Args:
        kernels: Kernels.
        request: Request of moments.
        by_products: Whether the sums are those of products of digits.
    """
    if not request.on_cpu or request.assignment != "soft" or request.values:
        return False
    if by_products:
        assert kernels.products is not None, "products are accurate"
        return kernels.products.parameters.means.device.type == "cpu"
    return kernels.compiled is not None and not kernels.is_tiled


def add_values(out: Tensor, scale: Scale, values: Tensor, weights: Tensor | None) -> None:
    """Compute the sum of base-2 values (N,), or of the weighted values in nats, into a float64 scalar."""
    if weights is None:
        torch.sum(values, 0, dtype=torch.float64, out=out)
    else:
        torch.dot(scale.nats(values), weights, out=out)


def converted(kernels: Residuals, weights: Tensor | None, values: Tensor, found: Tensor) -> Result:
    """Convert sums of residuals on the CPU, after which the sum of the values follows, to moments and the total."""
    compiled, total = kernels.compiled, found[-1]
    assert compiled is not None, "sums have been computed for compiled parameters"
    S0, S1, S2 = compiled.moments(kernels.problem.host or kernels.problem, found[:-1])
    return S0, S1, S2, _total(kernels, weights, values, total)


def _total(kernels: Residuals, weights: Tensor | None, values: Tensor, total: Tensor) -> Tensor:
    """Convert the result of :func:`add_values` on the CPU to nats."""
    return total if weights is not None else kernels.scale.base * len(values) + LN2 * total


def moments_on_cpu(kernels: Residuals, request: Statistics, values: Tensor) -> Result | None:
    """Compute moments over all pairs, with one transfer if no row is far and no component needs other kernels.

    Rows that are far have no part in the sums of the kernels, which are discarded if weights are of unusual size or if values are
    not finite.

    Args:
        kernels: Kernels, of whose sums :func:`suffices` is true.
        request: Request of moments for soft assignments.
        values: Base-2 log-sum-exps (N,).

    Returns:
        None if the weights or the values require that numbers are read before the sums are computed.
    """
    problem, products, weights, dtype = kernels.problem, kernels.products, request.weights, values.dtype
    lowest = float(kernels.scale.middle) - DEEPEST / LN2 if dtype == torch.float32 else LOWEST
    shares = torch.threshold(values, lowest, NO_SHARE)
    single = None if weights is None else weights.to(dtype).contiguous()
    # The sums, the sum of values or log-densities, the largest value, the extreme sizes of weights, and their unit.
    shape = kernels.sums_shape if products is None else products.sums_shape
    end = math.prod(shape)
    found = torch.zeros(end + 5, dtype=torch.float64, device=values.device)
    sums = found[:end].view(shape)
    if products is None:
        kernels.add_sums(sums, shares, single, None)
    else:
        share, unit = (None, None) if single is None else relative(single)
        products.add_sums(sums, shares, share)
    add_values(found[end], kernels.scale, values, weights)
    if weights is not None:
        torch.stack(extreme_sizes(weights), out=found[end + 2 : end + 4])
    if products is not None and unit is not None:
        found[end + 4] = unit
    torch.amax(shares, 0, out=found[end + 1 : end + 2].view(dtype)[0])
    (found,) = transferred([found], torch.device("cpu"))
    most, total, largest = found[end + 1 : end + 2].view(dtype)[0].item(), found[end], 1.0
    if weights is not None:
        *extremes, largest = found[end + 2 :].tolist()
        ratio, size = ratio_and_unit(*extremes)
        if size != 1 or (ratio > RATIO and dtype == torch.float32):
            return None
    is_finite = most < _LARGEST or (most == shares.new_tensor(NO_SHARE).item() and bool(found[:end].isfinite().all()))
    if not is_finite:
        return None
    S0, S1, S2 = _moments(kernels, found[:end].view(shape), shares, single, largest)
    if most < _LARGEST:
        return S0, S1, S2, _total(kernels, weights, values, total)
    is_far = shares == NO_SHARE
    far = is_far.nonzero()[:, 0]
    few = replace(request, weights=None if weights is None else weights[far])
    rest = evaluate(dense, problem.rows(far), few)
    nats = kernels.scale.nats(values).masked_fill(is_far, 0.0)
    total = rest[3] + (nats.sum() if weights is None else nats @ weights)
    more = transferred([*rest[:3], total], S0.device)
    return S0 + more[0], S1 + more[1], S2 + more[2].reshape(S2.shape), more[3]


def _moments(
    kernels: Residuals, sums: Tensor, shares: Tensor, weights: Tensor | None, largest: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Convert sums on the CPU to moments.

    Args:
        kernels: Kernels.
        sums: Sums of the kernels.
        shares: Base-2 log-sum-exps (N,).
        weights: Weights (N,), in the dtype of the points.
        largest: Largest size of the weights.
    """
    if kernels.products is None:
        assert kernels.compiled is not None, "sums suffice only for compiled parameters"
        return kernels.compiled.moments(kernels.problem.host or kernels.problem, sums)
    moments = kernels.products.parameters.moments(sums, SCALE * largest)
    return kernels.with_weak(moments, largest, shares, weights)
