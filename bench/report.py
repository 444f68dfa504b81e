"""The report: a Markdown table of the committed results, and plots of them.

    python bench/report.py

Reads bench/results/cpu.json, cuda.json and choose.json as far as they are there; writes bench/results/report.md, scaling.png
(seconds per iteration against the number of components), peers.png (every peer against this package), the README's tables, and
choose.md, the tables of the page "How to choose".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
MARKS = ("<!-- results -->", "<!-- end of results -->")
OURS = "gmmkeops"
TITLES = {
    "em": "Seconds per EM iteration, same points, same start",
    "loss": "Seconds per loss and gradient, same parameters",
    "fit": "Whole fits, k-means to a tolerance of 1e-4",
    "bayes": "Seconds per iteration of variational Bayes, or per sweep of Gibbs sampling",
    "score": "Seconds for the log-densities of all points, same parameters",
    "target": "Seconds from nothing to a mean log-likelihood, start included",
}


def seconds(value: float) -> str:
    return (
        f"{value:.1f}"
        if value >= 10
        else f"{value:.2f}"
        if value >= 1
        else f"{value:.3f}"
        if value >= 0.01
        else f"{value:.5f}"
    )


def reference(rows: list[dict[str, Any]]) -> float:
    """What the others of a case are compared with: this package as it comes, or its fastest way."""
    own = [row for row in rows if row["peer"].startswith(OURS) and "seconds" in row]
    default = [row for row in own if row["peer"] == OURS]
    return (default or own)[0]["seconds"] if own else float("nan")


def by_case(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["case"], []).append(row)
    return found


def roof(row: dict[str, Any], rates: dict[str, float]) -> str:
    """Part of the machine's rate that an EM iteration over every pair reaches: two products and one exponential a pair."""
    if row["kind"] != "em" or row.get("pairs") != 1 or row.get("engine") != "dense" or "float64_flops" not in rates:
        return ""
    features = 1 + row["D"] + row["D"] * (row["D"] + 1) // 2
    rate = rates["float32_flops" if "float32" in row["peer"] else "float64_flops"]
    least = row["N"] * row["K"] * (4 * features / rate + 1 / rates["exp_per_s"])
    return f"{least / row['seconds']:.0%}"


