"""Fits on several processes: sufficient statistics are added over all ranks of ``torch.distributed``, and failures are detected.

Used only if a process group is initialized. Each rank computes the E-step of its shard of the points; moments and counts are
all-reduced, so that all ranks make the same step from the same sums. If a rank fails, hangs or runs with other settings, all
ranks raise an error that names it.

Before every collective operation the ranks compare which operation each is about to perform, so that two different operations are
never combined. The same comparison transmits a Ctrl-C, so that all ranks stop at the same iteration.
"""

from __future__ import annotations

import itertools
import json
import os
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

from gmmkeops.components import Moments
from gmmkeops.data.generators import as_generator
from gmmkeops.data.heartbeat import _BEAT, _GONE, _VERDICT, _Heart, _stuck
from gmmkeops.data.source import Source
from gmmkeops.data.survey import Reservoir, Survey

__all__ = ["RankError", "World", "join"]

# Seconds in which a Ctrl-C reaches all ranks, and for which an interrupted rank waits for the others.
_PRESS, _PATIENCE = 1.0, 10.0

# Collective operations that ranks perform together, and their names in messages.
_ACTS = {"sum": "adds numbers", "gather": "exchanges rows", "interrupt": "was interrupted"}

_REMEDY = "; a fit with checkpoint= resumes from its last checkpoint when it is started again."

_fits = itertools.count()


def join(backend: str | None = None) -> None:
    """Initialize the process group of ``torchrun``; without torchrun, do nothing.

    Each restart of killed workers uses a store prefix of its own. (Otherwise restarted ranks of torch 2.13 try to connect to the
    addresses of their predecessors.)

    Args:
        backend: ``"gloo"`` or ``"nccl"``; None for ``"nccl"`` if CUDA is available, else ``"gloo"``.

    Raises:
        RuntimeError, ValueError: The group cannot be joined; the message is that of :mod:`torch.distributed`.

    Example:
        >>> import gmmkeops as gk
        >>> gk.distributed.join()  # not started by torchrun: nothing happens
    """
    if "RANK" not in os.environ or dist.is_initialized():
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    store, rank, size = next(iter(dist.rendezvous("env://")))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"gmmkeops attempt {attempt}", store)
    backend = ("nccl" if cuda else "gloo") if backend is None else backend
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


class RankError(RuntimeError):
    """A rank failed, does not respond, or runs with other settings; the message names it and a remedy.

    Example:
        >>> import gmmkeops as gk
        >>> issubclass(gk.distributed.RankError, RuntimeError)
        True
    """


