"""Warning about a ``reg_covar`` that is larger than the covariances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gmmkeops.models import Mixture

__all__ = ["dominated"]

# Ratios of reg_covar to the variances within components, and to the variance of all points, above which it is probably in wrong
# units; and number of components whose variances are compared with it.
_DOMINANT, _NOTABLE, _COMPARED = 0.9, 1e-3, 32


def dominated(method: Any, scale: Tensor, mixture: Mixture) -> str:
    """Return the text of the PrecisionWarning of a ``reg_covar`` that dominates fitted covariances, or an empty string.

    Components that are small compared with the data, such as single points, do not count.

    Args:
        method: The method, with or without ``reg_covar``.
        scale: Standard deviations of the columns (D,) or (1,), data units.
        mixture: The fitted mixture, data units.
    """
    ridge = getattr(method, "reg_covar", 0.0)
    frozen = getattr(method, "frozen_covariances", False) is not False
    if frozen or not ridge > _NOTABLE * float(scale.max()) ** 2:
        return ""
    K, factor = mixture.n_components, mixture.factor
    index = torch.arange(0, K, -(-K // _COMPARED), device=factor.device)
    variances = factor.select(index).detach().covariances().diagonal(dim1=-2, dim2=-1).median(0).values
    most = float(variances.max())
    if not ridge > _DOMINANT * most:
        return ""
    return (
        f"reg_covar={ridge:g} dominates the covariances: the variances within most components are at most {most:.2g}, reg_covar "
        "included; pass a smaller reg_covar, in squared units of the data."
    )
