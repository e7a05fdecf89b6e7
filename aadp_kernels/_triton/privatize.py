"""`privatize_` in Triton: the tables of a launch, and the launch."""

# Triton's constexpr arguments, ranges and launch options have no types that fit.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false, reportAssignmentType=false

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from aadp_kernels._triton import noise as _noise
from aadp_kernels._triton import plan as _plan
from aadp_kernels._triton._device import (
    key_tensor,
    launch,
    per_stream,
    sm_count,
    step_tensor,
    to_device,
)
from aadp_kernels._triton.grid import threshold_tensor
from aadp_kernels._triton.privatize_kernel import privatize_kernel
from aadp_kernels.addresses import rounds_of
from aadp_kernels.certified import by_rows, coarsest
from aadp_kernels.contract import Bounds, ClipStats, Noise
from aadp_kernels.layout import Layout

_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}

WARPS = 4
_PROGRAMS_PER_SM = 8
_ADDRESS_LISTS = 16

# Elements of a tile by form and whether the generator is ChaCha: small, so that many programs have
# room for their registers, but a block of ChaCha a thread in the fast form.
TILES = {
    ("fast", False): 1024, ("fast", True): 2048, ("wide", False): 512, ("wide", True): 1024,
    ("grid", False): 256, ("grid", True): 256,
}  # fmt: skip

# Registers of a thread, by form and whether the generator is ChaCha: without a limit the assembler
# spills to fit another program beside the others. What a build uses counts: up to 128 leave room
# for four programs, up to 168 for three.
REGISTERS = {
    ("fast", False): 128, ("fast", True): 144, ("wide", False): 136, ("wide", True): 184,
    ("grid", False): 128, ("grid", True): 168,
}  # fmt: skip


def tile_size(form: str, secure: bool, itemsize: int) -> int:
    """Elements of a tile, so that a thread of the forms wide and fast has 128 bits at least."""
    least = 0 if form == "grid" else 32 * WARPS * 16 // itemsize
    return max(TILES[form, secure], least)


def _direct(tensors: Sequence[Tensor]) -> bool:
    """Whether a kernel can address the tensors: contiguous, of one dtype that it has."""
    return all(t.is_contiguous() and t.dtype == tensors[0].dtype for t in tensors) and (
        tensors[0].dtype in _DTYPES
    )


def _addresses(plan_cache: dict, lists: tuple[Sequence[Tensor], ...], device: torch.device):
    """int64 [lists, T] addresses on the device; a list that comes again is not copied again."""
    name = tuple(t.data_ptr() for tensors in lists for t in tensors)
    known = plan_cache.get(name)
    if known is None:
        if len(plan_cache) >= _ADDRESS_LISTS:
            plan_cache.pop(next(iter(plan_cache)))
        table = np.array(name, dtype=np.int64)
        known = plan_cache[name] = to_device(table, device)
    return known


def _row_major(value: Tensor) -> Tensor:
    """[K, L] whose rows are contiguous, their distance being anything."""
    return value if value.stride(1) == 1 else value.contiguous()


@per_stream(64)
def _layer_table(
    dims: tuple[int, ...], dtypes: tuple[torch.dtype, ...], error: float, device: torch.device
) -> Tensor:
    """float64 [L, 5] of `clip_factors`: 1 + error of the norm; 1 + eps and what underflow can
    add, of the dtype and of float64.
    """
    rows = []
    for count, dtype in zip(dims, dtypes, strict=True):
        row = [1 + ((count + 16) * 2.0**-52 + error)]
        for info in (torch.finfo(dtype), torch.finfo(torch.float64)):
            row += [1 + info.eps, count * info.smallest_normal * info.eps]
        rows.append(row)
    return to_device(np.array(rows, dtype=np.float64), device)


@by_rows
def privatize(
    tensors: Sequence[Tensor],
    out: Sequence[Tensor],
    layout: Layout,
    *,
    bounds: Bounds,
    scale: Tensor,
    noise: Noise | None,
    reference: Sequence[Tensor] | None,
) -> ClipStats:
    """`Backend.privatize` of K updates; bounds and scale are [K, L].

    Tensors of mixed dtypes or with gaps are copied, as float64.
    """
    eps_of = tuple(coarsest([out[i].dtype for i in members]) for members in layout.members)
    values = _addressable(tensors)
    given = None if reference is None else _addressable(reference)
    targets = [t.detach() for t in out]
    if not _direct(targets):
        targets = [torch.empty(t.shape, dtype=torch.float64, device=t.device) for t in out]
    stats = _launch(values, targets, given, layout, eps_of, bounds, scale, noise)
    for source, target, place in zip(targets, [t.detach() for t in out], out, strict=True):
        if source.data_ptr() != target.data_ptr():
            target.copy_(source)
        elif not place.is_inference():
            torch.autograd.graph.increment_version(place)
    return stats


