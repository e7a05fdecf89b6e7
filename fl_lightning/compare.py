"""`aadp compare RUN RUN ...`: a table and curves of several runs, with intervals over seeds.

Runs whose configurations differ in nothing but seeds and folders are one row.
"""

from __future__ import annotations

import argparse
import base64
import csv
import html
import io
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fl_lightning.output.console import say, speak_any_encoding

SEEDS = ("seed_everything", "privacy.seed", "model.seed", "data.seed")
# Where a run lies and how it is shown decide nothing of it.
_PLACES = ("run_dir", "ckpt_path", "model.run_dir", "trainer.default_root_dir", "trainer.logger")
_LEVEL = 0.95


@dataclass(frozen=True)
class FinishedRun:
    """A run folder as read.

    Args:
        folder: of the run.
        options: its configuration by dotted names; only what decides the run.
        summary: of its end.
        rounds: rows of `rounds.csv`.
    """

    folder: Path
    options: Mapping[str, Any]
    summary: Mapping[str, Any]
    rounds: Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone; `label` says what is theirs among all groups."""

    label: str
    runs: Sequence[FinishedRun]


def read_run(folder: Path) -> FinishedRun:
    """A finished run.

    Raises:
        ValueError: the folder holds none, or a file in it is damaged.
    """
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        with (folder / "rounds.csv").open(newline="", encoding="utf-8") as file:
            rounds = list(csv.DictReader(file))
    except FileNotFoundError as error:
        name = Path(str(error.filename)).name
        raise ValueError(f"{folder}: there is no {name}, so no run has ended here") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{folder}: a file of the run cannot be read: {error}") from error
    options = {name: value for name, value in _flat(config) if name not in _PLACES}
    return FinishedRun(folder, options, summary, rounds)


def _flat(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(config, dict) or not config:
        return [(prefix, config)]
    return [
        pair
        for name, value in config.items()
        for pair in _flat(value, f"{prefix}.{name}" if prefix else str(name))
    ]


def grouped(runs: Sequence[FinishedRun]) -> list[Group]:
    """Runs by what else than seeds differs among them, in the order in which they are given."""
    names = sorted({name for run in runs for name in run.options if name not in SEEDS})
    missing = object()
    differing = [
        name
        for name in names
        if any(run.options.get(name, missing) != runs[0].options.get(name, missing) for run in runs)
    ]
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        known = [name for name in differing if name in run.options]
        parts = [f"{_short(name)}={_shown(run.options[name])}" for name in known]
        groups.setdefault(", ".join(parts) or "all alike", []).append(run)
    return [Group(label, members) for label, members in groups.items()]


def _short(name: str) -> str:
    return name.replace(".init_args.", ".").removesuffix(".class_path")


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text.rpartition(".")[2] if text.count(".") > 1 and " " not in text else text


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of Student's 95 % interval of it; NaN of fewer than two values."""
    if not values:
        return math.nan, math.nan
    if len(values) < 2:
        return values[0], math.nan
    from scipy import stats

    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(stats.t.ppf((1 + _LEVEL) / 2, len(values) - 1)) * spread


COLUMNS = ("runs", "n", "test accuracy", "validation", "ε", "privacy", "rounds", "time")


def rows_of(groups: Sequence[Group]) -> list[list[str]]:
    """The table: one row a group, as `COLUMNS`."""
    rows = []
    for group in groups:
        summaries = [run.summary for run in group.runs]
        rows.append(
            [
                group.label,
                str(len(group.runs)),
                _percent(_known(summaries, "test_accuracy")),
                _percent(_known(summaries, "sim_only_val_accuracy")),
                _largest(_known(summaries, "epsilon_max")),
                ", ".join(sorted({str(s.get("privacy")) for s in summaries})),
                "/".join(sorted({str(s.get("rounds")) for s in summaries})),
                f"{statistics.fmean(_known(summaries, 'seconds') or [math.nan]):.1f} s",
            ]
        )
    return rows


