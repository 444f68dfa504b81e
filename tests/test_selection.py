"""Choice of the number of components: levels of a merge tree, criteria, the final fits, and the path of a penalty."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_mixture
from sklearn.metrics import adjusted_rand_score

import gmmkeops as gk
from gmmkeops.analysis.automatic import _HeldOutJudge, _LabelJudge
from gmmkeops.cli.main import main
from gmmkeops.fitting import Judge, Level, Search, find_levels

CRITERIA = ("bic", "aic", "aic3", "icl", "icl_hard", "held_out")


def clusters(K=4, N=800, D=2, seed=0, *, step=9.0):
    """Separate clusters of unequal sizes, and their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(K, N, p=np.arange(2, K + 2) / np.arange(2, K + 2).sum())
    places = rng.permuted(np.tile(np.arange(K), (D, 1)), axis=1).T
    spread = rng.uniform(0.5, 1.0, (K, D))
    return torch.from_numpy(step * places[labels] + spread[labels] * rng.standard_normal((N, D))), labels


# The number that is found


@pytest.mark.parametrize("criterion", CRITERIA)
def test_separate_clusters_are_counted_by_every_criterion(criterion):
    x, labels = clusters()
    found = gk.analysis.select(x, criterion=criterion)
    assert found.criterion == criterion
    # AIC, and with many points AIC3, are known to choose too many.
    many = criterion in ("aic", "aic3")
    assert found.best.n_components == 4 or (many and 4 <= found.best.n_components <= 6)
    if not many:
        pairs = set(zip(found.best.predict(x).tolist(), labels.tolist(), strict=True))
        assert len(pairs) == 4


@pytest.mark.parametrize("covariance_type", ["full", "tied", "diag", "spherical", "tied_diag", "tied_spherical"])
def test_every_covariance_type(covariance_type):
    rng = np.random.default_rng(1)
    places = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x = places[rng.integers(3, size=600)] + rng.standard_normal((600, 2))
    found = gk.analysis.select(x, covariance_types=[covariance_type], criterion="bic")
    assert found.best.n_components == 3
    assert found.rows[found.place]["covariance_type"] == covariance_type


def test_covariance_types_are_compared():
    rng = np.random.default_rng(2)
    root = np.array([[1.0, 0.0], [0.95, 0.3]])
    x = np.array([[0.0, 0.0], [8.0, 0.0]])[rng.integers(2, size=800)] + rng.standard_normal((800, 2)) @ root.T
    found = gk.analysis.select(x, covariance_types=["full", "diag", "spherical"], criterion="bic")
    assert found.best.factor.family == "full"
    assert found.best.n_components == 2
    assert set(found.trees) == {"full", "diag", "spherical"}
    values = [row["bic"] for row in found.rows if row["fitted"]]
    assert found.rows[found.place]["bic"] == min(values)


@pytest.mark.parametrize("K", [1, 9])
def test_one_cluster_and_more_clusters_than_half_of_the_first_fit(K):
    x, _ = clusters(K, N=250 * K)
    found = gk.analysis.select(x, criterion="bic")
    assert found.best.n_components == K
    assert found.trees["full"].n_leaves >= 2 * K


def test_units_origins_and_repeated_calls_change_nothing():
    x, _ = clusters(3)
    found = gk.analysis.select(x)
    again = gk.analysis.select(x)
    assert [row["log_likelihood"] for row in again.rows] == [row["log_likelihood"] for row in found.rows]
    scale, shift = torch.tensor([1e3, 1e-3]).double(), torch.tensor([5e4, -2.0]).double()
    other = gk.analysis.select(x * scale + shift, method=gk.EM(reg_covar=0, tol=1e-4))
    plain = gk.analysis.select(x, method=gk.EM(reg_covar=0, tol=1e-4))
    assert other.best.n_components == plain.best.n_components == 3
    assert torch.allclose(other.best.means, plain.best.means * scale + shift, rtol=1e-5, atol=1e-5)


