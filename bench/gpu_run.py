"""Settings, problems and times of the questions of bench/gpu.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Settings of a run.

    Args:
        device: Type of the device.
        quick: Whether to use small sizes.
        until: Time, by ``time.perf_counter``, after which no further question is begun.
    """

    device: str
    quick: bool
    until: float

    def size(self, points: int, components: int) -> tuple[int, int]:
        """Numbers of points and components: those given, or small ones."""
        return (min(points, 2000), min(components, 8)) if self.quick else (points, components)

    def synchronize(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    @property
    def engines(self) -> tuple[str, ...]:
        """Names of the engines that can run on the device."""
        import torch

        from gmmkeops import reductions

        x = torch.zeros(1, 2, device=self.device)
        return tuple(name for name in reductions.BACKENDS[1:] if reductions.unavailable(name, x) is None)


def timed(run: Run, call: Callable[[], Any]) -> float:
    """Return the wall time of a call and of the work that it has queued, seconds."""
    from gmmkeops.cli.race import seconds_of

    def waiting() -> None:
        call()
        run.synchronize()

    return seconds_of(waiting)


def problem(run: Run, N: int, K: int, D: int, family: str = "full", seed: int = 0) -> tuple[Any, ...]:
    """Return points, offsets, means and factors of random components, each with a covariance of its own."""
    import torch

    import gmmkeops as gk

    N, K = run.size(N, K)
    generator, there = (torch.Generator(device).manual_seed(seed) for device in ("cpu", run.device))
    means = 3 * torch.randn(K, D, generator=generator)
    x = means.to(run.device)[torch.randint(K, (N,), generator=there, device=run.device)]
    x += torch.randn(N, D, generator=there, device=run.device)
    kind, tied = gk.components.factor_class(family)
    lead = 1 if tied else K
    scale = 0.7 + 0.6 * torch.rand(lead, 1, generator=generator)
    if kind is gk.FullFactor:
        upper = torch.randn(lead, D, D, generator=generator).triu(1) * (0.3 / D**0.5)
        values = upper + torch.diag_embed(scale * (0.8 + 0.4 * torch.rand(lead, D, generator=generator)))
    else:
        values = scale * (0.8 + 0.4 * torch.rand(lead, D, generator=generator))
        values = values if kind is gk.DiagonalFactor else values[:, 0]
    factor = kind.from_factors(values) if kind is gk.FullFactor else kind.from_covariances(values**-2, features=D)
    offsets = torch.randn(K, generator=generator) + factor.log_determinant()
    return tuple(part.to(run.device) for part in (x, offsets, means, factor))