def _known(summaries: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [float(s[name]) for s in summaries if s.get(name) is not None]


def _percent(values: Sequence[float]) -> str:
    mean, half = mean_and_interval(values)
    if math.isnan(mean):
        return "-"
    return f"{100 * mean:.1f} %" if math.isnan(half) else f"{100 * mean:.1f} ± {100 * half:.1f} %"


def _largest(values: Sequence[float]) -> str:
    return "-" if not values else f"{math.ceil(max(values) * 1000 - 1e-9) / 1000:g}"


def curves(groups: Sequence[Group]) -> bytes:
    """PNG: accuracy and ε by round; a line is the mean over seeds, a band their range."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure((9.6, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, column, title in zip(
        axes,
        ("sim_only_val_accuracy", "epsilon_max"),
        ("validation accuracy (simulation only)", "ε spent, largest of all clients"),
        strict=True,
    ):
        for i, group in enumerate(groups):
            found: dict[int, list[float]] = {}
            for run in group.runs:
                for row in run.rounds:
                    if row.get(column) and math.isfinite(float(row[column])):
                        found.setdefault(int(row["round"]) + 1, []).append(float(row[column]))
            x = sorted(found)
            if not x:
                continue
            low, middle, high = (
                np.array([f(found[r]) for r in x]) for f in (min, statistics.fmean, max)
            )
            style = {"color": f"C{i % 10}", "marker": "." if len(x) < 40 else None}
            ax.plot(x, middle, label=group.label, **style)
            ax.fill_between(x, low, high, color=style["color"], alpha=0.2, lw=0)
        ax.set_xlabel("round")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_title(title, fontsize="medium")
        ax.grid(alpha=0.3)
    axes[1].set_ylim(bottom=0)
    handles, labels = axes[0].get_legend_handles_labels()
    if not handles:
        handles, labels = axes[1].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", frameon=False)
    page = io.BytesIO()
    FigureCanvasAgg(figure).print_png(page)
    return page.getvalue()


_STYLE = (
    "body{font-family:sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.3em .8em;border-bottom:1px solid #ccc;"
    "text-align:left}img{max-width:100%}"
)


def page_of(groups: Sequence[Group], picture: bytes) -> str:
    """A self-contained HTML page: table, curves, and which folders a row stands for."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
        for row in rows_of(groups)
    )
    folders = "".join(
        f"<li>{html.escape(group.label)}: "
        f"{html.escape(', '.join(str(run.folder) for run in group.runs))}</li>"
        for group in groups
    )
    image = base64.b64encode(picture).decode()
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Runs compared</title>'
        f"<style>{_STYLE}</style></head><body><h1>Runs compared</h1>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"<p>± is Student's 95 % interval of the mean over seeds.</p>"
        f'<img alt="Accuracy and ε by round" src="data:image/png;base64,{image}">'
        f"<ul>{folders}</ul></body></html>\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="aadp compare", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--out", type=Path, default=None, help="write OUT.html and OUT.png too")
    options = parser.parse_args(arguments)
    speak_any_encoding()
    try:
        groups = grouped([read_run(folder) for folder in options.runs])
        if options.out is not None:
            picture = curves(groups)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.with_suffix(".png").write_bytes(picture)
            page = page_of(groups, picture)
            options.out.with_suffix(".html").write_text(page, encoding="utf-8")
    except (ValueError, OSError) as error:
        say(f"error: {error}", file=sys.stderr)
        return 2
    _show(groups)
    if options.out is not None:
        say(f"{options.out.with_suffix('.html')}, {options.out.with_suffix('.png')}")
    return 0


def _show(groups: Sequence[Group]) -> None:
    from rich.table import Table

    from fl_lightning.output.console import show

    table = Table("", *COLUMNS[1:])
    for i, row in enumerate(rows_of(groups), 1):
        table.add_row(str(i), *row[1:])
    show(table)
    for i, group in enumerate(groups, 1):
        say(f"{i}: {group.label} ({', '.join(str(run.folder) for run in group.runs)})")


if __name__ == "__main__":
    sys.exit(main())
