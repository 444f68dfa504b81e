"""Commands that use a fitted mixture: ``score``, ``predict``, ``sample``, ``info`` and ``convert``."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gmmkeops.cli.values import report, source_of
from gmmkeops.models import TABLES, Mixture, check_output, load, write_table

__all__ = ["convert", "info", "predict", "sample", "score"]


def _evaluate(options: Any, function: Callable[[Mixture, Tensor], Tensor], see: Callable[..., None]) -> Mixture:
    """Call ``see`` with the values and weights of each chunk of points; write the values if ``--out`` is given."""
    if options.out is not None:
        check_output(options.out, TABLES, inputs=[options.model])
    mixture = load(options.model)
    source = source_of(options).matched(mixture.columns)
    if options.out is not None:
        check_output(options.out, TABLES, inputs=source.paths)
    if source.features != mixture.n_features:
        raise ValueError(
            f"{source.name} has {source.features} columns, expected {mixture.n_features} as in the model; select --columns."
        )
    kept, rows, began = [], 0, time.perf_counter()
    for chunk in source.chunks():
        with torch.no_grad():
            values = function(mixture, chunk.points)
        see(values, torch.ones_like(values) if chunk.weights is None else chunk.weights)
        rows += len(values)
        if options.out is not None:
            kept.append(values.numpy())
        if time.perf_counter() - began > 2 and sys.stderr.isatty():
            sys.stderr.write(f"\r{rows} points ")
    if options.out is not None:
        write_table(options.out, np.concatenate(kept))
    return mixture


def score(options: Any) -> None:
    """Print the mean log-density of points; write the log-density of each point if ``--out`` is given."""
    total = mass = rows = 0.0

    def see(values: Tensor, weights: Tensor) -> None:
        nonlocal total, mass, rows
        total, mass, rows = total + float(values @ weights), mass + float(weights.sum()), rows + len(values)

    mixture = _evaluate(options, lambda mixture, x: mixture.log_prob(x).double(), see)
    P = mixture.parameter_count
    facts = {
        "log_likelihood": total / mass,
        "rows": int(rows),
        "bic": -2 * total + P * math.log(mass),
        "aic": -2 * total + 2 * P,
    }
    text = f"mean log-density {total / mass:.6f} nats per point, {int(rows)} points, BIC {facts['bic']:.2f}"
    report(options, facts, text)


def predict(options: Any) -> None:
    """Write the most probable component of each point."""
    counts: dict[int, int] = {}

    def see(labels: Tensor, weights: Tensor) -> None:
        for label, count in zip(*labels.unique(return_counts=True), strict=True):
            counts[int(label)] = counts.get(int(label), 0) + int(count)

    mixture = _evaluate(options, lambda mixture, x: mixture.predict(x), see)
    rows, used = sum(counts.values()), len(counts)
    facts = {"out": str(options.out), "rows": rows, "components_used": used}
    report(options, facts, f"{rows} points in {used} of {mixture.n_components} components; written to {options.out}")


def sample(options: Any) -> None:
    """Draw points from a mixture and write them to a file."""
    if options.number < 1:
        raise ValueError(f"--number must be at least 1, got {options.number}.")
    check_output(options.out, TABLES, inputs=[options.model])
    generator = torch.Generator().manual_seed(options.seed)
    points = load(options.model).sample((options.number,), generator=generator).double().numpy()
    write_table(options.out, points)
    report(options, {"out": str(options.out), "rows": len(points)}, f"{len(points)} points written to {options.out}")


def info(options: Any) -> None:
    """Print the parameters of a mixture."""
    mixture = load(options.model)
    weights, means = mixture.weights.double(), mixture.means.double()
    largest = weights.argsort(descending=True)[:5]
    facts = {
        "components": mixture.n_components,
        "features": mixture.n_features,
        "columns": None if mixture.columns is None else list(mixture.columns),
        "family": mixture.factor.family,
        "tied": mixture.factor.leading == 1 and mixture.n_components > 1,
        "parameters": mixture.parameter_count,
        "components_above_a_millionth": int((weights > 1e-6).sum()),
        "mean": mixture.mean.tolist(),
        "standard_deviation": mixture.variance.sqrt().tolist(),
        "low": means.amin(0).tolist(),
        "high": means.amax(0).tolist(),
        "largest": [{"weight": float(weights[k]), "mean": means[k].tolist()} for k in largest],
    }
    lines = [f"{name.replace('_', ' '):<30}{value}" for name, value in facts.items() if name != "largest"]
    lines += [f"component {k:<20}weight {float(weights[k]):.4f}, mean {means[k].tolist()}" for k in largest.tolist()]
    report(options, facts, "\n".join(lines))


def convert(options: Any) -> None:
    """Export a mixture for other programs."""
    from gmmkeops import export

    check_output(options.out, (".npz", ".ply"), inputs=[options.model])
    mixture, out = load(options.model), options.out
    facts: dict[str, Any] = {"out": str(out), "components": mixture.n_components}
    text = f"{mixture.n_components} components written to {out}"
    if out.suffix.lower() == ".npz":
        export.npz(mixture, out)
    elif options.kind == "ellipsoids":
        export.ellipsoids(mixture, out)
    else:
        facts["offset"] = export.splats(mixture, out).tolist()
        text += f"; add {facts['offset']} to its coordinates"
    report(options, facts, text)
