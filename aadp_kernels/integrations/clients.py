"""Client-level privacy for a list of client deltas, as Flower or one's own server holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aadp_kernels import _validate
from aadp_kernels.clip_sum import clip_sum_noise
from aadp_kernels.integrations.release import (
    Release,
    equal_scales,
    form_of_release,
    layer_clips,
)
from aadp_kernels.layout import Layout
from aadp_kernels.noise_key import NoiseKey
from aadp_kernels.privatize import privatize_
from aadp_kernels.sampler_limits import MECHANISMS

Arrays = Sequence[np.ndarray] | Sequence[Tensor]


def mean_of_deltas(
    deltas: Sequence[Arrays],
    *,
    clip_norm: float | Sequence[float] | Tensor,
    noise_multiplier: float,
    expected_clients: float,
    adjacency: str,
    key: NoiseKey,
    round: int,
    mechanism: str = "gaussian",
    layers: Sequence[int] | None = None,
    like: Arrays | None = None,
    poisson_rate: float = 1.0,
    form: str = "wide",
) -> tuple[list[Any], Release]:
    """Clip every client's delta layer by layer, add them up, add noise once, divide.

    `(sum_k clip(delta_k) + noise) / expected_clients`, by a server that is trusted with the deltas.

    Args:
        deltas: One list of arrays a client (new weights minus the weights it started from), all of
            the same shapes: numpy arrays or tensors, floating point. Private.
        clip_norm: C of all layers together (each gets C / sqrt(L), or C / L for laplace), or one
            for each layer. Public.
        noise_multiplier: z or lambda of all layers together; 0: no noise, no privacy.
        expected_clients: The divisor, public: planned clients of a round, not those that answered.
        adjacency: "zero_out" (a client's delta counts as zero) or "replace_one".
        key: Secret key of the server.
        round: Address of the noise; a round is released once.
        mechanism: "gaussian" (clipped in L2) or "laplace" (clipped in L1).
        layers: Layer index of each array; None: every array is a layer of its own.
        like: Arrays of the shapes of a delta, needed only where no client answered.
        poisson_rate: Rate of the secret independent coins that chose the clients. Flower's
            `fraction_train` draws a fixed number, which is not that: leave it at 1.
        form: Form of the noise. "grid" quantises every delta and sums integers, so that the claim
            holds for the floating-point numbers that are written; the sum is then divided here.

    Returns:
        (mean, release). The mean has the kind and dtypes of the first delta.

    Raises:
        ValueError: No deltas and no `like`; arrays that are not floating point (leave counters
            such as BatchNorm's out) or that differ in shape; a range.

    Guarantees:
        Clients weigh the same: weights by number of examples are private and unbounded, so there
        is no argument for them. Clipped sums are float64. A client whose layer holds NaN or Inf
        contributes zeros there. One delta at a time is held in float64.

    Reference:
        McMahan, Ramage, Talwar, Zhang 2018, arXiv:1710.06963.
    """
    _validate.one_of("mechanism", mechanism, MECHANISMS)
    if not expected_clients > 0:
        raise ValueError(f"expected_clients must be positive, got {expected_clients}")
    example = deltas[0] if len(deltas) else like
    if example is None:
        raise ValueError("like must be given where deltas is empty")
    layout = Layout.build(_tensors(example), layers)
    p = 1 if mechanism == "laplace" else 2
    clips = layer_clips(clip_norm, layout, p)
    scales = equal_scales(
        clips, mechanism=mechanism, noise_multiplier=noise_multiplier, adjacency=adjacency
    )
    silent: dict[str, Any] = {"layout": layout, "clip": clips, "scale": None, "p": p}
    noise = silent | {
        "scale": scales, "mechanism": mechanism, "key": key, "step": round, "form": form,
    }  # fmt: skip
    sums: list[Tensor] | None = None
    for delta in deltas:
        rows = [tensor.unsqueeze(0) for tensor in _tensors(delta)]
        sums, _ = clip_sum_noise(
            rows, accumulate=sums, last=False, **(noise if form == "grid" else silent)
        )
    nobody = [tensor.new_empty((0, *tensor.shape)) for tensor in _tensors(example)]
    total, _ = clip_sum_noise(nobody, accumulate=sums, **noise)
    release = Release(
        mechanism, noise_multiplier, unit="client", adjacency=adjacency,
        poisson_rate=poisson_rate, **form_of_release(form, mechanism, layout),
    )  # fmt: skip
    return _like(example, [tensor / expected_clients for tensor in total]), release


def privatize_delta(
    delta: Arrays,
    *,
    clip_norm: float | Sequence[float] | Tensor,
    noise_multiplier: float,
    adjacency: str,
    key: NoiseKey,
    round: int,
    mechanism: str = "gaussian",
    layers: Sequence[int] | None = None,
    form: str = "wide",
) -> tuple[list[Any], Release]:
    """Clip one client's delta and add noise on the client, before anybody sees it.

    `clip(delta) + noise`: the local model, in which the server is not trusted. The noise is that
    of a whole sum, so a mean of K such deltas is about sqrt(K) times as noisy as `mean_of_deltas`.

    Args:
        delta: The client's arrays, numpy or tensors, floating point. Private; not changed.
        clip_norm: As for `mean_of_deltas`; also noise_multiplier, mechanism,
            layers and form.
        noise_multiplier: See clip_norm.
        adjacency: "replace_one" is what the local model usually means: any two deltas look alike.
        key: The client's own secret key.
        round: Address of the noise; a round is released once.
        mechanism: See clip_norm.
        layers: See clip_norm.
        form: See clip_norm.

    Returns:
        (noisy delta, release). The client's own accountant charges the release.

    Raises:
        ValueError: As `mean_of_deltas`.

    Guarantees:
        As `privatize_`.

    Reference:
        Kasiviswanathan, Lee, Nissim, Raskhodnikova, Smith 2011 (local privacy).
    """
    _validate.one_of("mechanism", mechanism, MECHANISMS)
    tensors = _tensors(delta)
    layout = Layout.build(tensors, layers)
    p = 1 if mechanism == "laplace" else 2
    clips = layer_clips(clip_norm, layout, p)
    scales = equal_scales(
        clips, mechanism=mechanism, noise_multiplier=noise_multiplier, adjacency=adjacency
    )
    out = [torch.empty_like(tensor) for tensor in tensors]
    privatize_(
        tensors, out=out, layout=layout, clip=clips, scale=scales, p=p, mechanism=mechanism,
        key=key, step=round, form=form,
    )  # fmt: skip
    release = Release(
        mechanism, noise_multiplier, unit="client", adjacency=adjacency, seen_by="server",
        **form_of_release(form, mechanism, layout),
    )  # fmt: skip
    return _like(delta, out), release


def _tensors(arrays: Arrays) -> list[Tensor]:
    """The arrays as tensors, without a copy where there need not be one."""
    return [a.detach() if isinstance(a, Tensor) else torch.tensor(a) for a in arrays]


def _like(example: Arrays, tensors: list[Tensor]) -> list[Any]:
    """numpy arrays if the example has them."""
    if len(example) and isinstance(example[0], Tensor):
        return tensors
    return [tensor.numpy() for tensor in tensors]
