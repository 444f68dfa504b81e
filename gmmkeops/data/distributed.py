"""Fits on several processes: sufficient statistics are added over all ranks of ``torch.distributed``, and failures are detected.

This module is used only if a process group is initialized. Each rank computes the E-step of its shard of the points. Moments and
counts are all-reduced, so that all ranks compute the same M-step. If a rank fails, hangs or runs with other settings, all ranks
raise an error that names it.
"""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gmmkeops.components import Moments
from gmmkeops.data.collectives import REMEDY, Collectives, RankError
from gmmkeops.data.generators import as_generator
from gmmkeops.data.source import Source
from gmmkeops.data.survey import Reservoir, Survey

__all__ = ["RankError", "World", "join"]


def join(backend: str | None = None) -> None:
    """Initialize the process group of ``torchrun``; without torchrun, do nothing.

    Each restart of the workers uses a new store prefix, because restarted ranks of torch 2.13 would otherwise try to connect to
    the addresses of the previous ones.

    Args:
        backend: ``"gloo"`` or ``"nccl"``; None for ``"nccl"`` if each process of a machine has a CUDA device of its own, else
            ``"gloo"``, since NCCL does not allow two processes to use one device. Devices are assigned in the order of the
            processes.

    Raises:
        RuntimeError, ValueError: Raised by :mod:`torch.distributed` if the group cannot be joined.

    Example:
        >>> import gmmkeops as gk
        >>> gk.distributed.join()  # not started by torchrun: nothing happens
    """
    if "RANK" not in os.environ or dist.is_initialized():
        return
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if devices:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % devices)
    store, rank, size = next(iter(dist.rendezvous("env://")))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"gmmkeops attempt {attempt}", store)
    if backend is None:
        enough = dist.is_nccl_available() and int(os.environ.get("LOCAL_WORLD_SIZE", size)) <= devices
        # The machines may have different numbers of devices, but all ranks need the same backend.
        store.set(f"own device {rank}", str(enough))
        backend = "nccl" if all(store.get(f"own device {r}") == b"True" for r in range(size)) else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


class World:
    """Process group of the ranks that fit one model; a single rank if none is initialized.

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

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self.collectives: Collectives | None = None
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        if self.size > 1:
            # Nested calls share the state of the outermost call.
            self.collectives = Collectives.outer or Collectives()

    def together(self) -> AbstractContextManager[None]:
        """Run a call on all ranks; this context raises failures of other ranks and reports exceptions to them."""
        return nullcontext() if self.collectives is None else self.collectives.call()

    def callback(self) -> AbstractContextManager[None]:
        """Run a user callback: the other ranks wait for the end of this context for a limited time."""
        return nullcontext() if self.collectives is None else self.collectives.callback()

    def interrupted(self) -> None:
        """Handle Ctrl-C: return if all ranks were interrupted, so that they stop at the same iteration.

        Raises:
            RankError: Only some ranks were interrupted; the message names them on all ranks.
        """
        if self.collectives is not None:
            self.collectives.interrupted()

    def look(self) -> None:
        """Raise a RankError if another rank has failed; called during long computations."""
        if self.collectives is not None:
            self.collectives.check()

    @classmethod
    def alone(cls) -> World:
        """Return a single rank that does not belong to a process group."""
        world = cls.__new__(cls)
        world.rank, world.size, world.collectives = 0, 1, None
        return world

    def added(self, sums: Moments) -> Moments:
        """Sum the moments of all ranks, which must have the same centers."""
        if self.size == 1:
            return sums
        parts = [sums.S0, sums.S1, sums.S2, sums.total, sums.mass]
        # If the centers are equal on all ranks, the variance of their checksums is zero.
        place = sums.centers.sum() + (sums.centers * torch.arange(len(sums.centers)).to(sums.centers)[:, None]).mean()
        flat = self.sum(torch.cat([part.reshape(-1) for part in parts] + [place[None], place.square()[None]]))
        mean, square = flat[-2] / self.size, flat[-1] / self.size
        if not float((square - mean.square()).abs()) <= 1e-10 * float(square + 1e-300):
            places = self.tell(float(place))
            odd = next((rank for rank, other in enumerate(places) if other != places[0]), 0)
            raise RankError(f"rank {odd} has another mixture than rank 0; run the same steps on all ranks" + REMEDY)
        pieces = flat[:-2].split([part.numel() for part in parts])
        S0, S1, S2, total, mass = (new.reshape(old.shape) for new, old in zip(pieces, parts, strict=True))
        return Moments(S0, S1, S2, sums.centers, total, mass)

    def merged(self, survey: Survey) -> Survey:
        """Merge the surveys of all ranks."""
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
        """Return the shard of this rank of a source.

        Identical inputs (the same files, or equal arrays) are sharded across the ranks. Different inputs are treated as the shard
        of each rank, and their columns are matched by name to those of rank 0.
        """
        if self.size == 1:
            return source
        source = source.matched(self.tell(source.columns)[0])
        said = self.tell([source.identity(), source.rows])
        if said[0][0] is not None and said[0][1] and all(other == said[0] for other in said):
            return source.shared(self.rank, self.size)
        return source.shared(0, 1, first=sum(rows or 0 for _, rows in said[: self.rank]))

    def generator(self, given: torch.Generator | int | None, device: torch.device) -> torch.Generator:
        """Return a random number generator with the same state on all ranks: that of the generator on rank 0.

        None uses a fixed seed. Torch's global random state is neither used nor changed.

        Raises:
            TypeError: The argument is neither a generator, a seed nor None.
        """
        generator = as_generator(given, device)
        if self.size > 1:
            state = self.gather_bytes(generator.get_state().numpy().tobytes())[0]
            generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
        return generator

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is true on any rank."""
        if self.size == 1:
            return list(map(bool, flags))
        return (self.sum(torch.tensor(flags, dtype=torch.float64)) > 0).tolist()

    def sum(self, values: Tensor) -> Tensor:
        """Sum a float64 tensor over all ranks."""
        return values if self.collectives is None else self.collectives.sum(values)

    def gather(self, values: Tensor) -> list[Tensor]:
        """Gather a tensor from each rank; the tensors may differ in their first dimension."""
        return [values] if self.collectives is None else self.collectives.gather(values)

    def tell(self, value: Any) -> list[Any]:
        """Gather a JSON-serializable value from each rank."""
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
        """Raise a RankError for the first rank with a fact (an entry of the dictionary) that differs from that of rank 0."""
        said = self.tell(facts)
        for rank, other in enumerate(said):
            for name, value in said[0].items():
                found = difference(other.get(name), value)
                if found is not None:
                    at = f"rank {rank} has another mixture than rank 0: " if name == "start" else ""
                    raise RankError(
                        f"{at}rank {rank} disagrees with rank 0 on the {name}: {found[0]} and {found[1]}; "
                        "run the same script with the same settings on all ranks."
                    )


def difference(a: Any, b: Any) -> tuple[str, str] | None:
    """Return descriptions of two facts if they differ, else None.

    Args:
        a, b: Strings or numbers; dictionaries of strings, described by their entry "class" and the first entry that differs; or
            lists of numbers, the last of which is the tolerance of the others.
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
