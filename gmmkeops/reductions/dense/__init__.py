"""The dense engine: reductions by torch operations over cache-sized tiles, on any device."""

from gmmkeops.reductions.dense.engine import Dense

__all__ = ["dense"]

dense = Dense()
