"""Imports point down the layers, and a bare import stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import gmmkeops

PACKAGE = Path(gmmkeops.__file__).parent

# From the bottom up; a file imports from its own folder, from the folders before it, and from what they export.
FOLDERS = [
    "components",
    "data",
    "reductions",
    "models",
    "penalties",
    "fitting",
    "bayes",
    "analysis",
    "estimators",
    "plotting",
    "export",
    "cli",
]
# Initialization runs EM, and information criteria are computed in analysis, both above the models that call them.
UPWARD = {("gmmkeops.models.module", "fitting"), ("gmmkeops.models.mixture", "analysis")}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """Module and name of each import from the package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gmmkeops":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "gmmkeops")


def crossing():
    """Each import that leaves its folder: importer, its folder, the imported module, its folder, and the name."""
    for path, name in modules():
        here = name.split(".")[1] if name.count(".") else ""
        for module, item in imported(path):
            parts = [*module.split(".")[1:], item]
            if here in FOLDERS and parts[0] in FOLDERS and parts[0] != here:
                yield name, here, module, parts[0], item


def test_folders_are_the_map():
    inside = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert inside == {*FOLDERS, "__init__.py", "_checks.py", "py.typed"}


def test_imports_point_down():
    wrong = [
        f"{name} imports {module}"
        for name, here, module, there, _ in crossing()
        if FOLDERS.index(there) > FOLDERS.index(here) and (name, there) not in UPWARD
    ]
    assert wrong == []


def test_folders_import_only_what_others_export():
    wrong = [
        f"{name} imports {item} from {module}"
        for name, _, module, there, item in crossing()
        if module != "gmmkeops"
        and (module != f"gmmkeops.{there}" or isinstance(getattr(import_module(module), item, sys), ModuleType))
    ]
    assert wrong == []
    assert not [item for *_, item in crossing() if item.startswith("_") and item != "__version__"]


def test_only_the_keops_engine_imports_pykeops():
    users = {name for path, name in modules() if "pykeops" in path.read_text() and "import_module" in path.read_text()}
    assert users == {"gmmkeops.reductions.keops.engine"}
    texts = [path.read_text() for path, _ in modules()]
    assert not [text for text in texts if "import pykeops" in text or "from pykeops" in text]


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
    code = """
import sys, types
import gmmkeops as gk
assert "torch" not in sys.modules and not set(gk.__all__) - set(dir(gk))
from gmmkeops.fitting.initialization import STRATEGIES
modules = {name for name in gk.__all__ if isinstance(getattr(gk, name), types.ModuleType)}
assert modules == {"analysis", "bayes", "components", "distributed", "export", "penalties", "plotting", "reductions"}
assert all(getattr(gk, name).__module__.startswith("gmmkeops") for name in set(gk.__all__) - modules)
try:
    gk.nonsense
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout == "module 'gmmkeops' has no attribute 'nonsense'\n"


# Modules of version 0.1 and their public names.
OLD = {
    "compare": "Estimate jensen_shannon kl_divergence merge total_variation",
    "distributed": "RankError World join",
    "doctor": "Finding examine",
    "estimator": "BayesianGaussianMixture GaussianMixture NotFittedError",
    "factors": "DiagonalFactor Factor FullFactor SphericalFactor factor_class",
    "interop": "from_sklearn to_sklearn",
    "io": "KINDS load save write_array write_whole",
    "memory": "as_bytes chunk_rows estimate_memory",
    "mixture": "Mixture",
    "module": "GMM",
    "moments": "Moments like outer",
    "selection": "Selection aic anomaly_threshold bic icl score select silhouette",
    "sources": "NUMBERS Chunk Source chunked readable",
    "uncertainty": "StandardErrors standard_errors",
}


@pytest.mark.parametrize("module", OLD)
def test_names_of_version_0_1_still_work(module):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [getattr(getattr(gmmkeops, module), name) for name in OLD[module].split()]
    assert all(value is not None for value in found)
    assert module == "distributed" or {warning.category for warning in caught} == {DeprecationWarning}


def test_only_optimizers_import_the_compiler_of_torch():
    code = """
import sys, warnings, torch, gmmkeops as gk
warnings.simplefilter("ignore")
x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
mixture = gk.fit(gk.initialise(x.detach(), 2), x.detach(), gk.EM(), max_iter=3).mixture
mixture.log_prob(x).sum().backward()
mixture.predict(x.detach()), mixture.responsibilities(x.detach()), mixture.sample((3,))
gk.GMM(2, n_components=2).initialize(x.detach())().log_prob(x.detach().float()).sum().backward()
for kind in (gk.GaussianMixture, gk.BayesianGaussianMixture):
    kind(n_components=2).fit(x.detach().numpy()).predict(x.detach().numpy())
gk.analysis.select(x.detach(), [1, 2], max_iter=2)
gk.Adam(), gk.Gradient(lambda p: torch.optim.SGD(p, lr=0.1))
batch = gk.GMM(8, context=2, n_components=32)
with torch.no_grad():
    batch(torch.randn(8000, 2)).log_prob(torch.randn(8000, 8))
print("torch._dynamo" in sys.modules, "sympy" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
