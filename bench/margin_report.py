"""Tables and the picture of `python -m bench margin`, from bench/results/margin.json."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from bench import pages
from bench.machine import ROOT
from bench.margin import BASE, CASES, EPSILONS, METHODS, PATH, STARTS, Study

IMAGE = ROOT / "docs" / "images" / "margin.png"
RATIO_OF = "AADP: joint, contribution"  # whose released R is shown
# Two-sided 95 % points of Student's t by degrees of freedom.
_T95 = {2: 4.303, 3: 3.182, 4: 2.776}
Runs = dict[str, Any]


def chosen(runs: Runs, case: str, method: str, epsilon: float) -> dict[int, dict[str, Any]]:
    """Runs on the test records, by seed."""
    what = (case, method, epsilon, False)
    return {
        r["seed"]: r
        for r in runs.values()
        if (r["case"], r["method"], r["epsilon"], r["trial"]) == what
    }


def margin(runs: Runs, case: str, method: str, epsilon: float) -> tuple[float, float] | None:
    """Mean of the paired differences to flat clipping in points, and half its 95 % interval.

    None where fewer than three seeds are there.
    """
    own, base = (chosen(runs, case, m, epsilon) for m in (method, BASE))
    found = [own[s]["accuracy"] - base[s]["accuracy"] for s in sorted(own.keys() & base.keys())]
    if len(found) - 1 not in _T95:
        return None
    half = _T95[len(found) - 1] * statistics.stdev(found) / math.sqrt(len(found))
    return statistics.mean(found), half


def raw_ratio(runs: Runs, case: str, epsilon: float) -> tuple[float, float, float] | None:
    """R from raw gradients of the flat runs before, amid and after training; medians over seeds."""
    found = [r["raw_ratios"] for r in chosen(runs, case, BASE, epsilon).values()]
    if not found:
        return None
    begin, middle, end = (statistics.median(column) for column in zip(*found, strict=True))
    return begin, middle, end


def released_ratio(runs: Runs, case: str, epsilon: float) -> float | None:
    """R from released history at the end of the runs of `RATIO_OF`, median over seeds."""
    rows = chosen(runs, case, RATIO_OF, epsilon).values()
    found = [r["released_ratio"] for r in rows if r["released_ratio"] is not None]
    return statistics.median(found) if found else None


def table(runs: Runs, epsilon: float) -> str:
    """Networks by falling R: accuracy of flat clipping, and each method's margin over it."""
    others = [m for m in METHODS if m != BASE]
    lines = [
        f"| network | R, raw: start / mid / end | R, released | {BASE}, % | "
        + " | ".join(others)
        + " |",
        "|---" * (4 + len(others)) + "|",
    ]
    for case in CASES:
        base = [r["accuracy"] for r in chosen(runs, case, BASE, epsilon).values()]
        raw, released = raw_ratio(runs, case, epsilon), released_ratio(runs, case, epsilon)
        if raw is None or len(base) < 2:
            continue
        cells = [
            case,
            " / ".join(f"{r:.2f}" for r in raw),
            "-" if released is None else f"{released:.2f}",
            f"{statistics.mean(base):.1f} ± {statistics.stdev(base):.1f}",
            *(_shown(margin(runs, case, m, epsilon)) for m in others),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def harm_table(runs: Runs) -> str:
    """R beside the harm that noise does, before training and amid the flat runs."""
    lines = [
        "| network | R at the start | harm at the start "
        + " ".join(f"| R, harm halfway, ε = {e:g} " for e in EPSILONS)
        + "|",
        "|---" * (3 + len(EPSILONS)) + "|",
    ]
    for name in STARTS:
        start = runs.get(f"{name} | start")
        if start is None:
            continue
        cells = [name, f"{start['raw_ratios'][0]:.2f}", f"{start['harm_ratios'][0]:.2f}"]
        for epsilon in EPSILONS:
            found = [r["harm_ratios"][1] for r in chosen(runs, name, "harm", epsilon).values()]
            raw = raw_ratio(runs, name, epsilon)
            there = bool(found) and raw is not None
            cells.append(f"{raw[1]:.2f}, {statistics.median(found):.2f}" if there else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(found: tuple[float, float] | None) -> str:
    return "-" if found is None else f"{found[0]:+.1f} ± {found[1]:.1f}"


def tables(runs: Runs) -> str:
    """One table for every ε that has runs."""
    parts = []
    for epsilon in EPSILONS:
        text = table(runs, epsilon)
        if text.count("\n") > 1:
            parts += [f"ε = {epsilon:g}:", "", text, ""]
    return "\n".join(parts).strip()


def picture(runs: Runs, path: Path) -> None:
    """Margin against R halfway through training, a panel for every ε."""
    import matplotlib.pyplot as plt

    shown = {"AADP: joint, contribution": "o", "AADP: joint, mse": "s", "AADP: joint, snr": "^"}
    colours = ("#1b6ca8", "#c9a227", "#7a3b69")
    figure, axes = plt.subplots(
        1, len(EPSILONS), figsize=(11, 4), sharey=True, layout="constrained"
    )
    for axis, epsilon in zip(axes, EPSILONS, strict=True):
        axis.axhline(0, color="#9a9a9a", linewidth=0.8)
        for i, (method, mark) in enumerate(shown.items()):
            for case in CASES:
                raw, found = raw_ratio(runs, case, epsilon), margin(runs, case, method, epsilon)
                if raw is None or found is None:
                    continue
                axis.errorbar(
                    raw[1] + 0.006 * (i - 1), found[0], yerr=found[1], fmt=mark, markersize=6,
                    color=colours[i], elinewidth=1,
                )  # fmt: skip
        for i, (method, mark) in enumerate(shown.items()):
            axis.plot([], [], mark, color=colours[i], label=method)
        axis.set_title(f"ε = {epsilon:g}", fontsize=10, loc="left")
        axis.set_xlabel("R of raw gradients, halfway", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e5e5e5", linewidth=0.6)
    axes[0].set_ylabel("points over flat clipping", fontsize=9)
    axes[-1].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without dates and versions equal results give an equal file.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def report() -> None:
    """Tables into the page of results, and the picture; nothing where nothing was run."""
    runs = Study(PATH).runs
    if runs:
        pages.put(pages.RESULTS, "margin", tables(runs))
        pages.put(pages.RESULTS, "harm", harm_table(runs))
        picture(runs, IMAGE)
