"""A device that does not exist: tensors that claim to be on ``cuda:0`` and hold their values on the CPU.

Code that runs on them fails where it would fail on CUDA: where tensors of two devices meet, where a generator belongs to another
device, where a device tensor is read as a numpy array, and, under ``torch.use_deterministic_algorithms(True)``, where CUDA has no
deterministic implementation. Kernels, host synchronizations and copies between host and device are counted by source line.

The values are right, but nothing about speed or memory follows from them. Only one fake device may be active at a time.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import gmmkeops
from gmmkeops.components import arrays, full
from gmmkeops.reductions.triton.packing import symmetric_places

CUDA = torch.device("cuda", 0)
_PACKAGE = os.path.dirname(gmmkeops.__file__) + os.sep
_Generator = torch.Generator

# Operations that launch no kernel: they only describe the same memory anew.
_VIEWS = {
    *("view", "_unsafe_view", "_reshape_alias", "as_strided", "alias", "detach", "lift_fresh", "view_as_real"),
    *("t", "transpose", "permute", "movedim", "expand", "squeeze", "unsqueeze", "diagonal", "unfold"),
    *("slice", "select", "split", "split_with_sizes", "unbind"),
    # Memory that is reserved, but not written.
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "record_stream"),
}
# Operations whose result has a shape that only the device knows, or whose result is a Python value.
_WAITING = {
    *("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "bincount"),
    *("unique_dim", "_unique2", "unique_consecutive"),
}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# Operations in which even a number on the CPU (a tensor without dimensions) is refused.
_STRICT = {
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "cat",
    "index_select",
    "scatter",
    "scatter_",
    "gather",
    "index_add",
    "index_add_",
}


@dataclass
class Counts:
    """What has happened on the device, by ``(what, source line)``."""

    kernels: Counter = field(default_factory=Counter)
    synchronizations: Counter = field(default_factory=Counter)
    uploads: Counter = field(default_factory=Counter)

    def clear(self) -> None:
        for counter in (self.kernels, self.synchronizations, self.uploads):
            counter.clear()

    @property
    def totals(self) -> dict[str, int]:
        return {name: sum(getattr(self, name).values()) for name in ("kernels", "synchronizations", "uploads")}

    def report(self, most: int = 12) -> str:
        """The most frequent source lines of each counter, one a line."""
        lines = []
        for name, total in self.totals.items():
            lines.append(f"{name}: {total}")
            lines += [f"  {n:5d}  {what} at {where}" for (what, where), n in getattr(self, name).most_common(most)]
        return "\n".join(lines)


_counts = Counts()
# The fake generators' C++ objects: torch hands operations other Python objects than those that it was given.
_generators: list[_Generator] = []


def _site() -> str:
    """The innermost line of the package that is being run."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PACKAGE):
            return f"{name[len(_PACKAGE) :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"


def _is_device(device) -> bool:
    return device is not None and torch.device(device).type in ("cuda", "meta")


class FakeTensor(torch.Tensor):
    """A tensor that says that it is on ``cuda:0``; its values are those of ``held``, a CPU tensor."""

    @staticmethod
    def __new__(cls, held):
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",
            requires_grad=False,
        )
        self.held = held
        return self

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    is_cpu = property(lambda self: False)

    def get_device(self):
        return 0

    def __repr__(self):
        return f"FakeTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert cuda:0 device type tensor to numpy at {_site()}")

    def __array__(self, *args, **kwargs):
        raise TypeError(f"can't convert cuda:0 device type tensor to numpy at {_site()}")

    def __deepcopy__(self, memo):
        copy = on_device(self.held)
        if getattr(self, "_is_param", False):
            copy = torch.nn.Parameter(copy)
        return copy.requires_grad_(self.requires_grad)

    def _read(self):
        _counts.synchronizations["item", _site()] += 1
        return self.held.item()

    def item(self):
        return self._read()

    def __int__(self):
        return int(self._read())

    def __index__(self):
        return int(self._read())

    def __float__(self):
        return float(self._read())

    def __bool__(self):
        return bool(self._read())

    def tolist(self):
        _counts.synchronizations["tolist", _site()] += 1
        return self.held.tolist()

    def new_tensor(self, data, dtype=None, device=None, requires_grad=False):
        _counts.uploads["new_tensor", _site()] += 1
        with torch.utils._python_dispatch._disable_current_modes():
            made = FakeTensor(torch.tensor(data, dtype=dtype or self.dtype))
        return made.requires_grad_(requires_grad)

    def _index(self, index):
        """An index as torch takes it; lists are copied to the device."""

        def one(value):
            if isinstance(value, (list, range)):
                _counts.uploads["list index", _site()] += 1
                return torch.tensor(list(value))
            return value

        return tuple(map(one, index)) if isinstance(index, tuple) else one(index)

    def __getitem__(self, index):
        return super().__getitem__(self._index(index))

    def __setitem__(self, index, value):
        return super().__setitem__(self._index(index), value)


