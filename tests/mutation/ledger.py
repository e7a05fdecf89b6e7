"""Mistakes in what `ledger verify` compares and in what a line of a sum costs each client."""

from __future__ import annotations

from tests.mutation.mutations import group

_VERIFY = "tests/fl_lightning/test_ledger_verify.py"
_STREAMS = "tests/fl_lightning/test_ledger_streams.py"
_EDITS = "tests/fl_lightning/test_ledger_edits.py"
_ACCOUNTS = "tests/fl_lightning/test_sum_accounts.py"
_RELEASES = f"{_EDITS}::test_an_edit_of_releases_is_found"
_SUMS = f"{_EDITS}::test_an_edit_of_sums_is_found"
_COINS = f"{_EDITS}::test_an_edit_of_secret_cohorts_is_found"
_GRID = f"{_EDITS}::test_a_grid_follows_from_the_noise_of_its_line"
_HONEST = f"{_VERIFY}::test_an_honest_run_has_no_problems"
_DEFINED = f"{_ACCOUNTS}::test_a_clients_multiplier_is_that_of_its_weight"
_WHO = f"{_ACCOUNTS}::test_who_was_in_a_sum_pays_and_nobody_else"
_COHORTS = f"{_ACCOUNTS}::test_cohorts_of_unequal_clients_are_charged_by_their_own_largest"
_COSTLIEST = f"{_ACCOUNTS}::test_a_sum_states_what_its_costliest_client_pays_for_inexact_noise"

LINES = [
    *group(
        "fl_lightning/ledger/line_checks.py",
        _RELEASES,
        ("nothing is compared", "if \"planned_steps\" in header:", "if \"planned_steps\" not in header:"),
        ("the header is not looked at", "found = check_header(header)", "found = []"),
        ("lines are not compared with the header", "for problem in _against_header(header, release, noise)", "for problem in ()"),
        ("steps are not counted", "        in_order += steps(line, release)", "        pass"),
        ("single releases under a sum's header", "release.is_sum != (setting in SUMMED):", "release.is_sum and setting not in SUMMED:"),
        ("a line of everybody among single ones", "if release.client == ALL_CLIENTS and setting not in SUMMED:", "if False:"),
        ("mechanism of lines", "(release.mechanism, header[\"mechanism\"])", "(0, 0)"),
        ("adjacency of lines", "(release.adjacency, header[\"adjacency\"])", "(0, 0)"),
        ("guarantee of lines", "(release.guarantee, setting != \"abstract\")", "(0, 0)"),
        ("layers of lines", "(release.num_layers, len(header[\"dims\"]))", "(0, 0)"),
        ("votes of lines", "(release.vote_noise_scale is not None, header[\"thresholds\"] == \"quantile\")", "(0, 0)"),
        ("grid of lines", "(release.quantum is not None, header[\"noise_form\"] == \"grid\")", "(0, 0)"),
        ("rate of lines", "(release.sampling_rate, _rate(header, release))", "(0, 0)"),
        ("a client one too many", "if last >= everyone:", "if last > everyone:"),
        ("noise is not compared", "yield from noise(release)", "yield from ()"),
        ("more noise in lines than calibrated", "if release.noise_multiplier != z:", "if release.noise_multiplier < z:"),
        ("less noise in lines than calibrated", "if release.noise_multiplier != z:", "if release.noise_multiplier > z:"),
        ("noise of votes", "release.vote_noise_scale, wanted, rel_tol=1e-9)", "release.vote_noise_scale, wanted, rel_tol=1.0)"),
        ("attempts are not counted", "if release.attempt != attempts:", "if False:"),
        ("lines removed", "if release.first_step != before:", "if release.first_step < before:"),
        ("lines repeated", "if release.first_step != before:", "if release.first_step > before:"),
        ("more steps than calibrated", "if spent[client] <= most[client]:", "if client >= 0:"),
        ("a step more than calibrated", "most = of_clients(header, \"affordable_steps\")", "most = of_clients(header, \"affordable_steps\") + 2"),
    ),
    *group(
        "fl_lightning/ledger/line_checks.py",
        _GRID,
        ("grid of the noise", "release.quantum, wanted, rel_tol=1e-9)", "release.quantum, wanted, rel_tol=1.0)"),
        ("grid of votes' part", "if release.vote_noise_scale is not None:\n        sums, _ =", "if release.vote_noise_scale is None:\n        sums, _ ="),
    ),
    *group(
        "fl_lightning/ledger/line_checks.py",
        _SUMS,
        ("steps of a sum", "stated[\"steps\"] = release.steps, 1", "pass"),
        ("clients of a sum", "else int(release.members(everyone)[-1])", "else int(release.members(everyone)[0])"),
        ("largest weight of a sum", "if release.largest_weight != largest:", "if False:"),
        ("too few in a sum", "if not least <= count <= most:", "if count > most:"),
        ("too many in a sum", "if not least <= count <= most:", "if least > count:"),
        ("a public cohort like a secret one", "most = header[\"clients_per_round\"]", "most = everyone"),
        ("who was in sums before", "release.spent != spent_digest(spent):", "not release.spent:"),
    ),
    *group(
        "fl_lightning/ledger/line_checks.py",
        _HONEST,
        ("the most noise of a sum", "float(z.min())", "float(z.max())"),
        ("lines have a step each", "        spent[client] += release.steps", "        spent[client] += 1"),
        ("who is not in a sum spends", "        spent[ids] += release.steps", "        spent += release.steps"),
    ),
    *group(
        "fl_lightning/ledger/line_checks.py",
        f"{_VERIFY}::test_ledgers_of_schema_0_are_read_and_verified",
        ("other noise later (schema 0)", "if not found and release.event != one.event:", "if False:"),
        ("rates of schema 0 like those of 1", "    if header.get(\"schema\"):\n        return header[\"sampling_rate\"]", "    if True:\n        return header[\"sampling_rate\"]"),
    ),
    *group(
        "fl_lightning/ledger/line_checks.py",
        _COHORTS,
        ("sums begin where a client ends", "before = number if release.is_sum else before", "before = before"),
    ),
    *group(
        "fl_lightning/ledger/line_checks.py",
        _COINS,
        ("rate of lines is the cohort's size", "        return header[\"sampling_rate\"]\n", "        return release.sampling_rate\n"),
    ),
]  # fmt: skip

