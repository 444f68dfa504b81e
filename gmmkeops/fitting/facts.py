"""Descriptions of the data and settings of a fit, which are compared with those of a checkpoint and of other ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gmmkeops.fitting.identity import describe, facts_of, marks
from gmmkeops.fitting.method import Method
from gmmkeops.fitting.objective import Objective
from gmmkeops.models import GMM, Mixture
from gmmkeops.penalties import Penalty

__all__ = ["LIMITS", "described", "facts", "tensors_of"]

# Settings that may change when a fit is resumed, but not between ranks.
LIMITS = ("max_iter", "tol", "relative_tol", "patience")


def described(
    mixture: Mixture, model: GMM | None, method: Method[Any], penalty: Any, truncate: float | None, backend: str
) -> dict[str, Any]:
    """Return descriptions of the settings, which must be equal on all ranks and when a fit is resumed."""
    network = "" if model is None else f", {describe([str(model), model.epsilon])}"
    return {
        "model": f"{mixture.n_components} components in {mixture.n_features} dimensions, {mixture.factor.family}, "
        f"{mixture.factor.leading} factors{network}",
        "method": facts_of(method, "method", skip=LIMITS),
        "penalty": facts_of(penalty, "penalty") if isinstance(penalty, Penalty) else describe(penalty, "penalty"),
        "truncate": describe(truncate, "truncate"),
        "backend": describe(backend, "backend"),
    }


def facts(objective: Objective, mixture: Mixture, settings: dict[str, Any]) -> dict[str, Any]:
    """Return descriptions of data, initial mixture and settings, after comparing them between ranks."""
    frame, passes = objective.frame, objective.passes
    if objective.model is not None:
        start = tensors_of(objective.model.rescaled(frame.shift, frame.scale).state_dict())
    else:
        start = tensors_of(frame.enter(mixture.detach().to(torch.float64)))
    found = settings | {
        "data": f"{objective.rows} rows of {objective.data.features} columns, "
        f"total weight {objective.mass * objective.unit:.9g}, fingerprint {passes.journal.fingerprint}",
        "dtype": str(objective.data.dtype),
        "generator": f"seed {passes.generator.initial_seed()}",
        "start": marks(start, frame.shift, frame.scale),
    }
    passes.world.agree(found)
    return found


def tensors_of(found: Any) -> list[Tensor]:
    """List the parameters of a mixture (with log-weights of at least -1000), of a network, or of the mixture of a posterior."""
    if isinstance(found, dict):
        return list(found.values())
    mixture = found if isinstance(found, Mixture) else found.mixture
    return [mixture.log_weights.clamp(min=-1e3), mixture.means, *mixture.factor.tensors.values()]
