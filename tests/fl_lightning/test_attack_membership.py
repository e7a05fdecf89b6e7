"""Membership attacks: they find members where there is something to find, and change nothing."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from fl_lightning import FederatedDataModule, FederatedModule, PrivacyConfig, from_arrays
from fl_lightning.attacks import intervals
from fl_lightning.attacks.__main__ import main
from fl_lightning.attacks.attacked import fit_watched, load_run, replay
from fl_lightning.attacks.candidates import Candidates, candidates_of
from fl_lightning.attacks.files import write_all
from fl_lightning.attacks.membership import attack_run, ceilings, model_scores
from fl_lightning.attacks.passive import PassiveServer
from fl_lightning.attacks.shadows import Plan, shadow_confidences, trained_shadows
from fl_lightning.fit import main as fit_main

RECORDS, CLIENTS = 48, 2
WITHOUT = {"setting": "none"}


def arrays(records: int = RECORDS):
    """Noise with labels of chance: whoever is right about a label has learnt it by heart."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * records, 20, generator=generator)
    y = torch.randint(0, 3, (2 * records,), generator=generator)
    return from_arrays(
        x[:records], y[:records], x_test=x[records:], y_test=y[records:], num_classes=3
    )


def data_of(records: int = RECORDS, clients: int = CLIENTS) -> FederatedDataModule:
    return FederatedDataModule(arrays(records), num_clients=clients, val_fraction=0)


def module_of(folder: Path, privacy: dict, network: nn.Module | None = None, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = network or nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 3))
    options = {"sampling_rate": 1.0, "client_lr": 1.0, "execution": "vmap"} | options
    return FederatedModule(network, PrivacyConfig(**privacy), run_dir=str(folder), **options)


def areas(scores: dict, member: np.ndarray) -> dict[str, float]:
    return {n: intervals.area(s[member], s[~member]).value for n, s in scores.items()}


def test_a_model_that_learnt_by_heart_is_found_out_by_every_attack(tmp_path: Path) -> None:
    data, module = data_of(), module_of(tmp_path, WITHOUT)
    plan = Plan(copy.deepcopy(module), data.partition.sizes, 40, 40, None)
    candidates = candidates_of(data, seed=0)
    passive = PassiveServer(module, candidates, data.partition.sizes)
    fit_watched(module, data, [passive], rounds=40)
    shadows = shadow_confidences(plan, candidates, shadows=8, seed=0)
    scores = model_scores(module, module.network, candidates, shadows)
    found = areas(scores | {"all releases": passive.scores}, candidates.member)
    assert len(found) == 4
    assert min(found.values()) > 0.6, found


def test_under_much_noise_nobody_is_found_out(tmp_path: Path) -> None:
    data = data_of()
    module = module_of(tmp_path, {"epsilon": 0.05, "seed": 1})
    candidates = candidates_of(data, seed=0)
    passive = PassiveServer(module, candidates, data.partition.sizes)
    fit_watched(module, data, [passive], rounds=5)
    scores = model_scores(module, module.network, candidates, None)
    scores["all releases"] = passive.scores
    for one in scores.values():
        area = intervals.area(one[candidates.member], one[~candidates.member])
        assert area.low < 0.5 < area.high
    once, swapped = ceilings(module.ledger.header, module.ledger.releases)
    assert (once[1:-1] < swapped[1:-1]).all()
    assert once[-1] == swapped[-1] == 1


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_releases_of_chosen_batches_are_told_apart(rate: float, tmp_path: Path) -> None:
    data = data_of()
    module = module_of(
        tmp_path,
        {"epsilon": None, "noise_multiplier": 0.01, "thresholds": "fixed", "seed": 1},
        sampling_rate=rate,
        client_lr=0.1,
    )
    candidates = candidates_of(data, seed=0)
    passive = PassiveServer(module, candidates, data.partition.sizes)
    fit_watched(module, data, [passive], rounds=5)
    area = intervals.area(passive.scores[candidates.member], passive.scores[~candidates.member])
    assert area.value > 0.6


