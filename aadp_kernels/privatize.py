"""Clip and noise whole updates, layer by layer, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aadp_kernels import _dispatch, _late, _seen, _validate, _validate_tensors
from aadp_kernels._eager import eager
from aadp_kernels.certified import noisy_layers
from aadp_kernels.contract import Bounds, ClipStats, Noise
from aadp_kernels.correlation import Correlation, drawn_again
from aadp_kernels.layout import Layout
from aadp_kernels.noise import check_address, claim
from aadp_kernels.noise_key import NoiseKey
from aadp_kernels.sampler_limits import FORMS, MECHANISMS, max_elements

__all__ = ["ClipStats", "layer_norms", "privatize_"]


@eager
def privatize_(
    tensors: Sequence[Tensor],
    *,
    layout: Layout,
    clip: Tensor,
    scale: Tensor,
    p: int = 1,
    mechanism: str = "laplace",
    key: NoiseKey | None,
    step: int | Tensor,
    clients: Tensor | None = None,
    reference: Sequence[Tensor] | None = None,
    out: Sequence[Tensor] | None = None,
    votes_at: Tensor | None = None,
    form: str = "wide",
    correlation: Correlation | None = None,
    impl: str = "auto",
) -> ClipStats:
    """Clip every layer of an update (or of K updates) to its clip norm and add noise, in place.

    For each layer, with u = cat(tensors of the layer) - cat(reference):
    `out = u * min(1, clip / norm(u, p)) + scale * standard_noise`.

    Args:
        tensors: Floating tensors of the layout's shapes, or [K, ...] of them with `clients`.
            Private.
        layout: Which tensor belongs to which layer.
        clip: Clip norms C [L], or [K, L]; >= 0, inf means no clipping. Public.
        scale: Standard deviations (gaussian) or b (laplace) [L] or [K, L]; >= 0, finite, 0 means no
            noise. Public.
        p: Norm of the clipping, 1 or 2.
        mechanism: "gaussian" or "laplace". Laplace noise asks for p = 1.
        key: Secret key; None only if every scale is zero.
        step: Step or round of the release, in [0, 2^32); also a 0-d int64 tensor.
        clients: int64 [K], ids of the rows, for a cohort; None: one update, client 0.
        reference: What to subtract, of the layout's shapes (for a cohort the same for all), or
            None.
        out: Where to write, of the shapes of `tensors`; None: over `tensors`.
        votes_at: L1 thresholds [L] or [K, L] for the votes, or None.
        form: Form of the noise, see `sample_noise`.
        correlation: Noise of earlier steps that is added once more, see `Correlation`, or None.
        impl: "torch" (the specification), "numba" (CPU only, faster), "triton" (GPU) or "auto":
            the fastest that is installed, has the form and pays.

    Returns:
        Statistics, [L] or [K, L]. PRIVATE.

    Raises:
        ValueError: A shape, dtype or range that does not fit; laplace with p=2; noise without a
            key; a layer of more than `max_elements`; an `impl` that is unknown, cannot run here or
            lacks the form. Values of clip, scale and step that lie on an accelerator are not read.
        ReusedNoiseError: Noise that this key object has drawn before, see `NoiseKey`.

    Guarantees:
        The float64 norm of a clipped layer is at most C, also after it is rounded to the dtype of
        `out`; an update below C changes in no bit. Noise is `sample_noise` at (key, step, client,
        layer, element), whatever the cohort. Norms, products and noise are float64, rounded once.
        Implementations draw the same words. On a CPU the wide and the grid form have the same bits
        in all of them; on an accelerator norms, and so the factor of a clipped layer, may differ in
        the last bits of float64.

    Edge cases:
        | layer | contribution |
        |---|---|
        | holds NaN or Inf | zeros (plus noise), counted, vote 0 |
        | clip inf | unchanged |
        | clip 0 | zeros |
        | scale 0 | no noise; a layer below its clip norm keeps its bits |
        | on an accelerator: scale negative or not finite, or positive without a key | NaN |
        | on an accelerator: clip negative or NaN | zeros |

    Reference:
        Dwork, McSherry, Nissim, Smith 2006 (Laplace); Abadi et al. 2016, arXiv:1607.00133
        (clipping).
    """
    check_kind(mechanism, form, p)
    lead, given = () if clients is None else (len(clients),), tensors
    quick = impl == "triton" or bool(tensors and tensors[0].device.type != "cpu")
    tensors, device = _look("tensors", tensors, layout, lead, quick=quick)
    if out is None or out is given:
        out = tensors
    else:
        out, _ = _look("out", out, layout, lead, device, quick=quick)
    if reference is not None:
        reference, _ = _look("reference", reference, layout, (), device, quick=quick)
    clip = per_layer("clip", clip, layout, lead, device, finite=False)
    scale = per_layer("scale", scale, layout, lead, device, finite=True)
    if votes_at is not None:
        votes_at = per_layer("votes_at", votes_at, layout, lead, device, finite=None)
    ids = _validate_tensors.client_ids(0 if clients is None else clients, device)
    noisy = noisy_layers(layout, scale)
    noise = noise_source(key, noisy, mechanism, form, p, step, ids, correlation)
    backend = _dispatch.backend(
        impl, "privatize", device=device, elements=layout.elements, form=form,
        correlated=correlation is not None,
        numbers=_late.work(layout, clients, noise.again if noise is not None else ()),
    )  # fmt: skip
    claim_layers(key, noise, 0 if clients is None else clients, layout, noisy)
    return backend.privatize(
        tensors, out, layout, bounds=Bounds(clip, p, votes_at), scale=scale, noise=noise,
        reference=reference,
    )  # fmt: skip


@eager
def layer_norms(
    tensors: Sequence[Tensor],
    *,
    layout: Layout,
    p: int = 1,
    reference: Sequence[Tensor] | None = None,
    cohort: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Norm of each layer of an update, `torch.cat([...]).norm(p)` in float64. PRIVATE.

    Args:
        tensors: Tensors of the layout's shapes, or [K, ...] of them for a cohort. Private.
        layout: Which tensor belongs to which layer.
        p: 1 or 2.
        reference: What to subtract first, of the layout's shapes, or None.
        cohort: Whether the tensors have a leading cohort dimension.
        impl: As for `privatize_`.

    Returns:
        float64 [L], or [K, L] for a cohort; NaN or inf where a layer is not finite.

    Raises:
        ValueError: p not in {1, 2}, shapes that do not fit the layout, or an `impl` that is unknown
            or cannot run here.
    """
    _validate.one_of("p", p, (1, 2))
    lead = tuple(tensors[0].shape[:1]) if cohort and len(tensors) else ()
    device = check_tensors("tensors", tensors, layout, lead)
    if reference is not None:
        check_tensors("reference", reference, layout, (), device)
    # To read a number takes an eighth of drawing one, or less.
    numbers = _late.work(layout, range(*lead) if lead else None) // 8
    backend = _dispatch.backend(
        impl, "norms", device=device, elements=layout.elements, numbers=numbers
    )
    result = backend.layer_norms(tensors, layout, p, reference)
    return result if cohort else result[0]


