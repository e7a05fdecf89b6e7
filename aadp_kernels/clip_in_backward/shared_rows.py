"""Layers that get one row for all records: positions, for instance.

Such a layer is given a copy of its row for each record, so that what autograd sends back to a copy
is one record's gradient. That holds only if a record's outputs are made of its own copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from aadp_kernels.clip_in_backward.modules import UnsupportedLayerError


def check_own_rows(run: Callable[[], Any], layers: Mapping[str, nn.Module]) -> None:
    """Raise unless each of two records' outputs depend on its own row of these layers' outputs.

    Args:
        run: a forward of the model on two records.
        layers: by name; each is called in it and gives a tensor [2, ...].

    Raises:
        UnsupportedLayerError: Names the layer; no output of the model has a row a record.
    """
    rows: dict[str, Tensor] = {}

    def note(name: str, _layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        rows[name] = output

    hooks = [layer.register_forward_hook(partial(note, n)) for n, layer in layers.items()]
    try:
        with torch.enable_grad():
            outputs = [
                t
                for t in tree_leaves(run())
                if isinstance(t, Tensor) and t.requires_grad and t.dim() and len(t) == 2
            ]
    finally:
        for hook in hooks:
            hook.remove()
    names = ", ".join(layers)
    if rows.keys() != layers.keys():
        raise UnsupportedLayerError(
            f"{names} gets one row for all records, and not in every forward: give it a row for "
            "each record"
        )
    if not outputs:
        raise UnsupportedLayerError(
            f"{names} gets one row for all records, and no output of the model has a row a record, "
            "which would show that each depends on its own"
        )
    for record in (0, 1):
        with torch.enable_grad():
            mine = [t[record] for t in outputs]
        found = torch.autograd.grad(
            mine, [*rows.values()], [torch.randn_like(t) for t in mine],
            retain_graph=True, allow_unused=True,
        )  # fmt: skip
        if any(g is not None and bool((g[1 - record] != 0).any()) for g in found):
            raise UnsupportedLayerError(
                f"{names} gets one row for all records, and what is made of it mixes them: give it "
                "a row for each record"
            )


def one_each(x: Tensor, records: int | None) -> Tensor:
    """A copy of the one row of x for each record; x itself if it has several."""
    return x if records is None or x.shape[0] != 1 else x.expand(records, *x.shape[1:])


def moved(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters a little off: behind a layer of zeros nothing would be seen."""
    found = {}
    for name, value in values.items():
        size = 0.3 / (value[0].numel() if value.dim() > 1 and len(value) else 10) ** 0.5
        found[name] = (value + size * torch.randn_like(value)).requires_grad_()
    return found
