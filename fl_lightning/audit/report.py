"""What an audit leaves: lines for the terminal, `audit.json` and a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fl_lightning.audit.findings import Bound, proven_curve, roc

if TYPE_CHECKING:
    from fl_lightning.audit.audit import Audit

FILE, PICTURE = "audit.json", "plots/audit.png"
_COPY = (
    "The canaries were in copies of the run, made by its own code with noise and ledgers of their "
    "own. The run itself, its ledger and its model were only read."
)


def as_json(audit: Audit) -> dict[str, Any]:
    """The facts of an audit."""
    return {
        "canaries": _COPY,
        "setting": audit.setting,
        "mechanism": audit.mechanism,
        "client": audit.client,
        "delta": audit.family.delta,
        "epsilon_proven": audit.proven,
        "epsilon_of_copy": audit.seen.charged,
        "epsilon_shown": audit.main.shown,
        "epsilon_shown_at_most": audit.main.at_most,
        "confidence": audit.confidence,
        "tightness": audit.main.shown / audit.proven,
        "passed": audit.passed,
        "bounds": [asdict(bound) for bound in audit.bounds],
        "noise_seen": audit.noise_seen,
        "seconds": round(audit.seconds, 1),
        "simulated": audit.seed is not None,
    }


def write(audit: Audit, folder: Path) -> list[Path]:
    """Write `audit.json` and the picture into a folder; each is whole or as it was before."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PICTURE).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(as_json(audit), indent=1, ensure_ascii=False) + "\n"
    _replace(folder / FILE, text.encode())
    _replace(folder / PICTURE, picture(audit))
    return [folder / FILE, folder / PICTURE]


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def rows_of(bounds: Sequence[Bound]) -> list[list[str]]:
    """The table of the terminal: way, ε shown, right guesses, what is assumed."""
    return [
        [
            bound.name,
            f"{bound.shown:.2f}",
            "-" if bound.at_most is None else f"{bound.at_most:.2f}",
            f"{bound.right} of {bound.guesses}",
            bound.assumes,
        ]
        for bound in bounds
    ]


COLUMNS = ("counted as", "ε shown", "at most", "right guesses", "assumed")


def lines_of(audit: Audit) -> list[str]:
    """The verdict in words."""
    shown, proven = audit.main.shown, audit.proven
    percent = f"{100 * audit.confidence:g} %"
    verdict = (
        f"passed: the attack shows ε ≥ {shown:.3g} with {percent} confidence, and ε ≤ {proven:.3g} "
        f"is proven ({100 * shown / proven:.0f} % of it is shown)"
        if audit.passed
        else f"FAILED: the attack shows ε ≥ {shown:.3g} with {percent} confidence, but only "
        f"ε ≤ {proven:.3g} is charged: noise, clipping or charges are not what the ledger says"
    )
    return [verdict, _COPY]


def picture(audit: Audit) -> bytes:
    """PNG: ε shown beside ε proven, and the attack under the proven trade-off curve."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((9.6, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _bars(left, audit)
    rates = np.concatenate([[0.0], np.geomspace(1e-4, 1.0, 200)])
    allowed = proven_curve(audit.family.risk(1.0), rates)
    right.plot(rates, allowed, color="#D55E00", label="proven: no attack is above")
    right.fill_between(rates, allowed, 1, color="#D55E00", alpha=0.1, lw=0)
    false, true = roc(audit.scores, audit.seen.coins)
    right.plot(false, true, color="#0072B2", label="this attack")
    right.plot([0, 1], [0, 1], color="#888888", lw=0.8, ls="--", label="guessing")
    right.set(xlim=(0, 1), ylim=(0, 1), xlabel="false alarms", ylabel="right alarms")
    right.legend(frameon=False, loc="lower right", fontsize="small")
    page = io.BytesIO()
    FigureCanvasAgg(figure).print_png(page)
    return page.getvalue()


def _bars(ax: Any, audit: Audit) -> None:
    names = [bound.name for bound in audit.bounds]
    places = np.arange(len(names))[::-1]
    shown = [bound.shown for bound in audit.bounds]
    ax.barh(places, shown, color="#0072B2", height=0.5, label="shown, at least")
    for place, bound in zip(places, audit.bounds, strict=True):
        if bound.at_most is not None and np.isfinite(bound.at_most):
            ax.plot([bound.shown, bound.at_most], [place, place], color="#000000", marker="|")
    ax.axvline(audit.proven, color="#D55E00", label="proven, at most")
    ax.set_yticks(places, names)
    ax.set_xlim(0, 1.15 * max([audit.proven, *shown]))
    ax.set_xlabel(f"ε at δ = {audit.family.delta:g}, {100 * audit.confidence:g} % confidence")
    ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=2)
    ax.spines[["top", "right"]].set_visible(False)
