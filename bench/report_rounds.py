"""Tables of `bench.rounds`, for README.md and docs/benchmarks.md."""

from __future__ import annotations

from bench.measure import quantiles, ratios

MINE = ("fl_lightning, FedAvg", "fl_lightning, client+local")
RIVALS = {
    "Flower's simulation": ("Flower simulation",),
    "pfl's best": ("pfl, 1 process", "pfl, 2 processes"),
    "a Lightning Trainer per client": ("Lightning Trainer per client",),
    "the plain loop": ("plain loop",),
}


def grown(case: dict) -> dict[str, int]:
    """What grows in a case, by side: clients of the population, or of a cohort."""
    return case["populations"] or case["cohorts"]


def timed(case: dict) -> dict[str, dict]:
    return {name: side for name, side in case["sides"].items() if "seconds" in side}


def middle(side: dict) -> float:
    """Median seconds of a round."""
    return quantiles(side["seconds"])[0]


def base(case: dict) -> str:
    """The plain loop, or the smallest population or cohort."""
    names = timed(case)
    return "plain loop" if "plain loop" in names else next(iter(names))


def megabytes(side: dict) -> str:
    return "–" if side.get("peak") is None else f"{side['peak'] / 1e6:.0f}"


def best(case: dict, names: tuple[str, ...]) -> str | None:
    """The fastest of the named sides, each with any number of processes."""
    known = timed(case)
    found = [n for n in known if n in names or n.removesuffix(", 2 processes") in names]
    return min(found, key=lambda n: middle(known[n]), default=None)


def comparison(title: str, case: dict) -> str:
    """How many times as fast as each rival this package is, each side at its best."""
    known, parts = timed(case), []
    for mine in MINE:
        own = best(case, (mine,))
        if own is None:
            continue
        over = []
        for label, names in RIVALS.items():
            rival = best(case, names)
            if rival is not None:
                ratio = ratios(known[rival]["seconds"], known[own]["seconds"])[0]
                over.append(f"{ratio:.2g} × {label}" if ratio < 10 else f"{ratio:.0f} × {label}")
        parts.append(f"{own}: {', '.join(over)}")
    return f"{title}, rounds a second over those of others. {'; '.join(parts)}."


def summary(results: dict) -> list[str]:
    """README: engines by case, then what grows."""
    contests = {t: c for t, c in results.items() if not grown(c)}
    names = list(dict.fromkeys(n for c in contests.values() for n in timed(c)))
    heads = [f"{c['network']}, ms a round | rounds/s | MB" for c in contests.values()]
    lines = [f"| engine | {' | '.join(heads)} |", "|---" * (1 + 3 * len(contests)) + "|"]
    for name in names:
        cells = []
        for case in contests.values():
            side = case["sides"].get(name, {})
            if "seconds" not in side:
                cells.append("– | – | –")
                continue
            seconds = middle(side)
            cells.append(f"{1e3 * seconds:.3g} | {1 / seconds:.3g} | {megabytes(side)}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append("")
    lines += [comparison(title, case) + "\n" for title, case in contests.items()]
    for title, case in results.items():
        if grown(case):
            lines += [*growth(title, case), ""]
    return lines[:-1]


def growth(title: str, case: dict) -> list[str]:
    """A line of times and memory by size."""
    known, what = timed(case), "clients" if case["populations"] else "cohort"
    sizes = {n: s for n, s in grown(case).items() if n in known}
    rows = {
        f"{title}: {what}": [f"{size:,}" for size in sizes.values()],
        "ms a round": [f"{1e3 * middle(known[n]):.3g}" for n in sizes],
        "MB beside the records": [
            "–" if known[n].get("peak") is None
            else f"{(known[n]['peak'] - known[n]['data']) / 1e6:.0f}"
            for n in sizes
        ],
    }  # fmt: skip
    lines = [f"| {label} | {' | '.join(cells)} |" for label, cells in rows.items()]
    return [lines[0], "|---" * (len(sizes) + 1) + "|", *lines[1:]]


def full_table(case: dict) -> list[str]:
    """docs: every side with all that was measured."""
    start = base(case)
    head = ["side", "processes", "median ms a round (p20–p80)", f"time ÷ {start}", "peak MB"]
    head += ["start, s", "accuracy", "gate"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, side in case["sides"].items():
        if "seconds" not in side:
            reason = f"skipped: {side['skipped']}" if "skipped" in side else side["failed"]
            lines.append(f"| {name} | {reason}{' |' * (len(head) - 1)}")
            continue
        mid, low, high = (1e3 * q for q in quantiles(side["seconds"]))
        ratio, least, most = ratios(side["seconds"], case["sides"][start]["seconds"])
        label = f"{name} {side['version']}" if side["kind"] == "peer" else name
        row = [
            label, str(side["processes"]), f"{mid:.3g} ({low:.3g}–{high:.3g})",
            f"{ratio:.3g} ({least:.3g}–{most:.3g})", megabytes(side),
            f"{side['first_call']:.1f}", f"{side['accuracy']:.3f}", side["gate"],
        ]  # fmt: skip
        lines.append(f"| {' | '.join(row)} |")
    return lines
