"""Integer noise on the grid in numba: exactly the integers of `_torch.grid`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._cpu._jit import jit, jit_inline
from aadp_kernels._cpu._threads import spread
from aadp_kernels._cpu.rng import LANES, WORDS, Generator, fill_words
from aadp_kernels._cpu.transform import log
from aadp_kernels._torch import grid as _torch
from aadp_kernels._torch.grid import ATTEMPTS, DIGIT_BITS, OCTAVE_BITS
from aadp_kernels._torch.noise import DOMAINS, LAYER_BITS, Segment
from aadp_kernels._torch.privatize import Noise

UNKNOWN = -(1 << 63)  # the first 63 bits of an element are zero: the specification draws it

_LN2 = _torch._LN2
_U64 = np.uint64


@cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Thresholds uint64 [3, 1023], and how many of them are at most v 2^54: int64 [3, 1024]."""
    tables = np.array(_torch.thresholds(), dtype=np.uint64)
    begins = np.arange(1 << DIGIT_BITS, dtype=np.uint64) << np.uint64(64 - DIGIT_BITS)
    guides = [np.searchsorted(table, begins, side="right") for table in tables]
    return tables, np.array(guides, dtype=np.int64)


@jit_inline
def _number(words, blocks, need, e, i):
    """64 bits of the words i and i + 1 of the e-th element of a tile, the first word high."""
    if blocks == LANES:
        w = (need * e % 16 + i) * LANES + need * e // 16
    else:
        block = (need * e + i) // 4
        w = (block // LANES * 4 + i % 4) * LANES + block % LANES
    return (_U64(words[w]) << _U64(32)) | _U64(words[w + LANES])


@jit_inline
def _zeros(number):
    """Zeros before the first one of 64 bits."""
    count = 0
    while count < 64 and (number >> _U64(63 - count)) & _U64(1) == _U64(0):
        count += 1
    return count


@jit
def _proposal(words, blocks, need, e, tables, guides):
    """Sign bit, octaves H (63 where there may be more) and remainder R."""
    first = _number(words, blocks, need, e, 0)
    octaves = min(63, _zeros(first << _U64(1)))
    remainder = 0
    for j in range(3):
        number = _number(words, blocks, need, e, 2 * j + 2)
        digit = guides[j, np.int64(number >> _U64(64 - DIGIT_BITS))]
        while digit < tables.shape[1] and tables[j, digit] <= number:
            digit += 1
        remainder = (remainder << DIGIT_BITS) + digit
    return np.int64(first >> _U64(63)), octaves, remainder


@jit
def _accepts(words, blocks, e, magnitude):
    """Whether -ln U > (g - ln 2)^2 / 2 for g = magnitude / T."""
    x = np.float64(magnitude) * 2.0**-OCTAVE_BITS - _LN2
    x = x * x * 0.5
    fraction = np.int64(_number(words, blocks, 16, e, 10) >> _U64(11))
    mantissa = (np.float64(fraction) + 0.5) * 2.0**-54 + 0.5
    zeros = np.float64(_zeros(_number(words, blocks, 16, e, 8)))
    return zeros * _LN2 - log(mantissa) > x


@jit
def integer_units(
    out, clients, start, word, state, rounds, blocks, gaussian, tables, guides, begin, end
):
    """Tiles of the rows of `out`, int64 [K, n], whose column 0 is element `start`; `state` changes.

    A tile has 512 words: 64 elements (laplace) or 32 (gaussian).
    """
    words = np.empty(WORDS, np.uint32)
    need = 16 if gaussian else 8
    per_tile = WORDS // need
    first = start // per_tile
    per_row = -(-(start + out.shape[1]) // per_tile) - first
    done = np.empty(per_tile, np.bool_)
    for unit in range(begin, end):
        row, tile = unit // per_row, first + unit % per_row
        low = tile * per_tile - start
        head, stop = max(0, -low), min(per_tile, out.shape[1] - low)
        state[0], state[2] = np.uint32(tile * blocks), np.uint32(clients[row])
        state[3] = np.uint32(word)
        if not gaussian:
            fill_words(words, state, rounds, blocks)
            for e in range(head, stop):
                sign, octaves, remainder = _proposal(words, blocks, 8, e, tables, guides)
                magnitude = (octaves << OCTAVE_BITS) + remainder
                value = -1 - magnitude if sign else magnitude
                out[row, low + e] = UNKNOWN if octaves == 63 else value
            continue
        done[:] = False
        waiting = stop - head
        for attempt in range(ATTEMPTS):
            if waiting == 0:
                break
            state[3] = np.uint32(word + (attempt << LAYER_BITS))
            fill_words(words, state, rounds, blocks)
            for e in range(head, stop):
                if done[e]:
                    continue
                sign, octaves, remainder = _proposal(words, blocks, 16, e, tables, guides)
                magnitude = (octaves << OCTAVE_BITS) + remainder
                if _accepts(words, blocks, e, magnitude) and not (sign and magnitude == 0):
                    out[row, low + e] = -magnitude if sign else magnitude
                    done[e] = True
                    waiting -= 1


def integer_noise(
    rng: str,
    key_words: Sequence[int],
    segments: Sequence[Segment],
    clients: Tensor,
    *,
    step: int | Tensor,
    mechanism: str,
) -> list[Tensor]:
    """`_torch.grid.integer_noise`: int64 [K, count] for every (layer, offset, count)."""
    tables, guides = _tables()
    gaussian = mechanism == "gaussian"
    per_tile = WORDS // (16 if gaussian else 8)
    generator, results = Generator.build(rng, key_words, int(step)), []
    for layer, start, count in segments:
        out = torch.zeros((len(clients), count), dtype=torch.int64)
        results.append(out)
        if out.numel() == 0:
            continue
        word = layer + (DOMAINS[f"grid_{mechanism}"] << LAYER_BITS)
        array, ids = out.numpy(), clients.numpy()

        def work(begin: int, end: int, array=array, ids=ids, start=start, word=word) -> None:
            integer_units(
                array, ids, start, word, generator.state.copy(), generator.rounds,
                generator.blocks, gaussian, tables, guides, begin, end,
            )  # fmt: skip

        per_row = -(-(start + count) // per_tile) - start // per_tile
        spread(work, len(clients) * per_row, elements=8 * out.numel())
        draw_unknown(out, rng, key_words, (layer, start, count), clients, int(step), mechanism)
    return results


class GridNoise(Noise):
    """Noise of a release whose integers are drawn here."""

    __slots__ = ()

    def integers(self, segments: Sequence[Segment]) -> list[Tensor]:
        """Noise in quanta of the segments."""
        return integer_noise(
            self.rng, self.key_words, segments, self.clients, step=self.step,
            mechanism=self.mechanism,
        )  # fmt: skip


def draw_unknown(
    out: Tensor,
    rng: str,
    key_words: Sequence[int],
    segment: Segment,
    clients: Tensor,
    step: int,
    mechanism: str,
) -> None:
    """Draw by the specification, in place, what needs more than its own words."""
    if int(out.min()) != UNKNOWN:
        return
    for row, column in (out == UNKNOWN).nonzero().tolist():
        place = (segment[0], segment[1] + column, 1)
        (value,) = _torch.integer_noise(
            rng, key_words, [place], clients[row : row + 1], step=step, mechanism=mechanism
        )
        out[row, column] = value[0, 0]


def scaled_noise(
    rng: str,
    key_words: Sequence[int],
    segment: Segment,
    clients: Tensor,
    *,
    step: int | Tensor,
    mechanism: str,
    form: str,
    scale: float | Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`_torch.grid.scaled_noise`: noise of a scale in `dtype`, or quanta with int64: [K, count]."""
    (noise,) = integer_noise(rng, key_words, [segment], clients, step=step, mechanism=mechanism)
    if dtype == torch.int64:
        return noise
    size = _torch.quantum(torch.as_tensor(scale, dtype=torch.float64), mechanism)
    return ((noise.to(torch.float64) + _torch.OFFSETS[mechanism]) * size).to(dtype)
