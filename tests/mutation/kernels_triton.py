"""Mistakes in aadp_kernels._triton."""

from __future__ import annotations

from tests.mutation.mutations import group

LAUNCH = "tests/aadp_kernels/test_triton_privatize.py::test_meets_the_specification"
TRITON_NOISE = "tests/aadp_kernels/test_triton_noise.py"

LAUNCHES = group(
    "aadp_kernels/_triton/privatize_kernel.py",
    f"{LAUNCH} tests/aadp_kernels/test_triton_privatize.py::test_reference_and_out "
    "tests/aadp_kernels/test_triton_privatize.py::test_a_layer_that_is_not_finite_gives_zeros_and_noise_only_there "
    "tests/aadp_kernels/test_triton_privatize.py::test_the_norm_of_the_output_is_at_most_the_clip_norm "
    "tests/aadp_kernels/test_triton_privatize.py::"
    "test_a_norm_at_the_clip_norm_is_clipped_since_its_own_rounding_counts",
    ("noise 2/3", "0.0) + noise[part].to(DTYPE) * scale", "0.0) + noise[part].to(DTYPE) * scale * (2.0 / 3.0)"),
    ("noise subtracted", "0.0) + noise[part].to(DTYPE) * scale", "0.0) - noise[part].to(DTYPE) * scale"),
    ("clip dropped", "factor = tl.where(clipped, room / divisor, 1.0)", "factor = tl.where(clipped, 1.0, 1.0)"),
    ("clip doubled", "factor = tl.where(clipped, room / divisor, 1.0)", "factor = tl.where(clipped, 2.0 * room / divisor, 1.0)"),
    ("norm not inflated", "bound = norm * tl.load(layers + layer * 5)", "bound = norm"),
    ("vote turned round", "vote = tl.where(total1 <= at, 0.5, -0.5)", "vote = tl.where(total1 <= at, -0.5, 0.5)"),
    ("client dropped from the address", "client = tl.load(clients + row).to(tl.uint32)", "client = tl.load(clients).to(tl.uint32)"),
    ("scale of the first layer", "amount = tl.load(scale + row * scale_stride + layer)", "amount = tl.load(scale + row * scale_stride)"),
    ("clip norm of the first layer", "limit = tl.load(clip + row * clip_stride + layer)", "limit = tl.load(clip + row * clip_stride)"),
    ("squares of the norm missing", "sum2 += tl.sum(wide * wide, axis=1)", "sum2 += tl.sum(wide, axis=1)"),
)  # fmt: skip

TRITON_TRANSFORMS = group(
    "aadp_kernels/_triton/noise.py",
    TRITON_NOISE,
    ("client dropped from the address", "client = tl.load(clients_pointer + row).to(tl.uint32)", "client = tl.load(clients_pointer).to(tl.uint32)"),
)  # fmt: skip

FAR = "tests/aadp_kernels/test_triton_far.py::test_"
DEVICES = "tests/aadp_kernels/test_triton_devices.py"

TRITON_FAR = [
    *group(
        "aadp_kernels/_triton/noise.py",
        f"{FAR}noise_of_far_elements",
        ("first element in int32", "first = (low // TILE + tl.program_id(0)) * TILE", "first = ((low // TILE).to(tl.int32) + tl.program_id(0)) * TILE"),
    ),
    *group(
        "aadp_kernels/_triton/noise.py",
        f"{FAR}noise_of_far_rows",
        ("rows in int32", "out = out_pointer + row * (high - low)", "out = out_pointer + row.to(tl.int32) * (high - low).to(tl.int32)"),
    ),
    *group(
        "aadp_kernels/_triton/noise.py",
        f"{FAR}more_rows_than_a_grid_holds_take_more_launches",
        ("clients of the first rows for all", "some = clients[rows].contiguous()", "some = clients[: len(clients[rows])].contiguous()"),
    ),
    *group(
        "aadp_kernels/_triton/launch_plan.py",
        f"{FAR}a_plan_of_more_chunks_than_tickets_can_name_is_refused",
        ("any number of chunks", "if len(row) * rows >= MAX_CHUNKS:", "if False:"),
    ),
    *group(
        "aadp_kernels/privatize.py",
        f"{FAR}no_noise_beyond_the_last_counter",
        ("layers beyond the counter", "if layout.largest > most:", "if False:"),
    ),
]  # fmt: skip

TRITON_DEVICES = group(
    "aadp_kernels/_triton/_device.py",
    DEVICES,
    ("launch on the current device", "    with on(device):\n        kernel", "    if True:\n        kernel"),
    ("capture of the current device", "    with on(device):\n        return", "    if True:\n        return"),
)  # fmt: skip