def check_kind(mechanism: str, form: str, p: int) -> None:
    """Raise unless mechanism, form and norm are known."""
    if mechanism not in MECHANISMS or form not in FORMS or p not in (1, 2):
        _validate.one_of("mechanism", mechanism, MECHANISMS)
        _validate.one_of("form", form, FORMS)
        _validate.one_of("p", p, (1, 2))


def _look(
    name: str,
    tensors: Sequence[Tensor],
    layout: Layout,
    lead: tuple[int, ...],
    wanted: torch.device | None = None,
    *,
    quick: bool,
) -> tuple[Sequence[Tensor], torch.device]:
    """`check_tensors`, in one call for tensors that look like some that were checked.

    On a CPU it is `check_tensors`: there the numba and torch back ends gain nothing.
    """
    if not quick:
        return tensors, check_tensors(name, tensors, layout, lead, wanted)
    known = _seen.checked(tensors, layout, lead)
    if known is not None and wanted in (None, known.device):
        return known, known.device
    device = check_tensors(name, tensors, layout, lead, wanted)
    _seen.remember(name, tensors, layout, lead, device)
    return tensors, device


def check_tensors(
    name: str,
    tensors: Sequence[Tensor],
    layout: Layout,
    lead: tuple[int, ...],
    wanted: torch.device | None = None,
) -> torch.device:
    """The one device of the tensors; raise unless they are floating and shaped (*lead, *layout).

    Where a device is wanted it must be that.
    """
    if len(tensors) != len(layout.names):
        raise ValueError(f"{name} must be {len(layout.names)} tensors, got {len(tensors)}")
    device = tensors[0].device
    if wanted is not None and device != wanted:
        raise ValueError(f"{name} must be on {wanted}, got {device}")
    for i, (shape, tensor) in enumerate(zip(layout.shapes, tensors, strict=True)):
        if not tensor.is_floating_point() or tensor.device != device:
            _validate_tensors.floating(name, tensors)
        if tensor.shape != ((*lead, *shape) if lead else shape):
            raise ValueError(
                f"{name}: {layout.names[i]} must have shape {(*lead, *shape)}, "
                f"got {tuple(tensor.shape)}"
            )
    return device


