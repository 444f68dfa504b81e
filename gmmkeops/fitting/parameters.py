"""Parameters that gradient methods optimize: those of a mixture, or of a network that predicts mixtures from contexts."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from gmmkeops._checks import PrecisionWarning, warn
from gmmkeops.data import ROUNDING, Batch
from gmmkeops.fitting.method import Evaluation
from gmmkeops.fitting.natural import naturally
from gmmkeops.fitting.objective import FLOOR, Objective
from gmmkeops.fitting.population import DEAD_POINTS, Population, evaluation
from gmmkeops.models import GMM, Mixture

__all__ = ["Loss", "MixtureParameters", "NetworkParameters", "Parameters"]

# Maximum number of entries of the factors of one block of rows.
_CHUNK = 1 << 22
# Largest absolute value of a parameter, and of the logarithm of a scale; squares of larger scales overflow.
_LARGEST, _LARGEST_LOG = 1e15, 300.0
# A bound on squared norms below this fraction of their limit needs no exact comparison; rounding errors are much smaller.
_SMALLER = 0.99

# Objective and negative log-likelihood, nats per point, as scalars or as Python numbers.
Loss = tuple[Tensor, Tensor] | tuple[float, float]


@dataclass
class _Prepared:
    """Tensors from which a loss is computed, differentiable in the parameters.

    Args:
        mixture: Mixture of the active components.
        log_weights: Its log-weights (K,), nats.
        U: Its precision factors.
        natural: Whether gradients with respect to the components are natural gradients.
    """

    mixture: Mixture
    log_weights: Tensor
    U: Tensor
    natural: bool

    def offsets(self) -> Tensor:
        """Compute the offsets (K,) of the exponents without the constant -D/2 log 2π, nats."""
        return self.log_weights + self.mixture.factor.log_determinant()

    def norms(self) -> Tensor:
        """Compute the largest norm of each row of all factors (D or 1,), 1 / standard deviations."""
        U = self.U.detach()
        return (U.norm(dim=-1) if self.mixture.factor.coupled else U).amax(0)


class Parameters(ABC):
    """Unconstrained parameters in standardized coordinates."""

    @property
    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Leaf tensors of the autograd graph, which an optimizer updates in place."""

    @abstractmethod
    def loss(self, objective: Objective, batch: list[Batch] | None, *, natural: bool, moved: bool) -> Loss:
        """Compute objective and negative log-likelihood of a batch or of all points, and set gradients of the tensors.

        Args:
            objective: The objective.
            batch: Points of a batch, or None for all points.
            natural: Whether gradients with respect to the components are natural gradients.
            moved: Whether the optimizer may have changed the tensors since :meth:`settled`.
        """

    @abstractmethod
    def settled(self, objective: Objective, loss: Loss) -> tuple[bool, tuple[float, float]]:
        """Check the parameters after a step of the optimizer, and enforce the bounds on the covariances.

        Args:
            objective: The objective.
            loss: Result of :meth:`loss` before the step.

        Returns:
            Whether all parameters are finite; and the objective and the log-likelihood, nats per point.
        """

    @abstractmethod
    def mixture(self) -> Mixture:
        """Return the mixture with all K components; for a network, its mixture at the central context."""

    @abstractmethod
    def evaluated(self, value: float, likelihood: float, *, exact: bool) -> Evaluation:
        """Build the evaluation of the current parameters from their objective and log-likelihood."""

    @abstractmethod
    def evaluate(self, objective: Objective) -> Evaluation:
        """Evaluate the objective over all points."""

    @abstractmethod
    def pack(self) -> Any:
        """Convert the parameters to a value that checkpoints can store."""

    def prune(self, optimizer: torch.optim.Optimizer, count: float) -> None:
        """Prune components of negligible weight, and their entries in the state of the optimizer. Networks prune nothing."""
        return


