r"""Mixtures in files: safetensors for the numbers, JSON in its header for what they mean; never pickle.

A file is a complete :class:`~gmmkeops.Mixture`, of the family and shapes that its header names. Reading checks every
name, shape and number before anything is made of them. Reference: the safetensors format, github.com/huggingface/safetensors.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gmmkeops._checks import as_device
from gmmkeops.factors import DiagonalFactor, Factor, FullFactor, SphericalFactor
from gmmkeops.mixture import Mixture

__all__ = [
    "KINDS",
    "MIXTURES",
    "TABLES",
    "as_path",
    "check_output",
    "load",
    "read",
    "save",
    "unused_name",
    "write_table",
    "write_whole",
]

T = TypeVar("T")

_FORMAT = "gmmkeops.mixture"
_VERSION = 1
# Name of the header's entry about an estimator, and what the names of its tensors begin with.
_ESTIMATOR, _PART = "gmmkeops.estimator", "estimator."
# Formats of files by their suffixes. A mixture's file may do without one.
MIXTURES = (".safetensors", "")
TABLES = (".npy", ".csv")
KINDS: dict[str, type[Factor]] = {"full": FullFactor, "diagonal": DiagonalFactor, "spherical": SphericalFactor}


def save(mixture: Any, path: str | os.PathLike[str]) -> None:
    """Writes a mixture (or a fitted estimator's) to a file, whole or not at all.

    Args:
        mixture: A :class:`~gmmkeops.Mixture`, batches too, or a fitted :class:`~gmmkeops.GaussianMixture`, whose parameters
            and fitted attributes are written too (:meth:`gmmkeops.GaussianMixture.load`).
        path: The file, ``.safetensors`` or without a suffix, replaced in one step if it exists. The names of the mixture's
            columns, where they are known, are written too.

    Raises:
        TypeError: Neither of the two.
        ValueError: The mixture is in half precision, or a parameter of the estimator is of a kind that a file cannot hold,
            such as a function.
        ValueError: The suffix belongs to another format.
        OSError: The folder cannot be written to.

    Example:
        >>> import os, tempfile, gmmkeops as gk
        >>> mixture = gk.Mixture.from_parameters([1.0], [[0.0, 1.0]], [1.0], "spherical")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     gk.save(mixture, os.path.join(folder, "m.safetensors"))
        ...     gk.load(os.path.join(folder, "m.safetensors"))
        Mixture(components=1, features=2, factor=spherical)
    """
    from safetensors.torch import save as serialise

    path = check_output(path, MIXTURES, name="a mixture")
    # State that an estimator writes beside its mixture.
    own = getattr(mixture, "_saved", None) if hasattr(mixture, "mixture_") else None
    entry, parts = (None, []) if own is None else own()
    mixture = getattr(mixture, "mixture_", mixture)
    if not isinstance(mixture, Mixture):
        raise TypeError(f"save takes a Mixture or a fitted GaussianMixture, got {type(mixture).__name__}.")
    kinds = {tensor.dtype for tensor in (mixture.logits, mixture.means, *mixture.factor.tensors.values())}
    if half := kinds - {torch.float32, torch.float64}:
        raise ValueError(
            f"save writes float32 and float64 mixtures, got {', '.join(sorted(map(str, half)))}; half precision is not "
            "supported, so convert the mixture with .to(torch.float64)."
        )
    tensors = {"logits": mixture.logits, "means": mixture.means, **mixture.factor.tensors}
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "family": mixture.factor.family,
        "features": mixture.features,
        "components": mixture.components,
    }
    if mixture.columns is not None:
        header["columns"] = list(mixture.columns)
    metadata = {_FORMAT: json.dumps(header)} | ({} if entry is None else {_ESTIMATOR: json.dumps(entry)})
    tensors |= {f"{_PART}{number}": part for number, part in enumerate(parts)}
    # A copy of each, since tensors that share their memory are refused.
    data = serialise({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, metadata)
    write_whole(path, data)


def as_path(path: Any, name: str = "path") -> Path:
    """A path.

    Raises:
        TypeError: It is neither text nor a path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name} must be the name of a file, got {type(path).__name__}; pass text or a pathlib.Path.")
    return Path(path)


def check_output(
    path: str | os.PathLike[str],
    formats: Sequence[str] | None = None,
    *,
    inputs: Iterable[str | os.PathLike[str]] = (),
    name: str = "the output",
) -> Path:
    """Checks that a file may be written, before anything is computed for it.

    Args:
        path: The file.
        formats: The suffixes of the formats that it may be written in; any if left out.
        inputs: Files that must stay as they are. Links to them are recognized.
        name: How messages call the file.

    Returns:
        The path.

    Raises:
        TypeError: The path is neither text nor a path.
        ValueError: The suffix belongs to another format, or the file is one of the inputs.
        FileNotFoundError: The folder does not exist.
        IsADirectoryError: The path is a folder.
    """
    path = as_path(path)
    # A link is not replaced, but the file that it points to.
    target = path.resolve() if path.is_symlink() else path
    wrong = [file for file in (path, target) if formats is not None and file.suffix.lower() not in formats]
    if wrong and formats is not None:
        known = " or ".join(suffix for suffix in formats if suffix)
        what = f"a {wrong[0].suffix} file" if wrong[0].suffix else "a file without a suffix"
        raise ValueError(f"{name} is written to a {known} file, got {wrong[0]}, {what}; choose another name.")
    for other in inputs:
        # A file that does not exist yet has no other names than its path.
        same = path.exists() and os.path.exists(other) and os.path.samefile(path, other)
        if same or os.path.abspath(path) == os.path.abspath(other):
            raise ValueError(f"{name} {path} would overwrite {other}, which is used here too; choose another name.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it for {name}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for {path.name}.")
    return path


