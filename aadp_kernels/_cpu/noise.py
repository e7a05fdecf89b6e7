"""Noise and coins in numba: the wide form has the specification's bits, the fast one is close."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._cpu._jit import jit
from aadp_kernels._cpu.noise_plan import NoisePlan
from aadp_kernels._cpu.rng import LANES, WORDS, Generator, fill_words
from aadp_kernels._cpu.sum_and_write import write_table
from aadp_kernels._cpu.tensor_table import LayerCuts, TensorTable
from aadp_kernels._cpu.transform import TILE
from aadp_kernels.addresses import DOMAINS, LAYER_BITS
from aadp_kernels.contract import Noise, Segment
from aadp_kernels.threads import run_on_threads

_COINS = WORDS // 2


@jit
def flip_coins(out, limit, always, clients, state, rounds, blocks, begin, end):
    """Tiles begin .. end - 1 of the rows of `out`, bool [K, n]; two words a coin."""
    words = np.empty(WORDS, np.uint32)
    state = state.copy()
    n = out.shape[1]
    per_row = -(-n // _COINS)
    for unit in range(begin, end):
        row, tile = unit // per_row, unit % per_row
        state[0], state[2] = np.uint32(tile * blocks), np.uint32(clients[row])
        fill_words(words, state, rounds, blocks)
        for i in range(min(_COINS, n - tile * _COINS)):
            if blocks == LANES:
                w = i % 8 * 2 * LANES + i // 8
            else:
                w = i // 64 * 4 * LANES + i % 2 * 2 * LANES + i % 64 // 2
            high = np.uint64(words[w]) & np.uint64(0x7FFFFFFF)
            bits = (high << np.uint64(32)) | np.uint64(words[w + LANES])
            out[row, tile * _COINS + i] = always[row] or bits < limit[row]


def scaled_noise(
    noise: Noise, segment: Segment, scale: float | Tensor, dtype: torch.dtype
) -> Tensor:
    """`Backend.scaled_noise` of the wide or fast form."""
    if isinstance(scale, Tensor):
        return (scaled_noise(noise, segment, 1.0, torch.float64) * scale).to(dtype)
    (layer, first, count), rows = segment, len(noise.clients)
    out = torch.empty((rows, count), dtype=dtype if dtype == torch.float64 else torch.float32)
    if out.numel() == 0:
        return out.to(dtype)
    row = [first, count, 0, 0, 0, 0, out.data_ptr(), out.element_size()]
    one = np.ones((rows, 1))
    cuts = LayerCuts.build([0, 1], [first + count], first // TILE)
    table = TensorTable(np.array([row]), cuts, [out])
    plan = NoisePlan.build(noise, one * scale, layer)
    write_table(table, plan, factor=one, dead=np.zeros_like(one, np.int64))
    return out.to(dtype)


def coins(noise: Noise, n: int, rates: Sequence[float]) -> Tensor:
    """`HostBackend.coins`."""
    rows = len(noise.clients)
    out = torch.empty((rows, n), dtype=torch.bool)
    if out.numel() == 0:
        return out
    array, ids = out.numpy(), noise.clients.numpy()
    whole = 1 << 63
    limits = [min(round(Fraction(rate) * whole), whole - 1) for rate in rates]
    limit, always = np.array(limits, dtype=np.uint64), np.array([rate >= 1 for rate in rates])
    generator = Generator.build(noise.rng, noise.key_words, int(noise.step))
    generator.state[3] = DOMAINS["coins"] << LAYER_BITS

    def work(begin: int, end: int) -> None:
        flip_coins(array, limit, always, ids, *generator, begin, end)

    run_on_threads(work, rows * -(-n // _COINS), elements=out.numel())
    return out
