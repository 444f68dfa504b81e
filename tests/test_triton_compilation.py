"""The machine code of the Triton kernels for GPUs that are not there: registers, and instructions for each pair."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CAPABILITIES = [80, 90, 100, 120]
REQUESTS = ["logsumexp", "argmax", "topk", "draws", "gradient", "moments", "weighted"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


def measured(cases, capabilities):
    """Return the report of the compiler for cases (request, family, features, dtype, lists), one row for each kernel."""
    folder = Path(__file__).parent
    # Triton compiles only in a process that does not use its interpreter.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    command = [sys.executable, str(folder / "triton_binaries.py"), json.dumps(cases), json.dumps(capabilities)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_instructions_for_each_pair_in_three_dimensions(capability):
    cases = [(request, "full", 3, "float32", lists) for request in ("logsumexp", "moments") for lists in (False, True)]
    rows = measured(cases, [capability])
    found = [(row["kernel"], row["per_pair"]) for row in rows if row["kernel"] != "add_partial_sums"]
    assert len(found) == 4
    for kernel, count in found:
        assert count <= {"logsumexps": 22, "moments": 34}[kernel] * 1.1


# Numbers of features around those at which the numbers of points and components of a thread change.
SIZES = (
    [("full", D) for D in (1, 3, 5, 7, 8, 16, 20, 32)] + [("diag", D) for D in (8, 24, 32, 128)] + [("spherical", 128)]
)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("family", "features"), SIZES)
def test_no_kernel_spills_registers(family, features, capability):
    many = features > (16 if family == "full" else 32)
    requests = ["logsumexp", "topk", "moments", "weighted", *([] if many else ["gradient"])]
    for row in measured([(request, family, features, "float32", False) for request in requests], [capability]):
        assert row["LOCAL"] == 0
        assert row["STACK"] == 0, row
        # The smallest shared memory of these devices, for a program.
        assert row["shared"] <= 99 * 1024


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("family", "features"),
    [("full", 1), ("full", 3), ("full", 4), ("full", 8), ("diag", 2), ("diag", 16), ("spherical", 4)],
)
def test_candidate_lists_spill_no_registers(family, features, capability):
    rows = measured([("lists", family, features, "float32", True)], [capability])
    assert sorted({row["kernel"] for row in rows}) == ["check", "compact", "refine"]
    for row in rows:
        assert row["LOCAL"] == 0
        # The subroutines of float64 keep return addresses.
        assert row["STACK"] <= 24, row
        assert row["fused"] == (row["kernel"] != "refine"), row


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("family", "features"), [("spherical", 32), ("spherical", 64), ("spherical", 128), ("diag", 32), ("diag", 64)]
)
def test_products_of_tiles(family, features, capability):
    rows = [
        row for row in measured([("products", family, features, "float32", False)], [capability]) if row["products"]
    ]
    assert sorted(row["kernel"] for row in rows) == ["logsumexps", "moments", "moments"]
    for row in rows:
        assert row["LOCAL"] == row["STACK"] == 0, row
        assert row["shared"] <= (227 if capability == 90 else 99) * 1024
        # Products of tiles on sm_90 are computed by groups of warps.
        assert row["products"] == (["HGMMA"] if capability == 90 else ["HMMA"])


def test_lists_and_float64_points():
    cases = [(request, "full", 3, dtype, True) for request in REQUESTS for dtype in ("float32", "float64")]
    cases += [(request, "spherical", 2, "float64", False) for request in REQUESTS]
    cases += [
        (request, *size, "float64", False)
        for request in ("gradient", "weighted")
        for size in (("full", 8), ("diag", 16))
    ]
    cases += [(request, "full", 32, "float32", True) for request in ("logsumexp", "weighted")]
    # The subroutines of float64 keep a return address.
    assert all(row["STACK"] <= 8 for row in measured(cases, [90]))


def test_exponentials_that_are_not_normal_numbers_are_zero():
    """The instruction of the device replaces subnormal results by zero."""
    for row in measured([(request, "full", 3, "float32", False) for request in ("logsumexp", "moments")], [90]):
        if row["kernel"] != "add_partial_sums":
            assert row["exponentials"] == ["ex2.approx.ftz.f32"]
