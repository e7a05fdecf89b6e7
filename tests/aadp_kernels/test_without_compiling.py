"""Within `without_compiling` no call waits for numba, and the noise is the same."""

import logging
import threading
from pathlib import Path

import pytest
import torch

from aadp_kernels import _dispatch, privatize_, without_compiling
from tests.aadp_kernels.cpu_inputs import key, noise
from tests.aadp_kernels.test_cpu import LAYOUT, updates

pytest.importorskip("numba")
CPU = torch.device("cpu")


def chosen(form="wide"):
    return _dispatch.choose("auto", "noise", device=CPU, elements=1000, form=form)


def fail():
    assert chosen() == "torch"
    raise KeyError


def test_it_holds_inside_and_ends_with_an_error():
    with pytest.raises(KeyError), without_compiling():
        fail()
    assert chosen() == "numba"


def test_an_inner_one_allows_nothing_that_an_outer_one_forbids():
    with without_compiling(), without_compiling(False):
        assert chosen() == "torch"
    with without_compiling(False):
        assert chosen() == "numba"


def test_the_fast_form_keeps_its_numbers():
    with without_compiling():
        assert chosen("fast") == "numba"


def test_another_thread_is_not_asked():
    found = []
    with without_compiling():
        thread = threading.Thread(target=lambda: found.append(chosen()))
        thread.start()
        thread.join()
    assert found == ["numba"]


def test_backward_has_no_compiled_part_inside():
    x = torch.zeros(3, 4)
    with without_compiling():
        assert _dispatch.record_kernels(x) is None
    assert _dispatch.record_kernels(x) is not None


@pytest.mark.parametrize("mechanism", ["laplace", "gaussian"])
def test_noise_has_the_same_bits(mechanism):
    p = 1 if mechanism == "laplace" else 2
    ones = torch.ones(4, dtype=torch.float64)
    arguments = {"layout": LAYOUT, "clip": 1e9 * ones, "scale": 0.3 * ones, "p": p}
    outside, inside = updates(), updates()
    privatize_(outside, mechanism=mechanism, key=key(), step=1, **arguments)
    with without_compiling():
        privatize_(inside, mechanism=mechanism, key=key(), step=1, **arguments)
    assert all(map(torch.equal, outside, inside))
    one = noise("auto", (700,))
    with without_compiling():
        assert torch.equal(one, noise("auto", (700,)))


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
