"""Serialization of the state of a fit: nested plain values, tensors, mixtures and registered dataclasses, as safetensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from gmmkeops.components import Moments, families
from gmmkeops.models import Mixture

__all__ = ["FORMAT", "known", "state_bytes", "state_of"]

FORMAT, _VERSION = "gmmkeops.checkpoint", 3

# Registered dataclasses by name.
_CLASSES: dict[str, type] = {}


def known(name: str) -> Callable[[type], type]:
    """Return a class decorator that registers a dataclass for checkpoints under a name."""

    def mark(cls: type) -> type:
        _CLASSES[name] = cls
        return cls

    return mark


known("Moments")(Moments)


def state_bytes(tree: Any) -> bytes:
    """Serialize a state as a safetensors file, with its structure as JSON and a SHA-256 digest in the header."""
    from safetensors.torch import save as serialize

    tensors: list[Tensor] = []
    header = json.dumps(_plain(tree, tensors))
    named = {f"t{i}": tensor.detach().cpu().contiguous().clone() for i, tensor in enumerate(tensors)}
    meta = {"format": FORMAT, "version": str(_VERSION), "tree": header, "digest": _digest(header, named)}
    return serialize(named or {"none": torch.zeros(0)}, meta)


def _digest(header: str, tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        found.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes() if tensors[name].numel() else b"")
    return found.hexdigest()


def state_of(data: bytes, device: Any) -> Any:
    """Deserialize the result of :func:`state_bytes`. Only plain values and registered classes are created.

    Raises:
        ValueError: The data are damaged, or were written by another version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        size = int.from_bytes(data[:8], "little")
        meta = json.loads(data[8 : 8 + size])["__metadata__"]
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"it is not a complete safetensors file: {error}") from None
    if meta.get("format") != FORMAT:
        raise ValueError("it is not a checkpoint")
    if meta.get("version") != str(_VERSION):
        raise ValueError("it was written by another version of gmmkeops")
    tensors.pop("none", None)
    if _digest(meta["tree"], tensors) != meta["digest"]:
        raise ValueError("its digest does not match its contents")
    return _value(json.loads(meta["tree"]), tensors, device)


def _plain(value: Any, tensors: list[Tensor]) -> Any:
    """Convert a value to JSON types; tensors are appended to ``tensors`` and replaced by their index."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_plain(item, tensors) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_plain(key, tensors), _plain(item, tensors)] for key, item in value.items()]}
    if isinstance(value, Mixture):
        name, features = value.factor.family, value.n_features
        parts = {"logits": value.logits, "means": value.means, **value.factor.tensors}
        return {"Mixture": [name, features, _plain(parts, tensors)]}
    for name, cls in _CLASSES.items():
        if type(value) is cls and is_dataclass(value):
            return {name: [_plain(getattr(value, field.name), tensors) for field in fields(value)]}
    raise TypeError(
        f"a checkpoint cannot store a {type(value).__name__}; register its class with gmmkeops.fitting.known."
    )


def _value(plain: Any, tensors: dict[str, Tensor], device: Any) -> Any:
    if not isinstance(plain, dict):
        return plain
    (name, content), *more = plain.items()
    if more:
        raise ValueError("its structure is malformed")
    if name == "tensor":
        return tensors[f"t{int(content)}"].to(device)
    if name == "Mixture":
        name, features, parts = content
        parts = _value(parts, tensors, device)
        logits, means = parts.pop("logits"), parts.pop("means")
        factor = families()[name].of(parts, features)
        return Mixture(logits, means, factor, validate_args=False)
    if name == "dict":
        return {_value(key, tensors, device): _value(item, tensors, device) for key, item in content}
    items = [_value(item, tensors, device) for item in content]
    if name in ("list", "tuple"):
        return items if name == "list" else tuple(items)
    if name in _CLASSES:
        return _CLASSES[name](*items)
    raise ValueError(f"it contains an unknown class {name!r}")
