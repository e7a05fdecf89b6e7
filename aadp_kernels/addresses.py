"""Where every number of noise lies, counters of blocks of words, and how norms are added.

The 128-bit counter of a block is (block, step, client, layer + 2^24 * domain), 32 bits each, so no
two (domain, step, client, layer, block) share a block.

Wide form: a pair of words serves one element: elements 8j .. 8j+7 come from ChaCha block j,
elements 2j, 2j+1 from Philox block j.

Fast form: one word an element. Philox: word e % 4 of block e // 4. ChaCha: with tile = e // 512,
r = e % 512 // 128, t = e % 128 // 4, c = e % 4, word 4r + c of block 32 tile + t, so that 32 GPU
lanes that hold a block each write 128 consecutive elements at a time. Where the word is so small
that its logarithm would show its steps, the word at the same address of the tail domain refines it.

Grid form: the words of an element, or of an attempt, are (0, 1) sign bit, then the zeros before the
next one are H; (2, 3), (4, 5), (6, 7) the digits; Gaussian also (8, 9) and (10, 11). The first word
of a pair is the high one. Laplace: 8 words, ChaCha block j serves elements 2j and 2j + 1, Philox
blocks 2e and 2e + 1 serve element e. Gaussian: 16 words, ChaCha block e serves element e, Philox
blocks 4e .. 4e + 3.
"""

from __future__ import annotations

import math

RNGS = ("philox10", "chacha8", "chacha20")
DOMAINS = {
    "gaussian": 1,
    "laplace": 2,
    "coins": 3,
    "fast_gaussian": 4,
    "fast_laplace": 5,
    "fast_gaussian_tail": 6,
    "fast_laplace_tail": 7,
    "grid_laplace": 8,
    "grid_gaussian": 16,  # 16 .. 143, one for each attempt
    "grid_laplace_tail": 144,  # 144 .. 175
}
LAYER_BITS = 24
CUTOFFS = {
    ("gaussian", "wide"): math.sqrt(2 * 64 * math.log(2)),
    ("laplace", "wide"): 63 * math.log(2),
    ("gaussian", "fast"): math.sqrt(2 * 65 * math.log(2)),
    ("laplace", "fast"): 64 * math.log(2),
    ("gaussian", "grid"): 10.0,
    ("laplace", "grid"): math.inf,
}
FAST_REFINED_BELOW = 1 << 12

# Polynomials of the wide form, by ascending powers: atanh(s) / s in s^2, sin(x) / x and cos in x^2.
ATANH = tuple(2 / (2 * k + 1) for k in range(12))
SINE = tuple((-1.0) ** k / math.factorial(2 * k + 1) for k in range(9))
COSINE = tuple((-1.0) ** k / math.factorial(2 * k) for k in range(9))
SQRT_HALF_BITS = 0x3FE6A09E667F3BCD

# The order of the sums in norms on a CPU, see `aadp_kernels._torch.ordered_sums`: elements of a
# unit of a layer, and running sums.
SUM_UNIT, SUM_LANES = 1 << 16, 32

CHACHA_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)


def signed32(word: int) -> int:
    """The int32 value that has the bits of the unsigned 32-bit `word`."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def words_per_block(rng: str) -> int:
    """32-bit words in one block of the generator: 16 for ChaCha, 4 for Philox."""
    return 16 if rng.startswith("chacha") else 4


def key_words_needed(rng: str) -> int:
    """32-bit key words of the generator: 8 for ChaCha, 2 for Philox."""
    return 8 if rng.startswith("chacha") else 2


def rounds_of(rng: str) -> int:
    """Rounds of the generator."""
    return int(rng.removeprefix("chacha").removeprefix("philox"))
