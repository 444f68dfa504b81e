"""Work shared among a CPU's cores: one Python thread for each, and torch's own threads out of the way."""

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
    """``[work(0), ..., work(workers - 1)]``, without gradients; on a GPU one after the other.

    Each call stays on one core: threads inside a torch call would wait for each other at its end, which on a busy machine
    takes longer than the call (measured: 30x on a small fit).
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
        except BaseException as error:  # an interrupt, too, waits for the others
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
                # A process with little memory left has no room for another thread's stack.
                _logger.info("a share of the work stays on one core: %s", error)
                mine.append(worker)
            else:
                others.append(thread)
        for worker in mine:
            on_one_core(worker)
        for thread in others:
            thread.join()
    finally:
        # Torch hands the last setting to new threads, and part of it to all: it is restored once nobody works.
        torch.set_num_threads(threads)
    if failed:
        raise failed[0]
    return [done[worker] for worker in range(workers)]
