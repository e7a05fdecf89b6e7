"""Known answers of the generators."""

import pytest
import torch

from aadp_kernels._torch.rng import chacha, philox
from aadp_kernels.addresses import signed32

RFC8439_KEY = [int.from_bytes(bytes(range(4 * i, 4 * i + 4)), "little") for i in range(8)]


def column(*words: int) -> torch.Tensor:
    return torch.tensor([[signed32(w)] for w in words], dtype=torch.int32)


def unsigned(words: torch.Tensor) -> list[int]:
    return [w & 0xFFFFFFFF for w in words[:, 0].tolist()]


def test_chacha20_rfc8439_block():
    words = chacha(RFC8439_KEY, column(1, 0x09000000, 0x4A000000, 0), rounds=20)
    expected = (
        "e4e7f110 15593bd1 1fdd0f50 c47120a3 c7f4d1c7 0368c033 9aaa2204 4e6cd4c3 "
        "466482d2 09aa9f07 05d7c214 a2028bd9 d19c12b5 b94e16de e883d0cb 4e3c50a2"
    )
    assert unsigned(words) == [int(w, 16) for w in expected.split()]


def python_chacha(key: list[int], counter: list[int], rounds: int) -> list[int]:
    state = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574, *key, *counter]
    x = list(state)

    def rotate(value: int, bits: int) -> int:
        return ((value << bits) | (value >> (32 - bits))) & 0xFFFFFFFF

    def quarter(a: int, b: int, c: int, d: int) -> None:
        for first, second, third, bits in (
            (a, b, d, 16),
            (c, d, b, 12),
            (a, b, d, 8),
            (c, d, b, 7),
        ):
            x[first] = (x[first] + x[second]) & 0xFFFFFFFF
            x[third] = rotate(x[third] ^ x[first], bits)

    for _ in range(rounds // 2):
        for i in range(4):
            quarter(i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            quarter(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return [(a + b) & 0xFFFFFFFF for a, b in zip(x, state, strict=True)]


@pytest.mark.parametrize("rounds", [8, 20])
def test_chacha_equals_scalar_code_in_every_column(rounds):
    generator = torch.Generator().manual_seed(rounds)
    key = torch.randint(0, 1 << 32, (8,), generator=generator).tolist()
    counters = torch.randint(0, 1 << 32, (4, 37), generator=generator)
    words = chacha(key, counters.to(torch.int32), rounds=rounds)
    for j in range(37):
        expected = python_chacha(key, counters[:, j].tolist(), rounds)
        assert unsigned(words[:, j : j + 1]) == expected


# Random123's kat_vectors: rounds, counter, key, result.
PHILOX = [
    (10, "00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


@pytest.mark.parametrize(("rounds", "counter", "key", "expected"), PHILOX)
def test_philox_random123(rounds, counter, key, expected):
    counter, key, expected = ([int(w, 16) for w in s.split()] for s in (counter, key, expected))
    assert unsigned(philox(key, column(*counter), rounds=rounds)) == expected
