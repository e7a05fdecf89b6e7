"""Clip factors decided in numba, rows in one walk, and the threads beneath."""

import importlib
import itertools
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aadp_kernels import Layout, NoiseKey, clipped_linear, privatize_
from aadp_kernels import threads as _threads
from aadp_kernels.certified import ballots, clip_factors
from aadp_kernels.contract import Precision

pytest.importorskip("numba")
clip = pytest.importorskip("aadp_kernels._cpu.clip")
_parallel = pytest.importorskip("aadp_kernels._cpu._parallel")
_jit = pytest.importorskip("aadp_kernels._cpu._jit")

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
edges = st.sampled_from([0.0, math.inf, 5e-324, 1e-310, 2.3e-308, 1.0, 1e300])
sizes = st.floats(0, 1e12) | edges


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(sizes | st.just(math.nan), sizes, sizes | st.just(math.nan)), min_size=1),
    st.sampled_from(DTYPES),
    st.integers(0, 1 << 40),
    st.sampled_from([1, 2]),
)
def test_decisions_are_those_of_the_specification(cases, dtype, count, p):
    total, limit, at = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*cases, strict=True)
    )
    rows, info = len(cases), torch.finfo(dtype)
    precision = Precision(*(torch.tensor([[v]], dtype=torch.float64) for v in
                            (info.eps, info.smallest_normal)))  # fmt: skip
    layout = Layout.build([torch.empty(count, device="meta")])
    decisions = clip.Decisions.build(layout, precision, limit[:, None], at[:, None])
    sums = torch.stack([total, total]).view(2, rows, 1).numpy()
    clip.decide_all(sums, np.array([0, 1]), p, decisions)

    norm = total if p == 1 else torch.from_numpy(np.sqrt(total.numpy()))
    finite = torch.isfinite(norm) & torch.isfinite(total)
    factor, clipped = clip_factors(norm, limit, finite, count, dtype)
    stats = decisions.stats()
    assert torch.equal(torch.from_numpy(decisions.numbers)[clip.FACTOR, :, 0], factor)
    assert torch.equal(stats.clipped[:, 0], clipped.long())
    assert torch.equal(stats.nonfinite[:, 0], (~finite).long())
    assert torch.equal(stats.votes[:, 0], ballots(total, at, finite))


