"""Builds the kernels of `clip_sum_noise` and of norms of products ahead of time; JSON of the code.

Run as `python tests/aadp_kernels/triton_aot_sums.py CASE ...` in a process of its own, without
TRITON_INTERPRET. Cases: norms,p,votes,dtype,capability; sums,rng,form,mechanism,dtype,capability;
correlated,rng,form,mechanism,dtype,capability (sums with noise of several steps);
grid,dtype,capability; products,dtype,capability. No GPU is needed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aadp_kernels._triton import clip_sum_kernels as sums
from aadp_kernels._triton import product_norms
from aadp_kernels._triton.clip_sum import sum_constants
from aadp_kernels._triton.noise import blocks_per_row, parts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLOATS = ("clip_ptr", "votes_ptr", "quanta_ptr", "slots_ptr", "factors_ptr", "norms_ptr",
          "scale_ptr", "l1_ptr", "l2sq_ptr", "coefficients_ptr")  # fmt: skip


def pointer(name: str, element: str) -> str:
    """Type of an argument."""
    if name in ("a_ptr", "g_ptr"):
        return f"*{element}"
    if name.endswith("_ptr"):
        return (
            "*fp64" if name in FLOATS else {"mask_ptr": "*u8", "key_ptr": "*i32"}.get(name, "*i64")
        )
    return "i32"


def plan(case: str):
    """(kernel, constants, arguments that 16 divides, options) of a case."""
    kind, *rest, dtype, _ = case.split(",")
    element = DTYPES[dtype]
    if kind == "norms":
        kernel = sums.norm_pieces
        constants = {"P": int(rest[0]), "VOTES": rest[1] == "votes", "GRID": False}
        constants |= sums.norm_constants(element)
        options = {"enable_fp_fusion": False}
    elif kind in ("sums", "correlated", "grid"):
        kernel, grid = sums.sum_tiles, kind == "grid"
        rng, form, mechanism = rest or ("philox10", "wide", "laplace")
        chacha = rng.startswith("chacha")
        constants = {
            "FRESH": True, "LAST": not grid, "GRID": grid, "NOISE": not grid, "FORM": form,
            "TILE": sums.tile_size(form, chacha), "GAUSSIAN": mechanism == "gaussian",
            "CHACHA": chacha, "ROUNDS": int(rng[6:]), "PARTS": parts(form, chacha),
            "BLOCKS": blocks_per_row(form, chacha, element.itemsize),
        }  # fmt: skip
        constants |= {"coefficients_ptr": None, "bands": None} if kind != "correlated" else {}
        shared = sum_constants(element, grid=grid)
        options = {k: shared.pop(k) for k in ("enable_fp_fusion", "maxnreg")}
        constants |= shared
    else:
        kernel = product_norms.linear_tiles
        constants = product_norms.options(256, 256, element) | {"WIDEN": False}
        constants |= {"a_column": 1, "g_row": 1}
        options = {"enable_fp_fusion": constants.pop("enable_fp_fusion")}
    divisible = [n for n in kernel.arg_names if n.endswith("_ptr")]
    if kind == "products":
        divisible += ["a_record", "a_position", "g_record", "g_position", "columns", "rows"]
    return kernel, constants, [n for n in divisible if n not in constants], options


def tool(name: str, *arguments: str) -> str:
    """Standard output of one of Triton's tools."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def report(case: str) -> dict[str, object]:
    """Registers, local memory and access widths of one case."""
    kernel, constants, divisible, options = plan(case)
    names = kernel.arg_names
    dtype, capability = case.split(",")[-2:]
    source = ASTSource(
        kernel,
        {n: "constexpr" if n in constants else pointer(n, dtype) for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible},
    )
    built = triton.compile(
        source,
        target=GPUTarget("cuda", int(capability), 32),
        options={"num_warps": 4, **options},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        sass = tool("cuobjdump", "-sass", file.name)
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    counts = {
        "spills": r"\b(?:LDL|STL)\b",
        "loads128": r"LDG\.E\.128|LDGSTS\.E(?:\.\w+)*\.128",
        "stores128": r"STG\.E\.128",
        "loads64": r"LDG\.E\.64|LDGSTS\.E(?:\.\w+)*\.64",
        "stores64": r"STG\.E\.64",
        "tensor_core": r"\bH(?:G)?MMA",
        "fused": r"\bFFMA\b",
    }
    return {"case": case, "registers": found["REG"], "stack": found["STACK"] + found["LOCAL"]} | {
        name: len(re.findall(pattern, sass)) for name, pattern in counts.items()
    }


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps(report(name)), flush=True)
