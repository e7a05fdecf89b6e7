"""Stopping and going on: the same bits, nothing charged twice, nothing reused on other inputs."""

import hashlib

import pytest
import torch

from fl_lightning import ledger as ledgers
from fl_lightning.models import MLP
from tests.fl_lightning.resuming import (
    CLIENTS,
    RECORD,
    SETTINGS,
    charged,
    crash,
    go,
    rows,
    same_optimizers,
    same_tensors,
)


@pytest.mark.parametrize("execution", ["vmap", pytest.param("loop", marks=pytest.mark.slow)])
@pytest.mark.parametrize("setting", SETTINGS)
def test_three_and_three_rounds_are_six_bit_for_bit(tmp_path, setting, execution):
    options = {"privacy": SETTINGS[setting], "execution": execution, "local_steps": 2}
    whole = go(tmp_path / "whole", 6, **options)
    go(tmp_path / "halves", 3, **options)
    halves = go(tmp_path / "halves", 6, resume=True, **options)

    start = go(tmp_path / "start", 0, **options)
    assert not torch.equal(whole.network.fc1.weight, start.network.fc1.weight)
    same_tensors(whole.state_dict(), halves.state_dict())
    same_tensors(whole.run.history.state_dict(), halves.run.history.state_dict())
    same_optimizers(whole, halves)
    spent = [f"epsilon_{which}" for which in ("max", "median", "min")]
    for name in ("rounds.csv", "layers.csv"):
        both = [rows(tmp_path / run / name, ("seconds", *spent)) for run in ("whole", "halves")]
        assert both[0] == both[1]
    whole_rows, half_rows = (rows(tmp_path / run / "rounds.csv") for run in ("whole", "halves"))
    assert len(whole_rows) == 6
    for one, other in zip(whole_rows, half_rows, strict=True):
        # The last row of a run that ends is the ledger's ε itself, one before it a bound on it.
        for name in spent if one["epsilon_max"] else ():
            assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-3)
    assert all(whole_rows[-1][name] == half_rows[-1][name] for name in spent)
    if setting != "none":
        for name in ("ledger.jsonl", "ledger.head"):
            assert (tmp_path / "whole" / name).read_bytes() == (
                tmp_path / "halves" / name
            ).read_bytes()


def test_cohorts_and_schedules_go_on(tmp_path):
    def decay(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)

    options = {
        "privacy": {"setting": "none"},
        "clients_per_round": 2,
        "sampling_rate": None,
        "batch_size": 4,
        "local_steps": None,
        "server_scheduler": decay,
    }
    whole = go(tmp_path / "whole", 5, **options)
    go(tmp_path / "parts", 2, **options)
    parts = go(tmp_path / "parts", 5, resume=True, **options)
    same_tensors(whole.state_dict(), parts.state_dict())
    same_optimizers(whole, parts)
    assert parts.trainer.optimizers[0].param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("round", [0, 3, 7])
@pytest.mark.parametrize("seed", [7, None])
def test_a_crash_between_ledger_and_checkpoint_costs_nothing(tmp_path, round, seed):
    privacy = SETTINGS["record+local"] | {"seed": seed}
    crash(tmp_path, round, privacy=privacy)
    before = (tmp_path / "ledger.jsonl").read_bytes()
    assert len(charged(tmp_path)) == CLIENTS * (round + 1)

    resumed = go(tmp_path, 8, resume=True, privacy=privacy)
    after = (tmp_path / "ledger.jsonl").read_bytes()
    assert after.startswith(before)
    assert sorted(charged(tmp_path)) == sorted((k, t, 0) for k in range(CLIENTS) for t in range(8))
    assert resumed.run.budget.spent.tolist() == [8] * CLIENTS
    if seed is not None:
        same_tensors(resumed.state_dict(), go(tmp_path / "whole", 8, privacy=privacy).state_dict())


