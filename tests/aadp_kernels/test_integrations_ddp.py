"""Two gloo processes with sharded gradients give the bits of one process."""

from __future__ import annotations

import multiprocessing
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist

from aadp_kernels import Layout, NoiseKey, poisson_mask, privatize_
from aadp_kernels.integrations.ddp import (
    add_shard_noise_,
    gather_shards,
    reduce_shards,
    shard_range,
    share_key,
)

# Odd sizes: shards end inside a block of words, and one tensor is smaller than the group.
SHAPES = [(31, 17), (17,), (5, 3, 3), (1,)]
LAYERS = [0, 0, 1, 2]
SCALE = torch.tensor([0.5, 2.0, 0.0])


def layout() -> Layout:
    return Layout.build([torch.zeros(s) for s in SHAPES], LAYERS)


def gradients(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(s, generator=generator) for s in SHAPES]


def one_process(sums: list[torch.Tensor], mechanism: str) -> list[torch.Tensor]:
    whole = [t.clone() for t in sums]
    privatize_(
        whole, layout=layout(), clip=torch.full((3,), torch.inf), scale=SCALE, p=1,
        mechanism=mechanism, key=NoiseKey.from_seed(7), step=5,
    )  # fmt: skip
    return whole


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_shards_together_are_the_whole(mechanism: str, world_size: int) -> None:
    sums = gradients(0)
    parts: list[list[torch.Tensor]] = []
    for rank in range(world_size):
        ranges = [shard_range(t.numel(), rank=rank, world_size=world_size) for t in sums]
        shards = [t.flatten()[a:b].clone() for t, (a, b) in zip(sums, ranges, strict=True)]
        add_shard_noise_(
            shards, layout=layout(), rank=rank, world_size=world_size, scale=SCALE,
            mechanism=mechanism, key=NoiseKey.from_seed(7), step=5,
        )  # fmt: skip
        parts.append(shards)
    for i, whole in enumerate(one_process(sums, mechanism)):
        assert torch.equal(torch.cat([p[i] for p in parts]), whole.flatten())
    assert torch.equal(parts[0][3], sums[3])


@pytest.mark.parametrize(("size", "world_size"), [(10, 3), (1, 4), (0, 2), (12, 4)])
def test_ranges_cover_everything_once(size: int, world_size: int) -> None:
    ranges = [shard_range(size, rank=r, world_size=world_size) for r in range(world_size)]
    assert [i for a, b in ranges for i in range(a, b)] == list(range(size))
    with pytest.raises(ValueError, match="rank"):
        shard_range(size, rank=world_size, world_size=world_size)


def test_shards_of_another_length_are_refused() -> None:
    shards = [torch.zeros(3) for _ in SHAPES]
    for bad in (shards, shards[:2]):
        with pytest.raises(ValueError, match="shards"):
            add_shard_noise_(
                bad, layout=layout(), rank=0, world_size=2, scale=SCALE, mechanism="laplace",
                key=NoiseKey.from_seed(0), step=0,
            )  # fmt: skip


def _process(rank: int, port: int, results: Any) -> None:
    """One of two processes: reduce, noise the shard, gather; report as plain lists."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        shared = share_key()
        coins = poisson_mask(64, 0.5, key=shared, step=0).tolist()
        shards = reduce_shards(gradients(rank), layout())
        sizes = [shard.numel() for shard in shards]
        add_shard_noise_(
            shards, layout=layout(), rank=rank, world_size=2, scale=SCALE, mechanism="gaussian",
            key=NoiseKey.from_seed(7), step=5,
        )  # fmt: skip
        whole = gather_shards(shards, layout())
        results.put((rank, [t.tolist() for t in whole], sizes, coins, shared.simulated))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_bits_of_one() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_process, args=(r, port, results)) for r in range(2)]
    for process in processes:
        process.start()
    answers = sorted(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    sums = [a + b for a, b in zip(gradients(0), gradients(1), strict=True)]
    wanted = [t.tolist() for t in one_process(sums, "gaussian")]
    assert answers[0][1] == answers[1][1] == wanted
    assert answers[0][2] == [264, 9, 23, 1]
    assert answers[1][2] == [263, 8, 22, 0]
    assert answers[0][3] == answers[1][3]
    assert not answers[0][4]
