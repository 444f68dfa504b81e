"""Command line ``gmmkeops``, which fits, evaluates and converts mixtures."""

from gmmkeops.cli.main import main

__all__ = ["main"]
