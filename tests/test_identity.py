"""A checkpoint is resumed by the same fit alone: whatever would change the result is refused and named."""

from __future__ import annotations

import functools
import operator
import os
import re
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import gmmkeops as gk

SGD, ADAM = torch.optim.SGD, torch.optim.Adam


StepLR = torch.optim.lr_scheduler.StepLR


strength = 0.1


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


def ridge(strength):
    """A penalty that is a closure."""

    def penalty(mixture):
        return strength * mixture.means.square().sum()

    return penalty


def scaled(mixture):
    return strength * helper(mixture)


def helper(mixture):
    return mixture.means.square().sum()


class Pull(gk.penalties.Penalty):
    """An instance with attributes, some of them tensors."""

    def __init__(self, place, strength=0.1):
        self.place, self.strength = place, strength

    def __call__(self, mixture, points=1.0):
        return self.strength * (mixture.means - self.place).square().sum()

    def bare(self, mixture):
        return self(mixture)


@dataclass(frozen=True)
class Weighted(gk.penalties.Penalty):
    by: torch.Tensor

    def __call__(self, mixture, points=1.0):
        return (self.by.to(mixture.means) * mixture.means.square()).sum()


def weighted(last):
    by = torch.linspace(0, 1, 6).reshape(3, 2)
    by[2, 1] = last
    return by


EM, P, torch_generator = gk.EM(tol=0), gk.penalties, lambda seed: torch.Generator().manual_seed(seed)


