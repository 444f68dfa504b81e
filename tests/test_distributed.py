"""Ranks of torch.distributed on loopback: the model of one process from any number, and nobody is missed in silence."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import gmmkeops as gk

PRELUDE = """
import os, signal, sys, time, json
import numpy as np, torch, torch.distributed as dist
import gmmkeops as gk
from gmmkeops.data import collectives, distributed, heartbeat
from gmmkeops.data.distributed import RankError
torch.set_num_threads(1)
# Tests that a shell script has started in the background inherit SIG_IGN, and so would the ranks: Ctrl-C would do nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)
distributed.join("gloo")
rank, size, folder = dist.get_rank(), dist.get_world_size(), sys.argv[1]
x = np.load(folder + "/x.npy")
N = len(x)
start = gk.load(folder + "/start.safetensors")
"""


def launch(ranks, script, folder, path=""):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    path = os.pathsep.join([str(Path(gk.__file__).parents[1]), *([path] if path else [])])
    shared |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", PRELUDE + script, str(folder)],
            env={**os.environ, **shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def outputs(processes, timeout=120, awaited=None):
    """Exit code, output and errors of those awaited; none of them is left behind."""
    try:
        found = {process.pid: process.communicate(timeout=timeout) for process in awaited or processes}
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [(process.returncode, *found[process.pid]) for process in awaited or processes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(20_000, 3)) + 5 * rng.normal(size=(4, 3))[rng.integers(0, 4, 20_000)]).astype(np.float32)
    np.save(folder / "x.npy", x)
    gk.save(gk.initialize(x, 4, generator=torch.Generator().manual_seed(0)), folder / "start.safetensors")
    return folder


AGREE = """
cuts = {1: [0, N], 3: [0, N // 5, N // 5, N], 4: [0, 7, N // 2, N // 2, N]}[size]
mine = x[cuts[rank]:cuts[rank + 1]]
g = np.arange(N, dtype=float)[cuts[rank]:cuts[rank + 1]] % 3
file = gk.Source.of(folder + "/x.npy", chunk_rows=1900)
found = []
def keep(mixture):
    found.append(torch.cat([part.reshape(-1) for part in (mixture.weights, mixture.means, mixture.factor.covariances())]))
em, accelerated, adam = gk.EM(tol=0), gk.EM(tol=0, accelerate=True), gk.Adam()
for data, weights, methods in (
    (mine, None, (em, accelerated, adam)),
    (mine, g, (em, adam)),
    (file, None, (em, accelerated)),
    (x, None, (em,)),
):
    generator = torch.Generator().manual_seed(5 + rank)  # rank 0's counts
    keep(gk.initialize(data, 4, sample_weight=weights, generator=generator))
    for method in methods:
        penalty = gk.penalties.Dirichlet(2.0)
        keep(gk.fit(start, data, method, max_iter=5, sample_weight=weights, penalty=penalty).mixture)
keep(gk.GaussianMixture(4, max_iter=5, random_state=0).fit(mine).mixture_)
keep(gk.fit(start, mine, gk.EM(tol=0), truncate=1e-5, max_iter=3).mixture)
keep(gk.fit(start, mine, gk.bayes.VariationalBayes(tol=0), max_iter=5).posterior.mixture)
keep(gk.BayesianGaussianMixture(n_components=4, random_state=0, max_iter=5, tol=0).fit(x).mixture_)
torch.manual_seed(0)
network = gk.GMM(2, context=1, n_components=4).double()
network.initialize(x[:, :2], context=x[:, 2:], generator=torch.Generator().manual_seed(0))
gk.fit(network, mine[:, :2], gk.Adam(lr=1e-2), context=mine[:, 2:], max_iter=5)
keep(gk.Mixture(*(lambda m: (m.logits, torch.nn.functional.pad(m.means, (0, 1)), gk.FullFactor.from_covariances(
    torch.nn.functional.pad(m.factor.covariances(), (0, 1, 0, 1)) + torch.diag(torch.tensor([0.0, 0.0, 1.0])).double()
)))(network(torch.zeros(1).double()).detach())))
stepwise = gk.fit(start, file, gk.EM(tol=0, batch_size=1000, average=True), max_iter=3)
exact = gk.fit(start, file, gk.EM(tol=1e-7), max_iter=100)
assert stepwise.objective - exact.objective < 1e-3, (stepwise.objective, exact.objective)
np.save(folder + f"/out-{size}-{rank}.npy", torch.stack(found).numpy())
"""


@pytest.mark.parametrize("size", [4, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_give_the_model_of_one_process(size, folder):
    """Unequal shares, one of them empty; weights; files and arrays that all ranks hold alike, which are divided."""
    for number in (1, size):
        for code, _, errors in outputs(launch(number, AGREE, folder), timeout=300):
            assert code == 0, errors
    expected = np.load(folder / "out-1-0.npy")
    assert np.abs(expected).max() > 1
    for rank in range(size):
        # Sums of other shards are rounded to float32.
        assert np.abs(np.load(folder / f"out-{size}-{rank}.npy") - expected).max() < 3e-5


LONG = """
heartbeat.GONE = 6.0
heart = distributed.World().collectives.heartbeat
def ready(step):
    if step.iteration == 1:
        while not heart.rounds or not all(sign for sign, _ in heart.seen.values()):
            time.sleep(0.01)
        print("ready", flush=True)
file = gk.Source.of(folder + "/x.npy", chunk_rows=500)
gk.fit(start, file, gk.EM(tol=0), max_iter=100_000, callback=ready, verbose=False)
"""


@pytest.mark.parametrize(("how", "victim"), [("killed", 0), ("killed", 2), ("stopped", 0), ("stopped", 1)])
def test_a_rank_that_is_gone_is_named_on_all_others(how, victim, folder):
    processes = launch(3, LONG, folder)
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    processes[victim].send_signal(9 if how == "killed" else 19)
    others = [process for rank, process in enumerate(processes) if rank != victim]
    found = outputs(processes, timeout=60, awaited=others)
    assert time.monotonic() - began < 60
    for code, _, errors in found:
        assert code != 0
        # Rank 0 holds the store of this group, by which ranks tell each other.
        said = [line for line in errors.splitlines() if "RankError: " in line]
        assert said, errors
        assert f"rank {victim}" in said[-1], errors


DISAGREE = """
moved = gk.Mixture(start.logits, start.means + 0.01, start.factor)
two = gk.Mixture.from_parameters([0.5, 0.5], [[0.0] * 3, [1.0] * 3], [1.0, 1.0], "spherical")
mine = x[rank::size].copy()
bad = mine.copy()
bad[5, 1] = np.nan
for name, model, data, method in (
    ("components", two, mine, gk.EM(tol=0)),
    ("method", start, mine, gk.EM(tol=0, assignment="hard")),
    ("start", moved, mine, gk.EM(tol=0)),
    ("points", start, bad, gk.EM(tol=0)),
):
    try:
        if rank == 1:
            gk.fit(model, data, method, max_iter=3)
        else:
            gk.fit(start, mine, gk.EM(tol=0), max_iter=3)
    except Exception as error:
        print(name, error, flush=True)
"""


def test_a_rank_that_disagrees_or_fails_is_named_on_all(folder):
    expected = [
        "components rank 1 disagrees with rank 0 on the model",
        "method rank 1 disagrees with rank 0 on the method",
        "start rank 1 has another mixture than rank 0",
        "x must be finite, got NaN at row 5, column 1",
    ]
    for rank, (_, text, errors) in enumerate(outputs(launch(3, DISAGREE, folder))):
        lines = text.splitlines()
        assert len(lines) == len(expected), (rank, text, errors)
        for says, line in zip(expected, lines, strict=True):
            assert says in line, (rank, text, errors)
        assert rank == 1 or "rank 1" in lines[3]


LATE = """
heartbeat.GONE = 3.0
gk.fit(start, x[rank::size], gk.EM(tol=0), max_iter=2)
time.sleep(6.0 * rank)
gk.fit(start, x[rank::size], gk.EM(tol=0), max_iter=2)
"""


def test_a_rank_that_comes_late_to_a_fit_is_waited_for(folder):
    for code, _, errors in outputs(launch(2, LATE, folder)):
        assert code == 0, errors


RESTART = """
attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
def die(step):
    if attempt < 2 and rank == attempt + 1 and step.iteration == 2 + attempt:
        os.kill(os.getpid(), signal.SIGKILL)
file = gk.Source.of(folder + "/x.npy", chunk_rows=1900)
checkpoint = gk.Checkpoint(folder + "/ranks.ckpt", every=0)
result = gk.fit(start, file, gk.EM(tol=0), max_iter=8, checkpoint=checkpoint, callback=die)
if rank == 0:
    gk.save(result.mixture, folder + "/restarted.safetensors")
    print("iterations", result.n_iter, "attempt", attempt)
"""


def test_torchrun_restarts_a_killed_worker_from_its_checkpoint(folder):
    """Twice; and then another number of ranks goes on from the same files."""
    script = folder / "script.py"
    script.write_text(PRELUDE + RESTART)
    environment = {**os.environ, "PYTHONPATH": str(Path(gk.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "--max-restarts=3"]
    done = subprocess.run([*command, script, folder], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "iterations 8 attempt 2" in done.stdout
    start, x = gk.load(folder / "start.safetensors"), np.load(folder / "x.npy")
    expected = gk.fit(start, x, gk.EM(tol=0), max_iter=8).mixture
    assert torch.allclose(gk.load(folder / "restarted.safetensors").means, expected.means, atol=1e-6)
    more = gk.fit(start, folder / "x.npy", gk.EM(tol=0), max_iter=10, checkpoint=folder / "ranks.ckpt")
    assert more.n_iter == 10
    assert more.history["objective"][7] == pytest.approx(
        -expected.log_prob(torch.from_numpy(x)).mean().item(), abs=0.05
    )


SHARE = """
mine = x[rank::size]
seen = []
settings = {"checkpoint": folder + "/share.ckpt", "callback": lambda step: seen.append(step.iteration) and None}
for iterations in (4, 6):
    result = gk.fit(start, mine, gk.EM(tol=0), max_iter=iterations, **settings)
print(json.dumps([seen, result.n_iter, result.mixture.means.tolist()]))
"""


def test_each_rank_resumes_from_the_checkpoint_of_rank_0(folder):
    """Also the ranks that write no file of their own: no iteration is made twice."""
    found = []
    for code, out, errors in outputs(launch(2, SHARE, folder)):
        assert code == 0, errors
        found.append(json.loads(out))
    assert [rank[0] for rank in found] == [[0, 1, 2, 3, 4, 5]] * 2
    assert found[0][1] == 6
    expected = gk.fit(
        gk.load(folder / "start.safetensors"), np.load(folder / "x.npy"), gk.EM(tol=0), max_iter=6
    ).mixture.means
    assert torch.allclose(torch.tensor(found[0][2], dtype=torch.float64), expected, atol=1e-6)


def test_ranks_match_columns_by_name(folder):
    """Each rank has a file of its own; the columns are in another order in the second, and others in a third try."""
    pytest.importorskip("pyarrow")
    script = """
import pandas as pd
half = x[rank * 12_000 : 12_000 + rank * 8000]
mine = pd.DataFrame({"a": half[:, 0], "b": half[:, 1], "c": half[:, 2]})[[["a", "b", "c"], ["c", "a", "b"]][rank]]
mine.to_parquet(folder + f"/own{rank}.parquet")
for data in (folder + f"/own{rank}.parquet", mine):
    found = gk.fit(gk.initialize(data, 4), data, gk.EM(tol=0), max_iter=0, verbose=False).mixture
    result = gk.fit(start, data, gk.EM(tol=0), max_iter=3, verbose=False).mixture
    print(json.dumps([found.columns, result.columns, result.means.tolist(), found.means.mean(0).tolist()]), flush=True)
try:
    gk.fit(start, mine.rename(columns={"a": "q"} if rank else {}), gk.EM(), max_iter=1, verbose=False)
except (ValueError, RankError) as error:
    print(error, flush=True)
"""
    found = outputs(launch(2, script, folder))
    assert [len(out.splitlines()) for _, out, _ in found] == [3, 3], found
    single = gk.fit(gk.load(folder / "start.safetensors"), np.load(folder / "x.npy"), gk.EM(tol=0), max_iter=3).mixture
    lines = [out.splitlines() for _, out, _ in found]
    for line in (*lines[0][:2], *lines[1][:2]):
        begun, fitted, means, middle = json.loads(line)
        assert begun == fitted == ["a", "b", "c"]
        assert torch.allclose(torch.tensor(means).double(), single.means, rtol=1e-5, atol=1e-6)
        assert middle == pytest.approx(json.loads(lines[0][0])[3], rel=1e-9)
    for out in lines:
        assert "lacks the column a" in out[2]


DIFFERENT = """
collectives._PATIENCE = 60.0
results = []
def both(name, do, where=1):
    \"\"\"Runs a call that is not the same on all ranks; prints how it ended.\"\"\"
    began = time.monotonic()
    try:
        do()
        said = "no error"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps([name, said, time.monotonic() - began]), flush=True)

odd = rank == 1
P, mine = gk.penalties, x[rank::size]
em = gk.EM(tol=0)
def fit(method=em, data=mine, model=start, **options):
    return gk.fit(model, data, method, **{"max_iter": 3, "verbose": False, **options})
def interrupt(*who, how="raise"):
    def callback(step):
        if rank in who and step.iteration == 1:
            if how == "raise":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)
    return callback
