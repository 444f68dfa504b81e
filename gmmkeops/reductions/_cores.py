"""Work shared among a CPU's cores: one Python thread for each, and torch's own threads out of the way."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["on_cores"]

T = TypeVar("T")


def on_cores(work: Callable[[int], T], workers: int, device: torch.device) -> list[T]:
    """``[work(0), ..., work(workers - 1)]``, without gradients; on a GPU one after the other.

    Each call stays on one core: threads inside a torch call would wait for each other at its end, which on a busy machine
    takes longer than the call (measured: 30x on a small fit).
    """

    def on_one_core(worker: int) -> T:
        torch.set_num_threads(1)
        with torch.no_grad():
            return work(worker)

    if device.type != "cpu":
        with torch.no_grad():
            return [work(worker) for worker in range(workers)]
    threads = torch.get_num_threads()
    try:
        if workers == 1:
            return [on_one_core(0)]
        with ThreadPoolExecutor(workers, thread_name_prefix="gmmkeops") as pool:
            return list(pool.map(on_one_core, range(workers)))
    finally:
        # Torch hands the last setting to new threads, and part of it to all: it is restored once nobody works.
        torch.set_num_threads(threads)