def per_layer(
    name: str,
    value: Tensor,
    layout: Layout,
    lead: tuple[int, ...],
    device: torch.device,
    *,
    finite: bool | None,
) -> Tensor:
    """A per-layer argument as float64 [K, L] ([L] alone); finite=None: not checked."""
    if not isinstance(value, Tensor):
        value = torch.as_tensor(value)
    layers, shape = layout.num_layers, value.shape
    if shape != (layers,) and shape != (*lead, layers):
        wanted = f"[{layers}]" + (f" or {[*lead, layers]}" if lead else "")
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(shape)}")
    if finite is not None:
        _validate_tensors.nonnegative_tensor(name, value, finite=finite)
    if value.requires_grad:
        value = value.detach()
    if value.is_neg():
        value = value.resolve_neg()
    if value.dtype != torch.float64 or value.device != device:
        value = value.to(device, torch.float64)
    return value.expand(*lead, layers) if lead else value


def noise_source(
    key: NoiseKey | None,
    noisy: Sequence[int],
    mechanism: str,
    form: str,
    p: int,
    step: int | Tensor,
    clients: Tensor,
    correlation: Correlation | None,
) -> Noise | None:
    """The noise of a release, or None without noisy layers (on an accelerator: without a key)."""
    if clients.is_cpu:
        if not noisy:
            return None
        if key is None:
            raise ValueError("key must be a NoiseKey where scale is positive, got None")
    if key is None:
        return None
    if mechanism == "laplace" and p == 2:
        raise ValueError("p must be 1 with laplace noise, got 2: an L2 bound does not bound L1")
    step = check_address(key, step=step)
    again = drawn_again(correlation, key, step, mechanism, form)
    return Noise(key.rng, key.words, mechanism, form, step, clients, again)


def claim_layers(
    key: NoiseKey | None,
    noise: Noise | None,
    client: int | Tensor,
    layout: Layout,
    noisy: Sequence[int],
) -> None:
    """Note the noise of whole layers, or raise if it was drawn before or would repeat."""
    if key is None or noise is None:
        return
    most = max_elements(noise.rng, noise.form)
    if layout.largest > most:
        raise ValueError(
            f"a layer must have at most {most} elements with rng={noise.rng!r} and "
            f"form={noise.form!r}, got {layout.largest}: noise beyond would repeat"
        )
    segments = layout.segments
    if len(noisy) < len(segments):
        segments = tuple((i, 0, layout.dims[i]) for i in noisy)
    claim(key, noise.mechanism, noise.form, noise.step, client, segments)
