"""Collective operations of ``torch.distributed`` that report which rank fails, hangs, is interrupted or runs other operations.

Before every collective operation the ranks compare which operation each is about to perform, so that two different operations are
never combined. The same comparison transmits a Ctrl-C, so that all ranks stop at the same iteration.
"""

from __future__ import annotations

import itertools
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gmmkeops.data import heartbeat

__all__ = ["REMEDY", "Collectives", "RankError"]

# Seconds for which an interrupted rank waits for the interruption of the others.
_PRESS, _PATIENCE = 1.0, 10.0

# Collective operations, and their descriptions in messages.
_OPERATIONS = {"sum": "adds numbers", "gather": "exchanges rows", "interrupt": "was interrupted"}

REMEDY = "; a fit with checkpoint= resumes from its last checkpoint when it is started again."

_calls = itertools.count()


class RankError(RuntimeError):
    """Error that a rank failed, does not respond, or runs with other settings. The message names the rank and a remedy.

    Example:
        >>> import gmmkeops as gk
        >>> issubclass(gk.distributed.RankError, RuntimeError)
        True
    """


class Collectives:
    """Collective operations of the current process group, which has at least two ranks.

    Attributes:
        outer: The collective operations of the outermost call that this process is executing, or None.

    Raises:
        RankError: Raised by the methods if another rank failed, does not respond, or runs with other settings.
    """

    outer: Collectives | None = None

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
        self.number, self.key = 0, ""
        self.heartbeat = heartbeat.Heartbeat.current(self.rank, self.size)
        # Seconds without a heartbeat after which a rank counts as failed.
        self.patience = heartbeat.GONE
        # Error text about a failed rank, which all ranks receive, and the error text of this rank.
        self.failure, self.reported = "", ""
        # Start times of waiting for other ranks, and of a user callback; or None.
        self.waiting: float | None = None
        self.calling: float | None = None
        # Whether a collective operation is running; time of a Ctrl-C during one; whether all ranks have been interrupted.
        self.busy, self.pressed, self.left = False, 0.0, False
        # Whether this object handles SIGINT, and the handler that it replaces. The lock ensures that the heartbeat thread does
        # not send the signal after the callback has returned.
        self.signals, self.lock = False, threading.Lock()
        self.before: Any = None

    @contextmanager
    def call(self) -> Iterator[None]:
        """Run a call on all ranks; this context raises failures of other ranks and reports exceptions to them."""
        if Collectives.outer is not None:
            yield
            return
        self.number = next(_calls)
        self.key, self.failure, self.reported = f"gmmkeops/fit {self.number}", "", ""
        self.pressed, self.left = 0.0, False
        Collectives.outer = self
        self.heartbeat.calls.append(self)
        # A handler that was not set from Python (None) cannot be restored.
        self.before = signal.getsignal(signal.SIGINT)
        self.signals = threading.current_thread() is threading.main_thread() and self.before is not None
        if self.signals:
            signal.signal(signal.SIGINT, self._interrupt)
        try:
            yield
        except RankError:
            self.calling = None
            if self.rank == 0:
                # Other ranks may still need the store of this process, to read the error text or to finish an operation.
                time.sleep(heartbeat.NAMING if self.failure or heartbeat.unfinished else heartbeat.INTERVAL)
            raise
        except KeyboardInterrupt:
            self._report(f"rank {self.rank} was interrupted (Ctrl-C)")
            raise
        except BaseException as error:
            self._report(f"rank {self.rank} failed with {type(error).__name__}: {str(error).rstrip('.')}")
            raise
        finally:
            if self.signals:
                with self.lock:
                    self.signals = False
                signal.signal(signal.SIGINT, self.before)
            self.heartbeat.calls.remove(self)
            Collectives.outer = None

    def _report(self, failure: str) -> None:
        """Send an error text about this rank to the other ranks."""
        self.reported = failure
        # Wait for two rounds of the heartbeat, since the first one may have begun before.
        rounds, end = self.heartbeat.rounds + 2, time.monotonic() + heartbeat.NAMING
        while self.heartbeat.rounds < rounds and not self.heartbeat.lost and time.monotonic() < end:
            time.sleep(heartbeat.INTERVAL / 5)

    def _interrupt(self, number: int, frame: Any) -> None:
        """Handle SIGINT: end a callback for which the others no longer wait, or handle Ctrl-C.

        If the process ignores Ctrl-C (like a background job of a shell script) or has its own handler, this behavior is kept.
        Otherwise KeyboardInterrupt is raised, after a collective operation that this rank is executing.
        """
        if self.failure:
            self.check()
        if self.before is signal.SIG_IGN:
            return
        if self.before is signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif self.before is not signal.default_int_handler:
            self.before(number, frame)
        elif self.busy:
            self.pressed = self.pressed or time.monotonic()
        else:
            raise KeyboardInterrupt

    def wake(self) -> None:
        """Interrupt a user callback for which the other ranks have stopped waiting, as far as Python can."""
        with self.lock:
            if self.calling is not None and self.signals and hasattr(signal, "pthread_kill"):
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    @contextmanager
    def callback(self) -> Iterator[None]:
        """Run a user callback: the other ranks wait for the end of this context for a limited time."""
        self.calling = time.monotonic()
        try:
            yield
        finally:
            with self.lock:
                self.calling = None

    def interrupted(self) -> None:
        """Handle Ctrl-C: return if all ranks were interrupted, so that they stop at the same iteration.

        Raises:
            RankError: Only some ranks were interrupted; the message names them on all ranks.
        """
        if self.left:
            return
        if heartbeat.unfinished:
            self._report(f"rank {self.rank} was interrupted (Ctrl-C)")
            raise RankError(f"rank {self.rank} was interrupted (Ctrl-C) while it waited for the others" + REMEDY)
        self.pressed = time.monotonic()
        try:
            with self._operation("interrupt"):
                pass
        except KeyboardInterrupt:
            if not self.left:
                self.interrupted()

    def _compare(self, operation: str, *sizes: int) -> Tensor:
        """Compare the collective operations that the ranks are about to perform; return the first size of each rank.

        Raises:
            RankError: The operations differ, or some ranks were interrupted.
            KeyboardInterrupt: All ranks were interrupted.
        """
        codes = list(_OPERATIONS)
        length, shape = (*sizes, 0, 0)[:2]
        all_ranks = self._gather_integers([self.number, codes.index(operation), length, shape])
        if any(codes[row[1]] == "interrupt" for row in all_ranks):
            # The other ranks may receive the Ctrl-C a moment later.
            time.sleep(_PRESS)
            pressed = self._gather_integers([int(self.pressed > 0)])
            self.pressed = 0.0
            who = [str(rank) for rank, (flag,) in enumerate(pressed) if flag]
            if len(who) == self.size:
                self.left = True
                raise KeyboardInterrupt
            names = f"rank {who[0]} was" if len(who) == 1 else f"ranks {', '.join(who)} were"
            raise RankError(f"{names} interrupted (Ctrl-C), and the others were not" + REMEDY)
        first = all_ranks[0]
        for rank, row in enumerate(all_ranks):
            if row[:2] != first[:2] or row[3] != first[3] or (operation == "sum" and row[2] != first[2]):
                raise RankError(
                    f"rank {rank} runs another operation than rank 0: in call number {row[0]} it {_OPERATIONS[codes[row[1]]]} "
                    f"({row[2]}), rank 0 in call number {first[0]} {_OPERATIONS[codes[first[1]]]} ({first[2]}); "
                    "run the same script with the same settings on all ranks."
                )
        return torch.tensor([row[2] for row in all_ranks])

    def _gather_integers(self, numbers: list[int]) -> list[list[int]]:
        """Gather a list of integers from each rank, all of the same length."""
        own = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        self._wait(lambda: dist.all_gather(parts, own, async_op=True))
        # One copy from a GPU, rather than one for each rank.
        gathered: list[list[int]] = torch.stack(parts).tolist()
        return gathered

    @contextmanager
    def _operation(self, name: str, *sizes: int) -> Iterator[Tensor]:
        """Run a collective operation after a comparison between the ranks; yield the first size of each rank.

        A Ctrl-C is raised after the operation, never between the comparison and the operation: this rank would start the next
        comparison while the others wait in the operation.
        """
        self.busy = True
        try:
            yield self._compare(name, *sizes)
        finally:
            self.busy = False
        if self.pressed:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise a RankError if another rank has failed, or if the store does not answer."""
        if self.failure:
            raise RankError(self.failure + REMEDY)
        holder = "rank 0, or the process with the store of the group, "
        if self.heartbeat.lost:
            raise RankError(holder + "has ended" + REMEDY)
        if time.monotonic() - self.heartbeat.heard > self.patience:
            raise RankError(holder + "does not answer" + REMEDY)

    def _wait(self, start: Callable[[], Any]) -> None:
        """Run a collective operation to its end while checking for failures of other ranks."""
        pause = 2e-5
        try:
            work = start()
            self.waiting = time.monotonic()
            while not work.is_completed():
                time.sleep(pause)
                pause = min(2 * pause, 0.02)
                self.check()
                if self.pressed and time.monotonic() - self.pressed > _PATIENCE:
                    raise KeyboardInterrupt
            work.wait()
        except (RankError, KeyboardInterrupt):
            heartbeat.unfinished.append(self.rank)
            raise
        except RuntimeError as error:
            # A connection is broken. The error text or a missing heartbeat soon identifies the failed rank.
            self.patience = heartbeat.NAMING
            end = time.monotonic() + 3 * heartbeat.NAMING
            while time.monotonic() < end:
                self.check()
                time.sleep(heartbeat.INTERVAL)
            raise RankError(f"a connection between ranks broke ({error})" + REMEDY) from None
        finally:
            self.waiting = None

    def sum(self, values: Tensor) -> Tensor:
        """Sum a float64 tensor over all ranks."""
        with self._operation("sum", values.numel()):
            out = values.detach().to(self.device, copy=True)
            self._wait(lambda: dist.all_reduce(out, async_op=True))
        return out.to(values.device)

    def gather(self, values: Tensor) -> list[Tensor]:
        """Gather a tensor from each rank; the tensors may differ in their first dimension."""
        kind = zlib.crc32(repr((values.dtype, tuple(values.shape[1:]))).encode())
        with self._operation("gather", len(values), kind) as sizes:
            padded = torch.zeros(int(sizes.max()), *values.shape[1:], dtype=values.dtype, device=self.device)
            padded[: len(values)] = values
            parts = [torch.empty_like(padded) for _ in range(self.size)]
            self._wait(lambda: dist.all_gather(parts, padded, async_op=True))
        return [part[:size].to(values.device) for part, size in zip(parts, sizes.tolist(), strict=True)]
