"""The study of a pretrained encoder: starts are tuned alike, and its page shows what was found."""

from __future__ import annotations

from bench import pages, pretrained
from bench.accuracy import Results


def test_either_start_has_as_many_trials() -> None:
    for private in (True, False):
        counts = {len(pretrained.trials_of(start, private)) for start in pretrained.SCALES}
        assert counts == {6}


def test_trials_and_seeds_are_run_once_and_kept(monkeypatch, tmp_path) -> None:
    asked = []

    def run(config, seed, *, test, arrays):
        asked.append((seed, test))
        lr = config["model"]["server_optimizer"]["init_args"]["lr"]
        return {"accuracy": lr, "figures": {"MulticlassRecall": 0.5}, "seconds": 0.0}

    monkeypatch.setattr("bench.accuracy.run", run)
    results = Results(tmp_path / "found.json")
    for epsilon in (1.0, 3.0, 8.0, None):
        pretrained._tuned("starts at the words", epsilon, results, lambda config: None)
    assert [seed for seed, test in asked if not test] == [0] * 24
    assert [seed for seed, test in asked if test] == [1, 2, 3, 4, 5] * 4
    best = {r["options"][pretrained._LR] for r in results.runs.values() if r["trial"] is None}
    assert best == {1000.0, 3000.0}  # the largest of the trials, which the stand-in says is best
    assert pretrained.rows(results.runs)[0][1] == "1000.0 ± 0.0 (0.50)"


def test_the_page_shows_the_results() -> None:
    runs = Results(pretrained.PATH).runs
    assert pages.written(pretrained.PAGE, "accuracy") == pretrained.table(runs)
