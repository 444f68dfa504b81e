"""Triton on the fake device: its interpreter runs kernels on the values that tensors of that device hold."""

from __future__ import annotations

import functools

import torch
from fake_device import FakeTensor, count_kernel

from gmmkeops.reductions.triton import loading

__all__ = ["install"]


class _Kernels:
    """The kernels of a module, which are counted and take tensors of the fake device."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        return _Kernel(name, getattr(self._module, name))


class _Kernel:
    def __init__(self, name, function):
        self._name, self._function = name, function

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
            assert all(isinstance(value, FakeTensor) for value in tensors), "a kernel got a tensor of the host"
            count_kernel(self._name)
            with torch.utils._python_dispatch._disable_current_modes():
                held = [value.held if isinstance(value, FakeTensor) else value for value in arguments]
                self._function[grid](*held, **constants)

        return run


def install(monkeypatch):
    """Let the Triton engine run on the fake device."""
    kernels = functools.cache(lambda module, own=loading._kernels: _Kernels(own(module)))
    monkeypatch.setattr(loading, "_kernels", kernels)
    monkeypatch.setattr(loading, "unavailable", lambda device: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
