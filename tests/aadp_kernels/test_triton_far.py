"""Elements, rows and addresses beyond 2^31, without 2^31 elements: nothing is left unwritten.

Large tensors are sparse: of a file that has a size and no content, only what is touched is stored.
"""

import math

import numpy as np
import pytest
import torch

from aadp_kernels import Layout, NoiseKey, clip_sum_noise, max_elements, privatize_, sample_noise

pytest.importorskip("triton")
from triton.runtime.interpreter import interpreter_builder

from aadp_kernels._triton import clip_sum, grid, launch_plan, noise, privatize, product_norms
from aadp_kernels.addresses import rounds_of, signed32
from aadp_kernels.grid import quantum

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="is for the interpreter; test_triton_gpu.py has the real size"
)

FAR = 1 << 31
COUNT = 1024
RNGS = ["philox10", "chacha8"]
INF, ONE = torch.tensor([math.inf]), torch.tensor([1.0])


@pytest.fixture
def poisoned(monkeypatch):
    """What nobody writes is NaN, or -7."""
    empty = torch.empty

    def poison(*arguments, **options):
        made = empty(*arguments, **options)
        if made.numel() > FAR // 2:
            return made
        return made.fill_(math.nan if made.is_floating_point() else -7)

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture
def far_programs(monkeypatch):
    """Starts the program ids of a grid elsewhere."""

    def start_at(x, y=0):
        def set_grid_idx(i, j, k):
            interpreter_builder.grid_idx = (x + i, y + j, k)

        monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_grid_idx)

    return start_at


@pytest.fixture
def sparse(tmp_path):
    """Zeros, a tensor of one dimension."""
    made = []

    def make(count, dtype):
        made.append(None)
        path = tmp_path / str(len(made))
        with path.open("wb") as file:
            file.truncate(count * dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=count, dtype=dtype)

    return make


def expected_noise(rng, form, offset, count=COUNT, dtype=torch.float64):
    return sample_noise(
        (count,), mechanism="laplace", scale=1.0, key=NoiseKey.from_seed(1, rng), step=0,
        offset=offset, form=form, impl="torch", dtype=dtype,
    )  # fmt: skip


def assert_noise(out, wanted, form):
    if form == "fast":
        assert ((out - wanted).abs() <= 2.0**-18 * (1 + wanted.abs())).all()
    else:
        assert torch.equal(out, wanted)


@pytest.mark.parametrize("place", ["across 2^31", "beyond", "across 2^32", "the last ones"])
@pytest.mark.parametrize("form", ["wide", "fast", "grid"])
@pytest.mark.parametrize("rng", RNGS)
def test_noise_of_far_elements(rng, form, place, poisoned):
    limit = max_elements(rng, form)
    offset = {
        "across 2^31": FAR - COUNT // 2, "beyond": FAR + 12_345,
        "across 2^32": 2 * FAR - COUNT // 2, "the last ones": limit - COUNT,
    }[place]  # fmt: skip
    if offset + COUNT > limit:
        pytest.skip("has no such elements")
    out = sample_noise(
        (COUNT,), mechanism="laplace", scale=1.0, key=NoiseKey.from_seed(1, rng), step=0,
        offset=offset, form=form, impl="triton", dtype=torch.float64,
    )  # fmt: skip
    assert_noise(out, expected_noise(rng, form, offset), form)