class World:
    """The ranks that fit one model together; a single rank if there is no process group.

    Attributes:
        rank: Rank of this process, from 0.
        size: Number of ranks.

    Raises:
        RankError: Raised by the methods if another rank failed, does not respond, or runs with other settings.

    Example:
        >>> import gmmkeops as gk
        >>> world = gk.distributed.World()
        >>> world.rank, world.size
        (0, 1)
    """

    # The outermost call that this process is executing.
    _outer: World | None = None

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        if self.size == 1:
            return
        if World._outer is not None:
            # Part of a running call, with which it shares its state.
            self.__dict__ = World._outer.__dict__
            return
        self.device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
        self.number, self.key = 0, ""
        self.heart = _Heart.of(self.rank, self.size)
        # Seconds without a heartbeat after which a rank counts as failed.
        self.patience = _GONE
        # Error text about a failed rank that all ranks share, and the one that this rank reports.
        self.verdict, self.word = "", ""
        # Time since which this rank has waited for others, and has been in a callback; or None.
        self.waiting: float | None = None
        self.calling: float | None = None
        # Whether a collective operation is running; time of a Ctrl-C during one; whether all ranks have been interrupted.
        self.busy, self.pressed, self.left = False, 0.0, False
        # Whether SIGINT is handled by this world, and the handler that it replaces. The lock keeps the heartbeat thread from
        # sending the signal after the callback has returned.
        self.signals, self.lock = False, threading.Lock()
        self.before: Any = None

    @contextmanager
    def together(self) -> Iterator[None]:
        """Context of a call on all ranks: failures of other ranks are raised here, and an exception here is reported to them."""
        if self.size == 1 or World._outer is not None:
            yield
            return
        self.number = next(_fits)
        self.key, self.verdict, self.word = f"gmmkeops/fit {self.number}", "", ""
        self.pressed, self.left = 0.0, False
        World._outer = self
        self.heart.worlds.append(self)
        # Handlers that were not set from Python (None) could not be set again.
        self.before = signal.getsignal(signal.SIGINT)
        self.signals = threading.current_thread() is threading.main_thread() and self.before is not None
        if self.signals:
            signal.signal(signal.SIGINT, self._press)
        try:
            yield
        except RankError:
            self.calling = None
            if self.rank == 0:
                # Other ranks may still have to read the error text from the store of this rank, or to finish an operation.
                time.sleep(_VERDICT if self.verdict or _stuck else _BEAT)
            raise
        except KeyboardInterrupt:
            self._say(f"rank {self.rank} was interrupted (Ctrl-C)")
            raise
        except BaseException as error:
            self._say(f"rank {self.rank} failed with {type(error).__name__}: {str(error).rstrip('.')}")
            raise
        finally:
            if self.signals:
                with self.lock:
                    self.signals = False
                signal.signal(signal.SIGINT, self.before)
            self.heart.worlds.remove(self)
            World._outer = None

    def _say(self, word: str) -> None:
        """Report an error text about this rank to the others."""
        self.word = word
        # Wait for two rounds of the heartbeat, since the first one may have begun before.
        told, end = self.heart.rounds + 2, time.monotonic() + _VERDICT
        while self.heart.rounds < told and not self.heart.lost and time.monotonic() < end:
            time.sleep(_BEAT / 5)

    def _press(self, number: int, frame: Any) -> None:
        """Handle SIGINT: end a callback for which the others no longer wait, or do what Ctrl-C does in this process.

        A process that ignores Ctrl-C (as a background job of a shell script does) or has a handler of its own keeps that
        behavior. Otherwise KeyboardInterrupt is raised: at once, or after the collective operation that this rank is executing,
        so that none remains unfinished.
        """
        if self.verdict:
            self._look()
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
        """Interrupt a callback for which the others no longer wait, as far as Python can."""
        with self.lock:
            if self.calling is not None and self.signals and hasattr(signal, "pthread_kill"):
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    @contextmanager
    def callback(self) -> Iterator[None]:
        """Context of a callback of the user, for whose end other ranks wait for a limited time."""
        if self.size == 1:
            yield
            return
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
        if self.size == 1 or self.left:
            return
        if _stuck:
            self._say(f"rank {self.rank} was interrupted (Ctrl-C)")
            raise RankError(f"rank {self.rank} was interrupted (Ctrl-C) while it waited for the others" + _REMEDY)
        self.pressed = time.monotonic()
        try:
            with self._exchange("interrupt"):
                pass
        except KeyboardInterrupt:
            if not self.left:
                self.interrupted()

    def _meet(self, act: str, *sizes: int) -> Tensor:
        """Compare the collective operations that the ranks are about to perform; return the first size of each rank.

        Raises:
            RankError: The operations differ, or some ranks were interrupted.
            KeyboardInterrupt: All ranks were interrupted.
        """
        codes = list(_ACTS)
        length, shape = (*sizes, 0, 0)[:2]
        said = self._told([self.number, codes.index(act), length, shape])
        if any(codes[row[1]] == "interrupt" for row in said):
            # Ctrl-C may be about to reach the other ranks as well.
            time.sleep(_PRESS)
            pressed = self._told([int(self.pressed > 0)])
            self.pressed = 0.0
            who = [str(rank) for rank, (flag,) in enumerate(pressed) if flag]
            if len(who) == self.size:
                self.left = True
                raise KeyboardInterrupt
            names = f"rank {who[0]} was" if len(who) == 1 else f"ranks {', '.join(who)} were"
            raise RankError(f"{names} interrupted (Ctrl-C), and the others were not" + _REMEDY)
        for rank, row in enumerate(said):
            alike = row[3] == said[0][3] and (act != "sum" or row[2] == said[0][2])
            if row[:2] != said[0][:2] or not alike:
                raise RankError(
                    f"rank {rank} is at another step than rank 0: in its call number {row[0]} it {_ACTS[codes[row[1]]]} "
                    f"({row[2]}), rank 0 in call number {said[0][0]} {_ACTS[codes[said[0][1]]]} ({said[0][2]}); "
                    "run the same script with the same settings on all ranks."
                )
        return torch.tensor([row[2] for row in said])

    def _told(self, numbers: list[int]) -> list[list[int]]:
        """Gather a list of integers from each rank."""
        mine = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        self._collect(lambda: dist.all_gather(parts, mine, async_op=True))
        return [part.tolist() for part in parts]

    @contextmanager
    def _exchange(self, act: str, *sizes: int) -> Iterator[Tensor]:
        """Context of a collective operation, after a comparison between the ranks; yield the first size of each rank.

        A Ctrl-C is raised after the operation, never between the comparison and the operation. Otherwise this rank would
        start the next comparison while the others wait in the operation.
        """
        self.busy = True
        try:
            yield self._meet(act, *sizes)
        finally:
            self.busy = False
        if self.pressed:
            raise KeyboardInterrupt

    def look(self) -> None:
        """Raise a RankError if another rank has failed; called during long computations."""
        if self.size > 1:
            self._look()

    def _look(self) -> None:
        """Raise a RankError if another rank has failed, or if the store does not answer."""
        if self.verdict:
            raise RankError(self.verdict + _REMEDY)
        holder = "rank 0, or the process that holds the store of the group, "
        if self.heart.lost:
            raise RankError(holder + "is gone" + _REMEDY)
        if time.monotonic() - self.heart.heard > self.patience:
            raise RankError(holder + "does not answer" + _REMEDY)

    def _collect(self, start: Callable[[], Any]) -> None:
        """Run a collective operation to its end while checking for failures of other ranks."""
        pause = 2e-5
        try:
            work = start()
            self.waiting = time.monotonic()
            while not work.is_completed():
                time.sleep(pause)
                pause = min(2 * pause, 0.02)
                self._look()
                if self.pressed and time.monotonic() - self.pressed > _PATIENCE:
                    raise KeyboardInterrupt
            work.wait()
        except (RankError, KeyboardInterrupt):
            _stuck.append(self.rank)
            raise
        except RuntimeError as error:
            # A connection has broken. The failed rank is known soon, by its error text or by a missing heartbeat.
            self.patience = _VERDICT
            end = time.monotonic() + 3 * _VERDICT
            while time.monotonic() < end:
                self._look()
                time.sleep(_BEAT)
            raise RankError(f"a connection between ranks broke ({error})" + _REMEDY) from None
        finally:
            self.waiting = None

    @classmethod
    def alone(cls) -> World:
        """A single rank, independent of any process group."""
        world = cls.__new__(cls)
        world.rank, world.size = 0, 1
        return world

    def added(self, sums: Moments) -> Moments:
        """Sum of the moments of all ranks, which must be about the same centers."""
        if self.size == 1:
            return sums
        parts = [sums.S0, sums.S1, sums.S2, sums.total, sums.mass]
        # A checksum of the centers has no variance between ranks if they are equal.
        place = sums.centres.sum() + (sums.centres * torch.arange(len(sums.centres)).to(sums.centres)[:, None]).mean()
        flat = self.sum(torch.cat([part.reshape(-1) for part in parts] + [place[None], place.square()[None]]))
        mean, square = flat[-2] / self.size, flat[-1] / self.size
        if not float((square - mean.square()).abs()) <= 1e-10 * float(square + 1e-300):
            places = self.tell(float(place))
            odd = next((rank for rank, other in enumerate(places) if other != places[0]), 0)
            raise RankError(f"rank {odd} is at another mixture than rank 0; all must do the same steps" + _REMEDY)
        pieces = flat[:-2].split([part.numel() for part in parts])
        S0, S1, S2, total, mass = (new.reshape(old.shape) for new, old in zip(pieces, parts, strict=True))
        return Moments(S0, S1, S2, sums.centres, total, mass)

    def merged(self, survey: Survey) -> Survey:
        """The merged surveys of all ranks."""
        if self.size == 1:
            return survey
        rows, numbers = survey.reservoir.parts()
        said = self.tell(
            [
                *(survey.rows, survey.mass, survey.squares, *survey.total, survey.fingerprint, survey.single),
                *(rows.shape[1], survey.reservoir.size, survey.reservoir.seen),
            ]
        )
        D = max(facts[7] for facts in said)
        all_rows = self.gather(rows.double().reshape(len(rows), D))
        all_numbers = self.gather(numbers.T.contiguous())
        reservoir = Reservoir(max(facts[8] for facts in said))
        single = all(facts[6] for facts in said)
        for part, columns, facts in zip(all_rows, all_numbers, said, strict=True):
            reservoir.merge(part.to(torch.float32 if single else torch.float64), columns.T, facts[9])
        sums = [sum(facts[i] for facts in said) for i in range(6)]
        return Survey(sums[0], sums[1], sums[2], (sums[3], sums[4]), sums[5] % (1 << 64), single, reservoir)

    def share(self, source: Source) -> Source:
        """The shard of this rank of a source.

        Data that are the same on all ranks (the same files, or equal arrays) are divided among them. Data that differ are the
        shards themselves, and their columns are matched by name to those of rank 0.
        """
        if self.size == 1:
            return source
        source = source.matched(self.tell(source.columns)[0])
        said = self.tell([source.identity(), source.rows])
        if said[0][0] is not None and said[0][1] and all(other == said[0] for other in said):
            return source.shared(self.rank, self.size)
        return source.shared(0, 1, first=sum(rows or 0 for _, rows in said[: self.rank]))

    def generator(self, given: torch.Generator | int | None, device: torch.device) -> torch.Generator:
        """A random number generator in the same state on all ranks: that of the given one on rank 0.

        If None is given, a fixed seed is used. Torch's global random state is not used or changed.

        Raises:
            TypeError: The argument is not a ``torch.Generator``.
        """
        generator = as_generator(given, device)
        if self.size > 1:
            state = self.gather_bytes(generator.get_state().numpy().tobytes())[0]
            generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
        return generator

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is true on any rank."""
        return list(flags) if self.size == 1 else (self.sum(torch.tensor(flags, dtype=torch.float64)) > 0).tolist()

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a float64 tensor over all ranks."""
        if self.size == 1:
            return values
        with self._exchange("sum", values.numel()):
            out = values.detach().to(self.device, copy=True)
            self._collect(lambda: dist.all_reduce(out, async_op=True))
        return out.to(values.device)

    def gather(self, values: Tensor) -> list[Tensor]:
        """Gather a tensor from each rank; they may differ in their first dimension."""
        if self.size == 1:
            return [values]
        kind = zlib.crc32(repr((values.dtype, tuple(values.shape[1:]))).encode())
        with self._exchange("gather", len(values), kind) as sizes:
            padded = torch.zeros(int(sizes.max()), *values.shape[1:], dtype=values.dtype, device=self.device)
            padded[: len(values)] = values
            parts = [torch.empty_like(padded) for _ in range(self.size)]
            self._collect(lambda: dist.all_gather(parts, padded, async_op=True))
        return [part[:size].to(values.device) for part, size in zip(parts, sizes.tolist(), strict=True)]

    def tell(self, value: Any) -> list[Any]:
        """Gather a value that JSON can represent from each rank."""
        if self.size == 1:
            return [value]
        return [json.loads(text) for text in self.gather_bytes(json.dumps(value).encode())]

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Gather bytes from each rank."""
        if self.size == 1:
            return [data]
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return [part.numpy().tobytes() for part in self.gather(flat)]

    def agree(self, facts: dict[str, Any]) -> None:
        """Raise a RankError that names the first rank, and the first of its facts, that differ from rank 0."""
        said = self.tell(facts)
        for rank, other in enumerate(said):
            for name, value in said[0].items():
                found = difference(other.get(name), value)
                if found is not None:
                    at = f"rank {rank} is at another mixture than rank 0: " if name == "start" else ""
                    raise RankError(
                        f"{at}rank {rank} disagrees with rank 0 on the {name}: {found[0]} and {found[1]}; "
                        "run the same script with the same settings on all ranks."
                    )


def difference(a: Any, b: Any) -> tuple[str, str] | None:
    """Return the difference between two facts, each as text, or None where they are equal.

    Args:
        a, b: Text or numbers; dictionaries of text, whose entry "class" is named beside the first one that differs; or lists
            of numbers of which the last is a tolerance for the others.
    """
    if a == b:
        return None
    if isinstance(a, dict) and isinstance(b, dict) and a["class"] == b["class"]:
        for key in dict.fromkeys([*a, *b]):
            if a.get(key) != b.get(key):
                return f"{a['class']} with {key}={a.get(key)}", f"{b['class']} with {key}={b.get(key)}"
        return None
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and all(isinstance(x, float) for x in a + b):
        *numbers, tolerance = zip(a, b, strict=True)
        if all(abs(x - y) <= max(tolerance) for x, y in numbers):
            return None
        return f"fingerprint {a[0]:.12g}", f"fingerprint {b[0]:.12g}"
    return _text(a), _text(b)


def _text(fact: Any) -> str:
    if not isinstance(fact, dict):
        return str(fact)
    return f"{fact['class']}({', '.join(f'{name}={value}' for name, value in fact.items() if name != 'class')})"
