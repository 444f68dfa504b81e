"""The report: Markdown tables of the committed results, and plots.

    python bench/report.py             bench/results, and the tables of the README
    python bench/report.py build/bench the results of a quick run: report.md and the plots in that folder

Reads cpu.json, cuda.json, gpu.json and choose.json as far as they exist. Writes report.md, scaling.png (seconds per iteration
against the number of components), peers.png (other libraries relative to this package), roofline.png (engines relative to the
peaks of the machine), the README's tables, choose.md, the tables of the page "How to choose", and gpu.md and gpu.png, the answers
of a GPU.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import report_gpu
import roofline
from plots import OURS, by_case, peers, reference, rooflines, scaling

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
MARKS = ("<!-- results -->", "<!-- end of results -->")
TITLES = {
    "em": "Seconds per EM iteration, same points, same initial parameters",
    "small": "Seconds of a whole fit of few points from given parameters",
    "loss": "Seconds per loss and gradient, same parameters",
    "fit": "Whole fits, k-means to a tolerance of 1e-4",
    "bayes": "Seconds per iteration of variational Bayes, or per sweep of Gibbs sampling",
    "score": "Seconds for the log-densities of all points, same parameters",
    "target": "Seconds to a mean log-likelihood, initialization included",
}
# Nats per point by which the likelihoods of a case may differ, and the kinds of cases in which all should agree.
_AGREE, _AGREEING = 1e-3, ("em", "small", "score")
# Why a peer may differ although it begins with the same parameters.
_REASONS = {"pomegranate": "it adds nothing to the variances, the others 1e-6"}

# Figures that authors of other systems publish, with the case of the same size here. Their data and initial parameters differ.
PUBLISHED = (
    ("GMMXX", "full, 1048576 x 32, D=8", "0.0330 s for 3 iterations", "RTX 4090"),
    ("GMMXX", "diag, 1048576 x 64, D=32", "0.0284 s for 3 iterations", "RTX 4090"),
    ("GMMXX", "tied, 1048576 x 64, D=32", "0.0289 s for 3 iterations", "RTX 4090"),
    ("GMMXX", "spherical, 1048576 x 64, D=32", "0.0302 s for 2 iterations", "RTX 4090"),
    ("vamm", "10⁸ images, more than 10¹⁰ parameters", "about nine hours in all", "one CPU"),
)
SOURCES = {
    "GMMXX": "[README](https://github.com/OpsiClear/GMMXX)",
    "vamm": "[arXiv:2501.12299](https://arxiv.org/abs/2501.12299)",
}


def seconds(value: float) -> str:
    digits = 1 if value >= 10 else 2 if value >= 1 else 3 if value >= 0.01 else 5 if value >= 1e-3 else 7
    return f"{value:.{digits}f}"


def span(value: float) -> str:
    """Write seconds with a unit, three digits."""
    scale, unit = (1, "s") if value >= 0.1 else (1e3, "ms") if value >= 1e-4 else (1e6, "µs")
    value *= scale
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def grid(names: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in [names, ["---"] * len(names), *rows]]


def apart(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the peers of a case whose final likelihood differs from the median, and the difference in nats per point."""
    found = {row["peer"]: row["log_likelihood"] for row in rows if row["kind"] in _AGREEING and "log_likelihood" in row}
    if not found:
        return {}
    middle = statistics.median_low(found.values())
    return {peer: abs(value - middle) for peer, value in found.items() if abs(value - middle) > _AGREE}


def remarks(row: dict[str, Any], differ: dict[str, float]) -> str:
    found = [row["engine"]] if "engine" in row else []
    if row.get("pairs", 1) < 1:
        found.append(f"{row['pairs']:.2%} of all pairs, error at most {row['certificate']:.0e} nats")
    if "start_seconds" in row:
        found.append(f"{row['iterations']} iterations, initialization {row['start_seconds']:.1f} s")
    if row["peer"] in differ:
        reason = _REASONS.get(row["peer"])
        found.append(f"**differs by {differ[row['peer']]:.0e} nats**" + (f": {reason}" if reason else ""))
    return ", ".join(found)


