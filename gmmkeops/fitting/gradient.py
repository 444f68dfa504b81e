r"""Gradient descent on the penalised likelihood by any ``torch.optim`` optimiser, full batch or minibatches.

.. math:: \min_\theta\; -\frac1{\sum g} \sum_n g_n \log p_\theta(x_n) + \text{penalty}(\theta)

The parameters are logits, means, the logarithms of the factors' diagonals and the entries above them, in float64 in the
fit's frame; their gradient is one ``moments`` sweep. Reference: Kingma and Ba 2015, *Adam: a method for stochastic
optimization*.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gmmkeops._checks import as_number
from gmmkeops.fitting.data import Piece
from gmmkeops.fitting.method import DEAD_POINTS, Evaluation, Method, Population, Problem, check_settings
from gmmkeops.models import Mixture

__all__ = ["Adam", "Gradient", "schedule_numbers"]


@dataclass
class _State:
    """State of a gradient method: the parameters of the active components, which the optimizer updates."""

    population: Population
    leaves: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    scheduler: Any
    floored: Tensor
    sound: bool = True

    def mixture(self) -> Mixture:
        """The mixture of the active components, as a function of the parameters."""
        leaves = dict(self.leaves)
        logits, means = leaves.pop("logits"), leaves.pop("means")
        return Mixture(logits, means, self.population.parked.factor.replace(**leaves), validate_args=False)


@dataclass(frozen=True)
class Gradient(Method[_State]):
    r"""Minimize the penalized negative log-likelihood by a ``torch.optim`` optimizer.

    .. math:: \theta \leftarrow \theta - \text{step}\Bigl(\nabla_\theta \Bigl[-\frac{1}{\sum g} \sum_n g_n \log p_\theta(x_n)
              + \text{penalty}(\theta)\Bigr]\Bigr), \qquad \theta = (\text{logits}, \mu, U).

    Args:
        optimizer: Function that creates the optimizer from a list of tensors, e.g. ``lambda p: torch.optim.SGD(p, lr=0.1)``.
        scheduler: Function that creates a learning-rate schedule from the optimizer; it is stepped once per iteration, e.g.
            ``lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 500)``; or None.
        batch_size: Points per step; None for full batches. An iteration is one pass over the data in both cases.
        max_iter: Largest number of iterations, unless :func:`gmmkeops.fit` is given another one.
        tol: Tolerance, nats per point: the fit has converged when the objective has changed by less than a quarter of it over the
            last half of the iterations (by less than a tenth of it with a penalty that prunes components); 0 never stops early.
        patience: Smallest number of iterations over which that change is measured.
        relative_tol: Tolerance as a fraction of the objective; the larger one of the two tolerances applies.

    Raises:
        TypeError, ValueError: A setting is invalid.

    Example:
        >>> import torch, gmmkeops as gk
        >>> x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
        >>> method = gk.Gradient(lambda p: torch.optim.SGD(p, lr=0.1))
        >>> result = gk.fit(gk.initialise(x, 2), x, method, max_iter=20)
        >>> result.history["objective"][-1] < result.history["objective"][0]
        True
    """

    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    batch_size: int | None = None
    max_iter: int = 200
    tol: float = 0.0
    patience: int = 10
    relative_tol: float = 0.0

    def __post_init__(self) -> None:
        if not callable(self.optimizer):
            raise TypeError("optimizer must make an optimiser from tensors, e.g. lambda p: torch.optim.SGD(p, lr=0.1).")
        if self.scheduler is not None and not callable(self.scheduler):
            raise TypeError(
                f"scheduler must make a schedule from an optimiser, or be None, got {type(self.scheduler).__name__}; pass a "
                "function of the optimiser."
            )
        check_settings(self)

    def init(self, problem: Problem, mixture: Mixture) -> _State:
        mixture, floored = problem.project(mixture.detach())
        leaves = {"logits": mixture.log_weights, "means": mixture.means, **mixture.factor.tensors}
        # A weight of zero has an infinite logit, which no gradient changes; with a finite one the component is pruned at once.
        leaves["logits"] = leaves["logits"].clamp(min=-1e3)
        leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
        optimizer = self.optimizer(list(leaves.values()))
        scheduler = None if self.scheduler is None else self.scheduler(optimizer)
        return _State(Population.of(mixture), leaves, optimizer, scheduler, floored)

    def step(self, problem: Problem, state: _State) -> tuple[_State, Evaluation]:
        packed, before, found = problem.resumed((None, None, []))
        if packed is None:
            _prune(state, problem.count)
            before = state.population.whole(state.mixture()).detach()
        else:
            state = self.unpack(problem, packed)
        memo = lambda: (self.pack(state), before, found)  # noqa: E731
        for batch in [None] if self.batch_size is None else problem.batches(self.batch_size, memo):
            values = self._update(problem, state, batch)
            if values is None:
                found.append((math.nan, math.nan))
                break
            found.append(values)
        if state.scheduler is not None:
            state.scheduler.step()
        exact = self.batch_size is None
        objective, likelihood = (sum(column) / len(found) for column in zip(*found, strict=True))
        # A running mean over minibatches describes the mixture it ended at better than the one it started from.
        mixture = before if exact else state.population.whole(state.mixture()).detach()
        return state, Evaluation(mixture, objective, likelihood, state.population.live, state.floored.clone(), exact)

    def pack(self, state: _State) -> dict[str, Any]:
        return {
            "population": state.population,
            "leaves": {name: leaf.detach().clone() for name, leaf in state.leaves.items()},
            "slopes": {name: None if leaf.grad is None else leaf.grad.clone() for name, leaf in state.leaves.items()},
            "optimizer": copy.deepcopy(state.optimizer.state_dict()),
            "scheduler": None if state.scheduler is None else schedule_numbers(state.scheduler.state_dict()),
            "floored": state.floored.clone(),
            "sound": state.sound,
        }

    def unpack(self, problem: Problem, packed: dict[str, Any]) -> _State:
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in packed["leaves"].items()}
        for name, leaf in leaves.items():
            leaf.grad = packed["slopes"][name]
        optimizer = self.optimizer(list(leaves.values()))
        scheduler = None if self.scheduler is None else self.scheduler(optimizer)
        optimizer.load_state_dict(packed["optimizer"])
        if scheduler is not None:
            scheduler.load_state_dict(packed["scheduler"])
        return _State(packed["population"], leaves, optimizer, scheduler, packed["floored"], packed["sound"])

    def current(self, problem: Problem, state: _State) -> tuple[Population, Mixture, Tensor]:
        return state.population, state.mixture(), state.floored.clone()

    def _update(self, problem: Problem, state: _State, batch: list[Piece] | None) -> tuple[float, float] | None:
        """Perform a step of the optimizer; return the objective and log-likelihood before it, or None if they are not finite."""
        if not state.sound:
            return None
        found: list[tuple[float, float]] = []

        def closure() -> float:
            state.optimizer.zero_grad()
            live = state.mixture()
            likelihood = problem.negative_log_likelihood(live, batch)
            objective = likelihood + problem.penalised(state.population.whole(live))
            objective.backward()
            found.append((objective.item(), -likelihood.item()))
            return found[-1][0]

        state.optimizer.step(closure)
        # Standardized parameters are of order one, so values outside of this range (or NaN) mean divergence.
        state.sound = all(bool((leaf.detach().abs() < 1e15).all()) for leaf in state.leaves.values())
        if not state.sound:
            return found[0]
        bounded, moved = problem.project(state.mixture())
        if bool(moved.any()):
            with torch.no_grad():
                for name, tensor in {"means": bounded.means, **bounded.factor.tensors}.items():
                    state.leaves[name].copy_(tensor)
                state.floored[state.population.live[moved]] = True
        return found[0]


def schedule_numbers(state: dict[str, Any]) -> dict[str, Any]:
    """The entries of a schedule's state that are numbers or text; others, such as functions, are created with the schedule."""
    plain = (bool, int, float, str, type(None))
    kept = {}
    for name, value in state.items():
        items = value if isinstance(value, (list, tuple)) else [value]
        if all(isinstance(item, plain) for item in items):
            kept[name] = value
    return kept


