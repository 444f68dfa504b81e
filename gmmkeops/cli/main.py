"""Entry point of the command line: run a command, and report warnings and errors in one sentence each.

Results go to standard output (as JSON with ``--json``), progress and messages to standard error. Exit codes: 0 for success,
1 for an error, 2 for invalid arguments, 130 for an interrupt. A command is imported after its arguments have been parsed, since
torch takes a second or two to import.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import import_module

from gmmkeops.cli.parser import parser
from gmmkeops.cli.values import say

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code.

    Args:
        arguments: Command-line arguments without the name of the program; None for ``sys.argv``.
    """
    options = parser().parse_args(arguments)
    module, name = options.run
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
        try:
            from gmmkeops.data import RankError

            try:
                return int(getattr(import_module(f"gmmkeops.cli.{module}"), name)(options) or 0)
            except (ValueError, TypeError, OSError, ImportError, MemoryError, RankError) as error:
                say(f"error: {error}")
                return 1
        except KeyboardInterrupt:
            say("interrupted")
            return 130