def test_every_row_has_the_precision_of_its_own_dtype():
    norm, limit = torch.full((4,), 2.0, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    infos = [torch.finfo(dtype) for dtype in DTYPES]
    columns = [i.eps for i in infos], [i.smallest_normal for i in infos]
    precision = Precision(*(torch.tensor(c, dtype=torch.float64)[:, None] for c in columns))
    layout = Layout.build([torch.empty(3, device="meta")])
    decisions = clip.Decisions.build(layout, precision, limit[:, None], None)
    clip.decide_all(torch.stack([norm, norm]).view(2, 4, 1).numpy(), np.array([0, 1]), 1, decisions)
    finite = torch.tensor(True)
    factors = [clip_factors(norm[0], limit[0], finite, 3, dtype)[0] for dtype in DTYPES]
    assert torch.equal(torch.from_numpy(decisions.numbers)[clip.FACTOR, :, 0], torch.stack(factors))
    assert len(set(map(float, factors))) == 4


def test_fast_factors_cover_the_rounding_of_a_difference():
    """All elements of a row are equal, so that their roundings cannot cancel."""
    generator = torch.Generator().manual_seed(0)
    rows, size = 20_000, 8
    value = (torch.rand(rows, 1, generator=generator) + 1).expand(rows, size).contiguous()
    layout, reference = Layout.build([value[0]]), torch.full((size,), 0.3)
    before = (value.double() - reference.double()).abs().sum(1)
    bound = before * (0.3 + 0.6 * torch.rand(rows, generator=generator, dtype=torch.float64))
    privatize_([value], layout=layout, clip=bound[:, None], key=NoiseKey.from_seed(0), step=0,
               scale=torch.full((rows, 1), 1e-30), clients=torch.arange(rows), form="fast",
               reference=[reference], impl="numba")  # fmt: skip
    after = value.double().abs().sum(1)
    assert bool((after <= bound).all())
    assert bool((after >= bound * (1 - 1e-6)).all())


@pytest.mark.parametrize("form", ["wide", "fast"])
@pytest.mark.parametrize("rows", [3, 40])
def test_rows_beside_each_other_and_one_after_another_give_the_same(monkeypatch, rows, form):
    layout = Layout.build([torch.zeros(70_001), torch.zeros(600)])
    tensors = [torch.randn(rows, n, generator=torch.Generator().manual_seed(n))
               for n in layout.sizes]  # fmt: skip
    results = []
    for fewest, region in itertools.product((1, 10**9), {0, _threads.region_for(1 << 30)[1]}):
        monkeypatch.setattr(clip, "_ROWS_PER_THREAD", fewest)
        monkeypatch.setattr(clip, "region_for", lambda elements, region=region: (2, region))
        own = [t.clone() for t in tensors]
        stats = privatize_(own, layout=layout, clip=torch.tensor([5e4, 1e9]), step=0, form=form,
                           scale=torch.full((2,), 0.1), key=NoiseKey.from_seed(0), impl="numba",
                           clients=torch.arange(rows))  # fmt: skip
        results.append([*own, *stats])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    norms = torch.stack([t.double().abs().sum(1) for t in tensors], 1)
    torch.testing.assert_close(results[0][2], norms)


@pytest.fixture(params=["openmp", "threads"])
def threads(request, monkeypatch):
    """Three threads, torch's own or others."""
    if request.param == "threads":
        monkeypatch.setattr(_threads, "_openmp", lambda: None)
    elif _threads._openmp() is None:
        pytest.skip("torch brings no libgomp here")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_every_index_is_worked_on_once(threads):
    for count in (0, 1, 2, 3, 100):
        seen = np.zeros(count, int)

        def work(begin, end, seen=seen):
            seen[begin:end] += 1

        _threads.run_on_threads(work, count, elements=1 << 30)
        assert (seen == 1).all()


@_jit.jit
def _count(seen, offset, begin, end):
    for i in range(begin, end):
        seen[i] += offset


@_jit.jit
def _count_parallel(seen, threads, region):
    _parallel.parallel(_count, (seen, 3), len(seen), threads, region)


several_threads = pytest.mark.skipif(
    _threads.region_for(1 << 30)[1] == 0, reason="torch brings no libgomp here, or has one thread"
)


@several_threads
def test_compiled_code_works_on_every_index_once():
    for count in (0, 1, 2, 7, 8, 9, 100_003):
        seen = np.zeros(count, int)
        for _ in range(5):
            _count_parallel(seen, 3, _threads.region_for(1 << 30)[1])
        assert (seen == 15).all()


@pytest.mark.parametrize("form", ["wide", "fast"])
def test_noise_and_norms_have_the_same_bits_on_any_threads(threads, form):
    def release():
        value = torch.linspace(-1, 1, 300_001)
        stats = privatize_([value], layout=Layout.build([value]), clip=torch.tensor([3.0]), step=0,
                           scale=torch.ones(1), key=NoiseKey.from_seed(0), form=form,
                           impl="numba")  # fmt: skip
        return [value, *stats]

    several = release()
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(several, release(), strict=True))


