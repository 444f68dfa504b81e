"""Files of mixtures: what is saved comes back, and damaged files get one sentence."""

from __future__ import annotations

import json
import math
import os

import numpy as np
import pytest
import torch
from conftest import FAMILIES, random_mixture

import gmmkeops as gk


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_files_round_trip(tmp_path, family, dtype):
    mixture = random_mixture(family, D=3, dtype=dtype)
    path = tmp_path / "mixture.safetensors"
    gk.save(mixture, path)
    back = gk.load(path)
    assert repr(back) == repr(mixture)
    assert torch.equal(back.means, mixture.means)
    assert torch.equal(back.factor.U, mixture.factor.U)
    assert back.means.dtype == dtype
    assert [p.name for p in tmp_path.iterdir()] == ["mixture.safetensors"]
    model = gk.GaussianMixture.from_mixture(mixture)
    model.save(path)
    again = gk.GaussianMixture.load(path)
    x = mixture.sample(5).double().numpy()
    assert np.array_equal(again.score_samples(x), model.score_samples(x))


def test_damaged_files_get_one_sentence(tmp_path):
    path = tmp_path / "mixture.safetensors"
    gk.save(random_mixture("full", D=3), path)
    whole = path.read_bytes()
    for size in range(0, len(whole), max(1, len(whole) // 20)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=str(path)):
            gk.load(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        gk.load(tmp_path / "nothing")
    from safetensors.torch import save_file

    header = {"format": "gmmkeops.mixture", "version": 1, "family": "full", "features": 3, "components": 4}
    good = {
        "logits": torch.zeros(4),
        "means": torch.zeros(4, 3),
        "log_diagonal": torch.zeros(4, 3),
        "upper": torch.zeros(4, 3),
    }
    for tensors, changed, message in (
        (good, {"version": 2}, "has format version 2"),
        (good, {"family": "round"}, "unknown family 'round'"),
        ({"logits": good["logits"]}, {}, "contains the tensors"),
        (good | {"means": torch.full((4, 3), math.nan)}, {}, "is damaged: means must be finite"),
        (good | {"upper": torch.zeros(4, 2)}, {}, "is damaged: upper must have shape"),
        (good | {"means": torch.zeros(4, 3, dtype=torch.int64)}, {}, "neither float32 nor float64"),
    ):
        save_file(tensors, path, {"gmmkeops.mixture": json.dumps(header | changed)})
        with pytest.raises(ValueError, match=message):
            gk.load(path)
    save_file(good, path)
    with pytest.raises(ValueError, match="does not contain a gmmkeops mixture"):
        gk.load(path)
    with pytest.raises(TypeError, match="save takes a Mixture"):
        gk.save(3, path)


def test_a_save_cut_short_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "mixture.safetensors"
    old = random_mixture("full")
    gk.save(old, path)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        gk.save(random_mixture("diag"), path)
    assert [p.name for p in tmp_path.iterdir()] == ["mixture.safetensors"]
    assert torch.equal(gk.load(path).means, old.means)