def test_weights_are_copies_of_points():
    x, _ = clusters(3, N=300)
    g = torch.from_numpy(np.random.default_rng(0).integers(1, 4, 300)).double()
    repeated = x.repeat_interleave(g.long(), 0)
    found = gk.analysis.select(x, criterion="bic", sample_weight=g)
    assert found.best.n_components == 3
    assert found.result.report.total_weight == float(g.sum())
    assert found.rows[found.place]["bic"] == pytest.approx(gk.analysis.bic(found.best, repeated))
    again = gk.fit(found.best, repeated, gk.EM(tol=1e-8, max_iter=1000))
    assert torch.allclose(again.mixture.means, found.best.means, atol=1e-2)


def test_sources_give_the_same_number(tmp_path):
    x, _ = clusters(3, N=2500)
    np.save(tmp_path / "x.npy", x.numpy())
    found = gk.analysis.select(tmp_path / "x.npy")
    assert found.criterion == "held_out"
    assert found.best.n_components == 3


def test_at_most_so_many_components():
    x, _ = clusters(4)
    found = gk.analysis.select(x, max_components=2, criterion="bic")
    assert found.best.n_components == 2
    assert max(row["n_components"] for row in found.rows) == 2
    few = gk.analysis.select(x[:11])  # at most one component for 2 (D + 1) points
    assert max(row["n_components"] for row in few.rows) == 1


def test_the_default_criterion_depends_on_the_data():
    rng = np.random.default_rng(0)
    # A component with a full covariance in 2, 5 or 16 columns has 6, 21 or 153 parameters.
    for shape, criterion in (
        ((119, 2), "aic3"),
        ((120, 2), "bic"),
        ((419, 5), "aic3"),
        ((420, 5), "bic"),
        ((999, 2), "bic"),
        ((1000, 2), "held_out"),
        ((999, 16), "aic3"),
        ((1000, 16), "held_out"),
    ):
        found = gk.analysis.select(rng.standard_normal(shape), max_components=2)
        assert found.criterion == criterion
        assert found.best.n_components == 1
    assert gk.analysis.select(rng.standard_normal((2000, 2)), [1, 2]).criterion == "bic"


@pytest.mark.parametrize(
    ("types", "parameters"),
    # The mean and the weight, and the covariance if it is not tied; the least of several types.
    [
        (["tied"], 6),
        (["tied_spherical"], 6),
        (["spherical"], 7),
        (["diag"], 11),
        (["full"], 21),
        (["full", "diag"], 11),
    ],
)
def test_the_default_criterion_depends_on_the_parameters_of_a_component(types, parameters):
    rng = np.random.default_rng(0)
    for rows, criterion in ((20 * parameters - 1, "aic3"), (20 * parameters, "bic")):
        found = gk.analysis.select(rng.standard_normal((rows, 5)), covariance_types=types, max_components=1)
        assert found.criterion == criterion


def test_rows_of_weight_zero_do_not_change_the_default_criterion():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, 2))
    for points, criterion in ((100, "aic3"), (500, "bic"), (1500, "held_out")):
        weights = (np.arange(2000) < points).astype(float)
        assert gk.analysis.select(x, sample_weight=weights, max_components=2).criterion == criterion


def test_criteria_of_mixtures_that_are_not_chosen_are_in_parentheses():
    """A level with a component of very few points may have a lower criterion than the chosen one."""
    datasets = pytest.importorskip("sklearn.datasets")
    found = gk.analysis.select(datasets.load_iris().data)
    lower = [row for row in found.rows if row["aic3"] < found.rows[found.place]["aic3"]]
    assert lower
    assert not any(row["sound"] or row["fitted"] for row in lower)
    assert found.reason.startswith("3 components: AIC3 is the lowest of the fits to all points")
    assert found.reason.endswith("too small or too narrow, which are not chosen.")
    text, page = str(found), found._repr_html_()
    for row in found.rows:
        cell = f"({row['aic3']:.2f})"
        assert (cell in text) == (cell in page) == (not row["sound"])


def test_tables_of_fits_contain_the_criterion():
    x, _ = clusters(2)
    found = gk.analysis.select(x, [1, 2], criterion="aic3")
    head = str(found).splitlines()[0].split()
    assert {"aic3", "bic", "aic", "icl"} < set(head)
    assert "fitted" not in head


