"""docs/results.md: tables and figures of the committed accuracy runs, and nothing else."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench import accuracy
from bench.accuracy_runs import fit_command
from bench.machine import ROOT

DOCS = ROOT / "docs" / "results.md"
IMAGE = "accuracy_by_epsilon.png"
BEGIN, END = "<!-- {}: generated -->", "<!-- end of {} -->"
LEVEL = 0.95
TARGETS = {8.0: 88.0, 3.0: 86.5, 1.0: 83.5}
Runs = dict[str, dict[str, Any]]


def runs(study: str) -> Runs:
    """Committed runs of a study by their key; none if it was not run."""
    path = accuracy.RESULTS / f"accuracy_{study}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def scores(found: Runs, case: str, epsilon: float | None) -> dict[int, float]:
    """Test accuracy of a case by seed; sets that are not whole yet do not count."""
    values = {
        r["seed"]: r["accuracy"]
        for r in found.values()
        if r["case"] == case and r["target_epsilon"] == epsilon and r["trial"] is None
    }
    studies = {r["study"] for r in found.values()}
    whole = [len(seeds) for study, seeds in accuracy.SEEDS_OF.items() if study in studies]
    return values if len(values) >= (whole[0] if whole else 3) else {}


def shown(values: Iterable[float]) -> str:
    """Mean ± standard deviation over the seeds."""
    values = list(values)
    if not values:
        return "–"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def margin(ours: Mapping[int, float], other: Mapping[int, float]) -> tuple[float, float] | None:
    """Mean difference over the seeds that both have, and half its confidence interval (t)."""
    differences = [ours[s] - other[s] for s in ours if s in other]
    if len(differences) < 3:
        return None
    from scipy import stats

    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return (
        statistics.mean(differences),
        float(stats.t.ppf((1 + LEVEL) / 2, len(differences) - 1)) * error,
    )


def signed(found: tuple[float, float] | None) -> str:
    """A margin for people."""
    return "–" if found is None else f"{found[0]:+.1f} ± {found[1]:.1f}"


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    return "\n".join([row(*head), row(*["---"] * len(head)), *(row(*cells) for cells in rows)])


def best_table() -> str:
    """The best networks on Fashion-MNIST by ε."""
    found = runs("best")
    cases = list(dict.fromkeys(r["case"] for r in found.values()))
    rows = []
    for case in cases:
        for epsilon in (*accuracy.EPSILONS, None):
            values = scores(found, case, epsilon)
            if values:
                goal = TARGETS.get(epsilon or 0) if case == "IID, 10 clients" else None
                rows.append(
                    (
                        case,
                        "none" if epsilon is None else f"{epsilon:g}",
                        shown(values.values()),
                        len(values),
                        "" if goal is None else f"{goal} %",
                    )
                )
    head = ("clients", "ε", "test accuracy, %, mean ± std", "seeds", "aim")
    return table(head, rows)


def gap_table() -> str:
    """What privacy costs the best network: its accuracy without, less that at every ε."""
    found = runs("best")
    without = scores(found, "IID, 10 clients, without privacy", None)
    rows = [
        (f"{e:g}", signed(margin(without, scores(found, "IID, 10 clients", e))))
        for e in sorted(accuracy.EPSILONS)
    ]
    return table(("ε", "points below training without privacy"), rows)


def comparison_table(study: str) -> str:
    """Every method of a comparison at every ε."""
    found = runs(study)
    methods = list(dict.fromkeys(r["case"] for r in found.values()))
    methods.sort(key=list(accuracy.METHODS).index)
    rows = []
    for method in methods:
        cells = []
        for epsilon in sorted(accuracy.EPSILONS):
            target = None if method in accuracy.PUBLIC else epsilon
            cells.append(shown(scores(found, method, target).values()))
        kind = "nominal ε, no guarantee" if method in accuracy.NOMINAL else "proven"
        rows.append((method, "none" if method in accuracy.PUBLIC else kind, *cells))
    return table(("method", "privacy", "ε = 1", "ε = 3", "ε = 8"), rows)


def margin_table(study: str, ours: str) -> str:
    """How far one AADP rule is ahead of each other proven method, in points."""
    found = runs(study)
    rows = []
    for method in {**accuracy.COMPARATORS, **accuracy.AADP}:
        cells = [
            signed(margin(scores(found, ours, e), scores(found, method, e)))
            for e in sorted(accuracy.EPSILONS)
        ]
        if method != ours and set(cells) != {"–"}:
            rows.append((method, *cells))
    return table((f"margin of “{ours}” over", "ε = 1", "ε = 3", "ε = 8"), rows)


def measures_table() -> str:
    """What improves accuracy: each measure taken away or put in alone."""
    found = runs("measures")
    rows = []
    for case in dict.fromkeys(r["case"] for r in found.values()):
        values = scores(found, case, accuracy.MEASURES_EPSILON)
        if values:
            rows.append((case, shown(values.values()), len(values)))
    return table(("network and training", "test accuracy, %, mean ± std", "seeds"), rows)


def personal_table() -> str:
    """Clients with ε of 1, 3 and 8: all test records, and each group's own records."""
    found = runs("personal")
    rows = []
    for case in dict.fromkeys(r["case"] for r in found.values()):
        mine = [r for r in found.values() if r["case"] == case]
        groups = [
            shown([r["sim_only_group_accuracy"][g] for r in mine]) for g in ("1.0", "3.0", "8.0")
        ]
        rows.append((case, shown([r["accuracy"] for r in mine]), *groups, len(mine)))
    head = ("weights of clients", "test records", "ε = 1", "ε = 3", "ε = 8", "seeds")
    return table(head, rows)


