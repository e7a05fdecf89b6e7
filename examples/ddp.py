"""DP-SGD over several processes: `torchrun --nproc_per_node 2 examples/ddp.py` (CPU, gloo).

Every process clips and sums its own records; the sums are added up and cut into shards, every
process draws the noise of its shard. The result has the bits of one process that had all records
in the same sums, and does not depend on the number of processes. Run alone it is one process.
"""

from __future__ import annotations

import os

import dp_accounting as dp
import torch
import torch.distributed as dist
import torch.nn.functional as F
from dp_accounting import rdp
from torch import nn

from aadp_kernels import Layout, poisson_mask, with_clipping
from aadp_kernels.integrations.ddp import (
    add_shard_noise_,
    gather_shards,
    reduce_shards,
    share_key,
)
from aadp_kernels.integrations.optim import set_clip_norms
from aadp_kernels.integrations.release import equal_scales, layer_clips

RECORDS, RATE, STEPS, NOISE_MULTIPLIER, DELTA = 2000, 0.1, 40, 1.5, 1e-5


def main() -> None:
    """Train a small network on synthetic records that are divided over the processes."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29511")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    x = torch.randn(RECORDS, 10)
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = with_clipping(nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 2)), p=2)
    parameters = dict(model.named_parameters())
    layout = Layout.build(parameters)
    clips = layer_clips(1.0, layout, p=2)
    scales = equal_scales(
        clips, mechanism="gaussian", noise_multiplier=NOISE_MULTIPLIER, adjacency="zero_out"
    )
    set_clip_norms(model, layout, clips)
    optimizer = torch.optim.SGD(model.parameters(), lr=4.0)

    # One key for all: the coins of a record and the noise of an element are drawn by one process.
    key = share_key()
    mine = slice(rank, RECORDS, world_size)
    for step in range(STEPS):
        rows = poisson_mask(RECORDS, RATE, key=key, step=step)[mine].nonzero().flatten()
        optimizer.zero_grad()
        F.cross_entropy(model(x[mine][rows]), y[mine][rows], reduction="sum").backward()
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters.values()]
        shards = reduce_shards(grads, layout)
        add_shard_noise_(
            shards, layout=layout, rank=rank, world_size=world_size, scale=scales,
            mechanism="gaussian", key=key, step=step,
        )  # fmt: skip
        released = gather_shards(shards, layout)
        for parameter, grad in zip(parameters.values(), released, strict=True):
            parameter.grad = grad / (RATE * RECORDS)
        optimizer.step()

    with torch.no_grad():
        accuracy = (model(x).argmax(1) == y).double().mean().item()
    if rank == 0:
        event = dp.PoissonSampledDpEvent(RATE, dp.GaussianDpEvent(NOISE_MULTIPLIER))
        accountant = rdp.RdpAccountant(range(2, 64))
        accountant.compose(dp.SelfComposedDpEvent(event, STEPS))
        print(f"{world_size} processes, training accuracy {accuracy:.3f} after {STEPS} steps")
        print(f"epsilon {accountant.get_epsilon(DELTA):.2f} at delta {DELTA:g}, unit record,")
        print("adjacency zero_out, secret Poisson coins, real arithmetic; assumed: the processes")
        print("trust each other, the key stays secret, only the weights are published")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
