"""A page of the site for each notebook: its text, its code and the outputs that are saved in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds notebooks/NAME.md beside every notebooks/NAME.ipynb, which can still be downloaded."""
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            assert file.abs_src_path is not None
            path = Path(file.abs_src_path)
            notebook = json.loads(path.read_text(encoding="utf-8"))
            uri = file.src_uri.removesuffix(".ipynb") + ".md"
            files.append(File.generated(config, uri, content=page(notebook, path.name)))
    return files


def page(notebook: dict[str, Any], name: str) -> str:
    """The notebook as Markdown; pictures are part of the page."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        else:
            parts.append(f"```python\n{source}\n```")
            parts += [_output(output) for output in cell["outputs"]]
    heading, *rest = parts
    download = f"[Download this notebook]({name})"
    return "\n\n".join([heading, download, *rest]) + "\n"


def _output(output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```"
    data = output["data"]
    if "image/png" in data:
        return f"![output](data:image/png;base64,{data['image/png']})"
    return f"```text\n{''.join(data['text/plain'])}\n```"
