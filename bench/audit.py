"""Audits of runs of every setting and mechanism: ε shown beside ε proven.

    python -m bench audit             # runs that have no result yet, ten minutes of CPU; resumes

Digits over ten clients, one run and one audit each. Seeds are public, so that each can be repeated:
noise is then simulated, drawn by the same code.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from bench import pages
from bench.headline import machine
from bench.machine import ROOT

RESULTS = ROOT / "bench" / "results" / "audit.json"
PAGE = ROOT / "docs" / "attacks.md"
IMAGE = ROOT / "docs" / "images" / "audit.png"
EPSILONS = (8, 3)
_LAST = "last model, black box"
_SUM = ["--privacy.setting", "client+aggregator", "--trainer.max_epochs", "5"]
_FIXED = [*_SUM, "--privacy.cohort_sampling", "fixed"]
_LAPLACE = ["--privacy.mechanism", "laplace"]
# Title: options of the run, and how many canaries.
CASES: dict[str, tuple[list[str], int]] = {
    "record+local, Gaussian": ([], 1000),
    "client+local, Gaussian": (["--privacy.setting", "client+local"], 1000),
    "client+aggregator, Gaussian": (_FIXED, 1000),
    "record+local, Laplace": (_LAPLACE, 1000),
    "client+local, Laplace": (["--privacy.setting", "client+local", *_LAPLACE], 1000),
    "client+aggregator, noise that rounds share": (
        [*_FIXED, "--privacy.correlation", "banded", "--model.clients_per_round", "2"],
        1000,
    ),
    "client+aggregator, Gaussian, secret cohorts of 5": (
        [*_SUM, "--model.clients_per_round", "5"],
        1000,
    ),
}


def run_case(options: list[str], canaries: int, epsilon: float) -> dict[str, Any]:
    """One run of the default experiment with options, and its audit, in this process."""
    from fl_lightning import fit
    from fl_lightning.audit.audit import audit
    from fl_lightning.audit.report import as_json

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        fit.main([
            *("--config", str(ROOT / "configs" / "base.yaml"), *options),
            *("--privacy.epsilon", str(epsilon), "--run_dir", folder, "--trainer.logger", "false"),
            *("--seed_everything", "1", "--privacy.seed", "1"),
        ])  # fmt: skip
        found = audit(folder, canaries=canaries, seed=1)
    return as_json(found) | {"machine": machine(), "load": round(os.getloadavg()[0], 1)}


def run_all() -> None:
    """Run what is missing; results are saved after every audit."""
    os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for title, (options, canaries) in CASES.items():
        for epsilon in EPSILONS:
            name = f"{title}, ε = {epsilon}"
            if name in results:
                continue
            results[name] = run_case(options, canaries, epsilon)
            RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
            row = results[name]
            shown, proven = row["epsilon_shown"], row["epsilon_proven"]
            print(f"{name}: {shown:.2f} of {proven:.2f}, {row['seconds']} s", flush=True)


def ordered(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Results in the order of the cases, whenever they were made."""
    names = [f"{title}, ε = {epsilon}" for title in CASES for epsilon in EPSILONS]
    return {name: results[name] for name in names if name in results}


def audit_table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row a run."""
    head = ["run", "proven ε", "shown ε", "of it", "one run, curve", "one run, (ε, δ)"]
    head += ["last model", "canaries"]
    lines = [f"| {' | '.join([*head, 'time'])} |", "|---" * (len(head) + 1) + "|"]
    for name, row in results.items():
        bounds = {bound["name"]: bound["shown"] for bound in row["bounds"]}
        mark = "" if row["passed"] else " (more than proven)"
        cells = [
            name,
            f"{row['epsilon_proven']:.2f}",
            f"{row['epsilon_shown']:.2f}{mark}",
            f"{100 * row['tightness']:.0f} %",
            f"{bounds['one run, curve']:.2f}",
            f"{bounds['one run, (ε, δ)']:.2f}",
            f"{bounds[_LAST]:.2f}" if _LAST in bounds else "-",
            str(row["bounds"][0]["canaries"]),
            f"{row['seconds']:.0f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    rows = list(results.values())
    machines = sorted({f"torch {row['machine']['torch']}" for row in rows})
    loads = [row["load"] for row in rows]
    least = {row["confidence"] for row in rows}
    notes = (
        f"Shown with {100 * min(least):g} % confidence, δ = {rows[0]['delta']:g}. {machines[0]}; "
        f"load {min(loads):.0f} to {max(loads):.0f} on two cores."
    )
    return "\n".join([*lines, "", notes])


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Shown beside proven, a bar a run; the line goes on to what the attack shows at most."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((8.6, 0.36 * len(results) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    for place, row in enumerate(reversed(results.values())):
        proven, shown, most = (row[f"epsilon_{n}"] for n in ("proven", "shown", "shown_at_most"))
        ax.barh(place, shown, color="#0072B2", height=0.55)
        ax.plot([shown, most], [place, place], color="#000000", lw=0.9)
        ax.plot([proven, proven], [place - 0.4, place + 0.4], color="#D55E00", lw=2)
    ax.set_yticks(range(len(results)), list(reversed(results)))
    ax.set_xlabel("ε: shown by the attack (bar), at most (line), proven (mark)")
    ax.set_xlim(0)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def report() -> None:
    """Table and picture; nothing where nothing was run."""
    if RESULTS.exists():
        results = ordered(json.loads(RESULTS.read_text()))
        pages.put(PAGE, "audit table", audit_table(results))
        draw(results, IMAGE)
