"""Checkpoints: a fit that was killed gives what one that was not gives, and a damaged or foreign file says so."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import gmmkeops as gk
from gmmkeops.fitting import checkpoint as _checkpoint

METHODS = {
    "em": gk.EM(tol=0),
    "accelerated": gk.EM(tol=0, accelerate=True),
    "stepwise": gk.EM(tol=0, batch_size=900, average=True),
    "stochastic": gk.EM(tol=0, assignment="stochastic"),
    "heated": gk.EM(tol=0, temperature=(0.3, 3)),
    "adam": gk.Adam(scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 3)),
    "minibatches": gk.Adam(batch_size=900),
    "l-bfgs": gk.Gradient(lambda p: torch.optim.LBFGS(p, max_iter=3)),
}


class Killed(BaseException):
    pass


@pytest.fixture
def x():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6000, 2)) + 6 * rng.integers(0, 3, (6000, 1))
    return x.astype(np.float32)


def fit(x, start, method, path, every=0.0, **options):
    generator = torch.Generator().manual_seed(7)
    checkpoint = None if path is None else gk.Checkpoint(path, every=every)
    penalty = gk.penalties.SqrtWeights(0.05)
    return gk.fit(start, x, method, max_iter=6, penalty=penalty, generator=generator, checkpoint=checkpoint, **options)


def same(a, b):
    tensors = [(a.mixture.logits, b.mixture.logits), (a.mixture.means, b.mixture.means)]
    tensors += [(a.mixture.factor.tensors[name], tensor) for name, tensor in b.mixture.factor.tensors.items()]
    return all(torch.equal(p, q) for p, q in tensors) and a.history["objective"] == b.history["objective"]


@pytest.mark.parametrize("kind", ["memory", "source"])
@pytest.mark.parametrize("name", METHODS)
def test_a_fit_killed_at_any_write_ends_bit_identical(name, kind, x, tmp_path, monkeypatch):
    """Dies again and again right after a write, or in the middle of one, until it comes through."""
    start = gk.initialize(x, 5, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "x.npy", x)
    data = x if kind == "memory" else gk.Source.of(tmp_path / "x.npy", chunk_rows=1700)
    expected = fit(data, start, METHODS[name], None)
    dice, write, writes, deaths = random.Random(name + kind), _checkpoint.write_whole, [], 0

    def deadly(path, content):
        writes.append(path)
        if len(writes) == 3 or dice.random() < 0.3:
            if dice.random() < 0.5:
                write(path, content)
            else:
                path.with_name(f".{path.name}.half").write_bytes(content[: len(content) // 2])
            raise Killed
        write(path, content)

    monkeypatch.setattr(_checkpoint, "write_whole", deadly)
    while True:
        try:
            found = fit(data, start, METHODS[name], tmp_path / "fit.ckpt")
            break
        except Killed:
            deaths += 1
            assert deaths < 500
    assert deaths > 0
    assert same(found, expected)
    assert {path.name for path in tmp_path.iterdir()} <= {
        *("x.npy", "fit.ckpt", "fit.ckpt.previous", "fit.ckpt.part0"),
    } | {path.name for path in tmp_path.glob(".fit.ckpt*.half")}


CHILD = """
import sys, numpy as np, torch, gmmkeops as gk
folder = sys.argv[1]
torch.set_num_threads(1)
start = gk.load(folder + "/start.safetensors")
source = gk.Source.of(folder + "/x.npy", chunk_rows=1500)
print("ready", flush=True)
result = gk.fit(start, source, gk.EM(tol=0), max_iter=60, checkpoint=gk.Checkpoint(folder + "/fit.ckpt", every=0))
gk.save(result.mixture, folder + "/out.safetensors")
"""


def test_real_kills_at_random_moments(x, tmp_path):
    start = gk.initialize(x, 5, generator=torch.Generator().manual_seed(0))
    gk.save(start, tmp_path / "start.safetensors")
    np.save(tmp_path / "x.npy", x)
    environment = {**os.environ, "PYTHONPATH": str(Path(gk.__file__).parents[1])}
    dice = random.Random(0)
    for kills in range(100):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert child.stdout.readline() == b"ready\n"
        if kills < 4:
            time.sleep(0.25 * dice.random())
            child.kill()
        _, errors = child.communicate(timeout=120)
        if child.returncode == 0:
            break
        assert child.returncode == -9, errors.decode()
    expected = gk.fit(start, gk.Source.of(tmp_path / "x.npy", chunk_rows=1500), gk.EM(tol=0), max_iter=60).mixture
    found = gk.load(tmp_path / "out.safetensors")
    assert torch.allclose(found.means, expected.means, rtol=0, atol=1e-12)


def test_a_truncated_fit_goes_on_bit_identical(tmp_path):
    """Lists of components, their margins and the boxes' minima are part of the state; labels too, in five dimensions."""
    for D, N, K in ((2, 30_000, 64), (5, 30_000, 20)):
        rng = np.random.default_rng(D)
        x = (rng.normal(size=(N, D)) + 20 * rng.normal(size=(K, D))[rng.integers(0, K, N)]).astype(np.float32)
        start = gk.initialize(x, K, generator=torch.Generator().manual_seed(0))
        whole = gk.fit(start, x, gk.EM(tol=0), truncate=1e-4, max_iter=9)
        assert whole.report.evaluated_fraction < 1
        path = tmp_path / f"{D}.ckpt"
        for iterations in (2, 5, 7, 9):
            found = gk.fit(start, x, gk.EM(tol=0), truncate=1e-4, max_iter=iterations, checkpoint=path)
        assert same(found, whole)


