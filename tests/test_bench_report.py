"""The benchmarks' results: a report that is current, and committed results that passed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import pages, report

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("part", report.PARTS)
def test_summaries_are_current(part: str) -> None:
    assert pages.written(pages.BENCHMARKS, f"{part} table") == report.table(part).strip()


def test_a_table_names_one_configuration_and_never_the_best_of_a_row() -> None:
    """A faster generator, form or number of processes of ours changes no figure."""

    def side(kind: str, seconds: float) -> dict:
        return {"kind": kind, "seconds": [seconds] * 3}

    named = {
        "ours, wide, chacha20, numba": side("ours", 0.2),
        "ours, fast, chacha20, numba": side("ours", 0.1),
        "eager loop": side("peer", 1.0),
        "other": side("peer", 0.15),
    }
    faster = {
        "ours, wide, philox10, numba": side("ours", 0.02),
        "ours, fast, chacha8, numba": side("ours", 0.01),
        "ours, wide, chacha20, torch": side("ours", 0.001),
    }
    tables = [{"case": {"elements": 1, "sides": sides}} for sides in (named, faster | named)]
    first, second = (report.kernels_summary(table) for table in tables)
    assert first == second
    assert "| 200 ms | 5.00 | 0.75 | 100 ms | 10.0 | 1.50 |" in first[-1]
    assert report.faster_peers(tables[1]) == (
        "A peer is faster than wide, ChaCha20 (default) in: case (other, 1.33×)."
    )
    missing = {"case": {"elements": 1, "sides": faster | {"eager loop": side("peer", 1.0)}}}
    del missing["case"]["sides"]["ours, wide, chacha20, torch"]
    assert report.kernels_summary(missing)[-1].endswith("| – | – | – | – | – | – |")


def test_a_generated_part_has_one_place(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    begin, end = pages.marks("x table")
    page.write_text(f"before\n{begin}\n{end}\nafter\n")
    pages.put(page, "x table", "| 1 |")
    assert page.read_text() == f"before\n{begin}\n| 1 |\n{end}\nafter\n"
    page.write_text(page.read_text() + begin)
    with pytest.raises(ValueError, match="one place for 'x table'"):
        pages.put(page, "x table", "| 2 |")


def test_details_are_current() -> None:
    assert pages.written(pages.BENCHMARKS, "all table") == report.details().strip()
    for slug, parts in report.latest().items():
        for part in parts:
            assert (report.IMAGES / f"{part}_{slug}.png").exists()


def test_committed_results_passed_their_gates() -> None:
    for parts in report.latest().values():
        for part in parts.values():
            for case in part["results"].values():
                assert all(side["gate"] for side in report.timed(case).values())
                assert not any("failed" in side for side in case["sides"].values())
                assert any(side["kind"] == "ours" for side in report.timed(case).values())


@pytest.mark.slow
def test_quick_run_takes_less_than_five_minutes(tmp_path: Path) -> None:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "bench", *report.PARTS, "--quick", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 300
    (path,) = tmp_path.glob("*_quick.json")
    data = json.loads(path.read_text())
    assert {"commit", "dirty", "versions", "cpu"} <= set(data["kernels"]["machine"])
    for part in report.PARTS:
        assert report.SUMMARIES[part](data[part]["results"])
        for case in data[part]["results"].values():
            assert report.full_table(part, case)
