"""Lists of tensors that were looked at before: one call says whether tensors look the same.

To look at every tensor of a list in Python takes longer than its work on a device does. A guard
holds the type, dtype, device, sizes and strides of each tensor, and no tensor. It is the check of
`torch.compile`, whose compiler is not imported. It says no to a list that holds a tensor twice, and
it tells inference tensors, and inference mode, from others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aadp_kernels.layout import Layout

try:
    # A private name of torch: where it has moved, every tensor is looked at in every call.
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None

_GUARDS = 4  # of a layout
_KINDS = {torch.Tensor, torch.nn.Parameter}


class Checked(list[Tensor]):
    """Tensors that have passed a guard.

    Attributes:
        guard: Which; other tensors that pass the same one look the same.
        device: Of the tensors.
    """

    __slots__ = ("device", "guard")

    def __init__(self, tensors: Sequence[Tensor], guard: Any, device: torch.device) -> None:
        super().__init__(tensors)
        self.guard, self.device = guard, device


def checked(tensors: Sequence[Tensor], layout: Layout, lead: tuple[int, ...]) -> Checked | None:
    """Tensors that look like some that `remember` was told of; None for others."""
    if len(tensors) == len(layout.names):
        for known, guard, device in vars(layout).get("_seen", ()):
            if known == lead and guard.check(*tensors):
                return Checked(tensors, guard, device)
    return None


def remember(
    name: str,
    tensors: Sequence[Tensor],
    layout: Layout,
    lead: tuple[int, ...],
    device: torch.device,
) -> None:
    """Note how tensors look that fit (*lead, *layout), lie on a device and were an argument.

    A guard costs more than a look, so one is made when an argument's lead comes for the second time
    in a row.
    """
    if TensorGuards is None:
        return
    kept = vars(layout)
    last = kept.setdefault("_seen_lead", {})
    if last.get(name) != lead:
        last[name] = lead
    elif all(type(t) in _KINDS and t.layout is torch.strided for t in tensors):
        # The stub of the class says less than it takes: numbers of every tensor's axes.
        sizes: Any = [list(t.shape) for t in tensors]
        strides: Any = [list(t.stride()) for t in tensors]
        guard = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        kept["_seen"] = ((lead, guard, device), *kept.get("_seen", ())[: _GUARDS - 1])
