"""Parallel execution on the cores of a CPU, by Python threads that each use one torch thread."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock, Thread, local
from typing import Any, TypeVar

import torch

from gmmkeops.components import mind_fork

__all__ = ["alone", "cores", "on_cores", "one_thread", "threads_for", "user_threads"]

T = TypeVar("T")

_logger = logging.getLogger("gmmkeops")


# Numbers of a tensor from which a second thread saves time, and from which torch uses one.
_MANY, _PARALLEL = 1 << 20, 1 << 15


class _Blocks(local):
    """Blocks of :func:`one_thread` that the calling thread has not ended, and its number of threads outside of them."""

    depth, number = 0, 1


_blocks = _Blocks()

# Blocks of all threads that have not ended, and the number of threads when the first of them began.
_lock = Lock()
_open, _outside = 0, 1


def cores() -> int:
    """Return the number of threads that an engine may use: that of torch, outside of blocks of :func:`one_thread`."""
    return _blocks.number if _blocks.depth else _own_number()


def _own_number() -> int:
    """Return torch's number in the calling thread.

    torch.set_num_threads sets it for the calling thread, and for threads that have not used torch yet. A thread that begins
    within a block of another one therefore finds one thread, and takes the number that was set before the block.
    """
    number = torch.get_num_threads()
    with _lock:
        return _outside if _open and number == 1 else number


@contextmanager
def one_thread() -> Iterator[None]:
    """Let operations of torch use one thread within a block; engines use all of them.

    The threads of an operation on small tensors wait for each other longer than the operation takes. On a busy machine an
    operation may take 60 times as long with two threads as with one (measured).
    """
    global _open, _outside
    # In a forked process, the number that is restored at the end must be one.
    mind_fork()
    if not _blocks.depth:
        number = _own_number()
        with _lock:
            _outside = _outside if _open else number
            _open += 1
        _blocks.number = number
        torch.set_num_threads(1)
    _blocks.depth += 1
    try:
        yield
    finally:
        _blocks.depth -= 1
        if not _blocks.depth:
            torch.set_num_threads(_blocks.number)
            with _lock:
                _open -= 1


def threads_for(x: Any) -> AbstractContextManager[None]:
    """Return :func:`one_thread` for points (N, D) of so few numbers that a second thread saves no time, else an empty context."""
    # A nested tensor has no shape, and asking for it raises an error.
    known = not getattr(x, "is_nested", False) and hasattr(x, "shape")
    count = math.prod(x.shape) if known else _MANY
    return one_thread() if count < _MANY else nullcontext()


def alone(x: Any) -> AbstractContextManager[None]:
    """Return a context for operations of torch on points (N, D) just before an engine runs.

    It is :func:`one_thread` on a CPU: after an operation, the other threads of torch wait for the next one for some milliseconds,
    and use the cores that the threads of an engine need (measured: an engine then took as long with two threads as with one).
    """
    parallel = isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.numel() >= _PARALLEL
    return one_thread() if parallel else nullcontext()


@contextmanager
def user_threads() -> Iterator[None]:
    """Restore torch's number of threads within a block of :func:`one_thread`, for code of the user or of other libraries."""
    depth, number = _blocks.depth, _blocks.number
    if not depth:
        yield
        return
    _blocks.depth = 0
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(1)
        _blocks.depth, _blocks.number = depth, number


def on_cores(work: Callable[[int], T], workers: int, device: torch.device) -> list[T]:
    """Compute ``[work(0), ..., work(workers - 1)]`` without gradients, in parallel on a CPU and sequentially on a GPU.

    Each call uses one core. The threads of a torch operation wait for each other at its end, which on a busy machine may take
    longer than the operation itself (measured: 30 times on a small fit).
    """
    if device.type != "cpu":
        with torch.no_grad():
            return [work(worker) for worker in range(workers)]
    done: dict[int, Any] = {}
    failed: list[BaseException] = []

    def on_one_core(worker: int) -> None:
        try:
            torch.set_num_threads(1)
            with torch.no_grad():
                done[worker] = work(worker)
        except BaseException as error:  # also KeyboardInterrupt, so that all threads are joined first
            failed.append(error)

    others: list[Thread] = []
    mine = [0]
    with one_thread():
        for worker in range(1, workers):
            thread = Thread(target=on_one_core, args=(worker,), name=f"gmmkeops-{worker}")
            try:
                thread.start()
            except RuntimeError as error:
                # Without enough memory for another stack, this thread does the work of two.
                _logger.info("a thread could not be started, so fewer cores are used: %s", error)
                mine.append(worker)
            else:
                others.append(thread)
        for worker in mine:
            on_one_core(worker)
        for thread in others:
            thread.join()
    if failed:
        raise failed[0]
    return [done[worker] for worker in range(workers)]
