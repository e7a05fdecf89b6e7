"""Tables of `python -m bench lora`, from bench/results/lora.json."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence

from bench import margin, pages
from bench.accuracy_report import margin as paired
from bench.accuracy_report import shown, signed, table
from bench.lora import (
    ADAPTED,
    BEST_AADP,
    EPSILONS,
    HEAD,
    LONG_HEAD,
    LORA,
    LORA_TRAINED,
    METHODS_OF,
    PATH,
    TWEETS_HEAD,
    TWEETS_LORA,
    USUAL,
    WHOLE_HEAD,
    WHOLE_LORA,
    WHOLE_TRAINED,
)
from bench.margin_report import Runs, chosen, raw_ratio
from bench.pretrained import PAGE

_COLUMNS = tuple(f"ε = {e:g}" for e in EPSILONS)
_TWEETS = (TWEETS_HEAD, TWEETS_LORA)
_SNR = "AADP: joint, snr"


def scores(runs: Runs, case: str, method: str, epsilon: float | None) -> dict[int, float]:
    """Test accuracy by seed."""
    return {seed: r["accuracy"] for seed, r in chosen(runs, case, method, epsilon).items()}


def accuracies(runs: Runs) -> str:
    """Accuracy of every method on R8, mean and spread over seeds, and macro recall."""
    asked = {case: methods for case, methods in METHODS_OF.items() if case not in _TWEETS}
    return _accuracies(runs, asked | {USUAL: (margin.BASE,)})


def tweets(runs: Runs) -> str:
    """The same on tweets."""
    return _accuracies(runs, {case: METHODS_OF[case] for case in _TWEETS})


def _accuracies(runs: Runs, asked: Mapping[str, Sequence[str]]) -> str:
    rows = [
        (case, method, *(_cell(chosen(runs, case, method, e)) for e in (*EPSILONS, None)))
        for case, methods in asked.items()
        for method in methods
    ]
    return table(("what learns", "clipping and shares", *_COLUMNS, "no noise"), rows)


def _cell(found: dict[int, dict]) -> str:
    if len(found) < 3:
        return "–"
    recall = statistics.mean(r["recall"] for r in found.values()) / 100
    return f"{shown(r['accuracy'] for r in found.values())} ({recall:.2f})"


def margins(runs: Runs) -> str:
    """Paired differences in points: AADP over the other rules, and LoRA over heads."""
    pairs: list[tuple[tuple[str, str], tuple[str, str]]] = []
    for case in ADAPTED:
        best, others = (case, BEST_AADP), [m for m in METHODS_OF[case] if m != BEST_AADP]
        pairs += [(best, (case, method)) for method in others]
        if _SNR in METHODS_OF[case]:
            pairs.append(((case, _SNR), (case, margin.BASE)))
    heads = {
        LORA: (HEAD, LONG_HEAD), LORA_TRAINED: (HEAD,), TWEETS_LORA: (TWEETS_HEAD,),
        WHOLE_LORA: (WHOLE_HEAD,), WHOLE_TRAINED: (WHOLE_HEAD,),
    }  # fmt: skip
    for case, alone in heads.items():
        for method in (margin.BASE, BEST_AADP):
            pairs += [((case, method), (head, margin.BASE)) for head in alone]
    rows = [
        (
            one[0],
            one[1],
            other[1] if other[0] == one[0] else ": ".join(other),
            *(_margin(runs, one, other, e) for e in EPSILONS),
        )
        for one, other in pairs
    ]
    return table(("what learns", "margin of", "over", *_COLUMNS), rows)


def _margin(runs: Runs, one: tuple[str, str], other: tuple[str, str], epsilon: float) -> str:
    return signed(paired(scores(runs, *one, epsilon), scores(runs, *other, epsilon)))


def ratios(runs: Runs) -> str:
    """R and how far noise moves predictions, before, amid and after the runs of flat clipping."""
    rows = []
    for case, epsilon in itertools.product(ADAPTED, EPSILONS):
        raw = raw_ratio(runs, case, epsilon)
        harm = [r["harm_ratios"] for r in chosen(runs, case, "harm", epsilon).values()]
        if raw is None or not harm:
            continue
        middle = [statistics.median(column) for column in zip(*harm, strict=True)]
        released = [r["released_ratio"] for r in chosen(runs, case, BEST_AADP, epsilon).values()]
        last = f"{statistics.median(released):.2f}" if released else "–"
        rows.append((case, f"{epsilon:g}", _three(raw), last, _three(middle)))
    head = ("network", "ε", "R, raw: start / mid / end", "R, released")
    return table((*head, "harm: start / mid / end"), rows)


def _three(values: tuple[float, ...] | list[float]) -> str:
    return " / ".join(f"{v:.2f}" for v in values)


def report() -> None:
    """Tables into their page; nothing where nothing was run."""
    runs = margin.Study(PATH).runs
    if runs:
        for name, make in TABLES.items():
            pages.put(PAGE, name, make(runs))


TABLES = {
    "lora accuracy": accuracies,
    "lora tweets": tweets,
    "lora margins": margins,
    "lora ratios": ratios,
}
