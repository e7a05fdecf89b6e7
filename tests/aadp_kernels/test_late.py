"""When numba's compiler begins, and that no bit depends on it."""

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from aadp_kernels import (
    Correlation,
    Layout,
    NoiseKey,
    _dispatch,
    _late,
    compiling,
    layer_norms,
    poisson_mask,
    privatize_,
    sample_noise,
)

pytest.importorskip("numba")
CPU = torch.device("cpu")


@pytest.fixture
def fresh(monkeypatch):
    """A process that has drawn and compiled nothing; returns what is on disk, to be added to."""
    there = set()
    monkeypatch.setattr(_late, "_drawn", {})
    monkeypatch.setattr(_late, "_compiled", set())
    monkeypatch.setattr(_dispatch, "_at_hand", lambda *what: what in there)
    return there


def chosen(operation="privatize", form="wide", numbers=1000, impl="auto", elements=1000):
    found = _dispatch.backend(
        impl, operation, device=CPU, elements=elements, form=form, numbers=numbers
    )
    return found.__name__.split(".")[1].replace("_cpu", "numba").strip("_")


def test_plain_torch_draws_so_many_numbers_before_numba_compiles(fresh):
    each = _late.PATIENCE // 4
    assert [chosen(numbers=each) for _ in range(6)] == ["torch"] * 4 + ["numba"] * 2
    assert chosen(numbers=0) == "numba"


def test_operations_and_forms_wait_by_themselves(fresh):
    assert chosen(numbers=_late.PATIENCE + 1) == "numba"
    assert chosen("noise") == "torch"
    assert chosen("privatize", "grid") == "torch"


def test_what_is_compiled_already_is_called_at_once(fresh):
    fresh.add(("noise", "wide"))
    assert chosen("noise") == "numba"
    assert chosen("privatize") == "torch"
    fresh.clear()
    assert chosen("noise") == "numba"


@pytest.mark.parametrize(
    ("operation", "form"), [("privatize", "fast"), ("noise", "fast"), ("clip_sum", "wide")]
)
def test_what_has_other_bits_in_plain_torch_never_waits(fresh, operation, form):
    assert chosen(operation, form, 0) == "numba"
    assert (operation, form) not in _late.SAME_BITS


def test_who_asks_for_a_back_end_gets_it(fresh):
    assert chosen(impl="numba") == "numba"
    assert chosen(impl="torch", numbers=10 * _late.PATIENCE) == "torch"
    assert chosen() == "torch"


def test_now_and_never(fresh):
    with compiling("now"):
        assert chosen() == "numba"
    assert chosen() == "torch"
    with compiling("never"):
        assert chosen(numbers=10 * _late.PATIENCE) == "torch"
        assert chosen("clip_sum") == "torch"
        assert chosen("noise", "fast") == "numba"


def fail():
    assert chosen() == "numba"
    raise KeyError


def test_it_ends_with_an_error(fresh):
    with pytest.raises(KeyError), compiling("now"):
        fail()
    assert chosen() == "torch"


@pytest.mark.parametrize("inner", ["now", "late", "never"])
def test_an_inner_one_allows_nothing_that_an_outer_one_forbids(fresh, inner):
    with compiling("never"), compiling(inner):
        assert chosen(numbers=10 * _late.PATIENCE) == "torch"


def test_an_inner_one_counts_otherwise(fresh):
    with compiling("now"), compiling("late"):
        assert chosen() == "torch"


def test_another_thread_is_not_asked(fresh):
    found = []
    with compiling("now"):
        thread = threading.Thread(target=lambda: found.append(chosen()))
        thread.start()
        thread.join()
    assert found == ["torch"]


@pytest.mark.parametrize("when", ["soon", "", None, True])
def test_another_word_is_refused(when):
    with pytest.raises(ValueError, match=rf"when.*{when!r}"), compiling(when):
        pass


def test_backward_has_no_compiled_part_where_nothing_is_compiled():
    x = torch.zeros(3, 4)
    with compiling("never"):
        assert _dispatch.record_kernels(x) is None
    assert _dispatch.record_kernels(x) is not None


def test_work_counts_tensors_and_clients():
    layout = Layout.build({"weight": torch.zeros(10, 3), "bias": torch.zeros(10)})
    one = 40 + 2 * _late.NUMBERS_A_TENSOR
    assert _late.work(layout, None) == one
    assert _late.work(layout, torch.arange(7)) == 7 * one
    assert _late.work(layout, None, [1, 2, 3]) == one + 3 * 40


def test_a_number_on_the_grid_counts_as_many(fresh):
    each = _late.PATIENCE // _late.A_GRID_NUMBER
    assert [chosen(form="grid", numbers=each) for _ in range(2)] == ["torch", "numba"]


