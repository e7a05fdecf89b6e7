"""The accuracy of noise that rounds share: methods that differ in nothing else, tuned alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import accuracy, pages, shared_noise
from bench.accuracy_runs import build, compose
from fl_lightning import from_arrays


def arrays():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 256, generator=generator)
    return from_arrays(x, torch.arange(3000) % 10, num_classes=10)


@pytest.mark.parametrize("method", [*shared_noise.METHODS, shared_noise.WITHOUT])
def test_a_method_is_a_run_of_the_configuration(method: str, tmp_path: Path) -> None:
    epsilon = None if method == shared_noise.WITHOUT else 3.0
    tried = shared_noise.trials(method, epsilon)
    assert len(tried) == 8
    assert len({str(t) for t in tried}) == 8
    options = tried[0] | ({} if epsilon is None else {"privacy.epsilon": epsilon})
    module, data, trainer = build(compose(shared_noise.FILES, options), arrays(), 1, str(tmp_path))
    privacy = module.privacy
    assert (data.num_clients, module.rules.clients_per_round, trainer.max_epochs) == (1000, 50, 200)
    assert module.network(torch.zeros(2, 256)).shape == (2, 10)
    if epsilon is not None:
        assert (privacy.epsilon, privacy.delta, privacy.guarantee) == (3.0, 1e-4, True)
        assert privacy.correlated == ("bands" in method)
        assert privacy.poisson_cohort == ("Poisson" in method)


def test_all_methods_try_the_same_at_the_same_epsilon() -> None:
    for epsilon in shared_noise.EPSILONS:
        tried = [
            [(t[shared_noise._CLIP], t[shared_noise._LR]) for t in shared_noise.trials(m, epsilon)]
            for m in shared_noise.METHODS
        ]
        assert all(t == tried[0] for t in tried)


def test_the_best_trial_by_validation_is_run_with_all_seeds(tmp_path: Path, monkeypatch) -> None:
    def by_rate(config, seed, *, test, arrays):
        rate = config["model"]["server_optimizer"]["init_args"]["lr"]
        assert test == (seed != accuracy.TRIAL_SEED)
        return {"accuracy": 100 - abs(rate - 4.0), "seconds": 0.0}

    monkeypatch.setattr(accuracy, "run", by_rate)
    results = accuracy.Results(tmp_path / "found.json")
    for case, epsilon in ((shared_noise.WITHOUT, None), ("fixed cohorts, 2 bands", 3.0)):
        shared_noise.tuned(case, epsilon, results, lambda config: None)
        kept = shared_noise.scores(results.runs, case, epsilon)
        assert kept == dict.fromkeys(accuracy.SEEDS, 100.0)
    text = shared_noise.accuracy_table(results.runs)
    assert text.count("100.0 ± 0.0") == 4


def test_the_page_shows_the_committed_runs() -> None:
    runs = accuracy.Results(shared_noise.RESULTS).runs
    assert pages.written(shared_noise.PAGE, "accuracy") == shared_noise.accuracy_table(runs)
