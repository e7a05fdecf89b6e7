"""`privatize_` in Triton: the tables of a launch, and the launch."""

# Triton's constexpr arguments, ranges and launch options have no types that fit.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false, reportAssignmentType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from aadp_kernels._seen import Checked
from aadp_kernels._triton import launch_plan
from aadp_kernels._triton import noise as _noise
from aadp_kernels._triton._device import (
    key_tensor,
    launch,
    per_stream,
    sm_count,
    source_tensors,
    stream_name,
    to_device,
    warp_size,
)
from aadp_kernels._triton.grid import threshold_tensor
from aadp_kernels._triton.privatize_kernel import privatize_kernel
from aadp_kernels.addresses import rounds_of
from aadp_kernels.certified import coarsest
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
_data_ptr = torch._C.TensorBase.data_ptr  # without a look at what overrides it
_CALLS = 16  # that a layout remembers

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
    ("fast", False): 128, ("fast", True): 144, ("wide", False): 168, ("wide", True): 184,
    ("grid", False): 128, ("grid", True): 168,
}  # fmt: skip
# Where noise of several steps is added up. As many programs have room as without.
REGISTERS_AGAIN = REGISTERS | {("fast", True): 168}


def tile_size(form: str, secure: bool, itemsize: int) -> int:
    """Elements of a tile, so that a thread of the forms wide and fast has 128 bits at least."""
    least = 0 if form == "grid" else 32 * WARPS * 16 // itemsize
    return max(TILES[form, secure], least)


def _direct(tensors: Sequence[Tensor]) -> bool:
    """Whether a kernel can address the tensors: contiguous, as they are, of one dtype it has."""
    dtype = tensors[0].dtype
    return dtype in _DTYPES and all(
        t.dtype == dtype and t.is_contiguous() and not t.is_neg() for t in tensors
    )


def _row_major(value: Tensor) -> tuple[Tensor, int]:
    """[K, L], or [L] of one row, with contiguous rows, and the distance of its rows."""
    if value.stride(-1) != 1:
        value = value.contiguous()
    return value, value.stride(0) if value.dim() == 2 else 0


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
    """`Backend.privatize`.

    Tensors of mixed dtypes or with gaps are copied, as float64.
    """
    lists = [tensors] if out is tensors else [tensors, out]
    if reference is not None:
        lists.append(reference)
    kind = LaunchKind.of(bounds, noise, in_place=out is tensors, minus=reference is not None)
    call = _known_call(lists, layout, kind, tensors[0].device)
    if call is None:
        values, given, targets = _addressable(tensors), None, [t.detach() for t in out]
        if reference is not None:
            given = _addressable(reference)
        if not _direct(targets):
            targets = [torch.empty(t.shape, dtype=torch.float64, device=t.device) for t in out]
        dtypes = tuple(coarsest([out[i].dtype for i in members]) for members in layout.members)
        stats = _launch(_call(values, targets, given, layout, dtypes, kind), bounds, scale, noise)
        for source, target in zip(targets, out, strict=True):
            if source.data_ptr() != target.data_ptr():
                target.detach().copy_(source)
            elif not target.is_inference():
                torch.autograd.graph.increment_version(target)
        return stats
    stats = _launch(call, bounds, scale, noise)
    torch.autograd.graph.increment_version(out)
    return stats


class LaunchKind(NamedTuple):
    """Options of a call that decide which tables and constants its launch has; no values.

    Attributes:
        lead: () of one update, (K,) of a cohort.
        p: Norm of the clipping.
        draw: (generator, mechanism, form), or None without noise.
        in_place: Whether results go over the tensors.
        minus: Whether there is a reference.
    """

    lead: tuple[int, ...]
    p: int
    draw: tuple[str, str, str] | None
    in_place: bool
    minus: bool

    @classmethod
    def of(cls, bounds: Bounds, noise: Noise | None, *, in_place: bool, minus: bool) -> LaunchKind:
        draw = None if noise is None else (noise.rng, noise.mechanism, noise.form)
        return cls(tuple(bounds.clip.shape[:-1]), bounds.p, draw, in_place, minus)

    @property
    def form(self) -> str:
        return "wide" if self.draw is None else self.draw[2]

    @property
    def rng(self) -> str:
        return "philox10" if self.draw is None else self.draw[0]


@dataclass(frozen=True, eq=False)
class PreparedCall:
    """The part of a launch that stays the same while tensors stay where they are in memory.

    It holds no tensor of a user.

    Attributes:
        guards: Checks that each list of tensors has passed; empty for a call that is not kept.
        tables: The plan of the launch.
        layers: float64 [L, 5], the table that `_layer_table` makes.
        addresses: int64 [lists, T], of the tensors.
        kind: Options that it was made for.
        num_layers, num_tensors: Of the layout.
        num_tickets, num_chunks: Of the plan.
        programs: Of the grid.
        constants: Of the kernel, and options of the launch.
    """

    guards: tuple[Any, ...]
    tables: launch_plan.LaunchPlan
    layers: Tensor
    addresses: Tensor
    kind: LaunchKind
    num_layers: int
    num_tensors: int
    num_tickets: int
    num_chunks: int
    programs: int
    constants: dict[str, Any]


