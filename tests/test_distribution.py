"""A mixture as a torch distribution: empty shapes, validation, and torch's wrappers."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import FAMILIES, batch_of, random_mixture
from torch.distributions import (
    AffineTransform,
    Distribution,
    Independent,
    MixtureSameFamily,
    TransformedDistribution,
)

import gmmkeops as gk


@pytest.mark.parametrize("sample_shape", [(0,), (2, 0), (0, 3), (4,)])
@pytest.mark.parametrize("batch", [(), (3,), (0,), (2, 0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_empty_shapes(family, batch, sample_shape):
    m = batch_of(family, batch)
    draws, labels = m.sample(sample_shape, return_labels=True)
    assert draws.shape == (*sample_shape, *batch, 2)
    assert labels.shape == draws.shape[:-1]
    assert m.sample(sample_shape, confidence=0.5).shape == draws.shape
    x = draws.clone().requires_grad_()
    values = m.log_prob(x)
    assert values.shape == (*sample_shape, *batch)
    assert torch.autograd.grad(values.sum(), x)[0].shape == x.shape
    assert m.log_joint(x).shape == m.responsibilities(x).shape == (*values.shape, 3)
    if not batch:
        assert m.predict(x).shape == values.shape
        assert [t.shape for t in m.responsibilities(x, 2)] == [(*values.shape, 2)] * 2
        assert m.predict(x).dtype == torch.int64
    one = m.marginal(1)
    assert one.cdf(draws[..., 1:]).shape == values.shape
    assert one.icdf(torch.full(values.shape, 0.3)).shape == (*values.shape, 1)
    assert m.mean.shape == (*batch, 2)
    assert m.variance.shape == (*batch, 2)


def test_a_context_without_rows():
    model = gk.GMM(2, context=3, n_components=2)
    mixtures = model(torch.zeros(0, 3))
    assert mixtures.batch_shape == (0,)
    assert mixtures.sample((5,)).shape == (5, 0, 2)
    values = mixtures.log_prob(torch.zeros(0, 2))
    assert values.shape == (0,)
    values.sum().backward()
    assert mixtures.responsibilities(torch.zeros(0, 2)).shape == (0, 2)
    assert model(torch.zeros(4, 0, 3)).log_prob(torch.zeros(4, 0, 2)).shape == (4, 0)
    assert random_mixture("full").condition(0, torch.zeros(0, 1)).log_prob(torch.zeros(0, 1).double()).shape == (0,)
    with pytest.raises(ValueError, match="k must be between 1 and the 4 components, got 5"):
        random_mixture("full").responsibilities(torch.zeros(0, 2), 5)


BAD = torch.tensor([[0.0, 0.0], [math.nan, 0.0], [math.inf, 0.0], [-math.inf, 1.0], [1.0, 2.0]]).double()


def check_what_unchecked_points_give(m):
    values = m.log_prob(BAD.clone().requires_grad_())
    assert torch.isnan(values).tolist() == [False, True, False, False, False]
    assert (values == -math.inf).tolist() == [False, False, True, True, False]
    sound = gk.Mixture(m.logits, m.means, m.factor, validate_args=True)
    assert torch.equal(values[[0, 4]], sound.log_prob(BAD[[0, 4]]))
    with pytest.raises(ValueError, match="x must be finite, got NaN at row 1, column 0"):
        sound.log_prob(BAD)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_methods_that_read_points_find_nan(batch):
    m = batch_of("full", batch)
    x = torch.zeros(2, *batch, 2).double()
    x[1, ..., 0] = math.nan
    one = m.marginal(0)
    free = gk.Mixture(one.logits, one.means, one.factor, validate_args=False)
    for method in (m.log_prob, m.log_joint, m.responsibilities, lambda x: one.cdf(x[..., :1])):
        with pytest.raises(ValueError, match="x must be finite, got NaN at row"):
            method(x)
    assert torch.isnan(free.cdf(x[..., :1])[1]).all()
    for end, share in ((-math.inf, 0.0), (math.inf, 1.0)):
        assert torch.allclose(one.cdf(torch.full((*batch, 1), end)), torch.full(batch, share).double())


def test_checks_can_be_switched_off_for_one_mixture():
    m = random_mixture("full")
    with pytest.raises(ValueError, match="x must be finite"):
        m.log_prob(BAD)
    with pytest.raises(ValueError, match="means must be finite"):
        gk.Mixture(m.logits, m.means * math.nan, m.factor)
    free = gk.Mixture(m.logits, m.means, m.factor, validate_args=False)
    for one in (free, free.to(torch.float64), free.expand(()), free.detach(), free.select(torch.arange(4))):
        check_what_unchecked_points_give(one)
    gk.Mixture(m.logits, m.means * math.nan, m.factor, validate_args=False)
    with pytest.raises(ValueError, match="logits must have shape"):
        gk.Mixture(m.logits, m.means[0], m.factor, validate_args=False)


def test_checks_can_be_switched_off_for_all(unchecked):
    """As for all distributions of torch, also those that exist already; what a mixture was told itself goes first."""
    m = random_mixture("full")
    always = gk.Mixture(m.logits, m.means, m.factor, validate_args=True)
    for one in (m, m.marginal([0, 1]), m.expand(()), gk.Mixture(m.logits, m.means, m.factor)):
        check_what_unchecked_points_give(one)
    assert torch.isnan(gk.GMM(2)().log_prob(BAD.float())).tolist() == [False, True, False, False, False]
    gk.Mixture(m.logits, m.means * math.nan, m.factor)
    with pytest.raises(ValueError, match="means must be finite"):
        gk.Mixture(m.logits, m.means * math.nan, m.factor, validate_args=True)
    Distribution.set_default_validate_args(True)
    for one in (m, m.marginal([0, 1]), always, always.expand(())):
        with pytest.raises(ValueError, match="x must be finite, got NaN at row 1, column 0"):
            one.log_prob(BAD)


def test_files_are_checked_always(unchecked, tmp_path):
    m = random_mixture("full")
    gk.save(gk.Mixture(m.logits, m.means * math.nan, m.factor), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="is damaged: means must be finite"):
        gk.load(tmp_path / "m.safetensors")


@pytest.mark.filterwarnings("ignore::gmmkeops.ConvergenceWarning")
def test_mixtures_that_the_package_makes_check_their_points():
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double()
    made = [
        gk.GMM(2)().to(torch.float64),
        gk.fit(gk.initialize(x, 2), x, gk.EM(), max_iter=2).mixture,
        random_mixture("full").marginal([1, 0]),
        gk.analysis.merge(random_mixture("full"), [[0, 1]]),
    ]
    for mixture in made:
        with pytest.raises(ValueError, match="x must be finite, got NaN"):
            mixture.log_prob(BAD)


def test_values_that_do_not_fit_a_batch():
    m = batch_of("diag", (2, 3), D=1)
    for method, value in ((m.icdf, torch.rand(4)), (m.cdf, torch.rand(4, 1)), (m.log_joint, torch.rand(4, 1))):
        with pytest.raises(ValueError, match=r"do not match a batch of mixtures of shape \(2, 3\); pass leading dimen"):
            method(value)


@pytest.mark.parametrize("family", FAMILIES)
def test_wrappers_of_torch(family):
    m = batch_of(family, (3,))
    peer = MixtureSameFamily(m.mixture_distribution, m.component_distribution)
    x = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for wrap in (
        lambda d: d,
        lambda d: Independent(d, 1),
        lambda d: TransformedDistribution(d, [AffineTransform(torch.tensor([1.0, -2.0]), torch.tensor([2.0, 0.5]), 1)]),
        lambda d: d.expand((2, 3)),
        lambda d: Independent(d.expand((4, 3)), 2),
    ):
        ours, right = wrap(m), wrap(peer)
        assert (ours.batch_shape, ours.event_shape) == (right.batch_shape, right.event_shape)
        points = x[:, None].expand(4, 2, 3, 2) if ours.batch_shape == (2, 3) else x
        assert torch.allclose(ours.log_prob(points), right.log_prob(points), rtol=1e-9)
        assert ours.sample((5,)).shape == right.sample((5,)).shape
    for name in ("mean", "variance", "stddev"):
        assert torch.allclose(getattr(m, name), getattr(peer, name), rtol=1e-9)
    assert (m.has_rsample, m.has_enumerate_support) == (False, False)
    assert m.support.event_dim == 1
    for name, constraint in m.arg_constraints.items():
        assert bool(constraint.check(getattr(m, name)).all())
    assert repr(m).startswith("Mixture(batch=(3,), components=3, features=2, factor=")
    narrow = m.to(torch.float32)
    assert narrow.log_prob(x.float()).dtype == torch.float32
    assert torch.allclose(narrow.log_prob(x.float()).double(), m.log_prob(x), rtol=1e-3, atol=1e-3)
