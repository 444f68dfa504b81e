"""Commands for the installation: ``doctor`` and ``warmup``."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict
from typing import Any

import torch

from gmmkeops import reductions
from gmmkeops._checks import as_device
from gmmkeops.cli.doctor import examine
from gmmkeops.cli.race import race
from gmmkeops.cli.values import integers, listed, report, say
from gmmkeops.components import factor_class

__all__ = ["doctor", "warmup"]

_SIGNS = {True: "ok", False: "!!", None: "--"}


def doctor(options: Any) -> int:
    """Check the installation, or time the engines, and print what was found."""
    if options.measure:
        return _measure(options)
    findings = examine()
    lines = []
    for finding in findings:
        lines.append(f"{_SIGNS[finding.ok]}  {finding.what:<18}{finding.says}")
        lines += [f"    type: {finding.remedy}"] if finding.remedy else []
    if options.json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=1) + "\n")
    else:
        sys.stdout.write("\n".join(lines) + "\n")
    return int(any(finding.ok is False for finding in findings))


def _measure(options: Any) -> int:
    """Time the engines on this machine; print the choices of ``"auto"`` and the figures behind them, and then each row."""
    if not options.json:
        sys.stdout.write(
            "backend='auto' uses the first of these engines that can run (in parentheses: times behind the order; those on "
            "CUDA are of an H200, for 1e6 points and 1000 components):\n"
        )
        for line in reductions.TABLE:
            most = "" if line.features == math.inf else f" up to D={line.features:.0f}"
            kind = "full" if line.full else "diagonal, spherical"
            sys.stdout.write(f"{line.device:<5}{kind}{most}: {', '.join(line.engines)}   ({line.figure})\n")
        sys.stdout.write("Times on this machine, moments of all points:\n")
    rows = []
    for row in race():
        rows.append(asdict(row) | {"fastest": row.fastest})
        if not options.json:
            sys.stdout.write(f"{row}\n")
            sys.stdout.flush()
    if options.json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
    return 0


def warmup(options: Any) -> int:
    """Compile the KeOps formulas of some dimensions, covariance types and dtypes."""
    rows, device = [], as_device(options.device)
    for D in integers(options.dimensions):
        for kind in listed(options.covariance):
            for name in listed(options.dtype):
                dtype = getattr(torch, name, None)
                if dtype not in (torch.float32, torch.float64):
                    raise ValueError(f"--dtype must be float32, float64 or both, got {name!r}.")
                began = time.perf_counter()
                x = torch.rand(64, D, dtype=dtype, device=device, requires_grad=True)
                means = torch.rand(2, D, dtype=torch.float64, device=device)
                units = {"full": torch.eye(D), "diag": torch.ones(D), "spherical": torch.ones(1)}
                unit = units[factor_class(kind)[0].family]
                factor = unit.expand(2, *unit.shape).double().to(device)
                if reductions.engine(x, "keops") != "keops":
                    raise ValueError("KeOps cannot run on this machine; run gmmkeops doctor to find the cause.")
                arguments = (x, means[:, 0], means, factor)
                reductions.logsumexp(*arguments, backend="keops").sum().backward()
                reductions.moments(x.detach(), *arguments[1:], backend="keops")
                reductions.argmax(x.detach(), *arguments[1:], backend="keops")
                seconds = time.perf_counter() - began
                rows.append({"dimension": D, "covariance": kind, "dtype": name, "seconds": seconds})
                say(f"D={D} {kind} {name}: {seconds:.1f} s")
    report(options, {"formulas": rows}, f"{len(rows)} sets of formulas are ready")
    return 0
