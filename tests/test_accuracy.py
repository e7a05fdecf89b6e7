"""The accuracy bench: what its configurations mean, and that its figures are the committed ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from bench import accuracy, accuracy_report
from bench.accuracy_runs import build, compose, configs_in, fit_command, run
from fl_lightning.data.sources import digits
from tests.test_configs import made, parsed

ROOT = Path(__file__).resolve().parent.parent
DIGITS = f"{accuracy.FOLDER}/digits.yaml"


def methods() -> list[str]:
    return [f"{accuracy.FOLDER}/{name}.yaml" for name in accuracy.METHODS.values()]


def test_every_method_is_a_configuration_with_a_source() -> None:
    bases = {f"{accuracy.FOLDER}/{name}.yaml" for name in accuracy.BASES.values()}
    assert set(methods()) | bases == set(configs_in(ROOT / accuracy.FOLDER))
    for name in methods():
        text = (ROOT / name).read_text()
        assert text.startswith("# ")
        changed = yaml.safe_load(text)
        assert set(changed) <= {"model", "privacy"}
        assert set(changed.get("model", {})) <= {"sampling_rate", "batch_size", "local_steps"}


@pytest.mark.parametrize("name", methods(), ids=lambda name: Path(name).stem)
def test_methods_are_accepted_and_promise_what_the_tables_say(name: str, tmp_path: Path) -> None:
    config = compose([DIGITS, name], {"privacy.epsilon": 3.0})
    module, data, trainer = build(config, digits(), 1, str(tmp_path))
    assert module.layout.num_layers == (1 if module.privacy.clipping == "flat" else 4)
    title = next(t for t, file in accuracy.METHODS.items() if name.endswith(f"/{file}.yaml"))
    assert module.privacy.guarantee == (title not in accuracy.NOMINAL | accuracy.PUBLIC)
    if module.privacy.guarantee:
        assert module.privacy.setting == "record+local"
        assert module.privacy.resolved_adjacency == "zero_out"
        assert (module.privacy.epsilon, module.privacy.delta) == (3.0, 1e-5)
    assert trainer.max_epochs == config["trainer"]["max_epochs"]
    assert data.num_clients == 10


def test_the_bench_makes_what_the_command_line_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [DIGITS, f"{accuracy.FOLDER}/aadp_released_contribution.yaml"]
    options = {"privacy.epsilon": 3.0, "model.server_optimizer.init_args.lr": 0.5}
    words = fit_command(files, options, 2).split()[3:]
    theirs = made(monkeypatch, tmp_path, *words)
    module, data, _ = build(compose(files, options), digits(), 2, str(tmp_path))
    assert module.privacy == theirs.model.privacy
    assert module.rules == theirs.model.rules
    ours, given = (m.network.state_dict() for m in (module, theirs.model))
    assert all(torch.equal(ours[n], given[n]) for n in given)
    assert torch.equal(data.x, theirs.datamodule.x)
    for m in (module, theirs.model):
        made_optimizer = m.server_optimizer(m.network.parameters())
        assert made_optimizer.defaults["lr"] == 0.5
        assert made_optimizer.defaults["momentum"] == 0.9


@pytest.mark.parametrize(
    "case", [*accuracy.MEASURES, *accuracy.DEEP_MEASURES, *accuracy.CNN_MEASURES]
)
def test_every_measure_is_made_as_the_command_line_would_make_it(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = next(r for r in accuracy.measures_runs() if r.case == case)
    config = compose(one.files, one.options)
    ours, _, _ = build(config, digits(), 2, str(tmp_path))
    config.pop("averaging", None)
    path = tmp_path / "whole.yaml"
    path.write_text(yaml.safe_dump(config))
    theirs = made(monkeypatch, tmp_path, "--config", str(path), "--seed_everything", "2").model
    assert repr(ours.network) == repr(theirs.network)
    assert repr(ours.loss) == repr(theirs.loss)
    for name, value in theirs.network.state_dict().items():
        assert torch.equal(ours.network.state_dict()[name], value)
    assert ours.rules.denoise == theirs.rules.denoise


def test_a_run_gives_its_accuracy_epsilon_and_groups() -> None:
    options = {"trainer.max_epochs": 2, "privacy.epsilon": [1.0, 3.0, 8.0]}
    config = compose([DIGITS, f"{accuracy.FOLDER}/layer_fixed.yaml"], options)
    found = run(config, 1, test=True, arrays=digits())
    assert found["rounds"] == 2
    assert found["guarantee"]
    assert 7.9 < found["epsilon"] <= 8.0
    assert set(found["sim_only_group_accuracy"]) == {"1.0", "3.0", "8.0"}
    assert run(config, 1, test=True, arrays=digits())["accuracy"] == found["accuracy"]


def test_results_are_kept_and_not_run_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(config, seed, *, test, arrays):
        calls.append((seed, test))
        return {"accuracy": 50.0, "seconds": 0.0}

    monkeypatch.setattr(accuracy, "run", counted)
    path = tmp_path / "accuracy_digits.json"
    one = accuracy.Run("digits", "AADP", 3.0, 1, (DIGITS,), {"model.client_lr": 2.0})
    trial = accuracy.Run("digits", "AADP", 3.0, 0, (DIGITS,), {}, 2)
    for _ in range(2):
        results = accuracy.Results(path)
        for each in (one, trial):
            results.do(each, lambda config: None)
    assert calls == [(1, True), (0, False)], "a trial never reads the test records"
    kept = json.loads(path.read_text())
    assert kept[one.key]["options"] == {"model.client_lr": 2.0, "privacy.epsilon": 3.0}


def test_winners_are_chosen_by_validation_and_every_method_has_as_many_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_rate(config, seed, *, test, arrays):
        lr = config["model"]["server_optimizer"]["init_args"]["lr"]
        return {"accuracy": 100 - abs(lr - 0.5), "seconds": 0.0}

    monkeypatch.setattr(accuracy, "run", by_rate)
    results = accuracy.Results(tmp_path / "accuracy_digits.json")
    accuracy.compare("digits", results, lambda config: None, (3.0,))
    for method in accuracy.METHODS:
        mine = [r for r in results.runs.values() if r["case"] == method]
        trials = [r for r in mine if r["trial"] is not None]
        assert sorted({r["trial"] for r in trials}) == list(range(6))
        assert len(trials) == 6 * len(accuracy.TRIAL_SEEDS["digits"])
        kept = [r for r in mine if r["trial"] is None]
        assert sorted(r["seed"] for r in kept) == list(accuracy.SEEDS_OF["digits"])
        best = max(trials, key=lambda r: r["accuracy"])
        assert all(r["options"] == best["options"] for r in kept)
    winner = results.runs["digits | flat, fixed | 3.0 | seed 1"]["options"]
    assert winner["model.server_optimizer.init_args.lr"] == 0.4


@pytest.mark.parametrize("study", accuracy.BASES)
def test_trials_of_all_methods_are_as_many_and_all_different(study: str) -> None:
    for epsilon in accuracy.EPSILONS:
        for method in accuracy.METHODS:
            trials = accuracy.trials_of(study, method, epsilon)
            assert len(trials) == 2 * len(accuracy.STEPS[study])
            assert len({str(t) for t in trials}) == len(trials)


def test_margins_are_paired_t_intervals() -> None:
    ours, other = {1: 80.0, 2: 82.0, 3: 84.0}, {1: 79.0, 2: 80.0, 3: 81.0}
    mean, half = accuracy_report.margin(ours, other) or (0, 0)
    assert mean == pytest.approx(2)
    assert half == pytest.approx(4.3027 * 1 / math.sqrt(3), rel=1e-4)
    assert accuracy_report.margin(ours, {1: 79.0}) is None


def test_the_page_is_current() -> None:
    page = accuracy_report.DOCS.read_text()
    assert accuracy_report.filled(page) == page


def test_committed_runs_kept_their_promise() -> None:
    for study in ("best", *accuracy.BASES, "measures", "personal"):
        for key, one in accuracy_report.runs(study).items():
            if one["target_epsilon"] is not None:
                assert 0.9 * one["target_epsilon"] < one["epsilon"] <= one["target_epsilon"], key
            assert one["rounds"] == one["options"].get("trainer.max_epochs", one["rounds"])


def test_options_reach_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = fit_command([DIGITS], {"privacy.epsilon": [1.0, 3.0]}, 4)
    assert words == (
        f'python -m fl_lightning.fit --config {DIGITS} --privacy.epsilon "[1.0, 3.0]" '
        "--seed_everything 4 --privacy.seed 4"
    )
    whole = parsed(capsys, "--config", str(ROOT / DIGITS), "--privacy.epsilon", "[1.0, 3.0]")
    assert whole["privacy"]["epsilon"] == [1.0, 3.0]