def test_few_points_per_parameter_are_enough_for_three_clusters():
    """BIC joins two of three clusters, whose means in 10 columns are four standard deviations apart; AIC3 does not."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 100)
    x = 3.0 * np.eye(10)[labels] + rng.standard_normal((300, 10)) * np.array([1.0, 0.5, 0.7])[labels, None]
    found = gk.analysis.select(x)
    assert found.criterion == "aic3"
    assert found.reason.startswith("3 components: AIC3 is the lowest")
    assert found.best.n_components == 3
    assert adjusted_rand_score(labels, found.best.predict(x)) > 0.9
    assert gk.analysis.select(x, criterion="bic").best.n_components == 2


@pytest.mark.parametrize("shape", [(150, 5), (150, 13), (300, 8)])
def test_few_points_of_one_gaussian_are_one_component(shape):
    rng = np.random.default_rng(0)
    for _ in range(5):
        found = gk.analysis.select(rng.standard_normal(shape) @ rng.standard_normal((shape[1], shape[1])))
        assert found.criterion == "aic3"
        assert found.best.n_components == 1


# The table


def test_rows_are_levels_and_fits():
    x, _ = clusters()
    found = gk.analysis.select(x, criterion="bic")
    assert [row["n_components"] for row in found.rows] == list(range(1, 17))
    fitted = [row for row in found.rows if row["fitted"]]
    assert [row["n_components"] for row in fitted] == [3, 4, 5]
    for row, result in zip(found.rows, found.results, strict=True):
        assert row["fitted"] is (result is not None)
        assert math.isfinite(row["bic"])
        if result is None:
            assert row["aic"] is None
            continue
        assert row["n_components"] == result.mixture.n_components
        for name in ("bic", "aic", "aic3", "icl"):
            assert row[name] == pytest.approx(getattr(gk.analysis, name)(result.mixture, x))
        assert row["icl_hard"] == pytest.approx(gk.analysis.icl(result.mixture, x, hard=True))
    assert found.best is found.results[found.place].mixture
    assert found.reason.startswith("4 components: BIC is the lowest")
    text = str(found)
    assert text.count("<- best") == 1
    assert text.endswith(found.reason)
    assert found.reason in found._repr_html_()


def test_fits_are_as_good_as_those_of_their_numbers():
    """The fits of a selection are not worse than fits from the usual initial mixture."""
    x = gk.Mixture.from_parameters(
        [0.4, 0.3, 0.3], [[0.0, 0.0], [2.5, 0.0], [0.0, 2.5]], [0.6] * 3, "spherical"
    ).sample(900, generator=torch.Generator().manual_seed(0))
    found = gk.analysis.select(x, criterion="bic", method=gk.EM(tol=1e-4, max_iter=1000))
    for row, result in zip(found.rows, found.results, strict=True):
        if result is not None:
            K = row["n_components"]
            usual = gk.fit(gk.initialize(x, K), x, gk.EM(tol=1e-4, max_iter=1000))
            assert result.log_likelihood > usual.log_likelihood - 0.002


def test_the_tree_joins_components_of_one_cluster():
    x, _ = clusters()
    found = gk.analysis.select(x, criterion="bic")
    tree = found.trees["full"]
    assert tree.n_components == 1
    assert len(tree.costs) == tree.n_leaves - 1
    assert bool((tree.costs >= 0).all())
    assert len(set(tree.labels(4).tolist())) == 4
    # Merges of different clusters cost more than any merge within one.
    assert float(tree.costs[-3:].min()) > float(tree.costs[:-3].max())
    nodes = [*range(tree.n_leaves), *range(tree.n_leaves, tree.n_leaves + len(tree.merges))]
    used = tree.merges.reshape(-1).tolist()
    assert sorted(used) == nodes[:-1]


# Criteria


def test_hard_labels_replace_the_entropy():
    mixture = random_mixture("full", K=3)
    x = mixture.sample(400, generator=torch.Generator().manual_seed(0))
    g = torch.rand(400, generator=torch.Generator().manual_seed(1)).double()
    r = mixture.responsibilities(x)
    for weights in (None, g):
        loss = -r.amax(1).log()
        total = float(loss.sum() if weights is None else loss @ weights)
        hard = gk.analysis.icl(mixture, x, sample_weight=weights, hard=True)
        assert hard == pytest.approx(gk.analysis.bic(mixture, x, sample_weight=weights) + 2 * total)
        assert hard < gk.analysis.icl(mixture, x, sample_weight=weights)


def test_the_criterion_of_all_points_is_that_of_the_function():
    mixture = random_mixture("diag", K=3)
    x = mixture.sample(400, generator=torch.Generator().manual_seed(0))
    level = Judge(x, None, 400.0, 1.0).level((mixture,))
    assert level.value == pytest.approx(gk.analysis.bic(mixture, x))
    assert level.log_likelihood == pytest.approx(gk.analysis.score(mixture, x))


@pytest.mark.parametrize("criterion", ["aic", "aic3", "icl", "icl_hard"])
def test_levels_have_the_criteria_of_the_functions(criterion):
    mixture = random_mixture("full", K=3)
    x = mixture.sample(300, generator=torch.Generator().manual_seed(0))
    level = _LabelJudge(criterion, x, None, 300.0, 1.0).level((mixture,))
    options = {"hard": True} if criterion == "icl_hard" else {}
    assert level.value == pytest.approx(getattr(gk.analysis, criterion.removesuffix("_hard"))(mixture, x, **options))


def test_levels_of_few_points_are_judged_as_they_will_be_fitted():
    """The levels have a prior that is much wider than separate clusters; the fit that follows does not have it."""
    x, _ = clusters(4, N=120)

    def stage(K):
        search = Search(
            x,
            None,
            K,
            gk.FullFactor,
            False,
            method=None,
            penalty=None,
            prior=None,
            generator=torch.Generator().manual_seed(0),
            backend="auto",
        )
        return (search,), Judge(x, None, 120.0, 1.0)

    levels = find_levels(stage, 10)
    assert levels.best == 4
    level = levels.levels[4]
    fitted = gk.fit(level.mixture, x, gk.EM(tol=1e-8, reg_covar=0), max_iter=1000)
    assert level.log_likelihood == pytest.approx(fitted.log_likelihood, abs=1e-3)


def test_levels_that_are_not_sound_do_not_end_the_merges(monkeypatch):
    """The criterion is compared again from the next sound level on."""
    x, _ = clusters(2, N=400)
    monkeypatch.setattr(Search, "degenerate", lambda self, mixture, *rest: 5 <= mixture.n_components <= 20)

    def stage(K):
        generator = torch.Generator().manual_seed(0)
        settings = {"method": None, "penalty": None, "prior": None, "generator": generator, "backend": "auto"}
        return (Search(x, None, K, gk.DiagonalFactor, False, **settings),), Judge(x, None, 400.0, 1.0)

    levels = find_levels(stage, 60, 32)
    assert levels.best == 2
    assert levels.most == 32


def test_a_sample_estimates_the_criterion_of_all_points():
    """The mean over samples, with mixtures fitted to them, is that of fits to all points."""
    generator = torch.Generator().manual_seed(0)
    truth = gk.Mixture.from_parameters([1.0], [[0.0, 0.0, 0.0]], [torch.eye(3).double().tolist()])
    N, n, errors, plain = 4000, 100, [], []
    for _ in range(150):
        x = truth.sample(N, generator=generator)
        exact = gk.analysis.bic(gk.initialize(x, 1), x)
        fitted = gk.initialize(x[:n], 1)
        judge = Judge(x[:n], None, float(N), n / N)
        errors.append(judge.level((fitted,)).value - exact)
        plain.append(errors[-1] - fitted.parameter_count * (N / n - 1))
    errors, plain = np.array(errors), np.array(plain)
    error = errors.std() / math.sqrt(len(errors))
    assert abs(errors.mean()) < 4 * error
    assert abs(plain.mean()) > 6 * error  # without the correction


def fake_levels(densities):
    return {n: Level((), float(d.mean()), -float(d.mean()), 0.0, d) for n, d in densities.items()}


def test_the_fewest_components_within_one_standard_error():
    judge = _HeldOutJudge(torch.zeros(4, 1), None, [torch.arange(2), torch.arange(2, 4)])
    base = torch.tensor([0.0, 1.0, 2.0, 3.0]).double()
    noise = torch.tensor([1.0, -1.0, 1.0, -1.0]).double()
    # The standard error of a difference of 2 * noise about its mean is 1, whatever the spread of the densities is.
    assert judge.best(fake_levels({3: base, 2: base - 0.9 + 2 * noise, 1: base - 5})) == 2
    assert judge.best(fake_levels({3: base, 2: base - 1.1 + 2 * noise, 1: base - 5})) == 3
    assert judge.best(fake_levels({3: base - 4, 2: base, 1: base - 5})) == 2


def test_every_point_is_held_out_once():
    x = torch.arange(10.0).double()[:, None]
    folds = list(torch.randperm(10, generator=torch.Generator().manual_seed(0)).tensor_split(3))
    judge = _HeldOutJudge(x, torch.arange(10.0).double(), folds)
    mixtures = tuple(gk.Mixture.from_parameters([1.0], [[float(i)]], [1.0], "spherical") for i in range(3))
    level = judge.level(mixtures)
    expected = torch.cat([m.log_prob(x[fold]) for m, fold in zip(mixtures, folds, strict=True)])
    assert torch.allclose(level.densities, expected)
    weights = torch.cat([fold.double() for fold in folds])
    assert level.value == pytest.approx(-float(expected @ weights / weights.sum()))


# The estimator


def test_the_estimator_chooses(tmp_path):
    x, labels = clusters()
    model = gk.GaussianMixture("auto", random_state=0).fit(x.numpy())
    assert model.n_components == "auto"
    assert model.n_components_ == model.weights_.shape[0] == 4
    assert model.selection_.best.n_components == 4
    assert model.converged_
    assert len(set(zip(model.predict(x.numpy()).tolist(), labels.tolist(), strict=True))) == 4
    model.save(tmp_path / "m.safetensors")
    loaded = gk.GaussianMixture.load(tmp_path / "m.safetensors")
    assert loaded.n_components == "auto"
    assert loaded.n_components_ == 4
    assert np.array_equal(loaded.means_, model.means_)
    again = model.set_params(n_components=2).fit(x.numpy())
    assert again.n_components_ == 2
    assert not hasattr(again, "selection_")


def test_a_warm_start_keeps_the_chosen_number():
    x, _ = clusters(3)
    model = gk.GaussianMixture("auto", warm_start=True).fit(x)
    before = model.means_.clone()
    model.fit(x)
    assert model.n_components_ == 3
    assert torch.allclose(model.means_, before, atol=1e-2)
    assert not hasattr(model, "selection_")


@pytest.mark.parametrize(
    "params",
    [
        {"n_init": 2},
        {"init_params": "kmeans"},
        {"means_init": [[0.0, 0.0]]},
        {"weights_init": [1.0]},
        {"checkpoint": "c"},
        {"validation": 0.2},
    ],
)
def test_what_the_automatic_number_does_not_support(params):
    (name,) = params
    with pytest.raises(ValueError, match=f'^{name} is not supported by n_components="auto"'):
        gk.GaussianMixture("auto", **params).fit(clusters()[0])


def test_wrong_numbers_get_one_sentence():
    x, _ = clusters()
    with pytest.raises(ValueError, match=r"^n_components must be an int.*got 'many'"):
        gk.GaussianMixture("many").fit(x)
    with pytest.raises(ValueError, match="BayesianGaussianMixture"):
        gk.BayesianGaussianMixture(n_components="auto").fit(x)
    with pytest.raises(ValueError, match="partial_fit requires a number of components"):
        gk.GaussianMixture("auto").partial_fit(x)
    with pytest.raises(ValueError, match="n_components must be one of 'auto'"):
        gk.analysis.select(x, "many")
    with pytest.raises(TypeError, match='must be "auto" or a list'):
        gk.analysis.select(x, 3)
    with pytest.raises(ValueError, match='criterion="held_out" requires'):
        gk.analysis.select(x, [1, 2], criterion="held_out")
    with pytest.raises(ValueError, match='requires n_components="auto"'):
        gk.analysis.select(x, [1, 2], prior="auto")
    with pytest.raises(ValueError, match="max_components must be"):
        gk.analysis.select(x, max_components=0)


def test_penalties_and_priors_count():
    x, _ = clusters(3, N=60)
    found = gk.analysis.select(x, criterion="bic", prior="auto")
    plain = gk.analysis.select(x, criterion="bic")
    assert found.best.n_components == plain.best.n_components == 3
    assert not torch.allclose(found.best.factor.covariances(), plain.best.factor.covariances(), rtol=1e-3)
    held = gk.analysis.select(x, criterion="bic", penalty=gk.penalties.InverseWishart(torch.eye(2).double() * 20, 20.0))
    assert held.result.objective != pytest.approx(-held.result.log_likelihood)


# Command line and plots


def test_the_command_line_chooses(tmp_path, capsys):
    x, _ = clusters(3)
    np.save(tmp_path / "x.npy", x.numpy())
    out = tmp_path / "m.safetensors"
    assert main(["select", str(tmp_path / "x.npy"), "--out", str(out), "--quiet", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["reason"].startswith("3 components")
    assert gk.load(out).n_components == 3
    assert main(["fit", str(tmp_path / "x.npy"), "-k", "auto", "--out", str(out), "--quiet"]) == 0
    assert gk.load(out).n_components == 3


def test_plots_show_levels_fits_and_the_best():
    plt = pytest.importorskip("matplotlib.pyplot")
    x, _ = clusters(3)
    found = gk.analysis.select(x, criterion="bic")
    _, ax = plt.subplots()
    line, circle = gk.plotting.selection(found, ax=ax)
    assert list(line.get_xdata()) == list(range(1, 17))
    assert circle.get_offsets().tolist() == [[3.0, found.rows[found.place]["bic"]]]
    (line, _) = gk.plotting.selection(found, ax=ax, criterion="icl")
    assert len(line.get_xdata()) == 3
    held = gk.analysis.select(x, criterion="held_out")
    line, circle = gk.plotting.selection(held, ax=ax)
    assert "higher is better" in ax.get_ylabel()
    assert float(circle.get_offsets()[0, 1]) == held.rows[held.place]["held_out"] < 0
    plt.close("all")


# The path of a penalty


def test_a_path_prunes_more_and_more():
    x, _ = clusters(3, N=600)
    path = gk.analysis.penalty_path(x, 8)
    strengths = [row["strength"] for row in path.rows]
    counts = [row["n_components"] for row in path.rows]
    assert strengths == sorted(strengths)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 5
    assert path.best.n_components == 3
    row = path.rows[path.place]
    assert row["bic"] == min(row["bic"] for row in path.rows) == pytest.approx(gk.analysis.bic(path.best, x))
    assert path.reason.startswith(f"strength {row['strength']:.4g}: BIC of the 3")
    assert "strength" in str(path).splitlines()[0]


def test_a_path_over_given_strengths_and_another_penalty():
    x, _ = clusters(3, N=600)
    path = gk.analysis.penalty_path(x, 6, [0.3, 0.0], penalty=gk.penalties.WeightEntropy, covariance_type="diag")
    assert [row["strength"] for row in path.rows] == [0.0, 0.3]
    assert path.rows[0]["n_components"] == 6
    with pytest.raises(ValueError, match="strengths must be given"):
        gk.analysis.penalty_path(x, 6, penalty=gk.penalties.WeightEntropy)
    with pytest.raises(ValueError, match="strengths must not be empty"):
        gk.analysis.penalty_path(x, 6, [])
    plt = pytest.importorskip("matplotlib.pyplot")
    _, ax = plt.subplots()
    gk.plotting.selection(path, ax=ax)
    assert ax.get_xlabel() == "strength of the penalty (nats per point)"
    plt.close("all")


# Data on which degenerate components are the most likely ones, and small or unequal weights


@pytest.mark.parametrize("criterion", ["bic", "held_out"])
def test_rounded_points_do_not_make_spikes_components(criterion):
    x, _ = clusters(2, N=2400, step=8.0)
    assert gk.analysis.select(x.round(), criterion=criterion).best.n_components <= 3


@pytest.mark.parametrize("criterion", ["bic", "held_out"])
def test_equal_points_are_one_component(criterion):
    x = torch.ones(300, 2).double()
    assert gk.analysis.select(x, criterion=criterion).best.n_components == 1


def test_more_components_than_the_levels_have_are_found(monkeypatch):
    """The criterion of the fits decides, if it decreases beyond the levels."""
    from gmmkeops.analysis import automatic

    x, _ = clusters(6, N=900)
    found_levels = automatic.find_levels

    def few(stage, most, first=3, **options):
        return _first_best(found_levels(stage, most, first, **options))

    monkeypatch.setattr(automatic, "find_levels", few)
    assert gk.analysis.select(x, criterion="bic").best.n_components == 6


def _first_best(levels):
    """Levels of which the one with the most components was chosen, without more of them."""
    return replace(levels, best=min(levels.most, 3)) if levels.most <= 12 else levels


def test_a_small_cluster_of_many_points_is_not_excluded():
    """Its number of points is that of all points, not of the sample."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((150_000, 1))
    x[:75_000] += 12
    x[-60:] = 80 + 0.1 * rng.standard_normal((60, 1))
    assert gk.analysis.select(x, criterion="bic", max_components=4).best.n_components == 3


