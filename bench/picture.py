"""The picture on README's first screen, made by one run: `python -m bench picture`.

The run has a public seed and one thread, so the same versions on the same machine give the same
ledger. Its command and the head of its ledger stand below the picture, and in the file.
"""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import pages
from bench.machine import ROOT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IMAGE = ROOT / "docs" / "images" / "first_run.png"
COMMAND = "python -m fl_lightning.fit --config configs/digits_personal.yaml --privacy.seed 1"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
Rows = Sequence[dict[str, str]]


def run_all() -> None:
    """Run the command, draw what it wrote, and say below the picture what it is."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*shlex.split(COMMAND)[1:], "--run_dir", folder, "--trainer.logger", "false"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}  # low bits depend on threads
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True,
                       env=environment)  # fmt: skip
        path = Path(folder)
        summary = json.loads((path / "summary.json").read_text())
        rounds, layers = (_rows(path / name) for name in ("rounds.csv", "layers.csv"))
        head = json.loads((path / "ledger.jsonl").read_text().splitlines()[-1])["hash"]
    draw(rounds, layers, summary, head)
    pages.put(pages.README, "picture", caption(summary, head))


def caption(summary: dict[str, Any], head: str) -> str:
    """The picture and what made it."""
    return (
        f"![Accuracy, ε and budget shares by round]({IMAGE.relative_to(ROOT).as_posix()})\n\n"
        f"*Ten clients with ε of 1, 3 and 8 train on digits; the test accuracy is "
        f"{100 * summary['test_accuracy']:.1f} %. Made by `python -m bench picture`, which runs "
        f"`{COMMAND}` with one thread; its ledger ends with `{head[:16]}`.*"
    )


def draw(rounds: Rows, layers: Rows, summary: dict[str, Any], head: str) -> None:
    """Three panels: accuracy, ε of the clients, and the layers' shares of the budget."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    number = _column(rounds, "round") + 1
    left.plot(number, 100 * _column(rounds, "sim_only_val_accuracy"), "o-", color=COLOURS[0], ms=3)
    left.axhline(100 * summary["test_accuracy"], color="black", ls=":", lw=1)
    end = (len(number), 100 * summary["test_accuracy"])
    left.annotate("test records, after the last round", end, (0, -11), ha="right", fontsize=8,
                  textcoords="offset points")  # fmt: skip
    left.set(title="The shared model learns", ylabel="accuracy, %", ylim=(0, 100))
    for colour, (name, label) in zip(COLOURS, _EPSILONS.items(), strict=False):
        middle.plot(number, _column(rounds, name), "o-", color=colour, ms=3, label=label)
    middle.set(title="Each client spends its own ε", ylabel="ε spent", ylim=(0, None))
    for colour, name in zip(COLOURS, dict.fromkeys(row["layer"] for row in layers), strict=False):
        _shares(right, [row for row in layers if row["layer"] == name], name, colour)
    right.set(title="Layers share it by contribution", ylabel="share of the budget", ylim=(0, 1))
    for axis in (left, middle, right):
        axis.set_xlabel("round")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e5e5e5", linewidth=0.6)
    for axis in (middle, right):
        axis.legend(frameon=False, fontsize=8)
    note = {"Software": None, "Description": f"{COMMAND}; ledger head {head}"}
    figure.savefig(IMAGE, dpi=110, metadata=note)
    plt.close(figure)


_EPSILONS = {
    "epsilon_min": "clients that allow ε = 1",
    "epsilon_median": "ε = 3",
    "epsilon_max": "ε = 8",
}


def _shares(axis: Axes, rows: Rows, name: str, colour: str) -> None:
    """Median and range over the clients of a layer's share of the budget."""
    number, share = _column(rows, "round").astype(int), _column(rows, "share")
    found = [share[number == n] for n in np.unique(number)]
    x = np.unique(number) + 1
    axis.fill_between(x, [f.min() for f in found], [f.max() for f in found], color=colour,
                      alpha=0.2, lw=0)  # fmt: skip
    axis.plot(x, [np.median(f) for f in found], color=colour, label=f"layer {name}")


def _rows(path: Path) -> Rows:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _column(rows: Rows, name: str) -> np.ndarray:
    return np.array([float(row[name] or "nan") for row in rows])
