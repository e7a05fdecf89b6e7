"""Tables of `bench.rounds`, for docs/benchmarks.md."""

from __future__ import annotations

from bench.measure import quantiles, ratios

DEFAULT = "fl_lightning, client+local"
MINE = (
    "fl_lightning, FedAvg",
    DEFAULT,
    "fl_lightning, FedAvg, 2 processes",
    "fl_lightning, client+local, 2 processes",
)
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
    """The fastest of the named sides of a rival."""
    known = timed(case)
    return min((n for n in names if n in known), key=lambda n: middle(known[n]), default=None)


def over_rival(case: dict, mine: str, rival: tuple[str, ...]) -> str:
    """How many times as many rounds a second one of our sides makes as a rival at its best."""
    known, other = timed(case), best(case, rival)
    if mine not in known or other is None:
        return "–"
    ratio = ratios(known[other]["seconds"], known[mine]["seconds"])[0]
    return f"{ratio:.2g} ×" if ratio < 10 else f"{ratio:.0f} ×"


def comparison(contests: dict) -> list[str]:
    """A line a side of ours: rounds a second over those of each rival, in every case."""
    pairs = [(case, label) for case in contests.values() for label in RIVALS]
    heads = " | ".join(f"{case['network']}: {label}" for case, label in pairs)
    lines = [f"| rounds a second, over | {heads} |", "|---" * (1 + len(pairs)) + "|"]
    for mine in MINE:
        cells = [over_rival(case, mine, RIVALS[label]) for case, label in pairs]
        lines.append(f"| {mine} | {' | '.join(cells)} |")
    return lines


def alone(case: dict) -> bool:
    """Whether no other engine takes part."""
    return all(side["kind"] == "ours" for side in case["sides"].values())


def summary(results: dict) -> list[str]:
    """Engines by case, our sides over the rivals, then what grows, and what settings cost."""
    contests = {t: c for t, c in results.items() if not grown(c) and not alone(c)}
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
    lines += [*comparison(contests), ""]
    for title, case in results.items():
        if grown(case):
            lines += [*growth(title, case), ""]
        elif alone(case):
            lines += [*prices(title, case), ""]
    return lines[:-1]


def prices(title: str, case: dict) -> list[str]:
    """A line of times by setting, and of their ratios to the first."""
    known = timed(case)
    first = known[base(case)]
    cells = [f"{1e3 * middle(side):.3g}" for side in known.values()]
    over = [f"{ratios(side['seconds'], first['seconds'])[0]:.2f} ×" for side in known.values()]
    head = f"| {case['network']}, {title} | {' | '.join(known)} |"
    rows = [f"| {label} | {' | '.join(row)} |"
            for label, row in (("ms a round", cells), (f"over {base(case)}", over))]  # fmt: skip
    return [head, "|---" * (len(known) + 1) + "|", *rows]


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