def _prune(state: _State, points: float) -> None:
    """Prune components whose expected count is below 1e-3 points, and their optimizer state.

    A component stays if a gradient step would increase its weight (for example by a Dirichlet prior above one).
    """
    logits = state.leaves["logits"]
    keep = logits.detach().log_softmax(0) > math.log(DEAD_POINTS / points)
    if logits.grad is not None:
        keep |= logits.grad < 0
    if bool(keep.all()) or not bool(keep.any()):
        return
    slots = state.optimizer.state
    for leaf in state.leaves.values():
        for value in slots.get(leaf, {}).values():
            if not isinstance(value, Tensor) or (value.ndim > 0 and value.shape != leaf.shape):
                return  # an optimiser such as L-BFGS, whose memory has no rows: nothing is lost but some work
    state.population = state.population.retire(state.mixture(), keep)
    for name, leaf in state.leaves.items():
        if leaf.shape[0] != len(keep) or (
            name not in ("logits", "means") and state.population.parked.factor.leading == 1
        ):
            continue
        kept = leaf.detach()[keep].requires_grad_()
        slots[kept] = {key: value[keep] if value.ndim else value for key, value in slots.pop(leaf, {}).items()}
        for group in state.optimizer.param_groups:
            group["params"] = [kept if old is leaf else old for old in group["params"]]
        state.leaves[name] = kept


@dataclass(frozen=True)
class _MakeAdam:
    """Function that creates an Adam optimizer, as a value that can be compared between processes."""

    lr: float
    betas: tuple[float, float]

    def __call__(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.lr, betas=self.betas)


def Adam(
    lr: float = 0.05,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    batch_size: int | None = None,
    max_iter: int = 200,
    tol: float = 0.0,
    patience: int = 10,
) -> Gradient:
    """Create a gradient method with the Adam optimizer.

    Args:
        lr: Learning rate, in standardized coordinates, in which the standard deviation of each column is about one.
        betas: Decay rates of the two moment estimates.
        scheduler, batch_size, max_iter, tol, patience: As for :class:`Gradient`.

    Raises:
        ValueError: lr is not positive.

    Reference:
        Kingma and Ba 2015, *Adam: a method for stochastic optimization*, ICLR.

    Example:
        >>> import gmmkeops as gk
        >>> gk.Adam(lr=0.1, batch_size=1000).batch_size
        1000
    """
    as_number(lr, "lr")
    lr = as_number(lr, "lr", 0, above=True, clause="must be positive")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers from 0 to below 1, got {betas!r}.")
    for beta in betas:
        if not as_number(beta, "each of betas", 0) < 1:
            raise ValueError(f"betas must be a pair of numbers from 0 to below 1, got {betas!r}.")

    return Gradient(_MakeAdam(lr, betas), scheduler, batch_size, max_iter, tol, patience)
