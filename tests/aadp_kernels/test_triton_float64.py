"""Graphics cards have little float64, and AMD devices no PTX: both is said before a launch."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from aadp_kernels import _dispatch
from bench.cards import CARDS, properties

pytest.importorskip("triton")
from aadp_kernels._triton import _device, float64

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("RTX 3090", 20, 30), ("RTX 4090", 10, 14), ("RTX 5090", 14, 20), ("A100", 2, 4),
        ("H200", 1.5, 3),
    ],
)  # fmt: skip
def test_predicted_time_of_float64_over_that_of_memory(name, low, high):
    ratio = float64.times_memory(properties(name))
    assert ratio is not None
    assert low < ratio < high


def test_the_ratio_is_that_of_two_times():
    """The same from seconds: operations over their rate, bytes over the bandwidth."""
    card = properties("RTX 4090")
    arithmetic = float64.OPERATIONS / (2 * 128 * 2.52e9)
    memory = 8 / (2 * 10.501e9 * 384 / 8)
    assert float64.times_memory(card) == pytest.approx(arithmetic / memory, rel=1e-6)


def test_devices_that_do_not_tell_their_clocks():
    for capability, slow in (((8, 9), True), ((9, 0), False)):
        device = SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=9)
        ratio = float64.times_memory(device)
        assert ratio is not None
        assert (ratio > float64.NOTABLE) == slow
    assert float64.times_memory(SimpleNamespace(major=99, minor=0)) is None


def test_capabilities_with_little_float64():
    slow = {(7, 5), (8, 6), (8, 7), (8, 9), (10, 3), (11, 0), (12, 0), (12, 1)}
    for capability in slow:
        assert float64.per_clock(*capability) == 2
    for capability, rate in (((8, 0), 32), ((9, 0), 64), ((10, 0), 64)):
        assert float64.per_clock(*capability) == rate


@pytest.fixture
def card(monkeypatch):
    """A function that makes the CUDA device another one."""
    _dispatch._backend.cache_clear()

    def become(name):
        _dispatch._backend.cache_clear()
        found = properties(name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: CARDS[name][0])

    yield become
    _dispatch._backend.cache_clear()


def choose(operation, form):
    return _dispatch.backend("auto", operation, device=CUDA, elements=1 << 20, form=form)


def test_wide_noise_on_a_graphics_card_warns_once(card):
    card("RTX 4090")
    for operation in ("privatize", "noise"):
        with pytest.warns(UserWarning, match=r"RTX 4090 .*8\.9.*predicted .* times .*form='fast'"):
            found = choose(operation, "wide")
        # It says so and changes nothing: the form that was asked for is the form that is drawn.
        assert found.__name__ == "aadp_kernels._triton.backend"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            choose(operation, "wide")


@pytest.mark.parametrize(
    ("name", "operation", "form"),
    [
        ("RTX 4090", "privatize", "fast"), ("RTX 4090", "privatize", "grid"),
        ("RTX 4090", "clip_sum", "wide"), ("H200", "privatize", "wide"), ("A100", "noise", "wide"),
    ],
)  # fmt: skip
def test_nothing_is_said_where_float64_does_not_set_the_time(name, operation, form, card):
    card(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose(operation, form)


@pytest.fixture
def amd(monkeypatch):
    """This torch as if it were built for AMD's devices."""
    _dispatch._backend.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    yield
    _dispatch._backend.cache_clear()


def test_the_fast_form_is_refused_by_name_on_an_amd_device(amd):
    place = {"device": CUDA, "elements": 1 << 20}
    for operation in ("privatize", "noise", "clip_sum"):
        with pytest.raises(ValueError, match="form='fast' on an AMD device"):
            _dispatch.choose("triton", operation, form="fast", **place)
        for form in ("wide", "grid"):
            assert _dispatch.choose("triton", operation, form=form, **place) == "triton"
            # Nobody has run it there, so nobody gets it unasked.
            assert _dispatch.choose("auto", operation, form=form, **place) == "torch"
        assert _dispatch.choose("auto", operation, form="fast", **place) == "torch"
    assert float64.note(CUDA, "wide") is None


def test_options_of_nvidias_assembler_stay_away_from_an_amd_device(amd):
    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: seen.append(constants)

    _device.launch(Kernel(), (1,), torch.device("cpu"), maxnreg=128, P=1)
    assert seen == [{"P": 1}]
