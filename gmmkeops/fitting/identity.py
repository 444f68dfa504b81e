"""Text descriptions of values, which are compared with those in a checkpoint or in another process.

Two values with equal descriptions give the same fit. Functions are described by their code, defaults and variables; tensors by
dtype, shape and bytes; other values by type and contents. Descriptions do not depend on the process (addresses, ``hash``).
"""

from __future__ import annotations

import collections
import dis
import enum
import functools
import hashlib
import io
import logging
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor, nn

from gmmkeops.components import Factor
from gmmkeops.models import Mixture

__all__ = ["describe", "facts_of", "marks"]

# Maximum length of a description; longer ones are shortened, with a hash of the full text at the end.
_LONGEST = 160

# Flags of C types (Py_TPFLAGS_HEAPTYPE and Py_TPFLAGS_DISALLOW_INSTANTIATION in Include/object.h).
_HEAP_TYPE, _NOT_MADE_BY_CALLS = 1 << 9, 1 << 7

# Methods that ``dataclass`` generates; they are determined by the fields.
_OF_DATACLASS = {f"__{name}__" for name in ("init", "repr", "eq", "lt", "le", "gt", "ge", "hash", "setattr", "delattr")}

_OF_DATACLASS |= {"__replace__", "__getstate__", "__setstate__"}

# Arrays with at most this number of entries are described by their entries.
_FEW = 8

_PACKAGE = Path(__file__).resolve().parents[1]

_CONTAINERS: tuple[Any, ...] = (dict, list, tuple, set, frozenset, str, bytes, int, float, complex)


def describe(value: Any, name: str = "the value") -> str:
    """Describe a value by a readable text that can be compared between processes.

    Args:
        value: Numbers, strings, tensors, arrays, containers, dataclasses, functions, partial functions, bound methods, modules,
            classes, and instances of classes that are written in Python.
        name: Name of the argument, for error messages.

    Raises:
        ValueError: A part of the value cannot be described, such as an open file or an iterator.
    """
    return _short(_Description(name).of(value))


def facts_of(value: Any, name: str, skip: tuple[str, ...] = ()) -> dict[str, str]:
    """Describe the class of an instance, and each field of a dataclass or each attribute of another instance.

    Args:
        value: The instance.
        name: Name of the argument, for error messages.
        skip: Fields to omit.

    Raises:
        ValueError: As :func:`describe`.
    """
    description = _Description(name)
    parts = {key: _short(description.of(part)) for key, part in _attributes(value).items() if key not in skip}
    return {"class": _short(description.of(type(value))), **parts}


def marks(parts: list[Tensor], shift: Tensor, scale: Tensor, *, single: bool = False) -> list[float]:
    """Compute a fingerprint of parameters that tolerates rounding errors: four linear projections, and their tolerance.

    With an exact hash, an initial mixture that was computed with another number of threads or processes would be rejected.

    Args:
        parts: Tensors of parameters, standardized coordinates.
        shift, scale: Center and scale (D,) of the standardized coordinates, data units.
        single: Whether the parameters may have been rounded to float32, in data units.
    """
    values = torch.cat([part.detach().reshape(-1).double().cpu() for part in parts])
    place = torch.arange(1, len(values) + 1, dtype=torch.float64)
    found = [float(values @ (2 * (place * prime**0.5).frac() - 1)) for prime in (2, 3, 5, 7)]
    far = float((shift.abs() / scale).max())
    norm, rounding = max(1.0, float(values.norm())), far * len(values) ** 0.5
    # A relative error of 1e-9, and a few rounding errors of coordinates that are far from the origin.
    tolerance = 1e-9 * norm + 1e-15 * rounding + (1e-6 * (norm + rounding) if single else 0)
    return [*found, tolerance]


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… #{_digest(text.encode())}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _attributes(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass, or the attributes of another instance without its cached properties."""
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    found: dict[str, Any] = {}
    for cls in reversed(type(value).__mro__):
        slots = vars(cls).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if slot not in ("__dict__", "__weakref__") and hasattr(value, slot):
                found[slot] = getattr(value, slot)
    cached = {
        key for cls in type(value).__mro__ for key, x in vars(cls).items() if isinstance(x, functools.cached_property)
    }
    return found | {key: x for key, x in getattr(value, "__dict__", {}).items() if key not in cached}


