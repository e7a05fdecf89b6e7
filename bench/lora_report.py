"""Tables of `python -m bench lora`, from bench/results/lora.json."""

from __future__ import annotations

import statistics

from bench import margin, pages
from bench.accuracy_report import margin as paired
from bench.accuracy_report import shown, signed, table
from bench.lora import BEST_AADP, EPSILONS, HEAD, LONG_HEAD, LORA, METHODS_OF, PATH, USUAL
from bench.margin_report import Runs, chosen, raw_ratio
from bench.pretrained import PAGE

_COLUMNS = tuple(f"ε = {e:g}" for e in EPSILONS)


def scores(runs: Runs, case: str, method: str, epsilon: float | None) -> dict[int, float]:
    """Test accuracy by seed."""
    return {seed: r["accuracy"] for seed, r in chosen(runs, case, method, epsilon).items()}


def accuracies(runs: Runs) -> str:
    """Accuracy of every method, mean and spread over seeds, and macro recall."""
    rows = []
    for case, methods in (METHODS_OF | {USUAL: (margin.BASE,)}).items():
        for method in methods:
            found = [chosen(runs, case, method, e) for e in (*EPSILONS, None)]
            rows.append((case, method, *map(_cell, found)))
    return table(("what learns", "clipping and shares", *_COLUMNS, "no noise"), rows)


def _cell(found: dict[int, dict]) -> str:
    if len(found) < 3:
        return "–"
    recall = statistics.mean(r["recall"] for r in found.values()) / 100
    return f"{shown(r['accuracy'] for r in found.values())} ({recall:.2f})"


def margins(runs: Runs) -> str:
    """Paired differences in points: AADP over the other rules, and LoRA over heads."""
    best, flat = (LORA, BEST_AADP), (LORA, margin.BASE)
    pairs = [(best, (LORA, method)) for method in METHODS_OF[LORA] if method != BEST_AADP]
    pairs += [(one, (head, margin.BASE)) for one in (flat, best) for head in (HEAD, LONG_HEAD)]
    rows = [
        (_named(one), _named(other), *(_margin(runs, one, other, e) for e in EPSILONS))
        for one, other in pairs
    ]
    return table(("margin of", "over", *_COLUMNS), rows)


def _named(what: tuple[str, str]) -> str:
    return f"{what[0]}: {what[1]}"


def _margin(runs: Runs, one: tuple[str, str], other: tuple[str, str], epsilon: float) -> str:
    return signed(paired(scores(runs, *one, epsilon), scores(runs, *other, epsilon)))


def ratios(runs: Runs) -> str:
    """R and how far noise moves predictions, before, amid and after the runs of flat clipping."""
    rows = []
    for epsilon in EPSILONS:
        raw = raw_ratio(runs, LORA, epsilon)
        harm = [r["harm_ratios"] for r in chosen(runs, LORA, "harm", epsilon).values()]
        if raw is None or not harm:
            continue
        middle = [statistics.median(column) for column in zip(*harm, strict=True)]
        released = [r["released_ratio"] for r in chosen(runs, LORA, BEST_AADP, epsilon).values()]
        last = f"{statistics.median(released):.2f}" if released else "–"
        rows.append((f"{epsilon:g}", _three(raw), last, _three(middle)))
    head = ("ε", "R, raw: start / mid / end", "R, released", "harm: start / mid / end")
    return table(head, rows)


def _three(values: tuple[float, ...] | list[float]) -> str:
    return " / ".join(f"{v:.2f}" for v in values)


def report() -> None:
    """Tables into their page; nothing where nothing was run."""
    runs = margin.Study(PATH).runs
    if runs:
        for name, make in TABLES.items():
            pages.put(PAGE, name, make(runs))


TABLES = {"lora accuracy": accuracies, "lora margins": margins, "lora ratios": ratios}
