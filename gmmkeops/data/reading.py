"""Thread that loads the next chunk while the previous one is in use."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

__all__ = ["ReadingThread"]


class ReadingThread:
    """Single thread for all passes over a source, since each new thread would retain memory.

    The thread starts on first use. Pickled copies, deep copies and forked processes start their own thread.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def __reduce__(self) -> tuple[type[ReadingThread], tuple[()]]:
        return ReadingThread, ()

    def start(self, load: Callable[[], Any]) -> Callable[[], Any]:
        """Start loading in the thread; return a function that waits for the result."""
        if self._pool is None or self._process != os.getpid():
            _share_arenas()
            self._pool, self._process = ThreadPoolExecutor(1, thread_name_prefix="gmmkeops-reader"), os.getpid()
        try:
            return self._pool.submit(load).result
        except RuntimeError as error:
            if "start new thread" not in str(error):
                raise
            # There is not enough memory for the stack of a thread, so the caller loads the chunk itself.
            self._pool = None
            return load


def _share_arenas() -> None:
    """Limit glibc to two memory pools (``mallopt``); other C libraries are not changed.

    By default glibc reserves 64 MB of address space for each thread that allocates memory, which is too much for a process with
    a limit of one or two gigabytes.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(-8, 2)
