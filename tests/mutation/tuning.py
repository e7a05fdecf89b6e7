"""Mistakes in private evaluations and in what a charged search costs."""

from __future__ import annotations

from tests.mutation.mutations import group

_NOISE = "tests/fl_lightning/test_noised_counts.py"
_EVALUATION = "tests/fl_lightning/test_private_evaluation.py"
_SELECT = "tests/fl_lightning/test_repeat_and_select.py"
_TUNE = "tests/fl_lightning/test_tune.py"
_SWEEP = "tests/fl_lightning/test_tune_sweep.py"

MUTATIONS = [
    *group(
        "fl_lightning/privacy/noised_counts.py",
        _NOISE,
        ("two thirds of the noise", "return exact + noise, weights", "return exact + noise * 2 / 3, weights"),
        ("half as much noise again", "return exact + noise, weights", "return exact + noise * 1.5, weights"),
        ("no noise", "return exact + noise, weights", "return exact, weights"),
        ("answers without a bound", "torch.minimum(right.double().nan_to_num(0.0).clamp(min=0), records.double())", "right.double()"),
        ("numbers for shares", 'return counted if unit == "record" else counted / records.double()', "return counted"),
        ("all weigh the same", "weights = least / multipliers", "weights = torch.ones_like(multipliers)"),
    ),
    *group(
        "fl_lightning/ledger/accounts.py",
        _EVALUATION,
        ("evaluations of clients apart", 'apart = header["evaluation"]["apart"]', "apart = True"),
        ("evaluations of records composed", 'apart = header["evaluation"]["apart"]', "apart = False"),
        ("evaluations are free", "own = account.held_out if apart else account.charges\n", "own = {}\n"),
    ),
    *group(
        "fl_lightning/accounting/evaluation.py",
        _EVALUATION,
        ("nothing is composed with updates", "if self.apart:\n            return None", "return None"),
        ("one evaluation is planned", "own, self.times, evaluation_cost", "own, 1, evaluation_cost"),
    ),
    *group(
        "fl_lightning/release/evaluation.py",
        _EVALUATION,
        ("more than was planned", "if paid[i] or books.budget.can_pay(line)]", "]"),
        ("seen before it is written", "write_lines(books, fresh)", "pass"),
        ("the same noise for other answers", "redraw += 1", "break"),
    ),
    *group(
        "fl_lightning/ledger/evaluation_checks.py",
        _EVALUATION,
        ("lines of less noise", 'if "client" not in problems and release.noise_multiplier != z:', "if False:"),
        ("lines of another round", "if not is_due(release.round,", "if False and not is_due(release.round,"),
        ("a removed line", "if release.first_step != made[release.client]:", "if False:"),
        ("any multiplier of the header", "if not least * (1 - _ROUNDING) <= z", "if False and not least <= z"),
    ),
    *group(
        "fl_lightning/accounting/repeat_and_select.py",
        _SELECT,
        ("the choice is free", "return (1 + number.shape) * math.log(float(odds.max()))", "return 0.0"),
        ("half the loss of the choice", "return (1 + number.shape) * math.log", "return (1 + number.shape) / 2 * math.log"),
        ("the shape is left out", "return (1 + number.shape) * math.log", "return math.log"),
        ("a poisson number is free", "return number.mean * advantage", "return advantage"),
        ("delta is not divided", "part = delta / max(1.0, number.mean)", "part = delta"),
        ("tails are left out", "compose_epsilon(counts, part - tails) + inflation", "compose_epsilon(counts, part)"),
        ("a fixed number", "while below <= uniform and", "while number < self.mean and"),
        ("half the mean", "<= self.mean else (middle, high)\n        return math.exp(low)", "<= self.mean / 2 else (middle, high)\n        return math.exp(low)"),
    ),
    *group(
        "fl_lightning/ledger/search_checks.py",
        _TUNE,
        ("any loss", "if most > loss[client] * _ROUNDING:", "if False:"),
        ("any epsilon", "if (own_epsilon + loss > total * _ROUNDING).any():", "if False:"),
        ("any delta", "if (own_delta > delta / max(1.0, number.mean) * _ROUNDING).any():", "if False:"),
    ),
    *group(
        "fl_lightning/tune/search.py",
        _TUNE,
        ("a number drawn again", 'self.key.derive("number of candidates")', 'self.key.derive("number", len(self._entries))'),
        ("one noise for all candidates", "if self.seed is not None:  # else", "if False:  # else"),
        ("the worst for the best", "scores.index(max(scores))", "scores.index(min(scores))"),
        ("written after it has begun", 'self._write({"kind": "candidate", "candidate": index, "options": options})', "pass"),
        ("all of the summary", "if not k.startswith(_HIDDEN)}", "}"),
    ),
    *group(
        "fl_lightning/tune/plan.py",
        _TUNE,
        ("all of epsilon for each", '"epsilon": [b.epsilon * shrink for b in budgets],', '"epsilon": [b.epsilon + b.loss for b in budgets],'),
        ("candidates log", '"trainer.logger": False,', '"trainer.logger": None,'),
        ("fixed options are not checked", 'check_given([f"--{name}" for name in self.fixed])', "pass"),
    ),
    *group(
        "fl_lightning/tune/sweep.py",
        _SWEEP,
        ("any method", 'if sweep.get("method") != "random":', "if False:"),
        ("a cap for a mean is dropped", 'if "run_cap" in sweep:', "if False:"),
        ("stopping at a score", 'if "target" in metric:', "if False:"),
        ("any early end", 'if key == "early_terminate":', "if False:"),
        ("exponents for values", '"log_uniform_values": (_RANGE, _of("log_uniform")),', '"log_uniform_values": (_RANGE, _exponents),'),
        ("an inverse that is not turned", "_exponents(-high, -low)", "_exponents(low, high)"),
        ("weights are dropped", 'if "probabilities" in given:', "if False:"),
    ),
    *group(
        "fl_lightning/tune/space.py",
        _SWEEP,
        ("the last integer is never drawn", "endpoint=True", "endpoint=False"),
        ("no steps", "if len(values) > 2 else found", "if False else found"),
        ("a normal law of variance", "return generator.normal(mean, deviation)", "return generator.normal(mean, deviation**2)"),
    ),
    *group(
        "fl_lightning/tune/search.py",
        _SWEEP,
        ("fixed options may change", 'fixed = {"fixed": dict(self.plan.fixed)} if self.plan.fixed else {}', "fixed = {}"),
    ),
]  # fmt: skip
