"""Parallel execution on the cores of a CPU, by Python threads that each use one torch thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Thread
from typing import Any, TypeVar

import torch

__all__ = ["on_cores"]

T = TypeVar("T")

_logger = logging.getLogger("gmmkeops")


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

    threads = torch.get_num_threads()
    others: list[Thread] = []
    mine = [0]
    try:
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
    finally:
        # torch.set_num_threads affects other threads, too, so it is restored after all threads have ended.
        torch.set_num_threads(threads)
    if failed:
        raise failed[0]
    return [done[worker] for worker in range(workers)]
