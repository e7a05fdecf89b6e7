"""Keys, addressing, exactness and distribution of noise and coins."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from aadp_kernels import MECHANISMS, NoiseKey, poisson_mask, sample_noise, tail_cutoff
from aadp_kernels._torch import noise as spec
from aadp_kernels.addresses import DOMAINS, RNGS
from aadp_kernels.contract import Noise
from tests.late import stats

KEY = NoiseKey.from_seed(7)
DISTRIBUTIONS = {"gaussian": "norm", "laplace": "laplace"}


def again(key):
    """An equal key that remembers nothing."""
    return NoiseKey.from_bytes(key._secret, key.rng, key.simulated)


def draw(shape, mechanism="gaussian", key=KEY, **kwargs):
    kwargs = {"scale": 1.0, "step": 3, "dtype": torch.float64, **kwargs}
    key = again(key) if isinstance(key, NoiseKey) else key
    return sample_noise(shape, mechanism=mechanism, key=key, **kwargs)


def test_key_keeps_its_secret():
    secret = bytes(range(32))
    key = NoiseKey.from_bytes(secret)
    assert secret.hex() not in repr(key)
    assert str(list(secret)) not in repr(key)
    for copier in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="secret"):
            copier(key)


def test_keys_differ_and_carry_their_mark():
    assert NoiseKey.random() != NoiseKey.random()
    assert not NoiseKey.random().simulated
    assert NoiseKey.from_seed(1) == NoiseKey.from_seed(1)
    child = NoiseKey.from_seed(1, rng="philox10").derive("x")
    assert child.simulated
    assert child.rng == "philox10"
    assert not NoiseKey.from_bytes(bytes(32)).derive("x").simulated


def test_derive_is_unambiguous():
    contexts = [("ab", "c"), ("a", "bc"), (b"ab", "c"), ("abc",), (1,), ("1",), (b"\x01",), (-1,),
                (255,), (256,), ("",), ("", ""), (0,)]  # fmt: skip
    keys = {KEY.derive(*context).words for context in contexts}
    assert len(keys) == len(contexts)
    assert KEY.derive("a").derive("b") != KEY.derive("a", "b")
    with pytest.raises(ValueError, match="context"):
        KEY.derive(True)
    with pytest.raises(ValueError, match="context"):
        KEY.derive()


def test_bad_keys():
    with pytest.raises(ValueError, match="secret must be 32 bytes, got 31"):
        NoiseKey.from_bytes(bytes(31))
    with pytest.raises(ValueError, match="rng must be one of"):
        NoiseKey.random(rng="mt19937")


@pytest.mark.parametrize("rng", RNGS)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_noise_is_a_function_of_its_address(rng, mechanism):
    key = NoiseKey.from_seed(2, rng=rng)
    whole = draw((1000,), mechanism, key)
    for start, stop in ((0, 1), (1, 2), (3, 17), (7, 8), (8, 9), (13, 999), (999, 1000)):
        part = draw((stop - start,), mechanism, key, offset=start)
        assert torch.equal(part, whole[start:stop])
    assert torch.equal(draw((10, 100), mechanism, key).flatten(), whole)
    others = [dict(step=4), dict(client=1), dict(layer=1), dict(offset=1)]
    for other in others:
        changed = draw((1000,), mechanism, key, **other)
        assert not torch.isin(changed[:900], whole[:900]).all()
        assert (changed == whole).sum() == 0


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_cohort_rows_are_the_clients_own_noise(mechanism):
    clients = torch.tensor([5, 0, (1 << 32) - 1, 6])
    rows = draw((4, 3, 7), mechanism, client=clients, layer=9, offset=11)
    for row, client in zip(rows, clients.tolist(), strict=True):
        assert torch.equal(row, draw((3, 7), mechanism, client=client, layer=9, offset=11))
    assert draw((0, 5), client=torch.zeros(0, dtype=torch.int64)).shape == (0, 5)


def test_noise_does_not_depend_on_chunks(monkeypatch):
    whole = draw((5000,))
    monkeypatch.setattr(spec, "_chunk_columns", lambda device, words: 13)
    assert torch.equal(draw((5000,)), whole)


def test_last_address_of_the_stream():
    end = 1 << 35
    assert draw((3,), offset=end - 3).shape == (3,)
    with pytest.raises(ValueError, match="offset"):
        draw((4,), offset=end - 3)


def test_domains_layers_and_streams_share_no_block():
    seen = set()
    for domain in DOMAINS.values():
        for layer in (0, 1, (1 << 24) - 1):
            noise = Noise("chacha20", (), "", "wide", 2, torch.tensor([0, 9]))
            counters = spec._counters(noise, [(layer, 0, 24)], domain, (8, 1))
            seen.update(map(tuple, counters.t().tolist()))
    assert len(seen) == len(DOMAINS) * 3 * 2 * 3
    assert max(DOMAINS.values()) < 256


@pytest.mark.parametrize("rng", RNGS)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_distribution_accepts_the_scale_and_rejects_others(rng, mechanism):
    noise = draw((20_000,), mechanism, NoiseKey.from_seed(5, rng=rng), scale=0.3).numpy()
    law = getattr(stats, DISTRIBUTIONS[mechanism])
    assert stats.kstest(noise, law(scale=0.3).cdf).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(noise, law(scale=0.3 * wrong).cdf).pvalue < 1e-12


def test_pairs_and_neighbours_are_uncorrelated():
    noise = draw((200_000,)).numpy()
    for lag in range(1, 9):
        for transform in (np.asarray, np.square, np.abs):
            value = transform(noise)
            correlation = np.corrcoef(value[:-lag], value[lag:])[0, 1]
            assert abs(correlation) < 5 / math.sqrt(len(noise))


def reference_gaussian(words):
    """Box-Muller by math.log, math.cos on exact integers, for four unsigned words."""
    u1 = ((words[0] ^ 1 << 31) * 2**32 + (words[1] ^ 1 << 31) + 1) / 2**64
    high, low = (w - (1 << 32) if w >> 31 else w for w in words[2:])
    phi = (high + 0.5 + (low & ~3) * 2.0**-32) * math.pi / 4 * 2.0**-31
    radius = math.sqrt(-2 * math.log(u1))
    first, second = radius * math.cos(phi) * (-1 if low & 2 else 1), radius * math.sin(phi)
    return (second, first) if low & 1 else (first, second)


def test_gaussian_equals_math_library_also_in_the_tails():
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 1 << 32, (4, 400), generator=generator)
    words[0, :100] = (1 << 31) + (words[0, :100] >> torch.arange(100).clamp(max=32))
    words[:2, 0] = 1 << 31
    words[:2, 1] = (1 << 31) - 1
    got = spec._gaussian(words.to(torch.int32))
    expected = [reference_gaussian(column) for column in words.t().tolist()]
    torch.testing.assert_close(got.t(), torch.tensor(expected, dtype=torch.float64),
                               rtol=1e-14, atol=1e-14)  # fmt: skip
    radius = got.square().sum(0).sqrt()
    assert radius.max().item() == pytest.approx(tail_cutoff("gaussian"), rel=1e-12)


def test_laplace_equals_math_library_also_in_the_tails():
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 1 << 32, (2, 300), generator=generator)
    words[0, :100] = (1 << 31) + (words[0, :100] >> torch.arange(100).clamp(max=32))
    words[:, 0] = 1 << 31
    got = spec._laplace(words.to(torch.int32))[0]
    for value, (high, low) in zip(got.tolist(), words.t().tolist(), strict=True):
        tail = ((low ^ 1 << 31) >> 1) + 1
        u = ((high ^ 1 << 31) * 2**31 + tail) / 2**63
        assert value == pytest.approx(math.log(u) * (1 if low & 1 else -1), rel=1e-14, abs=1e-300)
    assert got.abs().max().item() == pytest.approx(tail_cutoff("laplace"), rel=1e-12)


def test_scale_tensor_zero_and_dtype():
    scale = torch.tensor([0.0, 1.0, 2.0])
    noise = draw((4, 3), scale=scale)
    assert torch.equal(noise, draw((4, 3)) * scale)
    assert torch.equal(draw((5,), scale=0.0), torch.zeros(5, dtype=torch.float64))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(draw((50,), dtype=dtype), draw((50,)).to(dtype))
    assert draw((0,)).shape == (0,)
    assert draw(()).shape == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": -1.0}, "scale"),
        ({"scale": math.nan}, "scale"),
        ({"scale": math.inf}, "scale"),
        ({"scale": torch.tensor([1.0, -1.0])}, "scale"),
        ({"step": -1}, "step"),
        ({"step": 1 << 32}, "step"),
        ({"layer": 1 << 24}, "layer"),
        ({"client": -1}, "client"),
        ({"client": torch.tensor([0, 1 << 32])}, "client"),
        ({"client": torch.tensor([0, 1, 2])}, "shape"),
        ({"mechanism": "cauchy"}, "mechanism"),
        ({"key": 3}, "key"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        draw((2,), **change)


@pytest.mark.parametrize("rng", RNGS)
@pytest.mark.parametrize("rate", [0.01, 0.3, 0.9])
def test_poisson_rate(rng, rate):
    n = 40_000
    mask = poisson_mask(n, rate, key=NoiseKey.from_seed(1, rng=rng), step=0)
    assert stats.binomtest(int(mask.sum()), n, rate).pvalue > 1e-3
    for wrong in (2 / 3 * rate, min(1.0, 3 / 2 * rate)):
        assert stats.binomtest(int(mask.sum()), n, wrong).pvalue < 1e-6


def test_poisson_edges_and_addresses():
    assert not poisson_mask(1000, 0.0, key=KEY, step=0).any()
    assert poisson_mask(1000, 1.0, key=KEY, step=0).all()
    assert poisson_mask(0, 0.5, key=KEY, step=0).shape == (0,)
    mask = poisson_mask(1000, 0.5, key=KEY, step=0, client=4)
    assert torch.equal(mask[:10], poisson_mask(10, 0.5, key=KEY, step=0, client=4))
    rows = poisson_mask(1000, [0.5, 0.2], key=KEY, step=0, client=torch.tensor([4, 5]))
    assert torch.equal(rows[0], mask)
    assert torch.equal(rows[1], poisson_mask(1000, 0.2, key=KEY, step=0, client=5))
    agreement = (mask == poisson_mask(1000, 0.5, key=KEY, step=1, client=4)).float().mean()
    assert 0.4 < agreement < 0.6
    for rate in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="rate"):
            poisson_mask(10, rate, key=KEY, step=0)


def test_coins_are_independent_of_each_other_and_nested_in_the_rate():
    mask = poisson_mask(100_000, 0.5, key=KEY, step=9).double()
    for lag in (1, 2, 4, 8):
        pair = (mask[:-lag] * mask[lag:]).mean().item()
        assert abs(pair - 0.25) < 5 * math.sqrt(0.1875 / 1e5)
    fewer = poisson_mask(100_000, 0.1, key=KEY, step=9)
    assert not (fewer & (mask == 0)).any()


def test_a_shape_without_elements_and_a_scale_for_each_row():
    noise = sample_noise(
        (2, 0), mechanism="gaussian", scale=torch.ones(2, 1), key=NoiseKey.from_seed(1), step=0,
        client=torch.tensor([0, 1]), layer=0,
    )  # fmt: skip
    assert noise.shape == (2, 0)
