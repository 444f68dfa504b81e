"""Marginal and conditional mixtures against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import FAMILIES, random_mixture


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_marginal_and_condition(family):
    mixture = random_mixture(family, D=4)
    x = mixture.sample(50, generator=seeded())
    keep, known = [3, 1], [0, 2]
    part = mixture.marginal(keep)
    C = mixture.factor.covariances()[:, keep][:, :, keep].expand(4, 2, 2).numpy()
    direct = sum(
        w * scipy.stats.multivariate_normal(m, S).pdf(x[:, keep].numpy())
        for w, m, S in zip(mixture.weights.numpy(), mixture.means[:, keep].numpy(), C, strict=True)
    )
    assert np.allclose(part.log_prob(x[:, keep]).exp().numpy(), direct)
    # p(a | b) p(b) = p(a, b)
    batch = mixture.condition(known, x[:, known])
    assert batch.batch_shape == (50,)
    rest = [1, 3]
    total = batch.log_prob(x[:, rest]) + mixture.marginal(known).log_prob(x[:, known])
    assert torch.allclose(total, mixture.log_prob(x))
    one = mixture.condition(known, x[3, known])
    assert torch.allclose(one.log_prob(x[3, rest]), batch.log_prob(x[:, rest])[3])
    for call, message in (
        (lambda: mixture.marginal([0, 0]), "columns must be distinct"),
        (lambda: mixture.marginal(4), "columns must be distinct"),
        (lambda: mixture.condition([0, 1, 2, 3], x[0]), "at least one column that is not given"),
        (lambda: mixture.condition([0], x[0]), r"values must have shape \(\*, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