def between(*who):
    \"\"\"A fit with a Ctrl-C just after the ranks have compared what they are about to do.\"\"\"
    meet, begun = collectives.Collectives._compare, []
    def comparison(world, act, *sizes):
        found = meet(world, act, *sizes)
        begun.append(act)
        if rank in who and begun.count("sum") == 3 and act == "sum":
            os.kill(os.getpid(), signal.SIGINT)
        return found
    collectives.Collectives._compare = comparison
    try:
        return fit(max_iter=50)
    finally:
        collectives.Collectives._compare = meet
strength = 0.1 + 0.1 * rank
g = np.ones(len(mine))
both("max_iter", lambda: fit(max_iter=3 + rank))
both("tol", lambda: fit(tol=1e-9 * rank))
both("patience", lambda: fit(gk.EM(tol=0, patience=1 + rank)))
both("method assignment", lambda: fit(gk.EM(tol=0, assignment="hard" if odd else "soft")))
both("method lr", lambda: fit(gk.Adam(lr=0.1 + 0.1 * rank)))
both("method EM", lambda: fit(gk.Adam() if odd else em))
both("method optimizer", lambda: fit(gk.Gradient((lambda p: torch.optim.SGD(p, lr=0.1)) if odd else torch.optim.Adam)))
both("penalty strength", lambda: fit(penalty=P.SqrtWeights(strength)))
both("penalty strength=", lambda: fit(gk.Adam(), penalty=lambda m: strength * m.means.square().sum()))
both("penalty", lambda: fit(penalty=P.SqrtWeights(1.0) if odd else None))
both("truncate", lambda: fit(truncate=1e-3 * rank))
both("dtype", lambda: fit(dtype="float32" if odd else "float64"))
both("backend", lambda: fit(backend="dense" if odd else "auto"))
both("start", lambda: fit(model=gk.Mixture(start.logits, start.means + 1e-3 * rank, start.factor)))
few = torch.arange(4 - rank)
both("model", lambda: fit(model=gk.Mixture(start.logits[few], start.means[few], gk.FullFactor.from_factors(start.factor.U[few]))))
both("sample_weight", lambda: fit(sample_weight=g if odd else None))
both("generator", lambda: fit(generator=torch.Generator() if odd else None))
both("checkpoint", lambda: fit(checkpoint=folder + "/odd.ckpt" if odd else None))
both("max_memory", lambda: fit(max_memory="1GB" if odd else None))
both("kind of x", lambda: fit(data=folder + "/x.npy" if odd else x))
both("components", lambda: gk.initialize(mine, 3 + rank))
both("sample_weight", lambda: gk.initialize(mine, 3, sample_weight=g if odd else None))
both("n_init", lambda: gk.GaussianMixture(4, n_init=1 + rank, random_state=0).fit(mine))
both("covariance_type", lambda: gk.GaussianMixture(4, covariance_type="diag" if odd else "full", random_state=0).fit(mine))
both("call initialize fit", lambda: gk.initialize(mine, 3) if odd else fit())
both("call GaussianMixture", lambda: gk.GaussianMixture(2).fit(mine) if odd else fit())
for how in ("raise", "signal"):
    both("rank 1 was interrupted", lambda: fit(max_iter=50, callback=interrupt(1, how=how)))
    both("rank 0 was interrupted", lambda: fit(max_iter=50, callback=interrupt(0, how=how)))
