"""Mistakes in what the statement says of groups, and of what is simulated."""

from __future__ import annotations

from tests.mutation.mutations import group

GROUPS = "tests/fl_lightning/test_group_privacy.py"
STATEMENT = "tests/fl_lightning/test_statement.py"

GROUP_STEPS = group(
    "fl_lightning/accounting/group_privacy.py",
    GROUPS,
    ("a group moves by 2/3", "(size * move,), (1.0,))", "(2 / 3 * size * move,), (1.0,))"),
    ("records of a group move by 3/2", "tuple(k * move for k, _ in kept)", "tuple(1.5 * k * move for k, _ in kept)"),
    ("exchanged records move as far as the difference of two", "tuple(k * move / 2 for k, _ in kept)", "tuple(k * move for k, _ in kept)"),
    ("exchanged records move by 2/3", "tuple(k * move / 2 for k, _ in kept)", "tuple(k * move / 3 for k, _ in kept)"),
    ("one coin for the whole group", "stats.binom.pmf(k, size, rate)", "stats.binom.pmf(k, size, rate**size)"),
    ("joint Gaussian of records moves once", "joint=size * _joint(counts)", "joint=_joint(counts)"),
    ("joint Gaussian of records 3/2", "joint=size * _joint(counts)", "joint=1.5 * size * _joint(counts)"),
    ("independent noises added like one", "joint = math.sqrt(math.fsum(_joint(a.counts) ** 2 for a in members))", "joint = math.fsum(_joint(a.counts) for a in members)"),
    ("the clients with the most noise", "members = sorted(accounts, key=lambda a: -_joint(a.counts))[:size]", "members = sorted(accounts, key=lambda a: _joint(a.counts))[:size]"),
    ("one client's steps for all", "{_records(event, 1): n * size for", "{_records(event, 1): n for"),
    ("clients of a sum like independent ones", "joint = math.fsum(sorted((_joint(a.counts) for a in accounts), reverse=True)[:size])", "joint = math.sqrt(math.fsum(sorted((_joint(a.counts) ** 2 for a in accounts), reverse=True)[:size]))"),
    ("least sensitive clients of a sum", "joint = math.fsum(sorted((_joint(a.counts) for a in accounts), reverse=True)[:size])", "joint = math.fsum(sorted(_joint(a.counts) for a in accounts)[:size])"),
    ("different rounds called exact", "a.rounds == order[0][2].rounds for _, _, a in order)", "True for _, _, a in order)"),
    ("rounding up called exact", "and not rounded and", "and"),
    ("sums rounded down", "math.ceil(total / grid * (1 - 1e-12)) * grid\n            law[max(up, total)] = law.get(max(up, total), 0.0) + weight", "math.floor(total / grid) * grid\n            law[up] = law.get(up, 0.0) + weight"),
    ("coins of clients 2/3", "grown.get(total + move, 0.0) + weight * rate", "grown.get(total + move, 0.0) + weight * rate * 2 / 3"),
    ("most noise of all clients", "noise_multiplier=min(e.noise_multiplier for e in events)", "noise_multiplier=max(e.noise_multiplier for e in events)"),
    ("fewest steps of all clients", "counts = {worst: max(sum(a.counts.values())", "counts = {worst: min(sum(a.counts.values())"),
    ("bounds called exact", "return counts, alike > 0, alike", "return counts, True, alike"),
    ("exchange called exact", "exact and not any(e.sampled_replacement for e in counts)", "exact"),
    ("delta of a Gaussian at 3/2 of epsilon", "shift / 2 - epsilon / shift))\n    second", "shift / 2 - 1.5 * epsilon / shift))\n    second"),
    ("too small deltas composed finely", "near and delta >= SMALLEST_PLD_DELTA and", "near and"),
)  # fmt: skip