def table(record: dict[str, Any], kind: str) -> list[str]:
    lines = []
    for case, rows in by_case([row for row in record["rows"] if row["kind"] == kind]).items():
        base, work, differ = reference(rows), reference(rows, "cpu_seconds"), apart(rows)
        for row in rows:
            if "error" in row:
                lines.append([case, row["peer"], *[""] * 7, row["error"]])
                continue
            busy = row.get("cpu_seconds")
            lines.append(
                [
                    case,
                    row["peer"],
                    seconds(row["seconds"]),
                    f"{row['seconds'] / base:.1f}x",
                    "" if busy is None else seconds(busy),
                    "" if busy is None else f"{busy / work:.1f}x",
                    seconds(row["cold_seconds"]) if "cold_seconds" in row else "",
                    f"{row['peak_MB']:.0f} MB",
                    f"{row['log_likelihood']:.5f}" if "log_likelihood" in row else "",
                    remarks(row, differ),
                ]
            )
    head = ["case", "who", "seconds", "ratio", "CPU seconds", "ratio", "cold", "memory", "log-likelihood", "remarks"]
    return [f"## {TITLES[kind]}", "", *grid(head, lines), ""]


def markdown(record: dict[str, Any]) -> list[str]:
    machine, peaks = record["machine"], record["roofline"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    threads = f", {record['threads']} threads" if "threads" in record else ""
    lines = [
        f"# {machine.get('gpu', machine['processor'])}, {machine['cores']} cores{threads}, {record['date']}",
        "",
        f"{record['what'][:1].upper()}{record['what'][1:]}. {versions}, Python {machine['python']}.",
        "",
    ]
    for kind in TITLES:
        if any(row["kind"] == kind for row in record["rows"]):
            lines += table(record, kind)
    head, *rows = roofline.table(record)
    if rows:
        lines += [
            "## Rates of the engines",
            "",
            f"Peaks, measured in the same run: {peaks['float32_flops'] / 1e9:.0f} (float32) and "
            f"{peaks['float64_flops'] / 1e9:.0f} (float64) GFLOP/s in matrix products, {peaks['exp_per_s']:.2e} float32 "
            f"exponentials per second, and {peaks['bytes_per_s'] / 1e9:.1f} GB/s in copies. Operations per pair are counted in "
            "bench/roofline.py; bytes are those of points and parameters, each read once. Every pair is counted, although the "
            "native engine skips the moments of pairs of negligible responsibility.",
            "",
            *grid(head, rows),
            "",
        ]
    return lines


def short(row: dict[str, Any] | None, base: float, differ: dict[str, float]) -> str:
    """Write a peer's time and ratio, or in a few words why it has none."""
    if row is None:
        return ""
    if "error" in row:
        words = {"memory": "out of memory", "takes": "too slow", "stops": "stops early", "installed": "not installed"}
        return next((brief for word, brief in words.items() if word in row["error"]), "fails")
    mark = " †" if row["peer"] in differ else ""
    return f"{span(row['seconds'])} ({row['seconds'] / base:.{2 if row['seconds'] < base else 1}f}x){mark}"


# Columns of the README's tables, by kind: the title, and the peers, by the heads of their columns.
_OTHERS = ("scikit-learn", "tgmm", "pomegranate", "torchgmm", "gmmx")
COLUMNS: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "em": (
        "one EM iteration",
        {
            "every pair": ("gmmkeops, native", "gmmkeops, every pair"),
            "dense": ("gmmkeops, dense",),
            "KeOps": ("gmmkeops, keops", "gmmkeops, KeOps"),
            **{name: (name,) for name in (*_OTHERS, "torch in chunks")},
        },
    ),
    "small": (
        "fit of 20 iterations",
        {
            "estimator": ("gmmkeops, estimator",),
            "dense": ("gmmkeops, dense",),
            "KeOps": ("gmmkeops, keops",),
            **{name: (name,) for name in _OTHERS},
        },
    ),
    "score": (
        "log-densities",
        {
            "dense": ("gmmkeops, dense",),
            "KeOps": ("gmmkeops, keops",),
            **{name: (name,) for name in ("torch.distributions", "zuko", *_OTHERS)},
        },
    ),
    "loss": (
        "one loss and its gradient",
        {"`GMM` + `log_prob`": ("GMM module",), "KeOps tutorial": ("KeOps tutorial",), "zuko": ("zuko",)},
    ),
    "bayes": (
        "one iteration of a posterior",
        {"Gibbs sweep": ("gmmkeops, Gibbs",), "scikit-learn, variational": ("scikit-learn",)},
    ),
}