def write_table(path: str | os.PathLike[str], array: Any) -> None:
    """Writes numbers (N,) or (N, D) to a .npy or .csv file, as its suffix says, whole or not at all.

    Raises:
        ValueError: The suffix belongs to another format.
        OSError: The folder cannot be written to.
    """
    import io

    import numpy as np

    path, file = check_output(path, TABLES), io.BytesIO()
    if path.suffix.lower() == ".csv":
        np.savetxt(file, array, delimiter=",", fmt="%d" if array.dtype.kind in "iu" else "%.17g")
    else:
        np.save(file, array, allow_pickle=False)
    write_whole(path, file.getvalue())


def write_whole(path: Path, data: bytes) -> None:
    """Replaces a file in one step: at every moment there is the old one or the new one, on the disk too.

    The file gets the permissions that the umask leaves. A symbolic link stays one, and the file that it points to is replaced;
    a device or a pipe is written to.

    Raises:
        OSError: The folder cannot be written to, or the path is a folder.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    handle, temporary = unused_name(path, lambda name: os.open(name, flags, 0o666))
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def unused_name(path: Path, create: Callable[[Path], T]) -> tuple[T, Path]:
    """Creates a temporary file beside a path, under a name that no other file has.

    Args:
        path: The file that the temporary one is for; the new name begins with a part of this file's name.
        create: A function that creates the file, and raises FileExistsError where the name is taken.

    Returns:
        What ``create`` returned, and the name.

    Raises:
        OSError: The folder cannot be written to.
    """
    while True:
        name = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}")
        try:
            return create(name), name
        except FileExistsError:
            continue


def load(path: str | os.PathLike[str], *, device: Any = "cpu") -> Mixture:
    """Reads a mixture that :func:`save` wrote.

    Args:
        path: The file.
        device: Where to put it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or not a mixture; the sentence says how.

    Example:
        >>> import os, tempfile, gmmkeops as gk
        >>> m = gk.Mixture.from_parameters([1.0], [[0.0]], [1.0], "spherical")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "mixture.safetensors")
        ...     gk.save(m, path)
        ...     gk.load(path)
        Mixture(components=1, features=1, factor=spherical)
    """
    return read(path, device=device)[0]


def read(path: str | os.PathLike[str], *, device: Any = "cpu") -> tuple[Mixture, Any, dict[int, Tensor]]:
    """Reads a mixture, and what else an estimator has written to its file.

    Args:
        path: The file.
        device: Where to put the tensors.

    Returns:
        The mixture, the estimator's entry of the header (None where there is none), and its tensors by number.

    Raises:
        FileNotFoundError, ValueError: As :func:`load`.
    """
    from safetensors import SafetensorError, safe_open

    path, device = as_path(path), as_device(device)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, UnicodeDecodeError, MemoryError) as error:
        raise ValueError(f"{path} is not a complete safetensors file; write it again with gmmkeops.save.") from error
    try:
        header = json.loads(metadata[_FORMAT])
        family, features, version = str(header["family"]), int(header["features"]), header["version"]
        columns = header.get("columns")
        entry = json.loads(metadata[_ESTIMATOR]) if _ESTIMATOR in metadata else None
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise ValueError(f"{path} holds no gmmkeops mixture: its header has no {_FORMAT} entry.") from None
    if version != _VERSION:
        raise ValueError(f"{path} has version {version}, this gmmkeops reads {_VERSION}; upgrade gmmkeops.")
    if family not in KINDS:
        raise ValueError(f"{path} names an unknown family {family!r}; expected one of {', '.join(KINDS)}.")
    parts = {
        name: tensors.pop(name).to(device) for name in list(tensors) if entry is not None and name.startswith(_PART)
    }
    names = {"logits", "means", "log_diagonal"} | ({"upper"} if family == "full" else set())
    if set(tensors) != names:
        raise ValueError(f"{path} holds the tensors {sorted(tensors)}, expected {sorted(names)} for {family}.")
    if not all(tensor.dtype in (torch.float32, torch.float64) for tensor in tensors.values()):
        raise ValueError(
            f"{path} holds numbers that are neither float32 nor float64; write it again with gmmkeops.save."
        )
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    logits, means = moved.pop("logits"), moved.pop("means")
    try:
        kind = KINDS[family]
        factor = kind(**moved, **({"features": features} if family == "spherical" else {}))
        mixture = Mixture(logits, means, factor, validate_args=True).named(columns)
        return mixture, entry, {int(name.removeprefix(_PART)): part for name, part in parts.items()}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
