"""The two passes over memory: norms, then clipped values plus noise, each in one compiled call.

Both walk over a table of the tensors of all layers and rows of a call in units of a fixed
size, so that any thread may take any range of units and the result does not change.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from aadp_kernels._cpu._jit import jit, jit_inline, wide_vectors
from aadp_kernels._cpu._parallel import parallel, region_for
from aadp_kernels._cpu.elements import array_at, first_line, load, load_difference
from aadp_kernels._cpu.noise_plan import NoisePlan
from aadp_kernels._cpu.rng import WORDS
from aadp_kernels._cpu.tensor_table import (
    FIRST,
    MINUS,
    MINUS_BYTES,
    OUT,
    OUT_BYTES,
    SIZE,
    VALUE,
    VALUE_BYTES,
    TensorTable,
)
from aadp_kernels._cpu.transform import TILE, fast_tile, wide_tile
from aadp_kernels.addresses import SUM_UNIT
from aadp_kernels.threads import run_on_threads

# In float32 a factor below one is lowered by more than the roundings of itself, of a difference and
# of a product, and a scale is never below its float64 value. Smaller factors would underflow.
LOWER, RAISE, SMALLEST_FACTOR = 1 - 2.0**-22, 1 + 2.0**-23, 2.0**-100

# The working memory of a thread begins at a cache line.
SCRATCH = 6 * 8 * TILE + 64

# To draw the noise of an element takes as long as to add up so many, at least.
NOISE_COST = 8


@jit_inline
def _in_place(out, count, factor, noise, scale):
    """`_combine` where the values are in `out`: LLVM would take two arrays for overlapping."""
    if scale > 0:
        for i in range(count):
            out[i] = out[i] * factor + noise[i] * scale
    else:
        for i in range(count):
            out[i] *= factor


@jit_inline
def _combine(out, count, x, factor, noise, scale, mode):
    """Rounded after each operation and to `out`."""
    if mode == 0:
        for i in range(count):
            out[i] = x[i] * factor
    elif mode == 1:
        for i in range(count):
            out[i] = x[i] * factor + noise[i] * scale
    else:
        for i in range(count):
            out[i] = noise[i] * scale


@jit
def _write_tensor(table, k, row, low, x, minus, dead, dtype, factor, noise, scale):
    """The elements low .. low + 511 of the layer, as far as the tensor has them.

    `x`, `minus` (scratch) and `noise` are addresses of 512 numbers of `dtype`.
    """
    wide_vectors()
    first, size = table[k, FIRST], table[k, SIZE]
    start, stop = max(0, low - first), min(low + TILE - first, size)
    count, bytes_each = stop - start, table[k, OUT_BYTES]
    value = array_at(x, dtype, count)
    drawn = array_at(noise + (first + start - low) * value.itemsize, dtype, count)
    address = table[k, OUT] + (row * size + start) * bytes_each
    same = table[k, VALUE] == table[k, OUT] and table[k, MINUS] == 0 and not dead
    if same and bytes_each == value.itemsize:
        _in_place(array_at(address, dtype, count), count, factor, drawn, scale)
        return
    mode = 1 if scale > 0 else 0
    if table[k, VALUE] == 0:
        mode = 2
    elif dead:
        for i in range(count):
            value[i] = 0
    else:
        load_difference(value, array_at(minus, dtype, count), table, k, row, start, count)
    if bytes_each == 4:
        _combine(array_at(address, np.float32, count), count, value, factor, drawn, scale, mode)
    else:
        _combine(array_at(address, np.float64, count), count, value, factor, drawn, scale, mode)


@jit
def _add_up(address, dtype, count, p, lanes):
    """Into 32 running sums of |x|, for p = 2 then 32 of x^2; count is a multiple of 128."""
    wide_vectors()
    for _ in range(0, count, 128):
        part = array_at(address, dtype, 128)
        address += 128 * part.itemsize
        for j in range(32):
            a, b = np.float64(part[j]), np.float64(part[32 + j])
            c, d = np.float64(part[64 + j]), np.float64(part[96 + j])
            lanes[j] += (abs(a) + abs(b)) + (abs(c) + abs(d))
            if p == 2:
                lanes[32 + j] += (a * a + b * b) + (c * c + d * d)


@jit
def sum_units(table, bounds, units, p, sums, scratch, begin, end):
    """Sums of |x| (and of x^2 for p = 2) of units of a layer: sums [2, K, units].

    In the order of `ordered_sums`: 32 running sums of SUM_UNIT elements, added up in order.
    `scratch` has SCRATCH bytes.
    """
    place = first_line(scratch)
    x, minus = array_at(place, np.float64, TILE), array_at(place + 4096, np.float64, TILE)
    lanes = array_at(place + 8192, np.float64, 64)
    per_row = units[len(units) - 1]
    row, column, layer = begin // per_row, begin % per_row, 0
    for _ in range(begin, end):
        while column >= units[layer + 1]:
            layer += 1
        low = (column - units[layer]) * SUM_UNIT
        for j in range(64):
            lanes[j] = 0.0
        for k in range(bounds[layer], bounds[layer + 1]):
            stop = min(low + SUM_UNIT - table[k, FIRST], table[k, SIZE])
            start = max(0, low - table[k, FIRST])
            if table[k, MINUS] == 0 and table[k, VALUE_BYTES] == 4 and start < stop:
                whole = (stop - start) // 128 * 128
                at = table[k, VALUE] + 4 * (row * table[k, SIZE] + start)
                _add_up(at, np.float32, whole, p, lanes)
                start += whole
            while start < stop:
                count = min(TILE, stop - start)
                load_difference(x, minus, table, k, row, start, count)
                start += count
                while count % 128:
                    x[count] = 0.0
                    count += 1
                _add_up(place, np.float64, count, p, lanes)
        for half in range(p):
            total = 0.0
            for j in range(32):
                total += lanes[32 * half + j]
            sums[half, row, column] = total
        column += 1
        if column == per_row:
            row, column, layer = row + 1, 0, 0


@jit
def add_units(sums, units, totals):
    """Sums [2, K, units] of the layers' units, added in order: totals [2, K, L]."""
    for half, row in np.ndindex(sums.shape[:2]):
        for layer in range(len(units) - 1):
            total = 0.0
            for unit in range(units[layer], units[layer + 1]):
                total += sums[half, row, unit]
            totals[half, row, layer] = total


