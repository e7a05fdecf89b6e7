"""Tables and the picture of `python -m bench margin`, from bench/results/margin.json."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import lora, pages
from bench.accuracy_report import table as markdown
from bench.machine import ROOT
from bench.margin import BASE, CASES, EPSILONS, METHODS, PATH, STARTS, Study

IMAGE = ROOT / "docs" / "images" / "margin.png"
RATIO_OF = "AADP: joint, contribution"  # whose released R, and margin over all networks, is shown
# Networks of both studies: file, case, and what AADP is for it, which of one layer is flat clipping
# whose norm is tracked; then colour and mark in the picture.
_COLOURS = _BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"
_ONE_LAYER = "flat, quantile"
NETWORKS = {
    "digits, one layer": (PATH, "digits, one layer", RATIO_OF, _BLUE, "o"),
    "digits, 32-32-32": (PATH, "digits, 32-32-32", RATIO_OF, _BLUE, "s"),
    "digits, 512-16": (PATH, "digits, 512-16", RATIO_OF, _BLUE, "^"),
    "digits, 256": (PATH, "digits, 256", RATIO_OF, _BLUE, "D"),
    "R8, head alone": (lora.PATH, lora.HEAD, _ONE_LAYER, _ORANGE, "o"),
    "R8, LoRA, A frozen": (lora.PATH, lora.LORA, RATIO_OF, _ORANGE, "s"),
    "R8, LoRA, A trained": (lora.PATH, lora.LORA_TRAINED, RATIO_OF, _ORANGE, "^"),
    "R8, LoRA in six layers, A frozen": (lora.PATH, lora.WHOLE_LORA, RATIO_OF, _ORANGE, "D"),
    "R8, LoRA in six layers, A trained": (lora.PATH, lora.WHOLE_TRAINED, RATIO_OF, _ORANGE, "v"),
    "tweets, head alone": (lora.PATH, lora.TWEETS_HEAD, _ONE_LAYER, _GREEN, "o"),
    "tweets, LoRA, A frozen": (lora.PATH, lora.TWEETS_LORA, RATIO_OF, _GREEN, "s"),
}
# Two-sided 95 % points of Student's t by degrees of freedom.
_T95 = {2: 4.303, 3: 3.182, 4: 2.776}
Runs = dict[str, Any]


def chosen(runs: Runs, case: str, method: str, epsilon: float | None) -> dict[int, dict[str, Any]]:
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
            cells.append(f"{raw[1]:.2f}, {statistics.median(found):.2f}" if raw and found else "-")
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


@dataclass(frozen=True)
class Point:
    """A network at one ε: R of raw gradients before, amid and after training, and AADP's margin."""

    ratio: tuple[float, float, float]
    margin: tuple[float, float]


def points(files: Mapping[Path, Runs], epsilon: float) -> dict[str, Point]:
    """Networks of both studies by falling R halfway; those without three seeds are left out."""
    found = {}
    for name, (path, case, method, *_) in NETWORKS.items():
        # A head's weight and bias, which its files keep apart, are one layer.
        one = method == _ONE_LAYER
        ratio = (1.0, 1.0, 1.0) if one else raw_ratio(files[path], case, epsilon)
        gained = margin(files[path], case, method, epsilon)
        if ratio is not None and gained is not None:
            found[name] = Point(ratio, gained)
    return dict(sorted(found.items(), key=lambda item: -item[1].ratio[1]))


def networks_table(files: Mapping[Path, Runs]) -> str:
    """What the picture shows, in numbers."""
    by_epsilon = [points(files, e) for e in EPSILONS]
    rows = []
    for name in dict.fromkeys(name for found in by_epsilon for name in found):
        cells = []
        for found in by_epsilon:
            ratio = " / ".join(f"{r:.2f}" for r in found[name].ratio) if name in found else "-"
            cells += [ratio, _shown(found[name].margin if name in found else None)]
        rows.append((name, *cells))
    columns = [c for e in EPSILONS for c in (f"R, ε = {e:g}: start / mid / end", "margin")]
    return markdown(("network", *columns), rows)


def picture(files: Mapping[Path, Runs], path: Path) -> None:
    """Margin against R halfway through training, a line to R at the start; a panel for every ε."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(EPSILONS), figsize=(12, 4.4), sharex=True, sharey=True, layout="constrained"
    )
    for axis, epsilon in zip(axes, EPSILONS, strict=True):
        axis.axhline(0, color="#9a9a9a", linewidth=0.8)
        for name, point in points(files, epsilon).items():
            *_, colour, mark = NETWORKS[name]
            apart = 0.006 * (_COLOURS.index(colour) - 1)  # networks of one layer stand beside
            start, middle, _ = (r + apart for r in point.ratio)
            height, half = point.margin
            axis.plot([start, middle], [height, height], color=colour, linewidth=1, alpha=0.35)
            axis.errorbar(
                middle, height, yerr=half, fmt=mark, markersize=6, color=colour, elinewidth=1,
            )  # fmt: skip
        axis.set_title(f"ε = {epsilon:g}", fontsize=10, loc="left")
        axis.set_xlabel(
            "R of raw gradients: halfway (mark), at the start (end of line)", fontsize=9
        )
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e5e5e5", linewidth=0.6)
    for name, (*_, colour, mark) in NETWORKS.items():
        axes[0].plot([], [], mark, color=colour, label=name)
    axes[0].set_ylabel("AADP over flat clipping, points", fontsize=9)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without dates and versions equal results give an equal file.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def report() -> None:
    """Tables into the page of results, and the picture; nothing where nothing was run."""
    files = {path: Study(path).runs for path in (PATH, lora.PATH)}
    runs = files[PATH]
    if runs:
        pages.put(pages.RESULTS, "margin", tables(runs))
        pages.put(pages.RESULTS, "margin networks", networks_table(files))
        pages.put(pages.RESULTS, "harm", harm_table(runs))
        picture(files, IMAGE)
