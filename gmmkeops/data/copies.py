"""Copies of the chunks of a source to a GPU, while the kernels of the previous chunk run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from gmmkeops.data.batch import Batch

__all__ = ["Copied", "Copies"]


class Copied(NamedTuple):
    """A chunk on the device, and the event after which it is complete; None on a CPU."""

    batch: Batch
    ready: torch.cuda.Event | None


class Copies:
    """Copies of the chunks of one pass to a device.

    On a GPU, the copies and the conversion of the points have a stream of their own, and come from page-locked memory, without
    which the GPU cannot copy and compute at the same time. Torch keeps this memory for the next chunks, so that a pass needs
    that of two: one in use, and one that is prepared.

    Args:
        device: Device of the computation.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def sent(self, batch: Batch, prepare: Callable[[Batch], Batch]) -> Copied:
        """Begin to copy a chunk; called in the thread that loads the chunks.

        Args:
            batch: Points and weights.
            prepare: Function that copies a chunk to the device with ``non_blocking=True``, and converts it there.
        """
        if self.stream is None:
            return Copied(prepare(batch), None)
        if batch.points.device.type != "cpu":
            # The function of the user that returned them may have used the current stream.
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        points, weights = _locked(batch.points), None if batch.weights is None else _locked(batch.weights)
        with torch.cuda.stream(self.stream):
            found = prepare(replace(batch, points=points, weights=weights))
            ready = self.stream.record_event()
        for tensor in (batch.points, batch.weights):
            if tensor is not None and tensor.is_cuda:
                # The memory of tensors of the user must not be used again before they have been read here.
                tensor.record_stream(self.stream)
        return Copied(found, ready)

    def received(self, copied: Copied) -> Batch:
        """Return a chunk; the current stream waits until it is complete, and the calling thread does not."""
        if copied.ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied.ready)
            # The memory of the chunk must not be used again before the kernels of the current stream have read it.
            for tensor in (copied.batch.points, copied.batch.weights, copied.batch.context):
                if isinstance(tensor, Tensor):
                    tensor.record_stream(current)
        return copied.batch


def _locked(tensor: Tensor) -> Tensor:
    """Copy a tensor on the CPU to page-locked memory."""
    return tensor.pin_memory() if tensor.device.type == "cpu" else tensor
