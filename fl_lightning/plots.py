"""Pictures of a run, drawn from `rounds.csv`, `layers.csv` and `attacks.csv` alone.

Command: `python -m fl_lightning.plots RUN_DIR` draws them again.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fl_lightning.privacy.simulated import simulated_reason
from fl_lightning.values.rounding import round_up
from fl_lightning.values.short_names import short_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROUND_COLUMNS = (
    "round",
    "clients",
    "epsilon_max",
    "epsilon_median",
    "epsilon_min",
    "sim_only_val_accuracy",
    "sim_only_val_loss",
    "sim_only_nonfinite",
    "seconds",
)
LAYER_FIELDS = ("clip_norm", "shares", "contribution", "noise_scale", "clipped_fraction")
LAYER_COLUMNS = (
    "round",
    "client",
    "layer",
    "clip_norm",
    "share",
    "contribution",
    "noise_scale",
    "sim_only_clipped_fraction",
    "division_ratio",
)
# Okabe and Ito's colours, which stay apart for colour-blind readers.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_PANELS = (
    ("clip_norm", "clip norm, in units of what is clipped"),
    ("share", "share of the budget, of 1"),
    ("noise_scale", "noise scale, in the same units"),
    ("sim_only_clipped_fraction", "clipped fraction, of 1 (simulation only)"),
)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV as written; [] where the file is missing."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def convergence(
    rounds: Sequence[dict[str, str]], epsilon_label: str = "ε spent (upper bound)"
) -> Figure | None:
    """Validation accuracy (simulation only) above the ε spent, against rounds.

    Args:
        rounds: rows of `rounds.csv`.
        epsilon_label: what the ε is.

    Returns:
        A figure with the panels that have data; None without any.
    """
    number = _column(rounds, "round") + 1
    accuracy, epsilon = (_column(rounds, n) for n in ("sim_only_val_accuracy", "epsilon_max"))
    present = [bool(np.isfinite(values).any()) for values in (accuracy, epsilon)]
    if not any(present):
        return None
    figure = _figure(6.4, 2.4 + 1.8 * sum(present))
    panels = figure.subplots(sum(present), 1, sharex=True, squeeze=False)[:, 0]
    axes = iter(panels)
    if present[0]:
        ax, known = next(axes), np.isfinite(accuracy)
        marker = "o" if known.sum() <= 40 else None
        ax.plot(number[known], accuracy[known], color=_COLOURS[0], marker=marker, markersize=3)
        ax.set_ylabel("validation accuracy, of 1\n(simulation only)")
        ax.set_ylim(max(0.0, accuracy[known].min() - 0.05), min(1.0, accuracy[known].max() + 0.02))
        _dress(ax)
    if present[1]:
        ax = next(axes)
        low, middle = (_column(rounds, n) for n in ("epsilon_min", "epsilon_median"))
        spread = bool(np.any(low < epsilon))
        if spread:
            ax.fill_between(number, low, epsilon, color=_COLOURS[1], alpha=0.2, lw=0)
            ax.plot(number, middle, color=_COLOURS[1], ls="--", label="median client")
        ax.plot(
            number,
            epsilon,
            color=_COLOURS[1],
            marker=_marker(number),
            label="largest of all clients" if spread else "every client",
        )
        ax.set_ylabel(epsilon_label)
        ax.set_ylim(bottom=0)
        ax.legend(loc="best", frameon=False)
        _dress(ax)
    panels[-1].set_xlabel("round")
    figure.align_ylabels()
    return figure


def layer_history(layers: Sequence[dict[str, str]]) -> Figure | None:
    """Clip norm, budget share, noise scale and clipped fraction of every layer against rounds.

    A line is the median over the round's clients, the band around it their range. Where there are
    more layers than colours that stay apart, a heat map shows the medians.

    Args:
        layers: rows of `layers.csv`.
    """
    if not layers:
        return None
    names = list(dict.fromkeys(row["layer"] for row in layers))
    of_layer = np.array([row["layer"] for row in layers])
    number = _column(layers, "round") + 1
    many, labels = len(names) > len(_COLOURS), short_names(names)
    figure = _figure(9.6, max(6.4, min(12.0, 1.4 + 0.24 * len(names))) if many else 6.4)
    axes = figure.subplots(2, 2, sharex=True, sharey=many)
    for ax, (column, title) in zip(axes.flat, _PANELS, strict=True):
        values = _column(layers, column)
        spreads = [_spread(number[of_layer == n], values[of_layer == n]) for n in names]
        ax.set_title(title, fontsize="medium")
        _dress(ax)
        if many:
            _heat(figure, ax, labels, spreads, log=column in ("clip_norm", "noise_scale"))
        else:
            _lines(ax, labels, spreads)
            _scale(ax, column, values[np.isfinite(values)])
    for ax in axes[1]:
        ax.set_xlabel("round")
    if many:
        figure.suptitle("median over the round's clients, of every layer", fontsize="medium")
    else:
        _legend(figure, axes[0, 0])
    return figure


def _lines(ax: Any, names: Sequence[str], spreads: Sequence[tuple[np.ndarray, ...]]) -> None:
    """A line and a band a layer."""
    for colour, name, (x, low, middle, high) in zip(_COLOURS, names, spreads, strict=False):
        ax.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
        ax.plot(x, middle, color=colour, label=name, marker=_marker(x))


def _heat(
    figure: Figure,
    ax: Any,
    names: Sequence[str],
    spreads: Sequence[tuple[np.ndarray, ...]],
    *,
    log: bool,
) -> None:
    """A row of cells a layer, a column a round: as many layers as there are can be read."""
    from matplotlib.colors import LogNorm

    rounds = np.unique(np.concatenate([x for x, *_ in spreads]))
    grid = np.full((len(names), max(len(rounds), 1)), np.nan)
    for row, (x, _, middle, _) in zip(grid, spreads, strict=True):
        row[np.searchsorted(rounds, x)] = middle
    known = grid[np.isfinite(grid)]
    wide = log and len(known) > 0 and known.min() > 0 and known.max() > 10 * known.min()
    last = float(rounds[-1]) if len(rounds) else 1.0
    image = ax.imshow(
        np.ma.masked_invalid(grid),
        aspect="auto",
        interpolation="nearest",
        cmap="cividis",
        extent=(0.5, last + 0.5, len(names) - 0.5, -0.5),
        norm=LogNorm() if wide else None,
    )
    bar = figure.colorbar(image, ax=ax)
    if wide:
        _log_ticks(bar.ax)
    ax.grid(False)
    shown = _every(len(names), 25)
    ax.set_yticks(shown, [names[i] for i in shown], fontsize="x-small")


def client_map(layers: Sequence[dict[str, str]]) -> Figure | None:
    """Budget shares and noise scales of every client and layer, as of the client's last round.

    Args:
        layers: rows of `layers.csv`.
    """
    if not layers:
        return None
    from matplotlib.colors import LogNorm

    names = list(dict.fromkeys(row["layer"] for row in layers))
    labels = short_names(names)
    clients = sorted({int(r["client"]) for r in layers})
    row, column = ({key: i for i, key in enumerate(keys)} for keys in (clients, names))
    width = min(12.0, max(7.0, 3.5 + 0.7 * len(names)))
    figure = _figure(width, min(8.0, 3.2 + 0.12 * len(clients)))
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (field, title) in zip(axes, (_PANELS[1], _PANELS[2]), strict=True):
        grid = np.full((len(clients), len(names)), np.nan)
        for r in layers:
            grid[row[int(r["client"])], column[r["layer"]]] = float(r[field])
        positive = np.isfinite(grid).all() and grid.min() > 0
        wide = positive and grid.max() > 10 * grid.min()
        style: dict[str, Any] = {"norm": LogNorm()} if wide else {}
        image = ax.imshow(
            np.ma.masked_invalid(grid),
            aspect="auto",
            interpolation="nearest",
            cmap="cividis",
            **style,
        )
        bar = figure.colorbar(image, ax=ax)
        if wide:
            _log_ticks(bar.ax)
        ax.set_title(title, fontsize="medium")
        shown = _every(len(names), 16)
        ax.set_xticks(shown, [labels[i] for i in shown], rotation=45, ha="right")
        shown = _every(len(clients), 20)
        ax.set_yticks(shown, [str(clients[i]) for i in shown])
        ax.set_xlabel("layer")
    axes[0].set_ylabel("client")
    figure.suptitle("last round of each client that took part", fontsize="medium")
    return figure


def attack_curves(rows: Sequence[dict[str, str]]) -> Figure | None:
    """Right alarms against false ones: the most that any attack reaches.

    Args:
        rows: of `attacks.csv`.

    Returns:
        The figure; None without rows.
    """
    if not rows:
        return None
    figure = _figure(5.6, 5.0)
    ax = figure.subplots()
    rates = _column(rows, "false_positive_rate")
    lines = (
        ("epsilon_delta_alone", "(ε, δ) read alone", "--"),
        ("worst_client", "worst client", "-"),
        ("median_client", "median client", ":"),
    )
    for (column, label, style), colour in zip(lines, _COLOURS[1:4], strict=True):
        ax.plot(rates, _column(rows, column), style, color=colour, label=label)
    ax.plot([0, 1], [0, 1], color="0.6", linewidth=1, label="guessing")
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ax.set_xlabel("false alarms (false positive rate)")
    ax.set_ylabel("right alarms, at most (true positive rate)")
    ax.set_title("What an attack can find out about one unit", fontsize="medium")
    ax.legend(frameon=False, loc="lower right")
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def draw_all(run_path: Path) -> list[Path]:
    """Draw what a run's files have data for.

    Args:
        run_path: folder with the CSV files; pictures go to its `plots` folder.

    Returns:
        The PNG files written.
    """
    rounds, layers = read_rows(run_path / "rounds.csv"), read_rows(run_path / "layers.csv")
    pictures = {
        "convergence": convergence(rounds, _epsilon_label(run_path)),
        "layers": layer_history(layers),
        "clients": client_map(layers),
        "attacks": attack_curves(read_rows(run_path / "attacks.csv")),
    }
    written, title = [], run_title(run_path)
    for name, figure in pictures.items():
        if figure is not None:
            own = figure.get_suptitle()
            figure.suptitle(f"{title}\n{own}" if own else title, fontsize="medium")
            path = run_path / "plots" / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            figure.savefig(path, dpi=150)
            written.append(path)
    return written


def run_title(run_path: Path) -> str:
    """Which run it is and what it came to, in a line; as far as its files say."""
    facts, summary = ledger_facts(run_path), {}
    if (run_path / "summary.json").exists():
        summary = json.loads((run_path / "summary.json").read_text(encoding="utf-8"))
    words = [run_path.absolute().name, *filter(None, [facts.get("dataset"), facts.get("setting")])]
    if summary.get("test_accuracy") is not None:
        words.append(f"test accuracy {100 * summary['test_accuracy']:.1f} %")
    if summary.get("epsilon_max") is not None:
        words.append(f"ε ≤ {round_up(float(summary['epsilon_max']), 3)}")
    return " · ".join(words)


def ledger_facts(run_path: Path) -> dict[str, Any]:
    """The header of a run's ledger; {} without one."""
    ledger = run_path / "ledger.jsonl"
    if not ledger.exists():
        return {}
    with ledger.open(encoding="utf-8") as file:
        return json.loads(file.readline())["facts"]


