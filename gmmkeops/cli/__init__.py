"""The command line ``gmmkeops``: fit, evaluate and convert mixtures without writing Python.

Nothing is imported before the arguments have been understood, so that a usage error is reported at once.
"""

from gmmkeops.cli.main import main

__all__ = ["main"]
