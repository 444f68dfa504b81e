"""The certificate of truncation over many small scenes with trees of several levels, against float64 brute force."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import HAS_NATIVE
from test_truncation import EPSILONS, Maker, brute_force

import gmmkeops as gk
from gmmkeops.reductions.truncation.tree import Cloud


def cloud_of(maker):
    """Points in up to four dimensions, sorted into leaves of few points, or grouped by labels."""
    N, D = maker.number(1, 250), int(maker.i(1, 5, 1))
    x, kind = maker.points(N, D)
    x = x.to(torch.float32 if maker.chance(0.3) else torch.float64)
    rows = maker.number(4, 64)
    if maker.chance(0.15):
        return x, Cloud.grouped(x, maker.i(0, maker.number(1, 10), N), rows), kind
    return x, Cloud.tree(x, rows), kind


def violations(seed):
    """Errors beyond the certificate in the passes of a scene, and the number of passes that omitted something."""
    maker = Maker(seed)
    x, cloud, kind = cloud_of(maker)
    K, epsilon = maker.number(1, 300), maker.pick(EPSILONS)
    backend = "native" if HAS_NATIVE and maker.chance(0.8) else "dense"
    sweep, bound = gk.reductions.Truncation(cloud, epsilon), -math.log1p(-epsilon)
    step = maker.components(x.double(), K)
    weights = 10 ** maker.u(-6, 6, len(x)) * (maker.u(0, 1, len(x)) < 0.7)
    wrong, active = [], 0
    for number in range(2):
        e, rounding = brute_force(x, *step)
        truth = e.logsumexp(1)
        if x.dtype == torch.float64:
            slack = 1e-10 * truth.abs().clamp(min=1) + ((e - truth[:, None]).exp() * rounding).sum(1)
        else:
            truth = gk.reductions.logsumexp(x, *step, backend=backend, truncate=0).double()
            slack = 1e-5 * truth.abs().clamp(min=1)
        lost = truth - gk.reductions.logsumexp(sweep, *step, backend=backend).double()
        active += sweep.share < 1
        if not 0 <= sweep.certificate <= bound * (1 + 1e-9):
            wrong.append(f"seed {seed} ({kind}): certificate {sweep.certificate} above {bound}")
        beyond = torch.maximum(lost - sweep.certificate, -lost) - slack
        if not bool((beyond <= 0).all()):
            wrong.append(
                f"seed {seed} ({kind}, {x.dtype}, {backend}), step {number}: {float(beyond.max())} nats beyond"
            )
        if number == seed % 2:
            # Log-densities are clamped at the range of float32, and totals are not.
            weights = weights * (truth > -1e38) if x.dtype == torch.float32 else weights
            total = float(gk.reductions.moments(sweep, *step, weights=weights, backend=backend).total)
            lost, room = float(weights @ truth) - total, float(weights @ slack)
            if not -room <= lost <= sweep.certificate * float(weights.sum()) + room:
                wrong.append(f"seed {seed} ({kind}, {x.dtype}, {backend}), step {number}: the total differs by {lost}")
        step = maker.moved(x.double(), step, maker.i(0, K, max(1, K // 60)))
    return wrong, active


def search(first, count):
    found = [violations(seed) for seed in range(first, first + count)]
    return [line for wrong, _ in found for line in wrong], sum(active for _, active in found) / (2 * count)


def test_five_hundred_small_scenes():
    wrong, active = search(0, 500)
    assert not wrong, "\n".join(wrong)
    # Scenes prove little if nothing is omitted.
    assert active > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_a_hundred_thousand_small_scenes(part):
    """About ten minutes in all on one core."""
    wrong, _ = search(1000 + 5000 * part, 5000)
    assert not wrong, "\n".join(wrong[:20])