CALLS = "tests/aadp_kernels/test_triton_calls.py"

TRITON_CALLS = [
    *group(
        "aadp_kernels/_triton/privatize.py",
        CALLS,
        ("a call for all that looks alike", "name = (stream, kind, _addresses(lists))", "name = (stream, kind)"),
        ("a call for any look", "if found is not None and found.guards == guards:", "if found is not None:"),
        ("calls pile up", "for oldest in list(calls)[:-_CALLS]:", "for oldest in []:"),
        ("results keep their version", "    torch.autograd.graph.increment_version(out)\n", "    pass\n"),
        ("counters of the launch before", "    scratch.counters.zero_()\n", ""),
        ("scratch that another launch is made with", "tables.free.pop()", "tables.free[-1]"),
        ("scratch of a launch that failed", "    scratch.counters.zero_()\n", "    scratch.counters.zero_()\n    tables.free.append(scratch)\n"),
    ),
    *group(
        "aadp_kernels/_triton/_device.py",
        CALLS,
        ("step of the launch before", "return place.fill_(step), key", "return place, key"),
    ),
    *group(
        "aadp_kernels/_triton/launch_plan.py",
        CALLS,
        ("scratch of inference mode", "torch.inference_mode(False)", "torch.inference_mode(torch.is_inference_mode_enabled())"),
    ),
    *group(
        "aadp_kernels/_seen.py",
        CALLS,
        ("any look is known", "if known == lead and guard.check(*tensors):", "if known == lead:"),
        ("guards pile up", "kept.get(\"_seen\", ())[: _GUARDS - 1]", "kept.get(\"_seen\", ())"),
    ),
    *group(
        "aadp_kernels/_reuse.py",
        f"{CALLS} tests/aadp_kernels/test_reuse.py",
        ("any claim takes the place of the last", "return waiting[3] is segments and waiting[0] == domain and waiting[2] == clients", "return True"),
    ),
]  # fmt: skip

PLAIN_NORMS = group(
    "aadp_kernels/clip_in_backward/clip.py",
    "tests/aadp_kernels/test_clip_norm_bounds.py",
    ("L1 norms in float32", "rows = x.abs().sum(-1, dtype=torch.float64)", "rows = x.abs().sum(-1)"),
    ("the rest of a row is left out", "if whole < x.shape[-1] or not whole:", "if not whole:"),
    ("no bound for runs", "wide + RUN / 2 * torch.finfo(like.dtype).eps)", "wide)"),
    ("the bound of whole rows", "wide + RUN / 2 * torch.finfo(like.dtype).eps)", "wide + columns * torch.finfo(like.dtype).eps)"),
)  # fmt: skip

TRITON_WIDE = group(
    "aadp_kernels/_triton/wide_noise.py",
    TRITON_NOISE,
    ("wide Laplace sign", "first = _uniform_log(a, b >> 1, 31) * ((b & 1) * 2 - 1).to(tl.float64)", "first = _uniform_log(a, b >> 1, 31) * -1.0"),
    ("wide Gaussian radius", "radius = tl.sqrt(_uniform_log(a, b, 32) * -2.0)", "radius = tl.sqrt(_uniform_log(a, b, 32) * -4.5)"),
)  # fmt: skip

TRITON_FAST = group(
    "aadp_kernels/_triton/fast_noise.py",
    TRITON_NOISE,
    ("fast Laplace scale 2/3", "return flipped.to(tl.float32, bitcast=True) * -_LN2", "return flipped.to(tl.float32, bitcast=True) * (-_LN2 * 2 / 3)"),
    ("fast Gaussian pairs equal", "pairs = tl.join(radius * _cos_approx(angle), radius * _sin_approx(angle))", "pairs = tl.join(radius * _cos_approx(angle), radius * _cos_approx(angle))"),
)  # fmt: skip

TRITON_WEIGHTS = group(
    "aadp_kernels/_triton/clip_sum.py",
    "tests/aadp_kernels/test_triton_clip_sum.py::test_weights_equal_the_specification",
    ("weights ignored", "        factors *= weights\n", "        pass\n"),
)  # fmt: skip


MUTATIONS = [
    *LAUNCHES,
    *TRITON_TRANSFORMS,
    *TRITON_FAR,
    *TRITON_DEVICES,
    *TRITON_CALLS,
    *PLAIN_NORMS,
    *TRITON_WIDE,
    *TRITON_FAST,
    *TRITON_WEIGHTS,
]