class MixtureParameters(Parameters):
    """Parameters of the active components of a mixture.

    Args:
        population: All components.
        leaves: Logits, means and factor parameters of the active components, by name.
        floored: Mask (K,) of components whose covariance has been regularized.
    """

    def __init__(self, population: Population, leaves: dict[str, Tensor], floored: Tensor) -> None:
        self.population, self.floored = population, floored
        self._natural = False
        self._own(leaves)

    def _own(self, leaves: dict[str, Tensor]) -> None:
        """Copy parameters to leaf tensors."""
        self.leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
        self._prepared: _Prepared | None = None
        # A copy of all parameters after the last step; None if it is not known.
        self._copy: Tensor | None = None
        # Least log-weight, and whether float32 points are accurate for the factors; None if they are not known.
        self._least: float | None = None
        self._is_accurate: bool | None = None

    @classmethod
    def of(cls, objective: Objective, mixture: Mixture) -> MixtureParameters:
        """Create the parameters from a mixture in standardized coordinates."""
        mixture, floored = objective.project(mixture.detach())
        leaves = {"logits": mixture.log_weights, "means": mixture.means, **mixture.factor.tensors}
        # A weight of zero has an infinite logit, which gradients cannot change. With a finite logit the component is pruned.
        leaves["logits"] = leaves["logits"].clamp(min=-1e3)
        return cls(Population.of(mixture), leaves, floored)

    @classmethod
    def unpacked(cls, packed: dict[str, Any]) -> MixtureParameters:
        """Restore parameters from the result of :meth:`pack`."""
        found = cls(packed["population"], packed["leaves"], packed["floored"])
        for name, leaf in found.leaves.items():
            leaf.grad = packed["slopes"][name]
        return found

    def pack(self) -> dict[str, Any]:
        return {
            "population": self.population,
            "leaves": {name: leaf.detach().clone() for name, leaf in self.leaves.items()},
            "slopes": {name: None if leaf.grad is None else leaf.grad.clone() for name, leaf in self.leaves.items()},
            "floored": self.floored.clone(),
        }

    @property
    def tensors(self) -> list[Tensor]:
        return list(self.leaves.values())

    def _active(self, leaves: dict[str, Tensor] | None = None) -> Mixture:
        """Return the mixture of the active components, differentiable in the parameters, or that of other parameters."""
        leaves = dict(self.leaves if leaves is None else leaves)
        logits, means = leaves.pop("logits"), leaves.pop("means")
        return Mixture(logits, means, self.population.parked.factor.replace(**leaves), validate_args=False)

    def mixture(self) -> Mixture:
        copy = self._joined() if self._copy is None else self._copy
        return self.population.whole(self._active(_parts(copy, self.leaves)))

    def _joined(self) -> Tensor:
        """Return a copy of all parameters in one array (n,)."""
        return torch.cat([leaf.detach().reshape(-1) for leaf in self.leaves.values()])

    def _ahead(self, natural: bool) -> _Prepared:
        """Return the tensors from which the loss is computed once; those that :meth:`settled` has computed if there are any."""
        found, self._prepared = self._prepared, None
        if found is not None and found.natural == natural:
            return found
        kept: list[Tensor] = []
        active = naturally(self._active(), kept) if natural else self._active()
        log_weights, U = active.log_weights, active.factor.U
        kept.append(U.detach())
        return _Prepared(active, log_weights, U, natural)

    def loss(self, objective: Objective, batch: list[Batch] | None, *, natural: bool, moved: bool) -> Loss:
        if moved:
            self._prepared = None
        ahead, found = self._ahead(natural), None
        self._natural, active = natural, ahead.mixture
        if batch is None and self._is_accurate is None and objective.on_gpu:
            # The path of a step must not depend on the steps before it, so that fits resume bit by bit.
            self._is_accurate = _is_accurate(objective, _changes(objective, ahead.norms()))
        if batch is None and self._is_accurate and objective.on_gpu:
            U = ahead.U.expand(active.n_components, *ahead.U.shape[1:])
            roots = ahead.offsets(), active.means, U
            found = objective.gradients(*roots)
        penalty = None if objective.penalty is None else objective.penalized(self.population.whole(active))
        if found is None:
            likelihood = objective.negative_log_likelihood(active, batch)
            value = likelihood if penalty is None else likelihood + penalty
            value.backward()
        else:
            likelihood, slopes = found
            value = likelihood if penalty is None else likelihood + penalty.detach()
            # A penalty may be constant, if it only bounds the covariances.
            more = [] if penalty is None or not penalty.requires_grad else [penalty]
            torch.autograd.backward([*roots, *more], [*slopes, *map(torch.ones_like, more)])
        return value.detach(), likelihood.detach()

    def settled(self, objective: Objective, loss: Loss) -> tuple[bool, tuple[float, float]]:
        with torch.enable_grad():
            self._prepared = ahead = self._ahead(self._natural)
        with torch.no_grad():
            norms, self._copy = ahead.norms(), self._joined()
            read = [*map(torch.as_tensor, loss), ahead.log_weights.amin(), *self._copy.aminmax()]
            parts = [part.reshape(1) for part in (*read, *self.leaves["log_diagonal"].aminmax())]
            found = torch.cat([*parts, norms, *_changes(objective, norms)]).tolist()
        value, negative, least, low, high, shortest, longest, *sizes = found
        # Standardized parameters are of order one, so values outside these ranges (or NaN) imply divergence.
        if not (max(-low, high) < _LARGEST and max(-shortest, longest) < _LARGEST_LOG):
            return False, (value, -negative)
        width = len(norms)
        self._least, self._is_accurate = least, _is_accurate(objective, sizes[width:])
        # The sum over the columns bounds the squared norm of every factor.
        size = sum(value**2 for value in sizes[:width]) * (objective.data.features / width)
        bounds = objective.penalty is not None and objective.penalty.bounds
        if bounds or not size < _SMALLER / FLOOR:
            self._project(objective)
        return True, (value, -negative)

    def evaluated(self, value: float, likelihood: float, *, exact: bool) -> Evaluation:
        return Evaluation(self.mixture(), value, likelihood, self.population.live, self.floored, exact)

    def evaluate(self, objective: Objective) -> Evaluation:
        return evaluation(objective, self.population, self._active(), self.floored)

    def _project(self, objective: Objective) -> None:
        """Enforce the bounds on the covariances."""
        bounded, moved = objective.project(self._active())
        if not bool(moved.any()):
            return
        with torch.no_grad():
            for name, tensor in {"means": bounded.means, **bounded.factor.tensors}.items():
                self.leaves[name].copy_(tensor)
            # Evaluations have the mask before this step.
            self.floored = self.floored.index_fill(0, self.population.live[moved], True)
            self._prepared = self._copy = self._is_accurate = None

    def prune(self, optimizer: torch.optim.Optimizer, count: float) -> None:
        """Prune components whose expected count is below 1e-3 points, and their optimizer state.

        A component is kept if a gradient step would increase its weight (for example with a Dirichlet concentration above one).
        """
        logits, least = self.leaves["logits"], math.log(DEAD_POINTS / count)
        if self._least is not None and self._least > least:
            return
        keep = logits.detach().log_softmax(0) > least
        if logits.grad is not None:
            keep |= logits.grad < 0
        if bool(keep.all()) or not bool(keep.any()):
            return
        slots = optimizer.state
        for leaf in self.tensors:
            for value in slots.get(leaf, {}).values():
                if not isinstance(value, Tensor) or (value.ndim > 0 and value.shape != leaf.shape):
                    # The state of optimizers such as L-BFGS has no entry per component, so nothing is pruned.
                    return
        self.population = self.population.retire(self._active(), keep)
        tied = self.population.parked.factor.leading == 1
        before, shared = self.leaves, {name for name in self.leaves if tied and name not in ("logits", "means")}
        self._own({name: leaf if name in shared else leaf.detach()[keep] for name, leaf in before.items()})
        for name, leaf in before.items():
            kept, parts = self.leaves[name], slots.pop(leaf, {})
            if name not in shared:
                parts = {key: value[keep] if value.ndim else value for key, value in parts.items()}
            slots[kept] = parts
            for group in optimizer.param_groups:
                group["params"] = [kept if old is leaf else old for old in group["params"]]


