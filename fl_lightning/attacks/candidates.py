"""The records of which an attacker asks whether they were used."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fl_lightning.data import FederatedDataModule


@dataclass(frozen=True)
class Candidates:
    """Records of one distribution, some of which were trained on. Private.

    Args:
        x, y: records [n, ...] and labels [n, ...], members first.
        member: whether each was trained on, bool [n].
        client: who holds it, or is asked about it, int64 [n].
    """

    x: Tensor
    y: Tensor
    member: npt.NDArray[np.bool_]
    client: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.x)


def candidates_of(data: FederatedDataModule, *, seed: int) -> Candidates:
    """All training records, and as many held-out ones as there are, at most as many.

    Args:
        data: of the run. Validation records come before test records.
        seed: deals the held-out ones over the clients, in the proportions of the training records.

    Raises:
        ValueError: the data has fewer than two held-out records.
    """
    held = [batch for loader in _held_out(data) for batch in loader]
    x = torch.cat([data.x[:0], *(b[0] for b in held)])[: len(data.x)]
    y = torch.cat([data.y[:0], *(b[1] for b in held)])[: len(data.x)]
    if len(x) < 2:
        raise ValueError(
            f"data: {data.dataset_name} has {len(x)} validation and test records, so there is "
            "nobody to tell members from; 2 are needed"
        )
    holder = np.empty(len(data.x), dtype=np.int64)
    for client in range(data.num_clients):
        holder[data.partition.client(client)] = client
    asked = np.random.default_rng([seed, 0]).permutation(holder)[: len(x)]
    member = np.arange(len(data.x) + len(x)) < len(data.x)
    return Candidates(
        torch.cat([data.x, x]), torch.cat([data.y, y]), member, np.concatenate([holder, asked])
    )


def _held_out(data: FederatedDataModule) -> list:
    val = data.val_dataloader()
    test = [data.test_dataloader()] if data.has_test else []
    return [*([] if isinstance(val, list) else [val]), *test]
