"""What a network is called with: one tensor a record, or the named inputs packed into it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fl_lightning.data.fields import Fields, as_arguments
from fl_lightning.data.module import FederatedDataModule
from fl_lightning.networks.check import finish_network


def take_fields(network: nn.Module, fields: Fields | None) -> None:
    """Let a network take packed records [B, width] beside its own arguments.

    Args:
        network: the model, of which nothing but the call changes.
        fields: what a record is packed from; None for records that are one tensor.

    Guarantees:
        Calls with anything but one packed tensor stay as they are. Called again, the last fields
        count.
    """
    for key, hook in list(network._forward_pre_hooks.items()):
        if isinstance(hook, partial) and hook.func is _unpacked:
            del network._forward_pre_hooks[key]
            network._forward_pre_hooks_with_kwargs.pop(key, None)
    if fields is not None:
        network.register_forward_pre_hook(partial(_unpacked, fields), with_kwargs=True)


def _unpacked(
    fields: Fields, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
        return None
    packed = args[0]
    if packed.ndim != 2 or packed.shape[1] != fields.width or not _is_packed(packed, fields):
        return None
    given, named = as_arguments(fields, packed)
    if next(network.parameters()).dtype == torch.float64:
        given = tuple(_double(v) for v in given)
        named = {n: _double(v) for n, v in named.items()}
    return given, named


def _is_packed(packed: Tensor, fields: Fields) -> bool:
    """Real records come as float64 to a network of such parameters."""
    return packed.is_floating_point() == fields.packed.is_floating_point


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def input_dtype(network: nn.Module, x: Tensor) -> torch.dtype:
    """What a network takes real records in: float64 if that is what its parameters are."""
    double = next(network.parameters()).dtype == torch.float64 and x.is_floating_point()
    return torch.float64 if double else x.dtype


def meet_records(network: nn.Module, data: FederatedDataModule) -> None:
    """Let a network take the data's records, and make the parameters of its lazy layers.

    Raises:
        ValueError: it cannot be applied to a record of zeros, where layers are lazy.
    """
    take_fields(network, data.fields)
    finish_network(network, data.x[0].to(input_dtype(network, data.x)))
