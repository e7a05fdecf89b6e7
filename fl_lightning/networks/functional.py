"""A network applied with other values in the place of its parameters and buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def apply_with(network: nn.Module, values: Mapping[str, Tensor], *inputs: Any) -> Any:
    """Outputs of the network with `values` for its own tensors; the network stays as it was.

    `torch.func.functional_call` alone leaves the values in a module that stands under two names
    (torch 2.13): it exchanges the module's tensors once a name and puts them back in the same
    order.

    Args:
        network: any module.
        values: tensors by the names that `named_parameters` and `named_buffers` give.
        *inputs: of the network.

    Guarantees:
        A parameter that several modules hold is replaced in all of them, and each tensor of a
        module is exchanged once, whatever its names.
    """
    given, by_tensor = dict(values), {}
    for at, module in network.named_modules():  # every module once
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                name = f"{at}.{key}" if at else key
                if name in values:
                    by_tensor[id(tensor)] = values[name]
                elif id(tensor) in by_tensor:
                    given[name] = by_tensor[id(tensor)]
    return functional_call(network, given, inputs, tie_weights=False)
