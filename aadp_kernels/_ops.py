"""The public functions as torch.library operators, for torch.compile and torch.func.

Eager calls never come here: dispatch through an operator costs more than a small release. Under a
tracer a public function hands over to its `traced_` twin, whose operator runs the public function
when the graph runs. Key words and step are tensors in every schema: what a graph holds as a
constant would be in its cache and would repeat the noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from aadp_kernels._torch.privatize import ClipStats
from aadp_kernels.layout import Layout

if TYPE_CHECKING:
    from aadp_kernels.noise import NoiseKey

P = ParamSpec("P")
R = TypeVar("R")


def tracing() -> bool:
    """Whether torch.compile or a torch.func transform is at work."""
    return torch.compiler.is_compiling() or peek_interpreter_stack() is not None


def without_grad(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.no_grad()` for eager calls only.

    In a graph it would be two operations, and an error between them would leave gradients
    disabled for the rest of the process; the `traced_` twins detach their inputs instead.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_grad_enabled() or tracing():
            return function(*args, **kwargs)
        # What `torch.no_grad()` does, without its ten calls in Python.
        torch._C._set_grad_enabled(False)
        try:
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(True)

    return call


def _detached(tensors: Sequence[Tensor] | None) -> list[Tensor]:
    """The same values without history; none for None."""
    return [t.detach() for t in tensors or ()]


def _check(name: str, tensors: Sequence[Tensor], layout: Layout, lead: tuple[int, ...]) -> None:
    """Shapes against the layout, of which the operator sees no more than `layer_of`."""
    from aadp_kernels.privatize import check_tensors

    check_tensors(name, tensors, layout, lead)


@lru_cache(maxsize=64)
def _layout(shapes: tuple[torch.Size, ...], layer_of: tuple[int, ...]) -> Layout:
    """A layout of these shapes; names do not matter any more."""
    layers = tuple(f"layer{i}" for i in range(max(layer_of) + 1))
    return Layout(tuple(map(str, range(len(shapes)))), shapes, layers, layer_of)


def _layout_of(tensors: Sequence[Tensor], layer_of: Sequence[int], lead: int) -> Layout:
    """The layout of tensors with `lead` leading dimensions."""
    return _layout(tuple(t.shape[lead:] for t in tensors), tuple(layer_of))


def _address(key: NoiseKey | None, step: int | Tensor) -> tuple[Tensor | None, Tensor, str]:
    """(key words, step, generator) as an operator takes them."""
    if not isinstance(step, Tensor):
        step = torch.full((), step, dtype=torch.int64)
    return (None, step, "") if key is None else (key.word_tensor, step, key.rng)


def _key(words: Tensor | None, rng: str) -> NoiseKey | None:
    """The key that owns the words: the caller's own object where it is still alive."""
    from aadp_kernels.noise import NoiseKey

    return None if words is None else NoiseKey.from_word_tensor(words, rng)


def _step(step: Tensor) -> int | Tensor:
    """A step on the CPU is a number again; one on an accelerator is not read."""
    return int(step) if step.device.type == "cpu" else step


def _empty(like: Tensor, shape: Sequence[Any], dtype: torch.dtype = torch.float64) -> Tensor:
    """A new tensor on the same device."""
    return torch.empty(tuple(shape), dtype=dtype, device=like.device)


def _fake_stats(like: Tensor, shape: Sequence[Any], norms: Sequence[Any]) -> list[Tensor]:
    """Tensors of the shapes of ClipStats."""
    counts = [_empty(like, shape, torch.int64) for _ in range(2)]
    return [_empty(like, norms), _empty(like, shape), *counts]


# layer_norms


@torch.library.custom_op("aadp_kernels::layer_norms", mutates_args=())
def layer_norms(
    tensors: Sequence[Tensor],
    reference: Sequence[Tensor],
    layer_of: Sequence[int],
    p: int,
    cohort: bool,
) -> Tensor:
    """`privatize.layer_norms`; an empty reference is none."""
    from aadp_kernels import privatize

    return privatize.layer_norms(
        tensors, layout=_layout_of(tensors, layer_of, int(cohort)), p=p, cohort=cohort,
        reference=list(reference) or None,
    )  # fmt: skip


@layer_norms.register_fake
def _(tensors, reference, layer_of, p, cohort):
    return _empty(tensors[0], [*tensors[0].shape[: int(cohort)], max(layer_of) + 1])


