"""Selection of components of one mixture, or of entries of a batch of mixtures."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from gmmkeops.models.mixture import Mixture

__all__ = ["indexed", "select"]


def select(mixture: Mixture, index: Tensor) -> Mixture:
    """Return the mixture of some components, with normalized weights; equal weights if all of them are zero.

    Args:
        index: Indices of components, or a Boolean mask (K,).

    Example:
        >>> import torch, gmmkeops as gk
        >>> m = gk.Mixture(weights=[0.2, 0.6, 0.2], means=[[0.0], [1.0], [2.0]], covariances=[1.0], covariance_type="tied_diag")
        >>> m.select(torch.tensor([2, 1])).weights
        tensor([0.2500, 0.7500], dtype=torch.float64)
    """
    logits = mixture.logits[..., index]
    logits = logits.masked_fill((logits == -math.inf).all(-1, keepdim=True), 0.0)
    means, factor = mixture.means[..., index, :], mixture.factor.select(index)
    return mixture._like(logits, means, factor).named(mixture.columns)


def indexed(mixture: Mixture, index: Any) -> Mixture:
    """Return components of one mixture, or entries of a batch of mixtures; see ``Mixture.__getitem__``."""
    batch = tuple(mixture.batch_shape)
    size = f"a batch of shape {batch}" if batch else f"{mixture.n_components} components"
    shape = batch or (mixture.n_components,)
    index = torch.as_tensor(index) if isinstance(index, (list, np.ndarray)) else index
    try:
        places = torch.arange(math.prod(shape), device=mixture.means.device).view(shape)[index]
    except IndexError:
        raise IndexError(f"index {index} is out of range for {size}; pass a smaller index.") from None
    except TypeError:
        raise TypeError(f"a mixture is indexed by ints, slices, lists or masks, got {type(index).__name__}.") from None
    if not batch:
        if places.ndim > 1 or not places.numel():
            raise IndexError(f"index {index} must select one or more of the {size}; pass a list of component indices.")
        return select(mixture, places.reshape(-1))
    last = len(batch) - 1
    tensors = {name: tensor.flatten(0, last)[places] for name, tensor in mixture.factor.tensors.items()}
    logits, means = mixture.logits.flatten(0, last)[places], mixture.means.flatten(0, last)[places]
    return mixture._like(logits, means, mixture.factor.replace(**tensors)).named(mixture.columns)
