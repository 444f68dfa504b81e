"""Plots of the results: growth with the number of components, other libraries, and rooflines of the engines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from roofline import rates

__all__ = ["OURS", "by_case", "peers", "reference", "rooflines", "scaling"]

OURS = "gmmkeops"


def reference(rows: list[dict[str, Any]], key: str = "seconds") -> float:
    """Return the time that the others of a case are compared with: this package by default, or its first row."""
    own = [row for row in rows if row["peer"].startswith(OURS) and key in row]
    default = [row for row in own if row["peer"] == OURS]
    return (default or own)[0][key] if own else float("nan")


def by_case(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["case"], []).append(row)
    return found


def scaling(record: dict[str, Any], path: Path) -> None:
    """Plot the seconds of an iteration on the surface against K, with certified lists and with every pair."""
    import matplotlib.pyplot as plt

    rows = [row for row in record["rows"] if row["case"].startswith("surface, 1e6") and "seconds" in row]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    every = "gmmkeops, every pair"
    names = {"gmmkeops, 1e-4": "gmmkeops, certified lists (ε = 1e-4)", "gmmkeops, native": every}
    marks = iter("so^Dv<>ph*")
    for peer in dict.fromkeys(row["peer"] for row in rows):
        if peer == OURS or "keops" in peer.lower().removeprefix(OURS):
            continue
        points = sorted((row["K"], row["seconds"]) for row in rows if row["peer"] == peer)
        axes.loglog(*zip(*points, strict=True), marker=next(marks), label=names.get(peer, peer))
    known = [(row["K"], row["seconds"]) for row in rows if row["peer"] == "gmmkeops, 1e-4"]
    if known:
        K, first = min(known)
        ends = [K, max(known)[0]]
        axes.loglog(ends, [first * (k / K) ** 0.5 for k in ends], "k--", lw=0.8, label="growth as √K")
    axes.set(
        xlabel="components K",
        ylabel="seconds per EM iteration",
        title="10⁶ points of a surface, D = 3, full covariances",
    )
    if rows:
        axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def peers(record: dict[str, Any], path: Path) -> None:
    """Plot how many times as long each other library takes for an EM iteration."""
    import matplotlib.pyplot as plt

    cases = {
        case: rows
        for case, rows in by_case([row for row in record["rows"] if row["kind"] == "em"]).items()
        if any(not row["peer"].startswith(OURS) for row in rows)
    }
    names = list(
        dict.fromkeys(row["peer"] for rows in cases.values() for row in rows if not row["peer"].startswith(OURS))
    )
    figure, axes = plt.subplots(figsize=(max(8, 0.9 * len(cases)), 4.6), layout="constrained")
    width = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        label: str | None = name
        for place, rows in enumerate(cases.values()):
            row = next((row for row in rows if row["peer"] == name), {})
            x = place + (number - (len(names) - 1) / 2) * width
            if "seconds" in row:
                axes.bar(x, row["seconds"] / reference(rows), width, color=f"C{number}", label=label)
                label = None
            elif row:
                axes.text(x, 1.1, row["error"], rotation=90, ha="center", va="bottom", fontsize=6, color=f"C{number}")
    axes.axhline(1, color="k", lw=0.8)
    axes.set(yscale="log", xticks=range(len(cases)), ylabel=f"times as long as {OURS}", title="One EM iteration")
    axes.set_xticklabels(list(cases), fontsize=7, rotation=25, ha="right")
    axes.legend(fontsize=8, frameon=False, ncols=3)
    axes.set_xlim(-0.6, len(cases) - 0.4)
    axes.set_ylim(0.8, axes.get_ylim()[1] * 4)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def rooflines(record: dict[str, Any], path: Path) -> None:
    """Plot the floating-point rate of each engine and case against its arithmetic intensity, below the roofs."""
    import matplotlib.pyplot as plt
    import numpy as np

    found, peaks = rates(record), record["roofline"]
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for engine, mark in zip(dict.fromkeys(row["engine"] for row in found), "osD", strict=False):
        rows = [row for row in found if row["engine"] == engine]
        axes.loglog([row["intensity"] for row in rows], [row["flops_per_s"] for row in rows], mark, label=engine)
        if engine == "native":
            named: list[tuple[float, float]] = []
            for row in sorted(rows, key=lambda row: -row["flops_per_s"]):
                place = row["intensity"], row["flops_per_s"]
                # A name is left out where it would cover another one; the tables have all cases.
                if all(abs(math.log10(place[0] / x)) > 1 or place[1] < 0.88 * y for x, y in named):
                    axes.annotate(row["case"], place, fontsize=5, xytext=(4, -2), textcoords="offset points")
                    named.append(place)
    low, high = (end([row["intensity"] for row in found]) for end in (min, max))
    x = np.geomspace(min(low, peaks["float32_flops"] / peaks["bytes_per_s"]) / 3, 5 * high, 200)
    axes.loglog(
        x, np.minimum(peaks["bytes_per_s"] * x, peaks["float32_flops"]), "k", lw=1, label="float32 products, copies"
    )
    axes.loglog(
        x, np.minimum(peaks["bytes_per_s"] * x, peaks["float64_flops"]), "k--", lw=0.8, label="float64 products"
    )
    axes.set(
        xlabel="floating-point operations per byte of points and parameters",
        ylabel="floating-point operations per second",
        title=f"EM iterations over every pair, {peaks['threads']} threads",
    )
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)