@layer_norms.register_vmap
def _(info, in_dims, tensors, reference, layer_of, p, cohort):
    size = info.batch_size
    tensors = _rows(tensors, in_dims[0], size)
    if any(dim is not None for dim in in_dims[1] or ()):
        pairs = zip(tensors, _rows(reference, in_dims[1], size), strict=True)
        # A cohort shares its reference; in float64 the difference is the one the operator takes.
        tensors = [
            t.to(torch.float64) - (r.unsqueeze(1) if cohort else r).to(torch.float64)
            for t, r in pairs
        ]
        reference = []
    if not cohort:
        return layer_norms(tensors, reference, layer_of, p, True), 0
    flat = [t.flatten(0, 1) for t in tensors]
    return layer_norms(flat, reference, layer_of, p, True).unflatten(0, (size, -1)), 0


def traced_layer_norms(
    tensors: Sequence[Tensor], layout: Layout, p: int, reference: Any, cohort: bool
) -> Tensor:
    """`privatize.layer_norms` for a tracer."""
    _check("tensors", tensors, layout, tuple(tensors[0].shape[:1]) if cohort else ())
    return layer_norms(_detached(tensors), _detached(reference), list(layout.layer_of), p, cohort)


# privatize_


@torch.library.custom_op("aadp_kernels::privatize_", mutates_args=("out",))
def privatize_(
    out: Sequence[Tensor],
    tensors: Sequence[Tensor],
    reference: Sequence[Tensor],
    layer_of: Sequence[int],
    clip: Tensor,
    scale: Tensor,
    votes_at: Tensor | None,
    clients: Tensor | None,
    key: Tensor | None,
    step: Tensor,
    rng: str,
    p: int,
    mechanism: str,
    form: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`privatize.privatize_`; without tensors `out` is what is privatised."""
    from aadp_kernels import privatize

    stats = privatize.privatize_(
        list(tensors) or out, layout=_layout_of(out, layer_of, int(clients is not None)),
        clip=clip, scale=scale, p=p, mechanism=mechanism, key=_key(key, rng), step=_step(step),
        clients=clients, reference=list(reference) or None, out=out, votes_at=votes_at, form=form,
        impl=impl,
    )  # fmt: skip
    assert stats.l1_norm is not None
    return stats.l1_norm, stats.votes, stats.clipped, stats.nonfinite


@privatize_.register_fake
def _(out, tensors, reference, layer_of, clip, scale, votes_at, clients, *others):
    shape = [*out[0].shape[: int(clients is not None)], max(layer_of) + 1]
    return tuple(_fake_stats(out[0], shape, shape))


@privatize_.register_vmap
def _(info, in_dims, *args):
    raise RuntimeError(
        "privatize_ writes in place and cannot run under torch.func.vmap: call it outside, with "
        "tensors [K, ...] and clients [K]"
    )


def traced_privatize_(
    tensors: Sequence[Tensor],
    layout: Layout,
    *,
    clip: Tensor,
    scale: Tensor,
    p: int,
    mechanism: str,
    key: NoiseKey | None,
    step: int | Tensor,
    clients: Tensor | None,
    reference: Sequence[Tensor] | None,
    out: Sequence[Tensor] | None,
    votes_at: Tensor | None,
    form: str,
    impl: str,
) -> ClipStats:
    """`privatize.privatize_` for a tracer."""
    lead = () if clients is None else (clients.shape[0],)
    target = _detached(tensors if out is None else out)
    in_place = out is None or all(a is b for a, b in zip(tensors, out, strict=True))
    source = [] if in_place else _detached(tensors)
    _check("tensors", tensors, layout, lead)
    _check("out", target, layout, lead)
    if reference is not None:
        _check("reference", reference, layout, ())
    words, step, rng = _address(key, step)
    stats = privatize_(
        target, source, _detached(reference), list(layout.layer_of), clip, scale, votes_at,
        clients, words, step, rng, p, mechanism, form, impl,
    )  # fmt: skip
    return ClipStats(*stats)


# clip_sum_noise


@torch.library.custom_op("aadp_kernels::clip_sum_noise", mutates_args=())
def clip_sum_noise(
    per_sample: Sequence[Tensor],
    accumulate: Sequence[Tensor],
    layer_of: Sequence[int],
    clip: Tensor,
    scale: Tensor | None,
    mask: Tensor | None,
    votes_at: Tensor | None,
    client: Tensor,
    key: Tensor | None,
    step: Tensor,
    rng: str,
    p: int,
    mechanism: str,
    last: bool,
    form: str,
    impl: str,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """`clip_sum.clip_sum_noise`, with new sums instead of those accumulated in place."""
    from aadp_kernels import clip_sum

    sums, stats = clip_sum.clip_sum_noise(
        per_sample, layout=_layout_of(per_sample, layer_of, 1), clip=clip, scale=scale, p=p,
        mechanism=mechanism, key=_key(key, rng), step=_step(step), client=client, mask=mask,
        votes_at=votes_at, accumulate=[t.clone() for t in accumulate] or None, last=last,
        form=form, impl=impl,
    )  # fmt: skip
    l1_norm = _empty(clip, (0,)) if stats.l1_norm is None else stats.l1_norm
    return sums, l1_norm, stats.votes, stats.clipped, stats.nonfinite


@clip_sum_noise.register_fake
def _(
    per_sample, accumulate, layer_of, clip, scale, mask, votes_at, client, key, step, rng, p,
    mechanism, last, form, impl,
):  # fmt: skip
    layers = max(layer_of) + 1
    exact = torch.int64 if form == "grid" and scale is not None else torch.float64
    sums = [_empty(t, t.shape[1:], t.dtype if last else exact) for t in per_sample]
    rows = [per_sample[0].shape[0], layers] if p == 1 or votes_at is not None else [0]
    return sums, *_fake_stats(per_sample[0], [layers], rows)


@clip_sum_noise.register_vmap
def _(info, in_dims, per_sample, accumulate, layer_of, *rest):
    dims, names = in_dims[3:], ("clip", "scale", "mask", "votes_at", "client", "key", "step")
    batched: dict[str, Any] = dict(zip(names, dims, strict=False))
    noisy = rest[1] is not None and rest[10]
    _refuse_shared("clip_sum_noise", batched, needs_client=noisy)
    per_sample = _rows(per_sample, in_dims[0], info.batch_size)
    accumulate = _rows(accumulate, in_dims[1] or [None] * len(accumulate), info.batch_size)
    results = []
    for i in range(info.batch_size):
        row = [
            value if dim is None else value.select(dim, i)
            for value, dim in zip(rest, [*dims[: len(rest)]], strict=True)
        ]
        results.append(
            clip_sum_noise([t[i] for t in per_sample], [t[i] for t in accumulate], layer_of, *row)
        )
    sums = [torch.stack(column) for column in zip(*(r[0] for r in results), strict=True)]
    stats = [torch.stack([r[i] for r in results]) for i in range(1, 5)]
    return (sums, *stats), ([0] * len(sums), 0, 0, 0, 0)


def traced_clip_sum_noise(
    per_sample: Sequence[Tensor],
    layout: Layout,
    *,
    clip: Tensor,
    scale: Tensor | None,
    p: int,
    mechanism: str,
    key: NoiseKey | None,
    step: int | Tensor,
    client: int | Tensor,
    mask: Tensor | None,
    votes_at: Tensor | None,
    accumulate: Sequence[Tensor] | None,
    last: bool,
    form: str,
    impl: str,
) -> tuple[list[Tensor], ClipStats]:
    """`clip_sum.clip_sum_noise` for a tracer."""
    _check("per_sample", per_sample, layout, (per_sample[0].shape[0],))
    if not isinstance(client, Tensor):
        client = torch.full((), client, dtype=torch.int64)
    words, step, rng = _address(key, step)
    sums, l1_norm, *counts = clip_sum_noise(
        _detached(per_sample), _detached(accumulate), list(layout.layer_of), clip, scale, mask,
        votes_at, client, words, step, rng, p, mechanism, last, form, impl,
    )  # fmt: skip
    if accumulate is not None and not last:
        for total, value in zip(accumulate, sums, strict=True):
            total.copy_(value)
        sums = list(accumulate)
    return sums, ClipStats(l1_norm if p == 1 or votes_at is not None else None, *counts)


# sample_noise


@torch.library.custom_op("aadp_kernels::sample_noise", mutates_args=())
def sample_noise(
    shape: Sequence[int],
    scale: Tensor,
    client: Tensor,
    key: Tensor,
    step: Tensor,
    rng: str,
    mechanism: str,
    layer: int,
    offset: int,
    dtype: torch.dtype,
    device: torch.device,
    form: str,
    impl: str,
) -> Tensor:
    """`noise.sample_noise`; a 0-d scale and client are numbers."""
    from aadp_kernels import noise

    owner = _key(key, rng)
    assert owner is not None
    return noise.sample_noise(
        tuple(shape), mechanism=mechanism, scale=scale, key=owner, step=_step(step),
        client=client, layer=layer, offset=offset, dtype=dtype, device=device, form=form,
        impl=impl,
    )  # fmt: skip


@sample_noise.register_fake
def _(shape, scale, client, key, step, rng, mechanism, layer, offset, dtype, device, form, impl):
    return torch.empty(tuple(shape), dtype=dtype, device=device)


@sample_noise.register_vmap
def _(info, in_dims, shape, scale, client, *rest):
    names = ("scale", "client", "key", "step")
    batched: dict[str, Any] = dict(zip(names, in_dims[1:5], strict=True))
    _refuse_shared("sample_noise", batched, needs_client=True)
    if client.dim() != 1:
        raise RuntimeError("sample_noise under vmap needs one client a row, client must be 0-d")
    if in_dims[1] is not None:
        scale = scale.movedim(in_dims[1], 0)
        scale = scale.view(len(scale), *[1] * (len(shape) + 1 - scale.dim()), *scale.shape[1:])
    return sample_noise([info.batch_size, *shape], scale, client, *rest), 0


def traced_sample_noise(
    shape: Sequence[int],
    *,
    mechanism: str,
    scale: float | Tensor,
    key: NoiseKey,
    step: int | Tensor,
    client: int | Tensor,
    layer: int,
    offset: int,
    dtype: torch.dtype,
    device: torch.device | str | None,
    form: str,
    impl: str,
) -> Tensor:
    """`noise.sample_noise` for a tracer."""
    place = torch.device("cpu") if device is None else torch.device(device)
    if isinstance(scale, Tensor):
        place = scale.device if device is None else place
    else:
        scale = torch.full((), scale, dtype=torch.float64)
    if not isinstance(client, Tensor):
        client = torch.full((), client, dtype=torch.int64)
    words, step, rng = _address(key, step)
    assert words is not None
    return sample_noise(
        list(shape), scale, client, words, step, rng, mechanism, layer, offset, dtype, place,
        form, impl,
    )  # fmt: skip


# poisson_mask


@torch.library.custom_op("aadp_kernels::poisson_mask", mutates_args=())
def poisson_mask(
    n: int,
    rates: Sequence[float],
    client: Tensor,
    key: Tensor,
    step: Tensor,
    rng: str,
    device: torch.device,
    impl: str,
) -> Tensor:
    """`noise.poisson_mask`; a 0-d client is a number."""
    from aadp_kernels import noise

    owner = _key(key, rng)
    assert owner is not None
    rate = rates[0] if client.dim() == 0 else list(rates)
    return noise.poisson_mask(
        n, rate, key=owner, step=_step(step), client=client, device=device, impl=impl
    )


@poisson_mask.register_fake
def _(n, rates, client, key, step, rng, device, impl):
    return torch.empty((*client.shape, n), dtype=torch.bool, device=device)


@poisson_mask.register_vmap
def _(info, in_dims, *args):
    raise RuntimeError("poisson_mask cannot run under torch.func.vmap: pass clients [K]")


def traced_poisson_mask(
    n: int,
    rate: float | Sequence[float],
    *,
    key: NoiseKey,
    step: int | Tensor,
    client: int | Tensor,
    device: torch.device | str | None,
    impl: str,
) -> Tensor:
    """`noise.poisson_mask` for a tracer."""
    if not isinstance(client, Tensor):
        client = torch.full((), client, dtype=torch.int64)
    rates = list(rate) if isinstance(rate, Sequence) else [rate] * client.numel()
    words, step, rng = _address(key, step)
    assert words is not None
    place = torch.device("cpu") if device is None else torch.device(device)
    return poisson_mask(n, rates, client, words, step, rng, place, impl)


def _rows(tensors: Sequence[Tensor], dims: Any, size: int) -> list[Tensor]:
    """Tensors with the vmapped dimension first, expanded where they have none."""
    return [
        t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, dims, strict=True)
    ]


def _refuse_shared(name: str, batched: dict[str, Any], *, needs_client: bool) -> None:
    """Rows of a vmap with one address would get one and the same noise."""
    if batched["key"] is not None or batched["step"] is not None:
        raise RuntimeError(f"{name} under vmap takes one key and one step for all rows")
    if needs_client and batched["client"] is None:
        raise RuntimeError(
            f"{name} under vmap would give every row the same noise: vmap over client as well"
        )
