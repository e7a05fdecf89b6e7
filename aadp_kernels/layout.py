"""Which tensor belongs to which layer: names, sizes and offsets of a ragged list of tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The tensors of a model and their grouping into layers. All of it is public.

    A layer is the unit of clipping: its tensors (weight and bias of one module) share one norm.

    Attributes:
        names: Tensor (parameter) names in order, T of them.
        shapes: Shape of each tensor, without a leading batch or cohort dimension.
        layer_names: One name a layer, L of them.
        layer_of: Layer index of each tensor.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    layer_names: tuple[str, ...]
    layer_of: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.shapes) == len(self.layer_of):
            raise ValueError(
                "names, shapes and layer_of must have one entry a tensor, got "
                f"{len(self.names)}, {len(self.shapes)} and {len(self.layer_of)}"
            )
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"names must be distinct, got {self.names}")
        if len(set(self.layer_names)) != len(self.layer_names):
            raise ValueError(f"layer_names must be distinct, got {self.layer_names}")
        if set(self.layer_of) != set(range(len(self.layer_names))):
            raise ValueError(
                f"layer_of must use every layer index 0..{len(self.layer_names) - 1}, "
                f"got {self.layer_of}"
            )

    @classmethod
    def build(
        cls,
        tensors: Mapping[str, Tensor] | Sequence[Tensor],
        groups: Mapping[str, str] | Sequence[int] | None = None,
    ) -> Layout:
        """Lay out tensors, for instance `Layout.build(dict(model.named_parameters()))`.

        Args:
            tensors: Parameters (or anything of their shapes), by name or in order.
            groups: Layer name of each tensor name, or layer index 0..L-1 of each tensor. By default
                named tensors are grouped by module ("conv1.weight", "conv1.bias" -> "conv1") and
                unnamed ones are a layer each.

        Returns:
            The layout; layers stand in order of first appearance, or by index.

        Raises:
            ValueError: No tensors, a complex one; groups that miss a tensor, name an unknown one or
                skip an index.

        Edge cases:
            A name without a dot is a layer of its own. A 0-d tensor has one element. A tensor
            without elements is allowed.
        """
        if isinstance(tensors, Mapping):
            names, values = tuple(tensors), tuple(tensors.values())
        else:
            values = tuple(tensors)
            names = tuple(str(i) for i in range(len(values)))
        if not names:
            raise ValueError("tensors must not be empty")
        for name, tensor in zip(names, values, strict=True):
            if tensor.is_complex():
                raise ValueError(
                    f"tensors: {name!r} is {tensor.dtype}, and clipping is for real numbers; hold "
                    "a complex one as two real ones"
                )
        shapes = tuple(torch.Size(t.shape) for t in values)
        layer_names, layer_of = _group(names, groups, named=isinstance(tensors, Mapping))
        return cls(names, shapes, layer_names, layer_of)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple:
        # Hashes of strings differ from process to process.
        return Layout, (self.names, self.shapes, self.layer_names, self.layer_of)

    @cached_property
    def _hash(self) -> int:
        """Kept, since layouts are the keys of what is made once for each."""
        return hash((self.names, self.shapes, self.layer_names, self.layer_of))

    @property
    def num_layers(self) -> int:
        """Number of layers L."""
        return len(self.layer_names)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each tensor."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def elements(self) -> int:
        """Elements of all tensors."""
        return sum(self.sizes)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Element offset of each tensor inside its layer."""
        filled = [0] * self.num_layers
        offsets = []
        for layer, size in zip(self.layer_of, self.sizes, strict=True):
            offsets.append(filled[layer])
            filled[layer] += size
        return tuple(offsets)

    @cached_property
    def dims(self) -> tuple[int, ...]:
        """Elements d_l of each layer."""
        filled = [0] * self.num_layers
        for layer, size in zip(self.layer_of, self.sizes, strict=True):
            filled[layer] += size
        return tuple(filled)

    @cached_property
    def largest(self) -> int:
        """Elements of the largest layer."""
        return max(self.dims)

    @cached_property
    def segments(self) -> tuple[tuple[int, int, int], ...]:
        """(layer, first element, elements) of every layer that has elements."""
        return tuple((i, 0, dim) for i, dim in enumerate(self.dims) if dim)

    @cached_property
    def filled(self) -> tuple[int, ...]:
        """Indices of the layers that have elements."""
        return tuple(i for i, dim in enumerate(self.dims) if dim)

    @cached_property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """Tensor indices of each layer, in order."""
        return tuple(
            tuple(i for i, layer in enumerate(self.layer_of) if layer == index)
            for index in range(self.num_layers)
        )

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Tensor indices, layer after layer."""
        return tuple(i for members in self.members for i in members)

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """Where in `order` each layer begins, and its end: L + 1 of them."""
        return tuple(accumulate((len(members) for members in self.members), initial=0))


def _group(
    names: tuple[str, ...], groups: Mapping[str, str] | Sequence[int] | None, *, named: bool
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Layer names and the layer index of each tensor."""
    if groups is None:
        labels = [name.rpartition(".")[0] or name if named else name for name in names]
    elif isinstance(groups, Mapping):
        missing, unknown = set(names) - set(groups), set(groups) - set(names)
        if missing or unknown:
            raise ValueError(
                f"groups must name every tensor once; missing {sorted(missing)}, "
                f"unknown {sorted(unknown)}"
            )
        labels = [groups[name] for name in names]
    else:
        if len(groups) != len(names) or any(isinstance(g, bool) or int(g) != g for g in groups):
            raise ValueError(f"groups must be one layer index a tensor, got {groups!r}")
        layer_of = tuple(int(g) for g in groups)
        if set(layer_of) != set(range(max(layer_of) + 1)):
            raise ValueError(f"groups must use every index from 0 on, got {groups!r}")
        return tuple(f"layer{i}" for i in range(max(layer_of) + 1)), layer_of
    layer_names = tuple(dict.fromkeys(labels))
    index = {name: i for i, name in enumerate(layer_names)}
    return layer_names, tuple(index[label] for label in labels)
