"""A run with nodes is the simulated run: one model, one ledger, one statement."""

import json

import pytest
import torch

from fl_lightning.ledger import read, report, verify
from fl_lightning.ledger.statement import privacy_statement
from fl_lightning.output.summary import run_summary
from fl_lightning.privacy.allocation import division_ratio
from tests.fl_lightning import nodes as n


@pytest.fixture
def holders(tmp_path):
    made = []

    def make(**options):
        made.extend(n.node(tmp_path / f"holder{k}", k, **options) for k in range(n.CLIENTS))
        return made

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("setting", ["record+local", "client+local"])
def test_a_public_seed_gives_the_simulated_run(setting, holders, tmp_path):
    """Clip norms agree to the last bits of float64: torch computes a row alone by other code."""
    privacy = {"setting": setting, "seed": 5}
    simulated = n.module(tmp_path / "simulated", **privacy)
    n.trainer(3).fit(simulated, n.population())
    run = n.deployed(tmp_path / "deployed", holders(simulation=True), **privacy)
    for a, b in zip(simulated.network.parameters(), run.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    ours, theirs = (
        [(r.round, r.client, r.binding, r.event, r.first_step, r.tail_delta) for r in lines]
        for lines in (run.ledger.releases, simulated.ledger.releases)
    )
    assert ours == theirs
    for a, b in zip(run.ledger.releases, simulated.ledger.releases, strict=True):
        assert a.clip_norm == pytest.approx(b.clip_norm, rel=1e-12)
        assert a.shares == pytest.approx(b.shares, rel=1e-12)
    assert run.ledger.header["noise_multiplier"] == simulated.ledger.header["noise_multiplier"]


def test_secret_noise_is_the_nodes_own_and_every_ledger_is_whole(holders, tmp_path):
    nodes = holders()
    run = n.deployed(tmp_path / "deployed", nodes)
    assert verify(tmp_path / "deployed") == []
    copied = {k: [r for r in run.ledger.releases if r.client == k] for k in range(n.CLIENTS)}
    for k in range(n.CLIENTS):
        folder = n.run_folder(tmp_path / f"holder{k}", run.run.run_id)
        assert verify(folder) == []
        header, own = read(folder)
        assert not header["simulated"]
        assert [r.digest for r in own] == [r.digest for r in copied[k]]
        assert report(folder)[0].epsilon == report(tmp_path / "deployed")[k].epsilon <= n.EPSILON
    bindings = {r.binding for r in run.ledger.releases}
    assert len(bindings) == len(run.ledger)


def test_personal_promises_reach_the_run(holders, tmp_path):
    strict = n.node(tmp_path / "strict", 0, epsilon=2.0)
    nodes = [strict, *holders()[1:]]
    run = n.deployed(tmp_path / "deployed", nodes, epsilon=[2.0, 8.0, 8.0])
    strict.close()
    multiplier = run.ledger.header["noise_multiplier"]
    assert multiplier[0] > multiplier[1] == multiplier[2]
    found = {k: r.epsilon for k, r in report(tmp_path / "deployed").items()}
    assert found[0] <= 2.0 < 7.0 < found[1] <= 8.0


def test_what_a_deployed_run_says_of_itself(holders, tmp_path):
    run = n.deployed(tmp_path / "deployed", holders())
    text = privacy_statement(run.ledger)
    assert "server's copy" in text
    assert "sim_only" not in text
    summary = run_summary(run.trainer, run, 1.0)
    l1, dims = run.run.history.l1_norm, run.run.history.dims
    assert summary["division_ratio"] == float(division_ratio(l1, dims).median())
    assert 0 < summary["division_ratio"] < 1
    found = json.loads(json.dumps(summary["nodes"]))
    heads = [read_head(tmp_path / f"holder{k}", run.run.run_id) for k in range(n.CLIENTS)]
    assert [one["ledger_head"] for one in found] == heads
    assert run.result.nonfinite is None
    assert all(v != v for v in run.result.clipped_fraction.ravel())  # clients keep it to themselves


def read_head(folder, run):
    return json.loads((n.run_folder(folder, run) / "ledger.head").read_text())["hash"]


def test_nodes_that_are_late_are_left_out_and_their_lines_come_later(holders, tmp_path):
    nodes, answers = holders(), []

    def ask(asked):
        found = {k: nodes[k].answer(m) for k, m in asked.items()}
        answers.append(len(found))
        # The second answer of node 1 to a release is lost on the way: it was paid for.
        return {k: a for k, a in found.items() if not (k == 1 and len(answers) == 3)}

    made = n.module(tmp_path / "deployed")
    made.federation = n.Federation(n.federation(nodes).members, ask)
    n.trainer(3).fit(made, n.population())
    rounds = [r.round for r in made.ledger.releases if r.client == 1]
    assert rounds == [0, 1, 2]
    assert [r.first_step for r in made.ledger.releases if r.client == 1] == [0, 2, 4]
    assert verify(tmp_path / "deployed") == []


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"setting": "client+aggregator"}, "setting="),
        ({"noise_multiplier": 1.0}, "noise_multiplier"),
        ({"rules": {"dropout": 0.1}}, "dropout"),
    ],
)
def test_what_nodes_cannot_do_is_refused_before_anything(options, word, holders, tmp_path):
    with pytest.raises(ValueError, match=word):
        n.deployed(tmp_path / "deployed", holders(), **options)
    assert not list(tmp_path.glob("holder*/runs/*"))


def test_a_forged_release_is_left_out(holders, tmp_path):
    nodes = holders()

    def ask(asked):
        found = {k: nodes[k].answer(m) for k, m in asked.items()}
        head, tensors = n.decode(found[2])
        if "update.0.weight" in tensors:
            tensors["update.0.weight"] += 1.0
            found[2] = n.encode(head, tensors)
        return found

    made = n.module(tmp_path / "deployed")
    made.federation = n.Federation(n.federation(nodes).members, ask)
    n.trainer(2).fit(made, n.population())
    assert {r.client for r in made.ledger.releases} == {0, 1}
