"""SIGKILL anywhere in a run: it goes on exactly, or says why not, and no release is lost."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from fl_lightning import ledger as ledgers
from fl_lightning.output.checkpoint import CHECKPOINT
from tests.fl_lightning.killing import SETTINGS, SIGKILL, Zygote, assert_same_end, complete_lines

PLACES = 20


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_killed_at_twenty_places(tmp_path: Path, zygote: Zygote, setting: str) -> None:
    args = ["--privacy.setting", setting, *SETTINGS[setting]]
    whole = zygote(tmp_path / "whole", *args)
    assert whole["status"] == 0, (tmp_path / "whole" / "output.txt").read_text()
    draw, died = random.Random(setting), 0
    for i in range(PLACES):
        cwd = tmp_path / str(i)
        place = {"after": draw.uniform(0.3, 1.0) * whole["seconds"]}
        if i % 2:
            place = {"call": draw.randint(1, whole["calls"]), "part": draw.random()}
        answer = zygote(cwd, *args, **place)
        # A run may be faster than the undisturbed one was; at a call it always dies.
        assert answer["status"] in ((SIGKILL,) if i % 2 else (SIGKILL, 0)), place
        died += answer["status"] == SIGKILL
        before = complete_lines(cwd)
        while zygote.go_on(cwd, *args)["status"]:
            pass
        assert complete_lines(cwd)[: len(before)] == before, place
        assert_same_end(cwd, tmp_path / "whole")
    assert died >= PLACES * 3 // 4


SHARED = ["--privacy.cohort_sampling", "fixed", "--privacy.correlation", "banded"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], SHARED], ids=["independent", "shared"])
def test_one_run_killed_twenty_times(tmp_path: Path, zygote: Zygote, more: list[str]) -> None:
    args = ["--privacy.setting", "client+aggregator", *SETTINGS["client+aggregator"], *more]
    args += ["--trainer.max_epochs", "12"]
    assert zygote(tmp_path / "whole", *args)["status"] == 0
    cwd, draw, before = tmp_path / "run", random.Random(1), []
    answer = zygote(cwd, *args, call=3, part=0.5)
    for _ in range(PLACES - 1):
        assert answer["status"] == SIGKILL, "the run was over before it could be killed"
        assert complete_lines(cwd)[: len(before)] == before
        before = complete_lines(cwd)
        answer = zygote.go_on(cwd, *args, call=draw.randint(1, 16), part=draw.random())
    assert len(before) > 3, "the run did not move on between kills"
    assert zygote.go_on(cwd, *args)["status"] == 0
    assert_same_end(cwd, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_killed_and_resumed_with_other_inputs(tmp_path: Path, zygote: Zygote, setting: str) -> None:
    """A round of which the ledger knows and the checkpoint does not: other noise, and charged."""
    args = ["--privacy.setting", setting, *SETTINGS[setting]]
    assert zygote(tmp_path / "count", *args, "--trainer.max_epochs", "0")["status"] == 0
    first = json.loads((tmp_path / "count" / "calls.txt").read_text())
    # The first append is after the calls of a run without rounds; kill before its checkpoint.
    for call in range(first - 4, first + 8):
        cwd = tmp_path / str(call)
        zygote(cwd, *args, call=call, part=1.0)
        known = len(complete_lines(cwd))
        saved = cwd / "run" / CHECKPOINT
        if known > 1 and torch.load(saved, weights_only=False)["aadp_fl"]["releases"] == 0:
            break
    before = complete_lines(cwd)
    assert len(before) > 1
    assert zygote.go_on(cwd, *args, "--model.client_lr", "0.3")["status"] == 0
    assert complete_lines(cwd)[: len(before)] == before
    releases = ledgers.read(cwd / "run")[1]
    again = [r for r in releases if r.round == 0]
    assert {r.attempt for r in again} == {0, 1}
    assert len({r.binding for r in again}) == 2
    assert len({r.digest for r in again}) == len(again) or setting.startswith("client+")
    assert ledgers.verify(cwd / "run") == []
