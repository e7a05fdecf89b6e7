"""Private evaluations: noise, sensitivity, charge, order of ledger and release, resumption."""

import csv
import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from fl_lightning import PrivacyConfig
from fl_lightning.accounting.composition import compose_epsilon
from fl_lightning.accounting.evaluation import is_due
from fl_lightning.ledger import LedgerError, read
from fl_lightning.ledger.accounts import accounts
from fl_lightning.ledger.file import Ledger
from fl_lightning.ledger.statement import privacy_statement
from fl_lightning.ledger.verdict import examine
from fl_lightning.values.event import NoiseEvent
from fl_lightning.values.release import ALL_CLIENTS, parse_release, release_entry
from tests.fl_lightning.resealing import edited, facts, half, lines, without
from tests.fl_lightning.resuming import blobs, go

EVERY = {"evaluate_every": 3}
RECORD = EVERY | {"epsilon": [2.0, 4.0]}
CLIENT = EVERY | {"setting": "client+local", "epsilon": [20.0, 30.0], "delta": 0.1}
SUM = EVERY | {"setting": "client+aggregator", "epsilon": [5.0, 8.0], "delta": 0.1}
RUNS = {
    "record+local": (RECORD, {"sampling_rate": 1.0}),
    "record+local, sampled": (RECORD | {"epsilon": 4.0}, {}),
    "record+local, replace_one": (RECORD | {"adjacency": "replace_one"}, {"sampling_rate": 1.0}),
    "client+local": (CLIENT, {}),
    "client+local, Laplace": (CLIENT | {"mechanism": "laplace"}, {}),
    "client+aggregator": (SUM | {"cohort_sampling": "fixed"}, {}),
    "client+aggregator, sampled": (SUM, {"clients_per_round": 2}),
}
ROUNDS, DUE = 8, [2, 5, 7]
LONG = ("client+aggregator, sampled", "client+local, Laplace")  # many different compositions
NAMES = [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in RUNS]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, module) of runs, made when they are asked for."""
    made = {}

    def run(name):
        if name not in made:
            privacy, options = RUNS[name]
            folder = tmp_path_factory.mktemp("run")
            made[name] = folder, go(folder, ROUNDS, privacy=privacy, **options)
        return made[name]

    return run


@pytest.mark.parametrize("name", NAMES)
def test_each_is_planned_and_charged_within_the_target(runs, name):
    folder, module = runs(name)
    header, releases = read(folder)
    evaluations = [r for r in releases if r.evaluation]
    assert sorted({r.round for r in evaluations}) == DUE
    assert examine(folder).problems == []
    spent = {k: a.epsilon() for k, a in accounts(header, releases).items()}
    for client, epsilon in spent.items():
        assert 0.9 * header["epsilon"][client] < epsilon <= header["epsilon"][client]
    assert module.result.epsilon_spent == pytest.approx([*spent.values()], rel=1e-6)
    assert len(evaluations) == len(DUE) * (1 if header["weights"] else 3)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_shown_while_a_run_goes_on_is_never_below_its_ledger(runs, name):
    folder, _ = runs(name)
    header, releases = read(folder)
    with (folder / "rounds.csv").open() as file:
        shown = [float(row["epsilon_max"]) for row in csv.DictReader(file)]
    for round in (0, 2, 4, 6):
        before = [r for r in releases if r.round <= round]
        spent = max(a.epsilon() for a in accounts(header, before).values())
        assert shown[round] >= spent * (1 - 1e-9)


def test_a_records_charge_is_the_larger_of_both_kinds(runs):
    header, releases = read(runs("record+local, sampled")[0])
    account = accounts(header, releases)[0]
    z = header["evaluation"]["noise_multiplier"]
    update, held = ({NoiseEvent("gaussian", header["noise_multiplier"], 0.5): 8},
                    {NoiseEvent("gaussian", z): 3})  # fmt: skip
    apart = [compose_epsilon(counts, 1e-5) for counts in (update, held)]
    assert account.epsilon() == pytest.approx(max(apart), rel=1e-9)
    only = accounts(header, [r for r in releases if r.evaluation])[0]
    assert only.epsilon() == pytest.approx(apart[1], rel=1e-9)


def test_a_client_pays_for_both_kinds_together(runs):
    header, releases = read(runs("client+local")[0])
    for client, account in accounts(header, releases).items():
        z, y = header["noise_multiplier"][client], header["evaluation"]["noise_multiplier"][client]
        both = compose_epsilon({NoiseEvent("gaussian", 1 / math.sqrt(8 / z**2 + 3 / y**2),
                                           1.0, "replace_one"): 1}, 0.1)  # fmt: skip
        assert account.epsilon() == pytest.approx(both, rel=1e-6)


def test_a_client_of_a_sum_pays_by_its_own_weight(runs):
    header, releases = read(runs("client+aggregator")[0])
    line = next(r for r in releases if r.evaluation)
    strict, loose = header["evaluation"]["noise_multiplier"][:2]
    assert (line.client, line.noise_multiplier) == (ALL_CLIENTS, loose)
    only = accounts(header, [line])
    assert only[0].counts() == {replace(line.event, noise_multiplier=strict): 1}
    assert strict > loose


def test_a_changed_held_out_record_moves_one_client_by_one(runs):
    _, module = runs("record+local")
    evaluations = module.run.evaluations
    before = evaluations.right_answers()
    _, y = evaluations.run.data.held_out
    row = int(evaluations.run.data.held_out_partition.client(1)[0])
    kept = int(y[row])
    try:
        moves = []
        for label in range(3):
            y[row] = label
            moves.append((evaluations.right_answers() - before).abs())
        assert max(m.sum() for m in moves) == 1
        assert all(float(m[0]) == float(m[2]) == 0 for m in moves)
    finally:
        y[row] = kept


# Ledger first, and exact resumption --------------------------------------------------------------


def test_the_ledger_is_written_before_an_evaluation_is_seen(tmp_path, monkeypatch):
    append = Ledger.append

    def fails(self, releases):
        if releases[0].evaluation:
            raise LedgerError("disk full")
        append(self, releases)

    monkeypatch.setattr(Ledger, "append", fails)
    with pytest.raises(LedgerError, match="disk full"):
        go(tmp_path, 8, privacy=RECORD)
    assert not [r for r in read(tmp_path)[1] if r.evaluation]
    assert (tmp_path / "private_evaluation.csv").read_text().count("\n") == 1


@pytest.mark.parametrize("name", ["record+local", "client+local", "client+aggregator"])
@pytest.mark.parametrize("seed", [7, None])
def test_a_run_that_goes_on_has_the_same_evaluations_free_of_charge(tmp_path, name, seed):
    privacy, options = RUNS[name]
    options = options | {"every": 4}
    privacy = privacy | {"seed": seed}

    # Rounds 4 and 5 stand in the ledger, the checkpoint is of round 4: both are repeated.
    class Stop(Exception):
        pass

    from pytorch_lightning import Callback

    class Halt(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if module.result.round == 5:
                raise Stop

    with pytest.raises(Stop):
        go(tmp_path, 8, privacy=privacy, callbacks=[Halt()], **options)
    before = read(tmp_path)[1]
    assert {r.round for r in before if r.evaluation} == {2, 5}
    go(tmp_path, 8, privacy=privacy, resume=True, **options)
    after = read(tmp_path)[1]
    assert after[: len(before)] == before
    assert all(r.attempt == 0 for r in after)
    assert sorted({r.round for r in after if r.evaluation}) == DUE
    assert examine(tmp_path).problems == []
    if seed is not None:
        whole = tmp_path / "whole"
        go(whole, 8, privacy=privacy, **options)
        assert [r.digest for r in read(whole)[1]] == [r.digest for r in after]
        tables = [(f / "private_evaluation.csv").read_text() for f in (tmp_path, whole)]
        assert tables[0] == tables[1]


def test_other_answers_get_other_noise_and_no_more_than_was_planned(tmp_path):
    module = go(tmp_path, 8, privacy=RECORD)
    run = module.run
    with Ledger.open(tmp_path) as ledger:
        books = replace(run.evaluations.books, ledger=ledger)
        run.evaluations.books = books
        before = run.evaluations.release(7, run.context(run.evaluations.clients))
        assert before.accuracy == module.evaluated.accuracy  # the same one
        with torch.no_grad():
            for value in module.network.parameters():
                value.neg_()
        assert run.evaluations.release(7, run.context(run.evaluations.clients)) is None
        books.budget.evaluated[:] = 0
        again = run.evaluations.release(7, run.context(run.evaluations.clients))
        assert again.accuracy != before.accuracy
        first, second = ledger.find(0, 7, evaluation=True)
        assert second.attempt == 1
        assert first.binding != second.binding


def evaluation(**values):
    """An edit of the header's facts of evaluations."""
    return lambda entries: entries[0]["facts"]["evaluation"].update(values)