def comparison(record: dict[str, Any], kind: str) -> list[str]:
    """Return the README's table of a kind of cases; columns of peers that have no row are left out."""
    title, columns = COLUMNS[kind]
    rows_of = by_case([row for row in record["rows"] if row["kind"] == kind])
    rows_of = {case: rows for case, rows in rows_of.items() if any(not row["peer"].startswith(OURS) for row in rows)}
    present = {row["peer"] for rows in rows_of.values() for row in rows}
    columns = {head: names for head, names in columns.items() if present & set(names)}
    lines, marked = [], False
    for case, rows in rows_of.items():
        found, base, differ = {row["peer"]: row for row in rows}, reference(rows), apart(rows)
        own = next(row for row in rows if row["peer"].startswith(OURS) and row.get("seconds") == base)
        first = span(base) + (f", CPU {span(own['cpu_seconds'])}" if "cpu_seconds" in own else "")
        first += f", {own['peak_MB']:.0f} MB" if kind == "em" else ""
        picked = [next((found[name] for name in names if name in found), None) for names in columns.values()]
        cells = [short(row, base, differ) for row in picked]
        marked |= any("†" in cell for cell in cells)
        name = case.removeprefix(f"{kind}, ").removeprefix("posterior, ")
        lines.append([name, first, *cells])
    if not lines:
        return []
    note = "† The final log-likelihood differs from that of the others by more than 10⁻³ nats per point."
    return ["", *grid([title, OURS, *columns], lines), *(["", note] if marked else [])]


def small_fits(record: dict[str, Any]) -> list[str]:
    """Return sentences on fits of few points."""
    sentences = []
    for case, rows in by_case([row for row in record["rows"] if row["kind"] == "small" and "seconds" in row]).items():
        found = {row["peer"]: row for row in rows}
        if OURS not in found or "scikit-learn" not in found:
            continue
        own, other, call = found[OURS], found["scikit-learn"], found.get("gmmkeops, estimator", found[OURS])
        ratio = other["seconds"] / call["seconds"]
        compared = f"{ratio:.1f} times as fast as" if ratio >= 1 else f"{1 / ratio:.1f} times as slow as"
        faster = [row for row in rows if not row["peer"].startswith(OURS) and row["seconds"] < own["seconds"]]
        also = "".join(
            f"; {row['peer']} takes {span(row['seconds'])} ({span(row['cold_seconds'])} in the first call)"
            for row in faster
        )
        sentences.append(
            f"{case}: `gk.fit` takes {span(own['seconds'])}, and the estimator {span(call['seconds'])} "
            f"({span(call['cpu_seconds'])} of CPU time), {compared} scikit-learn's with {span(other['seconds'])} "
            f"({span(other['cpu_seconds'])}){also}."
        )
    if not sentences:
        return []
    return [
        "",
        "Fits of 20 iterations from given parameters, set-up included:",
        "",
        *(f"- {text}" for text in sentences),
    ]


