"""Names of columns: data are matched to models by name, and data that do not match are refused."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import gmmkeops as gk
from gmmkeops import cli

NAMES = ("red", "blue", "gain")
MEANS = torch.tensor([[0.0, 40.0, -3.0], [2.0, 55.0, 1.0]], dtype=torch.float64)
COVARIANCES = torch.tensor(
    [[[1.0, 0.4, 0.1], [0.4, 9.0, -0.6], [0.1, -0.6, 0.5]], [[0.3, -0.2, 0.0], [-0.2, 4.0, 0.7], [0.0, 0.7, 2.0]]],
    dtype=torch.float64,
)
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)


def model():
    return gk.Mixture.from_parameters(WEIGHTS, MEANS, COVARIANCES).named(NAMES)


def oracle(rows):
    """Log-densities (N,) of rows in the order of NAMES, by torch's own mixture."""
    return MixtureSameFamily(Categorical(WEIGHTS), MultivariateNormal(MEANS, COVARIANCES)).log_prob(
        torch.as_tensor(rows)
    )


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(3)
    which = rng.integers(0, 2, 600)
    noise = rng.normal(size=(600, 3))
    factors = np.linalg.cholesky(COVARIANCES.numpy())
    return MEANS.numpy()[which] + np.einsum("nij,nj->ni", factors[which], noise)


def frame(rows, order=NAMES, **more):
    pd = pytest.importorskip("pandas")
    return pd.DataFrame({name: rows[:, NAMES.index(name)] for name in order} | more)


def parquet(rows, path, order=NAMES, **more):
    pytest.importorskip("pyarrow")
    frame(rows, order, **more).to_parquet(path, row_group_size=100)
    return path


def structured(rows, order):
    out = np.empty(len(rows), [(name, "f8") for name in order])
    for name in order:
        out[name] = rows[:, NAMES.index(name)]
    return out


def ply(rows, path, order):
    plyfile = pytest.importorskip("plyfile")
    plyfile.PlyData([plyfile.PlyElement.describe(structured(rows, order), "vertex")]).write(str(path))
    return path


SHUFFLED = [NAMES[::-1], NAMES, ("blue", "red", "gain")]
STORAGES = {
    "parquet": lambda x, d: parquet(x, d / "p.parquet", ("gain", "red", "blue"), note=["text"] * len(x)),
    "shards": lambda x, d: [
        parquet(part, d / f"{i}.parquet", order)
        for i, (part, order) in enumerate(zip(np.array_split(x, 3), SHUFFLED, strict=True))
    ],
    "pandas": lambda x, d: frame(x, NAMES[::-1], note=["text"] * len(x)),
    "pyarrow": lambda x, d: pytest.importorskip("pyarrow").Table.from_pandas(frame(x, NAMES[::-1])),
    "structured": lambda x, d: gk.Source.of(structured(x, NAMES[::-1])),
    "structured file": lambda x, d: np.save(d / "s.npy", structured(x, NAMES[::-1])) or d / "s.npy",
    "function of tables": lambda x, d: (
        lambda: (frame(part, order) for part, order in zip(np.array_split(x, 2), (NAMES[::-1], NAMES), strict=True))
    ),
    "columns by hand": lambda x, d: gk.Source.of(parquet(x, d / "h.parquet"), columns=["gain", "blue", "red"]),
}


@pytest.mark.parametrize("storage", STORAGES)
def test_data_are_scored_by_the_names_of_their_columns(storage, rows, tmp_path):
    data = STORAGES[storage](rows, tmp_path)
    right = float(oracle(rows).mean())
    assert gk.analysis.score(model(), data) == pytest.approx(right, abs=1e-9)
    assert gk.analysis.bic(model(), data) == pytest.approx(-2 * 600 * right + 19 * math.log(600), abs=1e-6)
    assert gk.GaussianMixture.from_mixture(model()).score(
        gk.Source.of(data) if storage in ("pandas", "pyarrow") else data
    ) == pytest.approx(right, abs=1e-9)


@pytest.mark.parametrize("storage", STORAGES)
def test_fits_and_starts_follow_the_names(storage, rows, tmp_path):
    data = STORAGES[storage](rows, tmp_path)
    expected = gk.fit(model(), rows, gk.EM(tol=0), max_iter=3).mixture
    found = gk.fit(model(), data, gk.EM(tol=0), max_iter=3).mixture
    assert found.columns == NAMES
    assert torch.allclose(found.means, expected.means, rtol=1e-9)
    assert torch.allclose(found.factor.covariances(), expected.factor.covariances(), rtol=1e-7, atol=1e-9)
    start = gk.initialize(gk.Source.of(data).matched(NAMES[::2]), 2, generator=torch.Generator().manual_seed(0))
    assert start.columns == NAMES[::2]
    assert torch.allclose(start.mean, torch.as_tensor(rows[:, ::2].mean(0)), rtol=1e-9)


