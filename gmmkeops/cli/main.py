"""The command line: fits, scores, samples, selects and converts from the shell; ``gmmkeops doctor`` says what works here.

Results go to standard output (as JSON with ``--json``), progress and messages to standard error. Exit codes: 0 for success,
1 for an error that is told in one sentence, 2 for a command that was not understood. Each command imports what it needs, since
torch takes a second or two to import, and a command that is not understood needs none of it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from gmmkeops.data import Source
    from gmmkeops.fitting import Method
    from gmmkeops.models import Mixture

__all__ = ["main"]

_SIGNS = {True: "ok", False: "!!", None: "--"}

_TYPES = ("full", "tied", "diag", "spherical", "tied_diag", "tied_spherical")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code.

    Args:
        arguments: As on the command line, without the program's name.
    """
    options = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
        try:
            from gmmkeops.data import RankError

            try:
                return int(options.run(options) or 0)
            except (ValueError, TypeError, OSError, ImportError, MemoryError, RankError) as error:
                _say(f"error: {error}")
                return 1
        except KeyboardInterrupt:
            _say("interrupted")
            return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gmmkeops", description="Gaussian mixtures for big point clouds.")
    parser.add_argument("--version", action="version", version=f"gmmkeops {version('gmmkeops')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run: Callable[[Any], int | None], what: str, examples: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=what,
            description=f"{what[0].upper()}{what[1:]}.",
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.add_argument("--json", action="store_true", help="the result as JSON")
        made.set_defaults(run=run)
        return made

    fit = command(
        "fit",
        _fit,
        "fit a mixture to files of points",
        "  gmmkeops fit scan.laz -k 500 --out scan.safetensors\n"
        '  gmmkeops fit "shards/*.parquet" -k 2000 --columns ra,dec,z --checkpoint stars.ckpt --out stars.safetensors\n'
        "  torchrun --nproc-per-node 4 -m gmmkeops.cli fit scan.laz -k 500 --out scan.safetensors",
    )
    _points(fit)
    fit.add_argument("-k", "--components", type=int, required=True, help="number of components")
    fit.add_argument("--out", type=Path, required=True, help="file for the mixture (.safetensors)")
    fit.add_argument("--solver", choices=("em", "adam"), default="em", help="default: em")
    fit.add_argument("--batch-size", type=int, help="points per step; all at once if left out")
    fit.add_argument("--tol", type=float, default=1e-3, help="stop below this change, nats per point (default: 1e-3)")
    fit.add_argument("--device", help="where to compute, e.g. cuda")
    fit.add_argument("--checkpoint", type=Path, help="file that keeps the state; a fit that finds it goes on from it")
    fit.add_argument("--checkpoint-every", type=float, default=60.0, metavar="SECONDS", help="default: 60")
    _fitting(fit)

    score = command(
        "score",
        _score,
        "mean log-density of files of points, and each point's if wanted",
        "  gmmkeops score scan.safetensors other.laz\n  gmmkeops score scan.safetensors other.laz --out densities.npy",
    )
    predict = command(
        "predict",
        _predict,
        "the component of each point",
        "  gmmkeops predict scan.safetensors other.laz --out labels.npy",
    )
    for made, needed in ((score, False), (predict, True)):
        made.add_argument("model", type=Path, help="a mixture's file")
        _points(made)
        made.add_argument("--out", type=Path, required=needed, help=".npy or .csv file with one number per point")

    sample = command(
        "sample",
        _sample,
        "draw points from a mixture",
        "  gmmkeops sample scan.safetensors -n 100000 --seed 0 --out points.npy",
    )
    sample.add_argument("model", type=Path, help="a mixture's file")
    sample.add_argument("-n", "--number", type=int, default=1000, help="how many (default: 1000)")
    sample.add_argument("--seed", type=int, default=0, help="another seed draws other points (default: 0)")
    sample.add_argument("--out", type=Path, required=True, help=".npy or .csv file")

    select = command(
        "select",
        _select,
        "compare numbers of components and covariance types",
        "  gmmkeops select scan.laz -k 5,10,20 --covariance full,diag --out best.safetensors",
    )
    _points(select)
    select.add_argument("-k", "--components", required=True, help="numbers to try: 2,4,8 or 1:10 or 10:100:10")
    select.add_argument("--criterion", choices=("bic", "aic", "icl"), default="bic", help="default: bic")
    select.add_argument("--out", type=Path, help="file for the best mixture (.safetensors)")
    _fitting(select)

    info = command("info", _info, "what is in a mixture's file", "  gmmkeops info scan.safetensors")
    info.add_argument("model", type=Path, help="a mixture's file")

    convert = command(
        "convert",
        _convert,
        "write a mixture for other programs",
        "  gmmkeops convert scan.safetensors scan.npz                    arrays under scikit-learn's names\n"
        "  gmmkeops convert scan.safetensors scan.ply --as splats        Gaussian splats (three dimensions)\n"
        "  gmmkeops convert scan.safetensors mesh.ply --as ellipsoids    a mesh of ellipsoids (three dimensions)",
    )
    convert.add_argument("model", type=Path, help="a mixture's file")
    convert.add_argument("out", type=Path, help=".npz or .ply file")
    convert.add_argument("--as", dest="kind", choices=("splats", "ellipsoids"), default="splats", help="of a .ply file")

    command(
        "doctor",
        _doctor,
        "what works on this machine, and what to type where something does not",
        "  gmmkeops doctor\n  gmmkeops doctor --json > report.json",
    )
    warmup = command(
        "warmup",
        _warmup,
        "compile the KeOps formulas that later runs will need",
        "  gmmkeops warmup -d 3\n  gmmkeops warmup -d 2,3 --covariance full,diag --dtype float32,float64 --device cuda",
    )
    warmup.add_argument("-d", "--dimensions", required=True, help="dimensions: 3, or 2,3")
    warmup.add_argument("--covariance", default="full", help="types, with commas (default: full)")
    warmup.add_argument("--dtype", default="float32", help="float32, float64 or both (default: float32)")
    warmup.add_argument("--device", default="cpu", help="default: cpu")
    return parser


def _points(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", nargs="+", help="files of points (.npy .parquet .las .laz .ply), folders or patterns")
    parser.add_argument(
        "--columns", help="names of the coordinates, or numbers where columns have no names, with commas"
    )
    parser.add_argument("--classes", help="classes of a LAS file to read, with commas")
    parser.add_argument("--weights", help="name or number of the column with the points' weights")


def _fitting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--covariance", default="full", help=f"one of {', '.join(_TYPES)} (default: full)")
    parser.add_argument("--max-iter", type=int, default=100, help="iterations at most (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="for the same start each time (default: 0)")
    parser.add_argument("--dtype", choices=("float32", "float64"), help="to compute in (default: that of the data)")
    parser.add_argument("--max-memory", help="that the fit may take, such as 1.5GB")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _tell(options: Any, facts: dict[str, Any], text: str) -> None:
    """A result on standard output."""
    sys.stdout.write((json.dumps(facts) if options.json else text) + "\n")


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _name(text: str) -> str | int:
    return int(text) if text.lstrip("-").isdigit() else text


def _source(options: Any) -> Source:
    from gmmkeops.data import Source

    classes = None if options.classes is None else _list(options.classes)
    if classes is not None and not all(part.isdigit() for part in classes):
        raise ValueError(f"--classes takes numbers of classes with commas, such as 2,6, got {options.classes!r}.")
    return Source.of(
        options.input,
        columns=None if options.columns is None else [_name(part) for part in _list(options.columns)],
        classes=None if classes is None else [int(part) for part in classes],
        weights=None if options.weights is None else _name(options.weights),
    )


def _fit(options: Any) -> int:
    from gmmkeops import distributed, models
    from gmmkeops.estimators import GaussianMixture
    from gmmkeops.fitting import EM, Adam, Checkpoint

    began = time.perf_counter()
    models.check_output(options.out, models.MIXTURES)
    distributed.join()
    batch = options.batch_size
    settings: Any = {"batch_size": batch, "tol": options.tol, "max_iter": options.max_iter}
    solver: Method[Any] = EM(**settings) if options.solver == "em" else Adam(**settings)
    source = _source(options)
    models.check_output(options.out, models.MIXTURES, inputs=source.paths)
    if options.checkpoint is not None:
        models.check_output(options.checkpoint, inputs=[*source.paths, options.out], name="--checkpoint")
    model = GaussianMixture(
        options.components,
        covariance_type=options.covariance,
        solver=solver,
        random_state=options.seed,
        dtype=options.dtype,
        device=options.device,
        max_memory=options.max_memory,
        verbose=0 if options.quiet or distributed.World().rank else 2,
        verbose_interval=1,
        checkpoint=None if options.checkpoint is None else Checkpoint(options.checkpoint, options.checkpoint_every),
    ).fit(source)
    if distributed.World().rank:
        return 0
    models.save(model, options.out)
    result = model.result_
    facts = {
        "out": str(options.out),
        "components": model.n_components,
        "features": model.n_features_in_,
        "log_likelihood": result.log_likelihood,
        "converged": model.converged_,
        "iterations": model.n_iter_,
        "live_components": result.report.live_components,
        "certificate": result.report.certificate,
        "seconds": time.perf_counter() - began,
    }
    _tell(options, facts, f"{result}\nwritten to {options.out}")
    return 0


def _each(options: Any, function: Callable[[Mixture, Tensor], Tensor], see: Callable[..., None]) -> Mixture:
    """Shows ``see`` a number for each point and the points' weights, chunk by chunk; writes the numbers where wanted."""
    import numpy as np
    import torch

    from gmmkeops import models

    if options.out is not None:
        models.check_output(options.out, models.TABLES, inputs=[options.model])
    mixture = models.load(options.model)
    source = _source(options).matched(mixture.columns)
    if options.out is not None:
        models.check_output(options.out, models.TABLES, inputs=source.paths)
    if source.features != mixture.features:
        raise ValueError(
            f"{source.name} has {source.features} columns, the model {mixture.features}; choose --columns."
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
        models.write_table(options.out, np.concatenate(kept))
    return mixture


def _score(options: Any) -> None:
    total = mass = rows = 0.0

    def see(values: Tensor, weights: Tensor) -> None:
        nonlocal total, mass, rows
        total, mass, rows = total + float(values @ weights), mass + float(weights.sum()), rows + len(values)

    mixture = _each(options, lambda mixture, x: mixture.log_prob(x).double(), see)
    P = mixture.parameter_count
    facts = {
        "log_likelihood": total / mass,
        "rows": int(rows),
        "bic": -2 * total + P * math.log(mass),
        "aic": -2 * total + 2 * P,
    }
    text = f"mean log-density {total / mass:.6f} nats per point, {int(rows)} points, BIC {facts['bic']:.2f}"
    _tell(options, facts, text)


def _predict(options: Any) -> None:
    counts: dict[int, int] = {}

    def see(labels: Tensor, weights: Tensor) -> None:
        for label, count in zip(*labels.unique(return_counts=True), strict=True):
            counts[int(label)] = counts.get(int(label), 0) + int(count)

    mixture = _each(options, lambda mixture, x: mixture.predict(x), see)
    rows, used = sum(counts.values()), len(counts)
    facts = {"out": str(options.out), "rows": rows, "components_used": used}
    _tell(options, facts, f"{rows} points in {used} of {mixture.components} components; written to {options.out}")


def _sample(options: Any) -> None:
    import torch

    from gmmkeops import models

    if options.number < 1:
        raise ValueError(f"--number must be at least 1, got {options.number}.")
    models.check_output(options.out, models.TABLES, inputs=[options.model])
    generator = torch.Generator().manual_seed(options.seed)
    points = models.load(options.model).sample((options.number,), generator=generator).double().numpy()
    models.write_table(options.out, points)
    _tell(options, {"out": str(options.out), "rows": len(points)}, f"{len(points)} points written to {options.out}")


def _numbers(text: str) -> list[int]:
    """2,4,8, or 1:10, or 10:100:10 with both ends."""
    try:
        if ":" not in text:
            return [int(part) for part in _list(text)]
        first, last, *step = [int(part) for part in text.split(":")]
        return list(range(first, last + 1, *step))
    except ValueError:
        raise ValueError(f"numbers of components look like 2,4,8 or 1:10 or 10:100:10, got {text!r}.") from None


def _select(options: Any) -> None:
    import torch

    from gmmkeops import analysis, models
    from gmmkeops.components import factor_class

    types = _list(options.covariance)
    for kind in types:
        factor_class(kind)
    source = _source(options)
    if options.out is not None:
        models.check_output(options.out, models.MIXTURES, inputs=source.paths)
    found = analysis.select(
        source,
        _numbers(options.components),
        types,
        criterion=options.criterion,
        generator=torch.Generator().manual_seed(options.seed),
        max_iter=options.max_iter,
        dtype=options.dtype,
        max_memory=options.max_memory,
        progress=None if not options.quiet else False,
    )
    if options.out is not None:
        models.save(found.best, options.out)
    _tell(options, {"criterion": found.criterion, "rows": found.rows}, str(found))


def _info(options: Any) -> None:
    from gmmkeops import models

    mixture = models.load(options.model)
    weights, means = mixture.weights.double(), mixture.means.double()
    largest = weights.argsort(descending=True)[:5]
    facts = {
        "components": mixture.components,
        "features": mixture.features,
        "columns": None if mixture.columns is None else list(mixture.columns),
        "family": mixture.factor.family,
        "tied": mixture.factor.leading == 1 and mixture.components > 1,
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
    _tell(options, facts, "\n".join(lines))


def _convert(options: Any) -> None:
    from gmmkeops import export, models

    models.check_output(options.out, (".npz", ".ply"), inputs=[options.model])
    mixture, out = models.load(options.model), options.out
    facts: dict[str, Any] = {"out": str(out), "components": mixture.components}
    text = f"{mixture.components} components written to {out}"
    if out.suffix.lower() == ".npz":
        export.npz(mixture, out)
    elif options.kind == "ellipsoids":
        export.ellipsoids(mixture, out)
    else:
        facts["offset"] = export.splats(mixture, out).tolist()
        text += f"; add {facts['offset']} to its coordinates"
    _tell(options, facts, text)


def _doctor(options: Any) -> int:
    from gmmkeops.cli import doctor

    findings = doctor.examine()
    lines = []
    for finding in findings:
        lines.append(f"{_SIGNS[finding.ok]}  {finding.what:<18}{finding.says}")
        lines += [f"    type: {finding.remedy}"] if finding.remedy else []
    if options.json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=1) + "\n")
    else:
        sys.stdout.write("\n".join(lines) + "\n")
    return int(any(finding.ok is False for finding in findings))


def _warmup(options: Any) -> int:
    import torch

    from gmmkeops import reductions
    from gmmkeops.components import factor_class

    rows, device = [], torch.device(options.device)
    for D in _numbers(options.dimensions):
        for kind in _list(options.covariance):
            for name in _list(options.dtype):
                dtype = getattr(torch, name, None)
                if dtype not in (torch.float32, torch.float64):
                    raise ValueError(f"--dtype must be float32, float64 or both, got {name!r}.")
                began = time.perf_counter()
                x = torch.rand(64, D, dtype=dtype, device=device, requires_grad=True)
                means = torch.rand(2, D, dtype=torch.float64, device=device)
                unit = factor_class(kind)[0].compact(torch.eye(D, dtype=torch.float64))
                factor = factor_class(kind)[0].from_covariances(unit.expand(2, *unit.shape), features=D).to(device)
                if reductions.engine(x, "keops") != "keops":
                    raise ValueError("KeOps cannot run here; gmmkeops doctor says why.")
                arguments = (x, means[:, 0], means, factor)
                reductions.logsumexp(*arguments, backend="keops").sum().backward()
                reductions.moments(x.detach(), *arguments[1:], backend="keops")
                reductions.argmax(x.detach(), *arguments[1:], backend="keops")
                seconds = time.perf_counter() - began
                rows.append({"dimension": D, "covariance": kind, "dtype": name, "seconds": seconds})
                _say(f"D={D} {kind} {name}: {seconds:.1f} s")
    _tell(options, {"formulas": rows}, f"{len(rows)} sets of formulas are ready")
    return 0