both("rank 1 was interrupted", lambda: between(1))
both("rank 0 was interrupted", lambda: between(0))
result = between(0, 1)
assert result.report.interrupted, result
for how in ("raise", "signal"):
    result = fit(max_iter=50, callback=interrupt(0, 1, how=how))
    print(json.dumps(["together", result.report.interrupted, result.n_iter, result.mixture.means.tolist()]))
result = fit(max_iter=50, callback=lambda step: rank == 1 and step.iteration == 1)
print(json.dumps(["stopped", result.report.interrupted, result.n_iter, result.mixture.means.tolist()]))
"""


def test_whatever_differs_between_ranks_is_named_on_all_of_them(folder):
    """None of it deadlocks, and the same processes fit together afterwards."""
    found = outputs(launch(2, DIFFERENT, folder), timeout=300)
    lines = []
    for code, text, errors in found:
        assert code == 0, errors
        lines.append([json.loads(line) for line in text.splitlines()])
    assert len(lines[0]) == len(lines[1]) == 35
    for first, second in zip(*lines, strict=True):
        if first[0] in ("together", "stopped"):
            assert first == second
            assert first[1:3] == [first[0] == "together", 2]
            continue
        for name, said, seconds in (first, second):
            assert said.startswith("RankError: "), (name, said)
            assert all(word in said for word in name.split()), (name, said)
            assert "rank 1" in said or "rank 0 was" in said, said
            assert seconds < 60
        assert first[1] == second[1]


ALONE = """
heartbeat._CALLBACK = 1.0
what, received = os.environ["WHAT"], []
handler = signal.default_int_handler
if rank == 2:
    handler = signal.SIG_IGN
