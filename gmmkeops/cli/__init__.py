"""The command line ``gmmkeops``: fit, evaluate and convert mixtures without writing Python."""

from gmmkeops.cli.main import main

__all__ = ["main"]