class NetworkParameters(Parameters):
    """Parameters of a conditional :class:`~gmmkeops.GMM`, for standardized points and contexts.

    Args:
        model: The network in standardized coordinates.
    """

    def __init__(self, model: GMM) -> None:
        self.model = model

    @classmethod
    def of(cls, objective: Objective) -> NetworkParameters:
        """Copy the network of the objective and convert it to standardized coordinates."""
        assert objective.model is not None, "the objective of a conditional fit has a network"
        found = cls(objective.model.rescaled(objective.frame.shift, objective.frame.scale))
        first = cast(nn.Linear, found.model.network[0])
        # Distance of each unit's zero (w·c + b = 0) from the center of the contexts, in standard deviations of the contexts.
        bends = first.bias.detach().abs() / first.weight.detach().norm(dim=1).clamp(min=1e-30)
        if float((bends > 10).double().mean()) > 0.5:
            warn(
                "most units of the network's first layer are saturated or linear for all contexts, because the contexts are far "
                "from the range of the initialization; call model.initialize(x, context=c) before fit, or standardize them.",
                PrecisionWarning,
            )
        return found

    @classmethod
    def unpacked(cls, objective: Objective, packed: dict[str, Tensor]) -> NetworkParameters:
        """Restore parameters from the result of :meth:`pack`."""
        assert objective.model is not None, "the objective of a conditional fit has a network"
        found = cls(objective.model.rescaled(objective.frame.shift, objective.frame.scale))
        found.model.load_state_dict(packed)
        return found

    def pack(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    @property
    def tensors(self) -> list[Tensor]:
        return list(self.model.parameters())

    def mixture(self) -> Mixture:
        with torch.no_grad():
            center = next(self.model.parameters()).new_zeros(self.model.context)
            return self.model(center).detach().to(torch.float64)

    def loss(self, objective: Objective, batch: list[Batch] | None, *, natural: bool, moved: bool) -> Loss:
        value, likelihood = _loss(objective, self.model, batch, backward=True, natural=natural)
        return value, -likelihood

    def settled(self, objective: Objective, loss: Loss) -> tuple[bool, tuple[float, float]]:
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in self.tensors)
        return finite, (float(loss[0]), -float(loss[1]))

    def evaluated(self, value: float, likelihood: float, *, exact: bool) -> Evaluation:
        return Evaluation(self.mixture(), value, likelihood, exact=exact, answer=self.pack())

    def evaluate(self, objective: Objective) -> Evaluation:
        with torch.no_grad():
            value, likelihood = _loss(objective, copy.deepcopy(self.model), None, backward=False)
        return self.evaluated(value, likelihood, exact=True)


