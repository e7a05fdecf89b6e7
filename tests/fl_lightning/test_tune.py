"""A search whose choice is charged: what is drawn once, what is written first, what is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from fl_lightning.accounting.repeat_and_select import TrialNumber
from fl_lightning.ledger import Ledger, LedgerError, read
from fl_lightning.ledger.search_checks import SearchLossError, check_search
from fl_lightning.ledger.statement import privacy_statement
from fl_lightning.ledger.verdict import examine
from fl_lightning.module import FederatedModule
from fl_lightning.tune import __main__ as command
from fl_lightning.tune.plan import LAST_ROUND, SearchPlan, check_given, given_seed
from fl_lightning.tune.search import Search
from fl_lightning.tune.space import Space
from tests.fl_lightning.resealing import edited
from tests.fl_lightning.resuming import go

SPACE = Space({"privacy.clip_norm": {"log_uniform": [0.5, 2.0]}, "model.seed": {"choice": [1, 2]}})
NUMBER = TrialNumber("negative_binomial", 6.0, 1.0)
PLAN = SearchPlan(8.0, 1e-5, NUMBER, SPACE)
HEADER = {
    "setting": "record+local", "privacy_unit": "record", "trust": "local", "delta": 1e-6,
    "adjacency": "zero_out", "mechanism": "gaussian", "epsilon": 1.0, "simulated": False,
    "run_id": "x",
}  # fmt: skip


class Runs:
    """Stands for the training of candidates: scores by their clip norm."""

    def __init__(self, stop_at=None, refuse=0):
        self.made, self.stop_at, self.refuse = [], stop_at, refuse

    def __call__(self, options, folder, facts):
        if len(self.made) == self.stop_at:
            raise KeyboardInterrupt
        folder.mkdir(parents=True, exist_ok=True)
        if self.refuse:
            self.refuse -= 1
            raise SearchLossError("search.loss of client 0 is too small")
        self.made.append(dict(options))
        Ledger.create(folder, HEADER).close()
        score = options["privacy.clip_norm"]
        text = f"round,accuracy,standard_error,clients\n0,{score},0.1,3\n"
        (folder / "private_evaluation.csv").write_text(text)
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "last.ckpt").write_bytes(b"model")
        found = {"test_accuracy": 0.5, "sim_only_val_accuracy": 1.0, "seconds": 3.0}
        (folder / "summary.json").write_text(json.dumps(found))


def quiet(_):
    pass


def searched(folder, run, *, plan=PLAN, seed=11):
    search = Search(plan, folder, 3, seed, run)
    try:
        return search.best(quiet), search
    finally:
        search.close()


def test_a_search_that_was_stopped_goes_on_with_the_same_candidates(tmp_path):
    whole = Runs()
    best, search = searched(tmp_path / "whole", whole)
    assert len(whole.made) == search.number() > 2
    scores = [options["privacy.clip_norm"] for options in whole.made]
    assert best == int(np.argmax(scores))
    first, second = Runs(stop_at=2), Runs()
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path / "cut", first)
    again, _ = searched(tmp_path / "cut", second)
    assert again == best
    assert first.made + second.made == whole.made
    third = Runs()
    assert searched(tmp_path / "cut", third)[0] == best
    assert third.made == []


def test_a_candidate_is_written_down_before_it_begins(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path, Runs(stop_at=0))
    entries = [json.loads(line) for line in (tmp_path / "search.jsonl").read_text().splitlines()]
    assert [e["kind"] for e in entries] == ["plan", "candidate"]
    assert not (tmp_path / "trials").exists()


def test_a_secret_search_draws_its_number_from_its_key_and_hides_it(tmp_path):
    numbers = set()
    for i in range(8):
        search = Search(PLAN, tmp_path / str(i), 3, None, Runs())
        numbers.add(search.number())
        search.close()
    assert len(numbers) > 2
    for name in ("search.jsonl", "secret.key"):
        assert (tmp_path / "0" / name).stat().st_mode & 0o077 == 0
    assert (tmp_path / "0").stat().st_mode & 0o077 == 0


def test_numbers_follow_their_law(tmp_path):
    search = SimpleNamespace(plan=PLAN)
    found = []
    from aadp_kernels import NoiseKey

    for seed in range(400):
        search.key = NoiseKey.from_seed(seed)
        found.append(Search.number(search))
    assert np.mean(found) == pytest.approx(6.0, abs=1.0)
    assert min(found) == 1


def test_candidates_of_a_simulated_search_have_noise_of_their_own(tmp_path):
    runs = Runs()
    searched(tmp_path, runs)
    seeds = [options["privacy.seed"] for options in runs.made]
    assert len(set(seeds)) == len(seeds)
    secret = Runs()
    searched(tmp_path / "secret", secret, seed=None)
    assert all("privacy.seed" not in options for options in secret.made)


def test_every_candidate_has_its_part_of_the_budget_and_logs_nothing(tmp_path):
    runs = Runs()
    searched(tmp_path, runs)
    budget = PLAN.budgets(3)[0]
    for options in runs.made:
        assert options["privacy.epsilon"] == budget.epsilon
        assert options["privacy.delta"] == 1e-5 / 6
        assert options["privacy.evaluate_every"] == LAST_ROUND
        assert options["trainer.logger"] is False
        assert options["read_test_set"] is False


def test_a_candidate_that_would_cost_too_much_gets_less(tmp_path):
    runs = Runs(refuse=2)
    searched(tmp_path, runs)
    whole = PLAN.budgets(3)[0].epsilon
    assert runs.made[0]["privacy.epsilon"] == pytest.approx(whole * 0.97**2)
    assert runs.made[1]["privacy.epsilon"] == whole


def test_what_is_shown_tells_nothing_of_the_others(tmp_path):
    best, search = searched(tmp_path, Runs())
    shown = search.show(best)
    files = {path.relative_to(shown).as_posix() for path in shown.rglob("*") if path.is_file()}
    assert files == {
        "checkpoints/last.ckpt", "ledger.jsonl", "ledger.head", "privacy_statement.md",
        "options.json", "summary.json",
    }  # fmt: skip
    summary = json.loads((shown / "summary.json").read_text())
    assert summary == {"test_accuracy": 0.5}
    text = "".join(p.read_text() for p in shown.rglob("*.*") if p.suffix != ".ckpt")
    assert f"{best:05d}" not in text


def test_another_plan_and_a_changed_line_are_refused(tmp_path):
    searched(tmp_path, Runs())
    with pytest.raises(ValueError, match="another plan"):
        searched(tmp_path, Runs(), plan=SearchPlan(9.0, 1e-5, NUMBER, SPACE))
    path = tmp_path / "search.jsonl"
    path.write_text(path.read_text().replace('"score":', '"score" :', 1))
    with pytest.raises(LedgerError, match="line 3 was changed"):
        searched(tmp_path, Runs())


def test_no_candidate_may_be_drawn_by_poisson(tmp_path):
    plan = SearchPlan(8.0, 1e-5, TrialNumber("poisson", 0.01), SPACE)
    runs = Runs()
    assert searched(tmp_path, runs, plan=plan, seed=1)[0] is None
    assert runs.made == []


def test_personal_epsilons_have_their_own_parts():
    plan = SearchPlan([2.0, 8.0], 1e-5, NUMBER, SPACE)
    one, other, again = plan.budgets(3)
    assert one == again
    assert one.epsilon + one.loss == pytest.approx(2.0)
    assert other.epsilon + other.loss == pytest.approx(8.0)
    assert plan.options(1.0, 3)["privacy.epsilon"] == [one.epsilon, other.epsilon, one.epsilon]


# The ledger of a candidate -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def candidate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("candidate")
    plan = SearchPlan([4.0, 8.0], 1e-3, NUMBER, SPACE)
    options = plan.options(1.0, 3)
    privacy = {n.partition(".")[2]: v for n, v in options.items() if n.startswith("privacy.")}
    patch = pytest.MonkeyPatch()
    with patch.context() as m:
        m.setattr(FederatedModule, "search", plan.facts(3))
        module = go(folder, 3, privacy=privacy, sampling_rate=1.0, planned_rounds=3)
    return folder, module


def test_a_candidate_keeps_to_its_search(candidate):
    folder, module = candidate
    header, _ = read(folder)
    check_search(header)
    assert examine(folder).problems == []
    text = privacy_statement(module.ledger)
    assert "search that costs epsilon 8 at delta 0.001" in text
    assert "mean 6 and shape 1" in text
    assert "What an attack can find out" not in text
    assert "## Groups" not in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f["search"].update(loss=[0.1, 0.1, 0.1]), "search.loss of client 0"),
        (lambda f: f["search"].update(epsilon=[3.0, 8.0, 4.0]), "more than the search's"),
        (lambda f: f["search"].update(delta=[1e-4] * 3), "delta of a candidate"),
        (lambda f: f["search"].update(mean=60.0), "delta of a candidate"),
        (lambda f: f["search"].pop("shape") * 0.0, "search has no shape"),
        (lambda f: f["search"].update(loss=[1.0]), "search.loss is not a list"),
    ],
)
def test_a_search_that_costs_more_than_it_says_is_found(candidate, tmp_path, change, words):
    folder = edited(candidate[0], tmp_path, lambda entries: change(entries[0]["facts"]))
    problems = examine(folder).problems
    assert any(words in problem for problem in problems), problems


def test_sampled_candidates_of_larger_loss_are_refused(candidate):
    header, _ = read(candidate[0])
    header["search"]["loss"] = [0.9 * loss for loss in header["search"]["loss"]]
    with pytest.raises(SearchLossError, match=r"search.loss of client 0"):
        check_search(header)


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("laws", "words"),
    [
        ({}, "at least one option"),
        ({"privacy.epsilon": {"choice": [1.0]}}, "privacy.epsilon is the same"),
        ({"data.num_clients": {"choice": [1]}}, "data.num_clients is the same"),
        ({"trainer.logger": {"choice": [True]}}, "trainer.logger is the same"),
        ({"a": {"beta": [0, 1]}}, "must be one of choice"),
        ({"a": {"choice": []}}, "takes a list"),
        ({"a": {"weighted_choice": [[1, 1], [2]]}}, "takes pairs"),
        ({"a": {"weighted_choice": [[1, -1], [2, 3]]}}, "takes pairs"),
        ({"a": {"weighted_choice": [[1, 0]]}}, "a weight above 0"),
        ({"a": {"int_uniform": [1, 2.5]}}, "takes two integers"),
        ({"a": {"int_uniform": [1, 9, 2]}}, "takes two integers"),
        ({"a": {"uniform": [1, 2, 3, 4]}}, "takes two numbers"),
        ({"a": {"uniform": [1, 2, 0]}}, "a step above 0"),
        ({"a": {"normal": [1, 0]}}, "a deviation above 0"),
        ({"a": {"uniform": [2, 1]}}, "must be ascending"),
        ({"a": {"log_uniform": [0, 1]}}, "above 0"),
        ({"a": {"uniform": [float("nan"), 1]}}, "takes two numbers"),
    ],
)
def test_a_space_that_cannot_be_is_refused(laws, words):
    with pytest.raises(ValueError, match=words):
        Space(laws)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1", "it must have"),
        ("epsilon: 8\nspace: {a: {choice: [1]}}", "delta is missing, there or as --delta"),
        ("epsilon: 8\ndelta: 1.0e-5\nspace: {a: {choice: [1]}}\ntrails: {}", "'trails' is none"),
        ("epsilon: x\ndelta: 1.0e-5\nspace: {a: {choice: [1]}}", "epsilon='x'"),
        ("epsilon: 8\ndelta: 1\nspace: {a: {choice: [1]}}", "delta=1"),
        ("epsilon: 8\ndelta: 1.0e-5\nspace: {a: {choice: [1]}}\ntrials: {mean: 0.5}", "mean=0.5"),
        ("epsilon: 8\ndelta: 1.0e-5\nspace: {a: {choice: [1]}}\ntrials: {mean: x}", "mean='x'"),
        ("epsilon: 8\ndelta: 1.0e-5\nspace: {a: {choice: [1]}}\nfixed: [1]", "fixed=[1]"),
        ("epsilon: 8\ndelta: 1.0e-5\nspace: {a: {choice: [1]}}\nfixed: {run_dir: a}", "--run_dir"),
        ("epsilon: [", "while parsing"),
    ],
)
def test_a_file_that_is_no_search_is_refused_in_a_line(tmp_path, capsys, text, words):
    path = tmp_path / "s.yaml"
    path.write_text(text)
    assert command.main([str(path), "--run_dir", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["--privacy.epsilon=3", "--trainer.logger=true", "--tensorboard"])
def test_options_that_would_break_the_charge_are_refused(name):
    with pytest.raises(ValueError, match=name.partition("=")[0]):
        check_given([name])


def test_options_of_all_candidates():
    check_given(["--privacy.setting=client+aggregator", "--privacy.seed=3"])
    assert given_seed(["--privacy.seed=3"], [{"privacy": {"seed": 5}}]) == 3
    assert given_seed([], [{"privacy": {"seed": 5}}, {"model": 1}]) == 5
    assert given_seed([], []) is None
    assert command._joined(["--a", "1", "--b=2", "--c"]) == ["--a=1", "--b=2", "--c"]
    assert command._clients(["--data.num_clients=4"]) == 4
    assert command._words({"a": [1.5], "b": "x", "c": None}) == ["--a=[1.5]", "--b=x", "--c=null"]