if rank == 3:
    handler = lambda number, frame: received.append(number)
signal.signal(signal.SIGINT, handler)
def callback(step):
    if rank > 1 and step.iteration == 1:
        os.kill(os.getpid(), signal.SIGINT)
    if rank > 0 and step.iteration == 2:
        if what == "raises":
            raise ArithmeticError("of my own")
        time.sleep(600)
try:
    gk.fit(start, x[rank::size], gk.EM(tol=0), max_iter=1000, callback=callback, verbose=False)
except BaseException as error:
    print(f"{type(error).__name__}: {error}", flush=True)
assert signal.getsignal(signal.SIGINT) is handler
print("received", received, flush=True)
"""


@pytest.mark.parametrize(
    ("what", "ranks", "says"),
    [
        ("sleeps", 4, r"RankError: rank [123] has been in a callback for"),
        ("raises", 2, r"RankError: rank 1 failed with ArithmeticError: of my own"),
    ],
)
def test_a_callback_that_does_not_come_back_is_named_on_all_ranks(what, ranks, says, folder, monkeypatch):
    """Callbacks that sleep are woken whatever Ctrl-C does in their processes, and Ctrl-C goes on doing that."""
    monkeypatch.setenv("WHAT", what)
    began = time.monotonic()
    found = outputs(launch(ranks, ALONE, folder), timeout=100)
    assert time.monotonic() - began < 60
    for rank, (code, text, errors) in enumerate(found):
        assert code in (0, 1), errors
        assert re.search(says, text) or (rank == 1 and what == "raises"), (rank, text, errors)
        assert text.endswith("received [2]\n" if rank == 3 else "received []\n"), (text, errors)


CHOICE = """
half = x[: N // 2] if rank == 0 else x[N // 2 :]
found = {}
for name, data in (("parts", half), ("equal", x)):
    for criterion in ("bic", "held_out"):
        table = gk.analysis.select(data, criterion=criterion)
        found[name + criterion] = [table.best.n_components, table.rows[table.place]["bic"], table.best.means.sum().item()]
    table = gk.analysis.select(data, [3, 4, 5])
    found[name + "list"] = [table.best.n_components, table.rows[table.place]["bic"], table.best.means.sum().item()]
    path = gk.analysis.penalty_path(data, 5, [0.01, 0.1])
    found[name + "path"] = [path.best.n_components, path.rows[path.place]["bic"], path.best.means.sum().item()]
result = gk.fit(start, half, gk.EM(tol=0), max_iter=4, validation=half[:1000])
found["validation"] = result.history["validation"]
print(json.dumps(found))
"""


def test_ranks_choose_the_same_model_by_all_points(folder):
    done = outputs(launch(2, CHOICE, folder))
    assert [code for code, _, _ in done] == [0, 0], done
    first, second = (json.loads(out.splitlines()[-1]) for _, out, _ in done)
    assert first == second
    x = torch.from_numpy(np.load(folder / "x.npy"))
    own = gk.fit(gk.initialize(x, 4), x, gk.EM(tol=1e-4, max_iter=1000))
    for data in ("parts", "equal"):
        for way in ("bic", "held_out", "list"):
            n, value, _ = first[data + way]
            assert n == 4
            assert value == pytest.approx(gk.analysis.bic(own.mixture, x), rel=1e-4)
    held = torch.cat([x[:1000], x[10_000:11_000]])
    start = gk.load(folder / "start.safetensors")
    plain = gk.fit(start, x, gk.EM(tol=0), max_iter=4, validation=held)
    assert first["validation"] == pytest.approx(plain.history["validation"], abs=1e-6)


ON_A_DEVICE = """
import pytest
from fake_device import fake_device, on_device
half = torch.from_numpy(x).double()[rank * N // 2:(rank + 1) * N // 2]
methods = (gk.EM(tol=0), gk.EM(tol=0, batch_size=5000), gk.Adam(), gk.bayes.VariationalBayes(tol=0))
with pytest.MonkeyPatch.context() as patch, fake_device(patch):
    found = []
    for method in methods:
        result = gk.fit(start.to("cuda"), on_device(half), method, max_iter=3, backend="dense")
        assert result.mixture.means.is_cuda
        found.append(result.mixture.to("cpu").means)
np.save(folder + f"/device-{rank}.npy", torch.stack(found).numpy())
"""


def test_ranks_whose_points_are_on_a_device(folder):
    for code, _, errors in outputs(launch(2, ON_A_DEVICE, folder, str(Path(__file__).parent))):
        assert code == 0, errors
    first, second = (torch.from_numpy(np.load(folder / f"device-{rank}.npy")) for rank in (0, 1))
    assert torch.equal(first, second)
    x, start = torch.from_numpy(np.load(folder / "x.npy")).double(), gk.load(folder / "start.safetensors")
    methods = (gk.EM(tol=0), gk.Adam(), gk.bayes.VariationalBayes(tol=0))
    for found, method in zip(first[[0, 2, 3]], methods, strict=True):
        expected = gk.fit(start, x, method, max_iter=3, backend="dense").mixture.means
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("devices", "workers", "others", "expected"),
    [
        (0, 2, "False", "gloo"),
        (2, 2, "True", "nccl"),
        (1, 2, "False", "gloo"),
        # Another machine has fewer devices than workers.
        (2, 2, "False", "gloo"),
    ],
)
def test_ranks_without_a_device_of_their_own_use_gloo(monkeypatch, devices, workers, others, expected):
    store, chosen = torch.distributed.HashStore(), []
    for rank in range(3):
        if rank != 1:
            torch.distributed.PrefixStore("gmmkeops attempt 0", store).set(f"own device {rank}", others)
    for name, value in {
        "RANK": 1,
        "LOCAL_RANK": 1,
        "LOCAL_WORLD_SIZE": workers,
        "TORCHELASTIC_RESTART_COUNT": 0,
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda address: iter([(store, 1, 3)]))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **options: chosen.append(backend))
    gk.distributed.join()
    assert chosen == ([1 % devices] if devices else []) + [expected]