def test_rounds_between_sparse_checkpoints_are_repeated_for_free(tmp_path):
    # The ledger is whole when the last round crashes: nobody can pay, and all must be repeated.
    privacy = {"epsilon": 8.0, "clip_norm": 1.0}
    options = {"privacy": privacy, "planned_rounds": 8, "sampling_rate": 1.0}
    crash(tmp_path / "run", 7, every=3, **options)
    resumed = go(tmp_path / "run", 8, resume=True, every=3, **options)
    whole = go(tmp_path / "whole", 8, **options)
    same_tensors(whole.state_dict(), resumed.state_dict())
    same_optimizers(whole, resumed)
    for name in ("ledger.jsonl", "ledger.head"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # What was spent is by the ledger, which was ahead.
    epsilons = ("seconds", "epsilon_max", "epsilon_median", "epsilon_min")
    assert rows(tmp_path / "run" / "rounds.csv", epsilons) == rows(
        tmp_path / "whole" / "rounds.csv", epsilons
    )


def other_threads():
    torch.set_num_threads(1 if torch.get_num_threads() > 1 else 2)


@pytest.mark.parametrize(
    ("changed", "before"),
    [
        ({"client_lr": 0.05}, None),
        ({"memory_budget": 1e-6}, None),
        ({"local_steps": 2}, None),
        ({}, other_threads),
    ],
    ids=["client_lr", "memory_budget", "local_steps", "threads"],
)
def test_changed_inputs_draw_fresh_noise_and_are_charged(tmp_path, changed, before):
    privacy = SETTINGS["record+local"] | {"seed": None}
    crash(tmp_path, 2, privacy=privacy)
    threads = torch.get_num_threads()
    try:
        if before:
            before()
        resumed = go(tmp_path, 5, resume=True, privacy=privacy, **changed)
    finally:
        torch.set_num_threads(threads)
    releases = ledgers.read(tmp_path)[1]
    repeated = [r for r in releases if r.round == 2]
    assert sorted(r.attempt for r in repeated) == [0] * CLIENTS + [1] * CLIENTS
    for client in range(CLIENTS):
        first, second = (r for r in repeated if r.client == client)
        assert first.binding != second.binding
        assert first.digest != second.digest
    steps = changed.get("local_steps", 1)
    assert resumed.run.budget.spent.tolist() == [3 + 3 * steps] * CLIENTS
    assert ledgers.report(tmp_path)[0].steps == 3 + 3 * steps


def test_a_changed_network_behind_the_same_facts_is_charged(tmp_path, monkeypatch):
    # Code that nothing of the binding sees: the same noise must not meet another gradient.
    privacy = SETTINGS["record+local"]
    crash(tmp_path, 1, privacy=privacy)
    monkeypatch.setattr(MLP, "forward", lambda self, x: self.fc2(self.fc1(self.flatten(x)).relu()))
    go(tmp_path, 3, resume=True, privacy=privacy)
    again = [r for r in ledgers.read(tmp_path)[1] if r.round == 1]
    assert len({r.binding for r in again}) == len(again) // CLIENTS == 2
    assert sorted(r.attempt for r in again) == [0] * CLIENTS + [1] * CLIENTS


def test_clients_that_cannot_pay_leave_and_the_run_ends(tmp_path):
    privacy = {"epsilon": 4.0, "clip_norm": 1.0}
    options = {"privacy": privacy, "sampling_rate": 1.0}
    crash(tmp_path, 5, **options)
    resumed = go(tmp_path, 8, resume=True, client_lr=0.05, **options)
    lines = charged(tmp_path)
    assert [sum(1 for k, _, _ in lines if k == c) for c in range(CLIENTS)] == [8] * CLIENTS
    assert {(t, a) for _, t, a in lines} == {(t, 0) for t in range(7)} | {(5, 1)}
    assert resumed.trainer.current_epoch == 7
    assert resumed.trainer.state.finished
    for report in ledgers.report(tmp_path).values():
        assert report.epsilon <= 4.0
    again = go(tmp_path, 8, resume=True, client_lr=0.05, **options)
    assert charged(tmp_path) == lines
    same_tensors(again.state_dict(), resumed.state_dict())
    assert rows(tmp_path / "rounds.csv")[-1]["clients"] == "0"


@pytest.mark.parametrize("weighting", ["records", "precision"])
def test_a_last_round_that_nobody_can_pay_for_again_changes_nothing(tmp_path, weighting):
    options = {"privacy": {"epsilon": 4.0}, "sampling_rate": 1.0, "weighting": weighting}
    crash(tmp_path, 7, **options)
    lines = charged(tmp_path)
    resumed = go(tmp_path, 8, resume=True, client_lr=0.05, **options)
    assert charged(tmp_path) == lines
    before = go(tmp_path / "before", 7, **options)
    same_tensors(resumed.state_dict(), before.state_dict())
    assert resumed.network.fc1.weight.isfinite().all()
    assert rows(tmp_path / "rounds.csv")[-1]["clients"] == "0"


def test_rounds_without_anybody_pass(tmp_path):
    # One client a round: where the scheduled one cannot pay, the model stays as it is.
    privacy = RECORD | {"noise_multiplier": 2.0, "epsilon": [20.0, 2.0, 20.0]}
    go(tmp_path, 8, privacy=privacy, sampling_rate=1.0, clients_per_round=1)
    taken = [int(r["clients"]) for r in rows(tmp_path / "rounds.csv")]
    assert set(taken) == {0, 1}
    assert [k for k, _, _ in charged(tmp_path)].count(1) == 1


def test_one_client_leaves_while_the_others_go_on(tmp_path):
    privacy = RECORD | {"noise_multiplier": 2.0, "epsilon": [20.0, 2.0, 20.0]}
    module = go(tmp_path, 8, privacy=privacy, sampling_rate=1.0)
    counts = [sum(1 for k, _, _ in charged(tmp_path) if k == c) for c in range(CLIENTS)]
    assert counts[0] == counts[2] == 8
    assert 1 <= counts[1] < 8
    assert module.run.budget.affordable[1] == counts[1]
    assert ledgers.report(tmp_path)[1].epsilon <= 2.0


def test_the_secret_is_nowhere_else(tmp_path):
    privacy = RECORD | {"seed": None}
    module = go(tmp_path, 2, privacy=privacy)
    secret = (tmp_path / "secret.key").read_bytes()
    assert len(secret) == 32
    assert (tmp_path / "secret.key").stat().st_mode & 0o777 == 0o600
    words = b"".join(int(w).to_bytes(4, "little") for w in module.run.key.words)
    public = hashlib.blake2b(secret).hexdigest().encode()
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "secret.key"]
    assert {"last.ckpt", "ledger.jsonl", "rounds.csv", "layers.csv"} <= {p.name for p in files}
    for path in files:
        data = path.read_bytes()
        for form in (secret, secret.hex().encode(), secret[:16], words, words.hex().encode()):
            assert form not in data, path
        assert public not in data


def test_two_secret_runs_differ_and_one_repeated_is_the_same(tmp_path):
    privacy = RECORD | {"seed": None}
    one = go(tmp_path / "one", 2, privacy=privacy)
    two = go(tmp_path / "two", 2, privacy=privacy)
    assert not torch.equal(one.network.fc1.weight, two.network.fc1.weight)
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "secret.key").write_bytes((tmp_path / "one" / "secret.key").read_bytes())
    (tmp_path / "three" / "secret.key").chmod(0o600)
    same_tensors(go(tmp_path / "three", 2, privacy=privacy).state_dict(), one.state_dict())
