"""Mistakes in attacks: what they see, how they are scored, and what they must not do."""

from __future__ import annotations

from tests.mutation.mutations import group

_SCORES = "tests/fl_lightning/test_attack_scores.py"
_MEMBERSHIP = "tests/fl_lightning/test_attack_membership.py"
_INVERSION = "tests/fl_lightning/test_attack_inversion.py"

MUTATIONS = [
    *group(
        "fl_lightning/attacks/intervals.py",
        _SCORES,
        ("ties count whole", "(np.cumsum(counts) - (counts - 1) / 2)[index]", "np.cumsum(counts)[index]"),
        ("an interval of half the variance", "below.var(ddof=1) / m + above.var(ddof=1) / n", "below.var(ddof=1) / m"),
        ("one false alarm too many", "allowed = math.floor(rate * len(no) + 1e-9)", "allowed = math.floor(rate * len(no)) + 1"),
        ("an interval of a smaller share", "stats.beta.ppf(1 - tail, count + 1, of - count)", "stats.beta.ppf(1 - tail, count, of - count + 1)"),
    ),
    *group(
        "fl_lightning/attacks/likelihood.py",
        _SCORES,
        ("members on both sides", "outside, spread_out = _gaussian(shadows, ~member)", "outside, spread_out = _gaussian(shadows, member)"),
        ("the density without its width", " - np.log(spread)\n", "\n"),
        ("confidences of float32", "outputs = outputs.double() if", "outputs = outputs.float() if"),
        ("losses that are not scaled", "return -losses - np.log(-np.expm1(-losses))", "return -losses"),
    ),
    *group(
        "fl_lightning/attacks/shadows.py",
        _MEMBERSHIP,
        ("shadows without noise", "budget.multiplier = plan.multiplier.repeat(count)", "budget.multiplier = 0 * plan.multiplier.repeat(count)"),
        ("shadows with less noise", "budget.multiplier = plan.multiplier.repeat(count)", "budget.multiplier = 2 / 3 * plan.multiplier.repeat(count)"),
        ("all shadows have the model of the first", "networks = [copy.deepcopy(module.network) for _ in range(count)]", "networks = [copy.deepcopy(module.network)] * count"),
        ("records in order", "np.random.default_rng([seed, s, 1]).permutation(row)", "np.sort(row)"),
    ),
    *group(
        "fl_lightning/local/training.py",
        _MEMBERSHIP,
        ("the models of all federations are taken for one", "params, shared = global_params, not stacked", "params, shared = global_params, True"),
    ),
    *group(
        "fl_lightning/attacks/membership.py",
        _MEMBERSHIP,
        ("a swap is bounded as one use", "risks.worst.power(once)", "once"),
    ),
    *group(
        "fl_lightning/attacks/attacked.py",
        _MEMBERSHIP,
        ("a replay of something else", "known.get((line.client, line.round, line.evaluation)) != line.digest", "False"),
        ("the run's own folder is trained in", "module.run_dir = str(folder)", "module.run_dir = str(run.folder)"),
    ),
    *group(
        "fl_lightning/attacks/witness.py",
        _MEMBERSHIP,
        ("the server sees what it does not", "seen = replace(update, sim_only={})", "seen = update"),
    ),
    *group(
        "fl_lightning/attacks/files.py",
        _MEMBERSHIP,
        ("a file that is there before the others", 'path.with_name(f"{path.name}.partial")', "path"),
    ),
    *group(
        "fl_lightning/attacks/victim.py",
        _INVERSION,
        ("a release without noise", "budget.multiplier = torch.tensor([multiplier]", "budget.multiplier = torch.tensor([0.0 * multiplier]"),
        ("a gradient of the other sign", "factor = -1.0 / (rules.client_lr * steps)", "factor = 1.0 / (rules.client_lr * steps)"),
        ("coins that leave the record out", "return rules if rules.sampling_rate is None else replace(rules, sampling_rate=1.0)", "return rules"),
        ("noise of a record's sum", "v / records / steps**0.5", "v / steps**0.5"),
    ),
    *group(
        "fl_lightning/attacks/analytic.py",
        _INVERSION,
        ("the label of the largest number", "label = int(left.argmin())", "label = int(left.argmax())"),
        ("one label for all records", "left[label] += 1.0 / records", "pass"),
        ("tokens of noise", "stats.chi(rows.shape[1]).isf(1 / len(rows))", "stats.chi(rows.shape[1]).isf(0.5)"),
    ),
    *group(
        "fl_lightning/attacks/optimised.py",
        _INVERSION,
        ("a search for the opposite", "return 1 - product", "return 1 + product"),
    ),
]  # fmt: skip