HEADERS = [
    *group(
        "fl_lightning/ledger/header_checks.py",
        _RELEASES,
        ("missing facts", "    if missing:\n", "    if False:\n"),
        ("settings without a ledger", "    if setting not in _SETTINGS:\n", "    if False:\n"),
        ("unit and trust", "        if header[name] != value:\n", "        if False:\n"),
        ("adjacency of a setting", "if header[\"adjacency\"] not in adjacencies:", "if False:"),
        ("survivors of a setting", "if in_parts != (setting == \"client+secure_sum\"):", "if False:"),
        ("raw thresholds", "(raw and setting != \"abstract\") or ", ""),
        ("votes of single clients", " or (votes and setting == \"client+local\")", ""),
        ("lists of fewer clients", "if not isinstance(header[name], list) or len(header[name]) != num_clients(header):", "if False:"),
        ("layers and dims", "if len(header[\"layers\"]) != len(header[\"dims\"]):", "if False:"),
        ("cutoff of the form", "if header[\"tail_cutoff\"] != (cutoff if math.isfinite(cutoff) else None):", "if False:"),
        ("share of votes", "if (header[\"vote_share\"] > 0) != (header[\"thresholds\"] == \"quantile\"):", "if False:"),
        ("noise of fewer clients", "for name in (\"weights\", \"noise_multiplier\", \"affordable_steps\"):", "for name in ():"),
        ("calibration is not looked at", "list(_rules(header)) or list(_calibration(header))", "list(_rules(header))"),
        ("no limit for an epsilon", "if limited != bool(np.isfinite(target).any()):", "if False:"),
        ("steps that were not planned", "steps != most:", "steps < 0:"),
        ("too little noise", "if spent > epsilon * (1 + _ROUNDING):", "if False:"),
        ("two thirds of the noise are near", "_SLACK, _ROUNDING = 0.05, 1e-3", "_SLACK, _ROUNDING = 0.05, 1.0"),
        ("three halves of the noise are near", "_SLACK, _ROUNDING = 0.05, 1e-3", "_SLACK, _ROUNDING = 0.7, 1e-3"),
        ("too much noise", "return \"\" if least else f\"{where}, far below", "return \"\" if True else f\"{where}, far below"),
        ("half the steps", "return charged_epsilon(event, times, delta, extra, beside)", "return charged_epsilon(event, max(times // 2, 1), delta, extra, beside)"),
        ("a rate of 1", "event = NoiseEvent(header[\"mechanism\"], z, header[\"sampling_rate\"], header[\"adjacency\"])\n        return event, steps", "event = NoiseEvent(header[\"mechanism\"], z, 1.0, header[\"adjacency\"])\n        return event, steps"),
    ),
    *group(
        "fl_lightning/ledger/header_checks.py",
        _SUMS,
        ("coins of another setting", "if header.get(\"cohort_rate\") is not None and setting != \"client+aggregator\":", "if False:"),
        ("weights of a setting", "if (header[\"weights\"] is not None) != summed:", "if False:"),
        ("weights that were not asked for", "if not (of_clients(header, \"weights\") == wanted).all():", "if False:"),
        ("rate of sums", "if setting != \"record+local\" and header[\"sampling_rate\"] != (rate or 1.0):", "if False:"),
    ),
    *group(
        "fl_lightning/ledger/header_checks.py",
        _COINS,
        ("rate of a cohort of another size", "if rate is not None and rate != size / everyone:", "if False:"),
    ),
    *group(
        "fl_lightning/ledger/header_checks.py",
        f"{_EDITS}::test_a_given_multiplier_must_allow_the_steps_it_is_said_to",
        ("given noise of any size", "least = steps >= 10**9 or cost(multiplier, 2 * steps + 2) > epsilon", "least = True"),
    ),
    *group(
        "fl_lightning/header.py",
        _HONEST,
        ("noise of the first client", "    return values[0] if len(set(values)) == 1 else values", "    return values[0]"),
        ("equal weights", "_shared(sums.weights.tolist()) if sums else None", "1.0 if sums else None"),
        ("no coins", "\"cohort_rate\": sums.rate if sums else None", "\"cohort_rate\": None"),
        ("no survivors", "\"min_survivors\": sums.survivors if sums else None", "\"min_survivors\": None"),
        ("every multiplier was calibrated", "privacy.noise_multiplier is not None,", "False,"),
        ("no share of votes", "\"vote_share\": privacy.votes,", "\"vote_share\": 0.0,"),
        ("no limit of steps", "if limited else None,\n        \"simulated\"", "if not limited else None,\n        \"simulated\""),
    ),
]  # fmt: skip

