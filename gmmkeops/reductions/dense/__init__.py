"""The dense engine: reductions over cache-sized tiles by torch operations, on any device."""

from gmmkeops.reductions.dense.engine import Dense

__all__ = ["dense"]

dense = Dense()