def test_tables_in_memory_are_matched_everywhere(rows):
    table = frame(rows, NAMES[::-1])
    mixture = model()
    assert torch.allclose(mixture.log_prob(table), oracle(rows))
    assert torch.equal(mixture.predict(table), mixture.predict(rows))
    assert torch.equal(mixture.responsibilities(table), mixture.responsibilities(rows))
    assert gk.analysis.anomaly_threshold(mixture, table) == gk.analysis.anomaly_threshold(mixture, rows)
    errors, expected = (gk.standard_errors(mixture, x, joint=False).means for x in (table, rows))
    assert torch.allclose(errors, expected)
    moved, _ = gk.EM().update(mixture, table)
    assert moved.columns == NAMES
    assert torch.allclose(moved.means, gk.EM().update(mixture, rows)[0].means)
    best = gk.analysis.select(table, [1], ["diag"]).best
    assert best.columns == NAMES[::-1]
    assert torch.allclose(best.means[0], torch.as_tensor(rows.mean(0)[::-1].copy()), rtol=1e-6)


@pytest.mark.parametrize("storage", ["parquet", "pandas", "structured", "function"])
def test_a_missing_column_is_named_with_those_that_exist(storage, rows, tmp_path):
    data = {
        "parquet": lambda: parquet(rows, tmp_path / "p.parquet", ("red", "gain"), extra=1.0),
        "pandas": lambda: frame(rows, ("red", "gain"), extra=1.0),
        "structured": lambda: gk.Source.of(structured(rows, ("red", "gain"))),
        "function": lambda: lambda: iter([frame(rows, ("red", "gain"), extra=1.0)]),
    }[storage]()
    for call in (lambda: gk.analysis.score(model(), data), lambda: gk.fit(model(), data, gk.EM())):
        with pytest.raises(ValueError, match=r"lacks the column blue of the model.* it has the columns red, gain"):
            call()
    # Columns that the user has chosen are all that there are.
    path = parquet(rows, tmp_path / "all.parquet")
    with pytest.raises(ValueError, match="lacks the columns blue, gain of the model"):
        gk.analysis.score(model(), gk.Source.of(path, columns=["red"]))


def test_shards_with_other_columns_are_refused_by_their_name(rows, tmp_path):
    first = parquet(rows, tmp_path / "1.parquet")
    fewer = parquet(rows, tmp_path / "2.parquet", ("blue", "red"))
    more = parquet(rows, tmp_path / "3.parquet", NAMES, extra=1.0)
    with pytest.raises(ValueError, match=r"2\.parquet has other columns than .*1\.parquet.* lacks gain"):
        gk.Source.of([first, fewer])
    with pytest.raises(ValueError, match=r"3\.parquet has other columns .* has the additional extra"):
        gk.Source.of([first, more])
    both = gk.Source.of([first, more, fewer], columns=["blue", "red"])
    values = torch.cat([chunk.points for chunk in both.chunks()])
    assert np.array_equal(values.numpy(), np.concatenate([rows[:, [1, 0]]] * 3))
    np.save(tmp_path / "4.npy", rows)
    with pytest.raises(ValueError, match=r"4\.npy do not, so they cannot be matched"):
        gk.Source.of([first, tmp_path / "4.npy"])
    with pytest.raises(ValueError, match=r"a chunk of the function .* lacks gain"):
        gk.analysis.score(model(), lambda: iter([frame(rows), frame(rows, ("blue", "red"))]))
    with pytest.raises(ValueError, match="chunk without column names"):
        gk.analysis.score(model(), lambda: iter([frame(rows), rows]))


@pytest.mark.parametrize("index", ["plain", "unnamed", "named", "two", "range with a name"])
def test_the_saved_index_of_pandas_is_no_coordinate(index, rows, tmp_path):
    pd = pytest.importorskip("pandas")
    table = frame(rows)
    if index == "unnamed":
        table = table.iloc[::-1]
    elif index == "named":
        table = table.assign(id=np.arange(600) * 1e6).set_index("id")
    elif index == "two":
        table = table.set_index([np.arange(600), pd.Index(np.arange(600) % 7, name="group")])
    elif index == "range with a name":
        table.index = pd.RangeIndex(5, 605, name="row")
    path = tmp_path / "t.parquet"
    table.to_parquet(path)
    source = gk.Source.of(path)
    assert source.columns == NAMES
    read = torch.cat([chunk.points for chunk in source.chunks()]).numpy()
    assert np.array_equal(read, table.to_numpy())
    if index == "named":
        assert gk.Source.of(path, columns=["id", "red"]).columns == ("id", "red")


