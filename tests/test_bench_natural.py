"""The study of real sets with owners: equal trials everywhere, and its page shows the runs."""

from __future__ import annotations

import pytest

from bench import natural, pages
from bench.accuracy import Results


@pytest.mark.parametrize("name", natural.CASES)
def test_every_epsilon_has_as_many_trials_and_none_sees_the_test_records(
    name, monkeypatch, tmp_path
) -> None:
    asked, case = [], natural.CASES[name]

    def run(config, seed, *, test, arrays):
        asked.append((config["privacy"].get("epsilon"), seed, test))
        lr = config["model"]["server_optimizer"]["init_args"]["lr"]
        figures = {"MulticlassAUROC": lr, "MulticlassRecall": 0.5}
        # The judge is the case's own figure; the other would choose the smallest step.
        accuracy = lr if case.figure == "accuracy" else -lr
        return {"accuracy": accuracy, "figures": figures, "seconds": 0.0}

    monkeypatch.setattr("bench.accuracy.run", run)
    results = Results(tmp_path / "found.json")
    for epsilon in (1.0, 3.0, None):
        natural.tuned(name, epsilon, results, lambda config: None)
    assert [seed for _, seed, test in asked if not test] == [0] * 18
    assert [seed for _, seed, test in asked if test] == [1, 2, 3, 4, 5] * 3
    for epsilon in (1.0, 3.0, None):
        of_epsilon = [r for r in results.runs.values() if r["target_epsilon"] == epsilon]
        rates = [r["options"][natural._LR] for r in of_epsilon if r["trial"] is not None]
        best = {r["options"][natural._LR] for r in of_epsilon if r["trial"] is None}
        assert best == {max(rates)}
    rows = natural.natural_table(results.runs).splitlines()
    assert sum(row.count("± 0.0") for row in rows) == 3  # ε = 8 was not run


def test_the_page_shows_the_results() -> None:
    runs = Results(natural.PATH).runs
    assert pages.written(pages.RESULTS, "natural") == natural.natural_table(runs)
