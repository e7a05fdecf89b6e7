"""ValueErrors that name a tensor and its value. Only public quantities are checked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from aadp_kernels._validate import integer_below

# So many numbers are looked at one by one; more take longer in Python than in two calls of torch.
_FEW = 64


def nonnegative_tensor(name: str, value: Tensor, *, finite: bool) -> None:
    """Raise unless all elements are >= 0 (and finite). Not checked on an accelerator: no sync."""
    if not value.is_cpu:
        return
    if value.dim() == 1 and value.numel() <= _FEW:
        each = value.tolist()
        # The sum is NaN if one is, and not finite if one is not.
        total = sum(each)
        fits = total < math.inf and min(each, default=0) >= 0
        if not fits:
            fits = all(x >= 0 and (x < math.inf or not finite) for x in each)
    else:
        # NaN comes back as both.
        extremes = value.detach().aminmax() if value.numel() else ()
        fits = all(x >= 0 and (x < math.inf or not finite) for x in map(float, extremes))
    if not fits:
        bad = ~((value >= 0) & torch.isfinite(value)) if finite else ~(value >= 0)
        kind = "finite and not negative" if finite else "not negative and not NaN"
        raise ValueError(f"{name} must be {kind}, got {value[bad].flatten()[0].item()!r}")


def client_ids(client: int | Tensor, device: torch.device) -> Tensor:
    """Client ids as int64 [K], each in [0, 2^32)."""
    if not isinstance(client, Tensor):
        client = integer_below("client", client, 1 << 32)
        return torch.full((1,), client, dtype=torch.int64, device=device)
    if client.dtype not in (torch.int32, torch.int64) or client.dim() > 1:
        raise ValueError(
            f"client must be an integer or a 1-D integer tensor, got {client.dtype} "
            f"{tuple(client.shape)}"
        )
    ids = client.reshape(-1)
    if ids.device.type == "cpu" and ids.numel():
        for extreme in (ids.min().item(), ids.max().item()):
            integer_below("client", int(extreme), 1 << 32)
    return ids.to(device=device, dtype=torch.int64)


def floating(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise unless every tensor is real floating point and all are on one device."""
    for i, tensor in enumerate(tensors):
        if not tensor.is_floating_point():
            raise ValueError(f"{name}[{i}] must be floating point, got {tensor.dtype}")
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"{name} must be on one device, got {tensors[0].device} and {tensor.device}"
            )