FILES = [
    *group(
        "fl_lightning/ledger/run_checks.py",
        f"{_VERIFY}::test_rounds_dropped_at_the_end_contradict_the_other_files",
        ("no checkpoint", "self._checkpoint(folder / \"checkpoints\" / \"last.ckpt\")", "pass"),
        ("no statement", "self._statement(folder / \"privacy_statement.md\")", "pass"),
        ("no summary", "self._summary(folder / \"summary.json\")", "pass"),
        ("heads of other ledgers", "            self.problems.append(f\"{name} names head {hashes[-1]}, which no line of the ledger has\")", "            pass"),
        ("missing lines", "if state[\"releases\"] > len(self.releases):", "if False:"),
    ),
    *group(
        "fl_lightning/ledger/run_checks.py",
        f"{_VERIFY}::test_a_checkpoint_of_another_ledger_is_found",
        ("a checkpoint of another run", "if header.get(fact, promised) != promised:", "if False:"),
        ("a checkpoint of other noise", "if header.get(\"schema\") and not _same(known, of_clients(header, \"noise_multiplier\")):", "if False:"),
        ("a checkpoint of another target", "if not _same(np.resize(promised, num_clients(header)), of_clients(header, fact)):", "if False:"),
        ("a checkpoint of no line", "elif state.get(\"ledger_head\"):", "elif False:"),
        ("a checkpoint of another number of releases", "place != state[\"releases\"] + 1:", "place < 0:"),
    ),
    *group(
        "fl_lightning/ledger/run_checks.py",
        f"{_VERIFY}::test_a_statement_and_a_summary_must_say_the_epsilon_of_the_ledger",
        ("epsilon of the statement", "wanted not in text:", "not text:"),
        ("epsilon of the summary", "if stated is None or not _close(stated, spent):", "if stated is None:"),
    ),
    *group(
        "fl_lightning/ledger/run_checks.py",
        f"{_VERIFY}::test_a_ledger_may_be_ahead_of_the_other_files",
        ("epsilon of the whole ledger", "accounts(self.header, islice(self.releases, line - 1))", "accounts(self.header, self.releases)"),
        ("files may not be older", "if known[-1] < last:", "if False:"),
    ),
    *group(
        "fl_lightning/ledger/verdict.py",
        f"{_VERIFY}::test_a_head_names_its_line {_VERIFY}::test_a_head_does_not_hide_another_problem "
        f"{_VERIFY}::test_a_head_that_two_lines_begin_with_is_ambiguous",
        ("any text is a hash", "if head is not None and not re.fullmatch(", "if head is None and not re.fullmatch("),
        ("three digits are a hash", "SHORTEST = 16", "SHORTEST = 3"),
        ("a head that is missing is a note", "(notes if named else problems).append(words)", "notes.append(words)"),
        ("a head that is missing is no problem", "    if not lines:\n        return False,", "    if not lines:\n        return True,"),
        ("capital letters", "_named(head.lower(), chain.hashes(file))", "_named(head, chain.hashes(file))"),
        ("the first of several lines", "if len(lines) > 1:", "if len(lines) > 9:"),
        ("a head in place of all checks", "[] if header is None else _contradictions(header, lines)", "[] if head else _contradictions(header, lines)"),
        ("later lines are not counted", "later = last - lines[0]", "later = 0"),
    ),
    *group(
        "fl_lightning/ledger/verdict.py",
        _RELEASES,
        ("contradictions are not looked for", "        return contradictions(header, releases)", "        return []"),
    ),
    *group(
        "fl_lightning/ledger/line_checks.py",
        _RELEASES,
        ("inexact noise is free", "(undercharged_lines(header), [])]", "]"),
        ("what one line says is said of others", "release.client, release.steps, release.mechanism, release.noise_multiplier,", "release.steps, release.mechanism,"),
        ("lines that charge less are like others", "release.guarantee, release.epsilon_inflation, release.tail_delta,", "release.guarantee,"),
        ("repeated rounds are first ones", "        self._repeated[release.client, release.round] += 1\n", "        self._repeated[release.client, release.round] = 0\n"),
    ),
    *group(
        "fl_lightning/ledger/quick_lines.py",
        _STREAMS,
        ("any hash of a known form", "or stated.decode() != digest:", "or False:"),
        ("lines in any order", "previous.decode() != before", "False"),
        ("numbers in any spelling", "!= text or min(found) < 0:", "== b\"\" or min(found) < 0:"),
        ("numbers below 0", "or min(found) < 0:", "or False:"),
        ("any number of layers", "len(norms) != layers or len(parts) != layers", "len(norms) != layers"),
        ("zeros before a number", 'rb"(0|[1-9][0-9]{0,17})"', 'rb"([0-9]{1,18})"'),
        ("whoever reads first is right", "_SHARED = (1, 7, 9, 13, 15)", "_SHARED = (1, 7, 9, 13)"),
        ("a grid is that of the first line", "(values[\"quantum\"],) = grid", "(_,) = grid"),
    ),
    *group(
        "fl_lightning/ledger/survey.py",
        _STREAMS,
        ("rounds of the checkpoint are forgotten", "elif known is None or lines - 1 <= known:", "else:"),
        ("rounds begin a line late", "(round, found.before)", "(round, found.place)"),
        ("one round under way", "return Survey(found, header, then, *before)", "return Survey(found, header, then, *last)"),
    ),
    *group(
        "fl_lightning/ledger/chain.py",
        f"{_STREAMS} tests/fl_lightning/test_ledger.py",
        ("a head ahead of its file", "elif stated > self.lines:", "elif False:"),
        ("a head of another file", "elif there != digest or stated < 1:", "elif False:"),
        ("a file without a head", "if digest or self.lines > 1:", "if digest:"),
    ),
    *group(
        "fl_lightning/ledger/client_reports.py",
        _RELEASES,
        ("inexact noise of one step", "if charged < release.steps * least * (1 - 1e-9):", "if charged < least * (1 - 1e-9):"),
        ("tails are free", "(\"tail_delta\", cost.delta)):", "(\"tail_delta\", 0.0)):"),
    ),
    *group(
        "fl_lightning/ledger/file.py",
        f"{_VERIFY}::test_a_run_does_not_go_on_with_a_ledger_of_another_history",
        ("a run goes on with another ledger", "                _check_known(path, found, known)", "                pass"),
    ),
    *group(
        "fl_lightning/ledger/open_rounds.py",
        "tests/fl_lightning/test_ledger_sums.py -k copy",
        ("rounds are never forgotten", "self._forget(min(r.round for r in releases) - 1)", "pass"),
        ("forgotten rounds were never there", "return [r for r in self.all() if (r.client", "return [r for r in () if (r.client"),
    ),
]  # fmt: skip

