"""The CUDA kernels of KeOps, compiled without a device: registers are not spilled to memory."""

from __future__ import annotations

import keops_kernels
import pytest
import torch
from conftest import needs_keops

pytestmark = needs_keops


@pytest.fixture(scope="module")
def _compiler():
    if (reason := keops_kernels.missing()) is not None:
        pytest.skip(reason)


@pytest.mark.slow
@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("D", range(1, 13))
@pytest.mark.parametrize("reduction", keops_kernels.REDUCTIONS)
def test_no_kernel_of_full_factors_spills_registers(reduction, D):
    """The test needs NVRTC (``pip install nvidia-cuda-nvrtc``, or ``nvidia-cuda-nvrtc-cu12``) or nvcc, but no CUDA device.

    On both architectures, Hopper and Ampere, a thread has at most 255 registers. In 12 dimensions the moments of a component are
    91 sums, its mean has 24 numbers and its factor 78.
    """
    for kernel in keops_kernels.generated(reduction, D):
        for architecture in ("sm_80", "sm_90"):
            used = keops_kernels.usage(kernel.source, architecture)
            assert (used.stack, used.stores, used.loads) == (0, 0, 0), (architecture, used)
            assert used.registers <= 255


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", keops_kernels.REDUCTIONS)
@pytest.mark.parametrize(("D", "full"), [(2, True), (3, True), (4, True), (3, False)])
def test_rows_in_shared_memory_are_multiples_of_16_bytes(reduction, D, full, dtype):
    """Only then does the compiler read four float32 numbers by one instruction: 2.5 loads a pair instead of 12.5 at D = 4."""
    for kernel in keops_kernels.generated(reduction, D, full=full, dtype=dtype):
        assert kernel.width * dtype.itemsize % 16 == 0
