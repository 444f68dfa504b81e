"""Values of command-line options, and output: results on standard output, messages on standard error."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gmmkeops.data import Source

__all__ = ["column", "count", "integers", "listed", "report", "say", "source_of"]


def say(text: str) -> None:
    """Write a message to standard error."""
    sys.stderr.write(text + "\n")


def report(options: Any, facts: dict[str, Any], text: str) -> None:
    """Write a result to standard output: as text, or as JSON with ``--json``."""
    sys.stdout.write((json.dumps(facts) if options.json else text) + "\n")


def listed(text: str) -> list[str]:
    """Split a comma-separated list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def column(text: str) -> str | int:
    """Convert the name or index of a column; text that is an integer becomes an index."""
    return int(text) if text.lstrip("-").isdigit() else text


def count(text: str) -> int | str:
    """Convert a number of components, or "auto"."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer or auto, got {text!r}") from None


def integers(text: str) -> list[int]:
    """Parse a list of integers such as 2,4,8, or an inclusive range such as 1:10 or 10:100:10."""
    try:
        if ":" not in text:
            return [int(part) for part in listed(text)]
        first, last, *step = [int(part) for part in text.split(":")]
        return list(range(first, last + 1, *step))
    except ValueError:
        raise ValueError(f"--components must be a list such as 2,4,8 or 1:10 or 10:100:10, got {text!r}.") from None


def source_of(options: Any) -> Source:
    """Create the source for the options ``input``, ``columns``, ``classes`` and ``weights``."""
    from gmmkeops.data import Source

    classes = None if options.classes is None else listed(options.classes)
    if classes is not None and not all(part.isdigit() for part in classes):
        raise ValueError(f"--classes must be comma-separated integers such as 2,6, got {options.classes!r}.")
    return Source.of(
        options.input,
        columns=None if options.columns is None else [column(part) for part in listed(options.columns)],
        classes=None if classes is None else [int(part) for part in classes],
        weights=None if options.weights is None else column(options.weights),
    )