@jit
def _add_multiple(total, coefficient, x):
    """total += coefficient * x, the product and the sum rounded."""
    wide_vectors()
    for i in range(TILE):
        total[i] += coefficient * x[i]


@jit_inline
def _draw_tile(place, plan, row, layer, tile):
    """Noise of a tile into the scratch memory at `place`: float32 if fast, else float64.

    Noise of earlier steps is drawn into memory of its own and added, one step after another.
    """
    layer_words, rounds, blocks, fast, gaussian = plan.kind
    words, tails = array_at(place, np.uint32, WORDS), array_at(place + 4096, np.uint32, WORDS)
    rows = array_at(place + 8192, np.float64, TILE // 2)
    drawn, drawn32 = (
        array_at(place + 12288, np.float64, TILE),
        array_at(place + 16384, np.float32, TILE),
    )
    again, again32 = (
        array_at(place + 20480, np.float64, TILE),
        array_at(place + 20480, np.float32, TILE),
    )
    for term in range(len(plan.states)):
        state = plan.states[term]
        state[2] = np.uint32(plan.clients[row])
        state[3] = np.uint32(layer_words[layer])
        if fast:
            target32 = again32 if term else drawn32
            fast_tile(target32, words, tails, state, rounds, blocks, tile, gaussian)
            if term:
                _add_multiple(drawn32, np.float32(plan.coefficients[term]), again32)
        else:
            target = again if term else drawn
            wide_tile(target, words, rows, state, rounds, blocks, tile, gaussian)
            if term:
                _add_multiple(drawn, plan.coefficients[term], again)


@jit
def write_units(table, cuts, dead, factor, plan, scratch, begin, end):
    """out = factor * (value - reference) + scale * noise, in units of a tile of a layer.

    Unit u of a layer holds its elements 512 (skip + u) .. 512 (skip + u) + 511. Arithmetic is
    float64; in the fast form it is float32 where all tensors are. Without a value: scale * noise.
    Where `dead`, the value counts as zero; a scale of zero draws nothing. `scratch` has
    SCRATCH bytes.
    """
    bounds, units, skip = cuts.bounds, cuts.tiles, cuts.skip
    # The counters in the states are a thread's own.
    plan = NoisePlan(plan.scale, plan.clients, plan.states.copy(), plan.coefficients, plan.kind)
    scale, fast = plan.scale, plan.kind.fast
    x = first_line(scratch)
    minus, noise, noise32 = x + 4096, x + 12288, x + 16384
    drawn, drawn32 = array_at(noise, np.float64, TILE), array_at(noise32, np.float32, TILE)
    per_row = units[len(units) - 1]
    row, column, layer = begin // per_row, begin % per_row, 0
    nearest = bounds[0]
    for _ in range(begin, end):
        while column >= units[layer + 1]:
            layer += 1
            nearest = bounds[layer]
        tile = skip[layer] + column - units[layer]
        low, stop = tile * TILE, bounds[layer + 1]
        zero, weight, size = dead[row, layer], factor[row, layer], scale[row, layer]
        if size > 0:
            _draw_tile(x, plan, row, layer, tile)
        converted = not fast
        while nearest < stop and table[nearest, FIRST] + table[nearest, SIZE] <= low:
            nearest += 1
        for k in range(nearest, stop):
            if table[k, FIRST] >= low + TILE:
                break
            widest = max(table[k, VALUE_BYTES], table[k, MINUS_BYTES], table[k, OUT_BYTES])
            if fast and widest == 4 and weight >= SMALLEST_FACTOR:
                lowered = np.float32(weight * LOWER if weight < 1 else weight)
                raised = np.float32(size * RAISE)
                _write_tensor(
                    table, k, row, low, x, minus, zero, np.float32, lowered, noise32, raised
                )
                continue
            if not converted:
                converted = True
                for i in range(TILE):
                    drawn[i] = drawn32[i]
            _write_tensor(table, k, row, low, x, minus, zero, np.float64, weight, noise, size)
        column += 1
        if column == per_row:
            row, column, layer = row + 1, 0, 0
            nearest = bounds[0]


@jit
def sum_part(table, bounds, units, p, sums, begin, end):
    """`sum_units` with memory of its own."""
    # The array, not its address: numba frees an array after the last line that names it.
    sum_units(table, bounds, units, p, sums, np.empty(SCRATCH, np.uint8), begin, end)


@jit
def _sum_parallel(table, bounds, units, p, sums, threads, region):
    parallel(sum_part, (table, bounds, units, p, sums), sums[0].size, threads, region)


@jit
def write_part(table, cuts, dead, factor, plan, begin, end):
    """`write_units` with memory of its own."""
    write_units(table, cuts, dead, factor, plan, np.empty(SCRATCH, np.uint8), begin, end)


@jit
def _write_parallel(table, cuts, dead, factor, plan, count, threads, region):
    parallel(write_part, (table, cuts, dead, factor, plan), count, threads, region)


@jit
def add_records(table, bounds, units, live, factor, scratch, begin, end):
    """Add factor * record, where `live`, to the float64 outputs, in units of a tile of a layer.

    Rows are records; live and factor are [B, L]. Records are added in order.
    """
    layer = 0
    for unit in range(begin, end):
        while unit >= units[layer + 1]:
            layer += 1
        low = (unit - units[layer]) * TILE
        for k in range(bounds[layer], bounds[layer + 1]):
            first, size = table[k, FIRST], table[k, SIZE]
            start, stop = max(0, low - first), min(low + TILE - first, size)
            if start >= stop:
                continue
            count, bytes_each = stop - start, table[k, VALUE_BYTES]
            x = array_at(first_line(scratch), np.float64, count)
            total = array_at(table[k, OUT] + 8 * start, np.float64, count)
            for row in range(len(live)):
                if live[row, layer]:
                    load(x, table[k, VALUE], bytes_each, row * size + start, count)
                    weight = factor[row, layer]
                    for i in range(count):
                        total[i] += x[i] * weight


def unit_sums(table: TensorTable, rows: int, p: int) -> np.ndarray:
    """Sums of |x| (and of x^2 for p = 2) of the chunks of every row: float64 [2, K, chunks]."""
    bounds, units = table.cuts.bounds, table.cuts.chunks
    sums, elements = np.zeros((2, rows, int(units[-1]))), rows * table.cuts.elements
    given = (table.entries, bounds, units, p, sums)
    threads, region = region_for(elements)
    if region:
        _sum_parallel(*given, threads, region)
    else:
        run_on_threads(partial(sum_part, *given), sums[0].size, elements=elements)
    return sums


def layer_sums(table: TensorTable, rows: int, p: int) -> np.ndarray:
    """Sums of |x| (and of x^2 for p = 2) of the layers of every row: float64 [2, K, L]."""
    totals = np.empty((2, rows, len(table.cuts.ends)))
    add_units(unit_sums(table, rows, p), table.cuts.chunks, totals)
    return totals


def add_clipped(table: TensorTable, live: np.ndarray, factor: np.ndarray) -> None:
    """Add the clipped records to the float64 outputs of `table`; live and factor are [B, L]."""
    bounds, units = table.cuts.bounds, table.cuts.tiles

    def work(begin: int, end: int) -> None:
        scratch = np.empty(SCRATCH, np.uint8)
        add_records(table.entries, bounds, units, live, factor, scratch, begin, end)

    run_on_threads(work, int(units[-1]), elements=len(live) * table.cuts.elements)


def write_table(table: TensorTable, plan: NoisePlan, factor: np.ndarray, dead: np.ndarray) -> None:
    """Write all tensors: factor * (value - reference) + scale * noise, or scale * noise.

    `factor` and `dead` (int64, the value counts as zero where it is 1) are [K, L].
    """
    given = (table.entries, table.cuts, dead, factor, plan)
    units = len(plan.clients) * int(table.cuts.tiles[-1])
    threads, region = region_for(NOISE_COST * units * TILE)
    if region:
        _write_parallel(*given, units, threads, region)
    else:
        run_on_threads(partial(write_part, *given), units, elements=units * TILE)
