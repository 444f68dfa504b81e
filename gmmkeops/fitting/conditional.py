r"""Fitting a mixture that depends on a context: gradient descent on a network's parameters.

.. math:: \min_\theta\; -\frac1{\sum g} \sum_n g_n \log p_\theta(x_n \mid c_n) + \overline{\text{penalty}}

Points and contexts are the columns of one cloud, so frames, minibatches, files, ranks and checkpoints are those of every
other fit; the network is carried into the frame and back, exactly. Reference: Bishop 1994, *Mixture density networks*.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from gmmkeops._checks import PrecisionWarning
from gmmkeops.fitting.data import Piece
from gmmkeops.fitting.frame import Frame
from gmmkeops.fitting.gradient import Gradient, schedule_numbers
from gmmkeops.fitting.method import Evaluation, Method, Population, Problem
from gmmkeops.models import GMM, Mixture

__all__ = ["Network"]

# Numbers that the factors of one stretch of rows may hold.
_CHUNK = 1 << 22


@dataclass
class _State:
    """The network, in the frame, and what moves it, while its parameters are sound."""

    model: GMM
    optimizer: torch.optim.Optimizer
    scheduler: Any
    sound: bool = True


@dataclass(frozen=True)
class Network(Method[_State]):
    """A gradient method for the parameters of a conditional :class:`~gmmkeops.GMM`; fields as :class:`Gradient` has them."""

    model: GMM
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
    scheduler: Callable[[torch.optim.Optimizer], Any] | None
    batch_size: int | None
    max_iter: int
    tol: float
    patience: int
    relative_tol: float

    @classmethod
    def of(cls, model: GMM, gradient: Gradient) -> Network:
        """The method for a network that the user's method stands for."""
        g = gradient
        return cls(model, g.optimizer, g.scheduler, g.batch_size, g.max_iter, g.tol, g.patience, g.relative_tol)

    def _with(self, model: GMM) -> _State:
        optimizer = self.optimizer(list(model.parameters()))
        return _State(model, optimizer, None if self.scheduler is None else self.scheduler(optimizer))

    def init(self, problem: Problem, mixture: Mixture) -> _State:
        state = self._with(self.model.carried(problem.frame.shift, problem.frame.scale))
        first = cast(nn.Linear, state.model.network[0])
        # How far from the centre of the contexts each unit bends, in their standard deviations.
        bends = first.bias.detach().abs() / first.weight.detach().norm(dim=1).clamp(min=1e-30)
        if float((bends > 10).double().mean()) > 0.5:
            warnings.warn(
                "most units of the network's first layer bend far outside the contexts, where they cannot learn; call "
                "model.initialize(x, context=c) before fit, or standardise the contexts.",
                PrecisionWarning,
                stacklevel=5,
            )
        return state

    def step(self, problem: Problem, state: _State) -> tuple[_State, Evaluation]:
        packed, found = problem.resumed((None, []))
        state = state if packed is None else self.unpack(problem, packed)
        before = copy.deepcopy(state.model)
        memo = lambda: (self.pack(state), found)  # noqa: E731
        for batch in [None] if self.batch_size is None else problem.batches(self.batch_size, memo):
            values: list[tuple[float, float]] = []

            def closure() -> float:
                state.optimizer.zero_grad()
                values.append(_loss(problem, state.model, batch, backward=True))  # noqa: B023
                return values[-1][0]  # noqa: B023

            if state.sound:
                state.optimizer.step(closure)
                state.sound = all(bool(torch.isfinite(p).all()) for p in state.model.parameters())
            found.append(values[0] if values else (float("nan"), float("nan")))
        if state.scheduler is not None:
            state.scheduler.step()
        objective, likelihood = (sum(column) / len(found) for column in zip(*found, strict=True))
        exact = self.batch_size is None
        return state, _evaluation(before if exact else copy.deepcopy(state.model), objective, likelihood, exact)

    def evaluate(self, problem: Problem, state: _State) -> Evaluation:
        with torch.no_grad():
            objective, likelihood = _loss(problem, state.model, None, backward=False)
        return _evaluation(copy.deepcopy(state.model), objective, likelihood, True)

    def pack(self, state: _State) -> dict[str, Any]:
        return {
            "parameters": _parameters(state.model),
            "optimizer": copy.deepcopy(state.optimizer.state_dict()),
            "scheduler": None if state.scheduler is None else schedule_numbers(state.scheduler.state_dict()),
            "sound": state.sound,
        }

    def unpack(self, problem: Problem, packed: dict[str, Any]) -> _State:
        state = self._with(self.model.carried(problem.frame.shift, problem.frame.scale))
        state.model.load_state_dict(packed["parameters"])
        state.optimizer.load_state_dict(packed["optimizer"])
        if state.scheduler is not None:
            state.scheduler.load_state_dict(packed["scheduler"])
        state.sound = packed["sound"]
        return state

    def answer(self, found: Any, frame: Frame) -> GMM:
        model = self.model.carried(frame.shift, frame.scale)
        model.load_state_dict(found)
        return model.carried(-frame.shift / frame.scale, 1 / frame.scale)

    def current(self, problem: Problem, state: _State) -> tuple[Population, Mixture, Tensor]:
        mixture = _centre(state.model)
        return Population.of(mixture), mixture, torch.zeros(mixture.components, dtype=torch.bool)


