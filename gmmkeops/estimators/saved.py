"""Conversion of the parameters and fitted attributes of an estimator to JSON and tensors for files; pickle is never used."""

from __future__ import annotations

import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gmmkeops.components import Moments
from gmmkeops.fitting import Adam, Checkpoint, FitResult, Method, Report, StartReport
from gmmkeops.penalties import Penalty

__all__ = ["packed", "unpacked"]

_PLAIN = (bool, int, float, str, type(None))


def _known(extra: tuple[type, ...]) -> dict[str, type]:
    """Return the dataclasses whose instances can be written field by field, by name."""
    found: list[type] = [Checkpoint, Moments, Report, StartReport, type(Adam().optimizer), *extra]
    waiting: list[type] = [Method, Penalty]
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        found.append(cls)
    return {cls.__name__: cls for cls in found if is_dataclass(cls) and cls.__module__.startswith("gmmkeops.")}


def packed(value: Any, tensors: list[Tensor], name: str, classes: tuple[type, ...] = ()) -> Any:
    """Convert a value to JSON, in which tensors are represented by their index in a list.

    Args:
        value: A number, string, array, tensor, dtype, device, method or penalty, or a container of these.
        tensors: The list, to which the tensors of the value are appended.
        name: Name of the value in messages.
        classes: Further dataclasses that are allowed.

    Raises:
        ValueError: The value has another type.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        tensors.append(value.detach())
        return {"tensor": len(tensors) - 1}
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        tensors.append(torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="))))
        return {"array": len(tensors) - 1}
    if isinstance(value, np.ndarray) and value.ndim == 1 and all(isinstance(item, str) for item in value):
        return {"names": [str(item) for item in value]}
    if isinstance(value, list):
        return [packed(item, tensors, name, classes) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [packed(item, tensors, name, classes) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[packed(part, tensors, name, classes) for part in item] for item in value.items()]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return {"numpy": np.dtype(value).name}
    if isinstance(value, os.PathLike):
        return {"path": os.fspath(value)}
    if isinstance(value, FitResult):
        parts = {
            field.name: getattr(value, field.name) for field in fields(value) if field.name not in ("mixture", "answer")
        }
        return {"FitResult": packed(parts, tensors, name, classes)}
    if is_dataclass(value) and type(value) is _known(classes).get(type(value).__name__):
        return {
            type(value).__name__: [packed(getattr(value, part.name), tensors, name, classes) for part in fields(value)]
        }
    raise ValueError(
        f"save cannot write {name}, which contains a {type(value).__name__}; change it with set_params, or save only the "
        "mixture with gmmkeops.save(model.mixture_, path)."
    )


def unpacked(plain: Any, tensors: dict[int, Tensor], mixture: Any, classes: tuple[type, ...] = ()) -> Any:
    """Convert JSON written by :func:`packed` back to the value.

    Args:
        plain: The JSON.
        tensors: The tensors by index.
        mixture: The mixture that is inserted into results.
        classes: Further dataclasses that are allowed.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, IndexError: The JSON was not written by :func:`packed`.
    """
    if isinstance(plain, _PLAIN):
        return plain
    if isinstance(plain, list):
        return [unpacked(item, tensors, mixture, classes) for item in plain]
    ((kind, content),) = plain.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].cpu().numpy()
    if kind == "names":
        return np.array(content, dtype=object)
    if kind == "dtype":
        return getattr(torch, content)
    if kind == "device":
        return torch.device(content)
    if kind == "numpy":
        return np.dtype(content)
    if kind == "path":
        return Path(content)
    if kind == "tuple":
        return tuple(unpacked(content, tensors, mixture, classes))
    if kind == "dict":
        return {unpacked(a, tensors, mixture, classes): unpacked(b, tensors, mixture, classes) for a, b in content}
    if kind == "FitResult":
        return FitResult(mixture=mixture, **unpacked(content, tensors, mixture, classes))
    return _known(classes)[kind](*unpacked(content, tensors, mixture, classes))
