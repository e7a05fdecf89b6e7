"""`report.html` holds the whole run, needs nothing else, and runs nothing."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from fl_lightning.output.loggers import _where
from fl_lightning.output.report import as_html, write_report

EVIL = "<script>alert(1)</script>"
SUMMARY = {
    "simulated": False, "test_accuracy": 0.93, "sim_only_val_accuracy": 0.9, "privacy": "proven",
    "epsilon_min": 7.1, "epsilon_median": 7.5, "epsilon_max": 7.99991, "delta_max": 1e-5,
    "division_ratio": 0.9, "attack_advantage_max": 0.6, "unit": "record", "trust": "local",
    "adjacency": "zero_out", "mechanism": "gaussian", "thresholds": "quantile",
    "allocation": "mse", "releases": 3, "rounds": 20, "seconds": 12.5, "ledger_head": "abcd",
    "versions": {"torch": "2"}, "test_metrics": {"f1": 0.8},
}  # fmt: skip


class Seen(HTMLParser):
    """What a page has of tags, of sources and of text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / EVIL.replace("/", "")
    folder.mkdir()
    (folder / "secret.key").write_text("top secret")
    (folder / "config.yaml").write_text(f"data:\n  source: {EVIL}\n")
    (folder / "config_2.yaml").write_text("trainer: {}\n")
    facts = {"facts": {"dataset": EVIL, "setting": "record+local", "run_id": "r1"}}
    (folder / "ledger.jsonl").write_text(json.dumps(facts) + "\n")
    (folder / "privacy_statement.md").write_text(
        "# Privacy statement\n\n> **SIMULATED.** x\n>\n> y\n\n## Result\n\n**epsilon 8.**\n\n"
        f"| over | largest |\n|---|---|\n| epsilon | `8` |\n\n- one\n- two {EVIL}\n"
    )
    picture = folder / "layers.png"
    picture.write_bytes(b"\x89PNG picture")
    return folder, picture


def test_the_page_holds_everything_and_nothing_that_runs(run):
    folder, picture = run
    file = write_report(folder, SUMMARY, [picture])
    assert file == folder / "report.html"
    page = file.read_text(encoding="utf-8")
    seen = Seen()
    seen.feed(page)
    assert "script" not in seen.tags
    assert seen.text.count("alert(1)") >= 4
    assert all(s.startswith(("#", "data:image/png;base64,")) for s in seen.sources)
    assert seen.tags.count("img") == 1
    assert "default-src 'none'" in page
    for words in ("7.1 / 7.5 / 8", "12.5 s", "abcd", "r1", "epsilon 8.", "config_2.yaml", "torch"):
        assert words in seen.text
    assert "top secret" not in page
    assert {"blockquote", "strong", "code", "li"} <= set(seen.tags)
    anchors = {s[1:] for s in seen.sources if s[0] == "#"}
    assert anchors == {
        "result", "pictures", "privacy-statement", "ledger", "configuration", "versions",
    }  # fmt: skip
    assert all(f'id="{name}"' in page for name in anchors)


def test_a_run_without_files_has_a_page(tmp_path):
    page = write_report(tmp_path, {}, []).read_text(encoding="utf-8")
    assert "<h2" not in page
    assert tmp_path.name in page


def test_a_statement_of_several_kinds_of_blocks():
    assert as_html("## A\n\nb **c** `d<e`\nf\n\n- g\n  h\n- i") == (
        "<h3>A</h3><p>b <strong>c</strong> <code>d&lt;e</code> f</p><ul><li>g\n  h</li>"
        "<li>i</li></ul>"
    )


def test_wandb_is_said_to_be_offline_or_online(tmp_path):
    offline = _where(SimpleNamespace(offline=True, dir=str(tmp_path / "run-1" / "files"), url=None))
    folder = tmp_path / "run-1"
    assert offline == f"W&B: offline; its files are in {folder}; `wandb sync {folder}` sends them"
    online = _where(SimpleNamespace(offline=False, dir="x", url="https://wandb.example/r"))
    assert online == "W&B: online at https://wandb.example/r"
