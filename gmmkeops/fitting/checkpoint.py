"""Checkpoints: the state of a fit in a file, from which it resumes after a crash, also with another number of ranks.

Files are safetensors with a JSON tree in the header and a digest. They are replaced atomically, and the previous file is kept.
Partial sums of an unfinished pass over a source are in a small file of each rank. Reading creates only plain values and instances
of a few registered classes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmmkeops._checks import as_number
from gmmkeops.components import Moments, families
from gmmkeops.data import World
from gmmkeops.fitting.data import Ledger
from gmmkeops.models import Mixture, unused_name, write_whole

__all__ = ["Checkpoint", "Journal", "known"]

_FORMAT, _VERSION = "gmmkeops.checkpoint", 2

# How a header of ours may begin: its entries come in any order, and the file may be cut short within the first of them.
_HEADS = (f'"format":"{_FORMAT}"', '"version":"', '"digest":"', '"tree":"{')

_logger = logging.getLogger("gmmkeops")

_CLASSES: dict[str, type] = {}


def known(name: str) -> Callable[[type], type]:
    """Class decorator that registers a dataclass for checkpoints, under a name."""

    def mark(cls: type) -> type:
        _CLASSES[name] = cls
        return cls

    return mark


known("Moments")(Moments)


@dataclass(frozen=True)
class Checkpoint:
    """File to which a fit writes its state, and from which it resumes.

    A fit that finds a checkpoint of the same fit resumes from it: data, weights, initial mixture, method, penalty, seed of the
    generator, truncation, backend and dtype must be the same, while ``max_iter``, tolerances and ``patience`` may differ.
    Functions (a penalty of your own, an optimizer factory) are compared by their code and by the values that they use. The
    file remains after the end of the fit: the same call then returns the same result at once, or resumes with a larger
    ``max_iter``. Delete the file to start a new fit.

    Existing files with these names that are not checkpoints are never replaced. If a checkpoint cannot be written (a full disk, a
    removed folder), a warning is raised and the fit continues.

    Args:
        path: The file. The previous checkpoint is kept as ``<path>.previous``, and partial sums of an unfinished pass over a
            source as ``<path>.part0`` and so on, one for each rank.
        every: Seconds between two writes.

    Raises:
        TypeError: The path is neither text nor a path.
        ValueError: ``every`` is negative.

    Example:
        >>> import os, tempfile, torch, gmmkeops as gk
        >>> x = torch.linspace(-1, 1, 100).double()[:, None]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     keep = gk.Checkpoint(os.path.join(folder, "fit.ckpt"), every=0)
        ...     first = gk.fit(gk.initialise(x, 2), x, gk.EM(tol=0), max_iter=3, checkpoint=keep)
        ...     more = gk.fit(gk.initialise(x, 2), x, gk.EM(tol=0), max_iter=5, checkpoint=keep)  # resumes
        >>> first.n_iter, more.n_iter
        (3, 5)
    """

    path: str | os.PathLike[str]
    every: float = 60.0

    def __post_init__(self) -> None:
        if not isinstance(self.path, (str, os.PathLike)):
            raise TypeError(
                f"checkpoint must be the name of a file or a Checkpoint, got {type(self.path).__name__}; pass text or a path."
            )
        as_number(self.every, "every", 0, clause="must not be negative, in seconds")

    @classmethod
    def of(cls, value: Any) -> Checkpoint | None:
        """Convert a path to a checkpoint; checkpoints and None are returned unchanged."""
        return value if value is None or isinstance(value, Checkpoint) else cls(value)

    @property
    def _previous(self) -> Path:
        return Path(f"{os.fspath(self.path)}.previous")

    def part(self, rank: int) -> Path:
        """File for the partial sums of a rank in an unfinished pass."""
        return Path(f"{os.fspath(self.path)}.part{rank}")

    def write(self, tree: Any) -> None:
        """Write a state and keep the last one as the previous one; at any time one of the files is complete."""
        path = Path(self.path)
        data = _bytes(tree)
        if path.exists():
            # A second name for the file, which then replaces the previous one.
            try:
                _, spare = unused_name(self._previous, lambda name: os.link(path, name))
            except OSError:
                # Without hard links, only the previous file exists until the new one is written.
                os.replace(path, self._previous)
            else:
                try:
                    os.replace(spare, self._previous)
                finally:
                    # Renaming one name of a file to another of the same does nothing.
                    spare.unlink(missing_ok=True)
        write_whole(path, data)

    def check(self, rank: int) -> None:
        """Check that the files of a rank can be written, and would not replace other files.

        Raises:
            FileNotFoundError: The folder does not exist.
            PermissionError: The folder cannot be written to.
            ValueError: A file that is not a checkpoint would be replaced.
        """
        path = Path(self.path)
        if rank == 0:
            if path.is_dir():
                raise ValueError(
                    f"checkpoint must be the path of a file, got the folder {path}; add a file name to it."
                )
            if not path.parent.is_dir():
                raise FileNotFoundError(
                    f"there is no folder {path.parent} for the checkpoint {path.name}; make it first."
                )
            if not os.access(path.parent, os.W_OK):
                raise PermissionError(
                    f"the folder {path.parent} of the checkpoint {path.name} cannot be written to; choose another one."
                )
        for name in (path, self._previous, self.part(rank)) if rank == 0 else (self.part(rank),):
            try:
                ours = not name.exists() or _ours(name)
            except OSError as error:
                raise ValueError(f"{name} cannot be read ({error.strerror}); choose another path for it.") from None
            if not ours:
                raise ValueError(
                    f"{name} is no checkpoint, but would be replaced by one; move it away, or choose another path."
                )

    def read(self, device: Any, world: World) -> Any:
        """Read the last complete state on rank 0 and send it to all ranks; None if there is no file.

        Raises:
            ValueError: There are files, but none is complete; or as :meth:`check`.
        """
        self.check(world.rank)
        data = b""
        if world.rank == 0:
            troubles = []
            for path in (Path(self.path), self._previous):
                if not path.exists():
                    continue
                try:
                    data = path.read_bytes()
                    _tree(data, "cpu")
                    break
                except (ValueError, OSError) as error:
                    _logger.warning("%s is damaged (%s); looking for the one before", path, error)
                    troubles.append(f"{path} ({error})")
                    data = b""
            if troubles and not data:
                raise ValueError(f"no checkpoint is whole: {', '.join(troubles)}; delete them to begin anew.")
        data = world.gather_bytes(data)[0]
        return _tree(data, device) if data else None


class Journal:
    """State of a fit that is written to its checkpoint during an iteration; does nothing without a checkpoint.

    Args:
        checkpoint: The checkpoint, or None.
        world: The ranks; rank 0 writes the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint | None, world: World) -> None:
        self.checkpoint, self.world = checkpoint, world
        self.last = time.monotonic()
        # Description of the order of the rows and of the chunk size, for which partial sums are valid.
        self.layout = ""
        # State at the beginning of the current iteration, and the results of its finished passes.
        self.snapshot: Any = None
        self.written = False
        self.iteration = 0
        self.finished: list[Moments] = []
        # Results from a checkpoint that have not been used yet.
        self.replay: list[Moments] = []
        self.partial: Any = None
        self.inside: Any = None
        # Error numbers of failed writes, each of which causes one warning.
        self.causes: set[int | None] = set()

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        return self.checkpoint is not None and time.monotonic() - self.last >= self.checkpoint.every

    def begin(self, iteration: int, snapshot: Callable[[], Any]) -> None:
        """Store the state at the beginning of an iteration."""
        if self.checkpoint is not None:
            self.iteration, self.snapshot, self.written = iteration, snapshot(), False
            self.finished = list(self.replay)

    def write(self, inside: Any = None) -> None:
        """Write the state at the beginning of the iteration, its finished passes, and the state within a pass."""
        checkpoint = self.checkpoint
        if checkpoint is None or self.snapshot is None:
            return
        if self.world.rank == 0:
            # The state within a pass that was read remains valid until it is used.
            inside = self.inside if inside is None else inside
            tree = {**self.snapshot, "finished": self.finished, "inside": inside, "ranks": self.world.size}
            tree["layout"] = self.layout
            self.written = self._tried(Path(checkpoint.path), lambda: checkpoint.write(tree))
        else:
            self.written = True
        self.last = time.monotonic()

    def _tried(self, path: Path, write: Callable[[], None]) -> bool:
        """Try to write, and return whether it succeeded; a failure causes a warning, once for each cause."""
        try:
            write()
        except OSError as error:
            if error.errno not in self.causes:
                self.causes.add(error.errno)
                warnings.warn(
                    f"the checkpoint {path} could not be written ({error.strerror or error}); the fit goes on, and tries again "
                    "at each further checkpoint.",
                    UserWarning,
                    stacklevel=4,
                )
            return False
        return True

    def agreed(self, tree: Any, device: Any) -> Any:
        """Return the value of rank 0 on all ranks."""
        return tree if self.world.size == 1 else _tree(self.world.gather_bytes(_bytes(tree))[0], device)

    def recall(self, saved: Any, device: Any) -> None:
        """Restore finished passes, and the state within a pass if the ranks and the order of the rows are the same."""
        if self.checkpoint is None:
            return
        self.iteration, self.replay = saved["iteration"], list(saved["finished"])
        if saved["ranks"] != self.world.size or saved["layout"] != self.layout:
            return
        self.inside = saved["inside"]
        path = self.checkpoint.part(self.world.rank)
        if path.exists():
            try:
                part = _tree(path.read_bytes(), device)
            except (ValueError, OSError) as error:
                _logger.warning("%s is damaged (%s); this sweep begins anew", path, error)
                return
            if part["place"] == [self.iteration, len(self.replay), self.world.size, saved["mark"], self.layout]:
                self.partial = part

    def swept(self, sums: Moments) -> None:
        """Store the result of a finished pass of this iteration."""
        if self.checkpoint is not None:
            self.finished.append(sums)
            self.written = False

    def resumed(self) -> tuple[Moments | None, Ledger, int]:
        """Partial sums, ledger and number of pieces from which this pass resumes."""
        part, self.partial = self.partial, None
        return (None, Ledger(), 0) if part is None else (part["sums"], Ledger(*part["ledger"]), part["pieces"])

    def tick(self, sums: Moments, ledger: Ledger, pieces: int) -> None:
        """Write the partial sums of a pass over a source if a write is due."""
        if not self.due or self.checkpoint is None or self.snapshot is None:
            return
        if not self.written:
            self.write()
        place = [self.iteration, len(self.finished), self.world.size, self.snapshot["mark"], self.layout]
        tree = {"place": place, "sums": sums, "ledger": ledger.numbers, "pieces": pieces}
        path = self.checkpoint.part(self.world.rank)
        self._tried(path, lambda: write_whole(path, _bytes(tree)))
        self.last = time.monotonic()


