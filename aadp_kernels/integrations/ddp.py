"""Several processes: every process draws the noise of its own shard, as one process would."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from aadp_kernels import _validate, _validate_tensors
from aadp_kernels.layout import Layout
from aadp_kernels.noise import sample_noise
from aadp_kernels.noise_key import NoiseKey
from aadp_kernels.privatize import check_tensors, per_layer

# torch 2.13 has new names and warns about the old ones.
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def shard_range(size: int, *, rank: int, world_size: int) -> tuple[int, int]:
    """The elements [start, stop) of a flattened tensor that belong to a rank: equal pieces.

    The piece is ceil(size / world_size), as in FSDP; the last ranks may have less or nothing.
    """
    _validate.integer_below("rank", rank, world_size)
    piece = -(-size // world_size)
    return min(size, rank * piece), min(size, (rank + 1) * piece)


@torch.no_grad()
def add_shard_noise_(
    shards: Sequence[Tensor],
    *,
    layout: Layout,
    rank: int,
    world_size: int,
    scale: Tensor,
    mechanism: str,
    key: NoiseKey,
    step: int,
    client: int = 0,
    impl: str = "auto",
) -> None:
    """Add to the shards of summed gradients the noise that the whole tensors would get, in place.

    Args:
        shards: One 1-D floating tensor for each tensor of the layout: the elements
            `shard_range(size, rank=rank, world_size=world_size)` of the flattened *sum over all
            processes*. Private.
        layout: Layout of the whole tensors.
        rank: Rank of this process in the group.
        world_size: Processes in the group.
        scale: Noise scales [L], public, >= 0 and finite.
        mechanism: "gaussian" or "laplace".
        key: Secret key, the same in all processes (`share_key`).
        step: Step of the release, the same in all processes.
        client: Client id.
        impl: As for `sample_noise`.

    Raises:
        ValueError: A shard of another length, a range.

    Guarantees:
        The shards put together have the bits of one process that calls `privatize_` without a
        clip on the whole sum. No two processes draw the same element, so the noise goes in once
        and not once for each process.

    Edge cases:
        An empty shard draws nothing. Scale 0 changes no bit.
    """
    if len(shards) != len(layout.names):
        raise ValueError(f"shards must be {len(layout.names)} tensors, got {len(shards)}")
    _validate_tensors.floating("shards", shards)
    ranges = [shard_range(size, rank=rank, world_size=world_size) for size in layout.sizes]
    for name, (start, stop), shard in zip(layout.names, ranges, shards, strict=True):
        if tuple(shard.shape) != (stop - start,):
            raise ValueError(
                f"shards: {name} must have shape [{stop - start}], got {tuple(shard.shape)}"
            )
    scales = per_layer("scale", scale, layout, (), torch.device("cpu"), finite=True).tolist()
    for i, (shard, (start, _)) in enumerate(zip(shards, ranges, strict=True)):
        layer = layout.layer_of[i]
        if shard.numel() == 0 or scales[layer] == 0:
            continue
        noise = sample_noise(
            tuple(shard.shape), mechanism=mechanism, scale=scales[layer], key=key, step=step,
            client=client, layer=layer, offset=layout.offsets[i] + start, dtype=torch.float64,
            device=shard.device, impl=impl,
        )  # fmt: skip
        shard.copy_(shard.to(torch.float64) + noise)


@torch.no_grad()
def reduce_shards(
    tensors: Sequence[Tensor], layout: Layout, *, group: dist.ProcessGroup | None = None
) -> list[Tensor]:
    """Add the tensors of all processes up; every process gets its shard of the sums, 1-D.

    Args:
        tensors: Clipped sums of this process, of the layout's shapes. Private.
        layout: Their layout.
        group: Process group; None: all processes.

    Returns:
        One 1-D tensor a tensor: the elements `shard_range(...)` of the flattened sum.
    """
    check_tensors("tensors", tensors, layout, ())
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    shards = []
    for tensor, size in zip(tensors, layout.sizes, strict=True):
        piece = -(-size // world_size)
        padded = torch.nn.functional.pad(tensor.reshape(-1), (0, piece * world_size - size))
        shard = padded.new_empty(piece)
        _REDUCE_SCATTER(shard, padded, group=group)
        start, stop = shard_range(size, rank=rank, world_size=world_size)
        shards.append(shard[: stop - start])
    return shards


@torch.no_grad()
def gather_shards(
    shards: Sequence[Tensor], layout: Layout, *, group: dist.ProcessGroup | None = None
) -> list[Tensor]:
    """The whole tensors from the shards of all processes, the inverse of cutting them."""
    world_size = dist.get_world_size(group)
    tensors = []
    for shard, size, shape in zip(shards, layout.sizes, layout.shapes, strict=True):
        piece = -(-size // world_size)
        padded = torch.nn.functional.pad(shard, (0, piece - shard.numel()))
        whole = padded.new_empty(piece * world_size)
        _ALL_GATHER(whole, padded.contiguous(), group=group)
        tensors.append(whole[:size].view(shape))
    return tensors


def share_key(rng: str = "chacha20", *, group: dist.ProcessGroup | None = None) -> NoiseKey:
    """A new key that rank 0 draws from the operating system and sends to all processes.

    The secret travels over the group's connections, which are not encrypted: use a network that
    may see the gradients as well.
    """
    secret: list[bytes | None] = [None]
    if dist.get_rank(group) == 0:
        secret = [secrets.token_bytes(32)]
    dist.broadcast_object_list(secret, group=group, group_src=0)
    assert secret[0] is not None
    return NoiseKey.from_bytes(secret[0], rng)
