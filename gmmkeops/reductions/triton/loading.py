"""Import of Triton on first use, and launches of its kernels on a device or by its interpreter."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from typing import Any

import numpy as np
import torch

from gmmkeops.reductions.protocol import Broken

__all__ = ["interpreted", "launch", "unavailable"]

# Smallest major compute capability of CUDA devices, for which Triton generates code.
_CAPABILITY = 8


def interpreted() -> bool:
    """Return whether kernels are run by Triton's interpreter, on the CPU; ``TRITON_INTERPRET=1`` asks for it."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def unavailable(device: torch.device) -> str | None:
    """Return the reason, one clause, why Triton cannot run on a device; None if it can. Imports Triton on first use."""
    if interpreted():
        if device.type != "cpu":
            return "TRITON_INTERPRET is set, and its interpreter runs on a CPU only"
    elif device.type != "cuda":
        return f"it runs on CUDA devices only, not on {device.type}"
    elif (capability := _capability(device)) is None:
        return "torch finds no CUDA device"
    elif torch.version.hip is None and capability[0] < _CAPABILITY:
        return f"the device has compute capability {capability[0]}.{capability[1]}, and Triton needs {_CAPABILITY}.0"
    return _broken[-1] if _broken else _failure()


# Reasons of failed launches; the engine is not used afterwards.
_broken: list[str] = []


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


@functools.cache
def _failure() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        _kernels("rows")
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else ""
        return f"importing Triton failed ({type(error).__name__}: {said})"
    return None


@functools.cache
def _kernels(module: str) -> Any:
    return importlib.import_module(f"gmmkeops.reductions.triton.kernels.{module}")


def launch(
    module: str, kernel: str, device: torch.device, grid: tuple[int, ...], *arguments: Any, warps: int, **constants: Any
) -> None:
    """Launch a kernel of a module of :mod:`gmmkeops.reductions.triton.kernels` on the current stream of a device.

    Args:
        module, kernel: Names of the module and of the kernel.
        device: Device of the tensors.
        grid: Numbers of programs.
        arguments: Tensors and numbers.
        warps: Number of warps of a program.
        constants: Values that are known when the kernel is compiled.
    """
    if interpreted():
        function = getattr(_kernels(module), kernel)
        # Kernels compute with infinite numbers, for which numpy would issue warnings.
        with np.errstate(all="ignore"):
            function[grid](*arguments, **constants, num_warps=warps)
        return
    try:
        function = getattr(_kernels(module), kernel)
        is_current = device.type != "cuda" or torch.cuda.current_device() == device.index
        with contextlib.nullcontext() if is_current else torch.cuda.device(device):
            function[grid](*arguments, **constants, num_warps=warps)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        said = (str(error) or type(error).__name__).splitlines()[0]
        _broken.append(f"a kernel cannot be compiled or launched ({said})")
        raise Broken(_broken[-1]) from error
