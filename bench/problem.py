"""What a case asks for: data, clip norms, noise, and what must come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from aadp_kernels import Layout
from bench.cases import Case

SIZE = 1e-2  # standard deviation of the values
L2_CACHE = 128 << 20  # bytes, over twice the largest cache
ENOUGH = 10_000  # results to check noise with, even beyond a budget
LEVELS = ("layer", "tensor", "all")


@dataclass
class Problem:
    """Clip and noise the updates of a case (or clip, sum and noise per-sample gradients).

    Attributes:
        layout: Layers of one unit.
        tensors: [rows, *shape], or *shape where `rows` is None.
        rows: Clients, or samples, that are clipped each for itself.
        p: Norm of the clipping.
        mechanism: "laplace" or "gaussian".
        scale: Scale of the noise, one number.
        clip: Clip norms [L] of the layers.
        reference: What is subtracted first, or None.
        summed: Whether the result is the sum over the rows.
    """

    layout: Layout
    tensors: list[Tensor]
    rows: int | None
    p: int
    mechanism: str
    scale: float
    clip: Tensor
    reference: list[Tensor] | None = None
    summed: bool = False
    step: int = field(default=0, repr=False)

    @classmethod
    def build(
        cls,
        case: Case,
        device: torch.device,
        *,
        p: int,
        mechanism: str,
        dtype: torch.dtype = torch.float32,
        reference: bool = False,
        rows: int | None = None,
        summed: bool = False,
    ) -> Problem:
        """Gaussian values; clip norms are 0.7 of the typical norm, so that everything is clipped.

        The values are those of 2^20 numbers again and again, each tensor beginning elsewhere.
        """
        rows = rows or case.clients
        layout = case.layout()
        lead = () if rows is None else (rows,)
        generator = torch.Generator().manual_seed(7)
        pool = SIZE * torch.randn((1 << 20) - 3, generator=generator)
        pool = pool.to(device=device, dtype=dtype)
        tensors, start = [], 0
        for shape in layout.shapes:
            size = torch.Size((*lead, *shape)).numel()
            index = (start + size) // len(pool) + 1
            flat = pool.repeat(index)[start : start + size] if size else pool[:0]
            tensors.append(flat.clone().view(*lead, *shape))
            start = (start + size) % len(pool)
        dims = torch.tensor(layout.dims, dtype=torch.float64)
        norm = dims * SIZE * (2 / torch.pi) ** 0.5 if p == 1 else SIZE * dims.sqrt()
        start_at = [0.1 * t[0] if lead else 0.1 * t for t in tensors] if reference else None
        # As large as a typical element of the result, which all forms of noise can hold.
        scale = SIZE * (rows**0.5 if summed and rows else 1.0)
        return cls(
            layout, tensors, rows, p, mechanism, scale, (0.7 * norm).to(device), start_at, summed
        )

    @cached_property
    def buffers(self) -> list[list[Tensor]]:
        """Copies to work on, shared by all sides; on a GPU so many that together they are cold."""
        size = sum(t.nbytes for t in self.tensors)
        copies = min(64, 1 + L2_CACHE // max(size, 1)) if self.device.type == "cuda" else 1
        return [[t.clone() for t in self.tensors] for _ in range(copies)]

    def end(self, value: Tensor, budget: int) -> Tensor:
        """[rows, n]: the last elements of each row of a result, about `budget` in all."""
        rows = 1 if self.rows is None or self.summed else self.rows
        return value.reshape(rows, -1)[:, -max(1, budget // rows) :].clone()

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def elements(self) -> int:
        return sum(t.numel() for t in self.tensors)

    def least_bytes(self) -> int:
        """Bytes that any implementation reads and writes: everything read once, results written."""
        read = sum(t.nbytes for t in self.tensors)
        if self.reference is not None:
            read += sum(t.nbytes for t in self.reference)
        rows = self.rows if self.summed and self.rows else 1
        return read + sum(t.nbytes for t in self.tensors) // rows

    def groups(self, level: str) -> list[tuple[tuple[int, ...], Tensor]]:
        """Tensors that share one norm and their joint clip norm: per layer, per tensor or all.

        The clip norms of another level are such that as much is clipped.
        """
        members, sizes = self.layout.members, self.layout.sizes
        if level == "layer":
            return list(zip(members, self.clip, strict=True))
        power = 1.0 / self.p
        share = [
            (i, self.clip[layer] * (sizes[i] / self.layout.dims[layer]) ** power)
            for i, layer in enumerate(self.layout.layer_of)
        ]
        if level == "tensor":
            return [((i,), clip) for i, clip in share]
        total = torch.stack([clip for _, clip in share]).norm(self.p)
        return [(tuple(range(len(sizes))), total)]

    def updates(self, indices: Sequence[int]) -> list[Tensor]:
        """Float64 [rows, n] of some tensors, less their reference."""
        parts = []
        for i in indices:
            value = self.tensors[i].double()
            if self.reference is not None:
                value = value - self.reference[i].double()
            parts.append(value.reshape(self.rows or 1, -1))
        return parts

    def expected(self, level: str, budget: int) -> dict[int, Tensor]:
        """Clipped values (or sums), float64, without noise, of tensors of about `budget` elements.

        Groups are taken from both ends in turn, so that an offset lost on the way shows.
        """
        groups, found, taken = self.groups(level), {}, 0
        order = [i // 2 if i % 2 == 0 else -1 - i // 2 for i in range(len(groups))]
        for g in order:
            indices, clip = groups[g]
            size = sum(self.tensors[i].numel() for i in indices)
            if sum(map(Tensor.numel, found.values())) >= ENOUGH and taken + size > budget:
                continue
            parts = self.updates(indices)
            norms = torch.stack([part.norm(self.p, dim=1) for part in parts])
            factor = (clip / norms.norm(self.p, dim=0)).clamp(max=1.0)
            for i, part in zip(indices, parts, strict=True):
                value = part * factor[:, None]
                shape = self.layout.shapes[i]
                found[i] = (
                    value.sum(0).view(shape) if self.summed else value.view_as(self.tensors[i])
                )
            taken += size
        return found
