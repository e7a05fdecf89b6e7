"""Where a name of numba has moved, one feature takes its plain path, and says so once."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

numba = pytest.importorskip("numba")
from aadp_kernels import _cpu  # noqa: E402
from aadp_kernels._cpu import _fence, _jit, _parallel, gather_gemm, row_sums  # noqa: E402

NAMES = [(feature, name) for feature, (_, names) in _fence.FEATURES.items() for name in names]
OF_FILE = {
    "_jit": ("addresses", "a cache on disk", "wide vectors", "counting zeros", "parts of kernels"),
    "_parallel": ("loops on torch's threads",),
    "gather_gemm": ("a register tile",),
}
PLACES = {"inner": "builder", "llvm": "llvmlite.binding"}


def owner(name: str) -> tuple[Any, str]:
    """The module or class that defines a name."""
    parts = name.split(".")
    for i in range(len(parts) - 1, 0, -1):
        try:
            place = import_module(".".join(parts[:i]))
        except ImportError:
            continue
        for part in parts[i:-1]:
            place = getattr(place, part)
        for kind in getattr(place, "__mro__", ()):
            if parts[-1] in vars(kind):
                return kind, parts[-1]
        return place, parts[-1]
    raise AssertionError(name)


@pytest.fixture(autouse=True)
def _fresh_warnings():
    _fence.has.cache_clear()
    yield
    _fence.has.cache_clear()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("feature", _fence.FEATURES)
def test_this_numba_has_everything(feature):
    assert _fence.has(feature)


@pytest.mark.parametrize(("feature", "name"), NAMES, ids=lambda x: x.rpartition(".")[2])
def test_a_name_that_has_moved_is_noticed_once(feature, name, monkeypatch):
    with monkeypatch.context() as patch:
        patch.delattr(*owner(name))
        with pytest.warns(RuntimeWarning, match=f"has no .*: {feature} cannot be used") as seen:
            assert [_fence.has(feature) for _ in range(2)] == [False, False]
        assert len(seen) == 1
        needed = {other for other, names in _fence.FEATURES.items() if name in names[1]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert {f for f in _fence.FEATURES if not _fence.has(f)} >= needed


@pytest.mark.parametrize("file", OF_FILE)
def test_every_name_that_is_used_stands_behind_the_fence(file):
    known = {n for feature in OF_FILE[file] for n in _fence.FEATURES[feature][1]}
    source = Path(_cpu.__file__).with_name(f"{file}.py").read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            place = PLACES.get(node.value.id, node.value.id)
            place = _fence._PLACES.get(place, place)
            if place.startswith(("numba.", "llvmlite")):
                assert f"{place}.{node.attr}" in known


def test_without_addresses_everything_runs_in_plain_torch(monkeypatch):
    cpu = torch.device("cpu")
    assert _cpu.missing(cpu) is None
    monkeypatch.delattr("numba.core.types.CPointer")
    _cpu._import_error.cache_clear()
    _fence.has.cache_clear()
    with pytest.warns(RuntimeWarning, match="plain torch"):
        assert "CPointer" in str(_cpu.missing(cpu))
    monkeypatch.undo()
    _cpu._import_error.cache_clear()


@pytest.mark.filterwarnings("ignore:numba .* has no")
def test_the_plain_paths_are_taken(monkeypatch):
    monkeypatch.setattr(_fence, "missing_name", lambda feature: "a.name")
    for feature, plain in (
        ("counting zeros", _jit._plain_leading_zeros),
        ("loops on torch's threads", _parallel._plain),
    ):
        assert _jit.intrinsic_or(feature, lambda *_: None, plain).py_func is plain
    assert _jit.jit(lambda x: x + 1)(2) == 3


def test_zeros_are_counted_alike():
    plain = numba.njit(_jit._plain_leading_zeros)
    numbers = [0, 1, 5, (1 << 64) - 1, *(1 << i for i in range(64))]
    assert [plain(np.uint64(n)) for n in numbers] == [64 - n.bit_length() for n in numbers]


def test_a_plain_loop_covers_its_range():
    @numba.njit
    def fill(seen, value, begin, end):
        for i in range(begin, end):
            seen[i] += value

    loop = numba.njit(inline="always")(_parallel._plain)

    @numba.njit
    def call(seen):
        loop(fill, (seen, 3), len(seen), 1, 0)

    seen = np.zeros(100, np.int64)
    call(seen)
    assert (seen == 3).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_plain_tile_sums_the_same_products(dtype):
    generator = np.random.default_rng(0)
    count, bytes_each = 7, np.dtype(dtype).itemsize
    lanes = gather_gemm.VECTOR // bytes_each
    a, g = (generator.standard_normal(n).astype(dtype) for n in (60, count * 2 * lanes))
    base = np.arange(count) * 3 * bytes_each
    starts = np.arange(gather_gemm.COLUMNS2) * 2 * bytes_each
    found = []
    for make in (gather_gemm._plain_tile(gather_gemm.COLUMNS2, 2), gather_gemm.tile2):
        out = np.zeros((gather_gemm.COLUMNS2, 2 * lanes), dtype)

        @numba.njit
        def run(out, a, base, starts, g, step, count, kind, make=make):
            make(out.ctypes.data, step, a.ctypes.data, base.ctypes.data, starts.ctypes.data,
                 g.ctypes.data, step, count, kind)  # fmt: skip

        run(out, a, base, starts, g, 2 * lanes * bytes_each, count, np.dtype(dtype))
        found.append(out)
    np.testing.assert_allclose(*found, rtol=1e-5)


ALL_HIDDEN = """
import warnings, torch
from aadp_kernels._cpu import _fence
_fence.missing_name = lambda feature: None if feature == "addresses" else "a.name"
import aadp_kernels as k
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    torch.set_num_threads(2)
    layout, key = k.Layout.build([torch.ones(70_000)]), k.NoiseKey.from_seed(0)
    results = []
    for impl in ("numba", "torch"):
        x = [torch.full((70_000,), 0.5)]
        k.privatize_(x, layout=layout, clip=torch.tensor([1e9]), scale=torch.tensor([2.0]),
                     key=k.NoiseKey.from_seed(0), step=1, impl=impl)
        results.append(x[0])
    assert torch.equal(*results)
    weight = torch.randn(5, 3, 3, 3).requires_grad_()
    x = torch.randn(4, 3, 8, 8)
    k.clipped_conv2d(x, weight, clip=torch.tensor(1e9)).sum().backward()
    own, = torch.autograd.grad(torch.nn.functional.conv2d(x, weight).sum(), weight)
    torch.testing.assert_close(weight.grad, own, rtol=1e-4, atol=1e-3)
assert len(seen) == len(_fence.FEATURES) - 1, [str(w.message) for w in seen]
"""


@pytest.mark.slow
def test_with_everything_hidden_the_numbers_are_right(tmp_path):
    root = str(Path(_cpu.__file__).parents[2])
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", ALL_HIDDEN], check=True, env=environment)


def test_memory_is_addressed_in_place():
    x = np.arange(4.0)

    @numba.njit
    def double(address, count):
        part = row_sums.memory(address, count, np.float64)
        for i in range(count):
            part[i] *= 2

    double(x.ctypes.data, 4)
    assert x.tolist() == [0, 2, 4, 6]