# Pairs of settings that lead to different fits, and what names the difference. The settings are arguments of gk.fit.
DIFFERENT = {
    "strength": (
        {"penalty": P.SqrtWeights(0.1)},
        {"penalty": P.SqrtWeights(0.2)},
        "penalty",
        "strength=0.1",
        "strength=0.2",
    ),
    "no penalty": ({}, {"penalty": P.SqrtWeights(0.1)}, "penalty", "None", "SqrtWeights"),
    "class": (
        {"penalty": P.SqrtWeights(0.1)},
        {"penalty": P.WeightEntropy(0.1)},
        "penalty",
        "SqrtWeights",
        "WeightEntropy",
    ),
    "sum": (
        {"penalty": P.SqrtWeights(0.1) + P.Dirichlet(2.0)},
        {"penalty": P.SqrtWeights(0.1) + P.Dirichlet(2.5)},
        *("penalty", "concentration=2)", "concentration=2.5)"),
    ),
    "multiple": (
        {"penalty": 2 * P.SqrtWeights(0.1)},
        {"penalty": 3 * P.SqrtWeights(0.1)},
        "penalty",
        "factor=2",
        "factor=3",
    ),
    "tensor": (
        {"penalty": P.NormalMean(torch.tensor([1.0, 2.0]), 3.0)},
        {"penalty": P.NormalMean(torch.tensor([1.0, 2.5]), 3.0)},
        *("penalty", "[1.0, 2.0]", "[1.0, 2.5]"),
    ),
    "array": (
        {"penalty": P.Dirichlet(np.array([1.0, 2.0, 3.0]))},
        {"penalty": P.Dirichlet(np.array([1.0, 3.0, 2.0]))},
        *("penalty", "[1.0, 2.0, 3.0]", "[1.0, 3.0, 2.0]"),
    ),
    "method": ({}, {"method": gk.EM(tol=0, assignment="hard")}, "method", "assignment='soft'", "assignment='hard'"),
    "ridge": ({}, {"method": gk.EM(tol=0, reg_covar=1e-3)}, "method", "reg_covar=1e-06", "reg_covar=0.001"),
    "frozen": (
        {"method": gk.EM(tol=0, frozen_means=[True, False, True])},
        {"method": gk.EM(tol=0, frozen_means=[True, True, False])},
        *("method", "[True, False, True]", "[True, True, False]"),
    ),
    "frozen tensor": (
        {"method": gk.EM(tol=0, frozen_weights=torch.tensor([True, False, True]))},
        {"method": gk.EM(tol=0, frozen_weights=torch.tensor([True, False, False]))},
        *("method", "frozen_weights=bool [True, False, True]", "frozen_weights=bool [True, False, False]"),
    ),
    "temperature": (
        {"method": gk.EM(tol=0, temperature=(0.3, 3))},
        {"method": gk.EM(tol=0, temperature=(0.3, 4))},
        *("method", "[0.3, 3]", "[0.3, 4]"),
    ),
    "batches": ({"method": gk.EM(batch_size=100)}, {"method": gk.EM(batch_size=200)}, "method", "size=100", "size=200"),
    "lr": ({"method": gk.Adam(lr=0.1)}, {"method": gk.Adam(lr=0.2)}, "method", "lr=0.1", "lr=0.2"),
    "betas": (
        {"method": gk.Adam(betas=(0.9, 0.999))},
        {"method": gk.Adam(betas=(0.8, 0.999))},
        *("method", "betas=[0.9, 0.999]", "betas=[0.8, 0.999]"),
    ),
    "another kind": ({}, {"method": gk.Adam()}, "method", "EM", "Gradient"),
    "optimizer": (
        {"method": gk.Adam(lr=0.1)},
        {"method": gk.Gradient(lambda p: SGD(p, lr=0.1))},
        *("method", "optimizer=", "<lambda>"),
    ),
    "lambda constant": (
        {"method": gk.Gradient(lambda p: SGD(p, lr=0.1))},
        {"method": gk.Gradient(lambda p: SGD(p, lr=0.2))},
        *("method", "<lambda>", "<lambda>"),
    ),
    "lambda class": (
        {"method": gk.Gradient(lambda p: SGD(p, lr=0.1))},
        {"method": gk.Gradient(lambda p: ADAM(p, lr=0.1))},
        *("method", "SGD", "Adam"),
    ),
    "partial": (
        {"method": gk.Gradient(functools.partial(SGD, lr=0.1))},
        {"method": gk.Gradient(functools.partial(SGD, lr=0.1, momentum=0.5))},
        *("method", "{'lr': 0.1}", "'momentum': 0.5"),
    ),
    "scheduler": (
        {"method": gk.Adam(scheduler=lambda o: StepLR(o, 3))},
        {"method": gk.Adam(scheduler=lambda o: StepLR(o, 4))},
        *("method", "scheduler=<lambda>", "scheduler=<lambda>"),
    ),
    "no scheduler": (
        {"method": gk.Adam()},
        {"method": gk.Adam(scheduler=lambda o: StepLR(o, 4))},
        "method",
        "None",
        "lambda",
    ),
    "closure": (
        {"penalty": ridge(0.1), "method": gk.Adam()},
        {"penalty": ridge(0.2), "method": gk.Adam()},
        *("penalty", "strength=0.1", "strength=0.2"),
    ),
    "closure's tensor": (
        {"penalty": ridge(torch.full((9,), 0.1).sum()), "method": gk.Adam()},
        {"penalty": ridge(torch.full((9,), 0.2).sum()), "method": gk.Adam()},
        *("penalty", "0.9", "1.8"),
    ),
    "default": (
        {"penalty": lambda m, s=0.1: s * m.means.square().sum(), "method": gk.Adam()},
        {"penalty": lambda m, s=0.2: s * m.means.square().sum(), "method": gk.Adam()},
        *("penalty", "0.1", "0.2"),
    ),
    "inner function": (
        {"penalty": lambda m: sum(map(lambda row: row.square().sum(), m.means)), "method": gk.Adam()},
        {"penalty": lambda m: sum(map(lambda row: row.abs().sum(), m.means)), "method": gk.Adam()},
        *("penalty", "<lambda>", "<lambda>"),
    ),
    "attribute": (
        {"penalty": Pull(torch.zeros(2)), "method": gk.Adam()},
        {"penalty": Pull(torch.ones(2)), "method": gk.Adam()},
        *("penalty", "place=float32 [0.0, 0.0]", "place=float32 [1.0, 1.0]"),
    ),
    "bound method": (
        {"penalty": Pull(torch.zeros(2), 0.1).bare, "method": gk.Adam()},
        {"penalty": Pull(torch.zeros(2), 0.2).bare, "method": gk.Adam()},
        *("penalty", "method bare", "method bare"),
    ),
    "large tensor": (
        {"penalty": Weighted(weighted(0.5).repeat(1, 1)), "method": gk.Adam()},
        {"penalty": Weighted(weighted(0.6).repeat(1, 1)), "method": gk.Adam()},
        *("penalty", "by=float32", "by=float32"),
    ),
    "backend": ({}, {"backend": "dense"}, "backend", "'auto'", "'dense'"),
    "truncation": ({"truncate": 0}, {"truncate": 1e-3}, "truncate", "0", "0.001"),
    "dtype": ({}, {"dtype": "float32"}, "dtype", "float64", "float32"),
    "generator": (
        {"method": gk.EM(batch_size=100), "generator": torch_generator(1)},
        {"method": gk.EM(batch_size=100), "generator": torch_generator(2)},
        *("generator", "seed 1", "seed 2"),
    ),
    "prior": (
        {"method": gk.bayes.VariationalBayes(mean_precision=1.0)},
        {"method": gk.bayes.VariationalBayes(mean_precision=2.0)},
        *("method", "mean_precision=1", "mean_precision=2"),
    ),
    "prior's tensor": (
        {"method": gk.bayes.VariationalBayes(means=torch.zeros(2))},
        {"method": gk.bayes.VariationalBayes(means=torch.tensor([0.0, 1.0]))},
        *("method", "[0.0, 0.0]", "[0.0, 1.0]"),
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_would_change_the_result_is_refused_and_named(name, x, start, tmp_path):
    first, other, what, expected, got = DIFFERENT[name]
    for number, (settings, others, texts) in enumerate(
        ((first, other, (expected, got)), (other, first, (got, expected)))
    ):
        path = tmp_path / f"{number}.ckpt"
        gk.fit(start, x, **{"method": EM, "tol": 0, "max_iter": 1, "checkpoint": path, **settings})
        before = path.read_bytes()
        with pytest.raises(ValueError, match=f"was written by a fit whose {what} differs ") as error:
            gk.fit(start, x, **{"method": EM, "tol": 0, "max_iter": 2, "checkpoint": path, **others})
        said = re.search(
            r"\((.*); here (.*)\); pass the original \w+, or delete the file to start a new fit\.$",
            str(error.value),
            re.DOTALL,
        )
        assert all(text in part for text, part in zip(texts, said.groups(), strict=True)), said.groups()
        assert str(error.value).count("\n") == 0
        assert path.read_bytes() == before
        gk.fit(start, x, **{"method": EM, "tol": 0, "max_iter": 2, "checkpoint": path, **settings})


def test_another_start_or_other_weights_are_refused(x, start, tmp_path):
    g = np.random.default_rng(0).random(len(x))
    path = tmp_path / "fit.ckpt"
    gk.fit(start, x, EM, max_iter=1, checkpoint=path, sample_weight=g)
    factor = start.factor
    for other in (
        gk.Mixture(start.logits, start.means + torch.tensor([[0.0, 1e-4], [0, 0], [0, 0]]), factor),
        gk.Mixture(start.logits + torch.tensor([0.0, 1e-4, 0]), start.means, factor),
        gk.Mixture(start.logits, start.means, gk.FullFactor.from_covariances(factor.covariances() * 1.0001)),
        gk.Mixture(start.logits[[1, 0, 2]], start.means[[1, 0, 2]], gk.FullFactor.from_factors(factor.U[[1, 0, 2]])),
    ):
        with pytest.raises(
            ValueError,
            match=r"was written by a fit whose start differs \(fingerprint .*; here fingerprint .*\); pass the original start",
        ):
            gk.fit(other, x, EM, max_iter=2, checkpoint=path, sample_weight=g)
    for weights in (None, g[::-1].copy(), 2 * g):
        with pytest.raises(
            ValueError, match=r"was written by a fit whose data differs \(600 rows of 2 columns, total weight "
        ):
            gk.fit(start, x, EM, max_iter=2, checkpoint=path, sample_weight=weights)
    # Rounding, as of another number of threads, and a shift of the logits make no other start.
    near = gk.Mixture(start.logits + 7, start.means * (1 + 3e-16), factor)
    assert gk.fit(near, x, EM, max_iter=2, checkpoint=path, sample_weight=g).n_iter == 2


def test_what_makes_no_other_fit_may_change(x, start, tmp_path):
    path = tmp_path / "fit.ckpt"
    for max_iter, tol, relative_tol, patience, strength in (
        (1, 0.0, 0.0, 1, 1),
        (3, 0.0, 1e-40, 2, 1.0),
        (5, 1e-300, 0.0, 3, 1),
    ):
        method = gk.Gradient(lambda p: SGD(p, lr=0.1), tol=tol, relative_tol=relative_tol, patience=patience)
        options = {"penalty": P.SqrtWeights(strength), "generator": torch_generator(3), "verbose": False}
        options |= {"max_iter": max_iter, "callback": lambda step: None}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", gk.ConvergenceWarning)
            found = gk.fit(start, x, method, checkpoint=path, **options)
    expected = gk.fit(start, x, method, max_iter=5, tol=0, penalty=P.SqrtWeights(1))
    assert torch.equal(found.mixture.means, expected.mixture.means)


def test_a_global_variable_and_a_helper_of_a_penalty_count(x, start, tmp_path, monkeypatch):
    module = sys.modules[__name__]
    path = tmp_path / "fit.ckpt"
    arguments = (start, x, gk.Adam())
    gk.fit(*arguments, penalty=scaled, max_iter=1, checkpoint=path)
    gk.fit(*arguments, penalty=scaled, max_iter=2, checkpoint=path)
    for name, value in (("strength", 0.2), ("helper", lambda mixture: mixture.means.abs().sum())):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            with pytest.raises(ValueError, match=f"was written by a fit whose penalty differs .*{name}="):
                gk.fit(*arguments, penalty=scaled, max_iter=3, checkpoint=path)
    assert gk.fit(*arguments, penalty=scaled, max_iter=3, checkpoint=path).n_iter == 3


def test_two_classes_of_one_name_are_two(x, start, tmp_path):
    def made(power):
        class Own(P.Penalty):
            def __call__(self, mixture, points=1.0):
                return mixture.means.abs().pow(power).sum()

        return Own()

    path = tmp_path / "fit.ckpt"
    gk.fit(start, x, gk.Adam(), penalty=made(2), max_iter=1, checkpoint=path)
    gk.fit(start, x, gk.Adam(), penalty=made(2), max_iter=2, checkpoint=path)
    with pytest.raises(ValueError, match="was written by a fit whose penalty differs"):
        gk.fit(start, x, gk.Adam(), penalty=made(3), max_iter=3, checkpoint=path)


@pytest.mark.parametrize("kind", ["lock", "file", "iterator", "itemgetter", "sparse"])
def test_what_cannot_be_compared_is_refused_with_a_checkpoint_alone(kind, x, start, tmp_path):
    hidden = {
        "lock": threading.Lock,
        "file": lambda: open(os.devnull),  # noqa: SIM115
        "iterator": lambda: iter([1]),
        "itemgetter": lambda: operator.itemgetter(0),
        "sparse": lambda: torch.eye(2).to_sparse(),
    }[kind]()
    try:

        def penalty(mixture):
            assert hidden is not None
            return mixture.means.square().sum()

        assert gk.fit(start, x, gk.Adam(), penalty=penalty, max_iter=1).n_iter == 1
        with pytest.raises(
            ValueError, match=r"^penalty.* whose variable hidden is a .*cannot be compared .*do not pass checkpoint\.$"
        ):
            gk.fit(start, x, gk.Adam(), penalty=penalty, max_iter=1, checkpoint=tmp_path / "fit.ckpt")
        assert not list(tmp_path.iterdir())
    finally:
        if kind == "file":
            hidden.close()


SCRIPT = """
import sys, numpy as np, torch, gmmkeops as gk
from dataclasses import dataclass
unused = object()
table = {"b", "a", "c"}
@dataclass
class Own(gk.penalties.Penalty):
    strength: float
    def __call__(self, mixture, points=1.0):
        assert "a" in table and "b" in {"b", "z", "y"}
        return self.strength * mixture.means.square().sum()
x = np.random.default_rng(0).normal(size=(300, 2))
method = gk.Gradient(lambda p: torch.optim.SGD(p, lr=lr))
for lr, iterations in ((0.1, int(sys.argv[2])), (0.3, 9)):
    try:
        print(gk.fit(gk.initialize(x, 2), x, method, penalty=Own(0.1), max_iter=iterations, checkpoint=sys.argv[1]).n_iter)
    except ValueError as error:
        print(error)
"""


def test_another_process_describes_values_alike(tmp_path):
    """Hashes of text are salted and addresses differ; a function's place, and names that it does not use, are no change."""
    for number in (1, 2):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "# a line\n" * number + SCRIPT.replace("unused", f"unused{number}"),
                tmp_path / "c",
                str(number),
            ],
            env={**os.environ, "PYTHONHASHSEED": str(number), "PYTHONPATH": str(Path(gk.__file__).parents[1])},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        resumed, refused = done.stdout.splitlines()
        assert resumed == str(number)
        assert "was written by a fit whose method differs (Gradient with optimizer=<lambda> (code" in refused
        assert re.search(r"lr=0\.1.*; here .*lr=0\.3", refused)
