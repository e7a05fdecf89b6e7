"""The study of personal layers: equal trials, clients' own models judged, its page as found."""

from __future__ import annotations

import copy
import tempfile

import pytest
import torch
from torch.nn.functional import cross_entropy

from bench import accuracy_runs, pages, personal_layers
from bench.accuracy import Results
from bench.accuracy_runs import build, compose, records

SMALL = {"data.num_clients": 5, "trainer.max_epochs": 2, "model.server_optimizer.init_args.lr": 1.0}


@pytest.mark.parametrize("model", personal_layers.MODELS)
def test_every_epsilon_has_as_many_trials_and_none_sees_the_test_records(
    model, monkeypatch, tmp_path
) -> None:
    asked = []

    def run(config, seed, *, test, arrays):
        lr = config["model"]["server_optimizer"]["init_args"]["lr"]
        asked.append((lr, seed, test))
        return {"accuracy": lr, "seconds": 0.0}

    monkeypatch.setattr("bench.accuracy.run", run)
    results = Results(tmp_path / "found.json")
    for epsilon in (1.0, None):
        personal_layers.tuned(model, 0.1, epsilon, results, lambda config: None)
    assert [s for _, s, test in asked if not test] == [0] * 8
    assert [s for _, s, test in asked if test] == [1, 2, 3, 4, 5] * 2
    assert sorted(lr for lr, _, test in asked if not test) == sorted(2 * personal_layers.RATES)
    assert {lr for lr, _, test in asked if test} == {max(personal_layers.RATES)}
    (row,) = [r for r in personal_layers.accuracies(results.runs).splitlines() if "± 0.0" in r]
    assert f"| {model} |" in row


def small(model: str):
    options = personal_layers.trials(model, 0.1, None)[0] | SMALL
    config = compose([], options)
    return config, records()(config)


def trained(config, arrays):
    with tempfile.TemporaryDirectory() as folder:
        module, data, trainer = build(config, arrays, 1, folder)
        trainer.fit(module, datamodule=data)
        return module, data, trainer


def test_clients_are_judged_by_their_own_models() -> None:
    config, arrays = small(personal_layers.PERSONAL)
    found = accuracy_runs.run(config, 1, test=True, arrays=arrays)
    module, data, trainer = trained(config, arrays)
    (want,) = trainer.test(module, datamodule=data, verbose=False)
    assert found["accuracy"] == pytest.approx(100 * want["test/accuracy"], abs=1e-4)


def test_heads_are_fitted_afterwards_to_each_clients_own_records() -> None:
    config, arrays = small(personal_layers.AFTERWARDS)
    found = accuracy_runs.run(config, 1, test=True, arrays=arrays)["accuracy"]
    module, data, _ = trained(config, arrays)
    right = 0
    for client in range(data.num_clients):
        own = copy.deepcopy(module.network).eval()
        mine, theirs = (
            torch.from_numpy(part.client(client)) for part in (data.partition, data.test_partition)
        )
        optimizer = torch.optim.SGD(own.fc2.parameters(), 1.0)
        for _ in range(20):
            optimizer.zero_grad()
            cross_entropy(own(data.x[mine]), data.y[mine]).backward()
            optimizer.step()
        right += int((own(arrays.x_test[theirs]).argmax(1) == arrays.y_test[theirs]).sum())
    assert found == pytest.approx(100 * right / len(arrays.y_test), abs=0.3)  # a record or none
    plain = {name: value for name, value in config.items() if name != "fitted_afterwards"}
    assert found > accuracy_runs.run(plain, 1, test=True, arrays=arrays)["accuracy"] + 10


def test_alone_nothing_is_learned_together() -> None:
    options = personal_layers._COMMON | SMALL | personal_layers._NOTHING
    config = compose([], options)
    before = build(config, records()(config), 1, "unused")[0].network.state_dict()
    module, *_ = trained(config, records()(config))
    after = module.network.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_the_page_shows_the_results() -> None:
    runs = Results(personal_layers.PATH).runs
    for name, make in personal_layers.TABLES.items():
        assert pages.written(pages.RESULTS, name) == make(runs)
