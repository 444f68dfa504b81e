"""Device of the parameters during a fit.

An iteration of a fit performs about 200 operations on the K components. For few components each of them takes less time than its
launch on a GPU, and some wait for the GPU. If the points are on another device, few parameters are therefore on the CPU: an
iteration copies them to the device of the points in one transfer, and the moments back in another one.
"""

from __future__ import annotations

from typing import Any

import torch

from gmmkeops.fitting.method import Method
from gmmkeops.models import GMM, Mixture
from gmmkeops.penalties import Penalty

__all__ = ["parameter_device"]

# Numbers of the covariances from which operations on the parameters are performed on the device of the points. On one core of a
# CPU, an EM step of 5e4 numbers takes 1.5 ms around the E-step in D = 3 to 64 dimensions, and one of 1e4 numbers 0.5 ms. On a GPU
# it takes 160 launches and 27 synchronizations, about 1.5 ms.
_MANY = 50_000


def parameter_device(mixture: Mixture, method: Method[Any], penalty: Any, model: GMM | None) -> torch.device:
    """Return the device of the parameters for points on the device of the initial mixture.

    Methods and penalties of the user receive parameters on the device of the points, since they may use tensors of their own.

    Args:
        mixture: The initial mixture.
        method: The method.
        penalty: The penalty, a function of a mixture, or None.
        model: The network of a conditional fit, or None.
    """
    portable = penalty is None or (isinstance(penalty, Penalty) and penalty.portable)
    count = mixture.means.numel() * (mixture.n_features if mixture.factor.coupled else 1)
    few = portable and method.portable and model is None and count < _MANY
    return torch.device("cpu") if few else mixture.means.device