MIXTURES = group(
    "fl_lightning/accounting/shift_mixtures.py",
    GROUPS,
    ("pure epsilon without the shifts", "[math.log(w) + s for w, s in", "[math.log(w) for w, s in"),
    ("only with the group's data", "return [remove] if step.exchange is not None else [remove, profile(_backward, -high, -low)]", "return [remove]", "the direction with the group's data is the larger one for all mixtures tried"),
    ("only without the group's data", "return [remove] if step.exchange is not None else [remove, profile(_backward, -high, -low)]", "return [remove] if step.exchange is not None else [profile(_backward, -high, -low)]"),
    ("Laplace noise of half the scale", "terms = -(far**2) / 2 if self.mechanism == \"gaussian\" else -np.abs(far)", "terms = -(far**2) / 2 if self.mechanism == \"gaussian\" else -2 * np.abs(far)"),
    ("Laplace tails of double mass", "np.exp(-np.abs(x)) / 2, 1", "np.exp(-np.abs(x)), 1"),
    ("exchange to one side", "(np.array([0.0, -s]), coins)", "(np.array([0.0, 0.0]), coins)"),
)  # fmt: skip

TAILS = group(
    "fl_lightning/accounting/group_tails.py",
    GROUPS,
    ("shift of one unit for a group", "n * math.fsum(w * sampler.leaves(s) for w, s", "n * math.fsum(w * sampler.leaves(m.shifts[0] or m.shifts[1]) for w, s"),
    ("range of pairs not reached by long shifts", "shift**2 * steepest)", "steepest)"),
    ("range 3/2", "reach = min(shift, cutoff - 1)", "cutoff *= 1.5\n    reach = min(shift, cutoff - 1)"),
    ("inflation of one step", "extra, leaves = steps * sampler.inflation, _leaving", "extra, leaves = sampler.inflation, _leaving"),
    ("outputs without the group's data free", "lost = max(forward, leaves) + missing", "lost = forward + missing"),
    ("shares of one hand", "return self.streams * (self.noise_parts or 1)", "return self.streams"),
)  # fmt: skip

WORDS = group(
    "fl_lightning/ledger/statement_groups.py",
    STATEMENT,
    ("sums like independent noises", "select = in_one_sum if header[\"setting\"] in SUMMED else apart", "select = apart"),
    ("independent noises like sums", "select = in_one_sum if header[\"setting\"] in SUMMED else apart", "select = in_one_sum"),
    ("groups larger than the population", "sizes = [g for g in GROUPS if g <= most and clients]", "sizes = list(GROUPS)"),
    ("sum of everybody charged to nobody", "for client in release.members(len(found)).tolist():", "for client in release.members(0).tolist():"),
    ("steps of a sum not counted", "rounds[client][release.round] += release.steps", "rounds[client][release.round] = 1"),
)  # fmt: skip

ASSUMED = group(
    "fl_lightning/ledger/statement_assumptions.py",
    STATEMENT,
    ("exact gradients of clients", "if header[\"setting\"] == \"record+local\":\n        lines.append(\n            \"- Exact", "if True:\n        lines.append(\n            \"- Exact"),
    ("philox7 called pseudorandom", "if rng in NO_BASIS:", "if False:"),
    ("philox10 without its limits", "_PHILOX if rng.startswith('philox') else ''", "''"),
    ("transforms claimed as checked", "checked if header.get('transform_checked') else ''", "checked"),
    ("sampling claimed everywhere", "sampled = any(r.sampling_rate < 1 for r in releases)", "sampled = True"),
)  # fmt: skip

SAID = group(
    "fl_lightning/ledger/statement.py",
    STATEMENT,
    ("charges of everybody forgotten", "show_number(everybody + max(", "show_number(max("),
    ("lines of a sum counted as releases", "{(r.round, r.binding, r.digest) for r in releases}", "{(r.round, r.client) for r in releases}"),
    ("public cohorts called secret", "    if sampled:\n        return _ADVERSARY[setting].format(\", keeps", "    if True:\n        return _ADVERSARY[setting].format(\", keeps"),
)  # fmt: skip

SIMULATED = group(
    "fl_lightning/privacy/simulated.py",
    STATEMENT,
    ("public seeds protect", "\"public seed\" if privacy.seed is not None else None", "None"),
)  # fmt: skip

MUTATIONS = [*GROUP_STEPS, *MIXTURES, *TAILS, *WORDS, *ASSUMED, *SAID, *SIMULATED]
