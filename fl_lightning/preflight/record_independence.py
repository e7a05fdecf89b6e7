"""Whether the gradients of a run are those of the network, and a record's its own alone.

Clipping bounds what one record does only if nothing else of it reaches the sum: not through the
outputs of the records beside it, and not through their gradients on the way back. So gradients are
compared, of a record alone and among others, by the very function that the run trains with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fl_lightning.networks.state import in_place
from fl_lightning.values.round import Params

# (parameters, x [k, B, ...], y [k, B], mask [k, B]) -> sums over records, each [k, ...].
SummedGradients = Callable[[Params, Tensor, Tensor, Tensor], Params]
Loss = Callable[[Tensor, Tensor], Tensor]

# Of the norms that are compared: what float32 sums in another order, or TF32, may differ by.
_RTOL = 1e-3


@dataclass(frozen=True)
class Case:
    """Records of one client [B, ...], and which of them count."""

    x: Tensor
    y: Tensor
    mask: Tensor


def autograd_gradients(
    network: nn.Module, loss: Loss, values: Params, x: Tensor, y: Tensor
) -> Params:
    """Gradients of the summed loss, by autograd on the network itself, in which the values lie."""
    with in_place(network, values), torch.enable_grad():
        parameters = dict(network.named_parameters())
        wanted = [parameters[name] for name in values]
        total = loss(network(x.clone()), y).sum()
        found = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
    return {name: g.detach() for name, g in zip(values, found, strict=True)}


def parameters_at_rest(network: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> list[str]:
    """Names of trained parameters whose gradient is exactly 0 where training starts.

    Args:
        network: in which the parameters lie.
        loss: of each record.
        x, y: some records [B, ...] and their targets.
    """
    values = {n: p.detach().clone() for n, p in network.named_parameters() if p.requires_grad}
    found = autograd_gradients(network, loss, values, x, y)
    return [name for name, gradient in found.items() if not bool(gradient.any())]


def foreign_gradient(
    summed: SummedGradients, values: Params, want: Params, x: Tensor, y: Tensor
) -> str:
    """Why the run's gradient is not that of the network; "" if it is.

    Args:
        summed: of the run.
        values: parameters, other than those that the network holds.
        want: gradients of the same records by autograd on the network itself.
        x, y: the records [B, ...].
    """
    everyone = Case(x, y, torch.ones(len(x), device=x.device))
    (have,) = _each(summed, values, [everyone], at_once=1)
    name = _differing(have, want)
    if not name:
        return ""
    return (
        f"the gradient of parameter '{name}' in the run is not what autograd finds in the network "
        "itself; reach parameters through the modules that hold them, not through a list or a "
        "closure, and hang no hooks on them"
    )


def mixed_records(
    summed: SummedGradients, values: Params, x: Tensor, y: Tensor, *, at_once: int
) -> str:
    """Why a record's gradient is not a matter of that record alone; "" if it is.

    The computation must be a function of its arguments, with nothing drawn.

    Args:
        summed: of the run.
        values: parameters.
        x, y: records that differ, [B, ...], B >= 2.
        at_once: clients that are computed together.
    """
    size = len(x)
    places = sorted({0, size // 2, size - 1})
    everyone = torch.ones(size, device=x.device)
    alone = _each(
        summed, values, [Case(x[i : i + 1], y[i : i + 1], everyone[:1]) for i in range(size)],
        at_once=at_once,
    )  # fmt: skip
    cases, wanted = [Case(x, y, everyone)], [added_up(alone)]
    for i in places:
        only = torch.zeros_like(everyone)
        only[i] = 1
        turned = torch.arange(size - 1, -1, -1, device=x.device)
        first = x[[i]].expand_as(x)
        padding = torch.zeros_like(x)
        padding[i] = x[i]
        cases += [
            Case(x, y, only),  # the others do not count
            Case(x[turned], y[turned], only[turned]),  # elsewhere
            Case(padding, y, only),  # beside padding
            Case(first, y[[i]].expand_as(y), everyone),  # beside itself
            Case(x, y, 1 - only),  # the others without it
        ]
        own = alone[i]
        wanted += [own, own, own, {n: size * g for n, g in own.items()}]
        wanted.append(added_up(alone[:i] + alone[i + 1 :]))
    for have, want in zip(_each(summed, values, cases, at_once=at_once), wanted, strict=True):
        if name := _differing(have, want):
            return _mixed(name)
    return ""


def interacting_records(
    summed: SummedGradients, values: Params, x: Tensor, y: Tensor, seed: Callable[[], None]
) -> str:
    """`mixed_records` for networks that draw random numbers, the same for equal shapes and seeds.

    Where records are added up, what changes with the first record does not change with the last;
    and with one record alone counting, nothing changes with all the others.

    Args:
        summed: of the run.
        values: parameters.
        x, y: records that differ, [B, ...], B >= 3.
        seed: sets the random state.
    """
    everyone, size = torch.ones(len(x), device=x.device), len(x)
    first, last = [*range(size)], [*range(size)]
    first[0], last[-1] = size // 2, size // 2
    both = [first[0], *last[1:]]

    def gradient(rows: Sequence[int], mask: Tensor) -> Params:
        seed()
        case = Case(x[[*rows]], y[[*rows]], mask)
        return _each(summed, values, [case], at_once=1)[0]

    whole, one, other, two = (gradient(r, everyone) for r in (range(size), first, last, both))
    name = _differing(added_up([whole, two]), added_up([one, other]))
    for i in (0, size // 2, size - 1):
        only = torch.zeros_like(everyone)
        only[i] = 1
        # All the others change: what is taken of the largest may be of any of them.
        name = name or _differing(gradient(range(size), only), gradient([i] * size, only))
    return _mixed(name) if name else ""


def _each(
    summed: SummedGradients, values: Params, cases: Sequence[Case], *, at_once: int
) -> list[Params]:
    """Gradients of cases of equal shape, a client each."""
    found: list[Params] = []
    for start in range(0, len(cases), at_once):
        part = cases[start : start + at_once]
        x, y, mask = (torch.stack([getattr(c, n) for c in part]) for n in ("x", "y", "mask"))
        grads = summed(values, x, y, mask)
        found += [{n: g[i].detach() for n, g in grads.items()} for i in range(len(part))]
    return found


def added_up(gradients: Sequence[Params]) -> Params:
    """The sum of gradients, at least one."""
    return {n: torch.stack([g[n] for g in gradients]).sum(0) for n in gradients[0]}


def _differing(have: Params, want: Params) -> str:
    """Name of a tensor that differs by more than rounding; "" for none."""
    sizes = {n: max(float(have[n].norm()), float(want[n].norm())) for n in want}
    floor = 1e-5 * max(sizes.values())
    for name, size in sizes.items():
        if not float((have[name] - want[name]).norm()) <= _RTOL * size + floor + 1e-12:
            return name
    return ""


def _mixed(name: str) -> str:
    return (
        f"a record's gradient of parameter '{name}' changes with the records beside it, so no "
        "clipping of single records bounds what one of them does; compute every record by itself, "
        "forwards and backwards"
    )
