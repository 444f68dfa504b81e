"""Gradient methods: optimization of the penalized likelihood by any ``torch.optim`` optimizer, full batch or minibatches.

The parameters are the logits, the means, and the entries of the triangular factors, with the logarithms of their diagonals, in
standardized coordinates and float64. Their gradient follows from the moments of the responsibilities, in one pass.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gmmkeops._checks import as_number
from gmmkeops.data import Batch
from gmmkeops.fitting.method import Evaluation, Method, _changes, check_settings
from gmmkeops.fitting.objective import Objective
from gmmkeops.fitting.parameters import Loss, MixtureParameters, NetworkParameters, Parameters
from gmmkeops.models import Mixture

__all__ = ["Adam", "Gradient", "schedule_numbers"]


@dataclass
class _State:
    """State of a gradient method: parameters and optimizer, which are modified in place, and whether parameters are finite."""

    parameters: Parameters
    optimizer: torch.optim.Optimizer
    scheduler: Any
    sound: bool = True


@dataclass(frozen=True, repr=False)
class Gradient(Method[_State]):
    r"""Minimize the penalized negative log-likelihood by a ``torch.optim`` optimizer.

    .. math:: \theta \leftarrow \theta - \text{step}\Bigl(\nabla_\theta \Bigl[-\frac{1}{\sum g} \sum_n g_n \log p_\theta(x_n)
              + \text{penalty}(\theta)\Bigr]\Bigr), \qquad \theta = (\text{logits}, \mu, U).

    Args:
        optimizer: Function that creates the optimizer from a list of tensors, e.g. ``lambda p: torch.optim.SGD(p, lr=0.1)``.
        scheduler: Function that creates a learning-rate scheduler from the optimizer; the scheduler is stepped once per
            iteration, e.g. ``lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 500)``; or None.
        batch_size: Points per step; None for full batches. An iteration is one pass over the data in both cases.
        natural_gradient: Whether the gradients with respect to means and precision factors are multiplied by the inverse Fisher
            information of each Gaussian component (natural-gradient EM, nGEM), so that narrow components do not take much larger
            steps than wide ones. The gradients with respect to the weights and the objective are unchanged. It is meant for a
            :class:`~gmmkeops.GMM` with a context, which EM cannot fit.
        max_iter: Maximum number of iterations, if not passed to :func:`gmmkeops.fit`.
        tol: Tolerance, nats per point, as for :class:`~gmmkeops.EM`; with 0 all iterations are performed.
        patience: Minimum number of iterations over which the change of the objective is measured.
        relative_tol: Tolerance as a fraction of the objective; the larger one of the two tolerances applies.

    Raises:
        TypeError, ValueError: A setting is invalid.

    Reference:
        Chen, Bayrooti and Morad 2026, *Learning mixture density via natural gradient expectation maximization*, arXiv 2602.10602,
        for ``natural_gradient``.

    Example:
        >>> import torch, gmmkeops as gk
        >>> x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
        >>> method = gk.Gradient(lambda p: torch.optim.SGD(p, lr=0.1))
        >>> result = gk.fit(gk.initialize(x, 2), x, method, max_iter=20)
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
    natural_gradient: bool = False

    @property
    def portable(self) -> bool:
        # Optimizers of the user may have options for a GPU, such as capturable=True.
        return isinstance(self.optimizer, _MakeAdam)

    def __repr__(self) -> str:
        if not isinstance(self.optimizer, _MakeAdam):
            return super().__repr__()
        own = [f"lr={self.optimizer.lr:g}"]
        own += [] if self.optimizer.betas == (0.9, 0.999) else [f"betas={self.optimizer.betas}"]
        return f"Adam({', '.join([*own, *_changes(self)[1:]])})"

    def __post_init__(self) -> None:
        if not callable(self.optimizer):
            raise TypeError(
                f"optimizer must be a function of a list of tensors, got {type(self.optimizer).__name__}; pass for example "
                "lambda p: torch.optim.SGD(p, lr=0.1)."
            )
        if self.scheduler is not None and not callable(self.scheduler):
            raise TypeError(
                f"scheduler must be a function of an optimizer, or None, got {type(self.scheduler).__name__}; pass for example "
                "lambda o: torch.optim.lr_scheduler.StepLR(o, 100)."
            )
        if not isinstance(self.natural_gradient, bool):
            raise TypeError(f"natural_gradient must be True or False, got {self.natural_gradient!r}.")
        check_settings(self)

    def _with(self, parameters: Parameters) -> _State:
        optimizer = self.optimizer(parameters.tensors)
        return _State(parameters, optimizer, None if self.scheduler is None else self.scheduler(optimizer))

    def init(self, objective: Objective, mixture: Mixture) -> _State:
        return self._with(
            MixtureParameters.of(objective, mixture) if objective.model is None else NetworkParameters.of(objective)
        )

    def step(self, objective: Objective, state: _State) -> tuple[_State, Evaluation]:
        state.parameters.prune(state.optimizer, objective.count)
        found: list[tuple[float, float]] = []
        if self.batch_size is None:
            now = state.parameters.evaluated(math.nan, math.nan, exact=True)
            found.append(self._update(objective, state, None))
        else:

            def update(reached: tuple[_State, list[Any]], batch: list[Batch]) -> tuple[_State, list[Any]]:
                return reached[0], [*reached[1], self._update(objective, reached[0], batch)]

            state, found = objective.passes.fold(
                objective.data,
                self.batch_size,
                (state, found),
                update,
                lambda reached: (self.pack(reached[0]), reached[1]),
                lambda packed: (self.unpack(objective, packed[0]), [tuple(pair) for pair in packed[1]]),
            )
            # The mean over minibatches is closer to the objective of the final parameters than to that of the initial ones.
            now = state.parameters.evaluated(math.nan, math.nan, exact=False)
        if state.scheduler is not None:
            state.scheduler.step()
        value, likelihood = (sum(column) / len(found) for column in zip(*found, strict=True))
        return state, replace(now, objective=value, log_likelihood=likelihood)

    def pack(self, state: _State) -> dict[str, Any]:
        return {
            "parameters": state.parameters.pack(),
            "optimizer": copy.deepcopy(state.optimizer.state_dict()),
            "scheduler": None if state.scheduler is None else schedule_numbers(state.scheduler.state_dict()),
            "sound": state.sound,
        }

    def unpack(self, objective: Objective, packed: dict[str, Any]) -> _State:
        if objective.model is None:
            state = self._with(MixtureParameters.unpacked(packed["parameters"]))
        else:
            state = self._with(NetworkParameters.unpacked(objective, packed["parameters"]))
        saved = packed["optimizer"]
        if isinstance(self.optimizer, _MakeAdam):
            # The checkpoint may have been written on another device.
            fused = self.optimizer.fused(state.parameters.tensors)
            saved = saved | {"param_groups": [group | {"fused": fused} for group in saved["param_groups"]]}
        state.optimizer.load_state_dict(saved)
        if state.scheduler is not None:
            state.scheduler.load_state_dict(packed["scheduler"])
        state.sound = packed["sound"]
        return state

    def current(self, objective: Objective, state: _State) -> Mixture:
        return state.parameters.mixture()

    def evaluate(self, objective: Objective, state: _State) -> Evaluation:
        return state.parameters.evaluate(objective)

    def answer(self, objective: Objective, found: Any) -> Any:
        if objective.model is None:
            return found
        frame = objective.frame
        model = NetworkParameters.unpacked(objective, found).model
        return model.rescaled(-frame.shift / frame.scale, 1 / frame.scale)

    def _update(self, objective: Objective, state: _State, batch: list[Batch] | None) -> tuple[float, float]:
        """Perform a step of the optimizer; return the objective and log-likelihood before it, NaN after divergence."""
        if not state.sound:
            return math.nan, math.nan
        found: list[Loss] = []
        # Other optimizers may move the tensors before they call the closure, and call it several times.
        settings = {"natural": self.natural_gradient, "moved": not isinstance(self.optimizer, _MakeAdam)}

        def closure() -> Any:
            state.optimizer.zero_grad()
            found.append(state.parameters.loss(objective, batch, **settings))
            return found[-1][0]

        state.optimizer.step(closure)
        state.sound, numbers = state.parameters.settled(objective, found[0])
        return numbers


