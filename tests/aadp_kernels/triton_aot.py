"""Builds `privatize_kernel` ahead of time and prints what the machine code looks like, as JSON.

Run as `python tests/aadp_kernels/triton_aot.py CASE ...` in a process of its own, without
TRITON_INTERPRET; a case is rng,form,mechanism,dtype,p,capability,bands. The capability is a number
such as 90 or the name of an AMD architecture such as gfx942; bands are the steps whose noise is
drawn, one or several of a correlation. No GPU is needed: assemblers and disassemblers come with
Triton.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aadp_kernels._triton import privatize
from aadp_kernels._triton.noise import blocks_per_row, parts

# What is not the instruction: hints to caches, and notes of how it is scheduled.
NOTES = re.compile(r"(?<=G\.E)\.E[FL](?=[. ])|\s+[&?].*")
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    "ticket_count": "i32", "clip_stride": "i32", "scale_stride": "i32", "votes_stride": "i32",
    "bands": "i32",
    "num_layers": "i32", "num_tensors": "i32", "num_chunks": "i32", "chunks": "*i64",
    "addresses": "*i64", "step_pointer": "*i64", "clients": "*i64", "clipped_out": "*i64",
    "nonfinite_out": "*i64", "published": "*i64", "layers": "*fp64", "partials": "*fp64",
    "clip": "*fp64", "scale": "*fp64", "votes_at": "*fp64", "norm1_out": "*fp64",
    "votes_out": "*fp64", "thresholds": "*i64", "coefficients": "*fp64",
}  # fmt: skip


def target_of(capability: int | str) -> GPUTarget:
    """A capability of NVIDIA's, or an architecture of AMD's."""
    if isinstance(capability, str):
        return GPUTarget("hip", capability, 64 if capability.startswith("gfx9") else 32)
    return GPUTarget("cuda", capability, 32)


def build(
    rng: str, form: str, mechanism: str, dtype: str, p: int, capability: int | str, bands: int
):
    """The compiled kernel, with votes and without a reference, and its elements a thread."""
    kernel, secure, element = privatize.privatize_kernel, rng.startswith("chacha"), tl.dtype(dtype)
    itemsize = element.primitive_bitwidth // 8
    narrow = form == "fast" and itemsize < 8
    tile, warps = privatize.tile_size(form, secure, itemsize), privatize.WARPS
    target = target_of(capability)
    options = {"num_warps": warps, "enable_fp_fusion": form == "fast"}
    limits = privatize.REGISTERS if bands == 1 else privatize.REGISTERS_AGAIN
    if target.backend == "cuda":
        options["maxnreg"] = limits[form, secure]
    constants = {
        "X": element, "REFERENCE": None, "OUT": element, "P": p, "NOISY": True, "TILE": tile,
        "DTYPE": tl.float32 if narrow else tl.float64, "WIDTH": 16 // itemsize, "FORM": form,
        "GAUSSIAN": mechanism == "gaussian", "CHACHA": secure, "ROUNDS": int(rng[6:]),
        "BLOCKS": blocks_per_row(form, secure, itemsize), "PARTS": parts(form, secure),
        "LANES": target.warp_size * warps,
    }  # fmt: skip
    constants |= {} if form == "grid" else {"thresholds": None}
    constants |= {"coefficients": None, "bands": None} if bands == 1 else {}
    signature = {
        name: "constexpr" if name in constants else TYPES.get(name, "*i32")
        for name in kernel.arg_names
    }
    built = triton.compile(
        ASTSource(kernel, signature, constexprs=constants), target=target, options=options
    )
    return built, tile // (target.warp_size * warps)


def tool(name: str, *arguments: str) -> str:
    """Standard output of one of Triton's tools."""
    command = [str(BIN / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(sass: str) -> tuple[list[str], dict[str, int]]:
    """The instructions without notes, and where the labels stand among them.

    Without NOP: an assembler pads float64 instructions with it where these wait anyway (sm_120).
    """
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if match := re.match(r"(\.L\w+):", line):
            labels[match.group(1)] = len(code)
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            text = NOTES.sub("", match.group(1).strip())
            code += [text] if text != "NOP" else []
    return code, labels


MEMORY = re.compile(r"\b(?:LDG|STG|ATOMG?|RED|LDL|STL|STS|LDS)\b")
STORE = re.compile(r"\bSTG\b")
# Arithmetic in float64 and conversions from and to it: what the units for float64 do.
FLOAT64 = re.compile(r"\b(?:D(?:ADD|MUL|FMA|SETP|MNMX)|(?:F2F|I2F|F2I)\S*\.F64|MUFU\.\w+64H)\b")
Span = tuple[int, int]  # begin, end


class Loop(NamedTuple):
    """Its code outside of the noise of a step, instructions of a pass, those of float64 of them."""

    code: list[str]
    instructions: int
    float64: int


def memory_loops(
    code: list[str], labels: dict[str, int], double_rounds: int, bands: int
) -> list[Loop]:
    """The innermost loops that use memory; a pass jumps over rare branches.

    Two kinds of loops in such a loop count as often as they run. One that loads keys and stores
    nothing draws the noise of a step: it runs `bands` times. One without memory is that of the
    rounds of ChaCha: it runs as often as it takes for `double_rounds`, each of which has 32
    exclusive ors.
    """
    jumps = [
        (at, labels[match.group(1)])
        for at, line in enumerate(code)
        if (match := re.search(r"BRA.*?\(?(\.L\w+)\)?$", line.replace("`", "").rstrip(")")))
        and match.group(1) in labels
    ]
    loops = [(to, at + 1) for at, to in jumps if to <= at]
    using = [a for a in loops if uses(code, a, MEMORY)]
    storing = [a for a in using if uses(code, a, STORE)]
    writing = [a for a in storing if not any(within(b, a) for b in storing)]
    steps = [a for a in using if a not in storing and any(within(a, b) for b in writing)]
    assert bool(steps) == (bands > 1), steps
    using = [a for a in using if a not in steps]
    inner = [a for a in using if not any(within(b, a) for b in using)]
    result = []
    for begin, end in inner:
        weights = dict.fromkeys(range(begin, end), 1)
        for first, last in loops:
            if within((first, last), (begin, end)):
                times = bands if (first, last) in steps else 1
                if double_rounds and not uses(code, (first, last), MEMORY):
                    ors = sum("LOP3" in line for line in code[first:last])
                    assert double_rounds % max(1, round(ors / 32)) == 0, (first, last, ors)
                    times = double_rounds // max(1, round(ors / 32))
                weights |= {at: times * weights[at] for at in range(first, last)}
        for at, to in jumps:
            # What jumps over the noise of all steps is the way round it where there are none.
            over = any(at < first and last <= to for first, last in steps)
            if begin <= at < to < end and not over:
                weights |= dict.fromkeys(range(at + 1, to), 0)
        drawing = {at for span in steps for at in range(*span)}
        own = [code[at] for at in range(begin, end) if at not in drawing]
        wide = sum(weight for at, weight in weights.items() if FLOAT64.search(code[at]))
        result.append(Loop(own, sum(weights.values()), wide))
    return result


def uses(code: list[str], span: Span, pattern: re.Pattern[str]) -> bool:
    return any(pattern.search(line) for line in code[slice(*span)])


def within(inner: Span, outer: Span) -> bool:
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]


def report_of_amd(case: str) -> dict[str, object]:
    """Spills, and what other multiprocessors' words are read with, of a case for an AMD device."""
    rng, form, mechanism, dtype, p, architecture, bands = case.split(",")
    asm = build(rng, form, mechanism, dtype, int(p), architecture, int(bands))[0].asm
    numbers = dict(re.findall(r"\.(\w+):\s+(\d+)", asm["amdgcn"]))
    names = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    loads = [line for line in asm["amdgcn"].splitlines() if "global_load_dwordx2 " in line]
    return {"case": case, **{name: int(numbers[name]) for name in names}} | {
        # Past the caches of a part of the device: of the factor that is waited for, twice.
        "coherent_loads": sum(line.endswith("sc0 sc1") for line in loads),
        "fused": " contract " in asm["llir"], "object": len(asm["hsaco"]),
    }  # fmt: skip


def report(case: str) -> dict[str, object]:
    """Registers, memory, access widths and instructions an element of one case."""
    rng, form, mechanism, dtype, p, capability, bands = case.split(",")
    if capability.startswith("gfx"):
        return report_of_amd(case)
    before = os.times()
    built, per_thread = build(rng, form, mechanism, dtype, int(p), int(capability), int(bands))
    spent = sum(b - a for a, b in zip(before[:4], os.times()[:4], strict=True))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        code, labels = instructions(tool("nvdisasm", "-c", file.name))
    ptx = built.asm["ptx"]
    hints = re.findall(r"(ld|st)\.global\.L1::evict_(\w+)\.L2::cache_hint\.v", ptx)
    atomics = re.findall(r"atom\.global\.gpu\.(\w+)\.(\w+)", ptx)
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    double_rounds = int(rng[6:]) // 2 if rng.startswith("chacha") and form != "grid" else 0
    loops = memory_loops(code, labels, double_rounds, int(bands))

    def count(loop: Loop, *names: str) -> int:
        return sum(any(name in line for name in names) for line in loop.code)

    stores = ("STG.E.128", "STG.E.64")
    whole = [s for s in loops if count(s, *stores) and not count(s, "STG.E ", "STG.E.U16")]
    apply = max(whole, key=lambda s: s.instructions, default=None)
    if apply is None:
        noisy = [s for s in loops if count(s, "STG")]
        apply = max(noisy, key=lambda s: s.instructions, default=None)
    norm = [s for s in loops if count(s, "LDG.E.128") and not count(s, "STG", "STRONG")]
    result: dict[str, object] = {
        "case": case, "registers": found["REG"], "stack": found["STACK"], "local": found["LOCAL"],
        "shared": found["SHARED"], "instructions": len(code),
        "spills": sum("LDL" in line or "STL" in line for line in code),
        "wide_norm_loops": len(norm), "apply": None, "seconds": round(spent, 1),
        "hints": sorted({f"{access} {priority}" for access, priority in hints}),
        "atomics": sorted(f"{order} {operation}" for order, operation in atomics),
    }  # fmt: skip
    if apply is not None:
        read = max(norm, key=lambda s: s.instructions, default=None)
        result |= {
            "apply": round(apply.instructions / per_thread, 1),
            # Of both reads of an element.
            "float64": round((apply.float64 + (read.float64 if read else 0)) / per_thread, 1),
            "loads128": count(apply, "LDG.E.128"), "stores128": count(apply, "STG.E.128"),
            "loads64": count(apply, "LDG.E.64"), "stores64": count(apply, "STG.E.64"),
            "other_loads": count(apply, "LDG.E "), "shuffles": count(apply, "STS.", "LDSM"),
            "bytes": per_thread * tl.dtype(dtype).primitive_bitwidth // 8,
        }  # fmt: skip
    return result


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps(report(name)), flush=True)
