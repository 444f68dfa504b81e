"""What the gallery's scripts print holds, and their figures are not blank."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest

ROOT = Path(__file__).parent.parent
GALLERY = ROOT / "gallery/scripts"
BUILT = ROOT / "gallery/auto"


def fits(output):
    """What each printed fit says: objective, mean log-likelihood, live components."""
    pattern = (
        r"on cpu \((?:native|dense), float32\): objective (-?[\d.]+), mean log-likelihood (-?[\d.]+) nats per point, "
        r"(\d+) of"
    )
    return [(float(a), float(b), int(c)) for a, b, c in re.findall(pattern, output)]


def spiral(output):
    ((objective, _, live),) = fits(output)
    assert objective <= -0.38
    assert live <= 15


def photograph(output):
    ((_, likelihood, live),) = fits(output)
    assert likelihood > 3.5
    assert live <= 64


def choosing(output):
    assert "choosing: 5 components, full covariances" in output
    assert "choosing: GaussianMixture: 5 components" in output
    for criterion in ("held_out", "bic", "icl"):
        assert f"choosing: {criterion}: 5 components" in output
    assert "choosing: list: 5 components, full covariances" in output
    assert float(re.search(r"costs (\d+) times as much", output)[1]) > 10
    assert "of the 5 remaining components" in output
    assert "choosing: irises: 3 components, full covariances" in output
    assert "choosing: irises by BIC: 2 components" in output
    assert float(re.search(r"adjusted Rand index ([\d.]+)", output)[1]) > 0.85
    assert 0.4 < float(re.search(r"silhouette ([\d.]+) on", output)[1]) < 0.65


def reducing(output):
    assert "reducing: 2000 components to 200" in output
    many, few = map(int, re.search(r"on the table: (\d+) components to (\d+)", output).groups())
    assert many > 15 * few
    loss, total = map(float, re.search(r"divergence ([\d.]+) ± .* sum of the costs ([\d.]+)", output).groups())
    bound = float(re.search(r'cost="bound": ([\d.]+)', output)[1])
    assert loss < min(bound, total)
    scores = [float(value) for value in re.findall(r"log-likelihood (-?[\d.]+) nats", output)]
    assert len(scores) == 4
    assert scores[0] > scores[2] > max(scores[1], scores[3])


def anomalies(output):
    caught, false = map(float, re.search(r"([\d.]+) % of the anomalies detected, ([\d.]+) % false", output).groups())
    assert caught > 70
    assert false < 5


def em_against_adam(output):
    em, fast, adam = fits(output)
    assert abs(em[0] - fast[0]) < 0.02
    assert em[0] < adam[0] + 0.02
    assert em[2] < 20


def coming_from(output):
    ours, theirs = map(float, re.search(r"score (-?[\d.]+), scikit-learn (-?[\d.]+)", output).groups())
    assert abs(ours - theirs) <= 1e-6
    assert "60 points beyond five sigma" in output
    assert float(re.search(r"Zuko's loop ends at (-?[\d.]+)", output)[1]) > theirs - 0.01
    light, heavy = map(float, re.search(r"lunches of ([\d.]+) ± [\d.]+ g and ([\d.]+) ±", output).groups())
    assert abs(light - 350) < 2
    assert abs(heavy - 500) < 3


def arm(output):
    forward, likely, mean = map(
        float, re.search(r"forward (\d+) mm.*answer (\d+) mm, by .*all (\d+) mm", output).groups()
    )
    assert forward < 30
    assert likely < 60
    assert mean > 3 * likely


def bentos(output):
    assert "the importance weights are degenerate" in output
    rows = re.findall(r"(grid|importance|Gibbs|NUTS) means ([\d.]+) ([\d.]+) sd ([\d.]+) ([\d.]+)", output)
    table = {name: list(map(float, values)) for name, *values in rows}
    assert len(table) == 4
    for found in table.values():
        assert found[:2] == pytest.approx(table["grid"][:2], abs=0.12)
        assert found[2:] == pytest.approx(table["grid"][2:], rel=0.15)
    assert 0.3 < float(re.search(r"P\(heavy \| 425 g\) = ([\d.]+)", output)[1]) < 0.7


def coffees(output):
    means = re.findall(r"\[\d,0\] +([\d.]+)", output)
    assert [float(m) for m in means[:3]] == pytest.approx([86, 118, 166], abs=4)
    scatter, low, high = map(
        float, re.search(r"scatter ([\d.]+) mg, 90 % between ([\d.]+) and ([\d.]+)", output).groups()
    )
    assert low < scatter < high
    assert low < 5.2


def density_network(output):
    network, exact, squares = map(
        float, re.search(r"network (-[\d.]+), conditioned (-[\d.]+), least squares (-[\d.]+)", output).groups()
    )
    assert min(network, exact) > squares + 1.5


def process(output):
    for counts in re.findall(r"of \([\d, ]+\): \[([\d, ]+)\]", output):
        used = list(map(int, counts.split(",")))
        assert used[0] < 12
        assert used[-1] > 3 * used[0]
    assert float(re.search(r"differ by ([\d.]+) nats", output)[1]) < 0.01


def standard_errors(output):
    joint, block = map(float, re.search(r"of 14: ([\d.]+)%; by component ([\d.]+)%", output).groups())
    assert joint < 20
    assert block > 20


def ten_thousand(output):
    share, certified = map(float, re.search(r"([\d.]+)% of the pairs evaluated, certified (\S+) nats", output).groups())
    assert share < 10
    assert 0 < certified <= 1.01e-4
    low, high = map(float, re.search(r"lost between (\S+) and (\S+) nats", output).groups())
    assert low > -1e-9
    assert high <= 1.01e-4


def map_coordinates(output):
    table = dict(re.findall(r"map coordinates: (\S+, .*?float\d\d): ([\d.e+ na-]+)", output))
    errors = {name: [float(value) for value in values.split()] for name, values in table.items()}
    assert max(errors["gmmkeops, float64"]) < 1e-6
    assert max(errors["gmmkeops, computed in float32"]) < 1e-4
    assert not errors["scikit-learn, float64"][-1] < 0.01
    assert "float32 steps at 2e7: 2 m" in output


def streaming(output):
    exact, quick = map(float, re.search(r"12 passes (-[\d.]+), stepwise after 3 passes (-[\d.]+)", output).groups())
    assert quick > exact - 0.02
    assert float(re.search(r"would take (\d+) MB", output)[1]) < 1000


def two_ranks(output):
    assert float(re.search(r"differ by ([\d.e-]+) at most", output)[1]) < 1e-6


def town(output):
    plates, needles, balls = map(int, re.search(r"plates (\d+)%, needles (\d+)%, balls (\d+)%", output).groups())
    assert plates > 50
    assert balls > 2
    assert plates + needles + balls in (99, 100, 101)
    assert float(re.search(r"splat file of (\d+) kB", output)[1]) < 900


def penalties(output):
    live = {name: int(count) for name, count in re.findall(r"penalties: (.*?): (\d+) active", output)}
    assert live["none"] >= 18
    assert live["SqrtWeights(3)"] < live["none"]
    assert live["Dirichlet(50)"] == 20
    assert len(live) == 6


def starts(output):
    poor, good, true = map(
        float,
        re.search(
            r'"kmeans": log-likelihood (\S+) .*"auto": log-likelihood (\S+) .*mixture: log-likelihood (\S+)',
            output,
            re.S,
        ).groups(),
    )
    assert poor < true - 0.1
    assert good > true - 1e-3
    rounds = [float(value) for value in re.findall(r"\d\d components, log-likelihood (\S+)", output)]
    assert rounds[1] > rounds[0] > poor
    assert rounds[3] > rounds[2] > poor + 0.02
    assert float(re.search(r"reduced to 12: log-likelihood (\S+)", output)[1]) > true - 0.02


# For each script: how many figures, and what must hold of its output.
SCRIPTS = {
    "1_model/plot_spiral.py": (2, spiral),
    "6_practice/plot_photograph.py": (2, photograph),
    "3_choosing/plot_choosing.py": (4, choosing),
    "3_choosing/plot_reducing.py": (2, reducing),
    "3_choosing/plot_anomalies.py": (1, anomalies),
    "2_fitting/plot_em_against_adam.py": (1, em_against_adam),
    "6_practice/plot_coming_from.py": (1, coming_from),
    "5_bayes/plot_bentos.py": (1, bentos),
    "5_bayes/plot_coffees.py": (1, coffees),
    "1_model/plot_arm.py": (1, arm),
    "1_model/plot_density_network.py": (1, density_network),
    "5_bayes/plot_process.py": (1, process),
    "5_bayes/plot_standard_errors.py": (1, standard_errors),
    "2_fitting/plot_penalties.py": (1, penalties),
    "2_fitting/plot_starts.py": (3, starts),
    "4_scale/plot_ten_thousand.py": (1, ten_thousand),
    "4_scale/plot_map_coordinates.py": (1, map_coordinates),
    "4_scale/plot_streaming.py": (1, streaming),
    "4_scale/plot_two_ranks.py": (1, two_ranks),
    "4_scale/plot_town.py": (1, town),
}


def test_every_script_is_tested():
    assert {str(path.relative_to(GALLERY)) for path in GALLERY.glob("*/plot_*.py")} == set(SCRIPTS)


def are_pictures(paths, count):
    assert len(paths) == count
    for path in paths:
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[1] > 600
        assert pixels[..., :3].std() > 0.05


@pytest.mark.gallery
@pytest.mark.parametrize("script", SCRIPTS)
def test_script(script):
    """What the build of the site has printed and drawn, with this text of the script."""
    figures, holds = SCRIPTS[script]
    built = BUILT / script
    assert built.with_suffix(".py.md5").exists(), "the gallery is not built; run make gallery"
    assert built.with_suffix(".py.md5").read_text() == hashlib.md5((GALLERY / script).read_bytes()).hexdigest()
    page = built.with_suffix(".rst").read_text()
    printed = re.findall(r"rst-class:: sphx-glr-script-out\n\n \.\. code-block:: none\n\n((?:    .*\n|\s*\n)+)", page)
    holds("\n".join(printed))
    are_pictures(sorted((built.parent / "images").glob(f"sphx_glr_{built.stem}_*.png")), figures)


def run(script, out, **environment):
    command = [sys.executable, "-W", "error::DeprecationWarning:gmmkeops", str(GALLERY.parent / "run.py"), str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([*command, str(GALLERY / script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_demo(tmp_path):
    """A script of ``make demo``, by its own runner."""
    spiral(run("1_model/plot_spiral.py", tmp_path))
    are_pictures(sorted(tmp_path.glob("*.png")), 2)


@pytest.mark.gallery
def test_town_without_a_scan(tmp_path):
    output = run("4_scale/plot_town.py", tmp_path, SCAN="nowhere.laz")
    assert "400000 returns of a simulated town" in output
    town(output)


def test_figures_are_checked(monkeypatch):
    """Axes without units and colors that look alike to some are found."""
    monkeypatch.syspath_prepend(str(GALLERY.parent))
    look = pytest.importorskip("look")
    figure, ax = look.plt.subplots()
    ax.set(xlabel="time (s)", ylabel="height")
    ax.plot([0, 1], color="#D00000", label="red")
    ax.plot([1, 0], color="#7F7F00", label="olive")
    with pytest.raises(ValueError, match="has no unit"):
        look.check(figure)
    ax.set_ylabel("height (m)")
    look.check(figure)
    ax.legend()
    with pytest.raises(ValueError, match="'red' and 'olive' look alike"):
        look.check(figure)
    look.plt.close(figure)
