"""Runs whose rounds share noise, stopped and gone on with: the same noise again, no round twice."""

import pytest
import torch

from fl_lightning import PrivacyConfig
from fl_lightning.keys import digests
from fl_lightning.keys.released_noise import FILE
from fl_lightning.ledger import LedgerError, read, report, verify
from fl_lightning.output.checkpoint import CHECKPOINT
from fl_lightning.resumption import check_promise, promise_of
from fl_lightning.rules import Rules
from tests.fl_lightning.correlated_values import BANDED
from tests.fl_lightning.resuming import charged, crash, go, same_optimizers, same_tensors

OPTIONS = {"clients_per_round": 1, "planned_rounds": 8}
PRIVACY = BANDED | {"epsilon": 4.0, "bands": 3}


def test_halves_are_the_whole_bit_for_bit(tmp_path):
    whole = go(tmp_path / "whole", 8, privacy=PRIVACY, **OPTIONS)
    go(tmp_path / "halves", 4, privacy=PRIVACY, **OPTIONS)
    halves = go(tmp_path / "halves", 8, resume=True, privacy=PRIVACY, **OPTIONS)
    same_tensors(whole.state_dict(), halves.state_dict())
    same_tensors(whole.run.history.state_dict(), halves.run.history.state_dict())
    same_optimizers(whole, halves)
    for name in ("ledger.jsonl", FILE):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "halves" / name).read_bytes()
    assert verify(tmp_path / "halves") == []
    spent = halves.run.epsilon_spent()
    proven = [r.epsilon for r in report(tmp_path / "halves").values()]
    assert spent == pytest.approx(proven, rel=1e-9)
    assert 0 < min(proven) <= max(proven) <= 4.0


def test_rounds_ahead_of_the_checkpoint_are_repeated_with_the_same_noise(tmp_path):
    privacy = PRIVACY | {"seed": None}
    crash(tmp_path, 7, every=3, privacy=privacy, **OPTIONS)
    before = [(tmp_path / name).read_bytes() for name in ("ledger.jsonl", FILE)]
    resumed = go(tmp_path, 8, resume=True, every=3, privacy=privacy, **OPTIONS)
    assert before == [(tmp_path / name).read_bytes() for name in ("ledger.jsonl", FILE)]
    assert charged(tmp_path) == [(-1, t, 0) for t in range(8)]
    assert resumed.run.budget.spent.sum() == 8


def test_a_round_with_other_bytes_is_not_released_again(tmp_path, monkeypatch):
    privacy = PRIVACY | {"seed": None}
    crash(tmp_path, 4, every=3, privacy=privacy, **OPTIONS)
    lines = (tmp_path / "ledger.jsonl").read_bytes()
    assert len(charged(tmp_path)) == 5
    # Another machine: all that follows has other noise, rounds 3 and 4 too.
    monkeypatch.setattr(digests, "platform_facts", lambda: ["another machine"])
    resumed = go(tmp_path, 8, resume=True, every=3, privacy=privacy, **OPTIONS)
    assert (tmp_path / "ledger.jsonl").read_bytes().startswith(lines)
    assert charged(tmp_path) == [(-1, t, 0) for t in range(8)]
    _, releases = read(tmp_path)
    assert [r.combined for r in releases[5:]] == [(4, 3), (5, 4), (6, 5)]
    assert verify(tmp_path) == []
    assert resumed.run.budget.spent.sum() == 8


def test_a_lost_file_of_released_noise_is_refused(tmp_path):
    privacy = PRIVACY | {"seed": None}
    go(tmp_path, 3, privacy=privacy, **OPTIONS)
    before = (tmp_path / "ledger.jsonl").read_bytes()
    kept = (tmp_path / FILE).read_bytes()
    without_first = kept.split(b"\n", 2)[2]
    for left in (b"", kept[: len(kept) // 2], without_first):
        (tmp_path / FILE).write_bytes(left)
        with pytest.raises(ValueError, match=f"{FILE} does not know the noise of a round"):
            go(tmp_path, 8, resume=True, privacy=privacy, **OPTIONS)
    (tmp_path / FILE).write_bytes(kept)
    go(tmp_path, 8, resume=True, privacy=privacy, **OPTIONS)
    assert (tmp_path / "ledger.jsonl").read_bytes().startswith(before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"planned_rounds": 9}, "planned_rounds=9.*begun with planned_rounds=8"),
        ({"rounds": 9, "planned_rounds": None}, r"trainer\.max_epochs=9.*planned for 8 rounds"),
        ({"bands": 2}, "bands=2.*begun with bands=3"),
        ({"correlation": "none", "bands": 2}, "correlation=none.*begun with correlation=banded"),
        ({"seed": 5}, "other coefficients, rounds or sensitivities"),
    ],
)
def test_what_the_noise_was_calibrated_for_cannot_be_changed(tmp_path, change, words):
    go(tmp_path, 2, privacy=PRIVACY, **OPTIONS)
    before = (tmp_path / "ledger.jsonl").read_bytes()
    private = {k: v for k, v in change.items() if k in PRIVACY}
    others = {k: v for k, v in change.items() if k not in (*PRIVACY, "rounds")}
    with pytest.raises((ValueError, LedgerError), match=words):
        go(
            tmp_path, change.get("rounds", 8), resume=True, privacy=PRIVACY | private,
            **OPTIONS | others,
        )  # fmt: skip
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


def test_coefficients_of_the_checkpoint_are_those_of_the_ledger(tmp_path):
    go(tmp_path, 2, privacy=PRIVACY, **OPTIONS)
    path = tmp_path / CHECKPOINT
    state = torch.load(path, weights_only=False)
    state["aadp_fl"]["budget"]["coefficients"][1] = -0.5
    torch.save(state, path)
    assert "other coefficients of shared noise" in verify(tmp_path)[0]
    with pytest.raises(LedgerError, match="other coefficients, rounds or sensitivities"):
        go(tmp_path, 8, resume=True, privacy=PRIVACY, **OPTIONS)


def test_a_checkpoint_that_does_not_know_the_option_goes_on():
    rules = Rules(PrivacyConfig())
    promise = promise_of(rules, None)
    check_promise(rules, {k: v for k, v in promise.items() if k not in ("correlation", "bands")})
    with pytest.raises(ValueError, match="setting=record"):
        check_promise(rules, {k: v for k, v in promise.items() if k != "setting"} | {"setting": 0})
