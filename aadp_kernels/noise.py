"""Noise and coins that are a function of a key and an address."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aadp_kernels import _dispatch, _validate, _validate_tensors
from aadp_kernels._eager import eager
from aadp_kernels.addresses import LAYER_BITS
from aadp_kernels.contract import Noise, Segment
from aadp_kernels.correlation import Correlation, drawn_again
from aadp_kernels.noise_key import NoiseKey
from aadp_kernels.sampler_limits import FORMS, MECHANISMS, max_elements

_MAX_STEP = 1 << 32
_MAX_LAYER = 1 << LAYER_BITS


@eager
def sample_noise(
    shape: Sequence[int],
    *,
    mechanism: str,
    scale: float | Tensor,
    key: NoiseKey,
    step: int | Tensor,
    client: int | Tensor = 0,
    layer: int = 0,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    form: str = "wide",
    correlation: Correlation | None = None,
    impl: str = "auto",
) -> Tensor:
    """Gaussian or Laplace noise that is a function of its address only.

    Equals `scale * torch.randn(shape)` or `Laplace(0, scale).sample(shape)` in distribution.

    Args:
        shape: Shape of the result. With a tensor of clients, [K, ...].
        mechanism: "gaussian" or "laplace".
        scale: Standard deviation (gaussian) or b (laplace), public, >= 0 and finite; a tensor is
            broadcast to `shape`.
        key: Secret key.
        step: Step or round, in [0, 2^32), public; also a 0-d int64 tensor.
        client: Client id in [0, 2^32), or int64 [K]: row k then uses client[k].
        layer: Layer index, in [0, 2^24).
        offset: Index of the first element of the result (of a row, with a tensor of clients).
        dtype: Floating dtype of the result; int64 (grid form only) gives counts of quanta.
        device: Device of the result; the noise has the same bits on all of them.
        form: "wide" (64 bits an element, float64), "fast" (32 bits an element; numba and triton
            compute it in float32) or "grid" (float-safe: integers, see `aadp_kernels.grid`).
        correlation: Noise of earlier steps that is added once more, see `Correlation`; None: noise
            of this step alone.
        impl: "torch" (the specification), "numba" (CPU only, faster), "triton" (GPU) or "auto":
            the fastest that is installed, has the form and pays.

    Returns:
        Noise, `dtype` [shape].

    Raises:
        ValueError: A scale that is negative or not finite, an address out of range, a shape that
            does not begin with K, an `impl` that is unknown, cannot run here or lacks
            the form.
        ReusedNoiseError: Noise that this key object has drawn before, see `NoiseKey`.

    Guarantees:
        Element i of the flattened result (of the row) depends on (key, step, client, layer,
        offset + i) and the correlation only: neither on the shape nor on the split of a call.
        Without correlation |noise| <= tail_cutoff(mechanism, form) * scale. The wide form is
        computed in float64 and rounded once to `dtype`, with the same bits in every
        implementation. Implementations of the fast form agree to scale * 2^-18 * (1 + |noise| /
        scale) and 4 ulp of `dtype`, times the sum of the correlation's |coefficients|.

    Edge cases:
        | case | result |
        |---|---|
        | scale 0 | exactly zero |
        | empty shape, K = 0 | empty |

    Reference:
        Box and Muller 1958; Salmon et al. 2011 (counter-based generators); RFC 8439 (ChaCha20).
    """
    _validate.one_of("mechanism", mechanism, MECHANISMS)
    _validate.one_of("form", form, FORMS)
    shape = torch.Size(shape)
    place = torch.device(device) if device is not None else _scale_device(scale)
    cohort = isinstance(client, Tensor) and client.dim() == 1
    clients = _validate_tensors.client_ids(client, place)
    if cohort and (not shape or shape[0] != len(clients)):
        raise ValueError(f"shape must begin with {len(clients)} clients, got {tuple(shape)}")
    count = torch.Size(shape[1:] if cohort else shape).numel()
    if not (dtype.is_floating_point or (form == "grid" and dtype == torch.int64)):
        raise ValueError(f"dtype must be floating point (or int64 with form='grid'), got {dtype}")
    step, layer = check_address(key, step=step), _validate.integer_below("layer", layer, _MAX_LAYER)
    again = drawn_again(correlation, key, step, mechanism, form)
    backend = _dispatch.backend(
        impl, "noise", device=place, elements=count, form=form, correlated=correlation is not None,
        numbers=shape.numel() * (1 + len(again)),
    )  # fmt: skip
    offset = _validate.integer_below("offset", offset, max_elements(key.rng, form) - count + 1)
    if isinstance(scale, Tensor):
        _validate_tensors.nonnegative_tensor("scale", scale, finite=True)
        scale = scale.to(device=place, dtype=torch.float64).expand(shape)
        nothing = shape.numel() == 0
    else:
        scale = _validate.finite_nonnegative("scale", scale)
        nothing = shape.numel() == 0 or scale == 0
    if nothing:
        return torch.zeros(shape, dtype=dtype, device=place)
    segment = (layer, offset, count)
    claim(key, mechanism, form, step, client, [segment])
    if isinstance(scale, Tensor):
        scale = scale.reshape(-1, count)
    noise = Noise(key.rng, key.words, mechanism, form, step, clients, again)
    return backend.scaled_noise(noise, segment, scale, dtype).reshape(shape)


@eager
def poisson_mask(
    n: int,
    rate: float | Sequence[float],
    *,
    key: NoiseKey,
    step: int | Tensor,
    client: int | Tensor = 0,
    device: torch.device | str | None = None,
    impl: str = "auto",
) -> Tensor:
    """Independent coins for Poisson sampling, `torch.rand(n) < rate` in distribution.

    Args:
        n: Number of records, public.
        rate: Probability of True, in [0, 1], public; with a tensor of clients also one for each.
        key: Secret key: who knows the coins has no amplification to fear.
        step: Step in [0, 2^32); also a 0-d int64 tensor.
        client: Client id in [0, 2^32), or int64 [K].
        device: Device of the result.
        impl: As for `sample_noise`.

    Returns:
        bool [n], or [K, n] for a tensor of clients. Private.

    Raises:
        ValueError: A rate outside [0, 1], an address out of range, an `impl` that is unknown or
            cannot run here.

    Guarantees:
        Coin i depends on (key, step, client, i) only; P(True) differs from the rate by at most
        2^-63; the coins share no random bits with any noise under the same key.

    Edge cases:
        Rate 0 gives no True, rate 1 gives all True, n = 0 gives an empty mask.
    """
    place = torch.device(device) if device is not None else torch.device("cpu")
    n = _validate.integer_below("n", n, max_elements(key.rng))
    clients = _validate_tensors.client_ids(client, place)
    step = check_address(key, step=step)
    backend = _dispatch.backend(impl, "coins", device=place, elements=n, numbers=n * len(clients))
    rates = list(rate) if isinstance(rate, Sequence) else [float(rate)] * len(clients)
    if len(rates) != len(clients):
        raise ValueError(f"rate must be one for each of {len(clients)} clients, got {len(rates)}")
    for value in rates:
        if not 0 <= value <= 1:
            raise ValueError(f"rate must be in [0, 1], got {value!r}")
    cohort = isinstance(client, Tensor) and client.dim() == 1
    if n == 0 or len(clients) == 0:
        return torch.zeros((len(clients), n) if cohort else (n,), dtype=torch.bool, device=place)
    noise = Noise(key.rng, key.words, "coins", "wide", step, clients)
    mask = backend.coins(noise, n, rates)
    return mask if cohort else mask[0]


def check_address(key: NoiseKey, *, step: int | Tensor) -> int | Tensor:
    """The step, or an error unless the key is a key and the step fits its field.

    A step that lies on an accelerator is not read.
    """
    if not isinstance(key, NoiseKey):
        raise ValueError(f"key must be a NoiseKey, got {type(key).__name__}")
    if isinstance(step, Tensor):
        if step.dim() or step.dtype != torch.int64:
            raise ValueError(f"step must be 0-d int64, got {step.dtype} {tuple(step.shape)}")
        if step.device.type != "cpu":
            return step
        step = int(step)
    return _validate.integer_below("step", step, _MAX_STEP)


def claim(
    key: NoiseKey,
    mechanism: str,
    form: str,
    step: int | Tensor,
    client: int | Tensor,
    segments: Sequence[Segment],
) -> None:
    """Note what a release draws, before it is drawn; a ReusedNoiseError if it was drawn before.

    Nothing is read from an accelerator.
    """
    if isinstance(step, Tensor):
        return
    if not isinstance(client, Tensor):
        clients = [client.__index__()]
    elif client.is_cpu:
        clients = client.reshape(-1).tolist()
    else:
        return
    key._used.claim(f"{form} {mechanism}", step, clients, segments)


def _scale_device(scale: float | Tensor) -> torch.device:
    """Noise lies where its scale lies, by default."""
    return scale.device if isinstance(scale, Tensor) else torch.device("cpu")
