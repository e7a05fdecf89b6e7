"""Sums of clipped per-record gradients in numba.

Records of a moderate size are added while they are still in the cache that their norms were taken
in: one walk over memory. Large ones take a pass for the norms and a pass for the sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._cpu._jit import jit
from aadp_kernels._cpu.clip import FACTOR, Decisions, decide
from aadp_kernels._cpu.noise_plan import NoisePlan
from aadp_kernels._cpu.privatize import norms
from aadp_kernels._cpu.row_sums import absolute, add_scaled, memory, square
from aadp_kernels._cpu.sum_and_write import add_clipped, write_table
from aadp_kernels._cpu.tensor_table import TensorTable, native, target
from aadp_kernels.certified import ballots, clip_factors
from aadp_kernels.contract import Bounds, ClipStats, Noise, Precision
from aadp_kernels.layout import Layout
from aadp_kernels.threads import run_on_threads

# Elements of a record whose running sums stay in a core's own cache.
MOST = 1 << 18
_UNITS, _SMALLEST_UNIT = 8, 16


@jit
def _sums(address, bytes_each, count, l1, l2):
    """Sums of |x| and of x^2 of what lies at an address, 0 where not wanted."""
    norm1, total = 0.0, 0.0
    if bytes_each == 4:
        single = memory(address, count, np.float32)
        if l1:
            norm1 = absolute(single)
        if l2:
            total = square(single)
    else:
        double = memory(address, count, np.float64)
        if l1:
            norm1 = absolute(double)
        if l2:
            total = square(double)
    return norm1, total


@jit
def clip_records(
    places,
    sizes,
    bytes_each,
    bounds,
    units,
    p,
    l1,
    weights,
    sums,
    decisions,
    each,
    totals,
    begin,
    end,
):
    """Norms, decisions and sums of units of `each` records, record by record.

    `places`, `sizes` (elements a record) and `bytes_each` are [T], tensors in the order of the
    layers, which begin at `bounds` [L + 1]; `units` is 0 .. L; `weights` [B] are 0 for padding.
    `sums` [2, B, L] and `decisions` [B, L] are filled; totals [units, elements] are added to.
    """
    for unit in range(begin, end):
        for row in range(unit * each, min(len(weights), (unit + 1) * each)):
            start = 0
            for layer in range(len(bounds) - 1):
                for k in range(bounds[layer], bounds[layer + 1]):
                    address = places[k] + row * sizes[k] * bytes_each[k]
                    norm1, total = _sums(address, bytes_each[k], sizes[k], l1, p == 2)
                    sums[0, row, layer] += norm1
                    sums[1, row, layer] += total
                decide(sums, units, p, decisions, row, layer)
                factor = decisions.numbers[FACTOR, row, layer] * weights[row]
                for k in range(bounds[layer], bounds[layer + 1]):
                    part = totals[unit, start : start + sizes[k]]
                    start += sizes[k]
                    if factor == 0:
                        continue
                    address = places[k] + row * sizes[k] * bytes_each[k]
                    if bytes_each[k] == 4:
                        add_scaled(part, factor, memory(address, sizes[k], np.float32))
                    else:
                        add_scaled(part, factor, memory(address, sizes[k], np.float64))


def _clip_records(
    per_sample: Sequence[Tensor],
    layout: Layout,
    bounds: Bounds,
    mask: Tensor,
    weights: Tensor,
    sums: Sequence[Tensor],
) -> ClipStats:
    """`clip_sum` in one walk over memory; sums do not depend on the number of threads."""
    (clip, p, votes_at), batch, layers = bounds, len(mask), layout.num_layers
    order, edges = layout.order, np.array(layout.bounds)
    tensors = [native(per_sample[i]) for i in order]
    table = ([t.data_ptr() for t in tensors], [layout.sizes[i] for i in order],
             [t.element_size() for t in tensors])  # fmt: skip
    exact = torch.finfo(torch.float64)
    precision = Precision(*(torch.full((1, layers), n).double() for n in (exact.eps, exact.tiny)))
    spot = None if votes_at is None else votes_at.expand(batch, layers)
    decisions = Decisions.build(layout, precision, clip.expand(batch, layers), spot)
    units = max(1, min(_UNITS, batch // _SMALLEST_UNIT))
    each = -(-batch // units)
    totals, norms = np.zeros((units, sum(layout.sizes))), np.zeros((2, batch, layers))
    seen = p == 1 or votes_at is not None

    def work(begin: int, end: int) -> None:
        clip_records(
            *(np.array(column, np.int64) for column in table), edges, np.arange(layers + 1), p,
            seen, weights.numpy(), norms, decisions, each, totals, begin, end,
        )  # fmt: skip

    run_on_threads(work, units, elements=batch * totals.shape[1])
    whole = torch.from_numpy(totals).sum(0).split([layout.sizes[i] for i in order])
    for i, part in zip(order, whole, strict=True):
        sums[i].add_(part.view_as(sums[i]))
    norm1, votes, clipped, dead = decisions.stats()
    live = mask[:, None]
    return ClipStats(
        norm1 if seen else None, (votes * live).sum(0), (clipped.bool() & live).sum(0),
        (dead.bool() & live).sum(0),
    )  # fmt: skip


def clip_sum(
    per_sample: Sequence[Tensor],
    layout: Layout,
    *,
    bounds: Bounds,
    mask: Tensor,
    weights: Tensor | None,
    sums: Sequence[Tensor] | None,
    quanta: Tensor | None,
) -> tuple[list[Tensor], ClipStats]:
    """`Backend.clip_sum` of float64 sums; plain torch has those of quanta."""
    assert quanta is None
    clip, p, votes_at = bounds
    seen = p == 1 or votes_at is not None
    totals = list(sums or (torch.zeros(s, dtype=torch.float64) for s in layout.shapes))
    if not len(mask):  # whoever adds noise to sums has none
        votes, count = (
            torch.zeros(layout.num_layers, dtype=d) for d in (torch.float64, torch.int64)
        )
        return totals, ClipStats(votes.expand(0, -1) if seen else None, votes, count, count)
    if sum(layout.sizes) <= MOST:
        kept = mask.double() if weights is None else weights * mask
        return totals, _clip_records(per_sample, layout, bounds, mask, kept, totals)
    table = TensorTable.of_layout(layout, [native(t) for t in per_sample], None, totals)
    norm1, norm = norms(table, len(mask), p)
    finite = torch.isfinite(norm)
    live = finite & mask[:, None]
    dims = torch.tensor(layout.dims, dtype=torch.float64)
    factor, clipped = clip_factors(norm, clip, live, dims, torch.float64)
    if weights is not None:
        factor = factor * weights[:, None]
    add_clipped(table, live.numpy(), factor.numpy())
    return totals, ClipStats(
        norm1 if seen else None, ballots(norm1, votes_at, live).sum(0), clipped.sum(0),
        (mask[:, None] & ~finite).sum(0),
    )  # fmt: skip


def clip_sum_noise(
    per_sample: Sequence[Tensor],
    layout: Layout,
    *,
    bounds: Bounds,
    mask: Tensor,
    weights: Tensor | None,
    sums: Sequence[Tensor] | None,
    scale: Tensor,
    noise: Noise | None,
) -> tuple[list[Tensor], ClipStats]:
    """`Backend.clip_sum_noise`."""
    given = {"bounds": bounds, "mask": mask, "weights": weights, "sums": sums}
    totals, stats = clip_sum(per_sample, layout, **given, quanta=None)
    dtypes = [t.dtype for t in per_sample]
    results = [torch.empty(s, dtype=d) for s, d in zip(layout.shapes, dtypes, strict=True)]
    if noise is None:
        return [out.copy_(total) for out, total in zip(results, totals, strict=True)], stats
    targets = [target(t) for t in results]
    one = np.ones((1, layout.num_layers))
    table = TensorTable.of_layout(layout, totals, None, targets)
    plan = NoisePlan.build(noise, scale[None].contiguous().numpy())
    write_table(table, plan, factor=one, dead=np.zeros_like(one, np.int64))
    return [made.to(dtype) for made, dtype in zip(targets, dtypes, strict=True)], stats
