"""Gradients and calls of clipped sums in Triton."""

import math

import torch

from aadp_kernels import Layout, NoiseKey, clip_sum_noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# The bias begins in the middle of a tile and of a 128-bit word; "b" has more than one tile.
LAYOUT = Layout.build(
    {
        "a.weight": torch.zeros(23, 3),
        "a.bias": torch.zeros(5),
        "b.weight": torch.zeros(1061),
        "b.bias": torch.zeros(1),
        "c": torch.zeros(()),
        "empty": torch.zeros(0),
    }
)
CLIP = torch.tensor([20.0, 30.0, 0.5, 1.0])
VOTES = torch.tensor([55.0, 850.0, 0.8, 1.0])
SCALE = torch.tensor([0.5, 2.0, 0.0, 1.0])


def gradients(batch=6, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *s, generator=generator).to(DEVICE, dtype) for s in LAYOUT.shapes]


def dirty(dtype):
    grads = gradients(7, dtype)
    grads[0][2, 1, 1] = math.nan
    grads[1][2, 0] = math.inf
    grads[2][4, 1060] = -math.inf
    grads[3][5] = math.nan
    return grads, torch.tensor([1, 0, 1, 1, 1, 0, 1], device=DEVICE)


def run(impl, grads, **arguments):
    arguments = {
        "layout": LAYOUT, "clip": CLIP, "scale": None, "p": 1, "key": None, "step": 3, "client": 8,
        **arguments,
    }  # fmt: skip
    key = arguments.pop("key") or NoiseKey.from_seed(5, rng=arguments.pop("rng", "philox10"))
    arguments = {
        k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()
    }
    return clip_sum_noise(grads, key=key, impl=impl, **arguments)


def assert_stats(got, want):
    for name in ("votes", "clipped", "nonfinite"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
        assert getattr(got, name).dtype == getattr(want, name).dtype
    if want.l1_norm is None:
        assert got.l1_norm is None
    else:
        torch.testing.assert_close(got.l1_norm, want.l1_norm, rtol=1e-14, atol=0, equal_nan=True)


def assert_sums(got, want, dtype, form, scale):
    """Wide: up to the order of the float64 sum; fast: as far as float32 noise may differ."""
    units = 4 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-14
    loose = scale * 2.0**-18 * 16 if form == "fast" else 0.0
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        torch.testing.assert_close(g.double(), w.double(), rtol=units, atol=loose + 1e-13)