class FakeGenerator(_Generator):
    """A generator that may belong to the fake device."""

    def __new__(cls, device="cpu"):
        self = _Generator.__new__(cls, "cpu")
        self._device = torch.device(device)
        if self._device.type == "cuda":
            _generators.append(self)
        return self

    def __init__(self, device="cpu"):
        pass

    @property
    def device(self):
        return CUDA if self._device.type == "cuda" else self._device


def _is_fake_generator(generator) -> bool:
    return any(generator is other or generator._cdata == other._cdata for other in _generators)


def _check_generator(generator, name: str, on_device: bool) -> None:
    if generator is not None and _is_fake_generator(generator) != on_device:
        wanted, got = ("cuda", "cpu") if on_device else ("cpu", "cuda")
        raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{got}' [{name}] at {_site()}")


def _check_deterministic(name: str, args, kwargs) -> None:
    """Raises where torch does for CUDA tensors: see the documentation of ``torch.use_deterministic_algorithms``."""
    if not torch.are_deterministic_algorithms_enabled():
        return
    first = args[0] if args else None
    floating = isinstance(first, torch.Tensor) and (first.dtype.is_floating_point or kwargs.get("dtype") is not None)
    weighted = name == "bincount" and ((len(args) > 1 and args[1] is not None) or kwargs.get("weights") is not None)
    with_indices = name in ("median", "nanmedian") and len(args) > 1
    # Draws with replacement, more than one of them, are made with a cumulative sum.
    drawn = name == "multinomial" and args[1] > 1 and len(args) > 2 and args[2]
    listed = name in ("kthvalue", "histc", "put_", "put", "nll_loss_forward", "nll_loss2d_forward", "_embedding_bag")
    if listed or weighted or with_indices or drawn or (name in ("cumsum", "cumsum_") and floating):
        raise RuntimeError(f"{name}_cuda does not have a deterministic implementation at {_site()}")


def _held(value):
    return value.held if isinstance(value, FakeTensor) else value


def _fake(value):
    return FakeTensor(value) if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) else value


def _run(function, args, kwargs):
    """One operation of torch: on the CPU as it is, on the device on the values that are held."""
    name = function.overloadpacket.__name__
    tensors: list[torch.Tensor] = []
    tree_map(lambda value: tensors.append(value) if isinstance(value, torch.Tensor) else None, (args, kwargs))
    fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
    device = kwargs.get("device")
    if name == "_to_copy":
        return _copied(function, args[0], kwargs)
    if name == "copy_" and len(fakes) == 1:
        (_counts.uploads if isinstance(args[0], FakeTensor) else _counts.synchronizations)["copy_", _site()] += 1
        function(_held(args[0]), _held(args[1]), *args[2:])
        return args[0]
    if not fakes:
        if not _is_device(device):
            _check_generator(kwargs.get("generator"), name, False)
            return function(*args, **({**kwargs, "pin_memory": None} if kwargs.get("pin_memory") else kwargs))
        _check_generator(kwargs.get("generator"), name, True)
        if name not in _VIEWS:
            _counts.kernels[name, _site()] += 1
        return tree_map(_fake, function(*args, **{**kwargs, "device": "cpu", "pin_memory": None}))
    _check_devices(name, args, [tensor for tensor in tensors if not isinstance(tensor, FakeTensor)])
    _check_generator(kwargs.get("generator"), name, True)
    _check_deterministic(name, args, kwargs)
    if name in _WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        _counts.synchronizations[name, _site()] += 1
    elif name in _INDEXING and any(
        isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1] or []
    ):
        _counts.synchronizations["mask index", _site()] += 1
    if name not in _VIEWS:
        _counts.kernels[name, _site()] += 1
    kwargs = dict(kwargs)
    on_host = device is not None and not _is_device(device)
    if device is not None:
        kwargs["device"] = "cpu"
    out = function(*tree_map(_held, args), **tree_map(_held, kwargs))
    if torch.Tag.inplace_view in function.tags:
        # A new shape in place, which the tensor that is seen takes as well.
        with torch._C._DisableTorchDispatch():
            function(*args, **kwargs)
    if on_host:
        return out
    # What an operation has changed in place keeps its tensor.
    changed = {id(fake.held): fake for fake in fakes}
    return tree_map(lambda value: changed.get(id(value), _fake(value)), out)


