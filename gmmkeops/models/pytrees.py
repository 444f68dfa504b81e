"""Registration of mixtures and factors as pytrees (containers of tensors), for ``torch.export`` and ``torch.func``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributions import Distribution
from torch.utils._pytree import register_pytree_node

from gmmkeops.components import Factor, families
from gmmkeops.models.mixture import Mixture

__all__: list[str] = []


def _mixture_parts(mixture: Mixture) -> tuple[list[Any], list[Any]]:
    """Return the tensors of a mixture, and its constants."""
    return [mixture.logits, mixture.means, mixture.factor], [mixture.columns, vars(mixture).get("_validate_args")]


def _mixture(parts: Iterable[Any], constants: list[Any]) -> Mixture:
    """Create a mixture from its parts without checks, because torch also passes placeholders in place of tensors."""
    mixture, (columns, validate_args) = object.__new__(Mixture), constants
    mixture.logits, mixture.means, mixture.factor = parts
    shape = getattr(mixture.means, "shape", torch.Size())
    Distribution.__init__(mixture, shape[:-2], shape[-1:], validate_args)
    mixture.columns = None if columns is None else tuple(columns)
    return mixture


def _factor_parts(factor: Factor) -> tuple[list[Any], list[Any]]:
    """Return the tensors of a factor, and its constants."""
    return list(factor.tensors.values()), [list(factor.tensors), factor.features]


def _factor_of(kind: type[Factor]) -> Callable[[Iterable[Any], list[Any]], Factor]:
    """Return a function that creates a factor of a family from its parts, without checks."""

    def factor(parts: Iterable[Any], constants: list[Any]) -> Factor:
        made, (names, features) = object.__new__(kind), constants
        vars(made).update(zip(names, parts, strict=True), features=features)
        return made

    return factor


register_pytree_node(Mixture, _mixture_parts, _mixture, serialized_type_name="gmmkeops.Mixture")

for _kind in families().values():
    register_pytree_node(_kind, _factor_parts, _factor_of(_kind), serialized_type_name=f"gmmkeops.{_kind.__name__}")
