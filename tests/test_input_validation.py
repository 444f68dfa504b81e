"""What users pass by mistake: one sentence in the words of their own argument, and never a number that nobody meant."""

from __future__ import annotations

import datetime
import decimal
import re
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import gmmkeops as gk

ROWS = 40
GOOD = np.stack([np.arange(ROWS) % 7 + 0.25 * np.arange(ROWS), (np.arange(ROWS) * 5) % 11], 1).astype(float)
TENSOR = torch.from_numpy(GOOD)
MODEL = gk.Mixture.from_parameters([0.3, 0.7], [[2.0, 3.0], [9.0, 6.0]], [[4.0, 1.0], [9.0, 2.0]], "diag")
FEW = {"max_iter": 1, "tol": 0, "verbose": False}

# Words of the libraries underneath, which no user has typed.
FOREIGN = re.compile(
    r"aten|inhomogeneous|setting an array element|could not convert|unsupported operand|not implemented for|size of tensor|"
    r"expected scalar|float\(\) argument|int\(\) argument|unhashable|has no attribute|not subscriptable|not iterable|"
    r"np\.float|numpy\.|ambiguous|invalid combination|Torch not compiled|cannot be interpreted|dtype\('"
)


def sentence(call, *words, kind=(TypeError, ValueError)):
    """The message of a refusal, which is one sentence of our own and has these words."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert not FOREIGN.search(text), text
    assert "\n" not in text
    for word in words:
        assert word in text, text
    return text


class Table:
    """Like an astropy table: named columns, an array of records for numpy, and no other way to numbers."""

    columns = {"a": 1.0, "b": 2.0}  # noqa: RUF012

    def __array__(self, dtype=None, copy=None):
        return np.array([(1.0, 2.0)] * ROWS, dtype=[("a", "f8"), ("b", "f8")])

    def __len__(self):
        return ROWS


def masked():
    return np.ma.masked_array(np.where(GOOD[3, 1] == GOOD, -999.0, GOOD), mask=GOOD[3, 1] == GOOD)


def frame(values):
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame({"a": GOOD[:, 0], "b": values(pandas)})


def objects(second):
    return np.array([[1.0, 2.0]] * (ROWS - 1) + [[1.0, second]], dtype=object)


BAD = {
    "masked": (masked, "masked entries"),
    "masked objects": (lambda: masked().astype(object), "masked entries"),
    "list of masked rows": (lambda: list(masked()), "masked entries"),
    "digits": (lambda: GOOD.astype(str), "text"),
    "digits as objects": (lambda: GOOD.astype(str).astype(object), "text"),
    "one digit": (lambda: objects("2"), f"text ('2' at row {ROWS - 1}, column 1)"),
    "bytes": (lambda: GOOD.astype("S4"), "text"),
    "missing": (lambda: objects(None), f"missing entries, got None at row {ROWS - 1}, column 1"),
    "complex objects": (lambda: objects(2j), "complex"),
    "dates as objects": (lambda: objects(datetime.date(2020, 1, 2)), "date"),
    "dates": (lambda: np.full((ROWS, 2), np.datetime64("2020-01-02")), "dates"),
    "durations": (lambda: np.full((ROWS, 2), np.timedelta64(3, "s")), "durations"),
    "complex": (lambda: GOOD.astype(complex), "omplex"),
    "complex tensor": (lambda: TENSOR.to(torch.complex64), "omplex"),
    "sparse": (TENSOR.to_sparse, "parse"),
    "sparse rows": (TENSOR.to_sparse_csr, "parse"),
    "meta": (lambda: TENSOR.to("meta"), "meta device"),
    "nested": (lambda: torch.nested.nested_tensor([TENSOR[:3], TENSOR[3:9]]), "nested"),
    "quantized": (lambda: torch.quantize_per_tensor(TENSOR.float(), 0.1, 0, torch.qint8), "quantized"),
    "table": (Table, "structured array with the columns 'a', 'b'"),
    "ragged": (lambda: [[1.0, 2.0], [3.0]] * 20, "rows of different lengths"),
    "points and weights": (lambda: [GOOD, np.ones(ROWS)], "weights as sample_weight"),
    "points and a column": (lambda: (GOOD, np.ones((ROWS, 1))), "weights as sample_weight"),
    "dict": (lambda: {"a": GOOD[:, 0]}, "dict"),
    "set": (lambda: {1.0, 2.0}, "set"),
    "None": (lambda: None, "NoneType"),
    "a number": (lambda: 3.0, ""),
    "a data set": (lambda: TensorDataset(TENSOR), "DataLoader"),
    "category": (lambda: frame(lambda pd: pd.Categorical([1] * ROWS)), "column 'b' of"),
    "words": (lambda: frame(lambda pd: ["word"] * ROWS), "'b'"),
    "days": (lambda: frame(lambda pd: pd.date_range("2020", periods=ROWS)), "column 'b' of"),
    "NA": (lambda: frame(lambda pd: pd.array([1] * (ROWS - 1) + [None], dtype="Int64")), f"row {ROWS - 1}, column 1"),
    "too large": (lambda: objects(10**400), "float64"),
}
TAKERS = {
    "fit": ("x", lambda x: gk.fit(MODEL, x, gk.EM(), **FEW)),
    "initialize": ("x", lambda x: gk.initialize(x, 2)),
    "Source.of": ("x", lambda x: gk.Source.of(x).survey()),
    "log_prob": ("x", MODEL.log_prob),
    "moments": ("x", lambda x: gk.reductions.moments(x, MODEL.offsets, MODEL.means, MODEL.factor)),
    "estimator": ("X", lambda x: gk.GaussianMixture(2, max_iter=1).fit(x)),
    "predict": ("X", lambda x: gk.GaussianMixture.from_mixture(MODEL).predict(x)),
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("bad", BAD)
def test_what_is_no_array_of_numbers_is_refused_everywhere(bad, taker):
    make, word = BAD[bad]
    name, call = TAKERS[taker]
    with warnings.catch_warnings():
        # Torch speaks of tensors whose kind is young.
        warnings.simplefilter("ignore", UserWarning)
        x = make()
    text = sentence(lambda: call(x), word.replace("of x", f"of {name}"))
    assert re.search(rf"\b{name}\b", text), text


GENEROUS = {
    "nothing masked": lambda: np.ma.masked_array(GOOD, mask=np.zeros_like(GOOD, bool)),
    "decimals": lambda: np.array([[decimal.Decimal(str(v)) for v in row] for row in GOOD], dtype=object),
    "objects": lambda: GOOD.astype(object),
    "long double": lambda: GOOD.astype(np.longdouble),
    "big-endian": lambda: GOOD.astype(">f8"),
    "lists": GOOD.tolist,
    "half": lambda: TENSOR.half().double().half(),
    "full Int64": lambda: frame(lambda pd: pd.array(list(GOOD[:, 1].astype(int)), dtype="Int64")),
    "table of arrow": lambda: pytest.importorskip("pyarrow").table({"a": GOOD[:, 0], "b": GOOD[:, 1]}),
}


@pytest.mark.parametrize("kind", GENEROUS)
def test_numbers_in_other_containers_are_the_same_numbers(kind):
    found = MODEL.log_prob(GENEROUS[kind]())
    assert torch.allclose(found.double(), MODEL.log_prob(TENSOR), rtol=1e-6, atol=1e-5)


def test_columns_of_records_are_read_from_a_source_only():
    records = np.array([tuple(row) for row in GOOD], dtype=[("a", "f8"), ("b", "f8")])
    rows = torch.cat([chunk.points for chunk in gk.Source.of(records).chunks()])
    assert torch.equal(rows, TENSOR)
    mixed = np.array([(1.0, "word")] * ROWS, dtype=[("a", "f8"), ("b", "U4")])
    sentence(lambda: gk.Source.of(mixed), "numeric")
    hidden = np.ma.masked_array(records, mask=[(i == 3, False) for i in range(ROWS)])
    sentence(lambda: gk.Source.of(hidden), "1 of them")


# Loaders and functions: points, or pairs of points and weights.
WEIGHTS = torch.linspace(0.2, 3.0, ROWS, dtype=torch.float64)


def weighted_mean(x):
    return gk.fit(gk.initialize(TENSOR, 1), x, gk.EM(reg_covar=0), max_iter=2, tol=0).mixture.means[0]


PAIRS = {
    "loader": lambda: DataLoader(TensorDataset(TENSOR, WEIGHTS), batch_size=16),
    "loader of a column": lambda: DataLoader(TensorDataset(TENSOR, WEIGHTS[:, None]), batch_size=16, shuffle=True),
    "tuples": lambda: lambda: iter([(GOOD[:9], WEIGHTS[:9].numpy()), (GOOD[9:], WEIGHTS[9:].numpy())]),
    "lists": lambda: lambda: iter([[TENSOR[:9], WEIGHTS[:9]], [TENSOR[9:], WEIGHTS[9:]]]),
    "columns": lambda: lambda: iter([(GOOD, WEIGHTS[:, None].numpy())]),
    "lists of rows": lambda: lambda: iter([(GOOD[:9].tolist(), WEIGHTS[:9].tolist()), (GOOD[9:], WEIGHTS[9:])]),
}


@pytest.mark.parametrize("form", PAIRS)
def test_pairs_are_points_and_weights_whatever_they_are_packed_in(form):
    expected = (WEIGHTS[:, None] * TENSOR).sum(0) / WEIGHTS.sum()
    assert torch.allclose(weighted_mean(PAIRS[form]()), expected, atol=1e-10)


@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: (x,), lambda x: x, lambda x: x.tolist()])
def test_points_alone_weigh_one_each(wrap):
    found = weighted_mean(lambda: iter([wrap(TENSOR[:9]), wrap(TENSOR[9:])]))
    assert torch.allclose(found, TENSOR.mean(0), atol=1e-10)


STREAMS = {
    "labels": (lambda: iter([(GOOD, np.arange(ROWS) % 3)]), "may be labels"),
    "labels in a list": (lambda: iter([[TENSOR, torch.arange(ROWS) % 3]]), "may be labels"),
    "truth values": (lambda: iter([(GOOD, np.ones(ROWS, bool))]), "may be labels"),
    "words": (lambda: iter([(GOOD, ["word"] * ROWS)]), "may be labels"),
    "two columns": (lambda: iter([(GOOD, np.ones((ROWS, 2)))]), "one per point"),
    "few weights": (lambda: iter([(GOOD, np.ones(3))]), "one per point"),
    "negative": (lambda: iter([(GOOD, -np.ones(ROWS))]), "must not be negative"),
    "zero": (lambda: iter([(GOOD, np.zeros(ROWS))]), "must not all be zero"),
    "masked weights": (lambda: iter([(GOOD, np.ma.masked_array(np.ones(ROWS), mask=GOOD[:, 0] > 5))]), "masked"),
    "three items": (lambda: iter([(GOOD, np.ones(ROWS), np.ones(ROWS))]), "3 items"),
    "no items": (lambda: iter([()]), "0 items"),
    "two rows or a pair": (lambda: iter([[GOOD[:, 0], np.ones(ROWS)]]), "may be two rows"),
    "three dimensions": (lambda: iter([np.zeros((50, 2, 1))]), "(n, D), got (50, 2, 1)"),
    "one dimension": (lambda: iter([GOOD[:, 0]]), f"(n, D), got ({ROWS},)"),
    "masked points": (lambda: iter([masked()]), "masked entries"),
    "dicts": (lambda: iter([{"x": GOOD}]), "dict"),
    "no rows": (lambda: iter([GOOD[:0]]), "no rows"),
    "nothing": (lambda: iter([]), "no chunks"),
    "an array": (lambda: GOOD, "pass the array itself"),
    "None": (lambda: None, "NoneType"),
    "an argument": (lambda size: iter([GOOD]), "needs size"),
}


@pytest.mark.parametrize("case", STREAMS)
def test_functions_that_give_something_else_are_told_so(case):
    make, word = STREAMS[case]
    sentence(lambda: gk.fit(MODEL, make, gk.EM(), **FEW), word)
    sentence(lambda: gk.GaussianMixture.from_mixture(MODEL).score(make), word)


def test_loaders_of_labels_are_told_so():
    for second in (torch.arange(ROWS) % 3, torch.ones(ROWS, dtype=torch.bool)):
        loader = DataLoader(TensorDataset(TENSOR, second), batch_size=16)
        sentence(lambda loader=loader: gk.initialize(loader, 2), "the DataLoader", "may be labels")
    single = DataLoader(TensorDataset(TENSOR[:, 0], WEIGHTS), batch_size=16)
    sentence(lambda: gk.initialize(single, 2), "(n, D), got (16,)")


def test_classes_that_no_point_has_are_named(tmp_path):
    laspy = pytest.importorskip("laspy")
    header = laspy.LasHeader(point_format=3, version="1.2")
    header.scales = np.full(3, 0.001)
    cloud = laspy.LasData(header)
    cloud.x, cloud.y, cloud.z = np.random.default_rng(0).normal(size=(3, 90))
    cloud.classification = np.arange(90) % 3
    cloud.write(str(tmp_path / "scan.las"))
    start = gk.initialize(tmp_path / "scan.las", 2)
    some = gk.Source.of(tmp_path / "scan.las", classes=np.array([0, 2]))
    assert some.survey().rows == 60
    for classes in ([99], []):
        none = gk.Source.of(tmp_path / "scan.las", classes=classes)
        calls = {
            "fit": lambda none=none: gk.fit(start, none, gk.EM()),
            "start": lambda none=none: gk.initialize(none, 2),
            "score": lambda none=none: gk.analysis.bic(start, none),
            "predict": lambda none=none: gk.GaussianMixture.from_mixture(start).predict(none),
        }
        for call in calls.values():
            sentence(call, f"classes={classes}")
    for classes in (2, "ground", [1.5], ["a"], [None]):
        sentence(lambda classes=classes: gk.Source.of(tmp_path / "scan.las", classes=classes), "classes")


# Settings: what was typed, and under which name.
NOT_INTEGERS = (1.5, "3", True, float("nan"), [2], None, -1, np.float64(2.0))
NOT_NUMBERS = ("a", "1", True, float("nan"), float("inf"), -1.0, [1.0], 1j)


def settings():
    yield from (("n_components", v, lambda v: gk.GaussianMixture(v).fit(GOOD)) for v in (*NOT_INTEGERS, 0))
    yield from (("max_iter", v, lambda v: gk.GaussianMixture(max_iter=v).fit(GOOD)) for v in NOT_INTEGERS)
    yield from (("tol", v, lambda v: gk.GaussianMixture(tol=v).fit(GOOD)) for v in NOT_NUMBERS)
    yield from (("reg_covar", v, lambda v: gk.GaussianMixture(reg_covar=v).fit(GOOD)) for v in NOT_NUMBERS)
    yield from (("truncate", v, lambda v: gk.GaussianMixture(truncate=v).fit(GOOD)) for v in (*NOT_NUMBERS, 1.0))
    yield from (("n_components", v, lambda v: gk.initialize(GOOD, v)) for v in (*NOT_INTEGERS, 0))
    yield from (
        ("max_iter", v, lambda v: gk.fit(MODEL, TENSOR, gk.EM(), max_iter=v)) for v in NOT_INTEGERS if v is not None
    )
    yield from (("tol", v, lambda v: gk.fit(MODEL, TENSOR, gk.EM(), tol=v)) for v in NOT_NUMBERS)
    yield from (("batch_size", v, lambda v: gk.EM(batch_size=v)) for v in (*NOT_INTEGERS, 0) if v is not None)
    yield from (("lr", v, lambda v: gk.Adam(lr=v)) for v in (*NOT_NUMBERS, 0))
    yield from (("strength", v, lambda v: gk.penalties.SqrtWeights(v)) for v in NOT_NUMBERS)
    yield from (("k", v, lambda v: MODEL.responsibilities(TENSOR, v)) for v in (0, 3, 1.5, "1", True))
    yield from (("samples", v, lambda v: gk.analysis.kl_divergence(MODEL, MODEL, samples=v)) for v in NOT_INTEGERS)
    yield from (("chunk_rows", v, lambda v: gk.Source.of(GOOD, chunk_rows=v)) for v in NOT_INTEGERS if v is not None)
    for dtype in ("float16", torch.float16, np.int32, int, object(), 5, "nn"):
        yield "dtype", dtype, lambda v: gk.fit(MODEL, TENSOR, gk.EM(), dtype=v)
        yield "dtype", dtype, lambda v: gk.GaussianMixture(dtype=v).fit(GOOD)
    for device in ("gpu", "meta", True, 1.5, [], "cuda:99", 99):
        yield "device", device, lambda v: gk.GaussianMixture(device=v).fit(GOOD)
        yield "device", device, lambda v: gk.GaussianMixture.from_mixture(MODEL, device=v).predict(GOOD)
    for other in ("seed", 1.5, [], True):
        yield "generator", other, lambda v: gk.fit(MODEL, TENSOR, gk.EM(), generator=v)
        yield "generator", other, lambda v: gk.initialize(TENSOR, 2, generator=v)
        yield "generator", other, lambda v: MODEL.sample((2,), generator=v)
    for other in ("print", 3, [3], {"a": 1}):
        yield "callback", other, lambda v: gk.fit(MODEL, TENSOR, gk.EM(), callback=v)
    for name in ("best", 3, [], np.ones(2)):
        yield "strategy", name, lambda v: gk.initialize(TENSOR, 2, v)
        yield "init_params", name, lambda v: gk.GaussianMixture(init_params=v).fit(GOOD)
        yield "covariance_type", name, lambda v: gk.initialize(TENSOR, 2, covariance_type=v)
        yield "backend", name, lambda v: MODEL.log_prob(TENSOR, backend=v)
        yield "solver", name, lambda v: gk.GaussianMixture(solver=v).fit(GOOD)
        yield "criterion", name, lambda v: gk.analysis.select(TENSOR, [1], criterion=v)
    for state in ("seed", [1], 1.5):
        yield "random_state", state, lambda v: gk.GaussianMixture(random_state=v).fit(GOOD)
    for limit in ("much", "1..2GB", -1, float("nan"), float("inf"), [1]):
        yield "max_memory", limit, lambda v: gk.fit(MODEL, TENSOR, gk.EM(), max_memory=v)


def test_settings_are_refused_under_the_name_that_was_typed():
    for name, value, call in settings():
        text = sentence(lambda call=call, value=value: call(value))
        assert re.search(rf"\b{name}\b", text), (name, value, text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_cuda_device_that_is_not_there_is_refused(tmp_path):
    gk.save(MODEL, tmp_path / "m.safetensors")
    calls = (
        lambda: gk.GaussianMixture(2, device="cuda").fit(GOOD),
        lambda: gk.BayesianGaussianMixture(n_components=2, device="cuda:0").fit(GOOD),
        lambda: gk.load(tmp_path / "m.safetensors", device="cuda"),
        lambda: MODEL.to("cuda"),
    )
    for call in calls:
        sentence(call, "no CUDA device is available", kind=ValueError)


@pytest.mark.parametrize("dtype", ["float32", "torch.float32", torch.float32, np.float32, np.dtype("f4")])
def test_every_name_of_a_dtype_is_known(dtype):
    assert gk.fit(MODEL, TENSOR, gk.EM(), dtype=dtype, **FEW).report.dtype == "float32"
    model = gk.GaussianMixture(2, dtype=dtype, max_iter=1, tol=0).fit(GOOD)
    assert model.result_.report.dtype == "float32"
    assert len(model.predict(GOOD)) == ROWS


def bad_weights():
    one = np.ones(ROWS)
    return {
        "negative": -one,
        "NaN": one * np.nan,
        "zero": 0 * one,
        "short": one[:3],
        "column": one[:, None],
        "words": ["word"] * ROWS,
        "digits": np.array(["1"] * ROWS, dtype=object),
        "masked": np.ma.masked_array(one, mask=GOOD[:, 0] > 5),
        "complex": one * 1j,
        "a number": 2.0,
        "sparse": torch.ones(ROWS).to_sparse(),
    }


WEIGHERS = {
    "fit": ("sample_weight", lambda w: gk.fit(MODEL, TENSOR, gk.EM(), sample_weight=w, **FEW)),
    "initialize": ("sample_weight", lambda w: gk.initialize(TENSOR, 2, sample_weight=w)),
    "bic": ("sample_weight", lambda w: gk.analysis.bic(MODEL, TENSOR, sample_weight=w)),
    "estimator": ("sample_weight", lambda w: gk.GaussianMixture(2, max_iter=1).fit(GOOD, sample_weight=w)),
    "score": ("sample_weight", lambda w: gk.GaussianMixture.from_mixture(MODEL).score(GOOD, sample_weight=w)),
    "Bayesian": ("sample_weight", lambda w: gk.BayesianGaussianMixture(max_iter=1).fit(GOOD, sample_weight=w)),
}


@pytest.mark.parametrize("weigher", WEIGHERS)
def test_bad_weights_are_refused_by_their_own_name(weigher):
    name, call = WEIGHERS[weigher]
    for value in bad_weights().values():
        sentence(lambda value=value: call(value), name)


def test_weights_of_a_file_are_refused_by_their_own_name(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, GOOD)
    for name, value in bad_weights().items():
        word = "weights of" if name in ("negative", "NaN", "zero") else "sample_weight"
        sentence(lambda value=value: gk.GaussianMixture(2).fit(path, sample_weight=value), word)


@pytest.mark.parametrize("covariance_type", ["full", "tied", "diag", "spherical"])
def test_priors_are_refused_by_the_names_of_the_estimators_arguments(covariance_type):
    numbers = ("weight_concentration_prior", "mean_precision_prior", "degrees_of_freedom_prior")
    cases = [(name, value) for name in numbers for value in ("a", -1.0, 0, float("nan"), [1.0], True)]
    cases += [("weight_concentration_prior_type", value) for value in ("dp", None, 3)]
    cases += [("degrees_of_freedom_prior", 0.5)]
    arrays = ("a", [1.0], np.ones((3, 3)), [np.nan, 1.0], np.ma.masked_array([1.0, 2.0], mask=[0, 1]), {}, ["1", "2"])
    cases += [(name, value) for name in ("mean_prior", "covariance_prior") for value in arrays]
    negative = {"full": -np.eye(2), "tied": [[1.0, 2.0], [2.0, 1.0]], "diag": [1.0, -1.0], "spherical": 0.0}
    cases += [("covariance_prior", negative[covariance_type])]
    for name, value in cases:
        model = gk.BayesianGaussianMixture(**{"covariance_type": covariance_type, name: value})
        sentence(lambda model=model: model.fit(GOOD), name)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: gk.analysis.bic(m, TENSOR),
        lambda m: gk.analysis.anomaly_threshold(m, TENSOR),
        lambda m: gk.analysis.kl_divergence(m, MODEL),
        lambda m: gk.analysis.merge(m, [[0, 1]]),
        lambda m: gk.standard_errors(m, TENSOR),
        lambda m: gk.export.npz(m, "m.npz"),
        lambda m: gk.GMM(2, n_components=2).assign(m),
        lambda m: gk.EM().update(m, TENSOR),
    ],
)
def test_what_is_no_mixture_is_refused(call):
    fitted = gk.GaussianMixture.from_mixture(MODEL)
    assert "mixture_" in sentence(lambda: call(fitted), "must be a Mixture, got GaussianMixture")
    for other in (None, "model", TENSOR):
        sentence(lambda other=other: call(other), "must be a Mixture")
    sentence(lambda: call(MODEL.expand((2,))), "one mixture")
