"""LoRA's study: every method is tuned alike, and its page shows what was found."""

from __future__ import annotations

import pytest
import torch

from bench import lora, lora_report, margin, pages
from bench.margin import Study
from bench.pretrained import PAGE


def test_every_method_has_three_trials_and_reads_the_test_records_once(monkeypatch, tmp_path):
    asked = []

    def run(case, method, epsilon, seed, lr, trial):
        asked.append((seed, trial))
        return {"accuracy": lr, "recall": 50.0, "cpu_seconds": 0.0, "raw_ratios": [1.0, 0.5, 0.5]}

    monkeypatch.setattr(margin, "one_run", run)
    monkeypatch.setattr(margin, "harm", lambda *_: None)
    monkeypatch.setattr(lora, "PATH", tmp_path / "found.json")
    for _ in range(2):  # nothing is run again
        lora.run_all()
    methods = sum(map(len, lora.METHODS_OF.values())) * len(lora.EPSILONS) + len(lora.METHODS_OF)
    assert asked.count((margin.TRIAL_SEED, True)) == 3 * (methods + 2)
    # The usual alpha, at one ε and without noise, has three seeds.
    counts = [asked.count((seed, False)) for seed in lora.SEEDS]
    assert counts == [methods + 2] * 3 + [methods] * 2
    assert margin.TRIAL_SEED not in lora.SEEDS
    runs = Study(tmp_path / "found.json").runs
    assert all(r["lr"] == 4500.0 for r in runs.values() if not r["trial"])  # the stand-in's best
    assert "| 4500.0 ± 0.0 (0.50) |" in lora_report.accuracies(runs)
    assert "| +0.0 ± 0.0 |" in lora_report.margins(runs)


def test_products_in_bfloat16_leave_the_logits_near_and_in_float32():
    torch.manual_seed(0)
    inner, x = torch.nn.Linear(384, 8), torch.randn(4, 384)
    found = lora.InBfloat16(inner)(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, inner(x), rtol=0.0, atol=0.05)
    assert not torch.equal(found, inner(x))


def test_the_page_shows_the_results():
    runs = Study(lora.PATH).runs
    assert runs
    for name, make in lora_report.TABLES.items():
        assert pages.written(PAGE, name) == make(runs)


@pytest.mark.parametrize("epsilon", lora.EPSILONS)
def test_no_method_is_missing_in_the_file(epsilon):
    runs = Study(lora.PATH).runs
    for case, methods in lora.METHODS_OF.items():
        for method in methods:
            assert len(lora_report.scores(runs, case, method, epsilon)) >= 3, (case, method)