def _centre(model: GMM) -> Mixture:
    """The mixture of the frame's central context."""
    with torch.no_grad():
        return model(next(model.parameters()).new_zeros(model.context)).detach().to(torch.float64)


def _evaluation(model: GMM, objective: float, likelihood: float, exact: bool) -> Evaluation:
    mixture = _centre(model)
    everyone = torch.arange(mixture.components)
    nobody = torch.zeros(mixture.components, dtype=torch.bool)
    return Evaluation(mixture, objective, likelihood, everyone, nobody, exact, answer=_parameters(model))


def _parameters(model: GMM) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _loss(problem: Problem, model: GMM, batch: list[Piece] | None, *, backward: bool) -> tuple[float, float]:
    """Objective and log-likelihood of a batch, or of all points, on all ranks; their gradients, if wanted, in the model."""
    D, parameters = model.features, list(model.parameters())
    kind: Any = {"dtype": parameters[0].dtype, "device": parameters[0].device}
    loss, total, mass = 0.0, 0.0, 0.0
    rows = max(1, _CHUNK // (model.components * D * (D + 2)))
    for piece in problem.data.pieces() if batch is None else batch:
        assert isinstance(piece.x, Tensor), "points of a conditional fit are not arranged"
        g = piece.x.new_ones(len(piece.x), dtype=torch.float64) if piece.weights is None else piece.weights
        for x, weights in zip(piece.x.split(rows), g.split(rows), strict=True) if len(g) else ():
            x, weights = x.to(**kind), weights.to(**kind)
            mixture = model(x[:, D:])
            logs = mixture.log_prob(x[:, :D])
            terms = -logs if problem.penalty is None else _penalties(problem, mixture) - logs
            value = (weights * terms).sum()
            if backward:
                value.backward()
            with torch.no_grad():
                loss, total, mass = loss + value.item(), total + (weights @ logs).item(), mass + weights.sum().item()
    sums = problem.world.sum(torch.tensor([loss, total, mass], dtype=torch.float64))
    loss, total, mass = sums.tolist()
    mass = max(mass, 1e-300)
    if backward:
        slopes = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = problem.world.sum(torch.cat([slope.reshape(-1).double() for slope in slopes])) / mass
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.reshape(p.shape).to(p)
    volume = problem.frame.log_volume
    return loss / mass + volume, total / mass - volume


def _penalties(problem: Problem, batch: Mixture) -> Tensor:
    """The penalty of each mixture of a batch (B,), nats per point."""
    kind, features = type(batch.factor), batch.features

    def one(logits: Tensor, means: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return problem.penalised(Mixture(logits, means, kind.of(tensors, features), validate_args=False))

    try:
        return torch.func.vmap(one)(batch.logits, batch.means, batch.factor.tensors)
    except RuntimeError as error:
        raise ValueError(
            f"the penalty {type(problem.penalty).__name__} cannot be taken of a batch of mixtures ({error}); add a term of "
            "your own in a torch loop."
        ) from None
