"""`report.html`: a run on one page that needs no other file and loads nothing."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fl_lightning.output.summary import final_rows
from fl_lightning.plots import ledger_facts, run_title

_STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #8886}
table{border-collapse:collapse;margin:.5rem 0}
td,th{padding:.25rem .9rem .25rem 0;border-bottom:1px solid #8884;text-align:left}
td,th{vertical-align:top}
img{max-width:100%;height:auto;background:#fff;border-radius:4px}
pre{overflow-x:auto;padding:.8rem;background:#8882;border-radius:4px;font-size:.85rem}
code{overflow-wrap:anywhere}
blockquote{margin:1rem 0;padding:.1rem 1rem;border-left:4px solid #d55e00}
nav a{margin-right:1rem}
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_PICTURES = {
    "convergence": "Validation accuracy and ε by round",
    "layers": "Clip norm, budget share, noise scale and clipped fraction of every layer by round",
    "clients": "Budget share and noise scale of every client and layer",
    "attacks": "The most that any attack reaches: right alarms against false ones",
}
_FACTS = (
    "run_id", "dataset", "setting", "adjacency", "mechanism", "noise_form", "rng", "thresholds",
    "allocation", "clients_per_round", "torch",
)  # fmt: skip


def write_report(path: Path, summary: Mapping[str, Any], pictures: Sequence[Path]) -> Path:
    """Write `report.html` into a run's folder.

    Args:
        path: folder of the run, with its other files.
        summary: of `run_summary`; may be empty.
        pictures: PNG files, which become part of the page.

    Returns:
        The file.

    Guarantees:
        Nothing secret of the folder goes in. Whatever a file says is shown as text.
    """
    file = path / "report.html"
    file.write_text(page(path, summary, pictures), encoding="utf-8")
    return file


def page(path: Path, summary: Mapping[str, Any], pictures: Sequence[Path]) -> str:
    """The page; see `write_report`."""
    parts = {
        "Result": _table(final_rows(dict(summary))) if summary else "",
        "Pictures": "".join(_picture(file) for file in pictures),
        "Privacy statement": _statement(path),
        "Ledger": _ledger(path, summary),
        "Configuration": "".join(
            f"<h3>{html.escape(file.name)}</h3><pre>{html.escape(_text(file))}</pre>"
            for file in sorted(path.glob("config*.yaml"))
        ),
        "Versions": _table(dict(summary.get("versions", {})).items()),
    }
    parts = {title: text for title, text in parts.items() if text}
    links = "".join(f'<a href="#{_anchor(t)}">{t}</a>' for t in parts)
    body = "".join(f'<h2 id="{_anchor(t)}">{t}</h2>{text}' for t, text in parts.items())
    title = html.escape(run_title(path))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1><nav>{links}</nav>{body}"
        "<p>Values called simulation only (<code>sim_only</code>) are private and must not be "
        "published.</p></body></html>\n"
    )


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _picture(file: Path) -> str:
    words = _PICTURES.get(file.stem, file.stem)
    image = base64.b64encode(file.read_bytes()).decode()
    return f'<p><img alt="{html.escape(words)}" src="data:image/png;base64,{image}"></p>'


def _statement(path: Path) -> str:
    """The statement one level deeper, without its own title."""
    text = _text(path / "privacy_statement.md")
    return as_html(re.sub(r"^# .*\n", "", text))


def _ledger(path: Path, summary: Mapping[str, Any]) -> str:
    facts = ledger_facts(path)
    if not facts:
        return ""
    rows = [("releases", summary.get("releases", "-")), ("head", summary.get("ledger_head", "-"))]
    rows += [(name, facts[name]) for name in _FACTS if facts.get(name) is not None]
    check = f"python -m fl_lightning.ledger verify {path}"
    return _table(rows) + f"<p>Check it: <code>{html.escape(check)}</code></p>"


def _table(rows: Iterable[tuple[Any, Any]]) -> str:
    cells = "".join(
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in rows
    )
    return f"<table>{cells}</table>" if cells else ""


def as_html(markdown: str) -> str:
    """The Markdown that a statement is written in: headings, paragraphs, lists, tables, quotes."""
    found: list[str] = []
    for block in re.split(r"\n\s*\n", markdown.strip()):
        lines = block.splitlines()
        if not lines:
            continue
        if lines[0].startswith("#"):
            found.append(f"<h3>{_inline(lines[0].lstrip('# '))}</h3>")
            lines = lines[1:]
        if not lines:
            continue
        if all(line.startswith(">") for line in lines):
            found.append(f"<blockquote>{as_html(chr(10).join(x[2:] for x in lines))}</blockquote>")
        elif lines[0].startswith("- "):
            items = re.split(r"\n- ", "\n".join(lines)[2:])
            found.append("<ul>" + "".join(f"<li>{_inline(i)}</li>" for i in items) + "</ul>")
        elif lines[0].startswith("|"):
            found.append(_markdown_table(lines))
        else:
            found.append(f"<p>{_inline(' '.join(lines))}</p>")
    return "".join(found)


def _markdown_table(lines: Sequence[str]) -> str:
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    head = "".join(f"<th>{_inline(cell)}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in rows[2:]
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _inline(text: str) -> str:
    text = html.escape(text)
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
