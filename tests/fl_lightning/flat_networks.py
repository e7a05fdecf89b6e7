"""A network and its records for tests of one norm over all layers."""

from __future__ import annotations

import torch
from torch import nn

from aadp_kernels import Layout
from fl_lightning.local.batches import Batch
from fl_lightning.models import MLP
from fl_lightning.module import cross_entropy


def make_network() -> MLP:
    torch.manual_seed(0)
    return MLP(in_features=8, hidden=(30, 40), num_classes=3)


def flat_layout(network: nn.Module) -> Layout:
    tensors = dict(network.named_parameters())
    return Layout.build(tensors, dict.fromkeys(tensors, "all"))


def some_batch(clients: int = 2, records: int = 7) -> Batch:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(clients, records, 8, generator=generator)
    y = torch.randint(0, 3, (clients, records), generator=generator)
    mask = torch.ones(clients, records)
    mask[0, -2:] = 0
    ones = torch.ones(clients)
    return Batch(x, y, mask, ones, ones.bool())


def parameters(network: nn.Module) -> dict:
    return {n: p.detach() for n, p in network.named_parameters()}


def records_of(network: nn.Module, batch: Batch, client: int) -> list[dict]:
    """Each real record's gradient, one backward pass each."""
    rows = []
    for x, y, real in zip(batch.x[client], batch.y[client], batch.mask[client], strict=True):
        network.zero_grad()
        cross_entropy(network(x[None]), y[None]).sum().backward()
        if real:
            rows.append({n: p.grad.double().clone() for n, p in network.named_parameters()})
    return rows


def by_layer(record: dict, layout: Layout, p: int) -> torch.Tensor:
    return torch.stack([
        torch.cat([record[n].flatten() for n, at in zip(layout.names, layout.layer_of, strict=True)
                   if at == layer]).norm(p)
        for layer in range(layout.num_layers)
    ])  # fmt: skip
