"""What a run does not go on with: lost, foreign or damaged files, broken promises, a second run."""

import json

import pytest
import pytorch_lightning as pl
import torch

from fl_lightning.ledger import Ledger, LedgerError
from fl_lightning.output.checkpoint import CHECKPOINT, RoundCheckpoint
from tests.fl_lightning.resuming import (
    CLIENTS,
    RECORD,
    CrashAfterLedger,
    charged,
    go,
)


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
    state["history"]["of"] = torch.tensor(2)
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


def test_every_n_rounds_must_be_positive():
    with pytest.raises(ValueError, match="every_n_rounds=0"):
        RoundCheckpoint(every_n_rounds=0)
