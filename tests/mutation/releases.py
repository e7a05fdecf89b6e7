"""Mistakes in how a number leaves a client: the claim, the ledger line, the two kinds of release."""

from __future__ import annotations

from tests.mutation.mutations import group

_MECHANISM = "tests/fl_lightning/test_mechanism.py tests/fl_lightning/test_exactness.py"
_SUMS = (
    "tests/fl_lightning/test_sum_accounts.py"
    "::test_cohorts_of_unequal_clients_are_charged_by_their_own_largest"
)

LINES = group(
    "fl_lightning/release/lines.py",
    f"{_MECHANISM} {_SUMS}",
    ("steps charged once", "            steps=steps,", "            steps=1,"),
    ("tails not written down", "tail_delta=steps * extra.delta", "tail_delta=0.0"),
    ("the grid is free", "epsilon_inflation=steps * extra.epsilon,", "epsilon_inflation=0.0,"),
    ("two thirds of the multiplier in the ledger", "noise_multiplier=event.noise_multiplier,", "noise_multiplier=2 / 3 * event.noise_multiplier,"),
    ("three halves of the multiplier in the ledger", "noise_multiplier=event.noise_multiplier,", "noise_multiplier=1.5 * event.noise_multiplier,"),
)  # fmt: skip

CLAIM = group(
    "fl_lightning/release/claim.py",
    "tests/fl_lightning/test_claim.py",
    ("nothing remembered as spent", "        books.budget.spend(line)\n", "        pass\n"),
    ("a replay is charged again", "fresh = [drawn.lines[i] for i in keep if not paid[i]]", "fresh = [drawn.lines[i] for i in keep]"),
    ("who cannot pay releases", "if paid[i] or books.budget.can_pay(line)", "if True"),
    ("who cannot pay has a history", "    if left:\n", "    if False:\n"),
    ("a replay of other clients is free", "and old.clients == line.clients", ""),
    ("equal noise on other bytes", "    return any(old.binding == line.binding and", "    return any(False and"),
    ("a failed release moves the history", "        books.history.restore(rows, before)\n        raise", "        raise"),
)  # fmt: skip

ONE_BY_ONE = group(
    "fl_lightning/release/one_by_one.py",
    _MECHANISM,
    ("noise not bound to the model", "[own, multiplier, *params.values(), *before.values()]", "[own, multiplier, *before.values()]", "the noise is bound once more to the values it is added to, which follow from the model"),
    ("noise not bound to the round", "binding.round_key(self.key, context, round, redraw", "binding.round_key(self.key, context, 0, redraw"),
)  # fmt: skip

MUTATIONS = [*LINES, *CLAIM, *ONE_BY_ONE]
