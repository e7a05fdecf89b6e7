"""What a run writes and shows round by round, besides its ledger.

Everything under `sim_only` is private and can be seen because a simulation holds all data.
"""

from __future__ import annotations

import csv
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger

from fl_lightning import plots
from fl_lightning.output.client_tables import client_distributions, client_tables, epsilon_name
from fl_lightning.output.console import quietly, say
from fl_lightning.output.summary import EVALUATIONS, released_ratios
from fl_lightning.privacy.simulated import simulated_because
from fl_lightning.values.round import RoundResult
from fl_lightning.values.rounding import round_up, round_up_to

EVALUATION_COLUMNS = ("round", "accuracy", "standard_error", "clients")


class RoundRecorder(pl.Callback):
    """Writes tables of rounds to the run folder, and scalars to all loggers.

    `rounds.csv`, `layers.csv`, and of a run that has them `private_evaluation.csv`.

    Validation and test metrics reach the loggers through the module's own `log`.

    Guarantees:
        A round stands in the files before a checkpoint that includes it is saved. A run that is
        resumed at round r keeps the rows of the rounds before r and removes the others; a run that
        begins at round 0 starts new files.

    Edge cases:
        | case | row |
        |---|---|
        | no validation in the round | empty validation columns |
        | setting `none` | empty epsilon columns; no rows in `layers.csv` |
        | raw history, or all clipped as one layer | empty `division_ratio` |
        | nobody took part | `clients` is 0 |
        | several processes | rank 0 alone writes |
    """

    def __init__(self) -> None:
        self._start = 0
        self._rounds = 0
        self._resumed: int | None = None
        self.seconds_before = 0.0  # of the run, in earlier starts
        self._began = 0.0

    def state_dict(self) -> dict[str, Any]:
        seconds = self.seconds_before + time.perf_counter() - self._began
        return {"rounds": self._rounds, "seconds": seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict["rounds"]
        self.seconds_before = state_dict.get("seconds", 0.0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._began = time.perf_counter()
        # A checkpoint saved while validating has the round in it, which current_epoch misses.
        first = trainer.current_epoch if self._resumed is None else self._resumed
        self._rounds, self._resumed = first, None
        if not trainer.is_global_zero:
            return
        tables = {"rounds.csv": plots.ROUND_COLUMNS, "layers.csv": plots.LAYER_COLUMNS}
        if pl_module.privacy.evaluate_every:  # a run without has no such file
            tables[EVALUATIONS] = EVALUATION_COLUMNS
        for name, columns in tables.items():
            _keep_before(pl_module.run_path / name, columns, first)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Any later hook may come after a checkpoint, depending on how that is configured.
        path = pl_module.run_path
        self._rounds = pl_module.result.round + 1
        if not trainer.is_global_zero:
            return
        self._start = (path / "rounds.csv").stat().st_size
        _write_rows(path / "rounds.csv", self._start, [_round_row(pl_module, {})])
        layers = path / "layers.csv"
        _write_rows(layers, layers.stat().st_size, _layer_rows(pl_module))
        if (found := pl_module.evaluated) is not None:
            row = [pl_module.result.round, found.accuracy, found.standard_error, found.clients]
            told = path / EVALUATIONS
            _write_rows(told, told.stat().st_size, [row])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        if not _this_round(trainer, pl_module):
            return
        row = _round_row(pl_module, _validation(trainer))
        _write_rows(pl_module.run_path / "rounds.csv", self._start, [row])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero or not _this_round(trainer, pl_module):
            return
        scalars = _scalars(pl_module) if trainer.loggers else {}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=pl_module.result.round)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The last row says of ε what the statement will say; see `RunningEpsilon`."""
        run = pl_module.run
        if run is None or run.ledger is None or pl_module.result is None or self._start == 0:
            return
        last = _epsilons(pl_module)
        pl_module.result = replace(pl_module.result, epsilon_spent=run.epsilon_at_the_end())
        if _epsilons(pl_module) == last:
            return
        path = pl_module.run_path / "rounds.csv"
        row = path.read_text(encoding="utf-8").splitlines()[-1].split(",")
        row[2:5] = _round_row(pl_module, {})[2:5]
        _write_rows(path, self._start, [row])
        told = {k: v for k, v in _scalars(pl_module).items() if k.startswith("privacy/")}
        for logger in trainer.loggers:
            logger.log_metrics(told, step=pl_module.result.round)


class ClientTables(pl.Callback):
    """Tables of the clients and histograms over them: W&B gets both, TensorBoard histograms.

    Nothing in setting `none`, where clients have no clip norms, noise or ε.

    Args:
        every_n_rounds: rounds between them, the last round besides; 0: never.
    """

    def __init__(self, every_n_rounds: int = 10) -> None:
        if every_n_rounds < 0:
            raise ValueError(f"every_n_rounds={every_n_rounds} must be at least 0 (0: no tables)")
        self.every_n_rounds = every_n_rounds

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not self.every_n_rounds or not _this_round(trainer, pl_module):
            return
        done = pl_module.result.round + 1
        due = done % self.every_n_rounds == 0 or done == trainer.max_epochs or trainer.should_stop
        if not due or not pl_module.privacy.private or not len(pl_module.result.cohort):
            return
        for logger in trainer.loggers:
            try:
                _show_clients(logger, pl_module, done - 1)
            except Exception as error:  # a picture must not end a run whose privacy is paid
                say(f"note: no tables of clients in round {done}: {' '.join(str(error).split())}")


class RoundProgress(pl.Callback):
    """Progress by rounds in place of Lightning's bar by batches; a few lines where no terminal is.

    It is silent under `enable_progress_bar=False` and where the user gave another progress bar.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._shown = False

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        bar = trainer.progress_bar_callback
        self._shown = type(bar) in (RichProgressBar, TQDMProgressBar) and trainer.is_global_zero
        if self._shown:
            assert bar is not None
            bar.disable()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        from rich import progress
        from rich.console import Console

        console = Console()
        if not self._shown or not console.is_terminal:
            return
        self._bar = progress.Progress(
            progress.TextColumn("round {task.completed}/{task.total}"),
            progress.BarColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.description}"),
            console=console,
        )
        rounds, done = trainer.max_epochs, trainer.current_epoch
        self._task = self._bar.add_task("", total=rounds, completed=done)
        quietly(self._bar.start)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not _this_round(trainer, pl_module):
            return
        rounds, done = trainer.max_epochs or 1, trainer.current_epoch + 1
        text = _status(trainer, pl_module)
        if self._bar is not None:
            bar, task = self._bar, self._task
            quietly(lambda: bar.update(task, completed=done, description=text))
        elif self._shown and (done * 10 // rounds > (done - 1) * 10 // rounds):
            say(f"round {done}/{rounds}  {text}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            quietly(self._bar.stop)
            self._bar = None


def _show_clients(logger: Any, pl_module: Any, step: int) -> None:
    if isinstance(logger, WandbLogger):
        logger.log_metrics(_for_wandb(pl_module), step=step)
    elif isinstance(logger, TensorBoardLogger):
        for name, values in client_distributions(pl_module).items():
            logger.experiment.add_histogram(name, values, step)


def _for_wandb(pl_module: Any) -> dict[str, Any]:
    import wandb

    tables = client_tables(pl_module).items()
    shown: dict[str, Any] = {n: wandb.Table(columns=[*c], data=rows) for n, (c, rows) in tables}
    for name, values in client_distributions(pl_module).items():
        shown[name] = wandb.Histogram(values.tolist())
    return shown


def _this_round(trainer: pl.Trainer, pl_module: Any) -> bool:
    """Whether the result is of the round at hand; not so when a run is resumed at a round's end."""
    result = pl_module.result
    return (
        trainer.state.fn == "fit" and result is not None and result.round == trainer.current_epoch
    )


def _keep_before(path: Path, columns: Sequence[str], first: int) -> None:
    """Cut a CSV after its last complete row of a round below `first`; begin it where needed."""
    header = (",".join(columns) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("r+b" if path.exists() else "w+b") as file:
        end = len(header)
        if file.readline() != header:
            file.seek(0)
            file.truncate()
            file.write(header)
        for line in file:
            if not line.endswith(b"\n") or int(line.split(b",", 1)[0]) >= first:
                break
            end += len(line)
        file.truncate(end)


def _write_rows(path: Path, start: int, rows: Iterable[Sequence[Any]]) -> None:
    with path.open("r+", newline="", encoding="utf-8") as file:
        file.seek(start)
        file.truncate()
        csv.writer(file, lineterminator="\n").writerows(rows)


def _round_row(pl_module: Any, validation: dict[str, float]) -> list[Any]:
    result = pl_module.result
    spent = _epsilons(pl_module)
    return [
        result.round,
        result.participants,
        *([round_up(e, 6) for e in spent] if spent else [""] * 3),
        validation.get("sim_only/val_accuracy", ""),
        validation.get("sim_only/val_loss", ""),
        "" if result.nonfinite is None else result.nonfinite,
        f"{result.seconds:.4f}",
    ]


def _layer_rows(pl_module: Any) -> Iterable[list[Any]]:
    result: RoundResult = pl_module.result
    names = pl_module.layout.layer_names
    fields = [getattr(result, name) for name in plots.LAYER_FIELDS]
    if not fields[0].size:  # without privacy, or where nobody took part
        return
    ratios = released_ratios(pl_module, result.contribution)
    for row, client in enumerate(result.cohort.tolist()):
        values = zip(*(field[row].tolist() for field in fields), strict=True)
        for name, numbers in zip(names, values, strict=False):
            ratio = "" if ratios is None else f"{ratios[row]:.6g}"
            yield [result.round, client, name, *(f"{v:.6g}" for v in numbers), ratio]


def _scalars(pl_module: Any) -> dict[str, float]:
    """Figures of the round for loggers; the mean over the cohort for those of a layer."""
    result, spent = pl_module.result, _epsilons(pl_module)
    scalars = {"perf/round_seconds": result.seconds}
    if spent:
        privacy = pl_module.privacy
        kind = epsilon_name(privacy)
        scalars |= {f"privacy/{kind}_max": spent[0], f"privacy/{kind}_median": spent[1]}
    for name, field in (
        ("released/clip_norm", result.clip_norm),
        ("released/share", result.shares),
        ("released/noise_scale", result.noise_scale),
        ("sim_only/clipped_fraction", result.clipped_fraction),
    ):
        known = ~np.isnan(field)
        sums, counts = np.where(known, field, 0.0).sum(0), known.sum(0)
        for layer, total, count in zip(pl_module.layout.layer_names, sums, counts, strict=False):
            if count:
                scalars[f"{name}/{layer}"] = float(total / count)
    return scalars


def _epsilons(pl_module: Any) -> tuple[float, float, float] | None:
    """Largest, median and smallest ε spent; None without privacy."""
    spent = np.asarray(pl_module.result.epsilon_spent, dtype=float)
    if pl_module.ledger is None or not len(spent):
        return None
    middle = sorted({(len(spent) - 1) // 2, len(spent) // 2})
    # np.median of two infinities is NaN.
    median = statistics.median(np.partition(spent, middle)[middle].tolist())
    return float(spent.max()), median, float(spent.min())


def _validation(trainer: pl.Trainer) -> dict[str, float]:
    names = ("sim_only/val_accuracy", "sim_only/val_loss")
    metrics = trainer.callback_metrics
    return {name: float(metrics[name]) for name in names if name in metrics}


def _status(trainer: pl.Trainer, pl_module: Any) -> str:
    """Privacy and accuracy so far, in a few words."""
    spent = _epsilons(pl_module)
    if spent is None:
        words = ["no privacy"]
    elif math.isinf(spent[0]):
        words = ["ε = ∞"]
    elif pl_module.privacy.guarantee:
        words = [f"ε ≤ {round_up_to(spent[0])} (max)"]
    else:
        words = [f"nominal ε {round_up_to(spent[0])}, no guarantee"]
    if spent is not None and simulated_because(pl_module.privacy) is not None:
        words.append("simulated")
    accuracy = _validation(trainer).get("sim_only/val_accuracy")
    if pl_module.evaluated is not None:
        words.append(f"private accuracy {pl_module.evaluated.accuracy:.3f}")
    if accuracy is not None:
        words.append(f"sim_only accuracy {accuracy:.3f}")
    return "  ".join(words)
