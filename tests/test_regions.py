"""Regions: samples within shells of standard deviations, and within confidence regions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import FAMILIES, random_mixture

import gmmkeops as gk


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def distances(mixture, x, labels):
    z = (x - mixture.means[labels])[:, None, :].expand(-1, mixture.n_components, -1)
    return mixture.factor.whiten(z)[torch.arange(len(x)), labels].norm(dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("low", "high"), [(1.0, 2.0), (3.0, math.inf), (5.0, math.inf), (0.0, 0.5), (20.0, 20.5)])
def test_shells_are_exact(family, low, high):
    """Radii follow the truncated chi law: 20 000 draws, Kolmogorov-Smirnov at chance 1e-6."""
    mixture = random_mixture(family, D=3)
    x, labels = mixture.sample(20_000, return_labels=True, generator=seeded(), std_range=(low, high))
    radius = distances(mixture, x, labels).numpy()
    assert radius.min() >= low * (1 - 1e-9)
    assert radius.max() <= high * (1 + 1e-9)
    chi = scipy.stats.chi(3)
    top, bottom = chi.sf(low), chi.sf(high)
    assert scipy.stats.kstest(radius, lambda r: (top - chi.sf(r)) / (top - bottom)).pvalue > 1e-6
    share = torch.bincount(labels, minlength=4) / 20_000
    assert bool(((share - mixture.weights).abs() < 5 * (mixture.weights / 20_000).sqrt()).all())


def test_confidence_component_and_twenty_points_beyond_five_sigma():
    mixture = random_mixture("full")
    x, labels = mixture.sample(5000, return_labels=True, generator=seeded(), confidence=0.95, component=2)
    assert set(labels.tolist()) == {2}
    radius = distances(mixture, x, labels)
    edge = math.sqrt(scipy.stats.chi2(2).ppf(0.95))
    assert float(radius.max()) <= edge * (1 + 1e-9)
    assert float(radius.max()) > 0.99 * edge
    model = gk.GaussianMixture.from_mixture(mixture, random_state=0)
    far, of = model.sample(20, std_range=(5.0, np.inf))
    assert far.shape == (20, 2)
    assert bool((distances(mixture, torch.from_numpy(far), torch.from_numpy(of)) >= 5).all())
    for bad, message in (
        ({"std_range": (2.0, 1.0)}, "std_range must be"),
        ({"confidence": 1.5}, "confidence must be above 0"),
        ({"component": 9}, "component must be an integer from -4 to 3, got 9"),
        ({"std_range": (60.0, math.inf)}, "contains less probability than float64 can represent"),
        ({"std_range": (4.0, 5.0), "confidence": 0.5}, "is 1.177 standard deviations"),
    ):
        with pytest.raises(ValueError, match=message):
            mixture.sample(3, **bad)