@pytest.mark.parametrize("operation", ["sample", "privatize", "clip_sum"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("rng", RNGS)
def test_no_noise_beyond_the_last_counter(rng, impl, operation):
    """It would be that of the first elements once more."""
    count = max_elements(rng, "grid") + 1
    x = torch.empty(1, dtype=torch.bfloat16).expand(count)
    common = {"key": NoiseKey.from_seed(1, rng), "step": 0, "form": "grid", "impl": impl}
    given = common | {"layout": Layout.build([x]), "clip": ONE, "scale": ONE}
    calls = {
        "sample": lambda: sample_noise(
            (2,), mechanism="laplace", scale=1.0, offset=count - 2, **common
        ),
        "privatize": lambda: privatize_([x], **given),
        "clip_sum": lambda: clip_sum_noise([x[None]], p=1, **given),
    }
    with pytest.raises(ValueError, match=r"must be in \[0|at most \d+ elements"):
        calls[operation]()


@pytest.mark.parametrize("row", [3, (1 << 16) - 2])
@pytest.mark.parametrize("form", ["wide", "fast", "grid"])
def test_noise_of_far_rows(form, row, sparse, far_programs):
    """A row that begins beyond 2^31, and the tile of it that lies across 2^31."""
    count = FAR // 2 if row == 3 else 40_960
    tile = grid.TILE if form == "grid" else noise.TILE
    first = count - 2 * tile
    out = sparse((row + 1) * count, torch.float16).view(row + 1, count)
    far_programs(first // tile, row)
    words = torch.tensor([signed32(w) for w in NoiseKey.from_seed(1, "philox10").words])
    places = [
        out, ONE[0].double(), torch.tensor(0), torch.zeros(row + 1, dtype=torch.int64), words.int()
    ]  # fmt: skip
    options = {"GAUSSIAN": False, "CHACHA": False, "ROUNDS": rounds_of("philox10"), "TILE": tile}
    if form == "grid":
        places.append(grid.threshold_tensor(torch.device("cpu")))
        grid.grid_kernel[(2, 1)](*places, 0, 0, count, COUNTS=False, **options)
    else:
        noise.noise_kernel[(2, 1)](
            *places, 0, 0, count, None, None, FORM=form, BLOCKS=1, PARTS=1, **options
        )  # fmt: skip
    wanted = expected_noise("philox10", form, first, 2 * tile, torch.float16)
    assert ((out[row, first:].double() - wanted.double()).abs() <= 2.0**-8 * wanted.abs()).all()


@pytest.mark.parametrize("form", ["wide", "grid"])
def test_more_rows_than_a_grid_holds_take_more_launches(form, monkeypatch):
    module = grid if form == "grid" else noise
    assert module.MAX_ROWS == 65_535
    monkeypatch.setattr(module, "MAX_ROWS", 2)
    draws = [
        sample_noise(
            (5, 70), mechanism="laplace", scale=1.0, key=NoiseKey.from_seed(1), step=0,
            client=torch.arange(5), form=form, impl=impl, dtype=torch.float64,
        )
        for impl in ("torch", "triton")
    ]  # fmt: skip
    assert torch.equal(*draws)


def test_more_programs_than_a_grid_holds_take_more_launches(monkeypatch):
    for module in (clip_sum, product_norms):
        assert module.MAX_PROGRAMS == 2**31 - 1
        monkeypatch.setattr(module, "MAX_PROGRAMS", 5)
    x = [torch.randn(2, s) for s in (50_000, 3, 7)]
    layout = Layout.build([t[0] for t in x], [0, 0, 1])
    bounds = {"layout": layout, "clip": torch.tensor([100.0, 2.0]), "scale": None, "p": 1}
    sums = [
        clip_sum_noise(x, key=None, step=0, impl=impl, **bounds)[0] for impl in ("torch", "triton")
    ]
    for wanted, found in zip(*sums, strict=True):
        torch.testing.assert_close(found, wanted)
    a, g = torch.randn(4, 3, 70), torch.randn(4, 3, 70)
    grads = torch.bmm(g.double().transpose(1, 2), a.double())
    norms = product_norms.product_norms(a, g)
    torch.testing.assert_close(norms[0], grads.abs().sum((1, 2)), rtol=1e-5, atol=0)


@pytest.fixture
def some_chunks(monkeypatch):
    """Only the last chunks of every tensor are worked on: the others are zeros."""

    def last(offset, size, tile):
        end = (offset + size - 1) // tile * tile
        return np.array([max(end - tile, offset), end, offset + size])

    monkeypatch.setattr(launch_plan, "_pieces", last)


@pytest.mark.parametrize("form", ["wide", "fast", "grid"])
@pytest.mark.parametrize("extra", [0, 1027])
def test_privatize_of_far_elements(form, extra, sparse, some_chunks, monkeypatch):
    """The layer's last chunk, and a second tensor, whose elements are beyond 2^31."""
    monkeypatch.setattr(privatize, "TILES", dict.fromkeys(privatize.TILES, 1024))
    rng, size = "chacha8", FAR + extra
    big, small = sparse(size, torch.bfloat16), torch.full((COUNT,), 0.5, dtype=torch.bfloat16)
    big[-COUNT:] = 0.25
    layout = Layout.build([big, small], [0, 0])
    stats = privatize_(
        [big, small], layout=layout, clip=INF, scale=ONE, key=NoiseKey.from_seed(1, rng), step=0,
        form=form, impl="triton",
    )  # fmt: skip
    assert stats.l1_norm.item() == COUNT * 0.75
    for value, at, offset in ((big[-COUNT:], 0.25, size - COUNT), (small, 0.5, size)):
        wanted = at + expected_noise(rng, form, offset)
        assert ((value.double() - wanted).abs() <= 2.0**-7 * wanted.abs() + 2.0**-15).all()


def test_privatize_of_far_rows(sparse, some_chunks, monkeypatch):
    rows, size, rng = 3, FAR // 2 + 24_681, "philox10"
    x = sparse(rows * size, torch.bfloat16).view(rows, size)
    x[:, -COUNT:] = torch.arange(1.0, rows + 1)[:, None]
    given = {"layout": Layout.build([x[0]]), "clip": INF, "scale": ONE, "form": "wide"}
    privatize_(
        [x], clients=torch.zeros(rows, dtype=torch.int64) + torch.arange(rows), step=0,
        key=NoiseKey.from_seed(1, rng), impl="triton", **given,
    )  # fmt: skip
    for row in range(rows):
        wanted = row + 1 + sample_noise(
            (COUNT,), mechanism="laplace", scale=1.0, key=NoiseKey.from_seed(1, rng), step=0,
            client=row, offset=size - COUNT, impl="torch",
        )  # fmt: skip
        assert (
            torch.equal(x[row, -COUNT:], wanted.to(torch.bfloat16))
            or ((x[row, -COUNT:].float() - wanted).abs() <= 2.0**-7 * wanted.abs()).all()
        )


def test_a_plan_of_more_chunks_than_tickets_can_name_is_refused():
    layout = Layout.build([torch.empty(1)] * 4)
    rows = launch_plan.MAX_CHUNKS // 4
    with pytest.raises(ValueError, match="pieces"):
        launch_plan.make(layout, rows, tile=1024, itemsize=4, aligned=(True,) * 4)
    assert (launch_plan.MAX_CHUNKS - 1) << launch_plan.KIND_BITS | 3 == 2**31 - 1


@pytest.mark.parametrize("form", ["wide", "fast", "grid"])
def test_clipped_sums_of_far_records_and_elements(form, sparse, monkeypatch):
    """Records that lie 2^30 apart, and the last piece and tiles of a layer beyond 2^31."""
    size, rng = FAR + 4099, "chacha8"
    make = clip_sum._plan.__wrapped__

    def last(layout, dtypes, tile, device):
        whole = make(layout, dtypes, tile, device)
        group = whole.groups[0]
        pieces, tiles = group.pieces[-2:].clone(), group.tiles[-7:]
        pieces[:, 4] -= pieces[0, 4].item()
        layers = torch.tensor([(0, 2, layout.dims[0])])
        some = clip_sum._Group(group.dtype, pieces, tiles)
        return clip_sum.SumPlan((some,), layers, whole.statics, 2)

    monkeypatch.setattr(clip_sum, "_plan", last)
    store = sparse(size + FAR, torch.bfloat16)
    x = store.as_strided((3, size), (FAR // 2, 1))
    for row in range(3):
        x[row, -COUNT:] = 2.0**row
    sums, stats = clip_sum_noise(
        [x], layout=Layout.build([x[0]]), clip=torch.tensor([1e9]), scale=ONE,
        p=1, key=NoiseKey.from_seed(1, rng), step=0, form=form, impl="triton", last=form != "grid",
        mechanism="laplace",
    )  # fmt: skip
    assert stats.l1_norm[:, 0].tolist() == [COUNT * 2.0**row for row in range(3)]
    if form == "grid":  # whose noise is that of `sample_noise`
        assert (
            sums[0][-COUNT:] == sum(int(2**row / quantum(ONE, "laplace")) for row in range(3))
        ).all()
        return
    wanted = 7 + expected_noise(rng, form, size - COUNT)
    found = sums[0][-COUNT:].double()
    assert ((found - wanted).abs() <= 2.0**-7 * wanted.abs() + 2.0**-15).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_norms_of_products_with_far_strides(axis, sparse):
    shape, stride = [2, 3, 5], [1, 2, 6]
    shape[axis], stride[axis] = 4, FAR - 3
    a = sparse(4 * FAR, torch.bfloat16).as_strided(shape, stride)
    a.copy_(torch.randn(shape))
    g = torch.randn(*shape[:2], 6).to(torch.bfloat16)
    for left, right in ((a, g), (g, a)):
        grads = torch.bmm(right.double().transpose(1, 2), left.double())
        norms = product_norms.product_norms(left, right)
        torch.testing.assert_close(norms[0], grads.abs().sum((1, 2)), rtol=1e-5, atol=0)
        torch.testing.assert_close(norms[1], grads.square().sum((1, 2)), rtol=1e-5, atol=0)
