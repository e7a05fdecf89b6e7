"""Known answers of the generators in the kernels' words, and equality with the specification."""

import pytest
import torch

from aadp_kernels._torch.rng import random_words
from aadp_kernels.addresses import signed32

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from aadp_kernels._triton.rng import chacha, load_key, philox  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def words_kernel(out, blocks, fields, key_pointer, CHACHA: tl.constexpr, ROUNDS: tl.constexpr):
    """out[i, j] = word i of the block counted (blocks[j], *fields), 16 blocks."""
    lane = tl.arange(0, 16)
    block = tl.load(blocks + lane).to(tl.uint32, bitcast=True)
    step = tl.load(fields).to(tl.uint32, bitcast=True)
    client = tl.load(fields + 1).to(tl.uint32, bitcast=True)
    layer = tl.load(fields + 2).to(tl.uint32, bitcast=True)
    key = load_key(key_pointer, CHACHA)
    if CHACHA:
        words = chacha(block, step, client, layer, key, ROUNDS)
        for i in tl.static_range(16):
            tl.store(out + i * 16 + lane, words[i].to(tl.int32, bitcast=True))
    else:
        words = philox(block, step, client, layer, key, ROUNDS)
        for i in tl.static_range(4):
            tl.store(out + i * 16 + lane, words[i].to(tl.int32, bitcast=True))


def kernel_words(rng: str, key: list[int], blocks: list[int], fields: list[int]) -> torch.Tensor:
    secure = rng.startswith("chacha")
    out = torch.full((16 if secure else 4, 16), -1, dtype=torch.int32, device=DEVICE)
    tensors = [
        torch.tensor([signed32(w) for w in row], dtype=torch.int32, device=DEVICE)
        for row in (blocks, fields, key)
    ]
    words_kernel[(1,)](out, *tensors, CHACHA=secure, ROUNDS=int(rng[6:]))
    return out.cpu()


def unsigned(words: torch.Tensor) -> list[int]:
    return [w & 0xFFFFFFFF for w in words.tolist()]


def test_chacha20_rfc8439_block():
    key = [int.from_bytes(bytes(range(4 * i, 4 * i + 4)), "little") for i in range(8)]
    words = kernel_words("chacha20", key, [1] * 16, [0x09000000, 0x4A000000, 0])
    expected = (
        "e4e7f110 15593bd1 1fdd0f50 c47120a3 c7f4d1c7 0368c033 9aaa2204 4e6cd4c3 "
        "466482d2 09aa9f07 05d7c214 a2028bd9 d19c12b5 b94e16de e883d0cb 4e3c50a2"
    )
    assert unsigned(words[:, 0]) == [int(w, 16) for w in expected.split()]


# Random123's kat_vectors: rounds, counter, key, result.
PHILOX = [
    (7, "00000000 00000000 00000000 00000000", "00000000 00000000",
     "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


@pytest.mark.parametrize(("rounds", "counter", "key", "expected"), PHILOX)
def test_philox_random123(rounds, counter, key, expected):
    counter, key, expected = ([int(w, 16) for w in s.split()] for s in (counter, key, expected))
    words = kernel_words(f"philox{rounds}", key, [counter[0]] * 16, counter[1:])
    assert unsigned(words[:, 0]) == expected


@pytest.mark.parametrize("rng", ["philox10", "chacha8", "chacha20"])
def test_words_of_the_specification(rng):
    generator = torch.Generator().manual_seed(1)
    draw = torch.randint(0, 1 << 32, (16 + 3 + 8,), generator=generator).tolist()
    blocks, fields, key = draw[:16], draw[16:19], draw[19:]
    counters = torch.tensor(
        [[signed32(b) for b in blocks], *([signed32(f)] * 16 for f in fields)], dtype=torch.int32
    )
    needed = key if rng.startswith("chacha") else key[:2]
    assert torch.equal(kernel_words(rng, key, blocks, fields), random_words(rng, needed, counters))
