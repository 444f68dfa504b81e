r"""Rooflines: the rates of the engines against the peaks of the machine.

Reference: Williams, Waterman and Patterson 2009, *Roofline: an insightful visual performance model for multicore architectures*.

Floating-point operations of an EM iteration are counted per pair of point and component, as the arithmetic that any engine needs:

- full: residual D, product with a triangular factor D(D + 1), squares 2D; first moments 2D, second moments D(D + 1).
- tied: residual D, squares 2D; first moments 2D; products with the factor and second moments 2D(D + 1), once per point.
- diagonal: scaled residual 2D, squares 2D; first moments 2D, second moments 2D.
- spherical: residual D, squares 2D + 1; first moments 2D, second moment 2.
- all: 12 for the exponential (range reduction and a polynomial of degree four), the maximum, the sum and the quotient.

An engine may do more (the dense engine multiplies by all D(D + 3)/2 + 1 features twice) or less (the
native engine skips the moments of pairs of negligible responsibility).
The bytes are those that must be read from memory: the points once, and the parameters once.
"""

from __future__ import annotations

from typing import Any

__all__ = ["ENGINES", "operations", "rates", "table"]

ENGINES = {"gmmkeops, native": "native", "gmmkeops, dense": "dense", "gmmkeops, keops": "KeOps"}
_EXPONENTIAL = 12


def operations(family: str, K: int, D: int) -> float:
    """Return the floating-point operations of an EM iteration for a pair of point and component."""
    count = {
        "full": 2 * D * (D + 1) + 5 * D,
        "tied": 2 * D * (D + 1) / K + 5 * D,
        "diag": 8 * D,
        "spherical": 5 * D + 3,
    }
    return count[family] + _EXPONENTIAL


def traffic(row: dict[str, Any]) -> int:
    """Return the bytes of the points (float32) and of the parameters (float64) of a case."""
    D, matrices = row["D"], {"full": row["K"], "tied": 1}.get(row["family"], 0)
    return 4 * row["N"] * D + 8 * (row["K"] * (1 + 2 * D) + matrices * D * (D + 1) // 2)


def rates(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rates of all engines in all cases in which they evaluate every pair, and their fractions of the peaks."""
    peaks, found = record["roofline"], []
    if "bytes_per_s" not in peaks:
        return []
    for row in record["rows"]:
        if row["kind"] != "em" or row["peer"] not in ENGINES or row.get("pairs") != 1:
            continue
        pairs = row["N"] * row["K"]
        flops, moved = (
            pairs * operations(row["family"], row["K"], row["D"]) / row["seconds"],
            traffic(row) / row["seconds"],
        )
        found.append(
            {
                "case": row["case"],
                "engine": ENGINES[row["peer"]],
                "pairs_per_s": pairs / row["seconds"],
                "flops_per_s": flops,
                "bytes_per_s": moved,
                "intensity": flops / moved,
                "of_flops": flops / peaks["float32_flops"],
                "of_bytes": moved / peaks["bytes_per_s"],
            }
        )
    return found


def table(record: dict[str, Any]) -> list[list[str]]:
    """Return the rows of a table of the rates, with a head."""
    head = ["case", "engine", "10⁹ pairs/s", "GFLOP/s", "of the peak", "GB/s", "of the bandwidth"]
    return [
        head,
        *(
            [
                row["case"],
                row["engine"],
                f"{row['pairs_per_s'] / 1e9:.3g}",
                f"{row['flops_per_s'] / 1e9:.3g}",
                f"{row['of_flops']:.0%}",
                f"{row['bytes_per_s'] / 1e9:.2g}",
                f"{row['of_bytes']:.0%}",
            ]
            for row in rates(record)
        ),
    ]
