"""What tests of the numba implementation share."""

import pytest
import torch

from aadp_kernels import NoiseKey, sample_noise

numba = pytest.importorskip("numba")

BOTH = ("torch", "numba")
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    return torch.equal(a.view(BITS[a.element_size()]), b.view(BITS[b.element_size()]))


def key(rng="chacha20"):
    return NoiseKey.from_seed(3, rng=rng)


def noise(impl, shape, mechanism="laplace", rng="chacha20", **kwargs):
    kwargs = {"scale": 0.7, "step": (1 << 32) - 1, **kwargs}
    return sample_noise(shape, mechanism=mechanism, key=key(rng), impl=impl, **kwargs)


def close(got, expected, scale):
    """Within what the fast form may differ: scale 2^-18 (1 + |noise|) and 4 ulp of the dtype."""
    assert got.dtype == expected.dtype
    size = expected.double().abs()
    allowed = 2.0**-18 * (scale + size) + 4 * torch.finfo(expected.dtype).eps * size
    return bool(((got.double() - expected.double()).abs() <= allowed).all())
