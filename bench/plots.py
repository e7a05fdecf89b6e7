"""Plots of the committed results; Matplotlib is imported here alone."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

from bench import report, report_rounds
from bench.measure import quantiles, ratios

COLOURS = {"ours": "#1b6ca8", "peer": "#c9a227", "floor": "#9a9a9a"}
LABELS = {"ours": "this package", "peer": "peer", "floor": "reference"}
COLUMNS = 2


def draw(part: str, results: dict, path: Path) -> None:
    """One panel a case."""
    cases = list(results.items())
    rows = -(-len(cases) // COLUMNS)
    heights = [
        max(len(report.timed(case)) for _, case in cases[COLUMNS * r : COLUMNS * (r + 1)])
        for r in range(rows)
    ]
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=(15, 0.28 * sum(heights) + 1.1 * rows), squeeze=False,
        height_ratios=heights, layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for axis, (title, case) in zip(axes.flat, cases, strict=False):
        if part == "rounds" and report_rounds.grown(case):
            growth(axis, title, case)
        else:
            panel(axis, part, title, case)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[kind]) for kind in COLOURS]
    figure.legend(handles, LABELS.values(), loc="outside upper right", ncols=3, frameon=False)
    # Without dates and versions equal results give an equal file.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def panel(axis: plt.Axes, part: str, title: str, case: dict) -> None:
    """One case on a logarithmic axis, fastest at the top: median as a dot, p20 to p80 as a line."""
    sides = report.timed(case)
    start = report.base_of(case)
    values = {n: ratios(side["seconds"], sides[start]["seconds"]) for n, side in sides.items()}
    order = sorted(values, key=lambda name: -values[name][0])
    for y, name in enumerate(order):
        middle, low, high = values[name]
        colour = COLOURS["floor" if name == start and part == "dp_step" else sides[name]["kind"]]
        axis.plot([low, high], [y, y], color=colour, linewidth=2, solid_capstyle="round")
        axis.plot(middle, y, "o", color=colour, markersize=7)
        axis.annotate(
            f"{middle:.3g}", (high, y), (8, 0), textcoords="offset points", va="center", fontsize=8
        )
    axis.set_yticks(range(len(order)), order, fontsize=8)
    axis.set_title(title, fontsize=10, loc="left")
    axis.axvline(1.0, color="black", linewidth=0.6, zorder=0)
    axis.set_xlabel(f"time ÷ {start}", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", color="#e5e5e5", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set_xscale("log")
    axis.margins(x=0.12, y=0.08)
    for which in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        which(FuncFormatter(_tick))


def growth(axis: plt.Axes, title: str, case: dict) -> None:
    """Time of a round by the size of the population or cohort: median, p20 to p80."""
    sides = report.timed(case)
    sizes = {n: size for n, size in report_rounds.grown(case).items() if n in sides}
    values = [[1e3 * q for q in quantiles(sides[n]["seconds"])] for n in sizes]
    x = list(sizes.values())
    axis.fill_between(
        x, [v[1] for v in values], [v[2] for v in values], color=COLOURS["ours"], alpha=0.25,
        linewidth=0,
    )  # fmt: skip
    axis.plot(x, [v[0] for v in values], "o-", color=COLOURS["ours"], markersize=6)
    axis.set_xscale("log")
    axis.set_xticks(x, [f"{size:,}" for size in x])
    axis.minorticks_off()
    axis.set_ylim(0, 1.25 * max(v[2] for v in values))
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("clients" if case["populations"] else "cohort", fontsize=8)
    axis.set_ylabel("ms a round", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#e5e5e5", linewidth=0.6)


def _tick(value: float, _position: object) -> str:
    """1, 2 and 5 of every decade."""
    return f"{value:g}" if f"{value:e}"[0] in "125" else ""
