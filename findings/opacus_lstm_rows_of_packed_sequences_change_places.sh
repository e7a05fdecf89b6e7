#!/usr/bin/env bash
# opacus 1.6.0: DPLSTM on packed sequences: its per-sample gradients stand in the order of the
# lengths, those of the layer behind it in the order of the samples, without an error.
#
# Packages:  opacus==1.6.0, torch==2.13.0 (CPU)
# Input:     GradSampleModule around DPLSTM and a Linear on its last state, called with
#            pack_padded_sequence(..., enforce_sorted=False): samples of lengths 1, 2, 4, 5.
# Expected:  row i of every grad_sample belongs to sample i, as with lengths 5, 4, 2, 1.
# Seen:      the Linear's row i belongs to sample i, the LSTM's to the sample with the i-th longest
#            sequence: with these lengths the rows of the LSTM are those of samples 3, 2, 1, 0.
# Why here:  flat clipping takes one norm over a sample's rows of all layers. It would put the LSTM's
#            gradient of one sample and the head's of another under one factor: no sample's joint
#            gradient has the norm that is charged for. Our adapter refuses such a batch, since a
#            sample's gradient among others is not that of the sample alone.
#
# Exits 0 while opacus behaves so, 1 once it does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 opacus==1.6.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from opacus.grad_sample import GradSampleModule
from opacus.layers import DPLSTM
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence


class Last(nn.Module):
    """A linear layer on the last hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = DPLSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.lstm(packed)[1][0][-1])


def per_sample(model: nn.Module, x: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """grad_sample of every parameter, flattened, [samples, elements]."""
    model.zero_grad(set_to_none=True)
    model(x, lengths).square().sum().backward()
    return {n: p.grad_sample.detach().flatten(1).clone() for n, p in model.named_parameters()}


def owners(lengths: Tensor) -> dict[str, list[int]]:
    """For each part, the sample that every row of its per-sample gradients belongs to."""
    torch.manual_seed(0)
    x = torch.randn(len(lengths), 5, 3)
    model = GradSampleModule(Last(), batch_first=True, loss_reduction="sum")
    together = per_sample(model, x, lengths)
    alone = [per_sample(model, x[i : i + 1], lengths[i : i + 1]) for i in range(len(lengths))]
    found: dict[str, set[tuple[int, ...]]] = {}
    for name, rows in together.items():
        single = torch.cat([a[name] for a in alone])
        if single.unique(dim=0).shape[0] < len(lengths):
            continue  # equal for two samples: says nothing
        part = "head" if "head" in name else "lstm"
        found.setdefault(part, set()).add(tuple(torch.cdist(rows, single).argmin(1).tolist()))
        assert float(torch.cdist(rows, single).min(1).values.max()) < 1e-5
    return {part: list(*rows) for part, rows in found.items()}


sorted_lengths, other = owners(torch.tensor([5, 4, 2, 1])), owners(torch.tensor([1, 2, 4, 5]))
print("lengths 5, 4, 2, 1:", sorted_lengths)
print("lengths 1, 2, 4, 5:", other)
right = {"lstm": [0, 1, 2, 3], "head": [0, 1, 2, 3]}
sys.exit(not (sorted_lengths == right and other == right | {"lstm": [3, 2, 1, 0]}))
PYTHON
