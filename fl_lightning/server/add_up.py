"""A round of several processes put together: the sum of what they released, and what they learned.

One all-reduce: weighted sums of released updates and, in rows that are zero elsewhere, the
histories and public figures of the clients that each process trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fl_lightning.local.rows import columns
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.processes.together import Processes
from fl_lightning.server.aggregate import WeightedMean
from fl_lightning.values.round import LayerPolicy, Params, PrivateUpdate

_POLICY = ("clip_norm", "shares", "contribution", "noise_scale")


def check_agreement(processes: Processes, state: list[Tensor]) -> None:
    """Compare sums of the model and of the histories between the processes.

    Raises:
        RuntimeError: they differ; the processes would train other models.
    """
    if processes.size == 1:
        return
    sums = [float(value.double().sum()) for value in state]
    if len(set(processes.together(lambda: repr(sums)))) > 1:
        raise RuntimeError(
            f"the {processes.size} processes hold different models or histories; go on from the "
            "last checkpoint by --ckpt_path last"
        )


def add_up(
    processes: Processes,
    mean: WeightedMean,
    history: ReleasedHistory | None,
    released: list[PrivateUpdate],
    *,
    cohort: Tensor,
    trained: Tensor,
    params: Params,
) -> list[PrivateUpdate]:
    """Sum `mean` over the processes, in place, and share what follows from their releases.

    Args:
        processes: those of the run.
        mean: the weighted sums of this process.
        history: released history; the rows of a client become those of the process that trained
            it. None without privacy.
        released: updates of this process.
        cohort: clients of the round [m], the same in every process.
        trained: those of them that were this process's.
        params: global model, for the shapes of a process that released nothing.

    Returns:
        One update without tensors that stands for all that all processes released.
    """
    place = {client: i for i, client in enumerate(cohort.tolist())}
    known = {} if history is None else history.rows(cohort)
    mine = torch.zeros(len(cohort), dtype=torch.bool)
    mine[[place[k] for k in trained.tolist()]] = True
    rows = [v.masked_fill(~columns(mine, v), 0) for v in known.values()]
    totals = [mean.total.get(name, torch.zeros_like(params[name])) for name in mean.layout.names]
    figures = _figures(released, place, mean.layout.num_layers)
    summed = processes.sum([*totals, mean.weight, mean.variance, *rows, *figures])
    mean.total = dict(zip(mean.layout.names, summed, strict=False))
    mean.weight, mean.variance = summed[len(totals) : len(totals) + 2]
    if history is not None:
        whole = summed[len(totals) + 2 : len(totals) + 2 + len(rows)]
        history.restore(cohort, dict(zip(known, whole, strict=True)))
    taken, nonfinite, table = summed[-3:]
    there = taken > 0
    *policy, clipped = table[:, there]
    return [
        PrivateUpdate(
            clients=cohort[there],
            update={},
            events=[],
            steps=max((u.steps for u in released), default=0),
            policy=None if history is None else LayerPolicy(*policy),
            sim_only={"clipped_fraction": clipped, "nonfinite": nonfinite[there]},
        )
    ]


def _figures(
    released: list[PrivateUpdate], place: dict[int, int], num_layers: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Who released [m], non-finite units [m], and policies with clipped fractions [5, m, L]."""
    taken, nonfinite = torch.zeros(len(place)), torch.zeros(len(place))
    table = torch.zeros(len(_POLICY) + 1, len(place), num_layers, dtype=torch.float64)
    for update in released:
        at = [place[k] for k in update.clients.tolist()]
        taken[at] = 1
        found = update.sim_only["nonfinite"].float()  # one number a client, or one a layer
        nonfinite[at] = found.flatten(1).sum(1) if found.ndim > 1 else found
        if update.policy is not None:
            figures = [getattr(update.policy, name) for name in _POLICY]
            figures.append(update.sim_only["clipped_fraction"])
            table[:, at] = torch.stack([figure.double() for figure in figures])
    return taken, nonfinite, table
