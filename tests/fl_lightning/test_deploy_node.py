"""A node against whoever reaches its socket: refusals, or noised releases that are charged."""

import json
import math

import pytest
import torch

from fl_lightning.deploy import client_run
from fl_lightning.deploy.journal import FILE as JOURNAL
from fl_lightning.deploy.journal import Journal
from fl_lightning.ledger import LedgerError, read, report, verify
from fl_lightning.release.one_by_one import OneByOne
from tests.fl_lightning import nodes as n


@pytest.fixture
def node(tmp_path):
    made = []

    def make(**options):
        made.append(n.node(tmp_path / "holder", **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def folder(tmp_path):
    return n.run_folder(tmp_path / "holder")


def refusals(tmp_path) -> list[dict]:
    lines = (tmp_path / "holder" / JOURNAL).read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_joined_node_releases_and_pays_first(node, tmp_path):
    one = node()
    joined = n.join(one)
    assert joined["noise_multiplier"] > 0
    assert joined["affordable"] == 20
    head, tensors = n.release(one)
    _, lines = read(folder(tmp_path))
    assert [line["digest"] for line in head["lines"]] == [lines[0].digest]
    assert {name for name in tensors if name.startswith("update.")} == {
        f"update.{name}" for name in n.model()
    }
    assert verify(folder(tmp_path)) == []


def test_nothing_private_leaves_but_the_release(node):
    one = node()
    n.join(one)
    head, tensors = n.release(one)
    assert sorted(head) == ["did", "head", "lines"]
    names = {"l1_norm", *(f"policy.{p}" for p in ("clip_norm", "shares", "contribution"))}
    assert {name for name in tensors if not name.startswith("update.")} == names | {
        "policy.noise_scale"
    }


def test_the_same_question_gets_the_same_answer_and_is_charged_once(node, tmp_path):
    one = node()
    n.join(one)
    first, again = n.release(one), n.release(one)
    assert first[0] == again[0]
    assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])
    assert len(read(folder(tmp_path))[1]) == 1


def test_a_server_has_no_say_in_what_secret_noise_is_bound_to(node, tmp_path):
    one = node()
    n.join(one)
    head = {"do": "release", "run": n.RUN, "round": 0, "known": 0}
    for context in ("one", "another"):
        n.say(one, head | {"context": context}, n.model())
    assert len(read(folder(tmp_path))[1]) == 1


def test_the_terms_of_a_run_do_not_change(node):
    one = node()
    n.join(one)
    n.release(one)
    assert n.join(one, n.terms(clip_norm=3.0))["refused"].startswith("terms:")
    assert "refused" not in n.join(one)


@pytest.mark.parametrize("change", ["model", "round", "history"])
def test_another_question_has_other_noise_and_is_charged(change, node, tmp_path):
    one = node()
    n.join(one)
    n.release(one)
    if change == "model":
        n.release(one, 0, params=n.model(0.25))
    elif change == "round":
        n.release(one, 1)
    else:  # the same question after another release: the history has moved
        n.release(one, 1)
        n.release(one, 0)
    lines = read(folder(tmp_path))[1]
    assert len({line.binding for line in lines}) == len(lines) == (3 if change == "history" else 2)


def test_a_node_never_spends_more_than_its_holder_promised(node, tmp_path):
    one = node()
    n.join(one)
    answers = [n.release(one, 0, params=n.model(0.1 * i))[0] for i in range(12)]
    assert ["refused" in head for head in answers] == [False] * 10 + [True] * 2
    assert answers[-1]["refused"].startswith("spent:")
    assert len(read(folder(tmp_path))[1]) == 10
    assert report(folder(tmp_path))[0].epsilon <= n.EPSILON


def test_a_second_run_is_refused_once_the_first_has_released(node, tmp_path):
    one = node()
    n.join(one)
    other = "cd" * 32
    assert "refused" not in n.join(one, run=other)  # the first released nothing yet
    assert n.release(one)[0]["refused"].startswith("not joined:")
    assert "lines" in n.release(one, run=other)[0]
    assert n.join(one)["refused"].startswith("spent:")
    assert [p.name for p in (tmp_path / "holder" / "runs").iterdir()] == [other]


def test_as_many_runs_release_as_the_holder_allows(node):
    one = node(runs=2)
    runs = [f"{i:064x}" for i in range(3)]
    answers = []
    for run in runs:
        joined = n.join(one, run=run)
        answers.append("lines" in n.release(one, run=run)[0] if "refused" not in joined else False)
    assert answers == [True, True, False]


