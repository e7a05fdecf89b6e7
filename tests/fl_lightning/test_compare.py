"""`aadp compare`: rows by what differs, intervals over seeds, a page that needs nothing else."""

import csv
import json
import math

import pytest
import yaml
from scipy import stats

from fl_lightning.compare import (
    COLUMNS,
    curves,
    grouped,
    main,
    mean_and_interval,
    page_of,
    read_run,
    rows_of,
)


@pytest.fixture
def run(tmp_path):
    def make(name, *, seed=1, accuracy=0.5, epsilon=8.0, **options):
        folder = tmp_path / name
        folder.mkdir()
        config = {
            "seed_everything": seed,
            "run_dir": str(folder),
            "privacy": {"epsilon": epsilon, "seed": None},
            "model": {"network": {"class_path": "fl_lightning.models.CNN"}, "run_dir": str(folder)},
        } | options
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        summary = {"test_accuracy": accuracy, "sim_only_val_accuracy": None, "epsilon_max": epsilon}
        summary |= {"privacy": "proven", "rounds": 2, "seconds": 3.0}
        (folder / "summary.json").write_text(json.dumps(summary))
        with (folder / "rounds.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["round", "sim_only_val_accuracy", "epsilon_max"])
            writer.writerows([[0, accuracy / 2, epsilon / 2], [1, "", epsilon]])
        return folder

    return make


def test_runs_that_differ_in_seeds_alone_are_one_row(run):
    runs = [read_run(run(f"a{i}", seed=i, accuracy=0.5 + i / 10)) for i in range(3)]
    runs.append(read_run(run("b", epsilon=3.0, accuracy=0.4)))
    groups = grouped(runs)
    assert [(g.label, len(g.runs)) for g in groups] == [
        ("privacy.epsilon=8.0", 3), ("privacy.epsilon=3.0", 1),
    ]  # fmt: skip
    table = [dict(zip(COLUMNS, row, strict=True)) for row in rows_of(groups)]
    half = stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3)
    assert table[0]["test accuracy"] == f"60.0 ± {100 * half:.1f} %"
    assert table[1]["test accuracy"] == "40.0 %"
    assert [row["ε"] for row in table] == ["8", "3"]


def test_a_label_is_only_what_differs(run):
    layers = {
        "model": {"network": {"class_path": "fl_lightning.models.MLP", "init_args": {"h": 3}}}
    }
    groups = grouped([read_run(run("a")), read_run(run("b", **layers))])
    assert [g.label for g in groups] == [
        "model.network=CNN",
        "model.network=MLP, model.network.h=3",
    ]
    assert grouped([read_run(run("c")), read_run(run("d"))])[0].label == "all alike"


def test_epsilon_is_never_rounded_down(run):
    (row,) = rows_of(grouped([read_run(run("a", epsilon=7.99901))]))
    assert row[COLUMNS.index("ε")] == "8"


def test_an_interval_needs_two_values():
    assert mean_and_interval([0.5])[0] == 0.5
    assert math.isnan(mean_and_interval([0.5])[1])
    assert math.isnan(mean_and_interval([])[0])


def test_the_page_needs_nothing_else(run):
    groups = grouped([read_run(run("a")), read_run(run("b<", epsilon=3.0))])
    picture = curves(groups)
    assert picture.startswith(b"\x89PNG")
    page = page_of(groups, picture)
    assert "b&lt;" in page
    assert "b<," not in page
    assert "http" not in page
    assert 'src="data:image/png;base64,' in page


def test_the_command(run, tmp_path, capsys):
    folders = [str(run("a")), str(run("b", epsilon=3.0))]
    assert main([*folders, "--out", str(tmp_path / "out" / "both")]) == 0
    assert "privacy.epsilon=3.0" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"both.html", "both.png"}
    assert main([str(tmp_path)]) == 2
    assert "no run has ended here" in capsys.readouterr().err
