"""Commands that fit mixtures: ``fit`` and ``select``."""

from __future__ import annotations

import time
from typing import Any

import torch

from gmmkeops.analysis import select as select_model
from gmmkeops.cli.values import integers, listed, report, source_of
from gmmkeops.components import factor_class
from gmmkeops.data import World, join
from gmmkeops.estimators import GaussianMixture
from gmmkeops.fitting import EM, Adam, Checkpoint, Method
from gmmkeops.models import MIXTURES, check_output, save

__all__ = ["fit", "select"]


def fit(options: Any) -> int:
    """Fit a mixture and write it to a file."""
    began = time.perf_counter()
    check_output(options.out, MIXTURES)
    join()
    batch = options.batch_size
    settings: Any = {"batch_size": batch, "tol": options.tol, "max_iter": options.max_iter}
    solver: Method[Any] = EM(**settings) if options.solver == "em" else Adam(**settings)
    source = source_of(options)
    check_output(options.out, MIXTURES, inputs=source.paths)
    if options.checkpoint is not None:
        check_output(options.checkpoint, inputs=[*source.paths, options.out], name="--checkpoint")
    model = GaussianMixture(
        options.components,
        covariance_type=options.covariance,
        solver=solver,
        random_state=options.seed,
        dtype=options.dtype,
        device=options.device,
        max_memory=options.max_memory,
        verbose=0 if options.quiet or World().rank else 2,
        verbose_interval=1,
        checkpoint=None if options.checkpoint is None else Checkpoint(options.checkpoint, options.checkpoint_every),
    ).fit(source)
    if World().rank:
        return 0
    save(model, options.out)
    result = model.result_
    facts = {
        "out": str(options.out),
        "components": model.n_components_,
        "features": model.n_features_in_,
        "log_likelihood": result.log_likelihood,
        "converged": model.converged_,
        "iterations": model.n_iter_,
        "n_active_components": result.report.n_active_components,
        "certificate": result.report.certificate,
        "seconds": time.perf_counter() - began,
    }
    report(options, facts, f"{result}\nwritten to {options.out}")
    return 0


def select(options: Any) -> None:
    """Fit a mixture for each number of components and covariance type; print a criterion, and write the best mixture."""
    types = listed(options.covariance)
    for kind in types:
        factor_class(kind)
    source = source_of(options)
    if options.out is not None:
        check_output(options.out, MIXTURES, inputs=source.paths)
    found = select_model(
        source,
        options.components if options.components == "auto" else integers(options.components),
        types,
        criterion=options.criterion,
        max_components=options.most,
        generator=torch.Generator().manual_seed(options.seed),
        max_iter=options.max_iter,
        dtype=options.dtype,
        max_memory=options.max_memory,
        verbose=None if not options.quiet else False,
    )
    if options.out is not None:
        save(found.best, options.out)
    report(options, {"criterion": found.criterion, "rows": found.rows, "reason": found.reason}, str(found))
