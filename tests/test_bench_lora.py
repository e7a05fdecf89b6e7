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
        return {
            "accuracy": lr / case.lr,
            "recall": 50.0,
            "cpu_seconds": 0.0,
            "raw_ratios": [1.0, 0.5, 0.5],
        }

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
    chosen = [r["lr"] / lora.CASES[r["case"]].lr for r in runs.values() if not r["trial"]]
    assert chosen == pytest.approx([9.0] * len(chosen))  # the stand-in's best
    for make in (lora_report.accuracies, lora_report.tweets):
        assert "| 9.0 ± 0.0 (0.50) |" in make(runs)
    rows = lora_report.margins(runs).splitlines()[2:]
    assert all(row.endswith("| +0.0 ± 0.0 | +0.0 ± 0.0 |") for row in rows)


def test_every_rule_of_every_adapter_is_set_against_aadp():
    """And no head against an adapter of another set."""
    rows = [row.split(" | ") for row in lora_report.margins({}).splitlines()[2:]]
    for case in lora.ADAPTED:
        over = {row[2] for row in rows if row[0].removeprefix("| ") == case}
        assert set(lora.METHODS_OF[case]) - {lora.BEST_AADP} <= over
    of_heads = [(row[0], row[2]) for row in rows if "head alone" in row[2]]
    assert all(("tweets" in one) == ("tweets" in other) for one, other in of_heads)


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


def test_fewer_texts_are_every_fourth_of_both_splits_and_nobodys(monkeypatch):
    x, y = torch.arange(22).reshape(11, 2), torch.arange(11)
    client = torch.arange(11)
    whole = lora.Arrays(x, y, x[:9], y[:9], 11, "texts", client, None, client[:9])
    monkeypatch.setattr(lora, "load", lambda *_, **__: whole)
    lora._texts.cache_clear()
    found, _ = lora._texts(lora.TWEETS)
    lora._texts.cache_clear()
    assert found.y_train.tolist() == [0, 4, 8]
    assert found.x_test.tolist() == x[:9:4].tolist()
    assert found.client_train is None
    assert found.client_test is None
