"""Private evaluations of nodes: those of the simulation, paid first, asked twice, answered once."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from fl_lightning.deploy import client_run
from fl_lightning.ledger import read, verify
from fl_lightning.ledger.accounts import accounts
from fl_lightning.ledger.statement import privacy_statement
from fl_lightning.privacy.config import PrivacyConfig
from fl_lightning.release.evaluation import evaluated
from fl_lightning.release.federation import parse_member
from fl_lightning.values.release import parse_release
from tests.fl_lightning import nodes as n
from tests.fl_lightning.test_deploy_node import PLACES, Killed

HELD = 0.3
EVERY = {"evaluate_every": 2}


@pytest.fixture
def holders(tmp_path):
    made = []

    def make(count=n.CLIENTS, **options):
        options = {"held_out": HELD} | options
        made.extend(n.node(tmp_path / f"holder{k}", k, **options) for k in range(count))
        return made

    yield make
    for one in made:
        one.close()


@pytest.fixture
def node(tmp_path):
    made = []

    def make(**options):
        made.append(n.node(tmp_path / "node", held_out=HELD, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Seen(pl.Callback):
    """Remembers the private evaluation of every round."""

    def __init__(self):
        self.found = {}

    def on_train_batch_end(self, trainer, module, *_):
        if module.evaluated is not None:
            self.found[trainer.current_epoch] = module.evaluated


def evaluate(to, round=1, *, known=0, params=None):
    head = {"do": "evaluate", "run": n.RUN, "round": round, "context": "", "known": known}
    return n.say(to, head, n.model() if params is None else params)


def join(to, rounds=4, **privacy):
    return n.join(to, n.terms(rounds, **(EVERY | privacy)))


def lines_of(tmp_path):
    return read(n.run_folder(tmp_path / "node"))[1]


# A run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "privacy",
    [
        {"setting": "record+local"},
        {"setting": "record+local", "mechanism": "laplace"},
        {"setting": "client+local", "epsilon": 20.0},
    ],
    ids=["record", "record, Laplace", "client"],
)
def test_a_public_seed_gives_the_evaluations_of_the_simulation(privacy, holders, tmp_path):
    privacy = EVERY | {"seed": 5} | privacy
    ours, theirs = Seen(), Seen()
    simulated = n.module(tmp_path / "simulated", **privacy)
    n.trainer(3, callbacks=[theirs]).fit(simulated, n.population(HELD))
    made = holders(simulation=True, epsilon=privacy.get("epsilon", n.EPSILON))
    run = n.deployed(tmp_path / "run", made, callbacks=[ours], held_out=HELD, **privacy)
    assert [*ours.found] == [*theirs.found] == [1, 2]
    for round, found in theirs.found.items():
        assert ours.found[round].accuracy == pytest.approx(found.accuracy, abs=1e-12)
        assert ours.found[round].standard_error == found.standard_error
        assert ours.found[round].clients == found.clients == n.CLIENTS
    for a, b in zip(run.ledger.releases, simulated.ledger.releases, strict=True):
        assert (a.round, a.client, a.evaluation, a.binding) == (
            b.round, b.client, b.evaluation, b.binding,
        )  # fmt: skip
        assert not a.evaluation or a.noise_multiplier == b.noise_multiplier
    assert run.ledger.header["evaluation"] == simulated.ledger.header["evaluation"]
    assert verify(tmp_path / "run") == []


def test_every_node_pays_for_its_own_and_the_server_has_its_lines(holders, tmp_path):
    seen, made = Seen(), holders()
    run = n.deployed(tmp_path / "run", made, callbacks=[seen], rounds=4, **EVERY)
    assert [*seen.found] == [1, 3]
    assert verify(tmp_path / "run") == []
    for k in range(n.CLIENTS):
        folder = n.run_folder(tmp_path / f"holder{k}", run.run.run_id)
        assert verify(folder) == []
        header, own = read(folder)
        copied = [r.digest for r in run.ledger.releases if r.client == k]
        assert [r.digest for r in own] == copied
        assert [r.round for r in own if r.evaluation] == [1, 3]
        assert 7.0 < accounts(header, own)[0].epsilon() <= n.EPSILON
    assert len({r.binding for r in run.ledger.releases}) == len(run.ledger)
    assert "2 of 2 planned evaluations of 3 clients" in privacy_statement(run.ledger)


def test_nodes_that_are_not_in_a_round_are_evaluated_after_it(holders, tmp_path):
    """Their updates are planned for fewer rounds than the run has; evaluations for all of them."""
    made, rules = holders(), {"clients_per_round": 1}
    run = n.deployed(tmp_path / "run", made, rounds=6, rules=rules, **EVERY)
    assert verify(tmp_path / "run") == []
    for k in range(n.CLIENTS):
        folder = n.run_folder(tmp_path / f"holder{k}", run.run.run_id)
        assert verify(folder) == []
        own = read(folder)[1]
        assert [r.round for r in own if r.evaluation] == [1, 3, 5]
        assert sum(not r.evaluation for r in own) == 2


def test_nodes_that_keep_their_numbers_back_count_alike(holders, tmp_path):
    seen, made = Seen(), holders(announce_records=False, epsilon=20.0)
    privacy = EVERY | {"setting": "client+local", "epsilon": 20.0}
    run = n.deployed(tmp_path / "run", made, callbacks=[seen], **privacy)
    z = run.run.budget.evaluation_multiplier
    assert seen.found[1].standard_error == pytest.approx(float(z.square().sum().sqrt()) / 3)
    with pytest.raises(ValueError, match="evaluate_every=2: client 0 does not say how many"):
        n.deployed(tmp_path / "other", made, **EVERY)


def test_a_node_without_held_out_records_takes_no_part(tmp_path, holders):
    made = holders()
    made[1].close()
    made[1] = n.node(tmp_path / "none", 1)
    with pytest.raises(ValueError, match=r"keeps no records for evaluations \(data.val_fraction"):
        n.deployed(tmp_path / "run", made, **EVERY)
    empty = [n.node(tmp_path / f"empty{k}", k) for k in range(n.CLIENTS)]
    with pytest.raises(ValueError, match="evaluate_every=2: no node holds records out"):
        n.deployed(tmp_path / "other", empty, **EVERY)
    for one in empty:
        one.close()


def test_an_evaluation_that_is_lost_or_forged_is_left_out_and_its_line_comes_later(
    holders, tmp_path
):
    made, seen = holders(), Seen()

    def ask(asked):
        found = {k: made[k].answer(m) for k, m in asked.items()}
        head, tensors = n.decode(found.get(2, n.encode({})))
        if "answers" in tensors and head["lines"][-1]["round"] == 1:
            found[2] = n.encode(head, {"answers": tensors["answers"] + 1.0})
            found.pop(1)
        return found

    run = n.module(tmp_path / "run", **EVERY)
    run.federation = n.Federation(n.federation(made).members, ask)
    n.trainer(3, callbacks=[seen]).fit(run, n.population())
    assert [(round, e.clients) for round, e in seen.found.items()] == [(1, 1), (2, 3)]
    for k in range(n.CLIENTS):
        assert [r.round for r in run.ledger.releases if r.client == k and r.evaluation] == [1, 2]
    assert verify(tmp_path / "run") == []


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("lost", ["before it is asked", "after it is paid for"])
def test_a_server_that_was_killed_asks_again_for_nothing(lost, holders, tmp_path):
    made, rounds = holders(), 4

    def trained(folder, ask, resume=None):
        run = n.module(folder, **EVERY)
        run.federation = n.Federation(n.federation(made).members, ask)
        keep = ModelCheckpoint(folder, filename="last", save_on_train_epoch_end=True)
        trainer = pl.Trainer(
            max_epochs=rounds, accelerator="cpu", logger=False, limit_val_batches=0,
            callbacks=[keep], enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        try:
            trainer.fit(run, n.population(), ckpt_path=resume, weights_only=True)
        finally:
            run.ledger.close()
        return run

    def whole(asked):
        return {k: made[k].answer(m) for k, m in asked.items()}

    def dies(asked):
        head, _ = n.decode(next(iter(asked.values())))
        last = head["do"] == "evaluate" and head["round"] == 3
        if last and lost == "before it is asked":
            raise Killed
        found = whole(asked)
        if last:
            raise Killed
        return found

    with pytest.raises(Killed):
        trained(tmp_path / "run", dies)
    before = {k: len(read(f)[1]) for k, f in enumerate(sorted(tmp_path.glob("holder*/runs/*")))}
    run = trained(tmp_path / "run", whole, tmp_path / "run" / "last.ckpt")
    assert verify(tmp_path / "run") == []
    for k, folder in enumerate(sorted(tmp_path.glob("holder*/runs/*"))):
        own = read(folder)[1]
        assert len(own) == rounds + 2
        assert before[k] == len(own) - (lost == "before it is asked")
        assert [r.digest for r in run.ledger.releases if r.client == k] == [r.digest for r in own]


# A node ------------------------------------------------------------------------------------------


def test_a_node_pays_and_says_no_more_than_its_noised_number(node, tmp_path):
    one = node()
    held = len(n.population(HELD).only(0).held_out[0])
    assert parse_member(n.say(one, {"do": "hello"})[0]).held_out == held > 0
    joined = join(one)
    head, tensors = evaluate(one)
    (line,) = lines_of(tmp_path)
    assert line.evaluation
    assert line.noise_multiplier == joined["evaluation_multiplier"] > 0
    assert [entry["digest"] for entry in head["lines"]] == [line.digest]
    assert sorted(head) == ["did", "head", "lines"]
    one.close()
    text = (n.run_folder(tmp_path / "node") / "privacy_statement.md").read_text()
    assert "1 of 2 planned evaluations of 1 clients" in text
    assert {name: t.shape for name, t in tensors.items()} == {"answers": (1,)}


def test_the_same_question_is_charged_once_and_another_again(node, tmp_path):
    one = node()
    join(one)
    n.release(one, 0)
    n.release(one, 1, known=1)
    first = evaluate(one, known=2)
    update = n.release(one, 1, known=3)
    assert [parse_release(e).evaluation for e in update[0]["lines"]] == [False, True]
    assert evaluate(one, known=3)[1]["answers"] == first[1]["answers"]
    assert len(lines_of(tmp_path)) == 3
    other = evaluate(one, known=3, params=n.model(0.5))
    assert other[1]["answers"] != first[1]["answers"]
    refused = evaluate(one, known=4, params=n.model(0.25))[0]["refused"]
    assert refused == "evaluation: all that were planned are released"
    assert [r.evaluation for r in lines_of(tmp_path)] == [False, False, True, True]
    assert "lines" in n.release(one, 2, known=4)[0]
    assert verify(n.run_folder(tmp_path / "node")) == []


@pytest.mark.parametrize("round", [0, 2, 4, 100])
def test_none_is_given_after_a_round_that_plans_none(round, node, tmp_path):
    one = node()
    join(one)
    assert "no evaluation is due" in evaluate(one, round)[0]["refused"]
    n.release(one, 0)
    assert len(lines_of(tmp_path)) == 1


def test_evaluations_of_more_rounds_than_the_holder_allows_are_refused_at_once(node, tmp_path):
    one, agreement = node(), n.terms(4, **EVERY)
    for span in (11, 2**31 - 1):
        refused = n.join(one, agreement, span=span)["refused"]
        assert refused.startswith(f"policy: rounds with evaluations is {span}, the holder allows")
    assert not (tmp_path / "node" / "runs").exists()
    assert "refused" not in n.join(one, agreement, span=10)


def test_a_run_without_evaluations_gives_none(node, tmp_path):
    one = node()
    n.join(one, n.terms(4))
    assert "no evaluation is due" in evaluate(one)[0]["refused"]
    assert lines_of(tmp_path) == []


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_node_repeats_its_evaluation_for_nothing(place, node, monkeypatch, tmp_path):
    name, when = PLACES[place]
    name = name.replace("claim.write_lines", "evaluation.write_lines")
    owner, _, attribute = name.rpartition(".")
    target = client_run.ClientRun if owner.endswith("ClientRun") else __import__(
        owner, fromlist=["x"]
    )  # fmt: skip
    real, one = getattr(target, attribute), node()
    join(one)
    n.release(one, 0)

    def dies(*args, **kwargs):
        if when == "after":
            real(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(target, attribute, dies)
        with pytest.raises(Killed):
            evaluate(one, known=1)
    one.close()
    assert len(lines_of(tmp_path)) == (1 if place == "before the ledger line" else 2)
    again = node()
    head, tensors = evaluate(again, known=1)
    (line,) = [r for r in lines_of(tmp_path) if r.evaluation]
    assert head["lines"][-1]["digest"] == line.digest
    assert torch.equal(evaluate(again, known=2)[1]["answers"], tensors["answers"])
    assert verify(n.run_folder(tmp_path / "node")) == []


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_the_noise_of_a_node_has_the_scale_that_it_is_charged_for(mechanism, tmp_path):
    """Many nodes of one record set answer for one model; 2/3 and 3/2 of the scale would be seen."""
    noises, records = [], n.population(HELD).only(0)
    x, y = records.held_out
    network = n.network()
    right = int((network(x).argmax(1) == y).sum())
    for k in range(60):
        one = n.node(tmp_path / str(k), 0, held_out=HELD)
        z = join(one, mechanism=mechanism)["evaluation_multiplier"]
        noises += [(float(evaluate(one, r)[1]["answers"]) - right) / z for r in (1, 3)]
        one.close()
    size = np.abs(noises).mean()
    expected, deviation = (0.798, 0.603) if mechanism == "gaussian" else (1.0, 1.0)
    assert size == pytest.approx(expected, abs=2.5 * deviation / np.sqrt(len(noises)))
    assert 2.5 * deviation / np.sqrt(len(noises)) < expected / 3


def test_accuracies_of_some_are_weighed_by_their_records():
    noised, z = torch.tensor([3.0, 8.0]), torch.tensor([1.0, 2.0])
    ones, records = torch.ones(2), torch.tensor([5, 10])
    found = evaluated(PrivacyConfig(seed=1), noised, z, ones, records)
    assert (found.accuracy, found.clients) == (pytest.approx(11 / 15), 2)
    assert found.standard_error == pytest.approx(5**0.5 / 15)
    clients = PrivacyConfig(setting="client+local", seed=1)
    assert evaluated(clients, noised, z, ones, records).accuracy == pytest.approx(5.5)
