"""Noise in parts: what each client adds so that the sum of enough of them has the full noise."""

from __future__ import annotations

import torch
from torch import Tensor

from aadp_kernels import NoiseKey, sample_noise

ATTEMPTS = 64
_SECOND = 1 << 31


def noise_part(
    shape: tuple[int, ...],
    *,
    mechanism: str,
    scale: float,
    survivors: int,
    key: NoiseKey,
    clients: Tensor,
    layer: int,
    offset: int = 0,
    form: str = "wide",
) -> Tensor:
    """Each client's part of one noise: float64 [k, *shape].

    The sum of `survivors` parts is distributed as one Gaussian or Laplace of the given scale; with
    more parts it is that plus independent noise. Gaussian: standard deviation scale / √survivors.
    Laplace: the difference of two gamma variables of shape 1 / survivors and the given scale.

    Args:
        shape: shape of one part.
        mechanism: "gaussian" or "laplace".
        scale: standard deviation or b of the whole noise, >= 0.
        survivors: fewest parts that must be enough, >= 1.
        key: secret; the same address must not be drawn from twice.
        clients: ids [k], below 2^31.
        layer: layer of the address, below 2^14.
        offset: first element of the address.
        form: form of the noise, "wide" or "fast".

    Raises:
        ValueError: survivors below 1, a client id of 2^31 or more.

    Reference:
        Infinite divisibility of the Laplace distribution: Kotz, Kozubowski, Podgórski 2001, prop.
        2.4.1; used for aggregation by Ács and Castelluccia 2011.
    """
    if survivors < 1:
        raise ValueError(f"survivors={survivors} must be at least 1")
    if len(clients) and int(clients.max()) >= _SECOND:
        raise ValueError(f"clients={int(clients.max())} must be below 2^31")
    if scale == 0:
        return torch.zeros(len(clients), *shape, dtype=torch.float64)
    if mechanism == "gaussian":
        return sample_noise(
            (len(clients), *shape), mechanism="gaussian", scale=scale / survivors**0.5, key=key,
            step=0, client=clients, layer=layer, offset=offset, dtype=torch.float64, form=form,
        )  # fmt: skip
    # Both in one draw: the second variable of a client has an address of its own.
    both = torch.cat([clients, clients + _SECOND])
    plus, minus = _gamma(
        (len(both), *shape), 1 / survivors, key=key.derive("gamma"), clients=both, layer=layer,
        offset=offset, form=form,
    ).split(len(clients))  # fmt: skip
    return scale * (plus - minus)


def _gamma(
    size: tuple[int, ...],
    shape: float,
    *,
    key: NoiseKey,
    clients: Tensor,
    layer: int,
    offset: int,
    form: str,
) -> Tensor:
    """Gamma variables of shape at most 1 and scale 1, from Gaussian and exponential noise.

    Marsaglia and Tsang 2000 for shape + 1, then a power of a uniform variable for the shape.
    """

    def draw(mechanism: str, step: int) -> Tensor:
        return sample_noise(
            size, mechanism=mechanism, scale=1.0, key=key, step=step, client=clients, layer=layer,
            offset=offset, dtype=torch.float64, form=form,
        )  # fmt: skip

    d = shape + 1 - 1 / 3
    c = (9 * d) ** -0.5
    result = torch.zeros(size, dtype=torch.float64)
    waiting = torch.ones(size, dtype=torch.bool)
    for attempt in range(ATTEMPTS):
        x = draw("gaussian", attempt)
        v = (1 + c * x) ** 3
        # The magnitude of a Laplace variable is -ln of a uniform one.
        log_u = -draw("laplace", attempt).abs()
        bound = 0.5 * x**2 + d - d * v + d * v.clamp(min=1e-300).log()
        taken = waiting & (v > 0) & (log_u < bound)
        result = torch.where(taken, d * v, result)
        waiting &= ~taken
        if not bool(waiting.any()):
            break
    power = -draw("laplace", ATTEMPTS).abs() / shape
    return result * power.exp()
