"""Mistakes in runs whose rounds share noise: what they cost, what they draw again, what they say."""

from __future__ import annotations

from tests.mutation.mutations import group

_RUNS = "tests/fl_lightning/test_correlated.py"
_RELEASED = "tests/fl_lightning/test_correlated_runs.py"
_BOTH = f"{_RUNS} {_RELEASED}"
_RESUME = "tests/fl_lightning/test_correlated_resume.py"
_EDITS = "tests/fl_lightning/test_ledger_edits.py::test_an_edit_of_shared_noise_is_found"
_NO_PLAN = (
    "tests/fl_lightning/test_ledger_edits.py::test_combined_noise_without_coefficients_is_found"
)

MUTATIONS = [
    *group(
        "fl_lightning/accounting/correlated.py",
        _BOTH,
        ("charged up to the last participation", "np.sqrt((v**2).sum(0))", "np.sqrt((v[: rounds.max(initial=0) + 1] ** 2).sum(0))"),
        ("a band is missing", "for j in range(1, min(len(d), t + 1)):", "for j in range(1, min(len(d) - 1, t + 1)):"),
        ("another column", "np.add.at(v, (rounds[mine], clients[mine] - start), sizes[mine])", "np.add.at(v, (np.minimum(rounds[mine] + 1, horizon - 1), clients[mine] - start), sizes[mine])"),
        ("coefficients that add noise up", "math.isfinite(d) and d <= 0", "math.isfinite(d)"),
        ("a round beyond the plan", "rounds.max() < horizon):", "rounds.max() <= horizon):"),
        ("tails of one round alone", "SamplerCost(horizon * one.epsilon, horizon * one.delta)", "one"),
        ("rounds given up are taken back", "if released(round - j)]", "]"),
        ("a member in the place of the worst", "whole = max(float(plan.sizes_of_one.whole[members].max()), 1.0)", "whole = max(float(plan.sizes_of_one.whole[members].min()) * 0.9, 1.0)"),
        ("a round charged as the run", "calibrate_charged(run, 1, epsilon, delta, extra) * whole", "calibrate_charged(run, 1, epsilon, delta, extra)"),
        ("tails of other rounds", "one = cost(replace(event, noise_multiplier=1 / largest))", "one = cost(replace(event, noise_multiplier=1e9))"),
    ),
    *group(
        "fl_lightning/accounting/cohort.py",
        _BOTH,
        ("another order in each pass", "0 if one_order else passes", "passes"),
    ),
    *group(
        "fl_lightning/server/optimizer.py",
        _BOTH,
        ("the schedule is not looked at", "rates.append(float(group[\"lr\"]))", "rates.append(1.0)"),
        ("momentum of Adam", "group.get(\"betas\", [0.0])[0]", "0.0"),
    ),
    *group(
        "fl_lightning/keys/released_noise.py",
        _BOTH,
        ("noise bound to the round alone", "hidden = [of_round] if round_key.simulated else [of_round, *values]", "hidden = [of_round]"),
        ("noise not bound to the round", "else [of_round, *values]", "else list(values)"),
        ("a changed file", "if public_name(key) != name:", "if False:"),
        ("torn lines", "f\"\\n{line}\\n\"", "f\"{line}\\n\""),
        ("digests cut short", "len(p) == 2 and len(p[1]) == 64", "len(p) == 2"),
        ("a file that others can read", "if mode & 0o077:", "if False:"),
    ),
    *group(
        "fl_lightning/privacy/noised_sum.py",
        _BOTH,
        ("a round that shares nothing", "Correlation((1.0, *self.coefficients), tuple((key, 0) for key in self.earlier))", "Correlation((1.0,), ())"),
        ("one band less", "tuple((key, 0) for key in self.earlier)", "tuple((key, 0) for key in self.earlier[:1])"),
        ("noise of release norms", "return math.hypot(1.0, *self.coefficients)", "return 1.0"),
        ("independent noise in layers", "            form=config.noise_form,\n            correlation=self._correlation(),", "            form=config.noise_form,\n            correlation=None,"),
    ),
    *group(
        "fl_lightning/privacy/mechanism.py",
        f"{_RELEASED}::test_votes_share_noise_as_layers_do",
        ("independent noise in votes", "correlation=correlation,", "correlation=None,"),
    ),
    *group(
        "fl_lightning/release/summed.py",
        f"{_BOTH} {_RESUME}",
        ("keys of the round alone", "return update, key if total.shared is None else total.key", "return update, key"),
        ("rounds that were combined are not said", "combined=None if plan is None else tuple(r for r, _, _ in self._earlier(round)),", "combined=None,"),
        ("a round is released twice", "        if self.noise is not None:\n            _LOG", "        if False:\n            _LOG"),
        ("tails of other clients", "own = own / plan.sizes_of_one.largest[ids]", "own = own * 2"),
    ),
    *group(
        "fl_lightning/accounting/budget.py",
        f"{_BOTH} {_RESUME}",
        ("a round is paid for twice", "if self.plan is not None and not self._is_new(release.round):", "if False:"),
        ("coefficients are not kept", "state[\"coefficients\"] = list(self.plan.coefficients)", "pass"),
    ),
    *group(
        "fl_lightning/run.py",
        _RESUME,
        ("a lost file of noise", "        noise.find(release.binding)", "        pass"),
        ("coefficients are chosen again", "return tuple(spec.resumed[\"budget\"].get(\"coefficients\", (1.0,)))", "pass"),
    ),
    *group(
        "fl_lightning/run_ledger.py",
        _RESUME,
        ("another plan", "if any(ledger.header.get(name) != plain(value) for name, value in facts.items()):", "if False:"),
    ),
    *group(
        "fl_lightning/resumption.py",
        _RESUME,
        ("checkpoints that do not know an option", "promised = flat_options(PrivacyConfig()) | dict(promised)", "promised = dict(promised)"),
    ),
    *group(
        "fl_lightning/ledger/statement.py",
        f"{_RELEASED}::test_the_statement_says_what_is_charged_and_how_groups_fare",
        ("shared noise composed round by round", "    if header.get(\"coefficients\") is None:\n        return \"privacy loss", "    if True:\n        return \"privacy loss"),
        ("sensitivity of a round as that of the run", "        weight += (", "        str("),
    ),
    *group(
        "fl_lightning/ledger/statement_assumptions.py",
        f"{_RELEASED}::test_the_statement_says_what_is_charged_and_how_groups_fare",
        ("rounds that were fixed beforehand", "if header.get(\"coefficients\") is not None:", "if False:"),
    ),
    *group(
        "fl_lightning/values/release.py",
        f"{_RELEASED}::test_a_line_says_which_rounds_it_combined",
        ("combined rounds in any order", "if not all(0 <= b < a for a, b in itertools.pairwise(later)):", "if not all(0 <= b for b in later):"),
        ("combined rounds are not written", "names = names if release.combined is None else (*names, _OF_CORRELATED)", "pass"),
        ("combined rounds are not read", "if entry.get(_OF_CORRELATED) is not None:", "if False:"),
        ("combined noise of one client", "for name in (*_OF_SUMS, _OF_CORRELATED)):", "for name in _OF_SUMS):"),
    ),
    *group(
        "fl_lightning/ledger/accounts.py",
        _BOTH,
        ("a client's weight of every round", "sizes=np.concatenate(sizes),", "sizes=None,"),
        ("all rounds as the first", "rounds=np.repeat([r.round for r in releases]", "rounds=np.repeat([0 for r in releases]"),
        ("rounds are not counted", "account.rounds, account.largest = times, largest", "account.largest = largest"),
        ("one by one", "if header.get(\"coefficients\") is not None:", "if False:"),
    ),
    *group(
        "fl_lightning/accounting/group_privacy.py",
        _BOTH,
        ("one client for a group of sums", "joint=math.fsum(_joint(a.counts) for a in members)", "joint=_joint(members[0].counts)"),
        ("one client's largest round", "reverse=True)[:size])\n    exact", "reverse=True)[:1])\n    exact"),
    ),
    *group(
        "fl_lightning/ledger/correlated_checks.py",
        _EDITS,
        ("any setting", "if stated != needed:", "if False:"),
        ("planned steps", "if not (fits and", "if not (True or"),
        ("sensitivities", "        yield \"sensitivity is not that of", "        return\n        yield \"sensitivity is not that of"),
        ("a round's cost for the run's", "event, whole / z, largest / z, plan.horizon,", "event, 1 / z, largest / z, plan.horizon,"),
        ("rounds beyond the plan", "if round >= plan.horizon:", "if round > plan.horizon:"),
        ("rounds twice", "if before and round <= max(before):", "if before and round < max(before):"),
        ("clients of other rounds", "if len(strangers):", "if False:"),
        ("what was combined", "if release.combined != wanted:", "if False:"),
    ),
    *group(
        "fl_lightning/ledger/correlated_checks.py",
        _NO_PLAN,
        ("combined noise of independent rounds", "    if release.combined is not None:", "    if False:"),
    ),
    *group(
        "fl_lightning/ledger/header_checks.py",
        _EDITS,
        ("coefficients in an older schema", "if correlated != (header[\"schema\"] == CORRELATED_SCHEMA):", "if False:"),
        ("the plan is not looked at", "        yield from check_plan(header)", "        yield from ()"),
        ("affordable steps of a plan", "if not (affordable == planned).all():", "if False:"),
    ),
    *group(
        "fl_lightning/ledger/client_reports.py",
        _EDITS,
        ("tails of a run", "multipliers = multipliers / plan.sizes_of_one.largest[ids]", "multipliers = multipliers * 1e3"),
    ),
    *group(
        "fl_lightning/ledger/run_checks.py",
        _RESUME,
        ("coefficients of the checkpoint", "if known != header.get(\"coefficients\"):", "if False:"),
    ),
    *group(
        "fl_lightning/privacy/combinations.py",
        _BOTH,
        ("settings without a proof", "config.setting != \"client+aggregator\",\n            \"only the trusted", "False,\n            \"only the trusted"),
        ("mechanisms without a proof", "config.mechanism != \"gaussian\", \"only Gaussian", "False, \"only Gaussian"),
        ("the grid form", "config.noise_form == \"grid\",\n            \"its multiples", "False,\n            \"its multiples"),
        ("secret cohorts", "config.cohort_sampling != \"fixed\",", "config.cohort_sampling == \"poisson\","),
        ("clients that leave early", "target is not None or 0 in values", "0 in values"),
        ("no noise", "target is not None or 0 in values", "target is not None"),
        ("too many bands", "2 <= config.bands <= MOST_BANDS", "1 <= config.bands <= 65"),
        ("bands without correlation", "if config.bands != 2:", "if False:"),
    ),
]  # fmt: skip