def test_a_finished_fit_answers_at_once_and_goes_on_with_more_iterations(x, tmp_path):
    start = gk.initialize(x, 3, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "fit.ckpt"
    first = gk.fit(start, x, gk.EM(tol=1e-9), max_iter=300, checkpoint=path)
    again = gk.fit(start, x, gk.EM(tol=1e-9), max_iter=300, checkpoint=path)
    assert same(again, first)
    assert (again.converged, again.n_iter) == (True, first.n_iter)
    further = gk.fit(start, x, gk.EM(tol=0), max_iter=first.n_iter + 2, checkpoint=path)
    assert further.n_iter == first.n_iter + 2


def test_foreign_checkpoints_are_refused(x, tmp_path):
    start = gk.initialize(x, 3, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "fit.ckpt"
    gk.fit(start, x, gk.EM(tol=0), max_iter=2, checkpoint=path)
    other = x.copy()
    other[17, 1] += 1e-3
    for data, model, method, what in (
        (other, start, gk.EM(), "whose data differs"),
        (x[:-1], start, gk.EM(), "whose data differs"),
        (x, gk.initialize(x, 4), gk.EM(), "whose model differs"),
        (x, start, gk.EM(assignment="hard"), "whose method differs"),
        (x, start, gk.Adam(), "whose method differs"),
    ):
        with pytest.raises(ValueError, match=what):
            gk.fit(model, data, method, max_iter=3, checkpoint=path)
    shuffled = np.random.default_rng(0).permutation(x)
    assert gk.fit(start, shuffled, gk.EM(tol=0), max_iter=3, checkpoint=path).n_iter == 3


def test_damage_falls_back_to_the_one_before_and_then_says_so(x, tmp_path):
    start = gk.initialize(x, 3, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "fit.ckpt"
    expected = gk.fit(start, x, gk.EM(tol=0), max_iter=4)
    gk.fit(start, x, gk.EM(tol=0), max_iter=3, checkpoint=gk.Checkpoint(path, every=0))
    whole = path.read_bytes()
    middle = len(whole) // 2
    damages = [whole[:place] for place in np.linspace(0, len(whole) - 1, 20).astype(int)]
    damages.append(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    previous = Path(f"{path}.previous").read_bytes()
    for damaged in damages:
        path.write_bytes(damaged)
        Path(f"{path}.previous").write_bytes(previous)
        found = gk.fit(start, x, gk.EM(tol=0), max_iter=4, checkpoint=path)
        assert torch.equal(found.mixture.means, expected.mixture.means)
        for file in (path, Path(f"{path}.previous")):
            file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"all checkpoint files are damaged: .*delete them to start a new fit"):
            gk.fit(start, x, gk.EM(tol=0), max_iter=4, checkpoint=path)


def test_estimators_keep_one(x, tmp_path):
    path = tmp_path / "fit.ckpt"
    model = gk.GaussianMixture(3, random_state=0, checkpoint=path).fit(x)
    assert path.exists()
    again = gk.GaussianMixture(3, random_state=0, checkpoint=path).fit(x)
    assert np.array_equal(again.means_, model.means_)
    with pytest.raises(ValueError, match="checkpoint stores a single fit"):
        gk.GaussianMixture(3, n_init=2, checkpoint=path).fit(x)
    with pytest.raises(ValueError, match="every must not be negative"):
        gk.Checkpoint(path, every=-1)


NAMES = ["env", "*", "[a-z]", "?", "a*b", "{a,b}", "**", "fit.ckpt", "x" * 245, "ж" * 60, "a b\n"]


@pytest.mark.parametrize("name", NAMES)
def test_no_other_file_is_touched_whatever_the_checkpoint_is_called(name, x, tmp_path):
    """Names are not patterns, and files that look like temporary ones are somebody else's."""
    start = gk.initialize(x, 2, generator=torch.Generator().manual_seed(0))
    # A name of 245 bytes leaves room for ".previous", and for no longer one.
    pid = os.getpid()
    others = [f".{name}.local", f".{name}.previous.{pid}", f".{name}.tmp", f"{name}.bak", f"{name}.part7", ".env.local"]
    others += [".a.b", ".fit.ckpt.x1y2", "notes.txt", f".{name}.previous"]
    others = [other for other in dict.fromkeys(others) if len(other.encode()) < 256]
    for other in others:
        (tmp_path / other).write_text(f"precious {other}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / f".{name[:200]}.x").write_text("precious")
    path = tmp_path / name
    for iterations in (2, 4):
        result = gk.fit(start, x, gk.EM(tol=0), max_iter=iterations, checkpoint=gk.Checkpoint(path, every=0))
    assert result.n_iter == 4
    for other in others:
        assert (tmp_path / other).read_text() == f"precious {other}"
    assert (tmp_path / "folder" / f".{name[:200]}.x").read_text() == "precious"
    assert {file.name for file in tmp_path.iterdir()} == {*others, "folder", name, f"{name}.previous"}


def test_leftovers_of_killed_writers_are_neither_read_nor_removed(x, tmp_path):
    start = gk.initialize(x, 3, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "fit.ckpt"
    gk.fit(start, x, gk.EM(tol=0), max_iter=3, checkpoint=gk.Checkpoint(path, every=0))
    leftover = tmp_path / ".fit.ckpt.0123456789abcdef"
    leftover.write_bytes(path.read_bytes()[:1000])
    further = gk.fit(start, x, gk.EM(tol=0), max_iter=5, checkpoint=gk.Checkpoint(path, every=0))
    assert same(further, gk.fit(start, x, gk.EM(tol=0), max_iter=5))
    assert len(leftover.read_bytes()) == 1000
    assert {file.name for file in tmp_path.iterdir()} == {"fit.ckpt", "fit.ckpt.previous", leftover.name}


@pytest.mark.parametrize("which", ["fit.ckpt", "fit.ckpt.previous", "fit.ckpt.part0"])
@pytest.mark.parametrize("content", [b"\x93NUMPY points", b"short", "mixture", "other"])
def test_a_file_that_is_no_checkpoint_is_not_replaced(which, content, x, tmp_path):
    start = gk.initialize(x, 2, generator=torch.Generator().manual_seed(0))
    if content == "mixture":
        gk.save(start, tmp_path / "m.safetensors")
        (tmp_path / "m.safetensors").rename(tmp_path / which)
    elif content == "other":
        save_file({"a": torch.zeros(3)}, tmp_path / which, {"version": "3", "format": "pt"})
    else:
        (tmp_path / which).write_bytes(content)
    before = (tmp_path / which).read_bytes()
    with pytest.raises(ValueError, match=r"is not a checkpoint and would be overwritten by one; move it"):
        gk.fit(start, x, gk.EM(), max_iter=2, checkpoint=tmp_path / "fit.ckpt")
    assert (tmp_path / which).read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [which]


def test_places_that_cannot_hold_a_checkpoint_are_refused_before_any_work(x, tmp_path):
    start = gk.initialize(x, 2, generator=torch.Generator().manual_seed(0))
    steps = []
    for path, error, what in (
        (
            tmp_path / "absent" / "fit.ckpt",
            FileNotFoundError,
            "the folder .*absent of the checkpoint fit.ckpt does not exist",
        ),
        (tmp_path, ValueError, "must be the path of a file, got the folder"),
        ("", ValueError, "must be the path of a file, got the folder"),
        (os.devnull, ValueError, "is not a checkpoint and would be overwritten"),
    ):
        with pytest.raises(error, match=what):
            gk.fit(start, x, gk.EM(), max_iter=2, checkpoint=path, callback=steps.append)
    assert not steps
    assert not list(tmp_path.iterdir())


def test_files_have_the_permissions_that_the_umask_leaves(x, tmp_path):
    start = gk.initialize(x, 2, generator=torch.Generator().manual_seed(0))
    source = gk.Source.of(x, chunk_rows=1000)
    for mask in (0o022, 0o027, 0o077):
        folder = tmp_path / oct(mask)
        folder.mkdir()
        before = os.umask(mask)
        try:
            gk.save(start, folder / "mixture.safetensors")
            gk.fit(start, source, gk.EM(tol=0), max_iter=3, checkpoint=gk.Checkpoint(folder / "fit.ckpt", every=0))
        finally:
            os.umask(before)
        files = list(folder.iterdir())
        assert {file.name for file in files} == {
            "mixture.safetensors",
            *(f"fit.ckpt{e}" for e in ("", ".previous", ".part0")),
        }
        assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~mask}


def test_a_symbolic_link_stays_one(x, tmp_path):
    start = gk.initialize(x, 2, generator=torch.Generator().manual_seed(0))
    (tmp_path / "disk").mkdir()
    for name in ("fit.ckpt", "mixture.safetensors"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    for iterations in (1, 2):
        gk.fit(start, x, gk.EM(tol=0), max_iter=iterations, checkpoint=tmp_path / "fit.ckpt")
        gk.save(start, tmp_path / "mixture.safetensors")
    for name in ("fit.ckpt", "mixture.safetensors"):
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "disk" / name).stat().st_size > 0


@pytest.mark.parametrize("how", ["full", "gone", "half"])
@pytest.mark.parametrize("kind", ["memory", "source", "minibatches"])
def test_a_write_that_fails_is_a_warning_and_the_fit_goes_on(how, kind, x, tmp_path, monkeypatch):
    start = gk.initialize(x, 4, generator=torch.Generator().manual_seed(0))
    data = gk.Source.of(x, chunk_rows=1000) if kind == "source" else x
    method = gk.EM(tol=0, batch_size=900) if kind == "minibatches" else gk.EM(tol=0)
    expected = fit(data, start, method, None)
    folder = tmp_path / "folder"
    folder.mkdir()
    replace, fsync = os.replace, os.fsync

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail(step):
        if step.iteration == 1 and how == "gone":
            shutil.rmtree(folder)
        elif step.iteration == 1:
            monkeypatch.setattr(os, "replace" if how == "full" else "fsync", full)
        if step.iteration == 3:
            folder.mkdir(exist_ok=True)
            monkeypatch.setattr(os, "replace", replace)
            monkeypatch.setattr(os, "fsync", fsync)

    what = "No such file or directory" if how == "gone" else "No space left on device"
    with pytest.warns(
        UserWarning, match=rf"the checkpoint .* could not be written \({what}\); the fit continues"
    ) as told:
        found = fit(data, start, method, folder / "fit.ckpt", callback=fail)
    assert len(told) == 1
    assert same(found, expected)
    # It was written again once there was room, and nothing half-written is left.
    again = fit(data, start, method, folder / "fit.ckpt")
    assert same(again, expected)
    names = {file.name for file in folder.iterdir()}
    assert names <= {"fit.ckpt", "fit.ckpt.previous", "fit.ckpt.part0"}


def test_ctrl_c_returns_the_best_mixture_although_nothing_can_be_written(x, tmp_path, monkeypatch):
    start = gk.initialize(x, 3, generator=torch.Generator().manual_seed(0))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def stop(step):
        monkeypatch.setattr(os, "replace", full)
        if step.iteration == 3:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="No space left on device"):
        found = gk.fit(start, x, gk.EM(tol=0), max_iter=50, checkpoint=tmp_path / "fit.ckpt", callback=stop)
    assert found.report.interrupted
    assert found.objective < gk.fit(start, x, gk.EM(tol=0), max_iter=2).objective + 1e-12
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_hard_links_keeps_checkpoints_too(x, tmp_path, monkeypatch):
    def link(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    start = gk.initialize(x, 3, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "fit.ckpt"
    gk.fit(start, x, gk.EM(tol=0), max_iter=3, checkpoint=gk.Checkpoint(path, every=0))
    assert {file.name for file in tmp_path.iterdir()} == {"fit.ckpt", "fit.ckpt.previous"}
    path.unlink()
    found = gk.fit(start, x, gk.EM(tol=0), max_iter=5, checkpoint=path)
    assert same(found, gk.fit(start, x, gk.EM(tol=0), max_iter=5))
