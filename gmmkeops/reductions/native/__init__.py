"""The native engine: reductions compiled for the CPU, with kernels for several instruction sets."""

from gmmkeops.reductions.native.engine import Native

__all__ = ["native"]

native = Native()
