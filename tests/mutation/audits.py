"""Mistakes in audits: what they count, what they read, and what they run."""

from __future__ import annotations

from tests.mutation.mutations import group

_BOUNDS = "tests/fl_lightning/test_audit_bounds.py"
_READINGS = "tests/fl_lightning/test_audit_readings.py"
_COPIES = "tests/fl_lightning/test_audit_copies.py"
_COMMAND = "tests/fl_lightning/test_audit_command.py"

MUTATIONS = [
    *group(
        "fl_lightning/audit/bounds.py",
        _BOUNDS,
        ("limits of half the confidence", "stats.beta.ppf(1 - confidence, right,", "stats.beta.ppf((1 - confidence) / 2, right,"),
        ("a curve asked for less", "reached = (i * tail + above) / canaries", "reached = i * tail / guesses"),
        ("guesses in the place of canaries", "needed = canaries * float", "needed = guesses * float"),
        ("delta for one canary", "tail + 2 * canaries * delta * most", "tail + 2 * delta * most"),
        ("delta left out", "return min(1.0, tail + 2 * canaries * delta * most)", "return min(1.0, tail)"),
    ),
    *group(
        "fl_lightning/accounting/risk.py",
        _BOUNDS,
        ("one side of the inverse", "np.maximum(np.maximum(by_unit, by_none).max(-1), 0.0)", "np.maximum(by_unit.max(-1), 0.0)"),
    ),
    *group(
        "fl_lightning/audit/family.py",
        _BOUNDS,
        ("what comes on top left out", "return compose_epsilon(self.scaled(factor), left) + self.inflation", "return compose_epsilon(self.scaled(factor), left)"),
        ("noise scaled the other way", "noise_multiplier=event.noise_multiplier * factor", "noise_multiplier=event.noise_multiplier / factor"),
        ("a possible member for an excluded one", "excluded = self._boundary(possible)[1]", "excluded = self._boundary(possible)[0]"),
    ),
    *group(
        "fl_lightning/audit/findings.py",
        _BOUNDS,
        ("limits exchanged", "return reaches(true[0], false[1]), reaches(true[1], false[0])", "return reaches(true[1], false[0]), reaches(true[0], false[1])"),
        ("the line drawn by those that are guessed", "line, above = best_line(scores[:tried], coins[:tried])", "line, above = best_line(scores[tried:], coins[tried:])"),
        ("the wrong side of the line", "guesses = (scores[tried:] > line) == above", "guesses = scores[tried:] > line"),
        ("all canaries guessed", "guesses = max(1, round(share * len(scores)))", "guesses = len(scores)"),
    ),
    *group(
        "fl_lightning/audit/choice.py",
        _BOUNDS,
        ("coins forgotten", "taken = generator.random(size) < rate", "taken = generator.random(size) < 1"),
        ("always every coin", "if share > best:", "if share > best + 10:"),
    ),
    *group(
        "fl_lightning/audit/readings.py",
        _READINGS,
        ("half a shift", "half = length.square() / 2", "half = length.square()"),
        ("no mixture", "return np.logaddexp(np.log1p(-rate), np.log(rate) + ratio)", "return np.log(rate) + ratio"),
        ("noise as stated whatever is seen", "np.clip(seen, _LEAST_NOISE, 1.0)", "np.ones_like(seen)"),
        ("more noise trusted less", "np.clip(seen, _LEAST_NOISE, 1.0)", "np.maximum(seen, _LEAST_NOISE)"),
    ),
    *group(
        "fl_lightning/audit/canary.py",
        _READINGS,
        ("no weight", "factor = weight * factor / policy.noise_scale", "factor = factor / policy.noise_scale"),
        ("joint as by layer", 'if config.clipping == "joint":', "if False:"),
        ("the label forgotten", "return HUGE * sign.to(value) * value", "return HUGE * value"),
    ),
    *group(
        "fl_lightning/audit/sum_copy.py",
        _READINGS,
        ("earlier noise left in", "pieces = [p - coefficient * o", "pieces = [p - 0.0 * coefficient * o"),
    ),
    *group(
        "fl_lightning/audit/local_copy.py",
        _COPIES,
        ("canaries always there", "return replace(batch, mask=batch.mask * there[:, None])", "return batch"),
        ("rounds by the ledger", "rounds = finished.participations(client)", "rounds = max(1, len(finished.releases) // finished.data.num_clients // 2)"),
    ),
    *group(
        "fl_lightning/audit/last_model.py",
        _COPIES,
        ("only the last release is in it", "moved[clients] += self.factor", "moved[clients] = self.factor"),
    ),
    *group(
        "fl_lightning/audit/finished.py",
        _COPIES,
        ("every round counted", "client in row and not bool(", "not bool("),
        ("no guarantee asked for", "if not charged or not proven:", "if not charged:"),
    ),
    *group(
        "fl_lightning/audit/audit.py",
        _COMMAND,
        ("as much as proven fails", "return self.main.shown <= self.proven", "return self.main.shown < self.proven"),
    ),
    *group(
        "fl_lightning/audit/report.py",
        _COMMAND,
        ("a partial file stays", "partial.unlink(missing_ok=True)", "pass"),
    ),
]  # fmt: skip
