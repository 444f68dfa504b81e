"""Times of the engines on this machine, beside the choice of ``backend="auto"``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from gmmkeops import reductions
from gmmkeops.components import DiagonalFactor, Factor, FullFactor

__all__ = ["Row", "problem", "race", "seconds_of"]

# Numbers of features of full and of diagonal factors.
_FULL, _DIAGONAL = (2, 3, 8, 16, 32), (8, 32, 64)

# Ratio of times from which another engine is recommended; smaller differences may be noise.
_CLEARLY = 1.1

# Numbers of points and components on a CPU and on other devices.
_CPU, _DEVICE = (50_000, 30), (1_000_000, 1000)

# Largest number of features for which KeOps compiles formulas here, and time after which a call is not repeated, seconds.
_KEOPS, _LONG = 16, 1.0


@dataclass(frozen=True)
class Row:
    """Times of one kind of problem.

    Args:
        device: Type of the device.
        full: Whether the factors are matrices.
        features, points, components: Numbers D, N and K.
        chosen: Name of the engine that ``backend="auto"`` uses.
        seconds: Wall time of the moments of all points by each engine, after a first call.
        failures: Reason why an engine was not timed, one clause.
    """

    device: str
    full: bool
    features: int
    points: int
    components: int
    chosen: str
    seconds: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def fastest(self) -> str:
        """Name of the fastest engine; that of the chosen one if none was timed."""
        return min(self.seconds, key=self.seconds.__getitem__, default=self.chosen)

    def __str__(self) -> str:
        times = ", ".join(f"{name} {1e3 * value:.3g} ms" for name, value in self.seconds.items())
        kind = "full" if self.full else "diag"
        slower = self.seconds and self.seconds.get(self.chosen, math.inf) > _CLEARLY * self.seconds[self.fastest]
        note = f"; {self.fastest} is faster here: pass backend={self.fastest!r}" if slower else ""
        note += "".join(f"; {name}: {reason}" for name, reason in self.failures.items())
        return (
            f"{self.device:<5}{kind:<5}D={self.features:<4}{self.points} x {self.components}: {times}; "
            f"auto uses {self.chosen}{note}"
        )


def problem(
    points: int, components: int, features: int, full: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Factor]:
    """Make points around random means, and the arguments of a reduction; float32."""
    generator = torch.Generator().manual_seed(0)
    means = 3 * torch.randn(components, features, generator=generator)
    x = means[torch.randint(components, (points,), generator=generator)]
    x = x + torch.randn(points, features, generator=generator)
    shape = torch.eye(features).expand(components, features, features) if full else torch.ones(components, features)
    factor: Factor = (FullFactor if full else DiagonalFactor).from_factors(shape.contiguous())
    return x.to(device), torch.zeros(components, device=device), means.to(device), factor.to(device)


def seconds_of(call: Callable[[], Any]) -> float:
    """Return the shortest wall time of three calls, or of fewer long ones, after a first call.

    The call must wait for the device.
    """
    began = time.perf_counter()
    call()
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - began > _LONG:
            break
    return best


def race(devices: list[torch.device] | None = None, size: tuple[int, int] | None = None) -> Iterator[Row]:
    """Time all engines on all devices of this machine; yield a row for each kind of problem.

    Args:
        devices: Devices; None for the CPU and the current CUDA device if there is one.
        size: Numbers of points and components; None for ordinary ones.

    Example:
        >>> import torch
        >>> from gmmkeops.cli.race import race
        >>> row = next(race([torch.device("cpu")], (100, 3)))
        >>> row.features, row.chosen in row.seconds
        (2, True)
    """
    if devices is None:
        devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    for device in devices:
        points, components = size or (_CPU if device.type == "cpu" else _DEVICE)
        for full, dimensions in ((True, _FULL), (False, _DIAGONAL)):
            for features in dimensions:
                yield _row(problem(points, components, features, full, device))


def _row(arguments: tuple[torch.Tensor, torch.Tensor, torch.Tensor, Factor]) -> Row:
    x, _, means, factor = arguments
    full = isinstance(factor, FullFactor)
    found = Row(x.device.type, full, x.shape[1], len(x), len(means), reductions.engine(x, full=full))
    for name in reductions.BACKENDS[1:]:
        if name == "keops" and x.shape[1] > _KEOPS and found.chosen != name:
            found.failures[name] = f"its formulas are compiled for at most {_KEOPS} features here"
            continue
        if (reason := reductions.unavailable(name, x, full=full)) is not None:
            found.failures[name] = reason
            continue
        try:
            found.seconds[name] = seconds_of(
                lambda name=name: float(reductions.moments(*arguments, backend=name, truncate=0).total)  # type: ignore[misc]
            )
        except RuntimeError as error:
            found.failures[name] = str(error).splitlines()[0]
        if (reason := reductions.unavailable(name, x, full=full)) is not None:
            # It failed or was wrong during these calls, and another engine has replaced it.
            found.failures[name] = reason
            found.seconds.pop(name, None)
    return found