def _loss(
    objective: Objective, model: GMM, batch: list[Batch] | None, *, backward: bool, natural: bool = False
) -> tuple[float, float]:
    """Compute objective and log-likelihood of a batch or of all points, on all ranks; with ``backward``, also gradients."""
    D, parameters = model.features, list(model.parameters())
    kind: Any = {"dtype": parameters[0].dtype, "device": parameters[0].device}
    loss, total, mass = 0.0, 0.0, 0.0
    rows = max(1, _CHUNK // (model.n_components * D * (D + 2)))
    for part in objective.data.batches() if batch is None else batch:
        assert part.context is not None, "a conditional fit has contexts"
        g = part.points.new_ones(len(part), dtype=torch.float64) if part.weights is None else part.weights
        blocks = zip(part.points.split(rows), part.context.split(rows), g.split(rows), strict=True)
        for x, c, weights in blocks if len(g) else ():
            weights = weights.to(**kind)
            mixture = naturally(model(c.to(**kind))) if natural else model(c.to(**kind))
            logs = mixture.log_prob(x.to(**kind))
            terms = -logs if objective.penalty is None else _penalties(objective, mixture) - logs
            value = (weights * terms).sum()
            if backward:
                value.backward()
            with torch.no_grad():
                loss, total, mass = loss + value.item(), total + (weights @ logs).item(), mass + weights.sum().item()
    sums = objective.passes.world.sum(torch.tensor([loss, total, mass], dtype=torch.float64))
    loss, total, mass = sums.tolist()
    mass = max(mass, 1e-300)
    if backward:
        slopes = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = objective.passes.world.sum(torch.cat([slope.reshape(-1).double() for slope in slopes])) / mass
        for p, slope in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = slope.reshape(p.shape).to(p)
    volume = objective.frame.log_volume
    return loss / mass + volume, total / mass - volume


def _penalties(objective: Objective, batch: Mixture) -> Tensor:
    """Compute the penalty of each mixture of a batch (B,), nats per point."""
    kind, features = type(batch.factor), batch.n_features

    def one(logits: Tensor, means: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return objective.penalized(Mixture(logits, means, kind.of(tensors, features), validate_args=False))

    try:
        return torch.func.vmap(one)(batch.logits, batch.means, batch.factor.tensors)
    except RuntimeError as error:
        raise ValueError(
            f"the penalty {type(objective.penalty).__name__} cannot be evaluated for a batch of mixtures by torch.func.vmap "
            f"({error}); write a training loop and add the penalty to the loss."
        ) from None


def _parts(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the parts of an array as tensors of the shapes of others, which share its memory."""
    parts = flat.split([tensor.numel() for tensor in like.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(like.items(), parts, strict=True)}


def _changes(objective: Objective, norms: Tensor) -> list[Tensor]:
    """Return bounds (D,) on the changes of whitened residuals by the rounding of the points; an empty list if there is none."""
    batch = objective.whole()
    return [] if batch is None or batch.rounding is None or objective.rounding is None else [norms * objective.rounding]


def _is_accurate(objective: Objective, changes: list[Tensor] | list[float]) -> bool | None:
    """Return whether the points are accurate for factors, by the result of :func:`_changes`; None if they are not one batch."""
    if objective.whole() is None:
        return None
    squares = [value**2 for part in changes for value in (part.tolist() if isinstance(part, Tensor) else [part])]
    return sum(squares) <= ROUNDING**2
