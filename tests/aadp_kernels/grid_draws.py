"""Draws of the grid form for its tests."""

from decimal import Decimal

import torch

from aadp_kernels import NoiseKey, sample_noise

T = 1 << 30
KEY = NoiseKey.from_seed(41)
LN2 = Decimal(2).ln()


def draw(shape, mechanism, key=KEY, **kwargs):
    kwargs = {"scale": 1.0, "step": 3, "dtype": torch.int64, **kwargs}
    return sample_noise(shape, mechanism=mechanism, key=again(key), form="grid", **kwargs)


def again(key):
    """An equal key that remembers nothing."""
    return NoiseKey.from_bytes(key._secret, key.rng, key.simulated)
