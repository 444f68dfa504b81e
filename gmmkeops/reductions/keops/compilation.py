"""Messages about the compilation of formulas, which takes seconds to minutes and happens when a formula is used first."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["announced"]

_logger = logging.getLogger("gmmkeops")

# Functions that KeOps calls before and after it generates or compiles a formula that is not in its cache.
_HOOKS = [
    ("keopscore.binders.LinkCompile", "KeOps_Message"),
    ("pykeops.common.keops_io.LoadKeOps_cpp", "pyKeOps_Message"),
]

# Formulas whose compilation has been shown; one for each process.
_shown: list[str] = []


@contextmanager
def announced(formula: str, folder: Path) -> Iterator[None]:
    """Report the compilation of a formula within this context, and the seconds that it took; nothing if it was in the cache.

    All messages are logged at the level INFO. Those of the first compilation of a process are also written to the standard error
    stream if logging has not been configured, because the first call of a user would otherwise wait in silence.

    Args:
        formula: Description of the formula in the messages.
        folder: Folder of the compiled formulas.
    """
    times: list[float] = []
    show = not _shown

    def listen(*_: Any, **__: Any) -> None:
        if not times:
            _shown.append(formula)
            _tell(f"KeOps compiles {formula}. The result is kept in {folder}.", show)
        times.append(time.perf_counter())

    hooks = [(sys.modules[module], name) for module, name in _HOOKS if hasattr(sys.modules.get(module), name)]
    kept: list[Callable[..., Any]] = [getattr(module, name) for module, name in hooks]
    for module, name in hooks:
        setattr(module, name, listen)
    try:
        yield
    finally:
        for (module, name), function in zip(hooks, kept, strict=True):
            setattr(module, name, function)
    if times:
        _tell(f"KeOps compiled {formula} in {times[-1] - times[0]:.1f} s.", show)


def _tell(message: str, show: bool) -> None:
    _logger.info(message)
    if show and _logger.level == logging.NOTSET and not _logger.hasHandlers():
        from tqdm.auto import tqdm

        tqdm.write(message, file=sys.stderr)