@pytest.mark.parametrize("terms", [1, 5])
def test_noise_that_is_drawn_again_is_work(fresh, monkeypatch, terms):
    numbers = []
    monkeypatch.setattr(_late, "waits", lambda _o, _f, n, _a: numbers.append(n) or True)
    correlation = Correlation([1.0] + [0.1] * terms)
    given = {"key": NoiseKey.from_seed(1), "mechanism": "gaussian", "correlation": correlation}
    sample_noise((100,), scale=1.0, step=9, **given)
    x = [torch.zeros(100)]
    one = torch.ones(1)
    privatize_(x, layout=Layout.build(x), clip=one, scale=one, p=2, step=20, **given)
    assert numbers == [100 * (1 + terms), 100 * (1 + terms) + _late.NUMBERS_A_TENSOR]


def results(key):
    """Every operation that may wait, on numbers that are clipped."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(70_001, generator=generator), torch.randn(3, 50, generator=generator)]
    layout = Layout.build(tensors)
    given = {"layout": layout, "clip": torch.tensor([9.0, 5.0]), "scale": torch.tensor([0.3, 0.0])}
    found = [layer_norms(tensors, layout=layout, p=p) for p in (1, 2)]
    for step, (form, p) in enumerate([("wide", 1), ("wide", 2), ("grid", 1), ("grid", 2)]):
        mechanism = "laplace" if p == 1 else "gaussian"
        own = [t.clone() for t in tensors]
        stats = privatize_(
            own, key=key, step=step, p=p, mechanism=mechanism, form=form, **given,
            votes_at=torch.tensor([5e4, 1.0]),
        )  # fmt: skip
        found += [*own, *stats]
        found.append(
            sample_noise((70,), mechanism=mechanism, scale=0.7, key=key, step=step + 9, form=form)
        )
    # Noise of earlier steps is drawn once more.
    again = {"correlation": Correlation([1.0, -0.3, 0.2]), "mechanism": "gaussian", "key": key}
    privatize_(tensors, step=100, p=2, **given, **again)
    found += [*tensors, sample_noise((700,), scale=0.7, step=200, **again)]
    return [*found, poisson_mask(700, 0.3, key=key, step=0)]


def test_no_bit_depends_on_when_numba_compiles():
    every = {}
    for when in ("never", "now"):
        with compiling(when):
            every[when] = results(NoiseKey.from_seed(3))
    for a, b in zip(every["never"], every["now"], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def in_another_process(code, cache):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"NUMBA_CACHE_DIR": str(cache)},
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip


def test_a_cache_on_disk_is_found(tmp_path):
    ask = (
        "import torch; from aadp_kernels import _dispatch, NoiseKey, poisson_mask\n"
        "coins = lambda **k: poisson_mask(100, 0.5, key=NoiseKey.from_seed(1), step=0, **k)\n"
        "print(_dispatch._at_hand('coins', 'wide'))\n"
    )
    use = "coins(impl='numba'); print(_dispatch._at_hand('coins', 'wide'))\n"
    assert in_another_process(ask + use, tmp_path) == ["False", "True"]
    assert in_another_process(ask, tmp_path) == ["True"]


def test_a_first_release_does_not_wait_for_the_compiler(tmp_path):
    code = (
        "import sys, torch; from aadp_kernels import Layout, NoiseKey, privatize_\n"
        "x = [torch.randn(64, 784), torch.randn(10)]; one = torch.ones(2)\n"
        "privatize_(x, layout=Layout.build(x), clip=one, scale=one, key=NoiseKey.from_seed(1),\n"
        "           step=0, mechanism='laplace')\n"
        "from aadp_kernels._cpu import clip\n"
        "print(len(clip._privatize.kernel.overloads), len(clip._privatize_rows.kernel.overloads))\n"
    )
    assert in_another_process(code, tmp_path) == ["0", "0"]


def test_a_kernel_that_is_compiled_is_logged(caplog, monkeypatch):
    _jit = pytest.importorskip("aadp_kernels._cpu._jit")

    def ours(x):
        return x + 1

    def others(x):
        return x + 2

    monkeypatch.setattr(_jit, "_HERE", Path(__file__).parent)
    with caplog.at_level(logging.INFO, logger="aadp_kernels.compiler"):
        _jit.numba.njit(ours)(1)
        assert caplog.messages == ["compiling ours"]
        monkeypatch.setattr(_jit, "_HERE", Path("elsewhere"))
        _jit.numba.njit(others)(1)
    assert caplog.messages == ["compiling ours"]
