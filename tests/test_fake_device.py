"""The fake device of the tests refuses what CUDA refuses."""

from __future__ import annotations

import pytest
import torch
from fake_device import fake_device, on_device


def generator(seed=0):
    """A generator of the CPU, as most people have."""
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("mixed tensors", lambda x: x + torch.ones(3, dtype=torch.float64)),
        ("mixed factors", lambda x: torch.cat([x, torch.zeros(1, 3, dtype=torch.float64)])),
        ("a generator of the host", lambda x: torch.randn(3, device=x.device, generator=generator())),
        ("a generator of the device", lambda x: torch.randn(3, generator=torch.Generator("cuda"))),
        ("numpy", lambda x: x.numpy()),
        ("an index on the device of a host tensor", lambda x: torch.zeros(3)[(x[:, 0] > 0).long()]),
    ],
)
def test_the_fake_device_refuses(monkeypatch, name, broken):
    with fake_device(monkeypatch), pytest.raises((RuntimeError, TypeError)):
        broken(on_device(torch.zeros(4, 3, dtype=torch.float64)))


@pytest.mark.parametrize("deterministic", [True], indirect=True)
@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.median(0),
        lambda x: x.kthvalue(2, 0),
        lambda x: x.cumsum(0),
        lambda x: x.histc(5),
        lambda x: torch.bincount((x > 0.5).long(), weights=x),
        lambda x: torch.multinomial(x, 5, replacement=True),
    ],
)
def test_the_fake_device_has_no_deterministic(monkeypatch, operation, deterministic):
    with fake_device(monkeypatch), pytest.raises(RuntimeError, match="deterministic"):
        operation(on_device(torch.rand(10, generator=generator())))
