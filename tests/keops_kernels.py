"""The CUDA kernels that KeOps generates for the formulas of the package, compiled without a device."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from gmmkeops.reductions.keops import formulas, loading
from gmmkeops.reductions.problem import Exponents

REDUCTIONS = ("logsumexp", "topk", "moments", "point_gradient")


@dataclass
class Usage:
    """Resources of a thread of a kernel: registers, and bytes of local memory (stack, spilled registers)."""

    registers: int
    stack: int
    stores: int
    loads: int


@dataclass
class Kernel:
    """The source of a kernel, and the numbers that it reads from shared memory in each step of its loop."""

    source: str
    width: int


class _Seen(BaseException):
    """Ends a reduction before its formula is compiled for the CPU."""


def generated(reduction, D, *, full=True, dtype=torch.float32):
    """The CUDA kernels of a reduction: over all pairs, and over ranges (which KeOps uses for batches and for lists too)."""
    assert loading.unavailable(torch.device("cpu")) is None
    import keopscore
    import pykeops.common.keops_io.LoadKeOps as load
    from pykeops.common.keops_io import keops_binder

    found, request = [], load.get_keops_dll
    version = keopscore.cuda_config.get_cuda_version

    def record(*arguments):
        found.append(arguments)
        raise _Seen

    factor = torch.eye(D) if full else torch.ones(D)
    x, zeros = torch.zeros(6, D, dtype=dtype), torch.zeros(3, D, dtype=torch.float64)
    problem = Exponents(x, zeros[:, 0], zeros, factor.double().expand(3, *factor.shape), zeros[0])
    values = torch.zeros(6, dtype=dtype)
    arguments = {
        "logsumexp": (None,),
        "topk": (None, 2),
        "moments": (values, values.double()),
        "point_gradient": (values, values.double()),
    }
    # Formulas that this process has used before are not generated again.
    libraries = {binder: (binder.library, binder.library_params) for binder in keops_binder.values()}
    for binder in libraries:
        binder.library, binder.library_params = {}, {}
    load.get_keops_dll = record
    # Without CUDA there is no version, which KeOps compares on import.
    keopscore.cuda_config.get_cuda_version = lambda: version() or 12000
    try:
        with contextlib.suppress(_Seen):
            getattr(formulas, reduction)(problem, *arguments[reduction])
        return [_kernel(name, *found[0][1:]) for name in ("GpuReduc1D", "GpuReduc1D_ranges")]
    finally:
        for binder, kept in libraries.items():
            binder.library, binder.library_params = kept
        load.get_keops_dll = request
        keopscore.cuda_config.get_cuda_version = version


def _kernel(name, formula, _chunks, _final_chunks, _highdim, aliases, *rest):
    """A kernel by a map-reduce scheme of KeOps, whose constructor asks for a device."""
    scheme = getattr(importlib.import_module(f"keopscore.mapreduce.gpu.{name}"), name)
    from keopscore.mapreduce.MapReduce import MapReduce

    maker = scheme.__new__(scheme)
    MapReduce.__init__(maker, formula, aliases, *rest)
    maker.dimy = maker.varloader.dimy
    maker.get_code()
    return Kernel(maker.code, maker.dimy)


def _nvrtc():
    """The library NVRTC of the wheel ``nvidia-cuda-nvrtc`` (or ``-cu12``), or that of a toolkit; None if there is none."""
    folders = [Path(folder) for folder in sys.path if folder]
    places = [path for folder in folders for path in folder.glob("nvidia/*/lib/libnvrtc.so*")]
    for name in (*sorted(map(str, places)), "libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


def missing():
    """The reason why no CUDA source can be compiled on this machine; None if it can."""
    if _nvrtc() is None and shutil.which("nvcc") is None:
        return "neither NVRTC (pip install nvidia-cuda-nvrtc) nor nvcc was found"
    return None


def usage(source, architecture="sm_90"):
    """Return the resources of a kernel as ptxas reports them; it is compiled with fast functions, as by KeOps."""
    options = [f"-arch={architecture}", "--ptxas-options=-v", "-use_fast_math"]
    library = _nvrtc()
    log = _by_nvcc(source, options) if library is None else _by_nvrtc(library, source, options)
    numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    assert numbers, log
    assert registers, log
    return Usage(int(registers[1]), *map(int, numbers.groups()))


def _by_nvrtc(library, source, options):
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), None, 0, None, None) == 0
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = library.nvrtcCompileProgram(program, len(options), given)
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    assert status == 0, log.value.decode()
    return log.value.decode()


def _by_nvcc(source, options):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cu"
        path.write_text(source)
        command = ["nvcc", "-cubin", *options, str(path), "-o", str(path.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr
