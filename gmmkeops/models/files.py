r"""Reading and writing of mixtures: parameters in the safetensors format, with a JSON header; pickle is never used.

The header contains the covariance family and the shapes. All names, shapes and numbers are validated when a file is read.
Reference: the safetensors format, github.com/huggingface/safetensors.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gmmkeops._checks import as_device
from gmmkeops.components import families
from gmmkeops.models.mixture import Mixture

__all__ = [
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

# Name of the header entry of an estimator, and prefix of the names of its tensors.
_ESTIMATOR, _PART = "gmmkeops.estimator", "estimator."

# Suffixes of the files. The suffix of a mixture may be omitted.
MIXTURES = (".safetensors", "")

TABLES = (".npy", ".csv")


def save(mixture: Any, path: str | os.PathLike[str]) -> None:
    """Write a mixture or a fitted estimator to a file, atomically.

    Args:
        mixture: A :class:`~gmmkeops.Mixture`, also a batch, or a fitted :class:`~gmmkeops.GaussianMixture`, whose parameters
            and fitted attributes are written as well (see :meth:`gmmkeops.GaussianMixture.load`). Column names of the mixture
            are written if they are known.
        path: The file, with the suffix ``.safetensors`` or without a suffix. An existing file is replaced.

    Raises:
        TypeError: The argument is neither a mixture nor a fitted estimator.
        ValueError: The mixture is in half precision, a parameter of the estimator cannot be stored (for example a function), or
            the suffix belongs to another format.
        OSError: The folder does not exist or cannot be written to.

    Example:
        >>> import os, tempfile, gmmkeops as gk
        >>> mixture = gk.Mixture.from_parameters([1.0], [[0.0, 1.0]], [1.0], "spherical")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     gk.save(mixture, os.path.join(folder, "m.safetensors"))
        ...     gk.load(os.path.join(folder, "m.safetensors"))
        Mixture(components=1, features=2, factor=spherical)
    """
    from safetensors.torch import save as serialize

    path = check_output(path, MIXTURES, name="a mixture")
    # Estimators store parameters and attributes in addition to the mixture.
    own = getattr(mixture, "_saved", None) if hasattr(mixture, "mixture_") else None
    entry, parts = (None, []) if own is None else own()
    mixture = getattr(mixture, "mixture_", mixture)
    if not isinstance(mixture, Mixture):
        raise TypeError(f"save takes a Mixture or a fitted GaussianMixture, got {type(mixture).__name__}.")
    dtypes = {tensor.dtype for tensor in (mixture.logits, mixture.means, *mixture.factor.tensors.values())}
    if half := dtypes - {torch.float32, torch.float64}:
        raise ValueError(
            f"save writes float32 and float64 mixtures, got {', '.join(sorted(map(str, half)))}; half precision is not "
            "supported, so convert the mixture with .to(torch.float64)."
        )
    tensors = {"logits": mixture.logits, "means": mixture.means, **mixture.factor.tensors}
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "family": mixture.factor.family,
        "features": mixture.n_features,
        "components": mixture.n_components,
    }
    if mixture.columns is not None:
        header["columns"] = list(mixture.columns)
    metadata = {_FORMAT: json.dumps(header)} | ({} if entry is None else {_ESTIMATOR: json.dumps(entry)})
    tensors |= {f"{_PART}{number}": part for number, part in enumerate(parts)}
    # Tensors are copied, since safetensors rejects tensors that share memory.
    data = serialize({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, metadata)
    write_whole(path, data)


def as_path(path: Any, name: str = "path") -> Path:
    """Convert a string to a path.

    Raises:
        TypeError: The argument is neither a string nor a path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"{name} must be the name of a file, got {type(path).__name__}; pass a string or a pathlib.Path."
        )
    return Path(path)


def check_output(
    path: str | os.PathLike[str],
    formats: Sequence[str] | None = None,
    *,
    inputs: Iterable[str | os.PathLike[str]] = (),
    name: str = "the output",
) -> Path:
    """Check that a file can be written, before its contents are computed.

    Args:
        path: The file.
        formats: Admissible suffixes; None for any.
        inputs: Files that must not be overwritten; links to them are recognized.
        name: Name of the file in messages.

    Returns:
        The path.

    Raises:
        TypeError: The path is neither a string nor a path.
        ValueError: The suffix is not among the formats, or the file is one of the inputs.
        FileNotFoundError: The folder does not exist.
        IsADirectoryError: The path is a folder.
    """
    path = as_path(path)
    # For a symbolic link, the file that it points to is replaced.
    target = path.resolve() if path.is_symlink() else path
    wrong = [file for file in (path, target) if formats is not None and file.suffix.lower() not in formats]
    if wrong and formats is not None:
        known = " or ".join(suffix for suffix in formats if suffix)
        what = f"a {wrong[0].suffix} file" if wrong[0].suffix else "a file without a suffix"
        raise ValueError(f"{name} is written to a {known} file, got {wrong[0]}, {what}; choose another name.")
    for other in inputs:
        # Existing files are compared by device and inode, others by path.
        same = path.exists() and os.path.exists(other) and os.path.samefile(path, other)
        if same or os.path.abspath(path) == os.path.abspath(other):
            raise ValueError(f"{name} {path} would overwrite the input {other}; choose another name.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; pass the path of a file in it for {name}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for {path.name}; create it first.")
    return path


def write_table(path: str | os.PathLike[str], array: Any) -> None:
    """Write an array (N,) or (N, D) to a .npy or .csv file atomically; the suffix determines the format.

    Raises:
        ValueError: The suffix is neither .npy nor .csv.
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
    """Replace a file atomically: at any time the file has either the old or the new contents, also after a power failure.

    The file gets the default permissions (umask). For a symbolic link, the file that it points to is replaced; devices and
    pipes are written to directly.

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
    """Create a temporary file in the folder of a file, with a name that is not in use.

    Args:
        path: The file; the temporary name begins with a part of its name.
        create: A function that creates the temporary file, or raises FileExistsError if it exists.

    Returns:
        The result of ``create``, and the path of the temporary file.

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
    """Read a mixture from a file written by :func:`save`.

    Args:
        path: The file.
        device: Device of the parameters.

    Returns:
        The mixture, with its column names if they were stored.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged or does not contain a mixture.

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
    """Read a mixture, and the parameters and attributes of an estimator if the file contains them.

    Args:
        path: The file.
        device: Device of the tensors.

    Returns:
        The mixture, the entry of the estimator in the header (None if there is none), and the estimator's tensors by number.

    Raises:
        FileNotFoundError, ValueError: As :func:`load`.
    """
    from safetensors import SafetensorError, safe_open

    path, device = as_path(path), as_device(device)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; check the path.")
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
        raise ValueError(f"{path} does not contain a gmmkeops mixture: its header has no {_FORMAT} entry") from None
    if version != _VERSION:
        raise ValueError(f"{path} has format version {version}, expected {_VERSION}; upgrade gmmkeops.")
    kind = families().get(family)
    if kind is None:
        raise ValueError(f"{path} contains the unknown family {family!r}; expected one of {', '.join(families())}.")
    parts = {
        name: tensors.pop(name).to(device) for name in list(tensors) if entry is not None and name.startswith(_PART)
    }
    names = {"logits", "means", *kind.shapes(1, features)}
    if set(tensors) != names:
        raise ValueError(f"{path} contains the tensors {sorted(tensors)}, expected {sorted(names)} for {family}.")
    if not all(tensor.dtype in (torch.float32, torch.float64) for tensor in tensors.values()):
        raise ValueError(
            f"{path} contains numbers that are neither float32 nor float64; write it again with gmmkeops.save."
        )
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    logits, means = moved.pop("logits"), moved.pop("means")
    try:
        factor = kind.of(moved, features)
        mixture = Mixture(logits, means, factor, validate_args=True).named(columns)
        return mixture, entry, {int(name.removeprefix(_PART)): part for name, part in parts.items()}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def __getattr__(name: str) -> Any:
    if name == "write_array":
        warnings.warn("write_array is deprecated; use write_table.", DeprecationWarning, stacklevel=2)
        return write_table
    if name == "KINDS":
        return families()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
