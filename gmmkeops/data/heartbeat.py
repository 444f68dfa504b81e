"""Detection of ranks that have failed or hang, by heartbeats that each rank writes to the store of the process group.

The heartbeats are sent by a thread with its own connection to the store, independently of the main thread.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from gmmkeops.data.collectives import Collectives

__all__ = ["GONE", "INTERVAL", "NAMING", "Heartbeat", "unfinished"]

# Seconds between two heartbeats, and seconds without a heartbeat after which a rank is considered failed.
INTERVAL, GONE = 0.5, 40.0

# Seconds for which ranks wait for a callback of another rank.
_CALLBACK = 30.0

# Seconds to wait for the name of the failed rank after a connection has broken.
NAMING = 5.0

# Ranks of this process (at most one) that have left an unfinished collective operation.
unfinished: list[int] = []


class Heartbeat:
    """Thread that sends heartbeats of this process and checks those of the other ranks, through the store of the process group.

    There is no time limit for the first heartbeat of a rank, which it sends when its first fit starts.
    """

    _one: Heartbeat | None = None

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.group, self.rank = store, rank
        self.store = store.clone() if hasattr(store, "clone") else store
        self.seen = {other: ("", time.monotonic()) for other in range(size) if other != rank}
        # Running calls of this process; time of the last response of the store, and whether the connection to it is lost.
        self.calls: list[Collectives] = []
        self.heard, self.lost, self.rounds = time.monotonic(), False, 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="gmmkeops-heartbeat", daemon=True)
        self.thread.start()

    @classmethod
    def current(cls, rank: int, size: int) -> Heartbeat:
        """Return the heartbeat thread of the current process group."""
        store = dist.distributed_c10d._get_default_store()
        if cls._one is None:
            atexit.register(cls._stop)
        if cls._one is None or cls._one.group is not store:
            if cls._one is not None:
                cls._one.stop.set()
            cls._one = cls(store, rank, size)
        return cls._one

    @classmethod
    def _stop(cls) -> None:
        if cls._one is not None:
            cls._one.stop.set()
            cls._one.thread.join(INTERVAL)
        if unfinished:
            # Torch would otherwise wait half an hour for the unfinished collective operation.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    def _beat(self) -> None:
        while not self.stop.is_set():
            try:
                self._round()
            except RuntimeError:
                self.lost = True
                return
            self.heard, self.rounds = time.monotonic(), self.rounds + 1
            self.stop.wait(INTERVAL)

    def _round(self) -> None:
        now, call = time.monotonic(), self.calls[-1] if self.calls else None
        # Seconds for which this rank has waited for other ranks, and for which its callback has been running.
        times = (None, None) if call is None else (call.waiting, call.calling)
        mine = [0.0 if when is None else now - when for when in times]
        self.store.set(f"gmmkeops/alive {self.rank}", f"{self.rounds} {mine[0]:.1f} {mine[1]:.1f}")
        for rank, (last, _) in self.seen.items():
            key = f"gmmkeops/alive {rank}"
            sign = self.store.get(key).decode() if self.store.check([key]) else ""
            if sign != last or not sign:
                self.seen[rank] = (sign, time.monotonic())
        for call in list(self.calls):
            for rank, (_, when) in self.seen.items():
                silent = time.monotonic() - when
                if silent > call.patience and not call.reported:
                    call.reported = f"rank {rank} has failed: no heartbeat for {silent:.0f} s"
            if not call.reported:
                call.reported = self._callback_failure(mine)
            if call.reported:
                self.store.compare_set(f"{call.key}/failure", "", call.reported)
            if self.store.check([f"{call.key}/failure"]):
                call.failure = self.store.get(f"{call.key}/failure").decode()
                call.wake()

    def _callback_failure(self, mine: list[float]) -> str:
        """Return an error text if ranks have waited too long for a callback of another rank, else an empty one."""
        times = {rank: [float(part) for part in sign.split()[1:]] for rank, (sign, _) in self.seen.items() if sign}
        times[self.rank] = mine
        for rank, (_, calling) in times.items():
            others = [waiting for other, (waiting, _) in times.items() if other != rank]
            if calling > _CALLBACK and max(others, default=0.0) > _CALLBACK:
                return f"rank {rank} has been in a callback for {calling:.0f} s, while other ranks wait for it"
        return ""
