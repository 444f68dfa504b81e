"""Checkpoint files, from which interrupted fits resume."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gmmkeops._checks import as_number
from gmmkeops.data import World
from gmmkeops.fitting.state_file import FORMAT, state_bytes, state_of
from gmmkeops.models import unused_name, write_whole

__all__ = ["Checkpoint"]

_logger = logging.getLogger("gmmkeops")

# Possible beginnings of the header of a checkpoint: its entries have no fixed order, and the file may be truncated.
_HEADS = (f'"format":"{FORMAT}"', '"version":"', '"digest":"', '"tree":"{')


@dataclass(frozen=True)
class Checkpoint:
    """File to which a fit writes its state, and from which it resumes.

    If the file exists, the fit resumes from it. Data, weights, initial mixture, method, penalty, seed of the generator,
    truncation, backend and dtype must be the same; ``max_iter``, tolerances and ``patience`` may differ. Functions (such as a
    custom penalty or an optimizer factory) are compared by their code and by the values that they use. The file is not deleted at
    the end of the fit: the same call then returns the same result immediately, or resumes with a larger ``max_iter``. Delete the
    file to start a new fit.

    Existing files that are not checkpoints are never replaced. If a checkpoint cannot be written (for example because the disk is
    full), a warning is issued and the fit continues.

    Args:
        path: Path of the file. The previous checkpoint is kept as ``<path>.previous``, and partial sums of an unfinished pass
            over a source as ``<path>.part0`` and so on, one per rank.
        every: Minimum time between two writes, seconds.

    Raises:
        TypeError: The path is neither a string nor a path.
        ValueError: ``every`` is negative.

    Example:
        >>> import os, tempfile, torch, gmmkeops as gk
        >>> x = torch.linspace(-1, 1, 100).double()[:, None]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     keep = gk.Checkpoint(os.path.join(folder, "fit.ckpt"), every=0)
        ...     first = gk.fit(gk.initialize(x, 2), x, gk.EM(tol=0), max_iter=3, checkpoint=keep)
        ...     more = gk.fit(gk.initialize(x, 2), x, gk.EM(tol=0), max_iter=5, checkpoint=keep)  # resumes
        >>> first.n_iter, more.n_iter
        (3, 5)
    """

    path: str | os.PathLike[str]
    every: float = 60.0

    def __post_init__(self) -> None:
        if not isinstance(self.path, (str, os.PathLike)):
            raise TypeError(
                f"checkpoint must be a path or a Checkpoint, got {type(self.path).__name__}; pass the path of a file."
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
        """Return the path of the file with the partial sums of a rank in an unfinished pass."""
        return Path(f"{os.fspath(self.path)}.part{rank}")

    def write(self, tree: Any) -> None:
        """Write a state, and keep the last file as the previous one. At any time at least one of both files is complete."""
        path = Path(self.path)
        data = state_bytes(tree)
        if path.exists():
            # A hard link to the current file replaces the previous one.
            try:
                _, spare = unused_name(self._previous, lambda name: os.link(path, name))
            except OSError:
                # On file systems without hard links, only the previous file exists until the new one is written.
                os.replace(path, self._previous)
            else:
                try:
                    os.replace(spare, self._previous)
                finally:
                    # Renaming a link to another link of the same file does nothing, so the spare link is deleted.
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
                raise ValueError(f"checkpoint must be the path of a file, got the folder {path}; append a file name.")
            if not path.parent.is_dir():
                raise FileNotFoundError(
                    f"the folder {path.parent} of the checkpoint {path.name} does not exist; create it first."
                )
            if not os.access(path.parent, os.W_OK):
                raise PermissionError(
                    f"the folder {path.parent} of the checkpoint {path.name} is not writable; choose another one."
                )
        for name in (path, self._previous, self.part(rank)) if rank == 0 else (self.part(rank),):
            try:
                ours = not name.exists() or _ours(name)
            except OSError as error:
                raise ValueError(f"{name} cannot be read ({error.strerror}); choose another path for it.") from None
            if not ours:
                raise ValueError(
                    f"{name} is not a checkpoint and would be overwritten by one; move it, or choose another path."
                )

    def read(self, device: Any, world: World) -> Any:
        """Read the last complete state on rank 0 and send it to all ranks; None if there is no file.

        Raises:
            ValueError: All files are damaged; or as :meth:`check`.
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
                    state_of(data, "cpu")
                    break
                except (ValueError, OSError) as error:
                    _logger.warning("the checkpoint %s is damaged (%s); trying the previous one", path, error)
                    troubles.append(f"{path} ({error})")
                    data = b""
            if troubles and not data:
                raise ValueError(
                    f"all checkpoint files are damaged: {', '.join(troubles)}; delete them to start a new fit."
                )
        data = world.gather_bytes(data)[0]
        return state_of(data, device) if data else None


def _ours(path: Path) -> bool:
    """Return whether a file is a checkpoint, possibly damaged. Empty files, which a power failure may leave, are accepted."""
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
    return isinstance(metadata, dict) and metadata.get("format") == FORMAT