def published(record: dict[str, Any]) -> list[str]:
    """Return the table of published figures, if the cases of the same size were measured."""
    own = {row["case"]: row for row in record["rows"] if row["peer"] == "gmmkeops, native" and "seconds" in row}
    if not any(case in own for _, case, *_ in PUBLISHED):
        return []
    lines = [
        [system, case, figure, device, SOURCES[system], span(own[case]["seconds"]) if case in own else ""]
        for system, case, figure, device in PUBLISHED
    ]
    head = ["published by its authors", "problem", "figure", "on", "source", "gmmkeops here, one iteration"]
    note = "Published figures are for other data and initial parameters, and were not measured here."
    return ["", *grid(head, lines), "", note]


def engine_rates(record: dict[str, Any]) -> list[str]:
    """Return a sentence on the rates of the native engine, and the plot of all engines."""
    rows = [row for row in roofline.rates(record) if row["engine"] == "native"]
    if not rows:
        return []
    least, most = (end(rows, key=lambda row: row["of_flops"]) for end in (min, max))
    pairs = max(rows, key=lambda row: row["pairs_per_s"])
    peak = record["roofline"]["float32_flops"]
    return [
        "",
        f"The native engine evaluates up to {pairs['pairs_per_s'] / 1e9:.1f}·10⁹ pairs of point and component per second "
        f"({pairs['case']}). Its nominal rate is the number of operations for all pairs divided by the time. It is between "
        f"{least['of_flops']:.0%} ({least['case']}) and {most['of_flops']:.0%} ({most['case']}) of the rate of float32 matrix "
        f"products on this machine, {peak / 1e9:.0f} GFLOP/s. Rates above 100% are possible because the moments of pairs of "
        "negligible responsibility are skipped.",
        "",
        "![Floating-point rates of the engines and peaks of the machine](bench/results/roofline.png)",
    ]


def readme(record: dict[str, Any]) -> str:
    """Return the part of the README between its marks; a test compares them."""
    rows = [row for row in record["rows"] if row["peer"] == "gmmkeops, 1e-4" and "seconds" in row]
    surface = [
        [
            f"K = {row['K']}" if row["N"] == 1_000_000 else f"10⁷ points, K = {row['K']}",
            seconds(row["seconds"]),
            f"{row['pairs']:.2%}",
            f"{row['peak_MB']:.0f} MB",
        ]
        for row in rows
    ]
    whole = [
        [row["case"], row["peer"], f"{row['seconds']:.1f}", f"{row['log_likelihood']:.4f}"]
        if "seconds" in row
        else [row["case"], row["peer"], row["error"], ""]
        for row in record["rows"]
        if row["kind"] in ("target", "fit")
    ]
    first = ["10⁶ points of a surface, D = 3, ε = 10⁻⁴", "s per iteration", "pairs evaluated", "memory"]
    second = ["from the data alone, initialization included", "who", "seconds", "mean log-likelihood"]
    lines = [
        *comparison(record, "em"),
        *engine_rates(record),
        *(["", *grid(first, surface)] if surface else []),
        *comparison(record, "small"),
        *small_fits(record),
        *comparison(record, "score"),
        *(["", *grid(second, whole)] if whole else []),
        *comparison(record, "loss"),
        *comparison(record, "bayes"),
        *published(record),
    ]
    if "threads" not in record:
        # Results from before the native engine; make bench replaces them.
        lines = [
            "These tables were measured with the dense engine of version 0.1; a CPU now uses the native engine, which is faster.",
            "tgmm and torchgmm began with the same means, but not with the same weights and covariances.",
            *lines,
        ]
    return "\n".join(lines).strip()


