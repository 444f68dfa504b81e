"""Compile the Triton kernels of the engine for GPUs that are not there, and read their machine code.

Run as a script, with a JSON list of cases (request, family, features, dtype, lists) and compute capabilities; prints JSON. It
runs in a process of its own, since Triton's interpreter is chosen when Triton is imported.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from conftest import make_case

from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.triton import lists, loading, partial, products, residuals, tiles
from gmmkeops.reductions.triton.digit_parameters import Parameters
from gmmkeops.reductions.triton.lists import candidate_lists, checked
from gmmkeops.reductions.truncation.bounds import Schedule
from gmmkeops.reductions.truncation.tolerance import Tolerance
from gmmkeops.reductions.truncation.tree import Boxes, Cloud

TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}


def launches(case, rows=1000, components=1000, capability=80):
    """The kernel launches of a case, as (module, kernel, arguments, warps, constants)."""
    found = []

    def record(module, kernel, device, grid, *arguments, warps, **constants):
        found.append((module, kernel, arguments, warps, constants))

    for owner in (residuals, partial, tiles, products, lists):
        owner.launch = record
    request, family, features, dtype, has_lists = case
    dtype = getattr(torch, dtype)
    # Products of digits are accurate for components that are not much narrower than others.
    settings = {"condition": 2.0, "spread": 1.0} if request == "products" else {}
    made = make_case(family, dtype, N=rows, K=components, D=features, **settings)
    kernels = residuals.Residuals(Exponents.of(*made.arguments))
    values, schedule = torch.zeros(rows, dtype=dtype), all_pairs(rows, components) if has_lists else None
    schedules = None if schedule is None else [schedule]
    match request:
        case "logsumexp":
            kernels.logsumexps(values, schedule)
        case "argmax":
            kernels.largest(values[:, None], torch.zeros(rows, 1, dtype=torch.int32), schedule)
        case "topk":
            kernels.largest(torch.zeros(rows, 5, dtype=dtype), torch.zeros(rows, 5, dtype=torch.int32), schedule)
        case "draws":
            kernels.draws(values, values, torch.zeros(rows, dtype=torch.int32), schedules)
        case "gradient":
            kernels.gradients(values, schedules)
        case "moments":
            kernels.moments(values, None, schedules)
        case "weighted":
            kernels.moments(values, values, schedules)
        case "lists":
            for single in (False, True):
                lists_and_checks(kernels, single, weights=None if single else values.double())
        case "products":
            products._capability = lambda device: capability // 10
            some = products.Products(kernels.problem, Parameters.of(kernels.problem))
            some.logsumexps(values)
            some.moments(values, None)
            some.moments(values, values)
    return found


def lists_and_checks(kernels, single, weights):
    """Launch the kernels of candidate lists of two levels, whose results are not used."""
    D, dtype = kernels.problem.shape[2], torch.float64
    shapes = (D,), (D, D), (D,), (D,), ()
    levels = tuple(Boxes(*(torch.zeros(nodes, *shape, dtype=dtype) for shape in shapes)) for nodes in (2, 4))
    cloud = Cloud(kernels.problem.x, torch.arange(1000), levels, 250 * torch.arange(5))
    tolerance = Tolerance.of(kernels.problem.x.dtype, None if single else 1e-6)
    lists._numbers = lambda found: [4000, 4000, 1000, 1000]
    lists._refined.__globals__["_MOST"] = 1 << 62
    cloud.cache["sizes of lists", 1000, single] = [8000]
    schedule = candidate_lists(cloud, kernels.problem, torch.zeros(4, dtype=dtype), tolerance)
    values = kernels.problem.x[:, 0].contiguous()
    checked(schedule, values, weights, kernels.scale, tolerance, torch.empty(0, dtype=dtype))


def all_pairs(rows, components, spans=None, device="cpu"):
    """A schedule of all components for each of some row ranges."""
    spans = torch.as_tensor([[0, rows // 2], [rows // 2, rows]] if spans is None else spans).to(device)
    T = len(spans)
    lists = torch.arange(T, device=device)
    index, pointer = torch.arange(components, device=device).repeat(T), torch.arange(T + 1, device=device) * components
    floor = torch.full((T,), -torch.inf, dtype=torch.float64, device=device)
    return Schedule(lists, index, pointer, floor, spans, lists, floor)


def compiled(launch, capability):
    """The binary of a launch for a compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, kernel, arguments, warps, constants = launch
    constants = dict(constants)
    options = {name: constants.pop(name) for name in ("enable_fp_fusion",) if name in constants}
    function = getattr(loading._kernels(module), kernel)
    names = function.arg_names
    given = dict(zip(names, arguments, strict=False))
    numbers = {int: "i32", float: "fp64"}
    types = {n: TYPES[v.dtype] if isinstance(v, torch.Tensor) else numbers[type(v)] for n, v in given.items()}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, v in given.items() if isinstance(v, torch.Tensor)}
    source = ASTSource(function, types | dict.fromkeys(constants, "constexpr"), constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, **options})


def tool(name, *arguments):
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def machine_code(kernel):
    """The instructions (address, text) of a kernel, and what it uses: registers, stack and local memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(kernel.asm["cubin"])
        lines, usage = tool("cuobjdump", "-sass", path), tool("cuobjdump", "-res-usage", path)
    found = [re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", line) for line in lines.splitlines()]
    instructions = [(int(match[1], 16), match[2]) for match in found if match]
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    return instructions, used


def longest_loop(instructions):
    """The instructions of the longest loop."""
    places = {address: place for place, (address, _) in enumerate(instructions)}
    loops = [[]]
    for place, (address, text) in enumerate(instructions):
        target = re.search(r"BRA\b.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) in places and int(target[1], 16) < address:
            loops.append([text for _, text in instructions[places[int(target[1], 16)] : place + 1]])
    return max(loops, key=len)


def main():
    rows = []
    for case in json.loads(sys.argv[1]):
        for capability in json.loads(sys.argv[2]):
            for launch in launches(case, capability=capability):
                kernel = compiled(launch, capability)
                instructions, used = machine_code(kernel)
                *_, warps, constants = launch
                loop = longest_loop(instructions)
                wide = constants.get("BN", 0) or constants.get("BK", 0)
                pairs = constants.get("U", 1) * wide / (32 * warps)
                rows.append({"case": case, "kernel": launch[1], "capability": capability, **used, "loop": len(loop)})
                rows[-1] |= {"per_pair": len(loop) / pairs, "shared": kernel.metadata.shared, "warps": warps}
                rows[-1]["fused"] = kernel.metadata.enable_fp_fusion
                rows[-1]["products"] = sorted(
                    {text for _, text in instructions for text in re.findall(r"\b(?:UTC)?HG?MMA\b", text)}
                )
                rows[-1]["exponentials"] = sorted(set(re.findall(r"ex2[.\w]*", kernel.asm["ptx"])))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
