"""From an attacker's statistic to ε with confidence, and whether it passes what is proven."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fl_lightning.accounting.risk import Risk
from fl_lightning.audit.bounds import accuracy_limits, can_be, shown_by_pair
from fl_lightning.audit.choice import best_threshold
from fl_lightning.audit.family import Family

Floats = npt.NDArray[np.float64]
Coins = npt.NDArray[np.bool_]
Possible = Callable[[Risk], bool]
# Of many canaries, so few are guessed where nothing is known of how guesses hang together.
_GUESSED = ((1500, 0.1), (0, 0.2))


@dataclass(frozen=True)
class Bound:
    """What one way of counting shows.

    Args:
        name: of the way.
        assumes: what has to hold besides fair coins.
        shown: ε shown, a lower limit with the audit's confidence.
        at_most: what this attack would show at most, with the same confidence; None: not known.
        right, guesses, canaries: the counts.
    """

    name: str
    assumes: str
    shown: float
    at_most: float | None
    right: int
    guesses: int
    canaries: int


def independent(family: Family, scores: Floats, coins: Coins, confidence: float) -> Bound:
    """Canaries that each have noise of their own: independent trials.

    Under a curve f every coin is guessed right with probability at most (1 + advantage) / 2, and
    alarms above any threshold are right with probability at most 1 - f(that of false ones).
    """
    count = len(scores)
    threshold = best_threshold(family.counts, family.risk(1.0), count, confidence)
    count_by = _by_guesses if threshold is None else _by_alarms
    low, high, right, guesses = count_by(scores, coins, threshold or 0.0, confidence)
    return Bound(
        "independent canaries",
        "each canary has noise of its own, the same law up to a factor as proven",
        family.shown(low),
        family.needed(high),
        right,
        guesses,
        count,
    )


def last_model(family: Family, scores: Floats, coins: Coins, confidence: float) -> Bound:
    """Canaries that have a last model each, of which one output is known.

    A quarter of them tells the reader where to draw the line, and which side is which; the others
    are guessed.
    """
    tried = max(1, len(scores) // 4)
    line, above = best_line(scores[:tried], coins[:tried])
    guesses = (scores[tried:] > line) == above
    right = int((guesses == coins[tried:]).sum())
    low, high = accuracy_limits(right, len(guesses), confidence)
    return Bound(
        "last model, black box",
        "as independent canaries; the reader knows one output",
        family.shown(_reaches(low)),
        family.needed(_reaches(high)),
        right,
        len(guesses),
        len(scores),
    )


def best_line(scores: Floats, coins: Coins) -> tuple[float, bool]:
    """The line that most scores lie on their side of, and whether those above it are there."""
    order = np.argsort(scores, kind="stable")
    values, there = scores[order], coins[order]
    # Right guesses with i scores below the line, where those above are there.
    right = np.concatenate([[0], np.cumsum(~there)]) + (
        there.sum() - np.concatenate([[0], np.cumsum(there)])
    )
    most, least = int(right.argmax()), int(right.argmin())
    above = right[most] >= len(scores) - right[least]
    at = most if above else least
    ends = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2, [np.inf]])
    return float(ends[at]), bool(above)


def _reaches(accuracy: float) -> Possible:
    return lambda risk: accuracy <= 0.5 or (1 + risk.advantage()) / 2 >= accuracy


def _by_guesses(
    scores: Floats, coins: Coins, threshold: float, confidence: float
) -> tuple[Possible, Possible, int, int]:
    """All coins guessed; a member is possible if its accuracy reaches the limit."""
    right = int(((scores > threshold) == coins).sum())
    low, high = accuracy_limits(right, len(scores), confidence)
    return _reaches(low), _reaches(high), right, len(scores)


def _by_alarms(
    scores: Floats, coins: Coins, threshold: float, confidence: float
) -> tuple[Possible, Possible, int, int]:
    """Alarms above a threshold; both limits hold together with the confidence."""
    alarms = scores > threshold
    each = (1 + confidence) / 2
    true = accuracy_limits(int(alarms[coins].sum()), max(1, int(coins.sum())), each)
    false = accuracy_limits(int(alarms[~coins].sum()), max(1, int((~coins).sum())), each)

    def reaches(hit: float, alarm: float) -> Possible:
        return lambda risk: hit <= alarm or float(risk.power(alarm)) >= hit

    right = int((alarms & coins).sum())
    return reaches(true[0], false[1]), reaches(true[1], false[0]), right, int(alarms.sum())


def surest(scores: Floats, coins: Coins) -> tuple[int, int]:
    """Right guesses among a number of the surest ones, which is fixed by the number of canaries."""
    share = next(share for least, share in _GUESSED if len(scores) >= least)
    guesses = max(1, round(share * len(scores)))
    chosen = np.argsort(-np.abs(scores), kind="stable")[:guesses]
    return int(((scores[chosen] > 0) == coins[chosen]).sum()), guesses


def one_run(family: Family, scores: Floats, coins: Coins, confidence: float) -> list[Bound]:
    """The surest canaries guessed; their guesses may hang together in any way."""
    right, guesses = surest(scores, coins)
    count = len(scores)
    by_curve = family.shown(lambda risk: can_be(risk, right, guesses, count, confidence))
    by_pair = shown_by_pair(family.delta, right, guesses, count, confidence)
    return [
        Bound(
            "one run, curve",
            "the law of the noise up to a factor",
            by_curve,
            None,
            right,
            guesses,
            count,
        ),
        Bound("one run, (ε, δ)", "nothing", by_pair, None, right, guesses, count),
    ]


def roc(scores: Floats, coins: Coins) -> tuple[Floats, Floats]:
    """False and true positive rates of the attack by falling threshold."""
    order = np.argsort(-scores, kind="stable")
    there = coins[order]
    true = np.concatenate([[0], np.cumsum(there)]) / max(1, there.sum())
    false = np.concatenate([[0], np.cumsum(~there)]) / max(1, (~there).sum())
    return false, true


def proven_curve(risk: Risk, rates: Floats) -> Floats:
    """True positive rates that the proof allows at most."""
    return risk.power(rates)
