"""Mixtures and modules under ``torch.compile``, ``torch.export`` and as containers of tensors."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import FAMILIES, random_mixture

import gmmkeops as gk


class Density(torch.nn.Module):
    """The log-density of a module's mixture."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, *context):
        return self.model(*context).log_prob(x)


class Built(torch.nn.Module):
    """A mixture that is made while torch compiles."""

    def __init__(self, mixture, validate_args):
        super().__init__()
        self.mixture, self.validate_args = mixture, validate_args
        self.means = torch.nn.Parameter(mixture.means.clone())

    def forward(self, x):
        return gk.Mixture(self.mixture.logits, self.means, self.mixture.factor, self.validate_args).log_prob(x)


@pytest.fixture
def dynamo(checks):
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["full", "tied_diag", "spherical"])
def test_compiled(family, dynamo):
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    m = random_mixture(family)
    compiled = torch.compile(m.log_prob, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x.double()), m.log_prob(x.double()), rtol=1e-12)
    model = gk.GMM(2, n_components=3, covariance_type=family)
    conditional = gk.GMM(2, context=3, n_components=3, covariance_type=family)
    c = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    for net, arguments in ((model, (x,)), (conditional, (x, c))):
        gradients = []
        for density in (Density(net), torch.compile(Density(net), fullgraph=True, backend="aot_eager")):
            net.zero_grad()
            values = density(*arguments)
            values.sum().backward()
            gradients.append([values.detach(), *(p.grad.clone() for p in net.parameters())])
        for a, b in zip(*gradients, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("validate_args", [False, None])
@pytest.mark.parametrize("family", ["full", "tied_diag", "spherical"])
def test_exported(family, validate_args, dynamo):
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    c = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    more = torch.randn(17, 2, generator=torch.Generator().manual_seed(2))
    rows = torch.export.Dim("rows")
    for module in (
        Density(gk.GMM(2, n_components=3, covariance_type=family)),
        Built(random_mixture(family), validate_args),
    ):
        points = x.to(next(module.parameters()).dtype)
        program = torch.export.export(module, (points,), dynamic_shapes=({0: rows},))
        assert torch.allclose(program.module()(more.to(points)), module(more.to(points)), rtol=1e-4, atol=1e-4)
    conditional = Density(gk.GMM(2, context=3, n_components=3, covariance_type=family))
    for strict in (False, True):
        program = torch.export.export(conditional, (x, c), dynamic_shapes=({0: rows}, ({0: rows},)), strict=strict)
        for n in (5, 2):
            assert torch.allclose(program.module()(x[:n], c[:n]), conditional(x[:n], c[:n]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("family", ["full", "tied_diag", "spherical"])
def test_the_module_itself_is_exported_and_compiled(family, strict, dynamo, tmp_path):
    """The exported program returns a mixture, also after it has been written to a file."""
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    c = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    dynamic = ({0: torch.export.Dim("rows")},)
    for model, context in (
        (gk.GMM(2, n_components=3, covariance_type=family), ()),
        (gk.GMM(2, context=3, n_components=3, covariance_type=family), (c,)),
    ):
        example = tuple(part[:5] for part in context)
        program = torch.export.export(model, example, dynamic_shapes=dynamic if context else None, strict=strict)
        torch.export.save(program, tmp_path / "model.pt2")
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for run in (program.module(), torch.export.load(tmp_path / "model.pt2").module(), compiled):
            mixture = run(*context)
            assert repr(mixture) == repr(model(*context))
            assert torch.allclose(mixture.log_prob(x), model(*context).log_prob(x), rtol=1e-4, atol=1e-4)
            assert mixture.sample((4,)).shape == (4, *mixture.batch_shape, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_mixtures_are_containers_of_tensors(family):
    m = random_mixture(family).named(["a", "b"])
    shifts = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double()
    moved = torch.func.vmap(lambda shift: gk.Mixture(m.logits, m.means + shift, m.factor).named(m.columns))(shifts)
    assert (moved.batch_shape, moved.event_shape, moved.columns) == ((5,), (2,), ("a", "b"))
    assert torch.allclose(moved.log_prob(shifts), m.log_prob(torch.zeros(1, 2).double()).expand(5))
    gradient = torch.func.grad(lambda mixture: mixture.log_prob(shifts).sum())(m)
    means = m.means.clone().requires_grad_()
    gk.Mixture(m.logits, means, m.factor).log_prob(shifts).sum().backward()
    assert torch.allclose(gradient.means, means.grad)
    assert type(gradient.factor) is type(m.factor)


def test_exported_without_default_checks(unchecked, dynamo):
    module, x = Density(gk.GMM(2, n_components=3)), torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(torch.export.export(module, (x,), strict=True).module()(x), module(x), rtol=1e-4, atol=1e-4)
    compiled = torch.compile(Built(random_mixture("full"), None), fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x.double()), random_mixture("full").log_prob(x.double()), rtol=1e-12)


@pytest.mark.slow
# torch's compiler uses what torch itself has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler of torch needs g++")
def test_compiled_to_machine_code(dynamo):
    x, m = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double(), random_mixture("full")
    assert torch.allclose(torch.compile(m.log_prob, fullgraph=True)(x), m.log_prob(x), rtol=1e-10)