def test_weights_by_name_in_files_of_other_orders(rows, tmp_path):
    g = np.random.default_rng(1).uniform(0, 2, 600)
    halves = [slice(0, 250), slice(250, 600)]
    orders = [("blue", "gain", "red"), ("red", "gain", "blue")]
    for i, (part, order) in enumerate(zip(halves, orders, strict=True)):
        table = frame(rows[part], order)
        table.insert(i, "w", g[part])
        pytest.importorskip("pyarrow")
        table.to_parquet(tmp_path / f"{i}.parquet")
    source = gk.Source.of(tmp_path, weights="w")
    assert source.columns == orders[0]
    right = float(torch.as_tensor(g) @ oracle(rows)) / g.sum()
    assert gk.analysis.score(model(), source) == pytest.approx(right, abs=1e-9)
    assert gk.analysis.score(model(), frame(rows, NAMES[::-1]), sample_weight=g) == pytest.approx(right, abs=1e-9)


def test_laser_scans_bring_the_columns_that_a_model_has(tmp_path):
    laspy = pytest.importorskip("laspy")
    rng = np.random.default_rng(0)
    scan = laspy.create()
    x = rng.normal(size=(400, 3)).round(2)
    scan.x, scan.y, scan.z = x.T
    scan.intensity = rng.integers(0, 9, 400)
    scan.write(tmp_path / "s.las")
    mixture = gk.Mixture.from_parameters([1.0], [[4.0, 0.1]], [[[7.0, 0.2], [0.2, 1.0]]]).named(["intensity", "x"])
    pairs = np.column_stack([np.asarray(scan.intensity, dtype=float), x[:, 0]])
    right = MultivariateNormal(mixture.means[0], mixture.factor.covariances()[0]).log_prob(torch.as_tensor(pairs))
    assert gk.analysis.score(mixture, tmp_path / "s.las") == pytest.approx(float(right.mean()), abs=1e-6)
    gk.save(mixture, tmp_path / "m.safetensors")
    assert gk.GaussianMixture.load(tmp_path / "m.safetensors").score(tmp_path / "s.las") == pytest.approx(
        float(right.mean()), abs=1e-6
    )


def test_a_mesh_brings_the_columns_that_a_model_has(rows, tmp_path):
    path = ply(rows, tmp_path / "m.ply", ("blue", "gain", "red"))
    assert gk.analysis.score(model(), gk.Source.of(path, columns=["blue", "gain", "red"])) == pytest.approx(
        float(oracle(rows).mean()), abs=1e-9
    )


def test_names_stay_with_a_mixture(tmp_path):
    mixture = model()
    path = tmp_path / "m.safetensors"
    gk.save(mixture, path)
    for same in (
        gk.load(path),
        mixture.to(torch.float32),
        mixture.detach(),
        mixture.expand((2,)),
        mixture.select(torch.tensor([1])),
        gk.analysis.merge(mixture, [[0, 1]]),
        gk.GMM(3, n_components=2).assign(mixture)(),
    ):
        assert same.columns == NAMES
    assert mixture.marginal([2, 0]).columns == ("gain", "red")
    assert mixture.condition([1], [40.0]).columns == ("red", "gain")
    assert mixture.named(None).columns is None
    assert model().named(["a", "b", "c"]).columns == ("a", "b", "c")
    for wrong in (["a", "b"], ["a", "b", "a"], "abc", [1, 2, 3]):
        with pytest.raises(ValueError, match="columns must be"):
            mixture.named(wrong)
    with pytest.raises(ValueError, match="both mixtures must have the same columns"):
        gk.analysis.kl_divergence(mixture, mixture.marginal([1, 0, 2]))
    seen = []
    gk.fit(
        mixture, torch.randn(50, 3).double(), gk.EM(), max_iter=2, tol=0.0, callback=lambda s: seen.append(s.mixture)
    )
    assert [step.columns for step in seen] == [NAMES, NAMES]


