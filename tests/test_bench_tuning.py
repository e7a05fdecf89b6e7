"""The study of charged searches: its table is that of its committed runs."""

import json

from bench import pages, tuning


def test_the_page_has_the_table_of_the_committed_runs() -> None:
    runs = json.loads(tuning.RESULTS.read_text())["runs"]
    assert len(tuning.repeats(runs)) == tuning.REPEATS
    assert pages.written(tuning.PAGE, "tuning") == tuning.tuning_table(runs)


def test_a_way_chooses_by_what_it_may_see() -> None:
    runs = {
        "0 | charged | 0": {"private": 1.0, "validation": 9.0, "test": 10.0},
        "0 | charged | 1": {"private": 2.0, "validation": 3.0, "test": 20.0},
        "0 | uncharged | 0": {"private": 1.0, "validation": 9.0, "test": 30.0},
        "0 | uncharged | 1": {"private": 2.0, "validation": 3.0, "test": 40.0},
        "0 | defaults": {"private": 2.0, "validation": 3.0, "test": 50.0},
    }
    found = [tuning.accuracies(runs, way, [0])[0] for way in tuning.WAYS]
    assert found == [20.0, 30.0, 50.0]
