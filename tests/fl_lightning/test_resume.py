"""Stopping and going on: the same bits, nothing charged twice, nothing reused on other inputs."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from fl_lightning import FederatedDataModule, FederatedModule, PrivacyConfig, from_arrays
from fl_lightning import ledger as ledgers
from fl_lightning.callbacks import RoundRecorder
from fl_lightning.checkpoint import CHECKPOINT, AtomicCheckpointIO, RoundCheckpoint
from fl_lightning.ledger import Ledger, LedgerError
from fl_lightning.models import MLP

CLIENTS = 3
RECORD = {"noise_multiplier": 1.0, "epsilon": None, "clip_norm": 1.0}
SETTINGS = {
    "record+local": RECORD | {"setting": "record+local", "thresholds": "quantile"},
    "client+local": RECORD | {"setting": "client+local", "thresholds": "released", "delta": 0.1},
    "client+aggregator": RECORD | {"setting": "client+aggregator", "delta": 0.1},
    "client+secure_sum": RECORD | {"setting": "client+secure_sum", "delta": 0.1},
    "record+local grid": RECORD | {"thresholds": "quantile", "noise_form": "grid"},
    "client+local grid": RECORD
    | {"setting": "client+local", "mechanism": "laplace", "noise_form": "grid", "delta": 0.0},
    "none": {"setting": "none"},
}


def fed_avg_m(parameters):
    return torch.optim.SGD(parameters, lr=1.0, momentum=0.9)


def blobs(seed=0, val_fraction=0.2):
    generator = torch.Generator().manual_seed(3)
    y = torch.randint(0, 3, (90,), generator=generator)
    x = torch.randn(90, 6, generator=generator) + 2 * torch.eye(3, 6)[y]
    arrays = from_arrays(x, y, num_classes=3)
    return FederatedDataModule(arrays, CLIENTS, val_fraction=val_fraction, seed=seed)


def go(folder, rounds, *, privacy, resume=False, every=1, data_seed=0, callbacks=(), **options):
    """Train up to `rounds` in a folder, as the command line does; the module is handed back."""
    torch.manual_seed(5)
    options = {"planned_rounds": 8, "execution": "vmap", "sampling_rate": 0.5} | options
    module = FederatedModule(
        MLP(6, 3, hidden=[4]),
        PrivacyConfig(**{"seed": 7} | privacy),
        server_optimizer=fed_avg_m,
        run_dir=str(folder),
        **options,
    )
    trainer = pl.Trainer(
        max_epochs=rounds,
        accelerator="cpu",
        logger=False,
        callbacks=[*callbacks, RoundRecorder(), RoundCheckpoint(every)],
        plugins=[AtomicCheckpointIO()],
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    checkpoint = str(Path(folder) / CHECKPOINT) if resume else None
    trainer.fit(module, blobs(data_seed), ckpt_path=checkpoint, weights_only=False)
    return module


def same_tensors(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def same_optimizers(a, b):
    one, two = (m.trainer.optimizers[0].state_dict() for m in (a, b))
    assert one["param_groups"] == two["param_groups"]
    assert one["state"].keys() == two["state"].keys()
    assert one["state"], "momentum must have been kept"
    for key in one["state"]:
        same_tensors(one["state"][key], two["state"][key])


def rows(path, without=("seconds",)):
    with Path(path).open() as file:
        return [{k: v for k, v in r.items() if k not in without} for r in csv.DictReader(file)]


def charged(folder):
    """(client, round, attempt) of every line."""
    return [(r.client, r.round, r.attempt) for r in ledgers.read(folder)[1]]


class CrashAfterLedger(pl.Callback):
    """Raise in a round after its releases are in the ledger and before its checkpoint."""

    def __init__(self, round):
        self.round = round

    def on_train_batch_end(self, trainer, *_):
        if trainer.current_epoch == self.round:
            raise KeyError("crash")


def crash(folder, round, **kwargs):
    with pytest.raises(KeyError, match="crash"):
        go(folder, 8, callbacks=[CrashAfterLedger(round)], **kwargs)


@pytest.mark.parametrize("execution", ["vmap", "loop"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_three_and_three_rounds_are_six_bit_for_bit(tmp_path, setting, execution):
    options = {"privacy": SETTINGS[setting], "execution": execution, "local_steps": 2}
    whole = go(tmp_path / "whole", 6, **options)
    go(tmp_path / "halves", 3, **options)
    halves = go(tmp_path / "halves", 6, resume=True, **options)

    start = go(tmp_path / "start", 0, **options)
    assert not torch.equal(whole.network.fc1.weight, start.network.fc1.weight)
    same_tensors(whole.state_dict(), halves.state_dict())
    same_tensors(whole.history.state_dict(), halves.history.state_dict())
    same_optimizers(whole, halves)
    for name in ("rounds.csv", "layers.csv"):
        assert rows(tmp_path / "whole" / name) == rows(tmp_path / "halves" / name)
    assert len(rows(tmp_path / "whole" / "rounds.csv")) == 6
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
    assert resumed.budget.spent.tolist() == [8] * CLIENTS
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
    assert resumed.budget.spent.tolist() == [3 + 3 * steps] * CLIENTS
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
    assert module.budget.affordable[1] == counts[1]
    assert ledgers.report(tmp_path)[1].epsilon <= 2.0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("epsilon", 100.0),
        ("mechanism", "laplace"),
        ("noise_multiplier", 0.5),
        ("delta", 1e-9),
        ("setting", "abstract"),
        ("noise_form", "fast"),
    ],
)
def test_what_was_promised_cannot_be_changed(tmp_path, option, value):
    go(tmp_path, 2, privacy=RECORD)
    before = (tmp_path / "ledger.jsonl").read_bytes()
    with pytest.raises(ValueError, match=f"{option}={value}.*begun with"):
        go(tmp_path, 8, resume=True, privacy=RECORD | {option: value})
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


def test_the_sampling_rate_was_promised_too(tmp_path):
    go(tmp_path, 2, privacy=RECORD)
    with pytest.raises(ValueError, match=r"sampling_rate=1\.0.*begun with sampling_rate=0\.5"):
        go(tmp_path, 8, resume=True, privacy=RECORD, sampling_rate=1.0)


def test_the_records_were_promised_too(tmp_path):
    # Dealt out anew, a record would be charged to one client before and to another after.
    privacy = RECORD | {"seed": None}
    go(tmp_path, 2, privacy=privacy)
    before = (tmp_path / "ledger.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"data=\w+.*begun with.*which records"):
        go(tmp_path, 8, resume=True, privacy=privacy, data_seed=1)
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


def test_a_ledger_that_lost_lines_is_refused(tmp_path):
    go(tmp_path, 4, privacy=RECORD)
    lines = (tmp_path / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    kept = lines[:-2]
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(kept))
    with pytest.raises(LedgerError, match="is missing"):
        go(tmp_path, 8, resume=True, privacy=RECORD)
    head = {"entries": len(kept), "hash": json.loads(kept[-1])["hash"]}
    (tmp_path / "ledger.head").write_text(json.dumps(head))
    with pytest.raises(LedgerError, match="10 releases, the checkpoint knows of 12"):
        go(tmp_path, 8, resume=True, privacy=RECORD)


def test_a_lost_ledger_is_refused(tmp_path):
    go(tmp_path, 2, privacy=RECORD)
    (tmp_path / "ledger.jsonl").unlink()
    with pytest.raises((LedgerError, FileNotFoundError), match="ledger"):
        go(tmp_path, 8, resume=True, privacy=RECORD)
    # The head still knows of releases: neither may the run be started again there.
    with pytest.raises(LedgerError, match="already has a ledger"):
        go(tmp_path, 8, privacy=RECORD)


def test_a_lost_secret_is_refused(tmp_path):
    privacy = RECORD | {"seed": None}
    go(tmp_path, 2, privacy=privacy)
    (tmp_path / "secret.key").unlink()
    with pytest.raises(ValueError, match=r"secret\.key is missing"):
        go(tmp_path, 8, resume=True, privacy=privacy)
    assert not (tmp_path / "secret.key").exists()


def test_a_secret_that_others_can_read_is_refused(tmp_path):
    privacy = RECORD | {"seed": None}
    go(tmp_path, 1, privacy=privacy)
    (tmp_path / "secret.key").chmod(0o644)
    with pytest.raises(ValueError, match=r"mode 644.*chmod 600"):
        go(tmp_path, 8, resume=True, privacy=privacy)


def test_a_checkpoint_or_ledger_of_another_run_is_refused(tmp_path):
    privacy = RECORD | {"seed": None}
    for name in ("one", "two"):
        go(tmp_path / name, 2, privacy=privacy)
    (tmp_path / "one" / CHECKPOINT).replace(tmp_path / "two" / CHECKPOINT)
    with pytest.raises(LedgerError, match="checkpoint is of another run"):
        go(tmp_path / "two", 8, resume=True, privacy=privacy)
    (tmp_path / "two" / CHECKPOINT).replace(tmp_path / "one" / CHECKPOINT)
    for name in ("ledger.jsonl", "ledger.head"):
        (tmp_path / "two" / name).replace(tmp_path / "one" / name)
    with pytest.raises(LedgerError, match="ledger is of another run"):
        go(tmp_path / "one", 8, resume=True, privacy=privacy)


def test_other_clients_or_layers_are_refused(tmp_path):
    go(tmp_path, 1, privacy=RECORD)
    checkpoint = torch.load(tmp_path / CHECKPOINT, weights_only=False)
    state = checkpoint["aadp_fl"]
    state["budget"]["multiplier"] = state["budget"]["multiplier"][:2]
    state["history"] = {k: v[:2] for k, v in state["history"].items()}
    torch.save(checkpoint, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match="number of clients"):
        go(tmp_path, 8, resume=True, privacy=RECORD)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    go(tmp_path, 1, privacy=RECORD)
    before = (tmp_path / "ledger.jsonl").read_bytes()
    with pytest.raises(LedgerError, match="already has a ledger with releases: resume"):
        go(tmp_path, 1, privacy=RECORD)
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


def test_two_runs_at_once_in_one_folder_are_refused(tmp_path):
    go(tmp_path, 1, privacy=RECORD)
    with Ledger.open(tmp_path), pytest.raises(LedgerError, match="in use by another run"):
        go(tmp_path, 2, resume=True, privacy=RECORD)
    go(tmp_path, 2, resume=True, privacy=RECORD)


def test_after_an_exception_the_folder_is_free_again(tmp_path):
    with pytest.raises(KeyError) as caught:
        go(tmp_path, 8, privacy=RECORD, callbacks=[CrashAfterLedger(1)])
    go(tmp_path, 3, resume=True, privacy=RECORD)
    assert caught.value.args == ("crash",)


def test_a_run_that_released_nothing_starts_again_in_its_folder(tmp_path):
    class CrashBeforeRound(pl.Callback):
        def on_train_epoch_start(self, *_):
            raise KeyError("crash")

    privacy = RECORD | {"seed": None}
    with pytest.raises(KeyError, match="crash"):
        go(tmp_path, 2, privacy=privacy, callbacks=[CrashBeforeRound()])
    secret = (tmp_path / "secret.key").read_bytes()
    go(tmp_path, 2, privacy=privacy)
    assert (tmp_path / "secret.key").read_bytes() == secret
    assert len(charged(tmp_path)) == 2 * CLIENTS


def test_the_secret_is_nowhere_else(tmp_path):
    privacy = RECORD | {"seed": None}
    module = go(tmp_path, 2, privacy=privacy)
    secret = (tmp_path / "secret.key").read_bytes()
    assert len(secret) == 32
    assert (tmp_path / "secret.key").stat().st_mode & 0o777 == 0o600
    words = b"".join(int(w).to_bytes(4, "little") for w in module._key.words)
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


def test_a_failed_save_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    go(tmp_path, 1, privacy=RECORD)
    before = (tmp_path / CHECKPOINT).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({"a": 1}, tmp_path / CHECKPOINT)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_every_n_rounds_must_be_positive():
    with pytest.raises(ValueError, match="every_n_rounds=0"):
        RoundCheckpoint(every_n_rounds=0)


# Real processes, really killed ------------------------------------------------------------------

ROUNDS = 6
COMMAND = [
    *("--data.num_clients", "2", "--data.val_fraction", "0", "--model.execution", "loop"),
    *("--model.network", "fl_lightning.models.LogisticRegression"),
    *("--model.sampling_rate", "0.5", "--privacy.epsilon", "null"),
    *("--privacy.noise_multiplier", "2", "--trainer.max_epochs", str(ROUNDS)),
    *("--trainer.logger", "false", "--trainer.enable_progress_bar", "false"),
    *("--trainer.accelerator", "cpu"),
]
KILLER = """
import os, signal
from fl_lightning import checkpoint
from fl_lightning.fit import main
save = checkpoint.AtomicCheckpointIO.save_checkpoint
def killed(self, state, path, storage_options=None):
    if state["epoch"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, state, path, storage_options)