def _epsilon_label(run_path: Path) -> str:
    """What the ε of a run is, by the header of its ledger."""
    label, facts = "ε spent (upper bound)", ledger_facts(run_path)
    if facts:
        if facts["setting"] == "abstract":
            label = "nominal ε, no guarantee"
        reason = simulated_reason(facts)
        label += f"\n(simulated: {reason})" if reason else ""
    return label


def _figure(width: float, height: float) -> Figure:
    # Not through pyplot: no global state, no display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _column(rows: Sequence[dict[str, str]], name: str) -> np.ndarray:
    """Numbers of a column, NaN where empty."""
    return np.array([float(row[name] or "nan") for row in rows], dtype=float)


def _spread(number: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, ...]:
    """Round numbers, with lowest, median and highest finite value over the clients."""
    known = np.isfinite(values)
    rounds, starts = np.unique(number[known], return_index=True)
    parts = np.split(values[known], starts[1:]) if len(rounds) else []
    low, middle, high = (np.array([f(p) for p in parts]) for f in (np.min, np.median, np.max))
    return rounds, low, middle, high


def _scale(ax: Any, column: str, values: np.ndarray) -> None:
    if column == "sim_only_clipped_fraction":
        ax.set_ylim(-0.02, 1.02)
    elif column == "share":
        ax.set_ylim(0, min(1.05, 1.1 * max(values, default=1.0)))
    elif len(values) and values.min() > 0 and values.max() > 5 * values.min():
        ax.set_yscale("log")
        _log_ticks(ax)
    else:
        ax.set_ylim(bottom=0)


def _log_ticks(ax: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    few = np.log10(ax.get_ylim()[1] / ax.get_ylim()[0]) < 2.5
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter("{x:g}")


def _legend(figure: Figure, ax: Any) -> None:
    handles, labels = ax.get_legend_handles_labels()
    text = "line: median over the round's clients; band: their range"
    figure.suptitle(text, fontsize="medium")
    figure.legend(handles, labels, loc="outside right center", frameon=False, title="layer")


def _marker(points: np.ndarray) -> str | None:
    # One point makes no line.
    return "o" if len(points) < 3 else None


def _every(count: int, most: int) -> list[int]:
    return list(range(0, count, -(-count // most)))


def _dress(ax: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m fl_lightning.plots RUN_DIR")
    for drawn in draw_all(Path(sys.argv[1])):
        print(drawn)