def schedule_numbers(state: dict[str, Any]) -> dict[str, Any]:
    """Select the numbers and strings of a scheduler's state; other entries, such as functions, are created with it."""
    plain = (bool, int, float, str, type(None))
    kept = {}
    for name, value in state.items():
        items = value if isinstance(value, (list, tuple)) else [value]
        if all(isinstance(item, plain) for item in items):
            kept[name] = value
    return kept


@dataclass(frozen=True)
class _MakeAdam:
    """Function that creates an Adam optimizer, as a dataclass that can be compared between processes."""

    lr: float
    betas: tuple[float, float]

    def __call__(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        tensors = list(parameters)
        return torch.optim.Adam(tensors, lr=self.lr, betas=self.betas, fused=self.fused(tensors))

    @staticmethod
    def fused(tensors: list[Tensor]) -> bool | None:
        """Return whether one kernel performs the step, which is possible on a GPU in all versions of torch."""
        return True if all(tensor.is_cuda for tensor in tensors) else None


def Adam(
    lr: float = 0.05,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    batch_size: int | None = None,
    natural_gradient: bool = False,
    max_iter: int = 200,
    tol: float = 0.0,
    patience: int = 10,
) -> Gradient:
    """Create a gradient method with the Adam optimizer.

    Args:
        lr: Learning rate, in standardized coordinates, in which the standard deviation of each column is about one.
        betas: Decay rates of the two moment estimates.
        scheduler, batch_size, natural_gradient, max_iter, tol, patience: As for :class:`Gradient`.

    Raises:
        ValueError: ``lr`` is not positive, or ``betas`` are not two numbers in [0, 1).

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
        raise ValueError(f"betas must be a pair of numbers in [0, 1), got {betas!r}.")
    for beta in betas:
        if not as_number(beta, "each of betas", 0) < 1:
            raise ValueError(f"betas must be a pair of numbers in [0, 1), got {betas!r}.")

    return Gradient(
        _MakeAdam(lr, betas), scheduler, batch_size, max_iter, tol, patience, natural_gradient=natural_gradient
    )
