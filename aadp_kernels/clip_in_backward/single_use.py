"""Whether every layer that clips is used once in a forward, by itself, on the records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from aadp_kernels.clip_in_backward.modules import ClippingLayer, UnsupportedLayerError
from aadp_kernels.clip_in_backward.watched import some_records


def check_single_use(model: nn.Module, *example: Any, **keywords: Any) -> None:
    """Raise unless every parameter is used once in a forward, by its own layer, on the records.

    Uses of a layer would be clipped one by one, and a record could contribute twice the clip norm;
    a parameter used outside of its layer would not be clipped at all. A layer whose first axis is
    not the records, but positions or positions of records, would clip each of those by itself.

    Args:
        model: The result of `with_clipping`.
        *example: A batch [B, ...] of the model's inputs; its values do not matter.
        **keywords: Inputs that the model takes by name.

    Raises:
        UnsupportedLayerError: Names the layer and the number of calls or of rows, or the parameter.

    Guarantees:
        Leaves the model and the global random state as they were.

    Edge cases:
        Only the path that the example takes through the model is seen; `WatchedForward` sees all.
    """
    first = next(
        (t for t in tree_leaves((example, keywords)) if isinstance(t, Tensor) and t.dim()), None
    )
    records = -1 if first is None else len(first)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    # One record, then two: no other axis has both lengths.
    for count in (1, 2):
        pick = partial(some_records, records=records, count=count)
        output, calls = _calls(model, tree_map(pick, example), tree_map(pick, keywords))
        for name, rows in calls.items():
            label = name or "<model>"
            if len(rows) > 1:
                raise UnsupportedLayerError(f"{label} is used {len(rows)} times in one forward")
            if rows != [count]:
                raise UnsupportedLayerError(
                    f"{label} gets {rows[0]} rows for {count} record(s): the first axis of what it "
                    "gets must be the records"
                )
        for user, parameter in _uses(output):
            if not user.endswith("ClippedLayerBackward") and id(parameter) in names:
                raise UnsupportedLayerError(
                    f"the parameter {names[id(parameter)]!r} is used outside of its layer, by "
                    f"{user}"
                )


def _calls(
    model: nn.Module, example: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[Any, dict[str, list[int]]]:
    """Outputs, and the length of the first axis in every call of each layer that clips."""
    rows: dict[str, list[int]] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        return lambda _, args, kwargs: rows.setdefault(name, []).append(
            len((*args, *kwargs.values())[0])
        )

    handles = [
        module.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, ClippingLayer)
    ]
    try:
        with torch.enable_grad(), torch.random.fork_rng():
            return model(*example, **keywords), rows
    finally:
        for handle in handles:
            handle.remove()


def _uses(output: object) -> Iterator[tuple[str, Tensor]]:
    """(name of the operation, leaf tensor) of every use of a leaf in the graph of an output."""
    nodes = [t.grad_fn for t in tree_leaves(output) if isinstance(t, Tensor)]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for parent, _ in node.next_functions:
            leaf = getattr(parent, "variable", None)
            if leaf is None:
                nodes.append(parent)
            else:
                yield node.name(), leaf
