"""Device of the parameters during a fit.

An operation on few components takes less time than its launch on a GPU, and some operations wait for the GPU. If the points are
on another device, few parameters are therefore on the CPU: an iteration copies them to the device of the points in one transfer,
and the moments back in another one. The parameters of EM over all points are on the CPU for any number of components if the
compiled library performs the M-step, since it does so on all cores.
"""

from __future__ import annotations

from typing import Any

import torch

from gmmkeops.fitting.method import Method
from gmmkeops.models import GMM, Mixture
from gmmkeops.penalties import Penalty

__all__ = ["parameter_device"]


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
    few = portable and method.portable and model is None and count < method.few_parameters(mixture.factor)
    return torch.device("cpu") if few else mixture.means.device