def test_the_standard_error_is_that_of_the_weighted_points():
    judge = _HeldOutJudge(torch.zeros(6, 1), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0]).double(), [torch.arange(6)])
    base = torch.zeros(6).double()
    noise = torch.tensor([2.0, -2.0, 2.0, -2.0, 0.0, 0.0]).double()
    _, error = judge.loss(*fake_levels({1: base, 2: noise}).values())
    assert error == pytest.approx(1.0)


def test_weights_must_count_as_points():
    x, _ = clusters()
    with pytest.raises(ValueError, match=r"^sample_weight has a total of 1 for 800 points"):
        gk.GaussianMixture("auto").fit(x, sample_weight=torch.full((800,), 1 / 800))
    path = gk.analysis.penalty_path(x, 5, [0.1, 1.0], sample_weight=torch.full((800,), 1 / 800), max_iter=50)
    assert path.best.n_components >= 4


def test_few_points():
    assert gk.analysis.select(torch.randn(1, 20)).best.n_components == 1
    with pytest.raises(ValueError, match="requires at least 6 points"):
        gk.analysis.select(torch.randn(4, 2), criterion="held_out")


@pytest.mark.parametrize("name", ["checkpoint", "validation", "start"])
def test_options_of_a_single_fit_are_refused(name):
    x, _ = clusters()
    for call in (gk.analysis.select, lambda x, **options: gk.analysis.penalty_path(x, 3, **options)):
        with pytest.raises(TypeError, match=f"has no argument {name}"):
            call(x, **{name: 0.2})


