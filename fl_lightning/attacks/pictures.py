"""Pictures of what attacks found, as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fl_lightning.attacks import intervals

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]
# Okabe and Ito's colours, which stay apart for colour-blind readers.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def roc_panels(
    panels: Mapping[str, Mapping[str, tuple[Array, Array]]],
    ceilings: Mapping[str, tuple[Array, Array, Array] | None],
    *,
    least_rate: float = 1e-3,
    columns: int = 4,
) -> Figure:
    """Right against false alarms on logarithmic axes, a panel a case.

    Args:
        panels: by case and attack, scores of members and of others.
        ceilings: by case, false positive rates and the largest true positive rates for "used or
            nothing" and for "this record or another"; None where nothing is proven.
        least_rate: left end of the axes.
        columns: panels in a row, at most.
    """
    across, down = min(columns, len(panels)), -(-len(panels) // columns)
    figure = _figure(across * 3.4, down * 4.0)
    axes = figure.subplots(down, across, squeeze=False, sharey=True)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    names = list(dict.fromkeys(name for attacks in panels.values() for name in attacks))
    for ax, (case, attacks) in zip(axes.flat, panels.items(), strict=False):
        ceiling = ceilings.get(case)
        if ceiling is not None:
            rates, once, swapped = ceiling
            ax.fill_between(rates, once, 1, color="0.88", lw=0)
            ax.plot(rates, once, color="black", lw=1.4, label="ceiling of the proof")
            ax.plot(rates, swapped, ":", color="black", lw=1, label="the same of a swap")
        for name, (members, others) in attacks.items():
            false, true = intervals.curve(members, others)
            ax.step(
                np.clip(false, least_rate, 1),
                np.clip(true, least_rate, 1),
                where="post",
                color=_COLOURS[names.index(name) % len(_COLOURS)],
                label=name,
                lw=1.2,
            )
        ax.plot([least_rate, 1], [least_rate, 1], "--", color="0.6", lw=0.8, label="guessing")
        ax.set(xscale="log", yscale="log", xlim=(least_rate, 1), ylim=(least_rate, 1.05))
        ax.set_title(case, fontsize="medium")
        ax.set_xlabel("false alarms")
        ax.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("right alarms")
    known = {}
    for ax in axes.flat:
        known |= {
            label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def gallery(
    rows: Mapping[str, Sequence[Array]], columns: Sequence[str], *, title: str = ""
) -> Figure:
    """Images in rows with a name, grey or in colours.

    Args:
        rows: by name, images [H, W] or [H, W, 3] in [0, 1], as many as `columns`.
        columns: what stands above each image.
        title: of the whole.
    """
    figure = _figure(1.1 * len(columns) + 1.8, 1.15 * len(rows) + 0.5)
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for ax, image in zip(line, images, strict=True):
            ax.imshow(np.clip(image, 0, 1), cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize="small")
    for ax, words in zip(axes[0], columns, strict=True):
        ax.set_title(words, fontsize="small")
    if title:
        figure.suptitle(title, fontsize="medium")
    return figure


def png(figure: Figure, *, dpi: int = 110) -> bytes:
    """The figure's file, the same bytes for the same figure."""
    page = io.BytesIO()
    figure.savefig(page, format="png", dpi=dpi, metadata={"Software": None})
    return page.getvalue()


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
