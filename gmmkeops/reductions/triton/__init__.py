"""The Triton engine: kernels that Triton compiles for CUDA, or interprets on a CPU."""

from gmmkeops.reductions.triton.engine import Triton

__all__ = ["triton"]

triton = Triton()