def _addressable(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, or float64 copies where a kernel cannot address them."""
    values = [t.detach() for t in tensors]
    if _direct(values):
        return values
    return [t.to(torch.float64, memory_format=torch.contiguous_format) for t in values]


def _launch(
    tensors: list[Tensor],
    out: list[Tensor],
    reference: list[Tensor] | None,
    layout: Layout,
    eps_of: tuple[torch.dtype, ...],
    bounds: Bounds,
    scale: Tensor,
    noise: Noise | None,
) -> ClipStats:
    """Launch over contiguous tensors of one dtype each."""
    (clip, p, votes_at), rows, device = bounds, len(scale), tensors[0].device
    form = "wide" if noise is None else noise.form
    lists = (tensors, out) if reference is None else (tensors, out, reference)
    dtypes = [group[0].dtype for group in lists]
    itemsize = min(dtype.itemsize for dtype in dtypes)
    wide = form != "fast" or torch.float64 in dtypes
    rng = "philox10" if noise is None else noise.rng
    secure = rng.startswith("chacha")
    tile = tile_size(form, secure, itemsize)
    aligned = tuple(
        all(t.data_ptr() % 16 == 0 for t in group) for group in zip(*lists, strict=True)
    )
    tables = _plan.plan(layout, rows, tile=tile, itemsize=itemsize, aligned=aligned, device=device)
    width = 16 // itemsize
    units, slots = rows * layout.num_layers, len(tables.chunks)
    error = 0.0 if wide or p == 2 else width * 2.0**-24
    layers = _layer_table(layout.dims, eps_of, error, device)
    # Offsets are multiples of 16 bytes, or every number of units would compile a kernel of its own.
    flags = 8 + -(-units // 4) * 4
    integers = torch.zeros(flags + 2 * units, dtype=torch.int32, device=device)
    partials = torch.empty(2 * slots, dtype=torch.float64, device=device)
    stats = ClipStats(
        *(torch.empty((rows, layout.num_layers), dtype=torch.float64, device=device) for _ in "ab"),
        *(torch.empty((rows, layout.num_layers), dtype=torch.int64, device=device) for _ in "ab"),
    )
    if rows == 0:
        return stats
    clip, scale = _row_major(clip), _row_major(scale)
    votes_at = None if votes_at is None else _row_major(votes_at)
    step = step_tensor(0 if noise is None else noise.step, device)
    words = (0, 0) if noise is None else tuple(noise.key_words)
    clients = torch.zeros(rows, dtype=torch.int64, device=device)
    if noise is not None:
        clients = noise.clients.contiguous()
    programs = min(len(tables.tickets), sm_count(device) * _PROGRAMS_PER_SM)
    launch(
        privatize_kernel, (programs,), device, tables.tickets, len(tables.tickets), integers,
        tables.chunks, tables.units, layers, _addresses(tables.addresses, lists, device),
        integers[8:], integers[flags:].view(torch.int64), partials, clip, clip.stride(0), scale,
        scale.stride(0), votes_at, 0 if votes_at is None else votes_at.stride(0), step, clients,
        key_tensor(words, device), *stats, layout.num_layers, len(tensors), slots,
        threshold_tensor(device) if form == "grid" else None,
        X=_DTYPES[dtypes[0]], OUT=_DTYPES[dtypes[1]],
        REFERENCE=None if reference is None else _DTYPES[dtypes[2]],
        DTYPE=tl.float64 if wide else tl.float32, P=p, NOISY=noise is not None, TILE=tile,
        WIDTH=width, GAUSSIAN=noise is not None and noise.mechanism == "gaussian", FORM=form,
        CHACHA=secure, ROUNDS=rounds_of(rng),
        BLOCKS=_noise.blocks_per_row(form, secure, itemsize), PARTS=_noise.parts(form, secure),
        LANES=32 * WARPS, num_warps=WARPS, enable_fp_fusion=form == "fast",
        maxnreg=REGISTERS[form, secure],
    )  # fmt: skip
    return stats