HOSTILE = {
    "ten times the rounds": (n.terms(rounds=100), "policy: rounds"),
    "another network": (n.terms(), "policy: network", {"network": "0" * 64}),
    "an infinite clip norm": (n.terms(), "terms: ", {"clip_norm": math.inf}),
    "no number for a clip norm": (n.terms(), "terms: ", {"clip_norm": "nan"}),
    "no noise": (n.terms(), "terms: ", {"noise_multiplier": 0.0}),
    "an epsilon of its own": (n.terms(), "terms: ", {"epsilon": 1e6}),
    "raw norms": (n.terms(), "terms: ", {"thresholds": "raw"}),
    "no privacy": (n.terms(), "policy: setting", {"setting": "none"}),
    "noise at the server": (n.terms(), "policy: setting", {"setting": "client+aggregator"}),
    "a public seed": (n.terms(), "policy: seed", {"seed": 1}),
    "a weak generator": (n.terms(), "policy: rng", {"rng": "philox10"}),
    "a rule of a comparator": (n.terms(), "terms: ", {"comparator": {"votes_on": "l1"}}),
    "code for a value": (n.terms(), "terms: ", {"clip_norm": {"class_path": "os.system"}}),
    "a long history": (n.terms(), "policy: history", {"history": 10**9}),
    "many local steps": (n.terms(rules={"local_steps": 1000}), "policy: local steps"),
    "minibatches without accounting": (
        n.terms(), "terms: ", {}, {"sampling_rate": None, "batch_size": 5},
    ),
    "no learning rate": (n.terms(), "terms: ", {}, {"lr": math.inf}),
    "training of another kind": (n.terms(), "terms: ", {}, {"optimizer": "adam"}),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_terms_are_refused_and_the_journal_shows_it(case, node, tmp_path):
    agreement, word, privacy, training = (*HOSTILE[case], {}, {})[:4]
    one = node()
    wanted = n.terms_of(agreement)
    if "network" in privacy:
        wanted["network"] = privacy["network"]
        privacy = {}
    wanted["privacy"] = wanted["privacy"] | privacy
    wanted["training"] = wanted["training"] | training
    answer = n.say(one, {"do": "join", "terms": wanted, "known": 0})[0]
    assert answer["refused"].startswith(word), answer
    assert refusals(tmp_path)[-1]["reason"] == answer["refused"]
    assert not (tmp_path / "holder" / "runs").exists()
    assert "refused" not in n.join(one), "and the node goes on"


def test_a_network_is_one_that_the_policy_names(node):
    assert n.join(node(networks=[]))["refused"].startswith("policy: network")


REQUESTS = {
    "raw records": ({"do": "records"}, {}),
    "no words": ({}, {}),
    "a path for a run": ({"do": "release", "run": "../../x", "round": 0, "known": 0}, {}),
    "a run that it does not know": ({"do": "release", "run": "f" * 64, "round": 0, "known": 0}, {}),
    "a round before the first": ({"round": -1}, None),
    "a round that is no number": ({"round": "0"}, None),
    "a long context": ({"context": "x" * 1000}, None),
    "lines that it never wrote": ({"known": 5}, None),
    "a model with other names": ({}, {"weight": torch.zeros(3)}),
    "a model of another shape": ({}, n.model() | {"0.bias": torch.zeros(7)}),
    "a model of another dtype": ({}, n.model() | {"0.bias": torch.zeros(6).double()}),
    "a model that is not finite": ({}, n.model() | {"0.bias": torch.full((6,), math.inf)}),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_requests_that_make_no_sense_are_refused_and_cost_nothing(case, node, tmp_path):
    change, tensors = REQUESTS[case]
    one = node()
    n.join(one)
    head = {"do": "release", "run": n.RUN, "round": 0, "context": "", "known": 0}
    whole = change if "do" in change or (not change and not tensors) else head | change
    answer = n.say(one, whole, n.model() if tensors is None else tensors)[0]
    word = (
        "not joined:" if "does not know" in case else "ledger:" if "lines" in case else "request:"
    )
    assert answer["refused"].startswith(word)
    assert refusals(tmp_path)[-1]["reason"] == answer["refused"]
    assert read(folder(tmp_path))[1] == []
    assert "lines" in n.release(one, 1)[0], "and the node goes on"


def test_bytes_that_are_no_message_are_refused(node):
    one = node()
    for data in (b"", b"\0" * 8, b"x" * 100, n.encode({"do": "hello"})[:-1]):
        assert "cannot be read" in n.decode(one.answer(data))[0]["refused"]


def test_after_an_error_within_nothing_more_is_answered(node, monkeypatch, tmp_path):
    one = node()
    n.join(one)

    def fails(*args, **kwargs):
        raise MemoryError("record 7 is too large")

    with monkeypatch.context() as patch:
        patch.setattr(OneByOne, "draw", fails)
        answer = n.release(one)[0]
    assert answer["refused"].startswith("stopped:")
    assert "record" not in answer["refused"]
    assert n.release(one)[0] == answer == n.say(one, {"do": "hello"})[0]
    one.close()
    assert "lines" in n.release(node())[0], "until its holder starts it again"


def test_a_full_disk_is_a_refusal_and_releases_nothing(node, monkeypatch, tmp_path):
    one = node()
    n.join(one)
    from fl_lightning.ledger import chain

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(chain, "write_all", full)
        assert n.release(one)[0]["refused"].startswith("ledger:")
    one.close()
    assert len(read(folder(tmp_path))[1]) == 0
    assert "lines" in n.release(node())[0]


class Killed(BaseException):
    """The process ends here."""


PLACES = {
    "before the ledger line": ("fl_lightning.release.claim.write_lines", "before"),
    "after the ledger line": ("fl_lightning.release.claim.write_lines", "after"),
    "before the state is saved": ("fl_lightning.deploy.client_run.ClientRun._save", "before"),
    "after the state is saved": ("fl_lightning.deploy.client_run.ClientRun._save", "after"),
    "before the answer": ("fl_lightning.deploy.client_run.encode", "before"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_node_repeats_its_release_for_nothing(place, node, monkeypatch, tmp_path):
    name, when = PLACES[place]
    one = node()
    n.join(one)
    n.release(one, 0)
    owner, _, attribute = name.rpartition(".")
    target = client_run.ClientRun if owner.endswith("ClientRun") else __import__(
        owner, fromlist=["x"]
    )  # fmt: skip
    real = getattr(target, attribute)

    def dies(*args, **kwargs):
        if when == "after":
            real(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(target, attribute, dies)
        with pytest.raises(Killed):
            n.release(one, 1, params=n.model(0.5))
    one.close()
    known = len(read(folder(tmp_path))[1])
    assert known == (1 if place == "before the ledger line" else 2)
    again = node()
    head, tensors = n.release(again, 1, known=1, params=n.model(0.5))
    lines = read(folder(tmp_path))[1]
    assert len(lines) == 2, "the same values with the same noise are charged once"
    assert head["lines"][-1]["digest"] == lines[-1].digest
    assert n.release(again, 2, known=2)[0]["lines"][0]["first_step"] == 4
    assert verify(folder(tmp_path)) == []
    del tensors


def test_a_node_whose_lines_were_lost_does_not_go_on(node, tmp_path):
    one = node()
    n.join(one)
    n.release(one, 0)
    one.close()
    kept = {p: p.read_bytes() for p in folder(tmp_path).rglob("*") if p.is_file()}
    two = node()
    n.release(two, 1, known=1)
    two.close()
    for path, data in kept.items():
        path.write_bytes(data)  # a backup of before
    answer = n.release(node(), 2, known=2)[0]
    assert answer["refused"].startswith("ledger:")


def test_a_holder_may_not_change_the_promise_of_a_run(node, tmp_path):
    one = node()
    n.join(one)
    n.release(one)
    one.close()
    answer = n.release(node(epsilon=16.0), 1)[0]
    assert answer["refused"].startswith("run:")


def test_a_folder_that_others_can_enter_is_refused(node, tmp_path):
    (tmp_path / "holder").mkdir(mode=0o755)
    with pytest.raises(ValueError, match="chmod 700"):
        node()


def test_one_folder_has_one_node(node, tmp_path):
    node()
    with pytest.raises(LedgerError, match="in use"):
        n.node(tmp_path / "holder")


def test_a_journal_that_was_edited_is_noticed(node, tmp_path):
    one = node()
    n.say(one, {"do": "records"})
    one.close()
    path = tmp_path / "holder" / JOURNAL
    path.write_text(path.read_text().replace("records", "nothing"))
    with pytest.raises(LedgerError, match="changed"):
        Journal(tmp_path / "holder")


def test_the_journal_does_not_fill_the_disk(node, monkeypatch, tmp_path):
    monkeypatch.setattr("fl_lightning.deploy.journal.MOST_LINES", 3)
    one = node()
    for _ in range(5):
        n.say(one, {"do": "records"})
    assert len(refusals(tmp_path)) == 3


def test_the_statement_of_a_node_is_of_one_client(node, tmp_path):
    one = node()
    n.join(one)
    n.release(one)
    n.say(one, {"do": "end"})
    text = (folder(tmp_path) / "privacy_statement.md").read_text()
    assert "1 releases of 1 clients" in text
    assert "SIMULATED" not in text
