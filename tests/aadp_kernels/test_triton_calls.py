"""A call that is kept: taken again for the same places of memory only, and it keeps no value."""

import gc
import math
import weakref

import pytest
import torch

from aadp_kernels import Layout, NoiseKey, ReusedNoiseError, privatize_

pytest.importorskip("triton")
from aadp_kernels import _seen
from aadp_kernels._triton import privatize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(4, 6), (10,), (6, 4)]


@pytest.fixture(autouse=True)
def fewer_tiles(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(privatize, "TILES", dict.fromkeys(privatize.TILES, 1024))


def layout():
    return Layout.build([torch.empty(s) for s in SHAPES])


def tensors(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(DEVICE, dtype) for s in SHAPES]


def run(values, plan, *, impl="triton", key=None, step=0, clip=3.0, scale=0.5, **options):
    place = {"device": DEVICE, "dtype": torch.float64}
    return privatize_(
        values, layout=plan, clip=torch.full((3,), clip, **place),
        scale=torch.full((3,), scale, **place), key=key or NoiseKey.from_seed(1, "philox10"),
        step=step, impl=impl, **options,
    )  # fmt: skip


def calls(plan):
    return vars(plan).get("_triton_calls", {})


def settled():
    """A layout whose call over its tensors is kept, and the tensors."""
    plan, values = layout(), tensors()
    for step in range(4):
        run(values, plan, step=step)
    assert len(calls(plan)) == 1
    return plan, values


def assert_right(values, plan, *, seed=1, **options):
    """Equal to the specification, whatever is kept."""
    expected = [v.clone() for v in values]
    keys = [NoiseKey.from_seed(seed, "philox10") for _ in range(2)]
    wanted = run(expected, layout(), impl="torch", key=keys[0], **options)
    stats = run(values, plan, key=keys[1], **options)
    for value, other in zip(values, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=0)
    for one, other in zip(stats, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_values_are_those_of_each_call():
    plan, values = settled()
    (call,) = calls(plan).values()
    for step, clip, scale, seed in ((9, 1.0, 0.0, 3), (10, math.inf, 2.0, 4), (11, 0.0, 0.1, 5)):
        for value, new in zip(values, tensors(seed=seed), strict=True):
            value.copy_(new)
        key = {"key": NoiseKey.from_seed(seed, "philox10")}
        expected = [v.clone() for v in values]
        run(expected, layout(), impl="torch", step=step, clip=clip, scale=scale,
            key=NoiseKey.from_seed(seed, "philox10"))  # fmt: skip
        run(values, plan, step=step, clip=clip, scale=scale, **key)
        for value, other in zip(values, expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-6, atol=0)
    # Without noise the kernel has other constants.
    assert len(calls(plan)) <= 2
    assert call in calls(plan).values()


@pytest.mark.parametrize("change", ["dtype", "strides", "shape", "type"])
def test_other_tensors_at_the_same_addresses(change):
    plan, values = settled()
    first = values[0]
    if change == "strides":
        first.data = first.data.as_strided((4, 6), (1, 4))
        # The look is remembered in the second call, and the call in the third.
        for step in range(7, 12):
            assert_right(values, plan, step=step)
    elif change == "dtype":
        first.data = first.data.view(torch.int32).view(torch.float16)[:, :6]
        assert first.dtype == torch.float16
        for step in range(7, 12):
            expected = [v.clone() for v in values]
            run(expected, layout(), impl="torch", step=step)
            run(values, plan, step=step)
            for value, other in zip(values, expected, strict=True):
                torch.testing.assert_close(value, other, rtol=1e-3, atol=0)
    elif change == "shape":
        first.data = first.data.view(6, 4)
        with pytest.raises(ValueError, match="shape"):
            run(values, plan, step=7)
    else:
        values[0] = first.view(torch.int32)
        with pytest.raises(ValueError, match="floating"):
            run(values, plan, step=7)


def scratch(plan):
    """The scratch that the layout's plans keep for the next launch."""
    return [each for made in vars(plan)["_triton_plans"].values() for each in made.free]


def test_what_a_launch_left_behind_is_cleared():
    plan, values = settled()
    (kept,) = scratch(plan)
    for dirt in (kept.counters, kept.partials, kept.step):
        dirt.fill_(7)
    assert_right(values, plan, step=7)
    assert [id(each) for each in scratch(plan)] == [id(kept)]


def test_a_launch_that_is_being_made_shares_its_scratch_with_no_other(monkeypatch):
    """As two threads may: the other call comes between the clearing and the launch."""
    plan, values = settled()
    others, launched, once = tensors(seed=1), [], privatize.launch

    def launch(*arguments, **constants):
        if not launched:
            launched.append(None)
            assert_right(others, plan, step=8, seed=2)
        launched.append(arguments[5].data_ptr())
        once(*arguments, **constants)

    monkeypatch.setattr(privatize, "launch", launch)
    assert_right(values, plan, step=7)
    assert len(launched) == 3
    assert launched[1] != launched[2]
    assert len(scratch(plan)) == 2


def test_scratch_of_inference_mode_serves_outside_of_it():
    plan, values = layout(), tensors()
    with torch.inference_mode():
        run(values, plan)
    assert len(scratch(plan)) == 1
    for step in range(1, 5):
        assert_right(values, plan, step=step)
    assert len(scratch(plan)) == 1


def test_a_launch_that_fails_keeps_its_scratch(monkeypatch):
    plan, values = settled()

    def broken(*_, **__):
        raise RuntimeError("no such kernel")

    with monkeypatch.context() as context:
        context.setattr(privatize, "launch", broken)
        with pytest.raises(RuntimeError, match="no such kernel"):
            run(values, plan, step=7)
    assert scratch(plan) == []
    assert_right(values, plan, step=8)


def test_bad_arguments_are_refused_as_ever():
    plan, values = settled()
    with pytest.raises(ValueError, match="3 tensors"):
        run(values[:2], plan, step=7)
    with pytest.raises(ValueError, match="shape"):
        run([values[2], values[1], values[0]], plan, step=7)
    if DEVICE == "cpu":
        for bad in (-1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match="scale"):
                run(values, plan, step=7, scale=bad)
        for bad in (-1.0, math.nan):
            with pytest.raises(ValueError, match="clip"):
                run(values, plan, step=7, clip=bad)


def test_noise_is_claimed_in_every_call():
    plan, values = layout(), tensors()
    key = NoiseKey.from_seed(1, "philox10")
    for step in range(200):
        run(values, plan, key=key, step=step)
        with pytest.raises(ReusedNoiseError):
            run(values, plan, key=key, step=step)
        if step == 5:
            break
    assert len(calls(plan)) == 1
    with pytest.raises(ReusedNoiseError):
        run(values, plan, key=key, step=3)


def test_nothing_of_the_user_is_kept_alive():
    plan, values = settled()
    key = NoiseKey.from_seed(1, "philox10")
    run(values, plan, key=key, step=9)
    gone = [weakref.ref(t) for t in values] + [weakref.ref(key)]
    del values, key
    gc.collect()
    assert not [ref for ref in gone if ref() is not None]


def test_few_calls_and_guards_are_kept():
    plan = layout()
    held = [tensors(seed=s) for s in range(privatize._CALLS + 4)]
    for values in held:
        for step in range(3):
            run(values, plan, step=step, scale=0.0)
    assert len(calls(plan)) == privatize._CALLS
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        for kind in (torch.Tensor, torch.nn.Parameter):
            run([t if kind is torch.Tensor else kind(t) for t in tensors(dtype)], plan, scale=0.0)
    assert len(vars(plan)["_seen"]) == _seen._GUARDS


def test_versions_of_the_results_count_up():
    plan, values = settled()
    before = [v._version for v in values]
    run(values, plan, step=9)
    assert all(v._version > b for v, b in zip(values, before, strict=True))
    with torch.inference_mode():
        frozen = tensors()
        for step in range(4):
            run(frozen, plan, step=step)


def test_out_and_reference_have_places_of_their_own():
    plan, values, reference, out = layout(), tensors(), tensors(seed=1), tensors(seed=2)
    for step in range(5):
        expected = [torch.empty_like(v) for v in values]
        options = {"reference": reference, "step": step}
        run(values, layout(), impl="torch", out=expected, **options)
        run(values, plan, out=out, **options)
        for value, other in zip(out, expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-6, atol=0)
        reference[0] = reference[0].clone()


def test_a_cohort_and_its_reference_are_remembered_each():
    plan, clients = layout(), torch.arange(2, device=DEVICE)
    values = [torch.stack([a, b]) for a, b in zip(tensors(), tensors(seed=1), strict=True)]
    reference = tensors(seed=2)
    for step in range(4):
        assert_right(values, plan, reference=reference, clients=clients, step=step)
    assert len(calls(plan)) == 1


def test_without_torchs_guards_every_call_looks_at_its_tensors(monkeypatch):
    monkeypatch.setattr(_seen, "TensorGuards", None)
    plan, values = layout(), tensors()
    for step in range(3):
        run(values, plan, step=step)
    assert "_seen" not in vars(plan)
    assert not calls(plan)
    assert_right(values, plan, step=9)


@pytest.mark.skipif(DEVICE != "cpu", reason="the other back ends of a CPU")
@pytest.mark.parametrize("impl", ["torch", "numba", "auto"])
def test_other_back_ends_of_a_cpu_remember_nothing(impl):
    if impl == "numba":
        pytest.importorskip("numba")
    plan, values = layout(), tensors()
    for step in range(3):
        run(values, plan, impl=impl, step=step)
    assert "_seen" not in vars(plan)