def commands() -> str:
    """One command a proven case: what repeats its first seed."""
    lines = []
    for study in ("best", "fashion", "digits"):
        seen = set()
        for one in runs(study).values():
            if one["trial"] is None and one["case"] not in seen:
                seen.add(one["case"])
                command = fit_command(one["files"], one["options"], one["seed"])
                lines.append(f"# {study}: {one['case']}: {one['accuracy']:.2f} %\n{command}")
    return "```text\n" + "\n".join(lines) + "\n```"


def sections() -> dict[str, str]:
    """Everything that is generated, by the name of its place in the page."""
    made = {
        "best": best_table(),
        "gap": gap_table(),
        "measures": measures_table(),
        "personal": personal_table(),
    }
    for study in accuracy.BASES:
        made[study] = comparison_table(study)
        made[f"{study} margins"] = margin_table(study, accuracy.BEST_AADP)
    return made | {"commands": commands()}


def filled(page: str) -> str:
    """The page with its generated parts as the committed runs have them."""
    for name, text in sections().items():
        begin, end = BEGIN.format(name), END.format(name)
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"
    return page


def report() -> None:
    """Write docs/results.md and its figure."""
    DOCS.write_text(filled(DOCS.read_text()))
    draw()


def draw() -> None:
    """Accuracy against ε, a panel a comparison."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 6), layout="constrained")
    drawn = (*accuracy.COMPARATORS, *SHOWN)
    for axis, study in zip(axes, accuracy.BASES, strict=True):
        found = runs(study)
        for i, method in enumerate(drawn):
            points = [(e, scores(found, method, e)) for e in sorted(accuracy.EPSILONS)]
            points = [(e, list(v.values())) for e, v in points if v]
            ours = method in accuracy.AADP
            # A little to the side, so that neighbours can be told apart.
            axis.errorbar(
                [e * 1.025 ** (i - len(drawn) / 2) for e, _ in points],
                [statistics.mean(v) for _, v in points],
                yerr=[statistics.stdev(v) for _, v in points],
                marker="o" if ours else "s",
                markersize=6 if ours else 4,
                capsize=2,
                linewidth=2.2 if ours else 0.9,
                linestyle="-" if ours else "--",
                color=f"C{i - len(accuracy.COMPARATORS)}"
                if ours
                else plt.get_cmap("Greys")(0.35 + 0.6 * i / len(accuracy.COMPARATORS)),
                label=method,
            )
        axis.set(xscale="log", xlabel="ε of every record", ylabel="test accuracy, %", title=study)
        axis.set_xticks(sorted(accuracy.EPSILONS), [f"{e:g}" for e in sorted(accuracy.EPSILONS)])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
                  fontsize=8, frameon=False)  # fmt: skip
    path = ROOT / "docs" / "images" / IMAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


SHOWN = accuracy.AADP_SHOWN
