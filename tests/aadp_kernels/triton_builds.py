"""Records what builds of `privatize_kernel` cost and give, for every Triton and capability.

Run as `python tests/aadp_kernels/triton_builds.py FILE WHICH CASE ...` without TRITON_INTERPRET;
cases are those of `triton_aot`. FILE is bench/results/gpu_builds.json; a row of it for the same
build is replaced.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

FIELDS = ("rng", "form", "mechanism", "dtype", "p", "capability", "bands")
IDENTITY = ("which", "triton", *FIELDS)


def row(case: str, which: str) -> dict[str, Any]:
    """One build: its CPU seconds, from source to machine code, and what the code looks like."""
    import triton
    from triton_aot import build, report  # pyright: ignore[reportMissingImports]

    fields: dict[str, Any] = dict(zip(FIELDS, case.split(","), strict=True))
    fields |= {name: int(fields[name]) for name in ("p", "capability", "bands")}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        before = os.times()
        build(*fields.values())
        after = os.times()
        found = report(case)
    spent = sum(b - a for a, b in zip(before[:4], after[:4], strict=True))
    # In the grid form the noise has loops of its own, whose passes are random: not counted.
    grid = fields["form"] == "grid"
    counts = {k: None if grid else found[k] for k in ("apply", "float64")}
    return {
        "which": which, "triton": triton.__version__, **fields, "seconds": round(spent, 1),
        "registers": found["registers"], "spills": found["spills"], **counts,
    }  # fmt: skip


def merge(path: Path, new: dict[str, Any]) -> None:
    """Adds a row to the list in `path`, sorted; one row a build."""
    rows = json.loads(path.read_text()) if path.exists() else []
    known = {tuple(r[k] for k in IDENTITY): r for r in rows}
    known[tuple(new[k] for k in IDENTITY)] = new
    lines = [json.dumps(known[name]) for name in sorted(known)]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    for name in sys.argv[3:]:
        merge(Path(sys.argv[1]), row(name, sys.argv[2]))
