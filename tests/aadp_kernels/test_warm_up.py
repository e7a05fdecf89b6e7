"""What is compiled ahead is what calls launch, and a process pool compiles it into the cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aadp_kernels import (
    Correlation,
    Layout,
    NoiseKey,
    clip_sum_noise,
    privatize_,
    sample_noise,
    warm_up,
)
from aadp_kernels._triton.cases import Case, Needs, cases

pytest.importorskip("triton")
from aadp_kernels._triton import _device, ahead, clip_sum, grid, noise, privatize, product_norms

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEW = Needs(forms=("fast",), rngs=("philox10",), kinds=(("laplace", 1),))
KERNELS = [
    (privatize, "privatize_kernel"),
    (noise, "noise_kernel"),
    (grid, "grid_kernel"),
    (clip_sum, "norm_pieces"),
    (clip_sum, "sum_tiles"),
    (product_norms, "linear_tiles"),
]


def kind(argument):
    """What Triton looks at in an argument that it does not specialise on the value of."""
    return argument.dtype if isinstance(argument, torch.Tensor) else type(argument)


@pytest.fixture
def launched(monkeypatch):
    """(types of the arguments, constants) of every launch, by kernel; nothing runs."""
    found = {}

    class Kernel:
        def __init__(self, name):
            self.__name__ = name

        def __getitem__(self, grid):
            def record(*arguments, **constants):
                found.setdefault(self.__name__, []).append(
                    ([kind(a) for a in arguments], constants)
                )

            return record

    for module, name in KERNELS:
        monkeypatch.setattr(module, name, Kernel(name))
    return found


def call(case):
    """The public operation that a case is for, on other sizes."""
    shapes = [(3, 50), (7,)]
    dtype = getattr(torch, case.dtype)
    place = {"device": DEVICE, "dtype": dtype}
    ones = torch.ones(2, device=DEVICE)
    common = {"key": NoiseKey.from_seed(1, case.rng), "step": 5, "impl": "triton"}
    common |= {"form": case.form, "mechanism": case.mechanism or "laplace"}
    if case.mechanism == "correlated":
        common |= {"mechanism": "gaussian", "correlation": Correlation((1.0, -0.9, 0.2))}
    clipping = {"layout": Layout.build([torch.empty(s) for s in shapes]), "clip": ones, "p": case.p}
    clipping |= {"scale": ones if case.mechanism else 0 * ones}
    clipping |= {"votes_at": ones if case.votes else None}
    if case.kernel == "privatize_kernel":
        values, reference = ([torch.zeros(s, **place) for s in shapes] for _ in range(2))
        privatize_(values, reference=reference if case.reference else None, **clipping, **common)
    elif case.kernel in ("noise_kernel", "grid_kernel"):
        sample_noise((30,), scale=2.0, **place, **common)
    elif case.kernel in ("norm_pieces", "sum_tiles"):
        clip_sum_noise([torch.zeros(5, *s, **place) for s in shapes], **clipping, **common)
    else:
        product_norms.product_norms(*(torch.zeros(3, 9, 32, **place) for _ in range(2)))


@pytest.mark.parametrize(
    "case",
    [
        Case("privatize_kernel", "float32", "fast", "philox10", "laplace"),
        Case("privatize_kernel", "bfloat16", "wide", "chacha20", "gaussian", 2, votes=True),
        Case("privatize_kernel", "float64", "grid", "chacha8", "laplace", reference=True),
        Case("privatize_kernel", "bfloat16", "fast", "chacha20", "correlated", 2),
        Case("noise_kernel", "float16", "wide", "chacha20", "gaussian"),
        Case("noise_kernel", "float32", "wide", "philox10", "correlated"),
        Case("grid_kernel", "int64", "grid", "chacha20", "laplace"),
        Case("norm_pieces", "float32", "wide", p=2, votes=True),
        Case("sum_tiles", "bfloat16", "fast", "chacha8", "gaussian"),
        Case("sum_tiles", "float32", "wide", "philox10", "correlated"),
        Case("sum_tiles", "float32", "grid"),
        Case("linear_tiles", shape=(32, 32)),
    ],
    ids=str,
)
def test_what_is_compiled_is_what_a_call_launches(case, launched):
    silent = case.kernel == "privatize_kernel" and not case.mechanism
    if case.form == "grid" and case.kernel == "sum_tiles":
        call(case._replace(mechanism="laplace"))
    elif case.kernel == "norm_pieces":
        call(case._replace(mechanism="gaussian"))
    elif not silent:
        call(case)
    ahead_of = [
        ([kind(a) for a in arguments], constants)
        for _, arguments, constants in ahead.requested(case)
    ]
    assert len(ahead_of) == 1
    called = launched[case.kernel]
    assert called
    assert all(one == ahead_of[0] for one in called), (called, ahead_of)


def test_clipping_alone_is_compiled_too(launched):
    call(Case("privatize_kernel", "float32"))
    ((_, constants),) = launched["privatize_kernel"]
    ((_, _, ahead_of),) = ahead.requested(Case("privatize_kernel", "float32"))
    assert constants == ahead_of
    assert not constants["NOISY"]


def test_launches_are_as_before_after_a_request(launched):
    ahead.requested(Case("noise_kernel", mechanism="laplace"))
    for module, _ in KERNELS:
        assert module.launch is _device.launch
    with pytest.raises(RuntimeError, match="grid_kernel"):
        ahead.requested(Case("grid_kernel", mechanism="laplace"))
    assert noise.launch is _device.launch


def test_every_kernel_is_listed_once():
    every = cases(Needs(dtypes=("float32", "bfloat16"), votes=(False, True)))
    assert len(set(every)) == len(every)
    assert {case.kernel for case in every} == set(ahead._OPERATIONS)
    few = cases(FEW)
    assert len(few) == 7
    assert {case.form for case in few if case.mechanism} == {"fast"}
    correlated = cases(Needs(kinds=(("correlated", 2),)))
    assert {case.form for case in correlated if case.mechanism} == {"wide", "fast"}


def test_shapes_of_a_model():
    tensors = [torch.empty(8, 3, 5, 5), torch.empty(8), torch.empty(10, 200)]
    assert warm_up.matrices(Layout.build(tensors)) == [(8, 75), (10, 200)]


@pytest.mark.parametrize("target", ["cuda", "cuda:", "cuda:sm90", "hip:90", "metal:1"])
def test_a_target_that_is_none_is_refused(target, capsys):
    with pytest.raises(SystemExit):
        warm_up.main(["--target", target])
    assert "target must be like cuda:90" in capsys.readouterr().err


def test_unknown_needs_are_refused():
    target = ("cuda", 90, 32)
    for bad in (
        {"forms": ["slow"]}, {"rngs": ["mt19937"]}, {"dtypes": ["int8"]}, {"sums": ["some"]},
        {"kinds": [("laplace", 2)]},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="must be one of"):
            warm_up.warm_up(Needs(**bad), target=target)
    with pytest.raises(ValueError, match="processes must be 1 or more, got 0"):
        warm_up.warm_up(target=target, processes=0)
    assert list(warm_up.warm_up(Needs(dtypes=["float64"], kinds=()), target=target)) == []


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU is its own target")
def test_without_a_gpu_a_target_must_be_given(capsys):
    with pytest.raises(SystemExit):
        warm_up.main([])
    assert "target must be given" in capsys.readouterr().err


def test_the_fast_form_is_left_out_on_an_amd_device(monkeypatch):
    seen = []
    monkeypatch.setattr(warm_up, "_outcomes", lambda todo, *_: seen.extend(todo))
    warm_up.warm_up(target=("hip", "gfx942", 64))
    assert {case.form for case in seen} == {"wide", "grid"}


def command(cache, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "aadp_kernels.warm_up", "--processes", "2", *arguments], cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_kernels_are_compiled_once_into_the_cache(tmp_path):
    few = ("--form", "fast", "--rng", "philox10", "--mechanism", "laplace", "--target", "cuda:90")
    done = command(tmp_path, *few)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 kernels, 0 failed" in done.stdout
    built = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")}
    assert len(built) == 7
    for path in tmp_path.rglob("privatize_kernel.json"):
        assert json.loads(path.read_text())["target"]["arch"] == 90
    assert command(tmp_path, *few).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")} == built


@pytest.mark.slow
def test_a_kernel_that_does_not_compile_does_not_end_the_others(tmp_path):
    few = ("--form", "fast", "--rng", "philox10", "--mechanism", "laplace")
    done = command(tmp_path, *few, "--target", "cuda:1")
    assert done.returncode == 1, done.stdout
    assert "7 kernels, 7 failed" in done.stdout


# What calls pass as it comes, by kernel: views anywhere in memory, and lengths.
CHANGING = {
    "privatize_kernel": {"clip", "scale", "votes_at", "step_pointer", "clients"},
    "noise_kernel": {"scale_pointer", "step_pointer", "clients_pointer", "layer", "low", "high"},
    "grid_kernel": {"scale_pointer", "step_pointer", "clients_pointer", "layer", "low", "high"},
    "norm_pieces": {"mask_ptr", "clip_ptr", "votes_ptr", "quanta_ptr", "batch"},
    "sum_tiles": {"scale_ptr", "step_ptr", "client_ptr", "batch"},
    "linear_tiles": {"length", "tiles_across", "tiles"},
    "sum_slots": {"slots"},
}
SAME = """
import json, sys
import torch
from triton.backends.compiler import GPUTarget
from aadp_kernels._triton import ahead
from aadp_kernels._triton.cases import Case
ahead.driver.set_active(ahead._Driver(GPUTarget("cuda", 90, 32)))
def moved(value):
    if isinstance(value, torch.Tensor):
        raw = torch.zeros(value.nbytes + 32, dtype=torch.uint8)[value.element_size():]
        return raw[:value.nbytes].view(value.dtype).view(value.shape)
    return 2 * value + 1
for name, changing in json.loads(sys.argv[1]).items():
    case = Case(name, mechanism="" if name in ("norm_pieces", "sum_slots") else "laplace",
                form="grid" if name == "grid_kernel" else "wide", votes=True)
    for kernel, arguments, constants in ahead.requested(case):
        bind = kernel.device_caches[0][4]
        values = list(arguments)
        for changed in changing:
            at = kernel.arg_names.index(changed)
            values[at] = moved(values[at])
            assert isinstance(values[at], int) or values[at].data_ptr() % 16
        before, after = (bind(*given, **constants)[1] for given in (arguments, values))
        print(name, before == after)
"""


@pytest.mark.slow
def test_views_and_lengths_of_training_compile_no_kernel_anew():
    """Triton compiles for what it sees of an argument: that must not change with them."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    changing = json.dumps({name: sorted(names) for name, names in CHANGING.items()})
    done = subprocess.run(
        [sys.executable, "-c", SAME, changing], cwd=ROOT, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [word for name in CHANGING for word in (name, "True")]