ACCOUNTING = [
    *group(
        "fl_lightning/accounting/sum_costs.py",
        _DEFINED,
        ("two thirds of a client's multiplier", "return event_multiplier(weights, z, **rules)", "return 2 / 3 * event_multiplier(weights, z, **rules)"),
        ("three halves of a client's multiplier", "return event_multiplier(weights, z, **rules)", "return 1.5 * event_multiplier(weights, z, **rules)"),
        ("weights of the first clients", "(of_clients(header, name)[ids] for", "(of_clients(header, name)[: len(ids)] for"),
        ("everybody weighs the same", "return event_multiplier(weights, z, **rules)", "return event_multiplier(np.ones_like(weights), z, **rules)"),
        ("weights that were asked for", "return event_multiplier(weights, z, **rules)", "return event_multiplier(base / release.largest_weight, z, **rules)"),
        ("weights among all clients", "largest=release.largest_weight, **rules)", "largest=max(of_clients(header, \"weights\")), **rules)"),
        ("the client's noise for that of the sum", "return event_multiplier(weights, z, **rules)", "return event_multiplier(weights, float(calibrated.max()), **rules)"),
        ("votes are free", "\"vote_share\": float(header[\"vote_share\"])}", "\"vote_share\": 0.0}"),
        ("Laplace noise like Gaussian", "rules = {\"mechanism\": release.mechanism,", "rules = {\"mechanism\": \"gaussian\","),
    ),
    *group(
        "fl_lightning/accounting/sum_costs.py",
        _COSTLIEST,
        ("the client with the most noise", "least = float(multipliers[deltas == delta].min())", "least = float(multipliers[deltas == delta].max())"),
        ("the cheapest client", "max(c.delta for c in costs))", "min(c.delta for c in costs))"),
        ("costs at the largest delta", "costs.append(extra(own, delta))", "costs.append(extra(own, float(deltas.min())))"),
    ),
    *group(
        "fl_lightning/accounting/sum_costs.py",
        _SUMS,
        ("spent steps in any order", "np.ascontiguousarray(spent, dtype=\"<i8\")", "np.sort(np.ascontiguousarray(spent, dtype=\"<i8\"))"),
    ),
    *group(
        "fl_lightning/ledger/accounts.py",
        _WHO,
        ("absent clients are charged", "        times[ids] += count\n", "        times += count\n"),
        ("the last client is not charged", "    ids = np.flatnonzero(times)\n", "    ids = np.flatnonzero(times)[:-1]\n"),
        ("sums of one kind once", "        times[ids] += count\n", "        times[ids] += 1\n"),
        ("sums of the last set only", "        times[ids] += count\n", "        times[ids] = count\n"),
        ("charges are found once", "            own[charge] = own.get(charge, 0) + times\n", "            own[charge] = 1\n"),
        ("steps of a charge once", "counts[charge.event] += times * charge.steps", "counts[charge.event] += charge.steps"),
        ("a smaller epsilon is the largest", "largest = max(largest, account.epsilon())", "largest = account.epsilon()"),
    ),
    *group(
        "fl_lightning/ledger/accounts.py",
        f"{_ACCOUNTS}::test_sums_of_unlike_cohorts_are_charged_apart",
        ("largest weights are alike", "return release.event, release.steps, release.largest_weight, votes,", "return release.event, release.steps, votes,"),
    ),
    *group(
        "fl_lightning/ledger/accounts.py",
        f"{_ACCOUNTS}::test_a_line_of_schema_0_costs_everybody_what_it_says",
        ("a step a line", "counts[charge.event] += times * charge.steps", "counts[charge.event] += times"),
        ("tails are not paid from delta", "left = self.delta - tails\n", "left = self.delta\n"),
        ("inflation is free", "compose_epsilon(self.counts(), left) + inflation if", "compose_epsilon(self.counts(), left) if"),
        ("stated costs are forgotten", "    stated = (release.epsilon_inflation, release.tail_delta)\n    known", "    stated = (0.0, 0.0)\n    known"),
        ("costs on top once", "        return times * getattr(charge, name)", "        return getattr(charge, name)"),
    ),
    *group(
        "fl_lightning/ledger/accounts.py",
        f"{_ACCOUNTS}::test_the_largest_epsilon_is_that_of_some_client "
        f"{_ACCOUNTS}::test_no_measure_of_harm_is_overlooked",
        ("fewer steps are worse", "(-event.noise_multiplier, steps, -account.delta,", "(-event.noise_multiplier, -steps, -account.delta,"),
        ("steps do no harm", "(-event.noise_multiplier, steps, -account.delta,", "(-event.noise_multiplier, -account.delta,"),
        ("a larger delta is worse", "steps, -account.delta, *", "steps, account.delta, *"),
        ("costs on top do no harm", "-account.delta, *account.on_top())", "-account.delta)"),
        ("one measure is enough", "    return all(a >= b for a, b", "    return any(a >= b for a, b"),
    ),
    *group(
        "fl_lightning/release/summed.py",
        _COHORTS,
        ("largest weight of all clients", "among = asked.weights[clients] if plan is None else asked.weights", "among = asked.weights"),
        ("sums of everybody", "clients=None if len(ids) == len(asked.weights) else encode(ids),", "clients=None,"),
        ("nobody spent before", "spent=spent_digest(budget.spent),", "spent=spent_digest(0 * budget.spent),"),
        ("the first step of every sum", "first_step=len(self.books.ledger) - budget.evaluation_lines,", "first_step=0,"),
        ("weights of all clients", "            asked[among].numpy(),\n", "            asked[: len(among)].numpy(),\n"),
    ),
    *group(
        "fl_lightning/accounting/budget.py",
        _COHORTS,
        ("sums are everybody's", "else release.members(len(self.spent))", "else slice(None)"),
        ("present clients do not pay", "else release.members(len(self.spent))", "else release.members(len(self.spent))[1:]"),
    ),
    *group(
        "fl_lightning/values/release.py",
        f"tests/fl_lightning/test_ledger_sums.py::test_a_sum_that_is_none_is_refused {_SUMS}",
        ("a sum of one client", "if self.client != ALL_CLIENTS:\n            raise", "if False:\n            raise"),
        ("a sum without a weight", "if weight is None or not (weight > 0 and math.isfinite(weight)):", "if False:"),
        ("a sum after nobody knows what", "if not isinstance(self.spent, str):", "if False:"),
        ("a sum of nobody knows whom", "if self.clients is not None:\n            decode(self.clients)\n\n    def _check_combined", "if False:\n            decode(self.clients)\n\n    def _check_combined"),
        ("a sum that is none", "if release.is_sum != (entry[\"kind\"] == \"sum\"):", "if False:"),
    ),
    *group(
        "fl_lightning/values/client_set.py",
        "tests/fl_lightning/test_client_set.py",
        ("several spellings", "same = encode(ids) == text", "same = len(ids) > 0"),
        ("the last of a range is missing", "np.arange(part[0], part[-1] + 1)", "np.arange(part[0], max(part[-1], part[0] + 1))"),
        ("the longer spelling", "if len(ranges) <= len(_BITS)", "if len(ranges) > len(_BITS)"),
        ("sets out of order", " or not (np.diff(ids) > 0).all():", ":"),
    ),
]  # fmt: skip

FACTS = [
    *group(
        "fl_lightning/ledger/checkpoint_facts.py",
        "tests/fl_lightning/test_checkpoint_facts.py",
        ("classes of a checkpoint", "return type(name, (_Other,), {})", "return super().find_class(module, name)"),
        ("tensors begin at the front", "places = np.full(self.shape, self.offset)", "places = np.full(self.shape, 0)"),
        ("rows lie one behind another", "along = np.arange(count) * step", "along = np.arange(count)"),
    ),
    *group(
        "fl_lightning/keys/digests.py",
        "tests/fl_lightning/test_digests.py",
        ("the first row for all", "data[i * size : (i + 1) * size]", "data[:size]"),
        ("a digest of another function", "blake3 if like.startswith(_BLAKE3) else hashlib.sha256", "blake3"),
        ("the function is no fact", '"SHA-256" if blake3 is None else "BLAKE3"', '"BLAKE3"'),
        ("the first piece for all", "state.update(pieces[i])", "state.update(pieces[0])"),
    ),
]  # fmt: skip

MUTATIONS = [*LINES, *HEADERS, *FILES, *ACCOUNTING, *FACTS]
