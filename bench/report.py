"""Tables and plots of the committed results: docs/, docs/images/ and README's few figures.

A table shows named configurations, the same in every row, and never the best of each row.
"""

from __future__ import annotations

import json

from bench import pages, report_rounds
from bench.machine import ROOT
from bench.measure import quantiles, ratios

RESULTS = ROOT / "bench" / "results"
IMAGES = ROOT / "docs" / "images"
PARTS = ("kernels", "dp_step", "rounds")
BASES = {"kernels": ("eager loop", "eager, per-sample"), "dp_step": ("no privacy",)}
DEFAULT = "ours, wide, chacha20"
CONFIGURATIONS = {DEFAULT: "wide, ChaCha20 (default)", "ours, fast, chacha20": "fast, ChaCha20"}
IMPLEMENTATIONS = ("triton", "numba", "torch")  # of one configuration, the compiled one first


def latest() -> dict[str, dict[str, dict]]:
    """By machine and part, the newest committed result that has the part."""
    found: dict[str, dict[str, dict]] = {}
    for path in sorted(RESULTS.glob("*_????-??-??.json")):
        slug = path.stem.rpartition("_")[0]
        for part, data in json.loads(path.read_text()).items():
            found.setdefault(slug, {})[part] = data
    return found


def timed(case: dict) -> dict[str, dict]:
    """The sides that were timed."""
    return {name: side for name, side in case["sides"].items() if "seconds" in side}


def base(part: str, case: dict) -> str:
    """The side that ratios are taken to: the eager loop, or the step without privacy."""
    return next(name for name in timed(case) if name.startswith(BASES[part]))


