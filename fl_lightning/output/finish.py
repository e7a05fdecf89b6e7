"""What follows the last round: the test, the figures, the pictures, W&B.

The privacy is paid and the model stands in its checkpoint by then. So whatever fails here is one
line, and everything else is done all the same.
"""

from __future__ import annotations

import csv
import json
import math
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl

from fl_lightning import plots
from fl_lightning.data import FederatedDataModule
from fl_lightning.ledger.risks import CURVE_COLUMNS, curve_rows, run_risks
from fl_lightning.ledger.statement import privacy_statement
from fl_lightning.output.console import say, show
from fl_lightning.output.loggers import hand_over
from fl_lightning.output.report import write_report
from fl_lightning.output.summary import final_table, run_summary
from fl_lightning.processes.launching import raise_if_stopped

T = TypeVar("T")
_NO_PRIVACY = "# Privacy statement\n\n**No privacy.** Updates were released without noise.\n"


def test_once(trainer: pl.Trainer, pl_module: Any, data: FederatedDataModule) -> bool:
    """Read the test set; whether nothing hindered it. A data set without one is no hindrance."""
    if not data.has_test:
        if trainer.is_global_zero:
            say(f"note: {data.dataset_name} has no test records, so there is no test figure")
        return True

    def test() -> Any:
        try:
            return trainer.test(pl_module, datamodule=data, verbose=False)
        except Exception as error:
            raise_if_stopped(error, trainer)
            raise

    return _attempt("the test", test) is not None


def finish_run(trainer: pl.Trainer, pl_module: Any, seconds: float) -> None:
    """Write statement, summary, pictures and report, print the final table; hand all to W&B.

    Args:
        trainer: the Trainer, after `test` if there was a test.
        pl_module: the FederatedModule; its ledger may be closed.
        seconds: wall-clock time of the run, over all its starts.

    Guarantees:
        W&B gets named files only: never the secret key, nor anything else of the run folder. What
        fails is said in a line and hinders nothing else.
    """
    path = pl_module.run_path
    _attempt("privacy_statement.md", lambda: _write_statement(path, pl_module.ledger))
    _attempt("attacks.csv", lambda: _write_curves(path, pl_module.ledger))
    summary = _attempt("the summary", lambda: run_summary(trainer, pl_module, seconds)) or {}
    plain = {k: v if _is_json(v) else str(v) for k, v in summary.items()}
    if summary:
        text = json.dumps(plain, indent=2) + "\n"
        file = path / "summary.json"
        _attempt("summary.json", lambda: file.write_text(text, encoding="utf-8"))
    pictures = _attempt("the pictures", lambda: plots.draw_all(path)) or []
    report = _attempt("report.html", lambda: write_report(path, summary, pictures))
    if summary:
        files = {"run folder": path, "report": report, "pictures": _several(pictures)}
        _attempt("the table of the run", lambda: show(final_table(summary, files)))
    if pl_module.ledger is not None:
        say(f"ledger head: {pl_module.ledger.head_hash}")
    for logger in trainer.loggers:
        told = _attempt("W&B", lambda own=logger: hand_over(own, path, plain, pictures))
        if told:
            say(told)


def _several(paths: list[Path]) -> str | None:
    """Where files of one folder are."""
    return f"{paths[0].parent}{os.sep}*.png" if paths else None


def _attempt(what: str, do: Callable[[], T]) -> T | None:
    """What `do` gives; None after a line that says why there is nothing."""
    try:
        return do()
    except Exception as error:
        words = " ".join(str(error).split()) or "no reason was given"
        place = traceback.extract_tb(error.__traceback__)[-1]
        say(
            f"note: {what} failed: {type(error).__name__}: {words} "
            f"({Path(place.filename).name}:{place.lineno}); the model and the ledger are whole"
        )
        return None


def _write_statement(path: Path, ledger: Any) -> None:
    text = _NO_PRIVACY if ledger is None else privacy_statement(ledger)
    (path / "privacy_statement.md").write_text(text, encoding="utf-8")


def _write_curves(path: Path, ledger: Any) -> None:
    """`attacks.csv`, which the picture of that name is drawn from."""
    risks = None if ledger is None else run_risks(ledger.header, ledger.releases)
    if risks is None:
        return
    with (path / "attacks.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([CURVE_COLUMNS, *curve_rows(risks)])


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
