"""Tables and a plot of the answers of bench/gpu.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["compared", "plot", "tables"]

_COLORS = {"triton": "C0", "keops": "C1", "dense": "C2", "native": "C3"}


def shown(value: Any) -> str:
    """Show a value of a table with three significant digits."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def compared(record: dict[str, Any]) -> list[str]:
    """Return the lines of a table with the times of all engines, one row for each family and number of features."""
    rows = [row for name in ("engines", "dimensions") for row in record["questions"].get(name, {"rows": []})["rows"]]
    engines = [name for name in _COLORS if any(row["engine"] == name and "moments ms" in row for row in rows)]
    lines = [
        "| ms: log-sum-exps / moments / labels | " + " | ".join(engines) + " |",
        "| --- |" + " --- |" * len(engines),
    ]
    for kind in dict.fromkeys((row["family"], row["D"]) for row in rows):
        times = {row["engine"]: row for row in rows if (row["family"], row["D"]) == kind and "skipped" not in row}
        cells = [
            " / ".join(shown(times[name].get(f"{what} ms")) or "?" for what in ("log-sum-exp", "moments", "labels"))
            if name in times
            else "-"
            for name in engines
        ]
        lines.append(f"| {kind[0]}, D = {kind[1]} | " + " | ".join(cells) + " |")
    return lines


def tables(record: dict[str, Any]) -> list[str]:
    """Return the lines of a page: a table that compares the engines, and one for each question."""
    found = record["environment"]
    lines = ["# Answers of a GPU", "", "<!-- engines -->", "", *compared(record), "", "<!-- end of engines -->", ""]
    lines += [", ".join(f"{name} {value}" for name, value in found.items() if name != "missing") + ".", ""]
    lines += [record["note"], ""] if "note" in record else []
    lines += [f"- {name} was missing: no results of {what}." for name, what in found["missing"].items()]
    for name, answer in record["questions"].items():
        lines += ["", f"## {name}", "", answer["question"], ""]
        lines += [answer["note"], ""] if "note" in answer else []
        for what in ("skipped", "failure"):
            if what in answer:
                lines += [f"{what.capitalize()}: {answer[what]}.", ""]
        rows = answer["rows"]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        if rows:
            lines += ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
            lines += ["| " + " | ".join(shown(row.get(column)) for column in columns) + " |" for row in rows]
    return lines


def plot(record: dict[str, Any], path: Path) -> bool:
    """Plot the times of the moments by each engine against the dimension; return whether there were any."""
    import matplotlib.pyplot as plt

    rows = [
        row
        for name in ("engines", "dimensions")
        for row in record["questions"].get(name, {"rows": []})["rows"]
        if "moments ms" in row
    ]
    families = list(dict.fromkeys(row["family"] for row in rows))
    if not families:
        return False
    figure, axes = plt.subplots(
        1, len(families), figsize=(4 * len(families), 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, family in zip(axes[0], families, strict=True):
        for engine, color in _COLORS.items():
            own = sorted(
                (row["D"], row["moments ms"]) for row in rows if (row["family"], row["engine"]) == (family, engine)
            )
            if own:
                axis.plot(*zip(*own, strict=True), "o-", color=color, label=engine)
        axis.set(title=family, xlabel="features D", ylabel="moments, ms", yscale="log", xscale="log")
        axis.set_xticks(ticks := sorted({row["D"] for row in rows if row["family"] == family}), map(str, ticks))
        axis.set_yticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
        axis.minorticks_off()
        axis.legend(loc="upper left")
    N, K = rows[0]["N"], rows[0]["K"]
    figure.suptitle(f"{record['environment']['device']}, {N} points, {K} components")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
