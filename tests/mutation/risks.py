"""Mistakes in what a statement says of attacks."""

from __future__ import annotations

from tests.mutation.mutations import group

_RISK = "tests/fl_lightning/test_risk.py"

MUTATIONS = [
    *group(
        "fl_lightning/accounting/risk.py",
        _RISK,
        ("twice the steps", "pairs = compose_pairs(counts, left)", "pairs = compose_pairs({e: 2 * c for e, c in counts.items()}, left)"),
        ("half the steps", "pairs = compose_pairs(counts, left)", "pairs = compose_pairs({e: (c + 1) // 2 for e, c in counts.items()}, left)"),
        ("no bound from the other side", "return np.minimum(np.minimum(by_unit, by_none).min(-1), 1.0)", "return np.minimum(by_unit.min(-1), 1.0)"),
        ("the largest of all bounds", "np.minimum(by_unit, by_none).min(-1)", "np.minimum(by_unit, by_none).max(-1)"),
        ("delta left out of a guess", "1 - shrink * (1 - self.deltas)", "1 - shrink"),
        ("the prior left out", "odds = abs(math.log(prior) - math.log1p(-prior))", "odds = 0.0"),
        ("inexact noise left out", "(e + inflation, min(1.0, d + tails))", "(e, d)"),
        ("tails not paid", "left = delta - tails", "left = delta"),
    ),
    *group(
        "fl_lightning/accounting/pairs.py",
        _RISK,
        ("one step", "_gaussian_deltas(1 / joint_multiplier(key), epsilons)", "_gaussian_deltas(1 / key[0][0].noise_multiplier, epsilons)"),
        ("a Gaussian of half the distance", "special.ndtr(mu / 2 - epsilons / mu)", "special.ndtr(mu / 4 - epsilons / mu)"),
        ("pairs from epsilon 1 on", "np.concatenate([[0.0], np.geomspace", "np.concatenate([[1.0], 1 + np.geomspace"),
    ),
    *group(
        "fl_lightning/ledger/risks.py",
        _RISK,
        ("the best client for the worst", "worst, median = ordered[-1]", "worst, median = ordered[0]"),
        ("the safest client for the median", "ordered[(len(ordered) - 1) // 2]", "ordered[0]"),
        ("a bound without a guarantee", 'if header["setting"] in ("none", "abstract") or', 'if header["setting"] == "none" or'),
        ("a bound without noise", "if not math.isfinite(worst.epsilon()):", "if False:"),
        ("figures rounded down", "math.ceil(value * 1000 - 1e-9)", "math.floor(value * 1000)"),
    ),
]  # fmt: skip
