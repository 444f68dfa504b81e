"""Checks of the installation, with a remedy for each failure: compiler, KeOps, CUDA, and the engines.

Each engine is run on a small problem and compared with the float64 dense engine.
"""

from __future__ import annotations

import platform
import shutil
import sysconfig
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gmmkeops import reductions
from gmmkeops.reductions import instruction_set, native_unavailable

__all__ = ["Finding", "examine"]

# Packages of the engines.
_PACKAGES = {"keops": "pykeops", "triton": "triton"}

# Largest admissible difference from the float64 values, nats.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Args:
        what: Name of the item that was checked.
        ok: Whether the item works; None if this machine does not need it.
        says: Result of the check, in one sentence.
        remedy: Command that fixes the failure; empty if there is none.
    """

    what: str
    ok: bool | None
    says: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Check the compiler, KeOps, CUDA and all engines; formulas and kernels are compiled if necessary.

    Returns:
        Results of the checks.

    Example:
        >>> from gmmkeops.cli import doctor
        >>> doctor.examine()[0].what
        'machine'
    """
    threads = torch.get_num_threads()
    found = [
        Finding("machine", True, f"{platform.system()} {platform.machine()}, Python {platform.python_version()}."),
        Finding("torch", True, f"torch {torch.__version__} with {threads} CPU threads."),
        _engine("dense on the CPU", "dense", torch.device("cpu")),
        _compiler(),
        _native(),
        _engine("KeOps on the CPU", "keops", torch.device("cpu")),
    ]
    return [*found, *_cuda()]


def _compiler() -> Finding:
    for name in ("g++", "c++", "clang++"):
        if path := shutil.which(name):
            return Finding("compiler", True, f"{path} was found, which the native engine and KeOps need.")
    return Finding(
        "compiler",
        False,
        "no C++ compiler was found, so KeOps cannot compile its formulas; the dense engine does not need it.",
        "sudo apt install g++   (or: conda install gxx)",
    )


def _native() -> Finding:
    """Compare the compiled engine with the dense engine, or report why it has not been compiled."""
    what = "native on the CPU"
    if (reason := native_unavailable()) is not None:
        remedy = "sudo apt install g++; pip install --force-reinstall --no-cache-dir gmmkeops"
        return Finding(what, False, f"{reason}; the dense engine is used instead.", remedy)
    found = _engine(what, "native", torch.device("cpu"))
    return replace(found, says=f"{found.says} Instruction set: {instruction_set()}.")


def _cuda() -> list[Finding]:
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") is None:
            return [Finding("CUDA", None, "no NVIDIA driver was found; everything runs on the CPU.")]
        says = f"an NVIDIA driver was found, but torch {torch.__version__} is a CPU build."
        remedy = "pip install torch --index-url https://download.pytorch.org/whl/cu128"
        if torch.version.cuda is not None:
            says = f"torch is built for CUDA {torch.version.cuda} but finds no device; "
            says += "the driver may be too old, or the device hidden."
            remedy = "nvidia-smi; echo $CUDA_VISIBLE_DEVICES"
        return [Finding("CUDA", False, says, remedy)]
    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    size = properties.total_memory / 2**30
    found = [Finding("CUDA", True, f"{properties.name}, {size:.0f} GiB, found by torch (CUDA {torch.version.cuda}).")]
    engines = {"dense on CUDA": "dense", "KeOps on CUDA": "keops", "Triton on CUDA": "triton"}
    return [*found, *(_engine(what, backend, device) for what, backend in engines.items())]


def _toolkit(version: str) -> str:
    """Return the commands that make nvrtc and the CUDA headers available to KeOps, for the CUDA version of torch.

    The CUDA wheels of torch do not contain the file name ``libnvrtc.so``, which the linker needs, and those of CUDA 12 have their
    headers in several folders. Setting ``LD_LIBRARY_PATH`` alone is therefore not sufficient.
    """
    major, _, minor = version.partition(".")
    package = "-".join(["cuda-toolkit", *filter(None, (major, minor))])
    toolkit = f"sudo apt install {package}   (from NVIDIA's package repository); export CUDA_PATH=/usr/local/cuda"
    if not major.isdigit() or int(major) < 13:
        return toolkit
    folder = Path(sysconfig.get_path("purelib")) / "nvidia" / f"cu{major}"
    wheels = " ".join(f"'nvidia-cuda-{part}=={version}.*'" for part in ("nvrtc", "runtime", "crt", "cccl"))
    return (
        f"{toolkit}; or, without the toolkit: pip install {wheels}; export CUDA_PATH={folder}; "
        f"ln -s libnvrtc.so.{major} $CUDA_PATH/lib/libnvrtc.so; export LD_LIBRARY_PATH=$CUDA_PATH/lib"
    )


def _engine(what: str, backend: str, device: torch.device) -> Finding:
    """Compare three reductions of an engine with those of the dense engine in float64."""
    if (reason := reductions.unavailable(backend, torch.zeros(1, 2, device=device))) is not None:
        remedy = f"pip install {_PACKAGES[backend]}" if backend in _PACKAGES and "not installed" in reason else ""
        if "does not see CUDA" in reason:
            remedy = _toolkit(torch.version.cuda or "")
        if backend == "keops" and "not installed" in reason:
            return Finding(
                what, None, "pykeops is not installed; it is optional, and other engines are faster.", remedy
            )
        return Finding(what, False, f"{reason}; another engine is used instead.", remedy)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 2, generator=generator)
    means, offsets = torch.randn(5, 2, generator=generator), torch.zeros(5)
    truth = reductions.logsumexp(x.double(), offsets, means, torch.ones(1, 2), backend="dense")
    sums = reductions.moments(x.double(), offsets, means, torch.ones(1, 2), backend="dense").S0
    arguments = (x.to(device), offsets.to(device), means.to(device), torch.ones(1, 2, device=device))
    began = time.perf_counter()
    try:
        values = reductions.logsumexp(*arguments, backend=backend).cpu()
        found = reductions.moments(*arguments, backend=backend).S0.cpu()
        labels = reductions.argmax(*arguments, backend=backend).cpu()
    except (RuntimeError, OSError) as error:
        return Finding(what, False, f"fails: {str(error).splitlines()[0]}", "gmmkeops doctor --json > report.json")
    seconds = time.perf_counter() - began
    worst = max(float((values - truth).abs().max()), float((found - sums).abs().max()) / 500)
    right = worst < _TOLERANCE and torch.equal(labels, reductions.argmax(x, offsets, means, torch.ones(1, 2)))
    # An engine whose first results are wrong is replaced by another one.
    if (reason := reductions.unavailable(backend, arguments[0])) is not None:
        return Finding(what, False, f"{reason}; another engine is used instead.")
    if not right:
        remedy = "pip install --force-reinstall pykeops keopscore" if backend == "keops" else ""
        return Finding(what, False, f"error of {worst:.1e} nats.", remedy)
    return Finding(what, True, f"works, with an error of {worst:.0e} nats ({seconds:.1f} s for the first calls).")
