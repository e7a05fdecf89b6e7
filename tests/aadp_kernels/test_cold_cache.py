"""A kernel that was compiled a moment ago and the same kernel from numba's cache: equal bits."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from aadp_kernels import Layout, clip_sum_noise, clipped_conv2d, clipped_linear, layer_norms

pytestmark = pytest.mark.slow


def bits(tensors: Iterable[torch.Tensor]) -> str:
    """A digest of the bytes of CPU tensors."""
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


def gradients_of(output: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> str:
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    return bits(torch.autograd.grad((output * direction).sum(), (weight, bias)))


def results() -> list[str]:
    """A line for each kernel that sums: its name and a digest of what it returns."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    rows = [draw(64, 2000), draw(64, 300)]
    layout = Layout.build([row[0] for row in rows], [0, 1])
    lines = []
    for p in (1, 2):
        clipping = {"clip": torch.tensor(1.0), "p": p, "votes_at": torch.tensor(5.0)}
        lines.append(f"norms {p} {bits([layer_norms(rows, layout=layout, p=p, cohort=True)])}")
        clip = torch.tensor([3.0, 2.0])
        sums, _ = clip_sum_noise(rows, layout=layout, clip=clip, scale=None, p=p)
        lines.append(f"sums {p} {bits(sums)}")
        for records, inputs, outputs in ((32, 64, 128), (40, 7, 9), (143, 64, 32)):
            a, weight, bias = draw(records, inputs), draw(outputs, inputs), draw(outputs)
            weight.requires_grad_(), bias.requires_grad_()
            output = clipped_linear(a, weight, bias, **clipping)
            lines.append(f"linear {p} {records} {gradients_of(output, weight, bias)}")
        for records, channels, size, kernel in ((32, 1, 8, 3), (143, 1, 8, 3), (32, 3, 28, 5)):
            a, bias = draw(records, channels, size, size), draw(16)
            weight = draw(16, channels, kernel, kernel)
            weight.requires_grad_(), bias.requires_grad_()
            output = clipped_conv2d(a, weight, bias, padding=1, **clipping)
            lines.append(f"conv {p} {records} {size} {gradients_of(output, weight, bias)}")
    return lines


def test_a_run_that_compiles_and_one_that_loads_have_equal_bits(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    lines = []
    for _ in ("compiles", "loads"):
        done = subprocess.run(
            [sys.executable, "-m", "tests.aadp_kernels.test_cold_cache"],
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        lines.append(done.stdout.splitlines())
    assert len(lines[0]) == 16
    assert lines[0] == lines[1]


if __name__ == "__main__":
    print("\n".join(results()))