@functools.cache
def _libraries() -> tuple[Path, ...]:
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    found = {Path(path).resolve() for name in names if (path := sysconfig.get_path(name))}
    return (*found, Path(torch.__file__).resolve().parents[1], Path(np.__file__).resolve().parents[1], _PACKAGE)


@functools.cache
def _of_library(module: str) -> bool:
    """Return whether a module belongs to Python, to this package or to an installed one; its functions are named only."""
    found = sys.modules.get(module)
    if found is None or module == "__main__":
        return False
    file = getattr(found, "__file__", None)
    if file is None:
        return module.split(".")[0] in sys.stdlib_module_names
    path = Path(file).resolve()
    return any(path.is_relative_to(folder) for folder in _libraries())


def _public(value: Any) -> str | None:
    """Return the qualified name of a function or class of a library, if the name refers to this object, otherwise None."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or not _of_library(module):
        return None
    found: Any = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not value:
        return None
    # Modules of this package may be renamed.
    return name if module.split(".")[0] == __name__.split(".")[0] else f"{module}.{name}"


class _Description:
    """Recursive description of one value, with the path to the current part and a cache of functions and classes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path: list[str] = []
        self.inside: list[Any] = []
        self.known: dict[int, tuple[Any, str]] = {}

    def of(self, value: Any, step: str = "") -> str:
        """Describe a part of the value; ``step`` is the text that its path gets, such as ``[0]`` or ``.name``."""
        for depth, outer in enumerate(self.inside):
            if outer is value:
                return f"<the value at depth {depth}>"
        if id(value) in self.known:
            return self.known[id(value)][1]
        self.path.append(step)
        self.inside.append(value)
        try:
            text = self._plain(value) or self._called(value) or self._instance(value)
            if isinstance(value, (types.FunctionType, type)):
                # Functions and classes may be used repeatedly. A reference is kept, so that their ``id`` is not reused.
                self.known[id(value)] = value, text
            return text
        finally:
            self.path.pop()
            self.inside.pop()

    def _refused(self, value: Any) -> ValueError:
        where = "".join(self.path)
        return ValueError(
            f"{self.name}{where} is a {type(value).__name__}, which cannot be compared between processes, as checkpoints and "
            "several ranks require; use numbers, tensors, dataclasses and functions of these, or do not pass checkpoint."
        )

    def _plain(self, value: Any) -> str:
        """Describe a number, string, tensor or container; return an empty string for other values."""
        if value is None or value is Ellipsis or value is NotImplemented or type(value) in (bool, complex):
            return repr(value)
        if type(value) in (str, bytes):
            text = repr(value)
            return text if len(text) <= _LONGEST else f"{text[:20]}… #{_digest(text.encode())}"
        if type(value) in (int, float):
            # As settings, 20 and 20.0 are equal.
            return repr(int(value)) if isinstance(value, int) or value.is_integer() else repr(value)
        if isinstance(value, enum.Enum):
            return f"{type(value).__name__}.{value.name}"
        if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.Size, np.dtype, range, slice)):
            return str(value)
        if isinstance(value, np.generic) and value.dtype.kind in "biufcSU":
            return self._plain(value.item())
        if isinstance(value, (Tensor, np.ndarray)):
            return self._array(value)
        if isinstance(value, (torch.Generator, np.random.Generator, np.random.RandomState)):
            state = value.get_state() if isinstance(value, torch.Generator) else _numpy_state(value)
            return f"{type(value).__name__}({self.of(state)})"
        if type(value) in (list, tuple, collections.deque):
            return f"[{', '.join(self.of(item, f'[{i}]') for i, item in enumerate(value))}]"
        if type(value) in (set, frozenset):
            return f"{{{', '.join(sorted(self.of(item) for item in value))}}}"
        if isinstance(value, (dict, types.MappingProxyType)) and type(value).__module__ in ("builtins", "collections"):
            pairs = [f"{self.of(key)}: {self.of(item, f'[{key!r}]')}" for key, item in value.items()]
            return f"{{{', '.join(sorted(pairs))}}}"
        return ""

    def _array(self, value: Any) -> str:
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_quantized or value.is_meta:
                raise self._refused(value)
            array = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
            shape, kind = tuple(array.shape), str(array.dtype).removeprefix("torch.")
            data = array.reshape(-1).view(torch.uint8).numpy().tobytes() if array.numel() else b""
            few = array.tolist() if array.numel() <= _FEW else None
        else:
            if value.dtype.hasobject:
                return f"array({self.of(value.tolist())})"
            shape, kind, data = value.shape, value.dtype.name, np.ascontiguousarray(value).tobytes()
            few = value.tolist() if value.size <= _FEW else None
        text = f"shape {list(shape)} #{_digest(repr((kind, shape)).encode() + data)}" if few is None else repr(few)
        return f"{kind} {text}"

    def _called(self, value: Any) -> str:
        """Describe a function, class or module; return an empty string for other values."""
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}"
        if isinstance(value, functools.partial):
            parts = [
                self.of(value.func, ".func"),
                self.of(list(value.args), ".args"),
                self.of(value.keywords, ".keywords"),
            ]
            return f"partial({', '.join(parts)})"
        if isinstance(value, types.MethodType):
            return f"method {self.of(value.__func__)} of {self.of(value.__self__, '.__self__')}"
        if isinstance(value, (staticmethod, classmethod)):
            return f"{type(value).__name__} {self.of(value.__func__)}"
        if isinstance(value, property):
            return f"property({', '.join(self.of(part) for part in (value.fget, value.fset, value.fdel))})"
        if isinstance(value, functools.cached_property):
            return f"cached_property({self.of(value.func)})"
        if isinstance(value, functools._lru_cache_wrapper):
            return f"cached {self.of(value.__wrapped__)}"
        if isinstance(value, logging.Logger):
            return f"logger {value.name}"
        if isinstance(value, (types.FunctionType, type)) and (name := _public(value)) is not None:
            return name
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.CodeType):
            return f"code #{_digest(self._code(value).encode())}"
        if isinstance(
            value, (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, np.ufunc)
        ):
            owner = getattr(value, "__self__", None)
            of = (
                ""
                if owner is None or isinstance(owner, (types.ModuleType, type))
                else f" of {self.of(owner, '.__self__')}"
            )
            return f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', value.__name__)}{of}"
        return ""

    def _code(self, code: types.CodeType) -> str:
        """Return all parts of a code object that determine its behavior, without file name and line numbers."""
        numbers = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        table = getattr(code, "co_exceptiontable", b"")
        return f"{numbers} {names} {code.co_code.hex()} {table.hex()} {self._constants(code.co_consts)}"

    def _constants(self, value: Any) -> str:
        """Describe constants of code with their types, since code with 2 and code with 2.0 differ."""
        if isinstance(value, types.CodeType):
            return f"<{self._code(value)}>"
        if isinstance(value, tuple):
            return f"({', '.join(map(self._constants, value))})"
        if isinstance(value, frozenset):
            return f"{{{', '.join(sorted(map(self._constants, value)))}}}"
        return f"{type(value).__name__} {value!r}"

    def _function(self, function: types.FunctionType) -> str:
        parts = []
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                parts.append(f"{name}={self.of(cell.cell_contents, f' whose variable {name}')}")
            except ValueError as error:
                if "empty" not in str(error):
                    raise
                parts.append(f"{name} unset")
        for name, used in [] if _of_library(function.__module__) else _globals_read(function.__code__):
            if name not in function.__globals__:
                continue
            value = function.__globals__[name]
            parts.append(f"{name}={self.of(value, f' whose variable {name}')}")
            if isinstance(value, types.ModuleType) and not _of_library(value.__name__):
                own = vars(value)
                parts += [f"{name}.{x}={self.of(own[x], f' whose variable {name}.{x}')}" for x in used if x in own]
        for what in ("__defaults__", "__kwdefaults__", "__dict__"):
            if content := getattr(function, what):
                parts.append(f"{what}={self.of(content, f' whose {what}')}")
        digest = _digest(self._code(function.__code__).encode())
        return f"{function.__name__} (code {digest[:8]}{''.join(f', {part}' for part in parts)})"

    def _class(self, cls: type) -> str:
        """Describe a class that does not belong to a library, by its bases and its own attributes."""
        plain = {
            "__module__",
            "__qualname__",
            "__dict__",
            "__weakref__",
            "__doc__",
            "__firstlineno__",
            "__static_attributes__",
        }
        plain |= {"__annotations__", "__annotate_func__", "__annotations_cache__", "__abstractmethods__", "_abc_impl"}
        plain |= {"__dataclass_fields__", "__dataclass_params__", "__match_args__", "__parameters__", "__orig_bases__"}
        parts = [self.of(base) for base in cls.__bases__ if base is not object]
        for name, value in sorted(vars(cls).items()):
            descriptor = isinstance(value, (types.MemberDescriptorType, types.GetSetDescriptorType))
            if name in plain or descriptor or (is_dataclass(cls) and name in _OF_DATACLASS):
                continue
            parts.append(f"{name}={self.of(value, f'.{name}')}")
        return f"{cls.__name__} (class #{_digest('; '.join(parts).encode())})"

    def _instance(self, value: Any) -> str:
        cls = type(value)
        if isinstance(value, Mixture):
            tensors = {"logits": value.logits, "means": value.means, **value.factor.tensors}
            return f"Mixture({value.factor.family}, {self.of(tensors)})"
        if isinstance(value, Factor):
            return f"{cls.__name__}({value.features}, {self.of(value.tensors)})"
        if isinstance(value, nn.Module):
            own = {**value._parameters, **value._buffers, **value._modules}
            plain = set(vars(nn.Module()))
            own |= {name: part for name, part in vars(value).items() if name not in plain} | {
                "training": value.training
            }
            return f"{self.of(cls)}({self._named(own)})"
        kept = hasattr(value, "__dict__") or any("__slots__" in vars(base) for base in cls.__mro__)
        if not kept or isinstance(value, (Iterator, io.IOBase)) or not _made_in_python(cls):
            raise self._refused(value)
        parts = self._named(_attributes(value))
        for kind in _CONTAINERS:
            if isinstance(value, kind):
                parts = f"{self.of(kind(value))}, {parts}"
                break
        return f"{self.of(cls)}({parts})"

    def _named(self, parts: Mapping[str, Any]) -> str:
        return ", ".join(f"{name}={self.of(part, f'.{name}')}" for name, part in parts.items())


def _made_in_python(cls: type) -> bool:
    """Return whether the state of instances consists of Python attributes and of the contents of a built-in container."""
    return all(base is object or base in _CONTAINERS or base is Generic or not _in_c(base) for base in cls.__mro__)


def _in_c(cls: type) -> bool:
    """Return whether a class is implemented in C (as :mod:`copyreg` tests), so that instances may have hidden state."""
    new = vars(cls).get("__new__")
    static = not cls.__flags__ & _HEAP_TYPE or bool(cls.__flags__ & _NOT_MADE_BY_CALLS)
    return static or (isinstance(new, types.BuiltinMethodType) and new.__self__ is cls)


def _numpy_state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state(legacy=False)


def _globals_read(code: types.CodeType) -> list[tuple[str, tuple[str, ...]]]:
    """List the global variables that code and its inner functions read, each with the attribute names in the code."""
    found: dict[str, tuple[str, ...]] = {}
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            found[str(instruction.argval)] = code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            found |= {name: (*found.get(name, ()), *used) for name, used in _globals_read(inner)}
    return sorted(found.items())