def table(record: dict[str, Any], kind: str) -> list[str]:
    lines = [f"## {TITLES[kind]}", ""]
    lines += [
        "| case | who | seconds | ratio | cold | memory | log-likelihood | remarks |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, rows in by_case([row for row in record["rows"] if row["kind"] == kind]).items():
        base = reference(rows)
        for row in rows:
            if "error" in row:
                lines.append(f"| {case} | {row['peer']} | | | | | | {row['error']} |")
                continue
            remarks = [row["engine"]] if "engine" in row else []
            if row.get("pairs", 1) < 1:
                remarks.append(f"{row['pairs']:.2%} of all pairs, error at most {row['certificate']:.0e} nats")
            if part := roof(row, record["roofline"]):
                remarks.append(f"{part} of the roof")
            if "start_seconds" in row:
                remarks.append(f"{row['iterations']} iterations, start {row['start_seconds']:.1f} s")
            likelihood = f"{row['log_likelihood']:.5f}" if "log_likelihood" in row else ""
            cold = seconds(row["cold_seconds"]) if "cold_seconds" in row else ""
            lines.append(
                f"| {case} | {row['peer']} | {seconds(row['seconds'])} | {row['seconds'] / base:.1f}x | {cold} | "
                f"{row['peak_MB']:.0f} MB | {likelihood} | {', '.join(remarks)} |"
            )
    return [*lines, ""]


def markdown(record: dict[str, Any]) -> list[str]:
    machine, rates = record["machine"], record["roofline"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"# {machine.get('gpu', machine['processor'])}, {machine['cores']} cores, {record['date']}",
        "",
        f"{record['what'][:1].upper()}{record['what'][1:]}. {versions}, Python {machine['python']}.",
        "",
    ]
    if "exp_per_s" in rates:
        lines += [
            f"The machine, with all cores, in the same run: {rates['exp_per_s']:.2e} float32 exponentials a second, "
            f"{rates['float64_flops'] / 1e9:.0f} (float64) and {rates['float32_flops'] / 1e9:.0f} (float32) GFLOP/s in matrix "
            "products. The roof of an EM iteration over every pair is two float64 products (float32, where a row says "
            "so) with the quadratic features and one exponential for each pair.",
            "",
        ]
    for kind in TITLES:
        if any(row["kind"] == kind for row in record["rows"]):
            lines += table(record, kind)
    return lines


def short(row: dict[str, Any] | None, base: float) -> str:
    """A peer's seconds and ratio, or in a few words why there are none."""
    if row is None:
        return ""
    if "error" in row:
        words = {"memory": "out of memory", "takes": "too slow", "stops": "stops early", "installed": "not installed"}
        return next((brief for word, brief in words.items() if word in row["error"]), "fails")
    return f"{seconds(row['seconds'])} s ({row['seconds'] / base:.1f}x)"


def readme(record: dict[str, Any]) -> str:
    """What the README says of the results, between its markers; a test holds it to this."""
    em = by_case([row for row in record["rows"] if row["kind"] == "em"])
    names = ("scikit-learn", "tgmm", "pomegranate", "torchgmm", "gmmx", "torch in chunks")
    lines = ["| one EM iteration | gmmkeops | every pair | float32 products | " + " | ".join(names) + " |"]
    lines.append("|---" * (4 + len(names)) + "|")
    for case, rows in em.items():
        peers = {row["peer"]: row for row in rows}
        if not any(name in peers for name in names):
            continue
        base = reference(rows)
        first = next(row for row in rows if row["peer"].startswith(OURS) and row["seconds"] == base)
        own = f"{seconds(base)} s, {first['peak_MB']:.0f} MB"
        others = " | ".join(short(peers.get(name), base) for name in names)
        ways = " | ".join(short(peers.get(f"gmmkeops, {way}"), base) for way in ("every pair", "float32 products"))
        lines.append(f"| {case} | {own} | {ways} | {others} |")
    lines += [
        "",
        "| 10⁶ points of a surface, D = 3, ε = 10⁻⁴ | s per iteration | pairs evaluated | memory |",
        "|---|---|---|---|",
    ]
    for rows in em.values():
        for row in rows:
            if row["peer"] == "gmmkeops, 1e-4" and "seconds" in row:
                name = f"K = {row['K']}" if row["N"] == 1_000_000 else f"10⁷ points, K = {row['K']}"
                lines.append(f"| {name} | {seconds(row['seconds'])} | {row['pairs']:.2%} | {row['peak_MB']:.0f} MB |")
    lines += [
        "",
        "| from the data alone, initialization included | who | seconds | mean log-likelihood |",
        "|---|---|---|---|",
    ]
    for row in record["rows"]:
        if row["kind"] in ("target", "fit"):
            value = f"{row['seconds']:.1f} | {row['log_likelihood']:.4f}" if "seconds" in row else f"{row['error']} | "
            lines.append(f"| {row['case']} | {row['peer']} | {value} |")
    titles = {
        "loss": (
            "one loss and its gradient",
            {"GMM module": "`GMM` + `log_prob`", "KeOps tutorial": "", "zuko": ""},
            OURS,
        ),
        "score": ("log-densities", {"torch.distributions": "", "scikit-learn": ""}, OURS),
        "bayes": (
            "one iteration of a posterior",
            {"gmmkeops, Gibbs": "Gibbs sweep", "scikit-learn": "scikit-learn, variational"},
            "variational",
        ),
    }
    for kind, (title, others, first) in titles.items():
        heads = [title, first, *(head or name for name, head in others.items())]
        lines += ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for case, rows in by_case([row for row in record["rows"] if row["kind"] == kind]).items():
            peers, base = {row["peer"]: row for row in rows}, reference(rows)
            cells = [case.partition(", ")[2], f"{seconds(base)} s", *(short(peers.get(name), base) for name in others)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def scaling(record: dict[str, Any], path: Path) -> None:
    """Seconds per iteration on the surface against K: this package with lists and with every pair, and who can follow."""
    import matplotlib.pyplot as plt

    rows = [
        row
        for row in record["rows"]
        if row["kind"] == "em" and row["case"].startswith("surface, 1e6") and "seconds" in row
    ]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    names = {"gmmkeops, 1e-4": "gmmkeops, certified lists (ε = 1e-4)", "gmmkeops, every pair": "gmmkeops, every pair"}
    marks = iter("so^Dv<>ph*")
    for peer in dict.fromkeys(row["peer"] for row in rows):
        if peer == OURS or "KeOps" in peer:
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
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def peers(record: dict[str, Any], path: Path) -> None:
    """How many times as long each peer takes for an EM iteration."""
    import matplotlib.pyplot as plt

    cases = {
        case: rows
        for case, rows in by_case([row for row in record["rows"] if row["kind"] == "em"]).items()
        if any(not row["peer"].startswith(OURS) for row in rows)
    }
    names = list(
        dict.fromkeys(row["peer"] for rows in cases.values() for row in rows if not row["peer"].startswith(OURS))
    )
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        for place, rows in enumerate(cases.values()):
            row = next((row for row in rows if row["peer"] == name), {})
            x = place + (number - (len(names) - 1) / 2) * width
            if "seconds" in row:
                label = name if place == 0 else None
                axes.bar(x, row["seconds"] / reference(rows), width, color=f"C{number}", label=label)
            elif row:
                axes.text(x, 1.1, row["error"], rotation=90, ha="center", va="bottom", fontsize=6, color=f"C{number}")
    axes.axhline(1, color="k", lw=0.8)
    axes.set(yscale="log", xticks=range(len(cases)), ylabel=f"times as long as {OURS}", title="One EM iteration")
    axes.set_xticklabels(list(cases), fontsize=8)
    axes.legend(fontsize=8, frameon=False, ncols=3)
    axes.set_xlim(-0.6, len(cases) - 0.4)
    axes.set_ylim(0.8, axes.get_ylim()[1] * 4)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def grid(names: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in [names, ["---"] * len(names), *rows]]


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


def main() -> None:
    import matplotlib
    import matplotlib.style

    matplotlib.use("Agg")
    matplotlib.style.use(README.parent / "gallery/gallery.mplstyle")
    lines: list[str] = []
    for device in ("cpu", "cuda"):
        path = RESULTS / f"{device}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        lines += markdown(record)
        if device == "cpu":
            page = README.read_text()
            head, rest = page.split(MARKS[0])
            README.write_text(head + MARKS[0] + "\n" + readme(record) + "\n" + MARKS[1] + rest.split(MARKS[1])[1])
            scaling(record, RESULTS / "scaling.png")
            peers(record, RESULTS / "peers.png")
    if (RESULTS / "choose.json").exists():
        (RESULTS / "choose.md").write_text(choices(json.loads((RESULTS / "choose.json").read_text())))
    if not lines:
        raise SystemExit("there are no results yet; run python bench/run.py first.")
    (RESULTS / "report.md").write_text("\n".join(lines).rstrip() + "\n")
    print(f"wrote {RESULTS / 'report.md'}")


if __name__ == "__main__":
    main()
