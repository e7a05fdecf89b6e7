"""The measurement of Python's share of a call runs, and its page shows what is committed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import gpu_overhead, gpu_page, machine, pages


@pytest.mark.slow
def test_two_trees_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    for name, value in (("TENSORS", {"small": 3}), ("TURNS", 2), ("WARM_UP", 5), ("CALLS", 20)):
        monkeypatch.setattr(gpu_overhead, name, value)
    out = tmp_path / "overhead.json"
    gpu_overhead.main([str(machine.ROOT), "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["tensors"] == "3 (small)"
    assert float(str(row["before"]).removesuffix(" µs")) > 0


@pytest.mark.parametrize("part", gpu_page.PARTS)
def test_the_page_shows_what_is_committed(part: str) -> None:
    assert pages.written(gpu_page.PAGE, part) == gpu_page.PARTS[part]().strip()
