"""The single launch against the float64 specification: forms, dtypes, cohorts, edge cases."""

import math
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from aadp_kernels import Layout, NoiseKey, privatize_

pytest.importorskip("triton")
from aadp_kernels._triton import _device, launch_plan, privatize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(3, 5, 7), (7,), (0,), (), (1700,), (13,)]
GROUPS = [0, 0, 1, 2, 3, 3]
CLIP, SCALE = [20.0, 1.0, math.inf, 100.0], [0.5, 1.0, 0.0, 2.0]
LAYOUT = Layout.build([torch.empty(s) for s in SHAPES], GROUPS)


@pytest.fixture(autouse=True)
def fewer_tiles(monkeypatch):
    """The interpreter takes its time for a tile, not for its elements."""
    if DEVICE == "cpu":
        monkeypatch.setattr(privatize, "TILES", dict.fromkeys(privatize.TILES, 1024))


def values(dtype=torch.float32, rows=None, seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    lead = () if rows is None else (rows,)
    return [
        torch.randn((*lead, *s), generator=generator).to(DEVICE, dtype, copy=True) for s in shapes
    ]


def run(impl, tensors, *, rng="philox10", rows=None, votes=True, layout=LAYOUT, **options):
    """Privatize clones of the tensors; a fresh key object a call."""
    out = [t.clone() for t in tensors]
    arguments = {
        "clip": torch.tensor(CLIP, device=DEVICE),
        "scale": torch.tensor(SCALE, device=DEVICE),
        "key": NoiseKey.from_seed(1, rng),
        "step": 3,
        "clients": None if rows is None else torch.arange(rows, device=DEVICE) + 2**31,
        "votes_at": torch.tensor([50.0, 0.0, 1.0, 1e6], device=DEVICE) if votes else None,
    }
    stats = privatize_(out, layout=layout, impl=impl, **(arguments | options))
    return out, stats


def assert_meets(out, expected, *, form, scale=SCALE, groups=GROUPS):
    """Equal bits (wide) or within what the fast form may differ by."""
    for value, wanted, layer in zip(out, expected, groups, strict=True):
        if form != "fast":
            assert torch.equal(value, wanted) or torch.allclose(
                value, wanted, rtol=2 * torch.finfo(value.dtype).eps, atol=0
            )
            assert value.numel() == 0 or (value == wanted).double().mean() > 0.99
            continue
        value, wanted, eps = value.double(), wanted.double(), torch.finfo(value.dtype).eps
        # |noise| is not known here; what it adds to the output bounds it from above.
        b = scale[layer]
        bound = 2.0**-17 * (b + wanted.abs() + 5 * b) + 4 * eps * wanted.abs()
        assert ((value - wanted).abs() <= bound).all()


def assert_same_stats(stats, expected):
    assert torch.allclose(stats.l1_norm, expected.l1_norm, rtol=1e-6, atol=0, equal_nan=True)
    for name in ("votes", "clipped", "nonfinite"):
        assert torch.equal(getattr(stats, name), getattr(expected, name)), name


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
QUICK = [
    ("philox10", "wide", torch.float32, "laplace", 1),
    ("philox10", "fast", torch.float32, "laplace", 1),
    ("philox10", "fast", torch.bfloat16, "gaussian", 2),
    ("chacha8", "fast", torch.float32, "gaussian", 2),
    ("philox10", "wide", torch.float16, "gaussian", 2),
    ("philox10", "grid", torch.float32, "laplace", 1),
]
ALL = [
    (rng, form, dtype, mechanism, p)
    for rng in ("philox10", "chacha8", "chacha20")
    for form in ("wide", "fast")
    for dtype in DTYPES
    for mechanism, p in (("laplace", 1), ("gaussian", 1), ("gaussian", 2))
] + [
    ("philox10", "grid", torch.bfloat16, "laplace", 1),
    ("chacha8", "grid", torch.float32, "laplace", 1),
    ("philox10", "grid", torch.float64, "gaussian", 2),
]
MARKED = [*QUICK, *(pytest.param(*c, marks=pytest.mark.slow) for c in ALL if c not in QUICK)]


@pytest.mark.parametrize(("rng", "form", "dtype", "mechanism", "p"), MARKED)
def test_meets_the_specification(rng, form, dtype, mechanism, p):
    tensors = values(dtype, rows=2)
    options = {"rng": rng, "form": form, "mechanism": mechanism, "p": p, "rows": 2}
    (out, stats), (expected, wanted) = (
        run("triton", tensors, **options),
        run("torch", tensors, **options),
    )
    assert_meets(out, expected, form=form)
    assert_same_stats(stats, wanted)


@pytest.mark.parametrize("form", ["wide", pytest.param("fast", marks=pytest.mark.slow)])
def test_reference_and_out(form):
    tensors, reference = values(rows=3), values(seed=5)
    target = [torch.full_like(t, math.nan) for t in tensors]
    options = {"rows": 3, "reference": reference, "form": form}
    before = [t.clone() for t in tensors]
    out, stats = run("triton", tensors, out=target, **options)
    expected, wanted = run("torch", tensors, **options)
    assert all(torch.equal(a, b) for a, b in zip(out, before, strict=True))
    assert_meets(target, expected, form=form)
    assert_same_stats(stats, wanted)


def test_one_update_without_votes_is_row_zero_of_a_cohort():
    tensors = values()
    options = {"votes": False, "form": "fast"}
    one, stats = run("triton", tensors, **options)
    clients = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    rows, of_rows = run("triton", [t[None] for t in tensors], clients=clients, **options)
    assert all(torch.equal(a, b[0]) for a, b in zip(one, rows, strict=True))
    assert torch.equal(stats.l1_norm, of_rows.l1_norm[0])
    assert not stats.votes.any()


@pytest.mark.parametrize(
    ("form", "bad"), [("wide", -math.inf), ("fast", math.nan), ("fast", math.inf)]
)
def test_a_layer_that_is_not_finite_gives_zeros_and_noise_only_there(form, bad):
    tensors = values(rows=2)
    tensors[4][1, 1699] = bad
    options = {"rows": 2, "form": form}
    out, stats = run("triton", tensors, **options)
    expected, wanted = run("torch", tensors, **options)
    assert_meets(out, expected, form=form)
    assert stats.nonfinite.tolist() == [[0, 0, 0, 0], [0, 0, 0, 1]] == wanted.nonfinite.tolist()
    assert stats.votes[1, 3] == 0
    assert all(t.isfinite().all() for t in out)


@pytest.mark.parametrize("form", ["wide", "fast"])
def test_scale_zero_and_no_clipping_keep_every_bit(form):
    tensors = values()
    tensors[0][0, 0, 0] = -0.0
    quiet = torch.zeros(4, device=DEVICE)
    for key in (None, NoiseKey.from_seed(2)):
        out, stats = run("triton", tensors, clip=quiet + math.inf, scale=quiet, key=key, form=form)
        for value, given in zip(out, tensors, strict=True):
            assert torch.equal(value.view(torch.int32), given.view(torch.int32))
        assert not stats.clipped.any()


@pytest.mark.parametrize("form", ["wide", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [1, 2])
def test_the_norm_of_the_output_is_at_most_the_clip_norm(form, dtype, p):
    layout = Layout.build([torch.empty(4000)])
    worst = 0.0
    for seed in range(3):
        (x,) = values(dtype, seed=seed, shapes=[(4000,)])
        clip = torch.tensor([float(x.double().norm(p)) * (0.9999999, 0.7, 1e-3)[seed % 3]])
        key = NoiseKey.from_seed(3, "philox10")
        # Noise so small that it rounds away, in a form that has one: the clip is what counts.
        scale = torch.zeros(1, device=DEVICE)
        out, stats = run(
            "triton", [x], layout=layout, clip=clip.to(DEVICE), scale=scale, key=key, p=p,
            form=form, votes=False, mechanism="gaussian",
        )  # fmt: skip
        norm = float(out[0].double().norm(p))
        assert norm <= float(clip)
        assert stats.clipped.item() == 1
        worst = max(worst, norm / float(clip))
    assert worst > 1 - 2.5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("form", ["wide", "fast"])
def test_a_norm_at_the_clip_norm_is_clipped_since_its_own_rounding_counts(form):
    x = torch.full((4,), 0.25, device=DEVICE)
    arguments = {
        "layout": Layout.build([x]), "clip": torch.ones(1, device=DEVICE), "votes": False,
        "scale": torch.zeros(1, device=DEVICE), "form": form,
    }  # fmt: skip
    for impl in ("torch", "triton"):
        out, stats = run(impl, [x], **arguments)
        assert stats.clipped.item() == 1
        assert out[0].sum() < 1
        assert not run(impl, [x * (1 - 2.0**-20)], **arguments)[1].clipped.any()


@pytest.mark.parametrize("form", ["wide", "fast"])
def test_a_factor_too_small_to_be_exact_is_zero(form):
    x = torch.tensor([6.55172607892521e16, 37583350398976.0], device=DEVICE)
    clip = torch.tensor([2.53686876683007e-301], dtype=torch.float64, device=DEVICE)
    out, stats = run(
        "triton", [x], layout=Layout.build([x]), clip=clip, scale=0 * clip, votes=False, form=form,
        key=NoiseKey.from_seed(1, "philox10"),
    )  # fmt: skip
    assert not out[0].any()
    assert stats.clipped.item() == 1


def test_views_strides_and_mixed_dtypes_are_copied_in_and_out():
    x = values(shapes=[(8, 40)])[0].t()
    y = values(torch.bfloat16, shapes=[(300,)])[0][1::3]
    layout = Layout.build([x, y], [0, 0])
    options = {
        "layout": layout, "votes": False, "clip": torch.tensor([9.0], device=DEVICE),
        "scale": torch.tensor([0.5], device=DEVICE),
    }  # fmt: skip
    expected, _ = run("torch", [x, y], **options)
    holder = torch.zeros((8, 40), device=DEVICE)
    target = [holder.t(), torch.zeros(300, dtype=torch.bfloat16, device=DEVICE)[1::3]]
    run("triton", [x, y], out=target, **options)
    assert not target[0].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(target, expected, strict=True))


def test_empty_cohort():
    out, stats = run("triton", values(rows=0), rows=0)
    assert stats.l1_norm.shape == (0, 4)
    assert out[0].shape[0] == 0


def test_a_misaligned_tensor_gives_the_same_bits():
    holder = values(shapes=[(5001,)])[0]
    x = holder[1:]
    layout = Layout.build([x])
    options = {"layout": layout, "votes": False, "form": "fast"}
    options |= {k: torch.tensor([2.0], device=DEVICE) for k in ("clip", "scale")}
    aligned, first = run("triton", [x.clone()], **options)
    target = torch.empty_like(holder)[1:]
    _, second = run("triton", [x], out=[target], **options)
    assert target.data_ptr() % 16 == 4
    assert torch.equal(target, aligned[0])
    assert torch.equal(first.l1_norm, second.l1_norm)


class TestPlan:
    """Orders without deadlock, bounds that depend on the layout alone."""

    @pytest.mark.parametrize("window", [0, 1 << 16, 32 << 20])
    @pytest.mark.parametrize("rows", [1, 3])
    def test_every_ticket_waits_for_earlier_ones_only(self, rows, window, monkeypatch):
        monkeypatch.setattr(launch_plan, "WINDOW", window)
        layout = Layout.build(
            [torch.empty(n, device="meta") for n in (70000, 3, 0, 33333, 2048, 5)],
            [0, 0, 1, 2, 3, 4],
        )
        tables = launch_plan.make(layout, rows, tile=1024, itemsize=4, aligned=(True,) * 6)
        chunks, units = tables["chunks"], tables["units"]
        normed, applied = set(), set()
        for ticket in tables["tickets"].tolist():
            chunk, unit = ticket >> 2, chunks[ticket >> 2, 6]
            if ticket & 1:
                assert chunk not in normed
                normed.add(chunk)
            if ticket & 2:
                assert chunk not in applied
                assert set(range(*units[unit])) <= normed
                applied.add(chunk)
        assert normed == applied == set(range(len(chunks)))
        trail = [len(normed)]
        assert trail

    def test_chunks_cover_every_element_once_inside_their_tensor(self):
        sizes, groups = (70000, 3, 33333, 2047, 4096), [0, 0, 0, 1, 2]
        layout = Layout.build([torch.empty(n, device="meta") for n in sizes], groups)
        tables = launch_plan.make(layout, 2, tile=1024, itemsize=4, aligned=(True,) * 5)
        covered = torch.zeros(2, sum(sizes), dtype=torch.int64)
        start = torch.tensor([0, *sizes]).cumsum(0)
        for tensor, shift, first, low, high, whole, unit, shift0 in tables["chunks"].tolist():
            row = unit // 3
            assert unit % 3 == groups[tensor]
            assert shift0 == -layout.offsets[tensor]
            assert 0 <= low + shift0 <= high + shift0 <= sizes[tensor]
            assert shift == shift0 + row * sizes[tensor]
            assert first % 1024 == 0
            assert first <= low < first + 1024
            assert high - low <= launch_plan.CHUNK
            if whole:
                assert low == first
                assert (whole - low) % 1024 == 0
                assert whole <= high
                assert (shift + first) * 4 % 16 == 0
            begin = int(start[tensor]) + low + shift0
            covered[row, begin : begin + high - low] += 1
        assert (covered == 1).all()

    def test_large_aligned_tensors_are_mostly_whole_tiles(self):
        layout = Layout.build([torch.empty(10**6, device="meta")])
        chunks = launch_plan.make(layout, 1, tile=1024, itemsize=4, aligned=(True,))["chunks"]
        whole = (chunks[:, 5] - chunks[:, 2]).clip(0).sum()
        assert whole >= 10**6 - 1024
        chunks = launch_plan.make(layout, 1, tile=1024, itemsize=4, aligned=(False,))["chunks"]
        assert not chunks[:, 5].any()

    def test_addresses_past_two_to_the_31(self):
        layout = Layout.build([torch.empty(5 * 10**9, device="meta")])
        chunks = launch_plan.make(layout, 1, tile=1024, itemsize=2, aligned=(True,))["chunks"]
        assert chunks[-1, 4] == 5 * 10**9
        assert (chunks[1:, 3] == chunks[:-1, 4]).all()

    def test_apply_trails_by_the_window(self):
        layout = Layout.build([torch.empty(1 << 20, device="meta") for _ in range(40)])
        tables = launch_plan.make(layout, 1, tile=1024, itemsize=4, aligned=(True,) * 40)
        ahead = worst = 0
        for ticket in tables["tickets"].tolist():
            _, _, _, low, high, *_ = tables["chunks"][ticket >> 2]
            ahead += (high - low) * 4 * (1 if ticket & 3 == 1 else -1)
            worst = max(worst, ahead)
        assert 0.9 * launch_plan.WINDOW <= worst <= launch_plan.WINDOW + (1 << 20) * 4

    def test_a_layout_remembers_the_plans_that_were_used_last(self):
        layout = Layout.build([torch.empty(9, device="meta")])
        options = {"tile": 256, "itemsize": 4, "aligned": (True,), "device": torch.device("cpu")}
        first = launch_plan.plan_launch(layout, 1, **options)
        for rows in range(2, launch_plan.PLANS + 1):
            launch_plan.plan_launch(layout, rows, **options)
        assert launch_plan.plan_launch(layout, 1, **options) is first
        launch_plan.plan_launch(layout, launch_plan.PLANS + 1, **options)
        assert launch_plan.plan_launch(layout, 1, **options) is first
        remembered = vars(layout)["_triton_plans"]
        assert len(remembered) == launch_plan.PLANS
        assert 2 not in [name[0] for name in remembered]

    def test_a_layout_that_threads_share_remembers_plans(self):
        layout = Layout.build([torch.empty(9, device="meta")])
        options = {"tile": 256, "itemsize": 4, "aligned": (True,), "device": torch.device("cpu")}

        def ask(first: int) -> None:
            for i in range(1500):
                rows = 1 + (7 * i + first) % (launch_plan.PLANS + 4)
                launch_plan.plan_launch(layout, rows, **options)

        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(ask, range(4)))
        finally:
            sys.setswitchinterval(before)


def test_graphs_of_one_table_keep_it_once(monkeypatch):
    """A replay copies from the memory that was captured: it stays, once for each content."""
    monkeypatch.setattr(_device, "_capturing", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    copied = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **__: copied.append(self))
    monkeypatch.setattr(_device, "_CAPTURED", {})
    for table in ([1, 2], [1, 2], [2, 1]):
        _device.to_device(np.array(table), torch.device("cuda", 0))
    _device.to_device(np.array([[1, 2]]), torch.device("cuda", 0))
    assert copied[0] is copied[1]
    assert [t.tolist() for t in copied[1:]] == [[1, 2], [2, 1], [[1, 2]]]
    assert len(_device._CAPTURED) == 3
