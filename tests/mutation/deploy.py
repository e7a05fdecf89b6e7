"""Mistakes at nodes, and in what a server makes of their answers."""

from __future__ import annotations

from tests.mutation.mutations import Mutation, group

_NODE = "tests/fl_lightning/test_deploy_node.py::test_"
_EQUALITY = "tests/fl_lightning/test_deploy_equality.py::test_"
_EVALUATION = "tests/fl_lightning/test_deploy_evaluation.py::test_"
_SERVICE = "tests/fl_lightning/test_deploy_service.py::test_"
_SOCKET = "tests/fl_lightning/test_deploy_socket.py::test_"
_TERMS = _NODE + "hostile_terms_are_refused_and_the_journal_shows_it"
_REQUESTS = _NODE + "requests_that_make_no_sense_are_refused_and_cost_nothing"
_ASKED = _NODE + "another_question_has_other_noise_and_is_charged"
_RUN = "fl_lightning/deploy/client_run.py"
_ANSWERS = "fl_lightning/deploy/node.py"


def _one(file: str, tests: str, what: str, old: str, new: str) -> Mutation:
    return group(file, tests, (what, old, new))[0]


MUTATIONS = [
    *group(
        "fl_lightning/deploy/policy.py",
        _TERMS,
        ("any generator", "privacy.rng in policy.generators", "True"),
        ("any number of rounds", "terms.rounds <= policy.rounds", "True"),
        ("any number of local steps", "steps <= policy.local_steps", "True"),
        ("public seeds", "privacy.seed is None or policy.simulation", "True"),
    ),
    _one("fl_lightning/deploy/policy.py", _NODE + "a_network_is_one_that_the_policy_names", "any network", "terms.network in policy.networks", "True"),
    *group(
        "fl_lightning/deploy/holding.py",
        _TERMS,
        ("the policy is not asked", "check_terms(policy, terms, privacy, training)", "pass"),
    ),
    *group(
        _RUN,
        _REQUESTS,
        ("lost lines are not noticed", "if known > self.releases:", "if False:"),
        ("models that are not finite", "if not bool(value.isfinite().all()):", "if False:"),
        ("models of another shape", "value.shape != like.shape or value.dtype != like.dtype", "value.dtype != like.dtype"),
        ("models of another dtype", "value.shape != like.shape or value.dtype != like.dtype", "value.shape != like.shape"),
    ),
    *group(
        _RUN,
        _ASKED,
        ("an old answer to a new model", "request = digests.digest([context, round, *params.values()])", "request = digests.digest([context, round])"),
        ("one answer for all rounds", "request = digests.digest([context, round, *params.values()])", "request = digests.digest([context, *params.values()])"),
    ),
    _one(_RUN, _NODE + "the_same_question_gets_the_same_answer_and_is_charged_once", "a question asked twice is computed twice", 'if self._answered.get(what, {}).get("request") != request:', "if True:"),
    _one(_RUN, _NODE + "a_server_has_no_say_in_what_secret_noise_is_bound_to", "the server's words bind secret noise", "            context = self.run.context(torch.tensor([self.terms.client]))", "            pass"),
    _one(_RUN, _NODE + "a_killed_node_repeats_its_release_for_nothing", "the state is not kept", '"line": line}\n            self._save()', '"line": line}'),
    _one(_RUN, _EQUALITY + "nodes_that_are_late_are_left_out_and_their_lines_come_later", "lines that a server lacks are kept back", "self._lines(min(known, kept", "self._lines(max(known, kept"),
    *group(
        _ANSWERS,
        _TERMS,
        ("refusals are not written down", "        self._note(what, run, reason)\n", "        pass\n"),
    ),
    *group(
        _ANSWERS,
        _NODE + "after_an_error_within_nothing_more_is_answered",
        ("it goes on after an error within", "if self._stopped:", "if False:"),
        ("an error's words leave", 'return encode({"refused": self._stopped})', 'return encode({"refused": str(error)})'),
    ),
    _one(_ANSWERS, _NODE + "as_many_runs_release_as_the_holder_allows", "runs are not counted", 'sum(path.read_bytes().count(b"\\n") > 1 for path in ledgers)', "0"),
    _one(_ANSWERS, _NODE + "as_many_runs_release_as_the_holder_allows", "runs that released are forgotten", 'if ledger.exists() and ledger.read_bytes().count(b"\\n") > 1:', "if False:"),
    _one(_ANSWERS, _NODE + "the_terms_of_a_run_do_not_change", "other terms for a run", "if run.terms != terms:", "if False:"),
    _one(_ANSWERS, _REQUESTS, "a run of any name", "not isinstance(name, str) or len(name) != 64 or not name.isalnum()", "not isinstance(name, str)"),
    _one(_ANSWERS, _NODE + "a_folder_that_others_can_enter_is_refused", "a folder for everybody", "if folder.stat().st_mode & 0o077:", "if False:"),
    _one("fl_lightning/deploy/service.py", _SERVICE + "a_service_answers_until_it_is_stopped", "a socket for everybody", "mask = os.umask(0o177)", "mask = os.umask(0o000)"),
    _one("fl_lightning/deploy/service.py", _SOCKET + "a_group_reaches_it_where_it_is_named", "a socket for everybody beside the group", "path.chmod(0o660)", "path.chmod(0o666)"),
    _one("fl_lightning/deploy/service.py", _SOCKET + "a_group_reaches_it_where_it_is_named", "a socket keeps its group", "os.chown(path, -1, grp.getgrnam(group).gr_gid)", "grp.getgrnam(group)"),
    _one("fl_lightning/deploy/__main__.py", _SOCKET + "a_socket_in_the_private_folder_is_for_no_group", "a group is named for a socket that it cannot reach", "if options.socket_group and folder.resolve() in path.resolve().parents:", "if False:"),
    _one("fl_lightning/deploy/service.py", _SERVICE + "answers_leave_at_a_time_that_shows_no_work", "answers as soon as they are there", "time.sleep(max(0.0, begun + answer_seconds - time.monotonic()))", "pass"),
    _one("fl_lightning/deploy/service.py", _SERVICE + "a_socket_has_one_service_and_a_dead_one_leaves_none", "two services on one socket", "if _alive(path):", "if False:"),
    _one("fl_lightning/deploy/frames.py", _SERVICE + "messengers_that_hang_up_or_send_too_much_keep_nobody_waiting", "messages of any length", "if size > most:", "if False:"),
    _one("fl_lightning/deploy/__main__.py", _SERVICE + "a_wrong_policy_is_one_line", "the policy's networks are not compared", "if digest not in holding.policy.networks:", "if False:"),
    _one("fl_lightning/release/remote.py", _EQUALITY + "a_forged_release_is_left_out", "a forged release is taken", "        if not own:\n", "        own = lines\n        if not own:\n"),
    _one("fl_lightning/release/remote.py", _EQUALITY + "personal_promises_reach_the_run", "one multiplier for all", 'budget.multiplier[client] = float(head["noise_multiplier"])', 'budget.multiplier[:] = float(head["noise_multiplier"])'),
    _one("fl_lightning/release/remote.py", _EQUALITY + "secret_noise_is_the_nodes_own_and_every_ledger_is_whole", "lines are not copied", "        ledger.append(fresh)\n", ""),
    _one("fl_lightning/release/remote.py", _EQUALITY + "what_a_deployed_run_says_of_itself", "heads are not kept", "self.heads[client] = head", "pass"),
    _one("fl_lightning/release/federation.py", _EQUALITY + "a_public_seed_gives_the_simulated_run", "nodes plan for one round", "planned // rules.steps_a_release)", "1)"),
    *group(
        "fl_lightning/release/agreement.py",
        _EQUALITY + "what_nodes_cannot_do_is_refused_before_anything",
        ("settings of a server's noise", 'if privacy.setting not in ("record+local", "client+local"):', "if False:"),
        ("given multipliers", "if privacy.noise_multiplier is not None:", "if False:"),
        ("simulated drop-outs", "if rules.faults.dropout or rules.faults.deadline is not None:", "if False:"),
    ),
    *group(
        _RUN,
        _EVALUATION + "the_same_question_is_charged_once_and_another_again",
        ("an evaluation in the place of a release", "self._answered[what] = {", "self._answered.clear()\n            self._answered[what] = {"),
        ("the last line for every answer", 'self._lines(min(known, kept["line"]))', "self._lines(min(known, self.releases - 1))"),
        ("evaluations of the last model", "                    value.copy_(params[name])", "                    pass"),
        ("more than were planned", "            if not paid:\n", "            if False:\n"),
    ),
    _one(_RUN, _EVALUATION + "none_is_given_after_a_round_that_plans_none", "after any round", "or not evaluations.due(round):", "or False:"),
    _one("fl_lightning/deploy/holding.py", _EVALUATION + "a_node_without_held_out_records_takes_no_part", "a holder that keeps no records", "if privacy.evaluate_every and not holding.data.val_fraction:", "if False:"),
    *group(
        "fl_lightning/release/remote.py",
        _EVALUATION + "an_evaluation_that_is_lost_or_forged_is_left_out_and_its_line_comes_later",
        ("a forged evaluation is taken", "if line.digest in shown", "if line.digest"),
    ),
    *group(
        "fl_lightning/release/remote_evaluation.py",
        _EVALUATION + "nodes_that_keep_their_numbers_back_count_alike",
        ("unknown numbers weigh as one record", 'if member.held_out is None and privacy.unit == "record":', "if False:"),
    ),
    *group(
        "fl_lightning/release/evaluation.py",
        _EVALUATION + "a_public_seed_gives_the_evaluations_of_the_simulation",
        ("noise of client 0 at every node", "self.clients if number is None else torch.tensor([number])", "self.clients"),
    ),
    *group(
        "fl_lightning/release/evaluation.py",
        _EVALUATION + "accuracies_of_some_are_weighed_by_their_records",
        ("all nodes weigh alike", 'if privacy.unit == "record" else torch.ones', "if False else torch.ones"),
        ("noises that do not add up", "multipliers.square().sum().sqrt()", "multipliers.max()"),
    ),
    *group(
        "fl_lightning/run.py",
        _EVALUATION + "nodes_that_are_not_in_a_round_are_evaluated_after_it",
        ("evaluations planned for the node's own rounds", "spec.span or rounds", "rounds"),
    ),
    *group(
        "fl_lightning/release/clients.py",
        _EQUALITY + "a_public_seed_gives_the_simulated_run",
        ("coins of client 0 at every node", "key=coins, clients=numbers)", "key=coins, clients=clients)"),
    ),
    *group(
        "fl_lightning/release/one_by_one.py",
        _EQUALITY + "a_public_seed_gives_the_simulated_run",
        ("noise of client 0 at every node", 'named["numbers"] = self.clients.numbers[clients]', 'named["numbers"] = clients'),
    ),
]  # fmt: skip
