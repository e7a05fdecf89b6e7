"""Clients of a round as tables and distributions, for loggers that can show them.

What was released, or follows from releases and public rules alone, is `released/`; what only a
simulation may look at is `sim_only/`. Without a guarantee clip norms follow raw norms, so there
everything is `sim_only/`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fl_lightning.privacy.simulated import simulated_because
from fl_lightning.values.release import ALL_CLIENTS

MOST_ROWS = 1000
# Floating-point numbers between two values that a histogram's bins can lie between.
_BINS = 1024
Table = tuple[list[str], list[list[Any]]]


def epsilon_name(privacy: Any) -> str:
    """How ε is called: nothing that is simulated or unproven is plain `epsilon`."""
    kind = "epsilon" if privacy.guarantee else "nominal_epsilon"
    return kind if simulated_because(privacy) is None else f"simulated_{kind}"


def _columns(pl_module: Any) -> dict[str, np.ndarray]:
    """Figures of each client of the round and layer [m, L], by name."""
    result, rows = pl_module.result, pl_module.result.cohort
    known = "released" if pl_module.privacy.guarantee else "sim_only"
    # A sum has one history, that of the whole cohort.
    norms = pl_module.run.history.l1_norm.numpy()[np.where(rows == ALL_CLIENTS, 0, rows)]
    return {
        f"{known}/clip_norm": result.clip_norm,
        f"{known}/share": result.shares,
        f"{known}/noise_scale": result.noise_scale,
        f"{known}/l1_norm": norms,
        "sim_only/clipped_fraction": result.clipped_fraction,
    }


def client_tables(pl_module: Any) -> dict[str, Table]:
    """Tables `released/clients` and `sim_only/clients` of the last round: (columns, rows).

    Args:
        pl_module: a private FederatedModule after a round.

    Edge cases:
        The clients of a sum are one row, `all`; ε is the largest of theirs. At most `MOST_ROWS`
        rows. Nobody took part: no rows.
    """
    result, layers = pl_module.result, pl_module.layout.layer_names
    cohort, spent = result.cohort[:MOST_ROWS].tolist(), result.epsilon_spent
    public: list[list[Any]] = [
        ["all", float(spent.max())] if k == ALL_CLIENTS else [k, float(spent[k])] for k in cohort
    ]
    tables: dict[str, Table] = {}
    for kind in ("released", "sim_only"):
        begin = ["client", epsilon_name(pl_module.privacy)] if kind == "released" else ["client"]
        columns, rows = list(begin), [row[: len(begin)] for row in public]
        for name, values in _columns(pl_module).items():
            if name.startswith(kind):
                columns += [f"{name.partition('/')[2]}/{layer}" for layer in layers]
                for row, numbers in zip(rows, values, strict=False):
                    row += [float(number) for number in numbers]
        tables[f"{kind}/clients"] = columns, rows
    return tables


def client_distributions(pl_module: Any) -> dict[str, np.ndarray]:
    """Finite values over the clients of the last round, and ε over all clients, by name.

    Values that differ in their last bits alone are given as equal: no histogram has bins for them.

    Args:
        pl_module: a private FederatedModule after a round.
    """
    spent = np.asarray(pl_module.result.epsilon_spent)
    found = {f"privacy/{epsilon_name(pl_module.privacy)}": spent}
    for name, values in _columns(pl_module).items():
        for layer, column in zip(pl_module.layout.layer_names, values.T, strict=False):
            found[f"{name}/{layer}"] = column
    finite = {name: values[np.isfinite(values)] for name, values in found.items()}
    return {f"{name}/by_client": _told_apart(v) for name, v in finite.items() if len(v)}


def _told_apart(values: np.ndarray) -> np.ndarray:
    """The values, or the first of them for all where fewer than `_BINS` lie between them."""
    values = np.asarray(values, dtype=np.float64)
    steps = np.ptp(values) / np.spacing(np.abs(values).max())
    return values if steps == 0 or steps > _BINS else np.full_like(values, values[0])
