"""The benchmark harness: peers do the same work, failures become rows, the report says what the results say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import HAS_KEOPS

import gmmkeops as gk

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import adapters
import cases
import measure
import report
import roofline
import starts

import run

TINY = cases.Case("tiny", "em", "clusters", 3000, 4, 3, ("gmmkeops", "scikit-learn"), iterations=(1, 3))


def there(peers):
    """Peers that are installed, without KeOps, whose formulas take long to compile."""
    return [p for p in peers if run.installed(adapters.package(p)) is not None and ", keops" not in p]


def likelihood(case, x, peer, iterations):
    *parameters, note = adapters.EM[peer](case, x, cases.start(case, x))(iterations)
    assert note.get("done", iterations) == iterations
    return measure.referee(case, x, parameters)


@pytest.mark.filterwarnings("ignore:.*did not converge")
@pytest.mark.parametrize("data", ["clusters", "surface", "uniform"])
def test_peers_run_the_same_iterations(data):
    case = replace(TINY, data=data)
    x = cases.cloud(case)
    assert x.shape == (3000, 3)
    assert x.dtype == np.float32
    peers = ("gmmkeops", "gmmkeops, 1e-4", "gmmkeops, every pair", "scikit-learn", "torch in chunks")
    values = {peer: likelihood(case, x, peer, 3) for peer in peers}
    assert max(values.values()) - min(values.values()) < 1e-4, values
    assert likelihood(case, x, "gmmkeops", 1) < values["gmmkeops"] - 1e-4


@pytest.mark.filterwarnings("ignore:.*converge")
@pytest.mark.parametrize(("family", "D"), [("full", 1), ("full", 5), ("diag", 5), ("spherical", 5), ("tied", 5)])
def test_all_peers_begin_with_the_parameters_of_the_case(family, D):
    case = replace(cases._em(family, 3000, 4, D), iterations=(1, 3))
    assert {"gmmkeops", "gmmkeops, native", "gmmkeops, dense", "scikit-learn"} <= set(case.peers)
    x = cases.cloud(case)
    weights, _, covariances = cases.start(case, x)
    assert np.ptp(weights) > 0.05
    if family != "tied":
        assert np.ptp(cases.dense(covariances, 4, D, family)[:, 0, 0]) > 0.05
    values = {peer: likelihood(case, x, peer, 1) for peer in (*there(case.peers), "gmmkeops, estimator")}
    assert max(values.values()) - min(values.values()) < 1e-5, values
    # One iteration from equal weights or from unit covariances gives another mixture.
    for other in ((np.full(4, 0.25), 1), (weights, 2)):
        start = cases.start(case, x)
        *parameters, _ = adapters.EM["gmmkeops"](case, x, (other[0], start[1], start[2] * other[1]))(1)
        assert abs(measure.referee(case, x, parameters) - values["gmmkeops"]) > 3e-5


@pytest.mark.skipif(not HAS_KEOPS, reason="pykeops is not installed")
@pytest.mark.keops
def test_losses_agree():
    case = replace(TINY, kind="loss", data="uniform", D=2)
    x = cases.cloud(case)
    peers = [peer for peer in adapters.LOSS if run.installed(adapters.package(peer)) is not None]
    values = {peer: adapters.LOSS[peer](case, x)() for peer in peers}
    assert len(values) >= 3
    assert max(values.values()) - min(values.values()) < 1e-4


@pytest.mark.parametrize("N", [1, 3000])
def test_scores_agree(N, monkeypatch):
    monkeypatch.setattr(measure, "_ENOUGH", 0.0)
    case = replace(TINY, kind="score", N=N)
    x = cases.cloud(case)
    rows = [measure.score(case, peer, x) for peer in there(adapters.SCORE)]
    values = [row["log_likelihood"] for row in rows]
    assert max(values) - min(values) < 1e-5, values
    assert min(min(row["seconds"], row["cpu_seconds"]) for row in rows) > 0


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
    values = [likelihood(case, x, peer, 4) for peer in ("gmmkeops", "Flash-GMM")]
    assert abs(values[0] - values[1]) < 1e-5, values


def test_the_table_of_cases_is_consistent():
    assert len({case.name for case in cases.CASES}) == len(cases.CASES)
    tables = {"em": adapters.EM, "small": adapters.EM, "score": adapters.SCORE, "loss": adapters.LOSS}
    tables |= {"fit": adapters.FIT, "bayes": adapters.BAYES}
    for case in cases.CASES:
        assert case.kind in measure.KINDS
        assert set(case.peers) <= set(tables.get(case.kind, case.peers)), case.name
        if case.kind in ("em", "small"):
            weights, means, covariances = cases.start(case, np.random.default_rng(0).normal(size=(case.K, case.D)))
            assert weights.shape == (case.K,)
            assert means.shape == (case.K, case.D)
            assert cases.dense(covariances, case.K, case.D, case.family).shape == (case.K, case.D, case.D)
    em = [case for case in cases.CASES if case.kind == "em" and case.device == "cpu"]
    assert {case.family for case in em} == {"full", "diag", "spherical", "tied"}
    assert {case.D for case in em} >= {1, 512}
    small = [case for case in map(cases.quick, cases.CASES) if case]
    assert {case.kind for case in small} >= {"em", "small", "score", "loss", "fit"}
    assert max(case.N for case in small) <= 2000
    assert cases.find("full, 3e5 x 30, D=3").N == 300_000
    assert cases.find("full, 3e5 x 30, D=3", quickly=True).N == 2000
    for _, name, *_ in report.PUBLISHED[:4]:
        assert cases.find(name).N == 1 << 20


def test_the_small_data_sets():
    iris = next(case for case in cases.CASES if case.data == "iris")
    assert cases.cloud(iris).shape == (iris.N, iris.D) == (150, 4)
    assert {(case.N, case.K) for case in cases.CASES if case.kind == "small"} == {(300, 3), (150, 3), (1000, 2)}


def test_rows_of_two_machines_do_not_mix(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "measure", lambda *_, **__: {"seconds": 1.0, "cpu_seconds": 1.0, "peak_MB": 1.0})
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
    monkeypatch.setattr(measure, "_LENGTH", 0.02)
    row = measure.em(TINY, "gmmkeops", cases.cloud(TINY))
    needed = {"seconds", "cpu_seconds", "cold_seconds", "peak_MB", "log_likelihood", "iterations"}
    assert {*needed, "timed_iterations", "engine", "pairs"} <= set(row)
    assert row["iterations"] == 3
    monkeypatch.setattr(measure, "_ENOUGH", 0.0)
    small = measure.small(replace(TINY, kind="small"), "gmmkeops", cases.cloud(TINY))
    assert needed <= set(small)
    assert small["log_likelihood"] == pytest.approx(row["log_likelihood"], abs=1e-9)
    rates = measure.peaks()
    assert rates["exp_per_s"] > 1e6
    assert 1e8 < rates["float64_flops"] < 3 * rates["float32_flops"]
    assert 1e8 < rates["bytes_per_s"] < 1e13


def test_fits_that_stop_early_are_errors(monkeypatch):
    def adapter(case, x, start):
        return lambda iterations: (*start, {"done": 2})

    monkeypatch.setitem(adapters.EM, "gmmkeops", adapter)
    for function in (measure.em, measure.small):
        assert function(TINY, "gmmkeops", cases.cloud(TINY)) == {"error": "stops after 2 of 3 iterations"}


def test_times_that_do_not_grow_with_the_iterations_are_errors(monkeypatch):
    def adapter(case, x, start):
        def run(iterations):
            time.sleep(0.02 / iterations)
            return (*start, {})

        return run

    monkeypatch.setitem(adapters.EM, "gmmkeops", adapter)
    assert "disturbed the measurement" in measure.em(TINY, "gmmkeops", cases.cloud(TINY))["error"]


def test_memory_of_making_the_points_is_not_counted():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not reset the largest memory")
    x = np.ones(1 << 26)
    full = measure.peak()
    del x
    measure.forget()
    assert measure.peak() < full - 400


def test_wall_clock_time_and_cpu_time_are_measured_apart(monkeypatch):
    monkeypatch.setattr(measure, "_ENOUGH", 0.0)
    wall, cpu = measure.timed(time.sleep, 0.05)[0]
    assert cpu < 0.02 < 0.05 <= wall
    waits = iter([0.03, 0.01, 0.03])
    wall, _ = measure.fastest(lambda: time.sleep(next(waits)))
    assert 0.01 <= wall < 0.03
    old = {"seconds": 1.0, "cpu_seconds": 3.0, "peak_MB": 5.0, "engine": "native"}
    new = {"seconds": 2.0, "cpu_seconds": 2.0, "peak_MB": 6.0, "engine": "native"}
    assert run.merged(old, new) == {"seconds": 1.0, "cpu_seconds": 2.0, "peak_MB": 5.0, "engine": "native"}
    assert run.merged(old, {"error": "is busy"}) == old
    assert run.merged(None, {"error": "is busy"}) == {"error": "is busy"}
    assert run.merged({"error": "is busy"}, new) == new


def test_peers_take_turns(monkeypatch):
    calls = []

    def stand_in(name, peer, limit, memory, **options):
        calls.append(peer)
        if peer == "tgmm":
            return {"error": "fails"}
        if calls.count(peer) == 1 and peer == "gmmx":
            return {"error": "another process disturbed the measurement"}
        return {"seconds": 1.0, "cpu_seconds": 1.0, "peak_MB": 1.0}

    monkeypatch.setattr(run, "measure", stand_in)
    rows = run.run_case(replace(TINY, peers=("gmmkeops", "tgmm", "gmmx")), 8)
    assert calls == ["gmmkeops", "tgmm", "gmmx", "gmmkeops", "gmmx"]
    assert [row["peer"] for row in rows if "error" in row] == ["tgmm"]


def test_measurements_use_the_given_threads_and_no_kernels_of_another_processor(monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    found = run.environment(3)
    assert "OPENBLAS_CORETYPE" not in found
    assert found["OMP_NUM_THREADS"] == found["OPENBLAS_NUM_THREADS"] == "3"
    assert found["PATH"]
    assert run.measure("peaks", "", 60, 0, threads=1)["threads"] == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not assign cores")
def test_measurements_use_as_many_cores_as_threads():
    program = "import os, sys; sys.path.insert(0, 'bench'); import measure; measure.restrict(); print(os.sched_getaffinity(0))"
    root, given = Path(__file__).parent.parent, {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=given, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str({min(os.sched_getaffinity(0))})


def test_failures_are_rows():
    assert run.measure("full, 3e5 x 30, D=3", "nobody's package", 10, 8) == {"error": "is not installed"}
    assert run.measure("full, 3e5 x 30, D=3", "scikit-learn", 0.01, 8) == {"error": "takes more than 0.01 s"}
    broken = run.measure("no such case", "scikit-learn", 60, 8)
    assert "StopIteration" in broken["error"]
    assert run.measure("surface, 1e6 x 1000", "scikit-learn", 100, 3) == {"error": "needs more than 3 GB of memory"}


SIZE = {"N": 1_000_000, "K": 1000, "D": 3, "family": "full", "kind": "em", "peak_MB": 10.0, "log_likelihood": -1.0}
PEAKS = {"exp_per_s": 1e9, "float64_flops": 8e10, "float32_flops": 1.6e11, "bytes_per_s": 2e10, "threads": 2}


def record(rows):
    return {
        "what": "seconds",
        "date": "2026-01-01",
        "machine": {"processor": "p", "cores": 2, "python": "3"},
        "threads": 2,
        "versions": {"torch": "2"},
        "roofline": PEAKS,
        "rows": rows,
    }


def test_report_says_what_the_results_say(tmp_path):
    surface = {"case": "surface, 1e6 x 1000", **SIZE}
    rows = [
        {"peer": "gmmkeops", "seconds": 0.5, "cpu_seconds": 0.9, "engine": "native", "pairs": 1, **surface},
        {"peer": "gmmkeops, native", "seconds": 0.6, "cpu_seconds": 1.0, "engine": "native", "pairs": 1, **surface},
        {"peer": "gmmkeops, 1e-4", "seconds": 0.25, "cpu_seconds": 0.5, "pairs": 0.1, "certificate": 9e-5, **surface},
        {"peer": "tgmm", "seconds": 5.0, "cpu_seconds": 18.0, **surface},
        {"peer": "scikit-learn", "error": "needs more than 16 GB of memory", **surface},
        {"peer": "gmmx", "seconds": 0.4, "cpu_seconds": 0.8, **surface, "log_likelihood": -1.002},
        {"peer": "pomegranate", "seconds": 0.4, "cpu_seconds": 0.8, **surface, "log_likelihood": -1.0009},
    ]
    found = record(rows)
    text = "\n".join(report.markdown(found))
    assert "| tgmm | 5.00 | 10.0x | 18.0 | 20.0x |" in text
    assert "10.00% of all pairs, error at most 9e-05 nats" in text
    assert "needs more than 16 GB of memory" in text
    (marked,) = [line for line in text.splitlines() if "differs by" in line]
    assert marked.startswith("| surface, 1e6 x 1000 | gmmx ")
    assert "**differs by 2e-03 nats**" in marked
    page = report.readme(found)
    assert "5.00 s (10.0x) |" in page
    assert "0.40 s (0.80x) † |" in page
    assert "† The final log-likelihood differs" in page
    assert "out of memory" in page
    report.scaling(found, tmp_path / "scaling.png")
    report.peers(found, tmp_path / "peers.png")
    report.rooflines(found, tmp_path / "roofline.png")
    for name in ("scaling.png", "peers.png", "roofline.png"):
        assert matplotlib.image.imread(tmp_path / name)[..., :3].std() > 0.02


def test_rooflines_count_operations_and_bytes():
    # Full, D = 3: residual 3, product 12, squares 6; moments 6 and 12; exponential 12.
    assert roofline.operations("full", 7, 3) == 51
    assert roofline.operations("tied", 6, 3) == 3 + 6 + 6 + 12 + 24 / 6
    assert roofline.operations("diag", 7, 3) == 36
    assert roofline.operations("spherical", 7, 3) == 30
    row = {"case": "c", **SIZE, "peer": "gmmkeops, native", "pairs": 1, "seconds": 1.0}
    skipping = {**row, "pairs": 0.5}
    other = {**row, "peer": "tgmm"}
    (found,) = roofline.rates(record([{**row, "seconds": 51e9 / PEAKS["float32_flops"]}, skipping, other]))
    assert found["of_flops"] == pytest.approx(1)
    assert found["pairs_per_s"] == pytest.approx(1e9 * PEAKS["float32_flops"] / 51e9)
    # Three float32 numbers a point; a weight, two means' and six factor's float64 numbers a component.
    moved = 12_000_000 + 8 * 1000 * (1 + 6 + 6)
    assert found["intensity"] == pytest.approx(51e9 / moved)
    text = "\n".join(report.markdown(record([row])))
    assert f"| c | native | 1 | 51 | {51 / 160:.0%} | 0.012 | 0% |" in text
    page = report.readme(record([row]))
    assert "up to 1.0·10⁹ pairs" in page
    assert "](bench/results/roofline.png)" in page


def test_sentences_on_small_fits_follow_from_the_results():
    size = {**SIZE, "kind": "small", "case": "300 x 3, D=2", "cold_seconds": 2.0}
    rows = [
        {"peer": "gmmkeops", "seconds": 1e-3, "cpu_seconds": 1e-3, **size},
        {"peer": "gmmkeops, estimator", "seconds": 2e-3, "cpu_seconds": 3e-3, **size},
        {"peer": "scikit-learn", "seconds": 5e-3, "cpu_seconds": 8e-3, **size},
        {"peer": "gmmx", "seconds": 5e-4, "cpu_seconds": 5e-4, **size},
    ]
    text = "\n".join(report.small_fits(record(rows)))
    assert (
        "takes 1.00 ms, and the estimator 2.00 ms (3.00 ms of CPU time), 2.5 times as fast as scikit-learn's with"
        in text
    )
    assert "5.00 ms (8.00 ms); gmmx takes 0.50 ms (2.00 s in the first call)." in text
    rows[1]["seconds"] = 10e-3
    assert "2.0 times as slow as scikit-learn's" in "\n".join(report.small_fits(record(rows)))
    assert report.small_fits(record(rows[2:])) == []


def test_published_figures_have_sources_and_our_times():
    case = report.PUBLISHED[0][1]
    row = {**SIZE, "case": case, "peer": "gmmkeops, native", "pairs": 1, "seconds": 0.123}
    text = "\n".join(report.published(record([row])))
    assert f"| GMMXX | {case} | 0.0330 s for 3 iterations | RTX 4090 | [README](https://" in text
    assert "| 0.12 s |" in text
    assert report.published(record([])) == []
    assert {system for system, *_ in report.PUBLISHED} == set(report.SOURCES)


def test_the_quick_report_leaves_the_readme_alone(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text("nothing")
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery/gallery.mplstyle").write_text("")
    monkeypatch.setattr(report, "README", readme)
    rows = [{**SIZE, "case": "c", "peer": peer, "pairs": 1, "seconds": 1.0} for peer in ("gmmkeops, native", "tgmm")]
    folder = tmp_path / "quick"
    folder.mkdir()
    (folder / "cpu.json").write_text(json.dumps(record(rows)))
    report.write(folder)
    assert {path.name for path in folder.iterdir()} == {
        "cpu.json",
        "report.md",
        "scaling.png",
        "peers.png",
        "roofline.png",
    }
    assert readme.read_text() == "nothing"
    marks = "\n".join(report.MARKS)
    readme.write_text(f"head\n{marks}\ntail")
    monkeypatch.setattr(report, "RESULTS", folder)
    report.write(folder)
    assert readme.read_text().startswith("head\n")
    assert report.readme(record(rows)) in readme.read_text()


@pytest.mark.filterwarnings("ignore:.*did not converge", "ignore:.*have not converged")
def test_posteriors_learn():
    case = replace(TINY, kind="bayes")
    x = cases.cloud(case)
    one = np.ones(1), x.mean(0, keepdims=True), np.cov(x.T)[None]
    for peer, adapter in adapters.BAYES.items():
        *parameters, _ = adapter(case, x, cases.start(case, x))(20)
        learned = measure.referee(case, x, parameters)
        assert learned > measure.referee(replace(case, K=1), x, one) + 0.3, peer


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


def test_the_table_of_engines_has_the_times_of_the_results():
    rows = json.loads((Path(__file__).parents[1] / "bench/results/cpu.json").read_text())["rows"]
    times = {(row["case"], row["peer"]): row.get("seconds") for row in rows}
    lines = [line for line in gk.reductions.TABLE if line.device == "cpu"]
    for line, case in zip(lines, ("full, 3e5 x 30, D=3", "diag, 1e5 x 64, D=8"), strict=True):
        for name in ("native", "dense", "keops"):
            assert f"{name} {1e3 * times[case, f'gmmkeops, {name}']:.3g} ms" in line.figure
        assert case.split(", ")[1] in line.figure


def test_the_table_of_engines_has_the_times_of_a_gpu():
    answers = json.loads((Path(__file__).parents[1] / "bench/results/gpu.json").read_text())["questions"]
    names = ("engines", "dimensions")
    times = {(name, row["family"], row["D"], row["engine"]): row for name in names for row in answers[name]["rows"]}
    found = 0
    for line in gk.reductions.TABLE:
        if line.device == "cuda":
            D = int(re.match(r"D = (\d+)", line.figure)[1])
            for engine, figure in re.findall(r"(triton|keops|dense) (\S+) ms", line.figure):
                rows = [times.get((name, "full" if line.full else "diag", D, engine)) for name in names]
                assert figure in [f"{row['moments ms']:.3g}" for row in rows if row], (line, engine)
                found += 1
    assert found == 11
