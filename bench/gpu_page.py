"""The generated parts of docs/gpu.md: what is predicted, what is modelled, what was built."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bench import cards, pages, predictions
from bench.cache_model import RESULT as TRAFFIC
from bench.cases import CASES

PAGE = pages.ROOT / "docs" / "gpu.md"
RESULTS = predictions.RESULTS
KEYS = ("triton", "capability", "rng", "form", "mechanism", "dtype", "p", "bands")


def lines_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    marks = "|---" * len(head) + "|"
    return "\n".join([f"| {' | '.join(head)} |", marks, *(f"| {' | '.join(r)} |" for r in rows)])


def traffic() -> str:
    """Modelled bytes an element, before and after."""
    rows = []
    for row in json.loads(TRAFFIC.read_text())["rows"]:
        cells = [CASES[row["case"]].title, f"{row['l2_mb']} MB", f"{row['least']:.2f}"]
        for place in ("in place", "out of place"):
            found = row[place]
            cells += [f"{found[k]:.2f}" for k in ("before", "now", "now, hints ignored")]
        rows.append(cells)
    head = ["case", "L2", "least", "in place: before", "now", "hints ignored"]
    return lines_of([*head, "out of place: before", "now", "hints ignored"], rows)


def crowd() -> str:
    """GPT-2 by many programs at once."""
    rows, chunks = [], []
    for row in json.loads(TRAFFIC.read_text())["gpt2"]:
        chunks = [k for k in row if k.startswith("chunks of")]
        cells = [f"{row['l2_mb']} MB", str(row["programs"])]
        for name in chunks:
            cells += [f"{row[name]['bytes_per_element']:.2f}", f"{row[name]['waiting']:.0%}"]
        rows.append(cells)
    head = ["usable L2", "programs at once"]
    for name in chunks:
        head += [f"{name}: bytes/element", "turns that wait"]
    return lines_of(head, rows)


def builds() -> str:
    """Instructions and compile time of the ahead-of-time builds, before and after."""
    by_key: dict[tuple, dict[str, dict]] = {}
    for build in predictions.builds():
        if build["bands"] <= 2:  # more run the same code more often
            by_key.setdefault(tuple(build[k] for k in KEYS), {})[build["which"]] = build
    if not by_key:
        return "No build is committed yet."

    def pair(found: dict[str, dict], name: str, form: str = "{}") -> str:
        values = [found.get(which, {}).get(name) for which in ("before", "after")]
        return " → ".join("–" if v is None else form.format(v) for v in values)

    rows = []
    for key, found in sorted(by_key.items(), key=lambda item: [str(k) for k in item[0]]):
        named = dict(zip(KEYS, key, strict=True))
        what = ", ".join(str(named[k]) for k in ("form", "rng", "mechanism", "dtype"))
        cells = [
            str(named["triton"]),
            f"sm_{named['capability']}",
            f"{what}, L{named['p']}" + (f", {named['bands']} bands" if named["bands"] > 1 else ""),
            pair(found, "apply", "{:.1f}"),
        ]
        cells += [pair(found, "registers"), pair(found, "spills"), pair(found, "seconds", "{:.1f}")]
        rows.append(cells)
    head = ["Triton", "for", "kernel", "instructions/element", "registers", "spills"]
    return lines_of([*head, "seconds to compile"], rows)


def overhead() -> str:
    """Python's share of a call, before and after."""
    path = RESULTS / "gpu_overhead.json"
    if not path.exists():
        return "No measurement is committed yet."
    found = json.loads(path.read_text())
    rows, m = found["rows"], found["machine"]
    head = list(dict.fromkeys(key for row in rows for key in row))
    busy = f" Load {m['load']:.1f}: others were at work, so that times are long." * (
        m["load"] > 1.5
    )
    where = f"{m['cpu']}, {m['date']}; before is commit {found['before'][:10]}.{busy}"
    table = lines_of(head, [[f"{row.get(k, '–')}" for k in head] for row in rows])
    return f"{table}\n\n{where}"


def graphics_cards() -> str:
    """Time of float64 over that of memory."""
    head = ["device", "float64 results a clock and multiprocessor"]
    return lines_of([*head, *(f"{form}: float64 ÷ memory" for form in cards.FORMS)], cards.rows())


def predicted() -> str:
    """Predictions, beside the measurements of a GPU where there are some."""
    results = predictions.results_of(RESULTS)
    said = "**No GPU has run these kernels yet: nothing in this table is measured.**"
    memory = "\n".join(predictions.memory_only())
    if not any(p.instructions is not None for p in predictions.predictions()):
        return f"{said}\n\n{memory}"
    table = "\n".join(predictions.table(results))
    return f"{memory}\n\n{table}" if results else f"{said}\n\n{memory}\n\n{table}"


def correlated() -> str:
    """Predictions for noise of several steps."""
    return "\n".join(predictions.correlated())


PARTS = {
    "gpu predictions": predicted,
    "gpu correlated": correlated,
    "gpu traffic": traffic,
    "gpu crowd": crowd,
    "gpu builds": builds,
    "gpu overhead": overhead,
    "gpu cards": graphics_cards,
}


def report(page: Path = PAGE) -> None:
    """Write every generated part of the page."""
    for name, make in PARTS.items():
        pages.put(page, name, make())
