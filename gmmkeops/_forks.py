"""Computations in forked processes, in which torch's OpenMP threads do not exist although OpenMP waits for them.

A forked process is a copy of one thread alone. Where the parent has used several threads, the first parallel operation of
torch in the child would wait for the others forever (a limit of GNU's OpenMP; workers of torch's DataLoader compute on one
thread for the same reason).
"""

from __future__ import annotations

import os

import torch

__all__ = ["mind_fork"]

_forked = False


def _mark() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark)


def mind_fork() -> None:
    """Restrict torch to one thread in a process that has been forked from one with this package, once."""
    global _forked
    if _forked:
        _forked = False
        torch.set_num_threads(1)
