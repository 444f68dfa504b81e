"""The KeOps engine: formulas that KeOps compiles for the CPU or CUDA."""

from gmmkeops.reductions.keops.engine import Keops

__all__ = ["keops"]

keops = Keops()
