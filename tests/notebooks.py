"""Runs notebooks without Jupyter: `python -m tests.notebooks` writes their outputs anew.

A cell's output is what it prints, the value of its last line, and every figure that is open after
it. Cells share one namespace, as in Jupyter.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "notebooks"


def run(notebook: dict[str, Any], folder: Path) -> None:
    """Execute every cell in `folder`; outputs go into the notebook's cells.

    Raises:
        Exception: whatever a cell raises; the cells after it are not run.
    """
    import matplotlib

    matplotlib.use("Agg")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, cell in enumerate(_code_cells(notebook), start=1):
            cell["execution_count"] = number
            cell["outputs"] = _outputs("".join(cell["source"]), namespace, number)


def _code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def _outputs(source: str, namespace: dict[str, Any], number: int) -> list[dict[str, Any]]:
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(tree, f"cell {number}", "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), namespace)
    found: list[dict[str, Any]] = []
    if printed.getvalue():
        found.append(
            {"output_type": "stream", "name": "stdout", "text": _lines(printed.getvalue())}
        )
    if value is not None and not source.rstrip().endswith(";"):
        data = {"text/plain": _lines(repr(value))}
        found.append({"output_type": "execute_result", "execution_count": number, "data": data,
                      "metadata": {}})  # fmt: skip
    return found + _figures()


def _figures() -> list[dict[str, Any]]:
    import matplotlib.pyplot as plt

    found = []
    for number in plt.get_fignums():
        picture = io.BytesIO()
        plt.figure(number).savefig(picture, dpi=80, metadata={"Software": None})
        data = {"image/png": base64.b64encode(picture.getvalue()).decode()}
        found.append({"output_type": "display_data", "data": data, "metadata": {}})
    plt.close("all")
    return found


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def write_outputs(path: Path) -> None:
    """Run a notebook in a folder of its own and save it with what it gave."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        run(notebook, Path(folder))
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("WANDB_MODE", "disabled")
    for notebook_path in sorted(FOLDER.glob("*.ipynb")):
        write_outputs(notebook_path)
        print(notebook_path)
