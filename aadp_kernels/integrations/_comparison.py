"""Outputs and gradients of a few records, alone and among others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aadp_kernels.integrations._lending import Lender
from aadp_kernels.integrations._records import Pair, pairs, tensors_of
from aadp_kernels.integrations._trial import (
    buffers_as_they_were,
    random_states_as_they_were,
    saved_apart,
)

_SEEDS = (0, 1, 2)
# Of the gradients that are sent back: a hook may act on large ones alone.
_FACTORS = (1.0, 1e3)
# Two norms may differ by these parts of the larger one, and of the largest of all.
_RELATIVE = {torch.float64: 1e-7, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TF32, _FLOOR = 5e-3, 1e-5
_REMEDY = (
    "so clipping single records does not bound what one of them does; compute every record by "
    "itself, forwards and backwards (GroupNorm or LayerNorm in the place of statistics of the "
    "batch, no hook or autograd.Function that looks at several records)"
)

Named = dict[str, Tensor]


@dataclass(frozen=True)
class _Sent:
    """What is sent back to the outputs for some records, the same alone and among others.

    Args:
        batch: Outputs for all of them.
        ones: Outputs for each by itself.
        gradients: What is sent back to the parts of each record.
        weights: Of the gradients of each record's parameters.
        turned: As for `pairs`.
    """

    batch: list[Tensor]
    ones: list[list[Tensor]]
    gradients: list[list[Tensor]]
    weights: Tensor
    turned: bool

    @staticmethod
    def back(
        batch: list[Tensor], ones: list[list[Tensor]], both: Sequence[Sequence[Pair]],
        *, turned: bool, factor: float, seed: int,
    ) -> _Sent:  # fmt: skip
        """Random numbers of the shapes that a record has in both."""
        gradients = [
            _randn([one for _, one in mine], factor, seed + i) for i, mine in enumerate(both)
        ]
        weights = 0.5 + torch.rand(len(ones), generator=torch.Generator().manual_seed(seed))
        return _Sent(batch, ones, gradients, weights, turned)

    def number(self, outputs: list[Tensor]) -> Tensor:
        """Outputs for all records times what is sent back."""
        found = pairs(outputs, self.ones, turned=self.turned)
        each = zip(found, self.gradients, strict=True)
        return torch.stack([_product([part for part, _ in mine], g) for mine, g in each]).sum()

    def number_of_one(self, i: int, outputs: list[Tensor]) -> Tensor:
        """The same of the i-th record by itself."""
        mine = pairs(self.batch, [*self.ones[:i], outputs, *self.ones[i + 1 :]])[i]
        return _product([one for _, one in mine], self.gradients[i])


class Comparison:
    """Runs of a model on a few records of a batch, which leave nothing behind.

    Args:
        model: Its buffers are put back after every run.
        lender: Of its gradients.
        take: The inputs (args, kwargs) for some records.
    """

    def __init__(
        self, model: nn.Module, lender: Lender, take: Callable[[Sequence[int]], Any]
    ) -> None:
        self._model, self._lender, self._take = model, lender, take
        self._own = lender.values()
        self._rtol = _tolerance(self._own)
        self._moved: dict[int, Named] = {}

    def draws(self, rows: Sequence[int]) -> bool:
        """Whether outputs change with the random state."""
        first, *others = (self._outputs(rows, seed=seed) for seed in _SEEDS)
        return any(self._differ(first, other) for other in others)

    def repeats(self, rows: Sequence[int]) -> bool:
        """Whether equal random states give equal outputs."""
        return not self._differ(self._outputs(rows), self._outputs(rows))

    def mixed(self, rows: Sequence[int]) -> str | None:
        """Why gradients of these records are not each record's own; "" if they are.

        What differs by rounding at a jump does so for no second set of parameters.

        Returns:
            None where fewer than two records have finite gradients.
        """
        reason: str | None = ""
        for factor in _FACTORS:
            reason = self._alone(rows, factor, 0) and self._alone(rows, factor, 1)
            if reason:
                break
        return reason

    def _alone(self, rows: Sequence[int], factor: float, moved: int) -> str | None:
        """`mixed` with one set of parameters and one factor of what is sent back."""
        if len(rows) < 2:
            return None
        batch = self._outputs(rows, moved=moved)
        ones = [self._outputs([row], moved=moved) for row in rows]
        turned = self._pairs_differ(pairs(batch, ones))
        both = pairs(batch, ones, turned=turned)
        if turned and self._pairs_differ(both):
            where = self._first(rows)
            return f"a record's outputs change with the records beside it{where}, {_REMEDY}"
        if not any(both):
            return self._alone_by_numbers(rows, moved)
        sent = _Sent.back(batch, ones, both, turned=turned, factor=factor, seed=moved)
        alone = [
            self._gradient([row], sent.weights[[i]], partial(sent.number_of_one, i), moved)
            for i, row in enumerate(rows)
        ]
        finite = [all(bool(g.isfinite().all()) for g in one.values()) for one in alone]
        if not all(finite):
            return self._alone([r for r, ok in zip(rows, finite, strict=True) if ok], factor, moved)
        have = self._gradient(rows, sent.weights, sent.number, moved)
        want = self._joined(alone)
        name = self._differing(have, want)
        return _mixing(name and self._differing(_in_order(have, want), want))

    def _alone_by_numbers(self, rows: Sequence[int], moved: int) -> str | None:
        """`mixed` of a model that gives the sum or the mean of its records' losses."""
        found = [t for t in self._outputs(rows, moved=moved) if t.requires_grad]
        if not found:
            return ""
        if any(t.dim() for t in found):
            return (
                "no output of the model has an axis of its records, so it is not known whether it "
                "mixes them; return a tensor with a row for every record"
            )

        def number(outputs: list[Tensor]) -> Tensor:
            return torch.stack([t for t in outputs if t.requires_grad]).sum()

        alone = [self._gradient([row], torch.ones(1), number, moved) for row in rows]
        have = self._gradient(rows, torch.ones(len(rows)), number, moved)
        want = self._joined(alone)
        if not self._differing({n: len(rows) * g for n, g in have.items()}, want):
            return ""
        return _mixing(self._differing(have, want))

    def interacting(self, rows: Sequence[int]) -> str:
        """As `mixed`, for a model that draws numbers: the same for equal shapes and seeds.

        Where records have gradients of their own, what changes with the first record does not
        change with the last.

        Args:
            rows: At least three.
        """
        batch, ones = self._outputs(rows), [self._outputs([row]) for row in rows]
        both = pairs(batch, ones)
        sent = _Sent.back(batch, ones, both, turned=False, factor=1.0, seed=0)
        middle = rows[len(rows) // 2]

        def gradient(some: Sequence[int], seed: int) -> Named:
            places = [rows.index(row) for row in some]
            moved = replace(
                sent, ones=[ones[i] for i in places],
                gradients=[sent.gradients[i] for i in places],
            )  # fmt: skip
            return self._gradient(some, sent.weights, moved.number, 0, seed=seed)

        first, last = [middle, *rows[1:]], [*rows[:-1], middle]
        for seed in _SEEDS if any(both) else ():
            whole, one, other, two = (
                gradient(some, seed) for some in (rows, first, last, [*first[:-1], middle])
            )
            have = {name: whole[name] + two[name] for name in whole}
            want = {name: one[name] + other[name] for name in whole}
            if name := self._differing(have, want):
                return _mixing(name)
        return ""

    def _gradient(
        self, rows: Sequence[int], weights: Tensor, number: Callable[[list[Tensor]], Tensor],
        moved: int, *, seed: int = 0,
    ) -> Named:  # fmt: skip
        """Gradients by name of a number that is made of the outputs."""
        with self._run(seed), self._lender.lend(self._values(moved), weights) as gradients:
            with saved_apart():
                found = number(self._applied(rows))
            return gradients(found)

    def _outputs(self, rows: Sequence[int], *, seed: int = 0, moved: int = 0) -> list[Tensor]:
        ones = torch.ones(len(rows))
        with self._run(seed), self._lender.lend(self._values(moved), ones), saved_apart():
            return self._applied(rows)

    def _applied(self, rows: Sequence[int]) -> list[Tensor]:
        args, kwargs = self._take(rows)
        return tensors_of(self._model(*args, **kwargs))

    @contextmanager
    def _run(self, seed: int) -> Iterator[None]:
        with random_states_as_they_were(seed), buffers_as_they_were(self._model):
            yield

    def _values(self, moved: int) -> Named:
        """Parameters a little off: behind a layer of zeros nothing would be seen."""
        if moved not in self._moved:
            self._moved = {moved: _moved(self._own, moved)}
        return self._moved[moved]

    def _joined(self, alone: Sequence[Named]) -> Named:
        return {name: self._lender.joined([g[name] for g in alone]) for name in alone[0]}

    def _first(self, rows: Sequence[int]) -> str:
        """Where a record's values are seen first to change with others: ", first behind 'name'"."""
        seen: list[tuple[str, list[Tensor]]] = []

        def values(some: Sequence[int]) -> list[tuple[str, list[Tensor]]]:
            seen.clear()
            self._outputs(some)
            return [*seen]

        hooks = [
            module.register_forward_hook(
                lambda _m, _a, output, name=name: seen.append((name, tensors_of(output)))
            )
            for name, module in self._model.named_modules()
        ]
        try:
            batch, ones = values(rows), [values([row]) for row in rows]
        finally:
            for hook in hooks:
                hook.remove()
        for (name, whole), *single in zip(batch, *ones, strict=False):
            if name and self._pairs_differ(pairs(whole, [tensors for _, tensors in single])):
                return f", first seen behind {name!r}"
        return ""

    def _differ(self, one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
        return [t.shape for t in one] != [t.shape for t in other] or any(
            self._apart([pair]) for pair in zip(one, other, strict=True)
        )

    def _pairs_differ(self, found: Sequence[Sequence[Pair]]) -> bool:
        return any(self._apart(of_one_output) for of_one_output in zip(*found, strict=False))

    def _apart(self, found: Sequence[Pair]) -> bool:
        """Whether the two of a pair differ, where both are finite or both are not."""
        sizes = [_clean(one).norm() for _, one in found]
        floor = _FLOOR * torch.stack(sizes).amax()
        for (part, one), size in zip(found, sizes, strict=True):
            apart = (_clean(part) - _clean(one)).norm()
            if bool(apart > self._rtol * size + floor + 1e-30):
                return True
            if bool((part.detach().isfinite() != one.detach().isfinite()).any()):
                return True
        return False

    def _differing(self, have: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> str:
        """Name of the last parameter with another gradient, of any row; "" for none."""
        norms = {n: _row_norms(g) for n, g in want.items()}
        floor = _FLOOR * max(float(size.amax()) for size in norms.values()) + 1e-30
        for name, size in reversed(norms.items()):
            bound = self._rtol * torch.maximum(size, _row_norms(have[name])) + floor
            if not bool((_row_norms(have[name] - want[name]) <= bound).all()):
                return name
        return ""


def _mixing(name: str) -> str:
    if not name:
        return ""
    return f"a record's gradient of {name!r} changes with the records beside it, {_REMEDY}"


def _in_order(have: Named, want: Named) -> Named:
    """Rows in the order of the records, if it is one for all parameters (packed sequences)."""
    rows, wanted = (
        torch.cat([g.reshape(len(g), -1) for g in named.values()], 1) for named in (have, want)
    )
    order = torch.cdist(wanted, rows).argmin(1).tolist()
    if sorted(order) != [*range(len(rows))]:
        return have
    return {name: grad[order] for name, grad in have.items()}


def _row_norms(value: Tensor) -> Tensor:
    return value.detach().reshape(len(value), -1).norm(dim=1).double().cpu()


def _clean(value: Tensor) -> Tensor:
    return value.detach().double().nan_to_num(0, 0, 0)


def _product(values: Sequence[Tensor], back: Sequence[Tensor]) -> Tensor:
    """Sum of the products of outputs and what is sent back to them."""
    found = [
        (value * b[tuple(map(slice, value.shape))].to(value)).sum()
        for value, b in zip(values, back, strict=True)
        if value.requires_grad
    ]
    return torch.stack([f.float() for f in found]).sum() if found else torch.zeros(())


def _randn(like: Sequence[Tensor], factor: float, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [factor * torch.randn(value.shape, generator=generator) for value in like]


def _moved(values: Mapping[str, Tensor], seed: int) -> Named:
    """Other values near these; numbers are repeated, for they cost more than a forward."""
    numbers = torch.randn(65537, generator=torch.Generator().manual_seed(seed))
    found = {}
    for name, value in values.items():
        size = 0.3 / (value[0].numel() if value.dim() > 1 and len(value) else 10) ** 0.5
        times = -(-value.numel() // len(numbers))
        by = numbers.repeat(times)[: value.numel()].view(value.shape)
        found[name] = value + size * by.to(value)
    return found


def _tolerance(values: Mapping[str, Tensor]) -> float:
    """By how much of a norm the order of summation may change it."""
    kinds = {value.device.type for value in values.values()}
    dtypes = {value.dtype for value in values.values()}
    dtypes |= {torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}
    found = max(_RELATIVE.get(dtype, 1e-4) for dtype in dtypes)
    # Kernels for few and for many rows may round inputs to TF32 or not.
    return found if kinds <= {"cpu"} else max(found, _TF32)