def _copied(function, source, kwargs):
    """``Tensor.to``: within the device, from it, or to it."""
    target = kwargs.get("device") if kwargs.get("device") is not None else source.device
    kwargs = {name: value for name, value in kwargs.items() if name != "device"}
    out = function(_held(source), **kwargs)
    if isinstance(source, FakeTensor):
        if not _is_device(target):
            _counts.synchronizations["copy to the host", _site()] += 1
            return out
        _counts.kernels["_to_copy", _site()] += 1
        return FakeTensor(out)
    if _is_device(target):
        locked = any(source is other for other in _locked)
        _counts.uploads["copy from page-locked memory" if locked else "copy to the device", _site()] += 1
        return FakeTensor(out)
    return out


def _check_devices(name: str, args, hosts) -> None:
    """Raises where tensors of both devices meet; torch allows numbers on the CPU in pointwise operations, and indices."""
    if name in _INDEXING:
        if not isinstance(args[0], FakeTensor):
            raise RuntimeError(
                f"indices should be either on cpu or on the same device as the indexed tensor at {_site()}"
            )
        if any(
            not isinstance(index, FakeTensor) and index.ndim
            for index in args[1] or []
            if isinstance(index, torch.Tensor)
        ):
            _counts.uploads["index on the host", _site()] += 1
        hosts = [value for value in hosts if not any(value is index for index in args[1] or [])]
    if any(value.ndim or name in _STRICT for value in hosts):
        raise RuntimeError(f"Expected all tensors to be on the same device, cuda:0 and cpu [{name}] at {_site()}")


class _Mode(TorchDispatchMode):
    """Takes the operations that have no tensor of the device among their arguments, such as ``torch.zeros(device=...)``."""

    def __init__(self):
        super().__init__()
        # Torch initializes no CUDA device while a mode with this key is active.
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __enter__(self):
        self.lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *failure):
        torch._C._set_only_lift_cpu_tensors(self.lifted)
        return super().__exit__(*failure)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _Named(TorchFunctionMode):
    """Gives ``cuda`` its index, for which torch would ask the driver."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def indexed(value):
            named = (
                isinstance(value, torch.device) or value == "cuda" if isinstance(value, (str, torch.device)) else False
            )
            return CUDA if named and torch.device(value).type == "cuda" else value

        return function(*map(indexed, args), **{name: indexed(value) for name, value in (kwargs or {}).items()})


# Tensors in page-locked memory.
_locked: list[torch.Tensor] = []


def _pin(tensor):
    _locked.append(tensor.clone())
    return _locked[-1]


class FakeStream:
    """A stream of the device, which records the streams and events that it has waited for."""

    def __init__(self, device=None):
        self.waited: list[object] = []

    def synchronize(self):
        _counts.synchronizations["stream", _site()] += 1

    def wait_stream(self, other):
        self.waited.append(other)

    def wait_event(self, event):
        self.waited.append(event)

    def record_event(self):
        return SimpleNamespace(stream=self)


def counted_apart(monkeypatch, module, name):
    """Counts what happens within a function of a module, for example of an engine, in counts of its own, which are returned."""
    function, apart = getattr(module, name), Counts()
    counters = tuple(vars(apart))

    def wrapper(*args, **kwargs):
        outside = {counter: getattr(_counts, counter) for counter in counters}
        vars(_counts).update(vars(apart))
        try:
            return function(*args, **kwargs)
        finally:
            vars(_counts).update(outside)

    monkeypatch.setattr(module, name, wrapper)
    return apart


def count_kernel(name):
    """Count a kernel that is not an operation of torch."""
    _counts.kernels[name, _site()] += 1


def on_device(value):
    """A copy of a CPU tensor, on the fake device."""
    return FakeTensor(value.detach().clone())


def forget_tensors():
    """Clear the caches of the package that hold tensors by device, which may be one that does not exist."""
    for function in (full._kept_places, full._kept_variances, symmetric_places):
        function.cache_clear()


@contextlib.contextmanager
def fake_device(monkeypatch):
    """Makes ``cuda:0`` a device of this process; gives the counts of what happens there."""
    monkeypatch.setattr(torch, "Generator", FakeGenerator)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(total_memory=80 << 30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    main = FakeStream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: main)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: main)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.Tensor, "pin_memory", _pin)
    # No tensors of a user's subclass: what is kept for ordinary tensors is kept for these, too.
    monkeypatch.setattr(arrays, "_ORDINARY", arrays._ORDINARY | {FakeTensor})
    monkeypatch.setattr(FakeTensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (64 << 30, 80 << 30))
    run = threading.Thread.run

    def run_on_device(self):
        # Modes belong to a thread.
        with _Named(), _Mode():
            run(self)

    monkeypatch.setattr(threading.Thread, "run", run_on_device)
    _counts.clear()
    forget_tensors()
    try:
        with _Named(), _Mode():
            yield _counts
    finally:
        _generators.clear()
        _locked.clear()
        forget_tensors()