def choices(record: dict[str, Any]) -> str:
    """The four tables of the page "How to choose", each between marks by which the page finds it."""
    best = max(row["log_likelihood"] for row in record["methods"])
    parts = {
        "methods": grid(
            ["Method", "passes", "s", "nats per point", "below the best"],
            [
                [
                    f"`{row['name']}`",
                    str(row["passes"]),
                    seconds(row["seconds"]),
                    f"{row['log_likelihood']:.4f}",
                    f"{best - row['log_likelihood']:.4f}",
                ]
                for row in record["methods"]
            ],
        ),
        "engines": grid(
            ["D", "covariance", "dense tiles (s)", "KeOps (s)"],
            [
                [
                    str(row["D"]),
                    f"`{row['name']}`",
                    seconds(row["dense"]),
                    f"{seconds(row['keops'])} ({row['keops'] / row['dense']:.1f}x)",
                ]
                for row in record["engines"]
            ],
        ),
        "truncations": grid(
            [
                "`truncate=`",
                "s per iteration",
                "pairs evaluated",
                "certified loss (nats)",
                "largest loss of any point",
                "nats per point",
            ],
            [
                [
                    f"`{row['name']}`",
                    seconds(row["seconds"]),
                    f"{row['pairs']:.1%}",
                    f"{row['certificate']:.1e}" if row["certificate"] else "0",
                    f"{max(row['lost'], 0):.1e}" if row["lost"] else "",
                    f"{row['log_likelihood']:.4f}",
                ]
                for row in record["truncations"]
            ],
        ),
    }
    kinds: dict[str, dict[str, Any]] = {}
    for row in record["covariances"]:
        kinds.setdefault(row["name"], {})[row["data"]] = row
    names = ["Type"] + [
        f"{data}: {what}" for data in ("colors", "digits") for what in ("numbers", "s", "fitted", "unseen")
    ]
    parts["covariances"] = grid(
        names,
        [
            [f"`{name}`"]
            + [
                text
                for row in (found["colors"], found["digits"])
                for text in (
                    str(row["parameters"]),
                    seconds(row["seconds"]),
                    f"{row['log_likelihood']:.3f}",
                    f"{row['unseen']:.3f}",
                )
            ]
            for name, found in kinds.items()
        ],
    )
    return (
        "\n\n".join(
            f"<!-- {name} -->\n\n" + "\n".join(lines) + f"\n\n<!-- end of {name} -->" for name, lines in parts.items()
        )
        + "\n"
    )


def between(page: str, marks: tuple[str, str], text: str) -> str:
    """Replace the text between two marks."""
    head, rest = page.split(marks[0])
    return head + marks[0] + "\n" + text + "\n" + marks[1] + rest.split(marks[1])[1]


def write(folder: Path) -> None:
    """Write the report and the plots of the results in a folder; those of bench/results also into the README."""
    import matplotlib
    import matplotlib.style

    matplotlib.use("Agg")
    matplotlib.style.use(README.parent / "gallery/gallery.mplstyle")
    lines: list[str] = []
    for device in ("cpu", "cuda"):
        path = folder / f"{device}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        lines += markdown(record)
        if device == "cuda":
            continue
        scaling(record, folder / "scaling.png")
        peers(record, folder / "peers.png")
        if roofline.rates(record):
            rooflines(record, folder / "roofline.png")
        if folder == RESULTS:
            README.write_text(between(README.read_text(), MARKS, readme(record)))
    if (folder / "choose.json").exists():
        (folder / "choose.md").write_text(choices(json.loads((folder / "choose.json").read_text())))
    if (folder / "gpu.json").exists():
        answers = json.loads((folder / "gpu.json").read_text())
        (folder / "gpu.md").write_text("\n".join(report_gpu.tables(answers)).rstrip() + "\n")
        report_gpu.plot(answers, folder / "gpu.png")
        print(f"wrote {folder / 'gpu.md'}")
        if not lines:
            return
    if not lines:
        raise SystemExit("there are no results yet; run python bench/run.py first.")
    (folder / "report.md").write_text("\n".join(lines).rstrip() + "\n")
    print(f"wrote {folder / 'report.md'}")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