@pytest.mark.parametrize(
    ("options", "numbers"), [({"runs": 2}, None), ({"strategy": "kmeans"}, None), ({"max_components": 3}, [1, 2])]
)
def test_options_of_the_other_way_are_refused(options, numbers):
    x, _ = clusters()
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name} requires"):
        gk.analysis.select(x, *([] if numbers is None else [numbers]), **options)


def test_units_of_the_default_method():
    """The constant that is added to the variances does not depend on the units."""
    x, _ = clusters(2)
    assert gk.analysis.select(x * 1e-6, criterion="bic").best.n_components == 2
    assert gk.analysis.penalty_path(x * 1e-6, 4).best.n_components == 2


def test_ctrl_c_ends_a_selection(monkeypatch):
    """The fits so far are the result."""
    from gmmkeops.analysis import automatic, path

    x, _ = clusters(2)
    calls = []

    def interrupted(*args, **options):
        calls.append(1)
        result = gk.fit(*args, **options)
        return replace(result, report=replace(result.report, interrupted=len(calls) > 2))

    monkeypatch.setattr(automatic, "fit", interrupted)
    assert gk.analysis.select(x, criterion="bic").best.n_components in (1, 2)
    assert len(calls) <= 4
    calls.clear()
    types = {row["covariance_type"] for row in gk.analysis.select(x, "auto", ["diag", "full"], criterion="bic").rows}
    assert types == {"diag"}
    calls.clear()
    monkeypatch.setattr(path, "fit", interrupted)
    assert len(gk.analysis.penalty_path(x, 4).rows) == 1


def test_a_progress_bar_shows_the_levels(capsys):
    x, _ = clusters(2, N=300)
    gk.analysis.select(x, criterion="bic")
    assert capsys.readouterr().err == ""
    gk.analysis.select(x, criterion="bic", verbose=True)
    said = capsys.readouterr().err
    assert "levels" in said
    assert "components=" in said
