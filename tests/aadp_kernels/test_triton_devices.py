"""Every launch, and every question about a stream, goes to the device of the tensors."""

import ast
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from aadp_kernels import Layout, NoiseKey, clip_sum_noise, privatize_, sample_noise

pytest.importorskip("triton")
from aadp_kernels._triton import (
    _device,
    clip_sum,
    grid,
    noise,
    privatize,
    product_norms,
)

KERNELS = [
    (privatize, "privatize_kernel"),
    (noise, "noise_kernel"),
    (grid, "grid_kernel"),
    (clip_sum, "norm_pieces"),
    (clip_sum, "sum_tiles"),
    (product_norms, "linear_tiles"),
    (product_norms, "sum_slots"),
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SECOND = torch.device("cuda", 1)
LAYOUT = Layout.build([torch.empty(5), torch.empty(3, 4)])
ONES = torch.ones(2, device=DEVICE)


@pytest.fixture
def launches(monkeypatch):
    """(name of the kernel, device that was entered) of every launch, in the place of the launch."""
    entered, seen = [], []

    @contextmanager
    def on(device):
        entered.append(device)
        yield
        entered.pop()

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *_, **__: seen.append((self.name, entered[-1] if entered else None))

    monkeypatch.setattr(_device, "on", on)
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, Kernel(name))
    return seen


def run(operation, form):
    common = {"key": NoiseKey.from_seed(1), "step": 0, "form": form, "impl": "triton"}
    if operation == "sample_noise":
        place = {"device": DEVICE, "client": torch.arange(3)}
        sample_noise((3, 8), mechanism="laplace", scale=1.0, **place, **common)
    elif operation == "privatize_":
        x = [torch.ones(5, device=DEVICE), torch.ones(3, 4, device=DEVICE)]
        privatize_(x, layout=LAYOUT, clip=ONES, scale=ONES, **common)
    elif operation == "clip_sum_noise":
        x = [torch.ones(2, 5, device=DEVICE), torch.ones(2, 3, 4, device=DEVICE)]
        clip_sum_noise(x, layout=LAYOUT, clip=ONES, scale=ONES, p=1, **common)
    else:
        product_norms.product_norms(*torch.ones(2, 2, 3, 4, device=DEVICE))


@pytest.mark.parametrize(
    ("operation", "forms", "kernels"),
    [
        ("sample_noise", ("wide", "fast"), {"noise_kernel"}),
        ("sample_noise", ("grid",), {"grid_kernel"}),
        ("privatize_", ("wide", "fast", "grid"), {"privatize_kernel"}),
        ("clip_sum_noise", ("wide", "fast"), {"norm_pieces", "sum_tiles"}),
        ("clip_sum_noise", ("grid",), {"norm_pieces", "sum_tiles", "grid_kernel"}),
        ("product_norms", ("wide",), {"linear_tiles", "sum_slots"}),
    ],
)
def test_launches_enter_the_device_of_the_tensors(operation, forms, kernels, launches):
    for form in forms:
        launches.clear()
        run(operation, form)
        assert {name for name, _ in launches} == kernels
        assert {device.type for _, device in launches} == {DEVICE.type}


def test_no_kernel_is_launched_elsewhere():
    """Only `launch` subscripts a kernel."""
    names = {name for _, name in KERNELS} | {"kernel"}
    for path in Path(_device.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                called = ast.unparse(node.func.value)
                assert called not in names or path.name == "_device.py", f"{path.name}: {called}"


@pytest.fixture
def two_devices(monkeypatch):
    """Device 0 is current; a stream of either device knows whose it is."""
    current = [0]

    class Device:
        def __init__(self, device):
            self.index = torch.device(device).index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    class Stream:
        def __init__(self, device):
            self.cuda_stream = 1000 + torch.device(device).index

    captured = {1}
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] in captured)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    return captured


def test_the_stream_and_its_capture_are_those_of_the_device(two_devices):
    assert _device.stream_name(SECOND) is None
    assert _device.stream_name(torch.device("cuda", 0)) == 1000
    two_devices.clear()
    two_devices.add(0)
    assert _device.stream_name(SECOND) == 1001
    assert _device.stream_name(torch.device("cuda", 0)) is None


def test_what_a_capture_copies_is_kept_for_its_device(two_devices, monkeypatch):
    class Pinned:
        def pin_memory(self):
            return self

        def to(self, device, non_blocking):
            assert non_blocking
            return device

    kept = {}
    monkeypatch.setattr(torch, "from_numpy", lambda _: Pinned())
    monkeypatch.setattr(_device, "_CAPTURED", kept)
    assert _device.to_device(np.zeros(1), torch.device("cuda", 0)).index == 0
    assert not kept
    assert _device.to_device(np.zeros(1), SECOND) == SECOND
    assert len(kept) == 1


def test_a_launch_enters_the_device_and_leaves_it(two_devices):
    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: seen.append(
                (grid, torch.cuda.is_current_stream_capturing(), arguments, constants)
            )

    _device.launch(Kernel(), (3,), SECOND, 1, 2, P=1)
    assert seen == [((3,), True, (1, 2), {"P": 1})]
    assert not torch.cuda.is_current_stream_capturing()