def test_files_without_names_match_by_place(rows, tmp_path):
    """As all files of mixtures did before names were kept; the number of columns is checked."""
    path = tmp_path / "old.safetensors"
    gk.save(model().named(None), path)
    header = path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    assert "columns" not in json.loads(json.loads(header)["__metadata__"]["gmmkeops.mixture"])
    old = gk.load(path)
    assert old.columns is None
    right = float(oracle(rows).mean())
    assert gk.analysis.score(old, parquet(rows, tmp_path / "p.parquet")) == pytest.approx(right, abs=1e-9)
    assert gk.analysis.score(model(), rows) == pytest.approx(right, abs=1e-9)
    with pytest.raises(ValueError, match="has 2 columns, expected 3"):
        gk.analysis.score(old, parquet(rows, tmp_path / "q.parquet", NAMES[:2]))
    np.save(tmp_path / "x.npy", rows[:, :2])
    with pytest.raises(ValueError, match="has 2 columns, expected 3"):
        gk.analysis.score(model(), tmp_path / "x.npy")


@pytest.mark.parametrize("wrong", [["a", "b"], ["a", "b", "b"], "abc", 3, [1, 2, 3], {"a": 1}])
def test_damaged_names_in_a_file_are_refused(wrong, tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "m.safetensors"
    gk.save(model(), path)
    header = {"format": "gmmkeops.mixture", "version": 1, "family": "full", "features": 3, "components": 2}
    save_file(load_file(path), path, {"gmmkeops.mixture": json.dumps(header | {"columns": wrong})})
    with pytest.raises(ValueError, match="is damaged: columns must be"):
        gk.load(path)


@pytest.mark.parametrize("kind", [gk.GaussianMixture, gk.BayesianGaussianMixture])
def test_estimators_keep_names(kind, rows, tmp_path):
    table, path = frame(rows, NAMES[::-1]), parquet(rows, tmp_path / "p.parquet")
    fitted = kind(n_components=2, random_state=0, max_iter=500).fit(table)
    assert list(fitted.feature_names_in_) == list(NAMES[::-1])
    # A file is matched by name; a table in another order is refused, as scikit-learn's estimators do.
    assert fitted.score(path) == pytest.approx(fitted.score(table), abs=1e-9)
    assert np.array_equal(fitted.predict(path), fitted.predict(table))
    with pytest.raises(ValueError, match="must be in the same order"):
        fitted.predict(frame(rows))
    read = kind(n_components=2, random_state=0, max_iter=500).fit(path)
    assert list(read.feature_names_in_) == list(NAMES)
    assert read.score(path) == pytest.approx(read.score(frame(rows)), abs=1e-9)
    with pytest.raises(ValueError, match="lacks the column gain"):
        read.predict(parquet(rows, tmp_path / "q.parquet", NAMES[:2]))
    np.save(tmp_path / "x.npy", rows)
    assert not hasattr(read.fit(tmp_path / "x.npy"), "feature_names_in_")
    assert read.mixture_.columns is None


def test_posteriors_keep_names(rows):
    fitted = gk.BayesianGaussianMixture(n_components=2, random_state=0, max_iter=500).fit(frame(rows))
    ours, theirs = frame(rows), frame(rows, NAMES[::-1])
    predictive = fitted.posterior_.predictive()
    assert torch.equal(predictive.log_prob(theirs), predictive.log_prob(ours.to_numpy()))
    assert fitted.posterior_.sample(3).columns == NAMES
    plug_in = fitted.mixture_
    assert torch.equal(plug_in.log_prob(theirs), plug_in.log_prob(ours.to_numpy()))


def test_names_go_to_scikit_learn_and_back(rows, tmp_path):
    pytest.importorskip("sklearn")
    ours = gk.GaussianMixture(2, random_state=0).fit(frame(rows))
    theirs = gk.to_sklearn(ours)
    assert list(theirs.feature_names_in_) == list(NAMES)
    assert theirs.score(frame(rows)) == pytest.approx(ours.score(frame(rows)), abs=1e-9)
    assert gk.from_sklearn(theirs).mixture_.columns == NAMES
    ours.save(tmp_path / "m.safetensors")
    loaded = gk.GaussianMixture.load(tmp_path / "m.safetensors")
    assert list(loaded.feature_names_in_) == list(NAMES)
    assert loaded.score(parquet(rows, tmp_path / "p.parquet", NAMES[::-1])) == pytest.approx(ours.score(frame(rows)))
    gk.export.npz(ours.mixture_, tmp_path / "m.npz")
    assert np.load(tmp_path / "m.npz")["feature_names_in_"].tolist() == list(NAMES)


def test_a_warm_start_begins_afresh_where_columns_have_other_names(rows):
    """The means of one column are no start for another."""
    warm = gk.GaussianMixture(2, random_state=0, warm_start=True, max_iter=300).fit(frame(rows))
    warm.fit(frame(rows, NAMES[::-1]))
    fresh = gk.GaussianMixture(2, random_state=0, max_iter=300).fit(frame(rows, NAMES[::-1]))
    assert list(warm.feature_names_in_) == list(NAMES[::-1])
    assert np.allclose(warm.means_, fresh.means_)


def test_conditional_models_know_points_and_contexts_by_name(rows, tmp_path):
    """The last columns of the first data are the contexts; later data are matched to them."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    regression = gk.GMM(1, context=2, n_components=2, hidden_features=(8,)).double()
    y, c = frame(rows, ("gain",)), frame(rows, ("red", "blue"))
    regression.initialize(y, context=c, generator=generator)
    assert regression.columns == ("gain", "red", "blue")
    swapped = parquet(rows, tmp_path / "p.parquet", ("blue", "gain", "red"))
    before = copy.deepcopy(regression.state_dict())
    found = []
    for data in ({"x": rows[:, [2, 0, 1]]}, {"x": swapped}, {"x": y, "context": frame(rows, ("blue", "red"))}):
        regression.load_state_dict(before)
        found.append(gk.fit(regression, method=gk.Adam(), max_iter=2, **data).objective)
    assert found == pytest.approx([found[0]] * 3, rel=1e-9)
    density = regression(frame(rows, ("blue", "red"))).log_prob(y)
    assert torch.allclose(density, regression(rows[:, :2]).log_prob(rows[:, 2:]))


def test_the_command_line_matches_by_name(rows, tmp_path, capsys):
    path, other = parquet(rows, tmp_path / "a.parquet"), parquet(rows, tmp_path / "b.parquet", NAMES[::-1], extra=7.0)
    fitted = tmp_path / "m.safetensors"

    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        return code, capsys.readouterr()

    assert run("fit", path, "-k", 2, "--out", fitted, "--quiet", "--dtype", "float64", "--max-iter", 500)[0] == 0
    assert json.loads(run("info", fitted, "--json")[1].out)["columns"] == list(NAMES)
    expected = float(gk.load(fitted).log_prob(rows).mean())
    for more in ((), ("--columns", "gain,blue,red")):
        code, said = run("score", fitted, other, "--json", *more)
        assert code == 0
        assert json.loads(said.out)["log_likelihood"] == pytest.approx(expected, abs=1e-9)
    run("predict", fitted, other, "--out", tmp_path / "l.npy")
    assert np.array_equal(np.load(tmp_path / "l.npy"), gk.load(fitted).predict(rows).numpy())
    code, said = run("score", fitted, parquet(rows, tmp_path / "c.parquet", NAMES[1:]))
    assert (code, said.out) == (1, "")
    assert "c.parquet lacks the column red of the model" in said.err
    assert "it has the columns blue, gain." in said.err
    best = tmp_path / "best.safetensors"
    assert run("select", other, "-k", "1", "--columns", "blue,red", "--out", best, "--quiet")[0] == 0
    assert gk.load(best).columns == ("blue", "red")
    code, said = run("fit", path, "-k", 2, "--columns", "rde,blue", "--out", fitted)
    assert (code, said.err.count("\n")) == (1, 1)
    assert "has no column 'rde'" in said.err
    assert said.err.rstrip().endswith("choose from its columns red, blue, gain.")
    assert (
        run("fit", path, "-k", 2, "--weights", "wieght", "--out", fitted)[1].err.rstrip().endswith("red, blue, gain.")
    )
    code, said = run("fit", path, "-k", 2, "--columns", "0,1", "--out", fitted)
    assert "has no column 0" in said.err


def test_names_of_digits_are_names(rows, tmp_path, capsys):
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    pd.DataFrame({"10": rows[:, 0], "2": rows[:, 1], "7": rows[:, 2]}).to_parquet(tmp_path / "d.parquet")
    source = gk.Source.of(tmp_path / "d.parquet", columns=["7", "10"])
    assert np.array_equal(next(iter(source.chunks())).points.numpy(), rows[:, [2, 0]])
    out = tmp_path / "m.safetensors"
    assert (
        cli.main(["fit", str(tmp_path / "d.parquet"), "-k", "1", "--columns", "7,10", "--out", str(out), "--quiet"])
        == 0
    )
    assert gk.load(out).columns == ("7", "10")
    assert np.allclose(gk.load(out).means[0].numpy(), rows[:, [2, 0]].mean(0), rtol=1e-5)


def test_columns_are_named_once(rows, tmp_path):
    path = parquet(rows, tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="columns must be distinct"):
        gk.Source.of(path, columns=["red", "red"])
    table = frame(rows)
    table.columns = ["red", "blue", "red"]
    with pytest.raises(ValueError, match="2 columns named red"):
        gk.analysis.score(model().marginal([0, 1]), table)