def test_a_cache_that_names_a_class_that_is_gone_counts_as_empty(tmp_path, monkeypatch):
    lines = ["from typing import NamedTuple"]
    for name in ("Old", "New"):
        lines.append(f"class {name}(NamedTuple):\n    a: int\n    b: int")
    (tmp_path / "of_a_version.py").write_text(
        "\n".join([*lines, "def add(pair):\n    return pair.a + pair.b"])
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("of_a_version")
    add = _jit.jit(module.add)
    assert add(module.Old(1, 2)) == 3
    folder = Path(getattr(add, "kernel", add)._cache.cache_path)  # NUMBA_CACHE_DIR says where
    assert list(folder.glob("of_a_version.add*.nbi")), list(folder.iterdir())
    monkeypatch.delattr(module, "Old")
    assert _jit.jit(module.add)(module.New(3, 4)) == 7


@_jit.jit
def _fail_at_seven(seen, begin, end):
    for i in range(begin, end):
        if i == 7:
            raise MemoryError("seven")
        seen[i] += 1


@_jit.jit
def _fail_parallel(seen, threads, region):
    _parallel.parallel(_fail_at_seven, (seen,), len(seen), threads, region)


@several_threads
def test_an_error_in_compiled_code_is_raised_when_the_others_are_done():
    seen = np.zeros(100, int)
    for _ in range(3):
        with pytest.raises(MemoryError):
            _fail_parallel(seen, 2, _threads.region_for(1 << 30)[1])
    assert (seen[50:] == 3).all()
    _fail_parallel(seen[:7], 2, _threads.region_for(1 << 30)[1])


def _negative(value):
    """A tensor of these values whose memory holds them with the other sign."""
    view = torch.complex(torch.zeros_like(value), -value).conj().imag
    assert view.is_neg()
    assert torch.equal(view, value)
    return view


@pytest.mark.parametrize("which", ["tensors", "out", "clip", "scale", "reference", "votes_at"])
def test_a_tensor_with_its_sign_in_a_bit_is_read_and_written_right(which):
    layout, results = Layout.build([torch.zeros(300)]), []
    for change in (torch.clone, _negative):
        value = torch.linspace(-1, 1, 300, dtype=torch.float64)
        given = {"tensors": value, "out": value.clone(), "reference": value / 2,
                 "clip": torch.tensor([40.0], dtype=torch.float64),
                 "scale": torch.tensor([2.0], dtype=torch.float64),
                 "votes_at": torch.tensor([80.0], dtype=torch.float64)}  # fmt: skip
        given[which] = change(given[which])
        for name in ("tensors", "out", "reference"):
            given[name] = [given[name]]
        stats = privatize_(**given, layout=layout, key=NoiseKey.from_seed(0), step=0, impl="numba")
        results.append([given["out"][0].clone(), *stats])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][0].std() > 1


@pytest.mark.parametrize("which", ["x", "grad"])
def test_layers_see_the_sign_in_a_bit(which):
    weight = torch.ones(3, 4, requires_grad=True)
    sums = []
    for change in (torch.clone, _negative):
        x, grad = torch.linspace(-1, 2, 20).view(5, 4), torch.linspace(-2, 1, 15).view(5, 3)
        x, grad = (change(x), grad) if which == "x" else (x, change(grad))
        clipped_linear(x, weight, clip=torch.tensor(1.0)).backward(grad)
        sums.append(weight.grad.clone())
        weight.grad = None
    torch.testing.assert_close(*sums)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer:UserWarning")
def test_a_tensor_without_memory_is_refused():
    value = torch.zeros(100)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(value)
    with pytest.raises(ValueError, match="without memory"):
        privatize_([fake], layout=Layout.build([value]), clip=torch.ones(1), scale=torch.zeros(1),
                   key=None, step=0, impl="numba")  # fmt: skip


def test_an_error_of_any_thread_is_raised_when_all_have_ended(threads):
    ended = []

    def work(begin, end):
        ended.append(begin)
        if begin == 2:
            raise ArithmeticError(str(end))

    with pytest.raises(ArithmeticError, match="3"):
        _threads.run_on_threads(work, 3, elements=1 << 30)
    assert sorted(ended) == [0, 1, 2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_workers_it_has_not():
    torch.ones(1 << 20).mul_(2)
    _threads.run_on_threads(lambda begin, end: None, 2, elements=1 << 30)
    child = os.fork()
    if child == 0:
        done = []
        torch.set_num_threads(2)
        _threads.run_on_threads(lambda begin, end: done.append(begin), 2, elements=1 << 30)
        os._exit(len(done) + 10 * (_threads.region_for(1 << 30) != (2, 0)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
