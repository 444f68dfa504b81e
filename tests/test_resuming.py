"""Fits resume: modules from where they are, and passes only with the same rows in the same order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gmmkeops as gk


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(0)
    return rng.normal(size=(600, 2)) * [1.0, 3.0] + 6 * rng.integers(0, 3, (600, 1))


@pytest.fixture(scope="module")
def start():
    scales = torch.tensor([0.5, 1.0, 2.0]).double()
    covariances = torch.tensor([[2.0, 0.3], [0.3, 5.0]]).double() * scales[:, None, None]
    means = torch.tensor([[0.5, 1.0], [5.0, 6.0], [12.0, 11.0]]).double()
    return gk.Mixture.from_parameters([0.2, 0.3, 0.5], means, covariances)


EM, P, torch_generator = gk.EM(tol=0), gk.penalties, lambda seed: torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["plain", "float32", "network"])
def test_a_module_resumes_from_where_its_fit_has_brought_it_and_from_where_it_began(kind, x, tmp_path):
    """A fit sets the parameters of its module, so the same call finds a different start, which is the checkpoint's own."""
    x = x + np.array([3e4, 0.0])
    torch.manual_seed(0)
    model = gk.GMM(1, context=1, n_components=2).double() if kind == "network" else gk.GMM(2, n_components=3)
    model = model if kind == "float32" else model.double()
    if kind == "network":
        model.initialize(x[:, :1], context=x[:, 1:], generator=torch_generator(0))
    else:
        model.initialize(x, "random", generator=torch_generator(0))
    begun = {name: value.clone() for name, value in model.state_dict().items()}
    path = tmp_path / "fit.ckpt"
    for iterations in (2, 4, 4, 6):
        found = gk.fit(model, x, gk.Adam(), max_iter=iterations, checkpoint=path)
        assert found.n_iter == iterations
    model.load_state_dict(begun)
    assert gk.fit(model, x, gk.Adam(), max_iter=7, checkpoint=path).n_iter == 7
    with torch.no_grad():
        list(model.parameters())[1].add_(torch.tensor(1.0))
    with pytest.raises(ValueError, match="was written by a fit whose start differs"):
        gk.fit(model, x, gk.Adam(), max_iter=8, checkpoint=path)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("how", ["same", "other chunks", "other order"])
@pytest.mark.parametrize("batch_size", [None, 90])
def test_a_sweep_that_was_cut_short_is_not_continued_with_rows_cut_or_sorted_otherwise(
    how, batch_size, x, start, tmp_path
):
    """Sums of the first rows are worth nothing when the rest are not those that were missing."""
    passes = []

    def source(order, rows, deadly=False):
        def chunks():
            passes.append(0)
            for number, block in enumerate(np.array_split(x[order], 12)):
                if deadly and len(passes) == 4 and number == 8:
                    raise Killed
                yield block

        return gk.Source.of(chunks, chunk_rows=rows)

    straight, method = np.arange(len(x)), gk.EM(tol=0, batch_size=batch_size)
    order = np.random.default_rng(1).permutation(len(x)) if how == "other order" else straight
    rows = 130 if how == "other chunks" else 100
    keep = gk.Checkpoint(tmp_path / "fit.ckpt", every=0)
    with pytest.raises(Killed):
        gk.fit(start, source(straight, 100, deadly=True), method, max_iter=6, checkpoint=keep)
    assert (tmp_path / "fit.ckpt").exists()
    found = gk.fit(start, source(order, rows), method, max_iter=6, checkpoint=keep)
    if batch_size is None:
        expected = gk.fit(start, x, method, max_iter=6)
        assert np.allclose(found.history["objective"], expected.history["objective"], rtol=0, atol=1e-12)
        assert torch.allclose(found.mixture.means, expected.mixture.means, rtol=1e-12)
    elif how == "same":
        expected = gk.fit(start, source(straight, 100), method, max_iter=6)
        assert torch.equal(found.mixture.means, expected.mixture.means)