def _bytes(tree: Any) -> bytes:
    from safetensors.torch import save as serialise

    tensors: list[Tensor] = []
    header = json.dumps(_plain(tree, tensors))
    named = {f"t{i}": tensor.detach().cpu().contiguous().clone() for i, tensor in enumerate(tensors)}
    meta = {"format": _FORMAT, "version": str(_VERSION), "tree": header, "digest": _digest(header, named)}
    return serialise(named or {"none": torch.zeros(0)}, meta)


def _ours(path: Path) -> bool:
    """Whether a file is a checkpoint, damaged or not; an empty one, which a power cut may leave, counts as one."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(8)
        header = file.read(min(int.from_bytes(head, "little"), path.stat().st_size))
    try:
        found = json.loads(header)
    except ValueError:
        text = header[:64].decode("utf-8", "replace")
        return not head or text.startswith(tuple(f'{{"__metadata__":{{{key}' for key in _HEADS))
    metadata = found.get("__metadata__") if isinstance(found, dict) else None
    return isinstance(metadata, dict) and metadata.get("format") == _FORMAT


def _digest(header: str, tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        found.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes() if tensors[name].numel() else b"")
    return found.hexdigest()


def _tree(data: bytes, device: Any) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        size = int.from_bytes(data[:8], "little")
        meta = json.loads(data[8 : 8 + size])["__metadata__"]
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"it is not a whole safetensors file: {error}") from None
    if meta.get("format") != _FORMAT:
        raise ValueError("it is no checkpoint")
    if meta.get("version") != str(_VERSION):
        raise ValueError("it was written by another version of gmmkeops")
    tensors.pop("none", None)
    if _digest(meta["tree"], tensors) != meta["digest"]:
        raise ValueError("its digest does not match what it holds")
    return _value(json.loads(meta["tree"]), tensors, device)


def _plain(value: Any, tensors: list[Tensor]) -> Any:
    """A value as JSON has it; tensors are numbered."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_plain(item, tensors) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_plain(key, tensors), _plain(item, tensors)] for key, item in value.items()]}
    if isinstance(value, Mixture):
        name, features = value.factor.family, value.features
        parts = {"logits": value.logits, "means": value.means, **value.factor.tensors}
        return {"Mixture": [name, features, _plain(parts, tensors)]}
    for name, cls in _CLASSES.items():
        if type(value) is cls and is_dataclass(value):
            return {name: [_plain(getattr(value, field.name), tensors) for field in fields(value)]}
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}.")


def _value(plain: Any, tensors: dict[str, Tensor], device: Any) -> Any:
    if not isinstance(plain, dict):
        return plain
    (name, content), *more = plain.items()
    if more:
        raise ValueError("its tree is malformed")
    if name == "tensor":
        return tensors[f"t{int(content)}"].to(device)
    if name == "Mixture":
        name, features, parts = content
        parts = _value(parts, tensors, device)
        logits, means = parts.pop("logits"), parts.pop("means")
        factor = families()[name].of(parts, features)
        return Mixture(logits, means, factor, validate_args=False)
    if name == "dict":
        return {_value(key, tensors, device): _value(item, tensors, device) for key, item in content}
    items = [_value(item, tensors, device) for item in content]
    if name in ("list", "tuple"):
        return items if name == "list" else tuple(items)
    if name in _CLASSES:
        return _CLASSES[name](*items)
    raise ValueError(f"its tree names an unknown class {name!r}")