def _known_call(
    lists: list[Sequence[Tensor]], layout: Layout, kind: LaunchKind, device: torch.device
) -> PreparedCall | None:
    """The call over these places of memory, which the layout remembers; None if it must be copied.

    An address that was freed may come again under other tensors: a call is taken only if all have
    passed the guards that those of the call had passed.
    """
    if not all(type(tensors) is Checked for tensors in lists):
        return None
    stream = stream_name(device)
    if stream is None:
        return None
    name = (stream, kind, _addresses(lists))
    guards = tuple(tensors.guard for tensors in lists)
    calls: dict[tuple, PreparedCall] = vars(layout).setdefault("_triton_calls", {})
    found = calls.get(name)
    if found is not None and found.guards == guards:
        return found
    out = lists[0 if kind.in_place else 1]
    if not all(map(_direct, lists)) or any(t.is_inference() for t in out):
        return None
    reference = lists[-1] if kind.minus else None
    dtypes = tuple(coarsest([out[i].dtype for i in members]) for members in layout.members)
    made = _call(lists[0], out, reference, layout, dtypes, kind)
    made = calls[name] = replace(made, guards=guards)
    for oldest in list(calls)[:-_CALLS]:
        calls.pop(oldest, None)
    return made


def _addresses(lists: Sequence[Sequence[Tensor]]) -> tuple[int, ...]:
    """Where all tensors lie."""
    every = lists[0] if len(lists) == 1 else chain.from_iterable(lists)
    return tuple(map(_data_ptr, every))


def _addressable(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, or float64 copies where a kernel cannot address them."""
    values = [t.detach() for t in tensors]
    if _direct(values):
        return values
    return [
        t.resolve_neg().to(torch.float64, memory_format=torch.contiguous_format) for t in values
    ]


def _call(
    tensors: Sequence[Tensor],
    out: Sequence[Tensor],
    reference: Sequence[Tensor] | None,
    layout: Layout,
    eps_of: tuple[torch.dtype, ...],
    kind: LaunchKind,
) -> PreparedCall:
    """Tables and constants for contiguous tensors of one dtype each."""
    lists = (tensors, out) if reference is None else (tensors, out, reference)
    rows, device = kind.lead[0] if kind.lead else 1, tensors[0].device
    form, secure = kind.form, kind.rng.startswith("chacha")
    dtypes = [group[0].dtype for group in lists]
    itemsize = min(dtype.itemsize for dtype in dtypes)
    wide = form != "fast" or torch.float64 in dtypes
    tile, width = tile_size(form, secure, itemsize), 16 // itemsize
    pointers = np.array(_addresses(lists), dtype=np.int64).reshape(len(lists), -1)
    aligned = tuple((pointers % 16 == 0).all(0).tolist())
    tables = launch_plan.plan_launch(
        layout, rows, tile=tile, itemsize=itemsize, aligned=aligned, device=device
    )
    error = 0.0 if wide or kind.p == 2 else width * 2.0**-24
    constants = {
        "X": _DTYPES[dtypes[0]], "OUT": _DTYPES[dtypes[1]],
        "REFERENCE": None if reference is None else _DTYPES[dtypes[2]],
        "DTYPE": tl.float64 if wide else tl.float32, "P": kind.p, "NOISY": kind.draw is not None,
        "TILE": tile, "WIDTH": width,
        "GAUSSIAN": kind.draw is not None and kind.draw[1] == "gaussian", "FORM": form,
        "CHACHA": secure, "ROUNDS": rounds_of(kind.rng),
        "BLOCKS": _noise.blocks_per_row(form, secure, itemsize),
        "PARTS": _noise.parts(form, secure), "LANES": warp_size(device) * WARPS, "num_warps": WARPS,
        "enable_fp_fusion": form == "fast", "maxnreg": REGISTERS[form, secure],
    }  # fmt: skip
    return PreparedCall(
        (), tables, _layer_table(layout.dims, eps_of, error, device), to_device(pointers, device),
        kind, layout.num_layers, len(tensors), len(tables.tickets), len(tables.chunks),
        min(len(tables.tickets), sm_count(device) * _PROGRAMS_PER_SM), constants,
    )  # fmt: skip


def _launch(call: PreparedCall, bounds: Bounds, scale: Tensor, noise: Noise | None) -> ClipStats:
    """Launch a call with its values; statistics are new every time."""
    (clip, _, votes_at), kind, tables = bounds, call.kind, call.tables
    device, shape = call.addresses.device, (*kind.lead, call.num_layers)
    rows = kind.lead[0] if kind.lead else 1
    norms = torch.empty(shape, dtype=torch.float64, device=device)
    counts = torch.empty(shape, dtype=torch.int64, device=device)
    stats = ClipStats(norms, torch.empty_like(norms), counts, torch.empty_like(counts))
    if rows == 0:
        return stats
    try:
        scratch = tables.free.pop()
    except IndexError:
        scratch = launch_plan.Scratch.new(rows * call.num_layers, call.num_chunks, device)
    scratch.counters.zero_()
    (clip, clip_stride), (scale, scale_stride) = _row_major(clip), _row_major(scale)
    votes_stride = 0
    if votes_at is not None:
        votes_at, votes_stride = _row_major(votes_at)
    if noise is None:
        step, key = scratch.step.zero_(), key_tensor((0, 0), device)
        coefficients, bands = None, None
        clients = torch.zeros(rows, dtype=torch.int64, device=device)
    else:
        step, key, coefficients, bands = source_tensors(noise, device, scratch.step)
        clients = noise.clients.contiguous()
    constants = call.constants
    if bands is not None:
        limit = REGISTERS_AGAIN[kind.form, constants["CHACHA"]]
        constants = constants | {"maxnreg": limit}
    launch(
        privatize_kernel, (call.programs,), device, tables.tickets, call.num_tickets,
        scratch.counters, tables.chunks, tables.units, call.layers, call.addresses, scratch.done,
        scratch.published, scratch.partials, clip, clip_stride, scale, scale_stride, votes_at,
        votes_stride, step, clients, key, *stats, call.num_layers, call.num_tensors,
        call.num_chunks, threshold_tensor(device) if kind.form == "grid" else None, coefficients,
        bands, **constants,
    )  # fmt: skip
    tables.free.append(scratch)
    return stats
