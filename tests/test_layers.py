"""Imports point down the layers, and a bare import stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import gmmkeops

PACKAGE = Path(gmmkeops.__file__).parent

# From the bottom up; a file may import only what stands on lines above its own.
LAYERS = [
    ["gmmkeops._forks"],
    ["gmmkeops._arguments"],
    ["gmmkeops._checks", "gmmkeops._columns", "gmmkeops._declared", "gmmkeops._quantiles"],
    ["gmmkeops._random", "gmmkeops._shells", "gmmkeops._spread"],
    ["gmmkeops._readers", "gmmkeops._survey"],
    ["gmmkeops.sources"],
    ["gmmkeops.moments"],
    ["gmmkeops.distributed"],
    ["gmmkeops.factors"],
    ["gmmkeops._floor"],
    ["gmmkeops.reductions._cores", "gmmkeops.reductions._exponents", "gmmkeops.reductions._products"],
    ["gmmkeops.reductions._plain"],
    ["gmmkeops.reductions._derivatives"],
    ["gmmkeops.reductions._boxes", "gmmkeops.reductions._rounding"],
    ["gmmkeops.reductions._tile"],
    ["gmmkeops.reductions._lists"],
    ["gmmkeops.reductions._truncation"],
    ["gmmkeops.reductions._keops_cache"],
    ["gmmkeops.reductions._dense", "gmmkeops.reductions._keops"],
    ["gmmkeops.reductions._choice"],
    ["gmmkeops.reductions"],
    ["gmmkeops.memory"],
    ["gmmkeops.mixture"],
    ["gmmkeops.initialise", "gmmkeops.compare", "gmmkeops.io", "gmmkeops._ellipsoids", "gmmkeops._pytrees"],
    ["gmmkeops.module"],
    ["gmmkeops._penalty"],
    ["gmmkeops.penalties"],
    ["gmmkeops.fitting._frame", "gmmkeops.fitting._identity", "gmmkeops.fitting._stepwise"],
    ["gmmkeops.fitting._data"],
    ["gmmkeops.fitting._checkpoint"],
    ["gmmkeops.fitting._method"],
    ["gmmkeops.fitting._result"],
    ["gmmkeops.fitting._em", "gmmkeops.fitting._gradient"],
    ["gmmkeops.fitting._conditional"],
    ["gmmkeops.fitting._loop"],
    ["gmmkeops.fitting"],
    ["gmmkeops.selection", "gmmkeops.uncertainty"],
    ["gmmkeops.bayes._student", "gmmkeops.bayes._pareto"],
    ["gmmkeops.bayes._normal_wishart"],
    ["gmmkeops.bayes._variational", "gmmkeops.bayes._prior"],
    ["gmmkeops.bayes._target", "gmmkeops.bayes._draws"],
    ["gmmkeops.bayes._importance", "gmmkeops.bayes._gibbs", "gmmkeops.bayes._nuts", "gmmkeops.bayes._langevin"],
    ["gmmkeops.bayes"],
    ["gmmkeops._contract", "gmmkeops._saved"],
    ["gmmkeops._mixture_estimator"],
    ["gmmkeops.estimator"],
    ["gmmkeops.plotting", "gmmkeops.interop", "gmmkeops.doctor", "gmmkeops.export"],
    ["gmmkeops.cli"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
LEAVES = {"gmmkeops.plotting", "gmmkeops.interop", "gmmkeops.cli"}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in RANK else node.module


def test_every_module_has_a_layer():
    names = {name for _, name in modules()} - {"gmmkeops"}
    assert names == set(RANK)


def test_imports_point_down():
    wrong = [
        f"{name} imports {other}"
        for path, name in modules()
        if name != "gmmkeops"
        for other in imported(path)
        if other.startswith("gmmkeops") and RANK.get(other, len(LAYERS)) >= RANK[name]
    ]
    assert wrong == []


def test_nothing_imports_a_leaf():
    assert [name for path, name in modules() if name != "gmmkeops" for other in imported(path) if other in LEAVES] == []


def test_only_the_keops_engine_imports_pykeops():
    users = {name for path, name in modules() if "pykeops" in path.read_text() and "import_module" in path.read_text()}
    assert users == {"gmmkeops.reductions._keops"}
    assert not [name for path, name in modules() for other in imported(path) if other.split(".")[0] == "pykeops"]


def test_bare_import_brings_torch_and_numpy_only():
    code = (
        "import sys, torch, numpy; before = set(sys.modules); import gmmkeops; gmmkeops.EM;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(new & {'pykeops', 'keopscore', 'matplotlib', 'sklearn', 'tqdm', 'pandas', 'scipy', 'safetensors'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert done.stderr == ""


def test_every_public_name_is_there_whatever_was_imported_first():
    """Also those that have the name of a module: importing that does not hide them."""
    code = """
import sys, types
import gmmkeops as gk
assert "torch" not in sys.modules and not set(gk.__all__) - set(dir(gk))
from gmmkeops.initialise import STRATEGIES
import gmmkeops.io
assert isinstance(gk.initialise, types.FunctionType) and gk.io is sys.modules["gmmkeops.io"]
modules = {name for name in gk.__all__ if isinstance(getattr(gk, name), types.ModuleType)}
assert modules == {"bayes", "compare", "distributed", "export", "penalties", "plotting", "reductions", "selection"}
assert all(getattr(gk, name).__module__.startswith("gmmkeops") for name in set(gk.__all__) - modules)
assert gk.factors is sys.modules["gmmkeops.factors"]
try:
    gk.nonsense
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout == "module 'gmmkeops' has no attribute 'nonsense'\n"


def test_only_optimizers_import_the_compiler_of_torch():
    code = """
import sys, warnings, torch, gmmkeops as gk
warnings.simplefilter("ignore")
x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
mixture = gk.fit(gk.initialise(x.detach(), 2), x.detach(), gk.EM(), max_iter=3).mixture
mixture.log_prob(x).sum().backward()
mixture.predict(x.detach()), mixture.responsibilities(x.detach()), mixture.sample((3,))
gk.GMM(2, components=2).initialize(x.detach())().log_prob(x.detach().float()).sum().backward()
for kind in (gk.GaussianMixture, gk.BayesianGaussianMixture):
    kind(n_components=2).fit(x.detach().numpy()).predict(x.detach().numpy())
gk.selection.select(x.detach(), [1, 2], max_iter=2)
gk.Adam(), gk.Gradient(lambda p: torch.optim.SGD(p, lr=0.1))
batch = gk.GMM(8, context=2, components=32)
with torch.no_grad():
    batch(torch.randn(8000, 2)).log_prob(torch.randn(8000, 8))
print("torch._dynamo" in sys.modules, "sympy" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
