"""Pictures: they show what the files say, and nothing where the files say nothing."""

from __future__ import annotations

import csv
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text

from fl_lightning import plots

NAMES = ("conv", "fc")


def round_rows(count: int, **values: str) -> list[dict[str, str]]:
    usual = dict.fromkeys(plots.ROUND_COLUMNS, "1")
    return [{**usual, "round": str(r), **values} for r in range(count)]


def layer_rows(
    rounds: int = 4, clients: int = 3, names: tuple[str, ...] = NAMES, spread: float = 1.0
) -> list[dict[str, str]]:
    """Clip norm of client k in layer l: (1 + k)·spread^l; the share is 0.1 a round passed."""
    return [
        {
            "round": str(r),
            "client": str(10 * k),
            "layer": name,
            "clip_norm": str((1 + k) * spread**i),
            "share": str(0.1 * (r + 1)),
            "contribution": "0.5",
            "noise_scale": str((1 + k) * spread**i),
            "sim_only_clipped_fraction": "nan" if k == 0 else "0.5",
            "division_ratio": "0.9",
        }
        for r in range(rounds)
        for k in range(clients)
        for i, name in enumerate(names)
    ]


def save(path: Path, columns: tuple[str, ...], rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def line(ax: Any, label: str) -> np.ndarray:
    (found,) = [drawn for drawn in ax.lines if drawn.get_label() == label]
    return np.array(found.get_data())


def test_convergence_shows_validated_rounds_and_every_epsilon() -> None:
    rows = round_rows(4, epsilon_max="3", epsilon_median="2", epsilon_min="1")
    for r in (0, 2):
        rows[r]["sim_only_val_accuracy"] = ""
    rows[1]["sim_only_val_accuracy"], rows[3]["sim_only_val_accuracy"] = "0.25", "0.75"
    figure = plots.convergence(rows)
    assert figure is not None
    accuracy, epsilon = figure.axes
    np.testing.assert_array_equal(accuracy.lines[0].get_data(), [[2, 4], [0.25, 0.75]])
    assert "simulation only" in accuracy.get_ylabel()
    expected = [[1, 2, 3, 4], [3, 3, 3, 3]]
    np.testing.assert_array_equal(line(epsilon, "largest of all clients"), expected)
    assert line(epsilon, "median client")[1].tolist() == [2, 2, 2, 2]
    assert len(epsilon.collections) == 1
    assert epsilon.get_xlabel() == "round"


@pytest.mark.parametrize("epsilon", ["", "inf"])
def test_no_panel_for_no_epsilon(epsilon: str) -> None:
    rows = round_rows(2, epsilon_max=epsilon, epsilon_median=epsilon, epsilon_min=epsilon)
    figure = plots.convergence(rows)
    assert figure is not None
    assert len(figure.axes) == 1
    for row in rows:
        row["sim_only_val_accuracy"] = ""
    assert plots.convergence(rows) is None
    assert plots.convergence([]) is None


def test_layer_lines_are_medians_and_bands_are_ranges() -> None:
    figure = plots.layer_history(layer_rows())
    assert figure is not None
    clip_norm, share, _, clipped = figure.axes
    np.testing.assert_array_equal(line(clip_norm, "fc"), [[1, 2, 3, 4], [2, 2, 2, 2]])
    band = clip_norm.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (1, 3)
    assert line(share, "conv")[1] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert line(clipped, "conv")[1].tolist() == [0.5] * 4
    assert "simulation only" in clipped.get_title()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(NAMES)


@pytest.mark.parametrize(("spread", "scale"), [(1.0, "linear"), (100.0, "log")])
def test_axes_are_logarithmic_only_over_wide_ranges(spread: float, scale: str) -> None:
    history, clients = (
        f(layer_rows(spread=spread)) for f in (plots.layer_history, plots.client_map)
    )
    assert history is not None
    assert [ax.get_yscale() for ax in history.axes] == [scale, "linear", scale, "linear"]
    assert clients is not None
    norm = type(clients.axes[1].images[0].norm).__name__
    assert norm == ("LogNorm" if scale == "log" else "Normalize")


@pytest.mark.parametrize("layers", [8, 100])
def test_many_layers_are_a_heat_map_of_medians(layers: int) -> None:
    names = tuple(f"l{i}" for i in range(layers))
    rows = [
        r for r in layer_rows(names=names, spread=1.5) if (r["layer"], r["round"]) != ("l3", "2")
    ]
    figure = plots.layer_history(rows)
    assert figure is not None
    clip_norm, share, _, clipped = figure.axes[:4]
    assert not any(ax.lines for ax in figure.axes[:4])
    image = clip_norm.images[0]
    shown = np.ma.filled(image.get_array(), np.nan)
    assert shown.shape == (layers, 4)
    np.testing.assert_allclose(shown[:, 0], 2 * 1.5 ** np.arange(layers))
    assert np.isnan(shown).nonzero()[0].tolist() == [3]
    assert image.get_extent() == [0.5, 4.5, layers - 0.5, -0.5]
    assert type(image.norm).__name__ == "LogNorm"
    assert type(share.images[0].norm).__name__ == "Normalize"
    assert "simulation only" in clipped.get_title()
    labels = [t.get_text() for t in clip_norm.get_yticklabels()]
    assert labels[0] == "l0"
    assert len(labels) <= 25


@pytest.mark.parametrize("blocks", [1, 6])
@pytest.mark.filterwarnings("error")
def test_long_names_leave_room_for_the_panels(blocks: int, tmp_path: Path) -> None:
    """Matplotlib warns where labels leave axes no width."""
    inside = "body.base_model.model.encoder.layer.{}.attention.self.{}.lora_{}.default"
    names = [
        inside.format(i, q, f) for i in range(blocks) for q in ("query", "value") for f in "AB"
    ]
    rows = layer_rows(names=(*names, "head"))
    for figure in (plots.layer_history(rows), plots.client_map(rows)):
        assert figure is not None
        figure.savefig(tmp_path / "drawn.png")
        assert min(ax.get_position().width for ax in figure.axes[:2]) > 0.25
        texts = {text.get_text() for text in figure.findobj(Text)}
        assert "head" in texts
        assert any(text.endswith("query.lora_A") and len(text) <= 20 for text in texts)


def test_pictures_say_which_run_they_are_of(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    run.mkdir()
    assert plots.run_title(run) == "mine"
    (run / "summary.json").write_text(json.dumps({"test_accuracy": 0.93061, "epsilon_max": 7.9994}))
    facts = {"facts": {"dataset": "digits", "setting": "record+local"}}
    (run / "ledger.jsonl").write_text(json.dumps(facts) + "\n")
    title = "mine · digits · record+local · test accuracy 93.1 % · ε ≤ 8"
    assert plots.run_title(run) == title


def test_one_look_at_the_validation_records_has_an_axis_of_accuracies() -> None:
    figure = plots.convergence(round_rows(1, epsilon_max="", sim_only_val_accuracy="0.99"))
    assert figure is not None
    low, high = figure.axes[0].get_ylim()
    assert 0 <= low < 0.99 < high <= 1


def test_the_map_shows_each_clients_last_round() -> None:
    rows = [r for r in layer_rows() if not (r["client"] == "10" and int(r["round"]) > 1)]
    figure = plots.client_map(rows)
    assert figure is not None
    share = figure.axes[0]
    shown = np.asarray(share.images[0].get_array())
    np.testing.assert_allclose(shown, [[0.4, 0.4], [0.2, 0.2], [0.4, 0.4]])
    assert [t.get_text() for t in share.get_yticklabels()] == ["0", "10", "20"]
    assert [t.get_text() for t in share.get_xticklabels()] == list(NAMES)


def test_draw_all_draws_what_there_is(tmp_path: Path) -> None:
    assert plots.draw_all(tmp_path) == []
    save(tmp_path / "rounds.csv", plots.ROUND_COLUMNS, round_rows(1))
    save(tmp_path / "layers.csv", plots.LAYER_COLUMNS, [])
    assert [p.name for p in plots.draw_all(tmp_path)] == ["convergence.png"]
    save(tmp_path / "layers.csv", plots.LAYER_COLUMNS, layer_rows(1, 1, ("only, one",)))
    drawn = plots.draw_all(tmp_path)
    assert [p.name for p in drawn] == ["convergence.png", "layers.png", "clients.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in drawn)


@pytest.mark.parametrize(
    ("setting", "simulated", "label"),
    [
        ("record+local", False, "ε spent (upper bound)"),
        ("record+local", True, "ε spent (upper bound)\n(simulated: public seed)"),
        ("abstract", False, "nominal ε, no guarantee"),
    ],
)
def test_epsilon_is_called_what_it_is(
    tmp_path: Path, setting: str, simulated: bool, label: str
) -> None:
    facts = {"setting": setting, "simulated": simulated}
    (tmp_path / "ledger.jsonl").write_text(json.dumps({"facts": facts}) + "\n")
    assert plots._epsilon_label(tmp_path) == label
    figure = plots.convergence(round_rows(2), plots._epsilon_label(tmp_path))
    assert figure is not None
    assert figure.axes[1].get_ylabel() == label


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_command_draws_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    save(tmp_path / "rounds.csv", plots.ROUND_COLUMNS, round_rows(3))
    monkeypatch.setattr(sys, "argv", ["plots", str(tmp_path)])
    runpy.run_module("fl_lightning.plots", run_name="__main__")
    path = tmp_path / "plots" / "convergence.png"
    assert capsys.readouterr().out.strip() == str(path)
    assert path.exists()
    monkeypatch.setattr(sys, "argv", ["plots"])
    with pytest.raises(SystemExit, match="usage"):
        runpy.run_module("fl_lightning.plots", run_name="__main__")
