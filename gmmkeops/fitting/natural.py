r"""Natural gradients of the components of a mixture.

.. math:: \nabla_{\mu_k} \to \Sigma_k \nabla_{\mu_k}, \qquad \nabla_{U_k} \to I(U_k)^{-1} \nabla_{U_k}

with the Fisher information I of one Gaussian distribution. The gradient of the log-likelihood of a mixture is that of the
expected log-likelihood of EM at its responsibilities, so that each component makes a natural-gradient step of its M-step. The
gradient with respect to the weights is not changed. Reference: Chen, Bayrooti and Morad 2026, *Learning mixture density via
natural gradient expectation maximization*, arXiv 2602.10602.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gmmkeops.components import Factor
from gmmkeops.models import Mixture

__all__ = ["naturally"]


class _Natural(torch.autograd.Function):
    """Identity of means and of the tensors of a factor, with natural gradients."""

    @staticmethod
    def forward(ctx: Any, factor: Factor, kept: list[Tensor], means: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.factor, ctx.kept = factor, kept
        ctx.save_for_backward(*tensors)
        return means.view_as(means), *(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Any, ...]:
        names = list(ctx.factor.tensors)
        factor = ctx.factor.replace(**dict(zip(names, (tensor.detach() for tensor in ctx.saved_tensors), strict=True)))
        means, found = factor.natural_gradient(slopes[0], dict(zip(names, slopes[1:], strict=True)), *ctx.kept)
        return None, None, means, *(found[name] for name in names)


def naturally(mixture: Mixture, kept: list[Tensor] | None = None) -> Mixture:
    """Return an equal mixture through which gradients of means and factors become natural gradients.

    Args:
        mixture: The mixture.
        kept: List to which the tensor U of its factor may be added before the gradients are computed, if it is known.
    """
    factor = mixture.factor
    means, *tensors = _Natural.apply(factor, [] if kept is None else kept, mixture.means, *factor.tensors.values())
    other = factor.replace(**dict(zip(factor.tensors, tensors, strict=True)))
    return Mixture(mixture.logits, means, other, validate_args=False)
