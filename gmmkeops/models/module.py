r"""Trainable Gaussian mixtures: an ``nn.Module`` that returns a :class:`~gmmkeops.Mixture` when called.

With a context c the parameters are predicted by a multilayer perceptron (MLP), :math:`p(x \mid c) = \sum_k W_k(c)\,
\mathcal N(x; \mu_k(c), \Sigma_k(c))`. The interface is that of Zuko's ``GMM`` (probabilists/zuko).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from gmmkeops._checks import FormerName, accepts, as_integer, as_number
from gmmkeops.components import as_tensor, factor_class
from gmmkeops.data import as_generator, as_points, table_names, table_of
from gmmkeops.models.arguments import COMPONENTS
from gmmkeops.models.mixture import Mixture, as_mixture

__all__ = ["GMM"]

# Number of EM steps after k-means.
_REFINE = 1

# Number of runs of k-means++.
_RUNS = 10

_WRONG = COMPONENTS | {
    "dim": "the number of features first",
    "n_features": "features=",
    "input_dim": "features=",
    "n_context": "context=",
    "covariance": "covariance_type=",
    "reg_covar": "epsilon=",
}


class GMM(nn.Module):
    r"""A trainable Gaussian mixture, unconditional or conditional on a context (a mixture density network).

    The constructor draws parameters with torch's global generator; :meth:`initialize` fits them to data.
    ``torch.compile(model, fullgraph=True)`` and ``torch.export.export(model, (c,))`` are supported. All arguments except
    ``features`` are keyword-only.

    Args:
        features: D, the number of columns of a point.
        n_components: Number of components K.
        context: C, the number of columns of a context; 0 for an unconditional mixture.
        covariance_type: ``"full"``, ``"diagonal"`` (or ``"diag"``) or ``"spherical"``; ``"tied_..."`` also sets ``tied``.
        tied: Whether all components share one covariance.
        epsilon: Constant that is added to :math:`1/U_{dd}^2`, the conditional variance of column d given the following columns
            (for diagonal and spherical factors the variance itself), squared data units.
        hidden_features: Widths of the hidden layers of the MLP (conditional models only).
        activation: Constructor of the activation between the layers.

    Attributes:
        logits: Parameters (K,) of an unconditional model.
        means: Parameters (K, D) of an unconditional model.
        log_diagonal: Parameters (K or 1, D or 1) of an unconditional model.
        upper: Parameters (K or 1, D(D-1)/2) of the full factors of an unconditional model.
        network: The MLP of a conditional model.
        columns: Names of the D columns of the points and the C columns of the contexts, if the data of the initialization or
            the fit had names; else None. They are not part of the state dict.

    Raises:
        TypeError: An argument after ``features`` is not passed by name, or is unknown.
        ValueError: A size is below one, or the covariance type is unknown.

    Reference:
        Bishop 1994, *Mixture density networks*, Aston University.

    Example:
        >>> import torch, gmmkeops as gk
        >>> model = gk.GMM(2, n_components=3)
        >>> model.initialize(torch.randn(100, 2), "kmeans++")
        GMM(features=2, context=0, n_components=3, covariance_type='full', tied=False)
        >>> loss = -model().log_prob(torch.randn(100, 2)).mean()
        >>> loss.backward()
        >>> model.means.grad.shape
        torch.Size([3, 2])
    """

    columns: tuple[str, ...] | None = None

    @accepts(old={"components": "n_components"}, wrong=_WRONG)
    def __init__(
        self,
        features: int,
        *positional: Any,
        n_components: int = 2,
        context: int = 0,
        covariance_type: str = "full",
        tied: bool = False,
        epsilon: float = 1e-6,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        if positional:
            raise TypeError(
                f"GMM takes one positional argument, the number of features, got {1 + len(positional)}; pass "
                "n_components= for the number of components, and context= for the number of columns of a context."
            )
        super().__init__()
        self.features, self.context = as_integer(features, "features", 1), as_integer(context, "context", 0)
        self.n_components = as_integer(n_components, "n_components", 1)
        epsilon = as_number(epsilon, "epsilon", 0)
        if isinstance(hidden_features, (str, bytes)) or not isinstance(hidden_features, Iterable):
            raise TypeError(f"hidden_features must be a list of integers, got {hidden_features!r}.")
        hidden_features = [as_integer(width, "each of hidden_features", 1) for width in hidden_features]
        if not callable(activation):
            raise TypeError(f"activation must be a constructor such as torch.nn.ReLU, got {type(activation).__name__}.")
        self.kind, tied_name = factor_class(covariance_type)
        self.tied = bool(tied or tied_name)
        self.epsilon: float | Tensor = float(epsilon)
        K, D = self.n_components, self.features
        factor_shapes = self.kind.shapes(1 if self.tied else K, D)
        self.shapes: dict[str, tuple[int, ...]] = {"logits": (1, K), "means": (K, D), **factor_shapes}
        if self.context:
            layers: list[nn.Module] = []
            for a, b in pairwise([self.context, *hidden_features]):
                layers += [nn.Linear(a, b), activation()]
            width = [self.context, *hidden_features][-1]
            self.network = nn.Sequential(*layers, nn.Linear(width, sum(a * b for a, b in self.shapes.values())))
        else:
            self.logits = nn.Parameter(torch.zeros(K))
            self.means = nn.Parameter(torch.randn(K, D))
            for name, shape in factor_shapes.items():
                setattr(self, name, nn.Parameter(torch.zeros(shape)))

    components = FormerName("n_components")

    def forward(self, c: Any = None) -> Mixture:
        """Return the mixture, or a batch (*B) of mixtures for contexts c (*B, C).

        Raises:
            ValueError: A context is missing, unexpected, or has another number of columns.
        """
        if not self.context:
            if c is not None:
                raise ValueError(
                    "this GMM has no context; call model() without arguments or construct it with context=C."
                )
            tensors = {name: getattr(self, name) for name in self.shapes}
        else:
            if c is None:
                raise ValueError(f"this GMM needs a context of {self.context} columns; call model(c).")
            c = table_of(c, None if self.columns is None else self.columns[self.features :], "the context")
            c = as_tensor(c, name="the context", dtype=next(self.network.parameters()).dtype)
            if c.ndim == 0 or c.shape[-1] != self.context:
                raise ValueError(f"the context must have shape (*, {self.context}), got {tuple(c.shape)}.")
            flat = self.network(c).split([a * b for a, b in self.shapes.values()], -1)
            tensors = {n: t.unflatten(-1, s) for t, (n, s) in zip(flat, self.shapes.items(), strict=True)}
            tensors["logits"] = tensors["logits"].squeeze(-2)
        logits, means = tensors.pop("logits"), tensors.pop("means")
        raw = tensors["log_diagonal"]
        half: float | Tensor
        if isinstance(self.epsilon, Tensor):
            half = 0.5 * self.epsilon.to(raw).log()
        else:
            half = 0.5 * math.log(self.epsilon) if self.epsilon > 0 else -math.inf
        # log U' with 1 / U'² = 1 / U² + ε, by the softplus log(1 + ε U²) / 2.
        tensors["log_diagonal"] = raw - nn.functional.softplus(raw + half, beta=2)
        factor = self.kind.of(tensors, self.features)
        names = None if self.columns is None else self.columns[: self.features]
        return Mixture.from_valid(logits, means, factor).named(names)

    @torch.no_grad()
    def rescaled(self, shift: Tensor, scale: Tensor) -> GMM:
        """Return a copy for standardized columns: the conditional density of (x - m) / s given (c - m') / s'.

        Args:
            shift, scale: Shifts (m, m') and scales (s, s') of the columns of the points, then of the contexts (D + C,), data
                units. For spherical factors, all columns of the points need the same scale.
        """
        model, D = copy.deepcopy(self), self.features
        like = next(self.parameters())
        (m, mc), (s, sc) = ((t.double().to(like.device)[:D], t.double().to(like.device)[D:]) for t in (shift, scale))
        first, last = cast(nn.Linear, model.network[0]), cast(nn.Linear, model.network[-1])
        first.bias.copy_(first.bias.double() + first.weight.double() @ mc)
        first.weight.copy_(first.weight.double() * sc)
        change = {"logits": (None, None), "means": (1 / s, -m / s), **self.kind.rescaling(s)}

        def whole(given: Tensor | None, usual: float, shape: tuple[int, ...]) -> Tensor:
            return (s.new_full((1,), usual) if given is None else given).expand(shape).reshape(-1)

        factors, steps = (
            torch.cat([whole(change[name][place], usual, shape) for name, shape in self.shapes.items()])
            for place, usual in enumerate((1.0, 0.0))
        )
        last.weight.copy_(last.weight.double() * factors[:, None])
        last.bias.copy_(last.bias.double() * factors + steps)
        model.epsilon = self.epsilon / (s[:1] if self.kind.isotropic else s).square()
        return model

    carried = FormerName("rescaled")

    @torch.no_grad()
    def assign(self, mixture: Mixture) -> GMM:
        """Set the parameters in place so that calling the module returns this mixture, in the dtype of the module.

        In a conditional model, the weights of the last layer are set to zero and its biases to the parameters. The mixture
        then does not depend on the context until training continues.

        Args:
            mixture: A mixture with the same number of components and columns and the same covariance type, data units.

        Returns:
            The module itself.

        Raises:
            ValueError: The mixture has another number of components or columns, or another component family.
        """
        as_mixture(mixture)
        tensors = {"logits": mixture.logits.unsqueeze(-2), "means": mixture.means, **mixture.factor.tensors}
        given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if given != self.shapes or type(mixture.factor) is not self.kind:
            raise ValueError(f"the mixture must have parameters of shapes {self.shapes} as this GMM, got {given}.")
        used = (self.epsilon * (2 * tensors["log_diagonal"]).exp()).clamp(max=0.999)
        tensors["log_diagonal"] = tensors["log_diagonal"] - 0.5 * torch.log1p(-used)
        if self.context:
            last = cast(nn.Linear, self.network[-1])
            last.weight.zero_()
            last.bias.copy_(torch.cat([tensor.reshape(-1) for tensor in tensors.values()]))
        else:
            for name, tensor in tensors.items():
                getattr(self, name).copy_(tensor.reshape(getattr(self, name).shape))
        self.columns = None if self.context else mixture.columns
        return self

    @accepts(old={"weights": "sample_weight"}, also={"random_state": "generator"})
    def initialize(
        self,
        x: Any,
        strategy: str = "kmeans",
        *,
        context: Any = None,
        sample_weight: Any = None,
        generator: torch.Generator | int | None = None,
    ) -> GMM:
        """Set the parameters to an initial mixture that is computed from data; see :func:`gmmkeops.initialize`.

        Args:
            x: Points (N, D), N >= K, data units.
            strategy: ``"random"`` (K random points as centers), ``"kmeans"`` (one run of k-means),
                ``"kmeans++"`` (the best of ten runs), or another strategy of :func:`gmmkeops.initialize`, such as ``"auto"``.
            context: Contexts of the points (N, C). If given, the first layer of the network is initialized for their means and
                standard deviations; otherwise it is left unchanged, which suits standardized contexts.
            sample_weight: Weight of each point (N,), or None.
            generator: Random number generator, or a seed. None uses a fixed seed, so that results are reproducible.

        Returns:
            The module itself.

        Raises:
            TypeError, ValueError: Points are invalid, or the strategy is unknown; the parameters are then unchanged.
        """
        columns, others = table_names(x), table_names(context)
        x = as_tensor(x, name="x", device=next(self.parameters()).device)
        generator = as_generator(generator, x.device)
        if x.ndim == 2 and x.shape[1] != self.features:
            raise ValueError(f"x has {x.shape[1]} columns, expected {self.features} as in the model.")
        if context is not None:
            if not self.context:
                raise ValueError("this GMM has no context; construct it with context=C.")
            c = as_points(context, name="context", features=self.context).to(x.device)
        options: Any = {
            "covariance_type": self.kind.type_name(self.tied),
            "sample_weight": sample_weight,
            "generator": generator,
            "refine": _REFINE,
        }
        if isinstance(strategy, str) and strategy == "kmeans++":
            # As "kmeans" (k-means++ seeds, then Lloyd's algorithm), but the best of more runs.
            strategy, options["n_init"] = "kmeans", _RUNS
        # Imported here, because the fitting package imports this module.
        from gmmkeops.fitting import initialize

        self.assign(initialize(x, self.n_components, strategy, **options).named(columns))
        if context is not None:
            self.columns = None if columns is None or others is None else columns + others
            self._initialize_first_layer(c.double(), generator)
        return self

    @torch.no_grad()
    def _initialize_first_layer(self, c: Tensor, generator: torch.Generator) -> None:
        """Draw the first layer from torch's default distribution, combined with a standardization of the contexts c (N, C)."""
        first, mean, spread = cast(nn.Linear, self.network[0]), c.mean(0), c.std(0, correction=0)
        spread = torch.where(spread > 0, spread, torch.ones_like(spread))
        bound = self.context**-0.5
        weight = first.weight.double().uniform_(-bound, bound, generator=generator) / spread
        bias = first.bias.double().uniform_(-bound, bound, generator=generator)
        first.weight.copy_(weight)
        first.bias.copy_(bias - weight @ mean)

    def extra_repr(self) -> str:
        return (
            f"features={self.features}, context={self.context}, n_components={self.n_components}, "
            f"covariance_type={self.kind.family!r}, tied={self.tied}"
        )