checkpoint.AtomicCheckpointIO.save_checkpoint = killed
main()
"""


def start(folder, *more, script=None):
    program = ["-c", script] if script else ["-m", "fl_lightning.fit"]
    env = os.environ | {
        "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.Popen(
        [sys.executable, *program, "--run_dir", "run", *COMMAND, *more],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, code=0):
    output = process.communicate(timeout=120)[0]
    assert process.returncode == code, output
    return output


def kill_at(process, ledger, lines):
    """SIGKILL as soon as the ledger has so many lines."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if ledger.exists() and ledger.read_bytes().count(b"\n") >= lines:
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.0005)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, "the run was over before it could be killed"


def weights(folder):
    return torch.load(folder / "run" / CHECKPOINT, weights_only=False)["state_dict"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish(start(folder, "--privacy.seed", "4"))
    return weights(folder)


@pytest.mark.slow
def test_killed_between_ledger_and_checkpoint(tmp_path, uninterrupted):
    finish(start(tmp_path, "--privacy.seed", "4", script=KILLER), -signal.SIGKILL)
    assert len(charged(tmp_path / "run")) == 3 * 2
    finish(start(tmp_path, "--privacy.seed", "4", "--ckpt_path", "last"))
    same_tensors(weights(tmp_path), uninterrupted)
    assert len(charged(tmp_path / "run")) == ROUNDS * 2


@pytest.mark.slow
@pytest.mark.parametrize("lines", [2, 4, 7, 9])
def test_killed_at_some_moment(tmp_path, uninterrupted, lines):
    ledger = tmp_path / "run" / "ledger.jsonl"
    kill_at(start(tmp_path, "--privacy.seed", "4"), ledger, lines)
    finish(start(tmp_path, "--privacy.seed", "4", "--ckpt_path", "last"))
    same_tensors(weights(tmp_path), uninterrupted)
    assert sorted(charged(tmp_path / "run")) == [(k, t, 0) for k in (0, 1) for t in range(ROUNDS)]


@pytest.mark.slow
def test_killed_again_and_again_with_a_real_secret(tmp_path):
    ledger = tmp_path / "run" / "ledger.jsonl"
    kill_at(start(tmp_path), ledger, 3)
    kill_at(start(tmp_path, "--ckpt_path", "last"), ledger, 8)
    finish(start(tmp_path, "--ckpt_path", "last"))
    assert sorted(charged(tmp_path / "run")) == [(k, t, 0) for k in (0, 1) for t in range(ROUNDS)]
    assert ledgers.verify(tmp_path / "run") == []
    assert "Traceback" not in finish(start(tmp_path, "--ckpt_path", "last"))
    assert len(charged(tmp_path / "run")) == ROUNDS * 2


@pytest.mark.slow
def test_two_processes_at_once(tmp_path):
    waiting = "import time; from fl_lightning import module; from fl_lightning.fit import main\n"
    waiting += "module.FederatedModule.training_step = lambda *_: time.sleep(60)\nmain()"
    first = start(tmp_path, script=waiting)
    try:
        ledger = tmp_path / "run" / "ledger.jsonl"
        deadline = time.monotonic() + 60
        while not (ledger.exists() and ledger.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        output = finish(start(tmp_path), 2)
        assert "in use by another run" in output
        assert "Traceback" not in output
    finally:
        first.kill()
        first.communicate(timeout=60)