def milliseconds(side: dict) -> str:
    middle, low, high = (1e3 * q for q in quantiles(side["seconds"]))
    digits = 0 if middle >= 100 else 1 if middle >= 10 else 2
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def times(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def quickest_peer(case: dict) -> str | None:
    """The peer with the least median, beside the side that ratios are taken to."""
    sides = {n: s for n, s in timed(case).items() if s["kind"] == "peer" and n != base_of(case)}
    return min(sides, key=lambda n: quantiles(sides[n]["seconds"])[0], default=None)


def base_of(case: dict) -> str:
    if "cohort" in case:
        return report_rounds.base(case)
    return base("dp_step" if "network" in case else "kernels", case)


def side_of(case: dict, configuration: str) -> str | None:
    """The side of a named configuration, compiled where that was measured; None if it was not."""
    names = [configuration, *(f"{configuration}, {impl}" for impl in IMPLEMENTATIONS)]
    return next((n for n in names if n in timed(case)), None)


def speedup(case: dict, name: str | None, over: str | None) -> str:
    """How many times faster a side is than another, within repeats."""
    if name is None or over is None:
        return "–"
    sides = case["sides"]
    return times(ratios(sides[over]["seconds"], sides[name]["seconds"])[0])


def faster_peers(results: dict) -> str:
    """One line on the cases in which a peer beats the default, whatever other sides of ours do."""
    found, label = [], CONFIGURATIONS[DEFAULT]
    for title, case in results.items():
        mine, peer = side_of(case, DEFAULT), quickest_peer(case)
        if "cohort" in case:
            mine = label = report_rounds.DEFAULT
        start = base_of(case)
        rivals = [n for n in (peer, start) if n is not None and case["sides"][n]["kind"] == "peer"]
        if mine not in timed(case) or not rivals:
            continue
        rival = min(rivals, key=lambda n: quantiles(case["sides"][n]["seconds"])[0])
        sides = case["sides"]
        ratio = ratios(sides[mine]["seconds"], sides[rival]["seconds"])[0]
        if ratio > 1:
            found.append(f"{title} ({rival}, {times(ratio)}×)")
    return f"A peer is faster than {label} in: {'; '.join(found) or 'no case'}."


def kernels_summary(results: dict) -> list[str]:
    """A line a case: plain PyTorch, the fastest peer, and each of our named configurations."""
    head = ["case", "elements", "plain PyTorch", "fastest peer"]
    for label in CONFIGURATIONS.values():
        head += [label, "over plain", "over fastest peer"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for title, case in results.items():
        start, peer = base_of(case), quickest_peer(case)

        def cell(name: str | None, sides=case["sides"]) -> str:
            return "–" if name is None else f"{1e3 * quantiles(sides[name]['seconds'])[0]:.3g} ms"

        rival = "–" if peer is None else f"{cell(peer)} ({peer})"
        row = [title, f"{case['elements'] / 1e6:.1f}M", cell(start), rival]
        for configuration in CONFIGURATIONS:
            mine = side_of(case, configuration)
            row += [cell(mine), speedup(case, mine, start), speedup(case, mine, peer)]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def dp_step_summary(results: dict) -> list[str]:
    """Time as a ratio to the step without privacy."""
    columns = {label: name for name, label in CONFIGURATIONS.items()} | {
        "wide, one norm over all layers": "ours, flat, wide, chacha20",
        "vmap(grad)": "vmap(grad)",
        "Opacus hooks": "Opacus, hooks, flat",
        "per layer": "Opacus, hooks, per layer",
        "ghost": "Opacus, ghost clipping",
        "fast gradient clipping": "Opacus, fast gradient clipping",
        "Opake": "Opake",
        "jax_privacy": "jax_privacy",
        "nan_safe": "jax_privacy, nan_safe",
        "JAX by hand": "JAX, vmap by hand",
    }
    lines = [f"| step | no privacy | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for title, case in results.items():
        start, sides = base_of(case), case["sides"]
        cells = [f"{milliseconds(sides[start]).split()[0]} ms"]
        for configuration in columns.values():
            name = side_of(case, configuration)
            ratio = name and ratios(sides[name]["seconds"], sides[start]["seconds"])[0]
            cells.append(f"{ratio:.2f}×" if ratio else "–")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def machine_line(part: dict) -> str:
    """One line on where a part was measured."""
    m = part["machine"]
    where = m.get("gpu") or f"{m['cpu']}, {m['capability']}, {m['threads']} of {m['cores']} cores"
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
    commits = dict.fromkeys(case["commit"] for case in part["results"].values())
    names = ", ".join(c[:10] + (" with changes" if c.endswith("+") else "") for c in commits)
    busy = f", load {m['load']:.0f}" if (m.get("load") or 0) >= 1.5 else ""
    return f"{where}{busy}; {versions}; commit {names}, {m['date']}."


def full_table(part: str, case: dict) -> list[str]:
    """docs: every side with all that was measured."""
    if part == "rounds":
        return report_rounds.full_table(case)
    start = base_of(case)
    kernels = part == "kernels"
    rows = part == "dp_step" and "in_a_row" in case["sides"][start]
    head = ["side", "one norm for", "median ms (p20–p80)", f"time ÷ {start}"]
    head += ["the same of ten in a row"] * rows
    head += ["bytes/s ÷ copy_"] * kernels + ["launches"] * kernels
    head += ["extra memory, MB", "first call, s", "gate"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    floor = case["sides"].get("copy_", {}).get("seconds")
    for name, side in case["sides"].items():
        if "seconds" not in side:
            reason = f"skipped: {side['skipped']}" if "skipped" in side else side["failed"]
            lines.append(f"| {name} | {reason}{' |' * (len(head) - 1)}")
            continue
        ratio, low, high = ratios(side["seconds"], case["sides"][start]["seconds"])
        covers = {"all": "all tensors"}.get(side["clips"], side["clips"])
        label = f"{name} {side['version']}" if "version" in side else name
        row = [label, covers, milliseconds(side), f"{ratio:.3g} ({low:.3g}–{high:.3g})"]
        if rows:
            repeated = ratios(side["in_a_row"], case["sides"][start]["in_a_row"])
            row.append(f"{repeated[0]:.3g} ({repeated[1]:.3g}–{repeated[2]:.3g})")
        if kernels:
            copied = 2 * case["bytes_in"]
            share = quantiles(floor)[0] / quantiles(side["seconds"])[0] if floor else None
            row.append("–" if share is None else f"{share * case['bytes'] / copied:.3f}")
            row.append(str(side.get("launches", "–")))
        extra = side.get("peak_extra")
        row += ["–" if extra is None else f"{extra / 1e6:.1f}", f"{side['first_call']:.2f}"]
        lines.append(f"| {' | '.join([*row, side['gate']])} |")
    return lines


SUMMARIES = {
    "kernels": kernels_summary,
    "dp_step": dp_step_summary,
    "rounds": report_rounds.summary,
}


def table(part: str) -> str:
    """Summary of a part, a block a machine."""
    blocks = []
    for parts in latest().values():
        if part in parts:
            lines = SUMMARIES[part](parts[part]["results"])
            notes = f"{faster_peers(parts[part]['results'])} {machine_line(parts[part])}"
            blocks.append("\n".join([*lines, "", notes]))
    return "\n\n".join(blocks)


def details() -> str:
    """The generated part of docs/benchmarks.md."""
    lines: list[str] = []
    for slug, parts in latest().items():
        for part in PARTS:
            if part not in parts:
                continue
            results = parts[part]["results"]
            notes = f"{machine_line(parts[part])} {faster_peers(results)}"
            lines += [f"## {part}: {slug}", "", notes, ""]
            lines += [f"![{part} on {slug}](images/{part}_{slug}.png)", ""]
            for title, case in results.items():
                lines += [f"### {title}", "", *full_table(part, case), ""]
    return "\n".join(lines).strip()


def report() -> None:
    """Everything that is generated."""
    from bench import (
        accuracy_report,
        audit,
        cohort,
        correlated,
        faults,
        gpu_page,
        headline,
        inversion,
        lora_report,
        margin_report,
        membership,
        natural,
        newcomer,
        nodes,
        personal_layers,
        pretrained,
        processes,
        readme_figures,
        shared_noise,
        start,
        tuning,
    )
    from bench.plots import draw

    headline.report()
    tuning.report()
    cohort.report()
    correlated.report()
    shared_noise.report()
    pretrained.report()
    margin_report.report()
    lora_report.report()
    natural.report()
    personal_layers.report()
    accuracy_report.report()
    faults.report()
    processes.report()
    audit.report()
    nodes.report()
    start.report()
    newcomer.report()
    membership.report()
    inversion.report()
    gpu_page.report()
    for part in PARTS:
        pages.put(pages.BENCHMARKS, f"{part} table", table(part))
    pages.put(pages.BENCHMARKS, "all table", details())
    pages.put(pages.README, "figures", readme_figures.figures())
    IMAGES.mkdir(parents=True, exist_ok=True)
    for slug, parts in latest().items():
        for part in PARTS:
            if part in parts:
                draw(part, parts[part]["results"], IMAGES / f"{part}_{slug}.png")
