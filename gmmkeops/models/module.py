r"""A mixture's trainable parameters: an ``nn.Module`` that returns a :class:`~gmmkeops.Mixture` when called.

With a context c the parameters come out of a multilayer perceptron, :math:`p(x \mid c) = \sum_k W_k(c)\,
\mathcal N(x; \mu_k(c), \Sigma_k(c))`. References: Bishop 1994, *Mixture density networks*; the interface is that of
Zuko's ``GMM`` (probabilists/zuko).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from gmmkeops._checks import as_integer, as_number
from gmmkeops.components import as_tensor, factor_class
from gmmkeops.data import as_generator, as_points, table_names, table_of
from gmmkeops.models.mixture import Mixture, as_mixture

__all__ = ["GMM"]

# Steps of soft clusters after the hard ones: their density is then no lower than that of k-means.
_REFINE = 1

# Runs of k-means++.
_RUNS = 10


class GMM(nn.Module):
    r"""A trainable Gaussian mixture, unconditional or conditioned on a context.

    As in all modules of torch, the first parameters are drawn by torch's global generator; :meth:`initialize` replaces them.
    ``torch.compile(model, fullgraph=True)`` and ``torch.export.export(model, (c,))`` return mixtures, as the module does.

    Args:
        features: D, the number of columns of a point.
        context: C, the number of columns of a context; 0 for none.
        components: Number of components K.
        covariance_type: ``"full"``, ``"diagonal"`` (or ``"diag"``) or ``"spherical"``; ``"tied_..."`` sets ``tied`` too.
        tied: Whether all components share one covariance.
        epsilon: Least conditional variance of a coordinate given those after it, squared data units: added to
            :math:`1/U_{dd}^2`, so for diagonal and spherical factors to the variance itself.
        hidden_features: Widths of the perceptron's hidden layers, with a context.
        activation: Their activation's constructor.

    Attributes:
        logits: Parameters (K,), without a context.
        means: Parameters (K, D), without a context.
        log_diagonal: Parameters (K or 1, D or 1), without a context.
        upper: Parameters (K or 1, D(D-1)/2) of full factors, without a context.
        network: The perceptron, with one.
        columns: Names of the D columns of the points and of the C columns of the contexts, where the data that the model
            was initialized with or fitted to had names; else None. They are not part of the state dict.

    Raises:
        ValueError: A size below one, or an unknown covariance type.

    Reference:
        With a context: Bishop 1994, *Mixture density networks*, Aston University.

    Example:
        >>> import torch, gmmkeops as gk
        >>> model = gk.GMM(2, components=3)
        >>> model.initialize(torch.randn(100, 2), "kmeans++")
        GMM(features=2, context=0, components=3, covariance_type='full', tied=False)
        >>> loss = -model().log_prob(torch.randn(100, 2)).mean()
        >>> loss.backward()
        >>> model.means.grad.shape
        torch.Size([3, 2])
    """

    columns: tuple[str, ...] | None = None

    def __init__(
        self,
        features: int,
        context: int = 0,
        components: int = 2,
        covariance_type: str = "full",
        tied: bool = False,
        epsilon: float = 1e-6,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        for name, value, least in (("features", features, 1), ("context", context, 0), ("components", components, 1)):
            as_integer(value, name, least)
        epsilon = as_number(epsilon, "epsilon", 0)
        if isinstance(hidden_features, (str, bytes)) or not isinstance(hidden_features, Iterable):
            raise TypeError(f"hidden_features must be a list of integers, got {hidden_features!r}.")
        hidden_features = [as_integer(width, "each of hidden_features", 1) for width in hidden_features]
        if not callable(activation):
            raise TypeError(f"activation must be a constructor such as torch.nn.ReLU, got {type(activation).__name__}.")
        self.kind, tied_name = factor_class(covariance_type)
        self.features, self.context, self.components = int(features), int(context), int(components)
        self.tied = bool(tied or tied_name)
        self.epsilon: float | Tensor = float(epsilon)
        leading, D = 1 if self.tied else self.components, self.features
        self.shapes: dict[str, tuple[int, ...]] = {
            "logits": (1, self.components),
            "means": (self.components, D),
            **self.kind.shapes(leading, D),
        }
        if self.context:
            widths = [self.context, *hidden_features]
            layers: list[nn.Module] = []
            for a, b in pairwise(widths):
                layers += [nn.Linear(a, b), activation()]
            self.network = nn.Sequential(*layers, nn.Linear(widths[-1], sum(a * b for a, b in self.shapes.values())))
        else:
            self.logits = nn.Parameter(torch.zeros(self.components))
            self.means = nn.Parameter(torch.randn(self.components, D))
            for name, shape in self.kind.shapes(leading, D).items():
                setattr(self, name, nn.Parameter(torch.zeros(shape)))

    def forward(self, c: Any = None) -> Mixture:
        """The mixture, or the batch of mixtures that belongs to contexts c (*B, C).

        Raises:
            ValueError: A context is missing, not expected, or of the wrong width.
        """
        if not self.context:
            if c is not None:
                raise ValueError("this GMM was made without a context; call model() or construct it with context=C.")
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
        epsilon = torch.as_tensor(self.epsilon, dtype=raw.dtype, device=raw.device)
        tensors["log_diagonal"] = raw - 0.5 * nn.functional.softplus(epsilon.log() + 2 * raw)
        factor = self.kind.of(tensors, self.features)
        names = None if self.columns is None else self.columns[: self.features]
        return Mixture._unchecked(logits, means, factor).named(names)

    @torch.no_grad()
    def carried(self, shift: Tensor, scale: Tensor) -> GMM:
        """The same conditional density of scaled points and contexts: a copy for (x - m) / s given (c - m') / s'.

        Args:
            shift, scale: m and s of the points' columns, then those of the contexts' (D + C,), data units; the scales of
                points alike in all columns for a spherical factor.
        """
        model, D = copy.deepcopy(self), self.features
        like = next(self.parameters())
        (m, mc), (s, sc) = ((t.double().to(like.device)[:D], t.double().to(like.device)[D:]) for t in (shift, scale))
        first, last = cast(nn.Linear, model.network[0]), cast(nn.Linear, model.network[-1])
        first.bias.copy_(first.bias.double() + first.weight.double() @ mc)
        first.weight.copy_(first.weight.double() * sc)
        change = {"logits": (s.new_ones(1), s.new_zeros(1)), "means": (1 / s, -m / s), **self.kind.rescaling(s)}
        factors, steps = (
            torch.cat([change[name][place].expand(shape).reshape(-1) for name, shape in self.shapes.items()])
            for place in (0, 1)
        )
        last.weight.copy_(last.weight.double() * factors[:, None])
        last.bias.copy_(last.bias.double() * factors + steps)
        model.epsilon = self.epsilon / (s[:1] if self.kind.isotropic else s).square()
        return model

    @torch.no_grad()
    def assign(self, mixture: Mixture) -> GMM:
        """Sets the parameters in place so that calling the module returns this mixture (in the module's dtype).

        With a context, the last layer's weights become zero and its biases the parameters, so that every context starts at
        this mixture; the first step of an optimiser makes them differ.

        Raises:
            ValueError: The mixture has another number of components, features, or another factor.
        """
        as_mixture(mixture)
        shapes = {"logits": mixture.logits.unsqueeze(-2), "means": mixture.means, **mixture.factor.tensors}
        given = {name: tuple(tensor.shape) for name, tensor in shapes.items()}
        if given != self.shapes or type(mixture.factor) is not self.kind:
            raise ValueError(f"the mixture's parameters have shapes {given}, this GMM's {self.shapes}.")
        used = (self.epsilon * (2 * shapes["log_diagonal"]).exp()).clamp(max=0.999)
        shapes["log_diagonal"] = shapes["log_diagonal"] - 0.5 * torch.log1p(-used)
        if self.context:
            last = cast(nn.Linear, self.network[-1])
            last.weight.zero_()
            last.bias.copy_(torch.cat([tensor.reshape(-1) for tensor in shapes.values()]))
        else:
            for name, tensor in shapes.items():
                getattr(self, name).copy_(tensor.reshape(getattr(self, name).shape))
        self.columns = None if self.context else mixture.columns
        return self

    def initialize(
        self,
        x: Any,
        strategy: str = "kmeans",
        *,
        context: Any = None,
        weights: Any = None,
        generator: torch.Generator | None = None,
    ) -> GMM:
        """Sets the parameters to the clusters of a cloud, shared softly; see :func:`gmmkeops.initialize`.

        Args:
            x: Points (N, D), N >= K, data units.
            strategy: ``"random"`` (K points as centres), ``"kmeans"`` (the best of three runs) or ``"kmeans++"`` (the best of
                ten).
            context: The points' contexts (N, C), so that the network's first layer is drawn anew for values such as these;
                if left out it stays as it is, which suits contexts near zero of size one.
            weights: Weight of each point (N,), or None.
            generator: Random number generator. Without one a fixed seed is used, so that the same call gives the same
                parameters in every process.

        Returns:
            The module itself.

        Raises:
            TypeError, ValueError: Bad points, or an unknown strategy; the parameters are then as they were.
        """
        columns, others = table_names(x), table_names(context)
        x = as_tensor(x, name="x", device=next(self.parameters()).device)
        generator = as_generator(generator, x.device)
        if x.ndim == 2 and x.shape[1] != self.features:
            raise ValueError(f"x has {x.shape[1]} columns, expected {self.features} as in the model.")
        if context is not None:
            if not self.context:
                raise ValueError("this GMM was made without a context; construct it with context=C.")
            c = as_points(context, name="context", features=self.context).to(x.device)
        options: Any = {
            "covariance_type": self.kind.type_name(self.tied),
            "weights": weights,
            "generator": generator,
            "refine": _REFINE,
        }
        if isinstance(strategy, str) and strategy == "kmeans++":
            # The algorithm of that name: seeds far apart, then Lloyd's iterations; here the best of more runs than "kmeans".
            strategy, options["runs"] = "kmeans", _RUNS
        # Initialization runs EM, in a folder above this one.
        from gmmkeops.fitting import initialize

        self.assign(initialize(x, self.components, strategy, **options).named(columns))
        if context is not None:
            self.columns = None if columns is None or others is None else columns + others
            self._suit(c.double(), generator)
        return self

    @torch.no_grad()
    def _suit(self, c: Tensor, generator: torch.Generator) -> None:
        """Draws the first layer, as torch would, for contexts that are standardised inside it."""
        first, mean, spread = cast(nn.Linear, self.network[0]), c.mean(0), c.std(0, correction=0)
        spread = torch.where(spread > 0, spread, torch.ones_like(spread))
        bound = self.context**-0.5
        weight = first.weight.double().uniform_(-bound, bound, generator=generator) / spread
        bias = first.bias.double().uniform_(-bound, bound, generator=generator)
        first.weight.copy_(weight)
        first.bias.copy_(bias - weight @ mean)

    def extra_repr(self) -> str:
        return (
            f"features={self.features}, context={self.context}, components={self.components}, "
            f"covariance_type={self.kind.family!r}, tied={self.tied}"
        )
