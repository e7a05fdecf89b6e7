"""Generated parts of pages: each stands between two marks that name it."""

from __future__ import annotations

from pathlib import Path

from bench.machine import ROOT

README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "docs" / "results.md"


def marks(name: str) -> tuple[str, str]:
    """The lines before and after a generated part."""
    return f"<!-- {name}: generated -->", f"<!-- end of {name} -->"


def written(page: Path, name: str) -> str:
    """What stands between the marks of a part now.

    Raises:
        ValueError: the page has not exactly one place for it.
    """
    begin, end = marks(name)
    text = page.read_text()
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{page}: there must be one place for {name!r}")
    return text.split(begin)[1].split(end)[0].strip()


def put(page: Path, name: str, text: str) -> None:
    """Write a part anew; everything outside its marks stays."""
    written(page, name)
    begin, end = marks(name)
    before, rest = page.read_text().split(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")
