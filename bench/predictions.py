"""What the kernel should take on an H200, before any GPU has run it, and beside what one measured.

    python -m bench.predictions FOLDER     writes FOLDER/predicted.md from the results there

A launch takes as long as the slower of memory and instructions, and a launch's own time. Bytes an
element are those of `bench.cache_model`, instructions an element those of the apply loop in the
machine code that tests/aadp_kernels/triton_aot.py builds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.cache_model import RESULT as TRAFFIC
from bench.cases import CASES
from bench.machine import ROOT
from bench.measure import quantiles
from bench.report import side_of

RESULTS = ROOT / "bench" / "results"
NAMES = ("gpt2", "resnet50", "llama_slice")
FORMS = ("fast", "wide", "grid")
RNGS = ("philox10", "chacha8", "chacha20")
# An H200: bytes a second that a copy reaches, its L2 cache, lanes and clock, and a guess at the
# time of two small kernels, one of which clears the counters.
BANDWIDTH, L2_MB, LANES, CLOCK, LAUNCH = 4.3e12, 50, 132 * 4 * 32, 1.98e9, 5e-6
BUILD = {"capability": 90, "dtype": "fp32", "p": 1, "mechanism": "laplace", "bands": 1}
GAUSSIAN = {"p": 2, "mechanism": "gaussian"}
BANDS = (1, 2, 4)


@dataclass(frozen=True)
class Prediction:
    """Seconds of one launch over float32 updates in place.

    Attributes:
        case, form, rng: What is launched.
        bytes_per_element: Modelled traffic.
        memory: Seconds that memory takes.
        instructions: An element, in the apply loop; None if no build is committed.
        issue: Seconds that it takes to issue them.
        copy: Seconds of a copy of as many elements, eight bytes each.
    """

    case: str
    form: str
    rng: str
    bytes_per_element: float
    memory: float
    instructions: float | None
    issue: float | None
    copy: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.issue or 0.0) + LAUNCH


def builds() -> list[dict]:
    """The committed reports of ahead-of-time builds."""
    found: list[dict] = []
    for path in sorted(RESULTS.glob("gpu_builds*.json")):
        found += json.loads(path.read_text())
    return found


def latest_build(form: str, rng: str, **other: object) -> dict | None:
    """The build that a machine with the oldest supported Triton would run now."""
    wanted = BUILD | other | {"form": form, "rng": rng, "which": "after"}
    fits = [b for b in builds() if all(b.get(k) == v for k, v in wanted.items())]
    fits = [b for b in fits if b.get("apply") is not None]
    return min(fits, key=lambda b: [int(n) for n in str(b["triton"]).split(".")], default=None)


def predictions() -> Iterator[Prediction]:
    """Every case, form and generator."""
    for case in NAMES:
        for form in FORMS:
            for rng in RNGS:
                yield prediction(case, form, rng)


def prediction(case: str, form: str, rng: str, **other: object) -> Prediction:
    """One case; `other` are fields of its build where they are not those of `BUILD`."""
    rows = json.loads(TRAFFIC.read_text())["rows"]
    (moved,) = (
        r["in place"]["now"] for r in rows if (r["case"], r["l2_mb"]) == (case, L2_MB)
    )  # fmt: skip
    count = CASES[case].elements
    build = latest_build(form, rng, **other)
    steps = None if build is None else float(build["apply"])
    issue = None if steps is None else steps * count / (LANES * CLOCK)
    memory, copy = moved * count / BANDWIDTH, 8 * count / BANDWIDTH
    return Prediction(case, form, rng, moved, memory, steps, issue, copy)


def microseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e6 * seconds:.0f}"


def measured(results: dict, wanted: Prediction) -> float | None:
    """Median seconds of the side that a prediction is about; None if it was not timed."""
    title = f"{CASES[wanted.case].title}: L1 Laplace"
    case = results.get(title)
    name = case and side_of(case, f"ours, {wanted.form}, {wanted.rng}")
    return quantiles(case["sides"][name]["seconds"])[0] if case and name else None


def table(results: dict | None = None) -> list[str]:
    """Predictions, and what was measured where there are results of a GPU."""
    head = ["case", "form, generator", "bytes/element", "memory, µs", "instructions/element"]
    head += ["issue, µs", "**predicted**, µs", "predicted ÷ copy"]
    head += ["**measured**, µs", "measured ÷ predicted"] * (results is not None)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for p in predictions():
        if p.instructions is None:
            continue
        row = [CASES[p.case].title, f"{p.form}, {p.rng}", f"{p.bytes_per_element:.2f}"]
        row += [microseconds(p.memory), f"{p.instructions:.0f}", microseconds(p.issue)]
        row += [microseconds(p.seconds), f"{p.seconds / p.copy:.2f}"]
        if results is not None:
            seconds = measured(results, p)
            row.append(microseconds(seconds))
            row.append("–" if seconds is None else f"{seconds / p.seconds:.2f}")
        lines.append(f"| {' | '.join(row)} |")
    return lines


def correlated() -> list[str]:
    """L2 Gaussian noise of several steps, and how much longer than that of one it takes."""
    head = ["case", "form, generator"]
    for bands in BANDS:
        head += [f"{bands} bands: instructions/element" if bands > 1 else "instructions/element"]
        head += ["**predicted**, µs"] + ["× one"] * (bands > 1)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for case in NAMES[:2]:
        for form in ("fast", "wide"):
            for rng in RNGS:
                found = [prediction(case, form, rng, **GAUSSIAN, bands=bands) for bands in BANDS]
                row = [CASES[case].title, f"{form}, {rng}"]
                for p in found:
                    if p.instructions is not None:
                        row += [f"{p.instructions:.0f}", microseconds(p.seconds)]
                    if p is not found[0]:
                        row.append(f"{p.seconds / found[0].seconds:.2f}")
                if len(row) == len(head):
                    lines.append(f"| {' | '.join(row)} |")
    return lines


def results_of(folder: Path) -> dict | None:
    """Cases of `kernels` that a GPU measured, of all files of a folder; None if none did."""
    found: dict = {}
    for path in sorted(folder.glob("*_????-??-??.json")):
        part = json.loads(path.read_text()).get("kernels")
        if part and part["machine"].get("gpu"):
            found |= part["results"]
    return found or None


def main(folder: Path) -> None:
    """Write predictions beside the measurements of a folder, and print them."""
    results = results_of(folder)
    lines = ["# Predicted and measured", "", *memory_only(), "", *table(results)]
    if results is None:
        lines += ["", "Nothing has been measured: all figures are predictions."]
    (folder / "predicted.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def memory_only() -> list[str]:
    """The bound of memory for each case, whatever is computed."""
    lines = ["| case | elements | bytes/element | memory, µs | copy, µs |", "|---|---|---|---|---|"]
    for p in predictions():
        if (p.form, p.rng) == (FORMS[0], RNGS[0]):
            row = [CASES[p.case].title, f"{CASES[p.case].elements:,}", f"{p.bytes_per_element:.2f}"]
            row += [microseconds(p.memory), microseconds(p.copy)]
            lines.append(f"| {' | '.join(row)} |")
    return lines


if __name__ == "__main__":
    main(Path(sys.argv[1]))