@pytest.mark.parametrize(
    ("privacy", "options"),
    [
        (WITHOUT, {"local_steps": 2, "client_momentum": 0.5, "client_proximal": 0.1}),
        (WITHOUT, {"clients_per_round": 1}),
        ({"epsilon": None, "noise_multiplier": 0.0, "clip_norm": 0.1}, {}),
        (
            {"epsilon": None, "noise_multiplier": 0.0, "clip_norm": 0.1, "setting": "client+local"},
            {},
        ),
    ],
)
def test_a_shadow_is_trained_as_a_run_is(privacy: dict, options: dict, tmp_path: Path) -> None:
    """Without noise, a federation among others gives the model that it gives alone."""
    data = data_of()
    module = module_of(tmp_path / "alone", privacy | {"seed": 1}, **options)
    plan = Plan(copy.deepcopy(module), data.partition.sizes, 3, 3, torch.zeros(CLIENTS))
    rows = np.stack([np.arange(RECORDS) // 2, data.partition.indices])
    side = Candidates(data.x, data.y, np.ones(RECORDS, bool), np.zeros(RECORDS, np.int64))
    shadows = trained_shadows(plan, side, rows, seed=5)
    fit_watched(module, data, [], rounds=3)
    for want, found in zip(module.network.parameters(), shadows[1].parameters(), strict=True):
        assert torch.allclose(found, want, atol=1e-5)
    (first, *_), (own, *_) = (list(s.parameters()) for s in shadows[:2])
    assert not torch.allclose(first, own, atol=1e-5)


def test_shadows_of_a_private_run_have_its_noise(tmp_path: Path) -> None:
    data, z = data_of(), 50.0
    privacy = {"epsilon": None, "noise_multiplier": z, "thresholds": "fixed", "seed": 1}
    module = module_of(tmp_path, privacy | {"allocation": "uniform", "clip_norm": 2.0})
    plan = Plan(module, data.partition.sizes, 1, 1, torch.full((CLIENTS,), z).double())
    side = Candidates(data.x, data.y, np.ones(RECORDS, bool), np.zeros(RECORDS, np.int64))
    shadows = trained_shadows(plan, side, np.tile(data.partition.indices, (20, 1)), seed=0)
    weights = torch.stack([nn.utils.parameters_to_vector(s.parameters()) for s in shadows])
    # Two layers of clip norm 2/sqrt(2) with half of the budget; the mean of two clients.
    scale = z * 2.0 / (RECORDS / CLIENTS) / CLIENTS**0.5
    assert float(weights.detach().std(0).square().mean().sqrt()) == pytest.approx(scale, rel=0.05)


def test_every_record_is_in_as_many_shadows() -> None:
    from fl_lightning.attacks.shadows import _dealt

    rows = _dealt(30, 20, 9, 0)
    counts = np.bincount(rows.ravel(), minlength=30)
    assert rows.shape == (9, 20)
    assert set(counts) == {6}
    assert not np.array_equal(rows[0], np.sort(rows[0]))


# A run from the command line ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("attacked") / "run"
    words = f"--run_dir {folder} --trainer.max_epochs 3 --trainer.logger false --privacy.seed 1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        fit_main(words.split())
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_command_writes_two_files_and_changes_none(finished: Path, capsys) -> None:
    before = contents(finished)
    assert main(["membership", str(finished), "--shadows", "8"]) == 0
    after = contents(finished)
    assert set(after) - set(before) == {"membership.json", "membership.png"}
    assert all(after[name] == content for name, content in before.items())
    found = json.loads(after["membership.json"])
    assert set(found["attacks"]) == {
        "loss", "likelihood ratio", "likelihood ratio, offline", "all releases"
    }  # fmt: skip
    for one in found["attacks"].values():
        for rate in ("0.001", "0.01", "0.1"):
            assert one[f"tpr_at_{rate}"]["low"] <= found["ceiling"][f"tpr_at_{rate}"]
    assert "at most, by the ledger" in capsys.readouterr().out


def test_what_is_replayed_is_what_the_ledger_has(finished: Path, tmp_path: Path) -> None:
    seen = []
    run = load_run(finished)
    replay(run, [lambda round, params, update: seen.append((round, update))])
    assert [r for r, _ in seen] == [0, 1, 2]
    assert all(not update.sim_only for _, update in seen)
    folder = tmp_path / "other"
    shutil.copytree(finished, folder)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("client_lr: 1.0", "client_lr: 0.9"))
    with pytest.raises(ValueError, match="client 0 released other bytes in round 0"):
        attack_run(folder, shadows=0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["membership", "{nowhere}"], "config.yaml is missing"),
        (["membership", "{run}", "--shadows", "3"], "shadows=3 must be 0 or at least 4"),
        (["membership", "{run}", "--shadows", "4"], "take more"),
        (["membership", "{run}", "--seed", "-1"], "seed=-1"),
    ],
)
def test_bad_commands_are_one_line(words, said, finished: Path, tmp_path: Path, capsys) -> None:
    before = contents(finished)
    places = {"{nowhere}": str(tmp_path / "nowhere"), "{run}": str(finished)}
    assert main([places.get(word, word) for word in [*words, "--no-replay"]]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert contents(finished) == before


def test_a_damaged_configuration_is_named(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(finished, folder)
    for text in ("data: [", "seed_everything: 1\n", "seed_everything: 1\ndata: {x: 1}\n"):
        (folder / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"config\.yaml"):
            load_run(folder)


def test_sums_have_no_shadows(tmp_path: Path) -> None:
    module = module_of(tmp_path, {"setting": "client+aggregator"})
    plan = Plan(module, data_of().partition.sizes, 1, 1, None)
    with pytest.raises(ValueError, match="setting='client\\+aggregator'"):
        shadow_confidences(plan, candidates_of(data_of(), seed=0), shadows=8, seed=0)


def test_nobody_held_out_is_refused() -> None:
    x, y = torch.zeros(8, 2), torch.arange(8) % 2
    data = FederatedDataModule(from_arrays(x, y, num_classes=2), num_clients=2, val_fraction=0)
    with pytest.raises(ValueError, match="0 validation and test records"):
        candidates_of(data, seed=0)


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        write_all({tmp_path / "a": b"1", tmp_path / "file" / "b": b"2"})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    write_all({tmp_path / "a": b"1", tmp_path / "sub" / "b": b"2"})
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "file", "sub"]


def test_the_witness_needs_a_run() -> None:
    from fl_lightning.attacks.witness import Witness

    with pytest.raises(RuntimeError, match="has not begun"):
        Witness([]).on_train_start(pl.Trainer(logger=False), module_of(Path("/nowhere"), WITHOUT))