FIRST = 4  # entry of the first evaluation
EDITS = {
    "less noise": (lines(FIRST, noise_multiplier=half), "noise_multiplier"),
    "a multiplier of the header": (evaluation(noise_multiplier=[1.0, 1.0, 1.0]), "calibrated"),
    "more evaluations": (evaluation(planned=9), "planned"),
    "composed as apart": (evaluation(apart=True), "apart"),
    "a share of everything": (evaluation(share=0.9), "share"),
    "a bound of 2": (lines(FIRST, clip_norm=[2.0]), "clip_norm"),
    "another round": (lines(FIRST, round=3), "round"),
    "a line removed": (without(FIRST), "first_step"),
    "less for tails": (lines(FIRST, tail_delta=0.0), "tail_delta"),
    "no plan": (facts(evaluation=None), "evaluation"),
    "updates with less noise": (facts(noise_multiplier=0.3), "noise_multiplier"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_found(runs, tmp_path, name):
    change, words = EDITS[name]
    source, _ = runs("client+aggregator")
    assert read(source)[1][FIRST - 1].evaluation
    problems = examine(edited(source, tmp_path, change)).problems
    assert any(words in problem for problem in problems), problems


def test_a_line_is_written_and_read():
    header_free = {"client": 1, "round": 2, "steps": 1, "mechanism": "gaussian",
                   "noise_multiplier": 2.0, "sampling_rate": 1.0, "adjacency": "zero_out",
                   "num_layers": 1, "clip_norm": (1.0,), "shares": (1.0,), "binding": "aa",
                   "digest": "bb"}  # fmt: skip
    from fl_lightning.values.release import Release

    release = Release(**header_free, evaluation=True)
    entry = json.loads(json.dumps(release_entry(release)))
    assert entry["kind"] == "evaluation"
    assert parse_release(entry) == release
    for name, value in {"largest_weight": 1.0, "clients": "0-1", "combined": (1,)}.items():
        with pytest.raises(ValueError, match=name):
            Release(**header_free, evaluation=True, **{name: value})


# What is said ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [("record+local", "parallel composition"), ("client+local", "composed with the updates"),
     ("client+aggregator", "with one noise")],
)  # fmt: skip
def test_the_statement_says_how_evaluations_were_charged(runs, name, words):
    text = privacy_statement(runs(name)[1].ledger)
    assert words in text
    assert "3 of 3 planned evaluations" in text


