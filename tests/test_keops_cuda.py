"""The CUDA kernels of KeOps, compiled without a device: registers are not spilled to memory."""

from __future__ import annotations

import keops_kernels
import pytest
from conftest import HAS_KEOPS, needs_keops

pytestmark = [*needs_keops, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def _compiler():
    if HAS_KEOPS and (reason := keops_kernels.missing()) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("D", range(1, 13))
@pytest.mark.parametrize("reduction", keops_kernels.REDUCTIONS)
def test_no_kernel_of_full_factors_spills_registers(reduction, D):
    """The test needs NVRTC (``pip install nvidia-cuda-nvrtc``, or ``nvidia-cuda-nvrtc-cu12``) or nvcc, but no CUDA device.

    Of both architectures, Hopper and Ampere, a thread has at most 255 registers. In 12 dimensions the moments of a component are
    91 sums, its mean has 24 numbers and its factor 78.
    """
    for source in keops_kernels.generated(reduction, D):
        for architecture in ("sm_80", "sm_90"):
            used = keops_kernels.usage(source, architecture)
            assert (used.stack, used.stores, used.loads) == (0, 0, 0), (architecture, used)
            assert used.registers <= 255
