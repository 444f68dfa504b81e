"""The benchmark harness: peers do the same work, failures become rows, the report says what the results say."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import HAS_KEOPS

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import adapters
import cases
import measure
import report
import starts

import run

TINY = cases.Case("tiny", "em", "clusters", 3000, 4, 3, ("gmmkeops", "scikit-learn"), iterations=(1, 3))


@pytest.mark.filterwarnings("ignore:.*did not converge")
@pytest.mark.parametrize("data", ["clusters", "surface", "uniform"])
def test_peers_run_the_same_iterations(data):
    case = replace(TINY, data=data)
    x = cases.cloud(case)
    assert x.shape == (3000, 3)
    assert x.dtype == np.float32
    start = cases.start(case, x)
    values = {}
    for peer in ("gmmkeops", "gmmkeops, 1e-4", "gmmkeops, every pair", "scikit-learn", "torch in chunks"):
        *parameters, _ = adapters.EM[peer](case, x, start)(3)
        values[peer] = measure.referee(x, parameters, "cpu")
    assert max(values.values()) - min(values.values()) < 1e-4, values
    *parameters, _ = adapters.EM["gmmkeops"](case, x, start)(1)
    assert measure.referee(x, parameters, "cpu") < values["gmmkeops"] - 1e-4


@pytest.mark.skipif(not HAS_KEOPS, reason="pykeops is not installed")
@pytest.mark.keops
def test_losses_agree():
    case = replace(TINY, kind="loss", data="uniform", D=2)
    x = cases.cloud(case)
    values = {peer: adapters.LOSS[peer](case, x)() for peer in ("gmmkeops", "GMM module", "KeOps tutorial")}
    assert max(values.values()) - min(values.values()) < 1e-4


def test_scores_agree():
    case = replace(TINY, kind="score")
    x = cases.cloud(case)
    rows = [measure.score(case, peer, x) for peer in adapters.SCORE]
    values = [row["log_likelihood"] for row in rows]
    assert max(values) - min(values) < 1e-5, values
    assert min(row["seconds"] for row in rows) > 0


def test_flash_gmm_takes_steps_of_em(monkeypatch):
    """A stand-in with the E-step that the peer documents: sums of x, and of squares about the old means."""

    def estep(x, means, log_variances, log_weights):
        squares = torch.cdist(x.double(), means.double()).square()
        e = log_weights - 0.5 * squares / log_variances.exp() - 0.5 * x.shape[1] * (np.log(2 * np.pi) + log_variances)
        r = e.softmax(1)
        return e.logsumexp(1), r.sum(0).float(), (r.T @ x.double()).float(), (r * squares).sum(0).float()

    monkeypatch.setitem(sys.modules, "flash_gmm", SimpleNamespace(flash_gmm_estep=estep))
    case = replace(TINY, family="spherical", D=5)
    x = cases.cloud(case)
    start = cases.start(case, x)
    values = []
    for peer in ("gmmkeops", "Flash-GMM"):
        *parameters, _ = adapters.EM[peer](case, x, start)(4)
        values.append(measure.referee(x, parameters, "cpu"))
    assert abs(values[0] - values[1]) < 1e-5, values


def test_rows_of_two_machines_do_not_mix(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "measure", lambda *_: {"seconds": 1.0, "peak_MB": 1.0})
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "loss", "--save"])
    other = {
        "machine": {"processor": "another"},
        "rows": [{"case": "loss, 1e6 x 30, D=2", "peer": "gmmkeops", "seconds": 9}],
    }
    (tmp_path / "cpu.json").write_text(json.dumps(other))
    with pytest.raises(SystemExit):
        run.main()
    assert "is of another machine" in capsys.readouterr().err
    assert json.loads((tmp_path / "cpu.json").read_text()) == other
    (tmp_path / "cpu.json").write_text(json.dumps({**other, "machine": run.machine("cpu")}))
    run.main()
    rows = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert [row["seconds"] for row in rows if row["case"] == "loss, 1e6 x 30, D=2"] == [1.0] * 4


def test_measurements_have_what_a_row_needs(monkeypatch):
    # An iteration takes longer than its overhead on any machine.
    case = replace(TINY, N=100_000, K=30, iterations=(1, 11))
    monkeypatch.setattr(cases, "find", lambda name: case)
    row = measure.em(case, "gmmkeops", cases.cloud(case))
    assert {"seconds", "cold_seconds", "peak_MB", "log_likelihood", "iterations", "engine", "pairs"} <= set(row)
    rates = measure.roofline()
    assert rates["exp_per_s"] > 1e6
    assert 1e8 < rates["float64_flops"] < 3 * rates["float32_flops"]


def test_failures_are_rows():
    assert run.measure("1e6 x 30, D=2", "nobody's package", 10, 8) == {"error": "is not installed"}
    assert run.measure("1e6 x 30, D=2", "scikit-learn", 0.01, 8) == {"error": "takes more than 0.01 s"}
    broken = run.measure("no such case", "scikit-learn", 60, 8)
    assert "StopIteration" in broken["error"]
    assert run.measure("surface, 1e6 x 1000", "scikit-learn", 100, 3) == {"error": "needs more than 3 GB of memory"}


def test_report_says_what_the_results_say(tmp_path):
    size = {"N": 1_000_000, "K": 1000, "D": 3, "family": "full", "kind": "em", "peak_MB": 10.0, "log_likelihood": -1.0}
    rows = [
        {"case": "surface, 1e6 x 1000", "peer": "gmmkeops", "seconds": 0.5, "engine": "dense", "pairs": 1, **size},
        {
            "case": "surface, 1e6 x 1000",
            "peer": "gmmkeops, 1e-4",
            "seconds": 0.25,
            "pairs": 0.1,
            "certificate": 9e-5,
            **size,
        },
        {"case": "surface, 1e6 x 1000", "peer": "tgmm", "seconds": 5.0, **size},
        {"case": "surface, 1e6 x 1000", "peer": "scikit-learn", "error": "needs more than 16 GB of memory", **size},
    ]
    rates = {"exp_per_s": 1e9, "float64_flops": 8e10, "float32_flops": 1.6e11}
    record = {
        "what": "seconds",
        "date": "2026-01-01",
        "machine": {"processor": "p", "cores": 2, "python": "3"},
        "versions": {"torch": "2"},
        "roofline": rates,
        "rows": rows,
    }
    text = "\n".join(report.markdown(record))
    assert "| tgmm | 5.00 | 10.0x |" in text
    assert "10.00% of all pairs, error at most 9e-05 nats" in text
    assert "needs more than 16 GB of memory" in text
    # Two products of ten features, four operations a feature and pair, and one exponential: 1.5 s of 0.5 s measured.
    assert f"{1e9 * (40 / 8e10 + 1e-9) / 0.5:.0%} of the roof" in text
    page = report.readme(record)
    assert "5.00 s (10.0x)" in page
    assert "out of memory" in page
    report.scaling(record, tmp_path / "scaling.png")
    report.peers(record, tmp_path / "peers.png")
    for name in ("scaling.png", "peers.png"):
        assert matplotlib.image.imread(tmp_path / name)[..., :3].std() > 0.02


@pytest.mark.filterwarnings("ignore:.*did not converge", "ignore:.*have not converged")
def test_posteriors_learn():
    case = replace(TINY, kind="bayes")
    x = cases.cloud(case)
    one = np.ones(1), x.mean(0, keepdims=True), np.cov(x.T)[None]
    for peer, adapter in adapters.BAYES.items():
        *parameters, _ = adapter(case, x, cases.start(case, x))(20)
        assert measure.referee(x, parameters, "cpu") > measure.referee(x, one, "cpu") + 0.3, peer


def test_initial_mixtures_are_compared(monkeypatch, tmp_path):
    monkeypatch.setitem(starts.SETS, "iris", starts.clusters(600, 3, 2, 9.0, noise=0.05))
    monkeypatch.setattr(starts, "_REPEATS", 1)
    rows = starts.measured("iris", 0)
    assert [row["start"] for row in rows] == [starts.THEIRS, *starts.STRATEGIES, starts.PRIOR]
    values = {row["start"]: row for row in rows}
    assert values["auto"]["rand"] > 0.99
    assert values["auto"]["log_likelihood"] >= values["scikit-learn"]["log_likelihood"] - 1e-3
    assert all(row["N"] == 400 and row["relative_cpu"] > 0 for row in rows)
    # Likelihoods are averaged, and ratios of times by their logarithms.
    double = [row | {"unseen": row["unseen"] - 1, "relative_cpu": 4 * row["relative_cpu"]} for row in rows]
    for row in double:
        row["unseen"] -= row["start"] == "auto"
    found = starts.summaries({"rows": rows + double})["iris"]
    for name, row in values.items():
        assert found[name]["cpu"] == pytest.approx(2 * row["relative_cpu"])
    gain = values["auto"]["unseen"] - values["scikit-learn"]["unseen"]
    assert found["auto"]["gain"] == pytest.approx(gain - 0.5)
    starts.plot({"rows": [row | {"set": name} for name in starts.SETS for row in rows]}, tmp_path / "starts.png")
    assert matplotlib.image.imread(tmp_path / "starts.png")[..., :3].std() > 0.02
