"""Conversion to scikit-learn's mixtures and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import random_mixture
from sklearn.mixture import GaussianMixture as Theirs

import gmmkeops as gk


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("family", ["full", "tied", "diag", "spherical"])
def test_scikit_learn_both_ways(family):
    x = random_mixture("full", K=3).sample(300, generator=seeded()).numpy()
    theirs = Theirs(3, covariance_type=family, random_state=0).fit(x)
    ours = gk.from_sklearn(theirs)
    assert np.allclose(ours.score_samples(x), theirs.score_samples(x))
    back = gk.to_sklearn(ours)
    assert np.allclose(back.score_samples(x), theirs.score_samples(x))
    assert np.array_equal(back.predict(x), theirs.predict(x))
    assert back.bic(x) == pytest.approx(theirs.bic(x))
    with pytest.raises(ValueError, match="is not fitted"):
        gk.from_sklearn(Theirs())


@pytest.mark.parametrize("family", ["tied_diag", "tied_spherical"])
def test_types_that_scikit_learn_lacks_become_tied(family):
    mixture = random_mixture(family)
    x = mixture.sample(20).numpy()
    assert np.allclose(gk.to_sklearn(mixture).score_samples(x), mixture.log_prob(x).numpy())