def test_the_public_error_is_that_of_the_noise(runs):
    for name, noise in (("client+local", 3), ("client+aggregator", 1)):
        folder, module = runs(name)
        header, _ = read(folder)
        z = np.broadcast_to(header["evaluation"]["noise_multiplier"], 3)
        weights = z.min() / z
        wanted = math.sqrt((z**2).sum()) / 3 if noise == 3 else z.min() / weights.sum()
        assert module.evaluated.standard_error == pytest.approx(wanted)
        row = (folder / "private_evaluation.csv").read_text().splitlines()[-1].split(",")
        assert row[0] == "7"
        assert float(row[1]) == module.evaluated.accuracy
        assert float(row[2]) == pytest.approx(wanted)


def test_rounds_that_are_due():
    assert [r for r in range(8) if is_due(r, 8, 3)] == DUE
    assert [r for r in range(6) if is_due(r, 6, 3)] == [2, 5]
    assert not any(is_due(r, 6, 0) for r in range(6))


BAD = {
    "evaluate_every": ({"evaluate_every": -1}, "evaluate_every=-1"),
    "share": ({"evaluation_share": 0.7}, "evaluation_share=0.7"),
    "no share": ({"evaluation_share": 0.0}, "evaluation_share=0.0"),
    "no target": (EVERY | {"epsilon": None, "noise_multiplier": 1.0}, "epsilon=None"),
    "given noise": (EVERY | {"noise_multiplier": 1.0}, "noise_multiplier=1.0"),
    "grid": (EVERY | {"noise_form": "grid"}, "noise_form='grid'"),
    "secure sum": (EVERY | {"setting": "client+secure_sum"}, "client\\+secure_sum"),
    "abstract": (EVERY | {"setting": "abstract"}, "abstract"),
    "banded": (
        EVERY
        | {"setting": "client+aggregator", "cohort_sampling": "fixed", "correlation": "banded"},
        "correlation='banded'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_options_that_cannot_be_are_refused(name):
    options, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        PrivacyConfig(**options)


def test_no_held_out_records_no_evaluation(tmp_path, monkeypatch):
    from tests.fl_lightning import resuming

    monkeypatch.setattr(resuming, "blobs", lambda *_: blobs(val_fraction=0.0))
    with pytest.raises(ValueError, match=r"evaluate_every with data.val_fraction=0"):
        go(tmp_path, 2, privacy=RECORD)
    assert not (tmp_path / "ledger.jsonl").exists()


def test_counts_of_one_event_add_up():
    """Evaluations that happen to have the multiplier of the updates are counted with them."""
    from fl_lightning.accounting.exactness import SamplerCost, charged_epsilon

    event, free = NoiseEvent("gaussian", 3.0), SamplerCost()
    both = charged_epsilon(event, 5, 1e-5, free, (event, 4, free))
    assert both == pytest.approx(compose_epsilon(Counter({event: 9}), 1e-5))
