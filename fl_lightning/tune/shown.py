"""The chosen run of a charged search, as W&B shows it."""

from __future__ import annotations

import json
from pathlib import Path


def shown_by_wandb(chosen: Path, folder: Path, project: str) -> str:
    """Give W&B what the chosen run's folder has: options, figures, model, statement, ledger.

    All of it is covered by the (ε, δ) of the search. Nothing is told of other candidates, nor how
    many there were.

    Args:
        chosen: folder of the chosen run.
        folder: where W&B keeps its own files; a search that goes on is the same run there.
        project: W&B's project.

    Returns:
        Where W&B has the run, in words: offline where no key is configured.
    """
    from fl_lightning.output.loggers import default_logger, hand_over

    folder.mkdir(exist_ok=True)
    logger = default_logger(folder, "chosen by a charged search", project)
    if logger is None:
        return "W&B: disabled"
    options, summary = (
        json.loads((chosen / name).read_text(encoding="utf-8")) if (chosen / name).is_file() else {}
        for name in ("options.json", "summary.json")
    )
    logger.begin()
    logger.log_hyperparams(options)
    told = hand_over(logger, chosen, summary, [])
    assert told is not None
    return told
