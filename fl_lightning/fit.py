"""The main job: `python -m fl_lightning.fit [--config FILE ...] [--section.option value ...]`.

One command trains, tests once, and leaves a run folder with everything that was found. Go on with
a stopped run by `--run_dir FOLDER --ckpt_path last`.
"""

from __future__ import annotations

if __name__ == "__main__":  # help and a mistyped option need nothing of what follows
    from fl_lightning.command.early import answer_first

    answer_first()

import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from jsonargparse import ArgumentError
from jsonargparse.typing import lazy_instance
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from fl_lightning.command.class_arguments import (
    arguments_end_with_their_class,
    class_before_its_arguments,
)
from fl_lightning.command.early import answer_first
from fl_lightning.command.parser_errors import in_a_line
from fl_lightning.command.restarts import settle
from fl_lightning.command.run_folder import (
    RunFolder,
    holds_rounds,
    last_checkpoint,
    run_of_checkpoint,
)
from fl_lightning.command.shipped import with_shipped
from fl_lightning.data import FederatedDataModule
from fl_lightning.ledger import LedgerError
from fl_lightning.ledger.search_checks import SearchLossError
from fl_lightning.models import CNN
from fl_lightning.module import FederatedModule
from fl_lightning.output.callbacks import ClientTables, RoundProgress, RoundRecorder
from fl_lightning.output.checkpoint import CHECKPOINT, AtomicCheckpointIO, RoundCheckpoint
from fl_lightning.output.console import say, speak_any_encoding, without_advertisements
from fl_lightning.output.finish import finish_run, test_once
from fl_lightning.output.loggers import default_logger, tensorboard_logger
from fl_lightning.output.search_check import SearchCheck
from fl_lightning.output.waiting import told_of_compiling
from fl_lightning.privacy.config import PrivacyConfig
from fl_lightning.processes.launching import stop_of, stoppable
from fl_lightning.processes.stopping import Stop
from fl_lightning.processes.strategy import ClientParallelStrategy
from fl_lightning.processes.together import came_from_another
from fl_lightning.release.federation import Federation
from fl_lightning.resumption import rounds_done

SUBCOMMANDS = ("fit",)
_RUN_DIR = "AADP_FL_RUN_DIR"


class SaveRunConfig(SaveConfigCallback):
    """Keep the whole configuration in the run folder once the run trains.

    A run that goes on adds a file of its own; one that is refused adds none.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing yet: the run may still be refused."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The run goes on: what it was asked for is part of it."""
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write config.yaml, or config_2.yaml and so on when there is one."""
        assert isinstance(pl_module, FederatedModule)
        folder = pl_module.run_path
        names = ["config.yaml", *(f"config_{i}.yaml" for i in range(2, 10_000))]
        path = next(folder / name for name in names if not (folder / name).exists())
        text = self.parser.dump(self.config, skip_unset=False)
        path.write_text(text, encoding="utf-8")


class FederatedCLI(LightningCLI):
    """LightningCLI with a `privacy` section, a run folder and the default experiment."""

    started = 0.0

    def __init__(
        self,
        folder: RunFolder,
        stop: Stop,
        federation: Federation | None,
        search: dict[str, Any] | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        self._folder = folder
        self._federation, self._search = federation, search
        self._stop = stop
        self._notes: list[str] = []
        super().__init__(*args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only `fit`: it ends with the one test."""
        return {"fit": LightningCLI.subcommands()["fit"]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Sections of their own for privacy and the run folder; one public seed for all."""
        parser.add_class_arguments(PrivacyConfig, "privacy")
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="folder of the run; null: a new one under runs/, named by the time",
        )
        parser.add_argument(
            "--tensorboard",
            type=bool,
            default=False,
            help="write TensorBoard's files to the run folder too (needs the package tensorboard)",
        )
        parser.add_argument(
            "--read_test_set",
            type=bool,
            default=True,
            help="read the test set once, after the last round; false while anything is chosen",
        )
        parser.add_lightning_class_args(RoundCheckpoint, "checkpoint")
        parser.add_lightning_class_args(ClientTables, "client_tables")
        parser.link_arguments("privacy", "model.privacy", apply_on="instantiate")
        parser.link_arguments("run_dir", "model.run_dir")
        parser.link_arguments("seed_everything", "model.seed", compute_fn=_public_seed)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_public_seed)
        parser.set_defaults(default_experiment())

    def before_instantiate_classes(self) -> None:
        """Settle the run folder before anything is made."""
        config = self.config[str(self.subcommand)]
        config.ckpt_path, config.run_dir = settle(config.ckpt_path, config.run_dir, self._arguments)
        run_dir = self._find_folder(config)
        self._run_dir = run_dir
        config.run_dir = config.model.run_dir = str(run_dir)
        config.trainer.default_root_dir = str(run_dir)
        self._no_logger = config.trainer.logger is None or config.trainer.logger is True
        if self._no_logger:
            name = config.data.source if isinstance(config.data.source, str) else "data"
            self._logger = default_logger(run_dir, f"{name}-{run_dir.name}")
        else:
            self._logger = None

    def _find_folder(self, config: Any) -> Path:
        """The folder of the run, made if it is new; the checkpoint to go on from, if any."""
        given = Path(config.run_dir).expanduser() if config.run_dir else None
        resume = config.ckpt_path
        if resume == "last":
            if given is None:
                raise ValueError("ckpt_path='last' needs run_dir: the folder of the run to go on")
            config.ckpt_path = str(last_checkpoint(given))
        elif resume and "://" not in resume:
            path = Path(resume).expanduser()
            if not path.is_file():
                raise ValueError(f"ckpt_path={resume}: there is no such file")
            config.ckpt_path = str(path)
            given = given or run_of_checkpoint(path)
            if given is None:
                raise ValueError(f"ckpt_path={resume} needs run_dir: the folder of its run")
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        inherited = None if first else os.environ.get(_RUN_DIR)
        if given or inherited:
            run_dir = given or Path(str(inherited))
            self._folder.take(run_dir)
            return run_dir
        return self._folder.take_new(Path("runs"))

    def after_instantiate_classes(self) -> None:
        """Let checkpoints say how the network was made."""
        spec = self.config[str(self.subcommand)].model.network
        plain = spec.as_dict() if hasattr(spec, "as_dict") else {}
        self.model.federation, self.model.search = self._federation, self._search
        self.model.network_spec = json.loads(json.dumps(plain, default=str)) or None

    def _parse_ckpt_path(self) -> None:
        """Nothing: a checkpoint holds no arguments, and may be damaged."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what `main` was given, without Lightning's warning about explicit arguments."""
        self._arguments = list(args)
        ours = default_experiment()["model.server_optimizer"]
        with arguments_end_with_their_class({ours["class_path"]: ours["init_args"]}) as notes:
            self.config = parser.parse_args(class_before_its_arguments(with_shipped(args)))
        self._notes = notes
        seed = self.config.fit.seed_everything
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise ValueError(f"seed_everything={seed} must be in [0, 2^32)")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The Trainer with what a run always has; the user's own callbacks and plugins stay."""
        if self._logger is not None:
            kwargs["logger"] = self._logger
        elif self._no_logger:
            kwargs["logger"] = False  # else Lightning would take one of its own
        if self._get(self.config_init, "tensorboard"):
            known = kwargs.get("logger", self._get(self.config_init, "trainer.logger")) or []
            known = known if isinstance(known, list) else [known]
            kwargs["logger"] = [*known, tensorboard_logger(self._run_dir)]
        kwargs |= self._strategy()
        own = self._get(self.config_init, "trainer.plugins") or []
        kwargs["plugins"] = [*(own if isinstance(own, list) else [own]), AtomicCheckpointIO()]
        trainer = super().instantiate_trainer(**kwargs)
        stop_of(trainer, self._stop)
        self._stop.advice = lambda: how_to_go_on(self._run_dir)
        return trainer

    def _strategy(self) -> dict[str, Any]:
        """Ours in place of Lightning's DDP, which would wrap the model and deal out rounds."""
        trainer = self.config[str(self.subcommand)].trainer
        asked = trainer.strategy
        if isinstance(asked, str) and asked not in ("auto", "ddp"):
            raise ValueError(
                f"trainer.strategy={asked}: processes share clients by strategy 'ddp' alone"
            )
        one = str(trainer.devices) == "1" and trainer.num_nodes == 1
        if asked == "ddp" or (asked == "auto" and not one):
            return {"strategy": ClientParallelStrategy(), "use_distributed_sampler": False}
        return {}

    def before_fit(self) -> None:
        """Check everything; then say where the run goes and how to go on with it."""
        config, run_dir = self.config[str(self.subcommand)], self._run_dir
        self.model.check(self.datamodule, self.trainer)
        done = None
        if config.ckpt_path and "://" not in config.ckpt_path:
            checkpoint = AtomicCheckpointIO().load_checkpoint(
                config.ckpt_path, map_location="cpu", weights_only=False
            )
            self.model.check_resumption(checkpoint, self.trainer.max_epochs)
            done = rounds_done(checkpoint)
        if not self.trainer.is_global_zero:
            return
        os.environ[_RUN_DIR] = str(run_dir)  # of the processes that Lightning starts from here
        if not config.ckpt_path and holds_rounds(run_dir):
            raise ValueError(
                f"run_dir={run_dir} holds a run already: go on with it by --ckpt_path last, or "
                "choose another folder"
            )
        for note in self._notes:
            say(f"note: {note}")
        say(f"run folder: {run_dir}")
        say(f"go on after a stop: the same command with --run_dir {run_dir} --ckpt_path last")
        if done is not None and done >= (self.trainer.max_epochs or 0):
            say(
                f"note: {done} rounds are done and trainer.max_epochs={self.trainer.max_epochs}: "
                "nothing is left to train"
            )
        self.started = time.perf_counter()

    def after_fit(self) -> None:
        """Read the test set once, unless something is chosen yet; then say what was found."""
        if self.trainer.state.status != "finished" and self.trainer.interrupted:
            return
        seconds = time.perf_counter() - self.started
        recorders = [c for c in self.trainer.callbacks if isinstance(c, RoundRecorder)]
        seconds += sum(recorder.seconds_before for recorder in recorders)
        read = self.config[str(self.subcommand)].read_test_set
        if self._search is not None and not read:
            return  # nothing of it is shown unless it is chosen
        failed = read and not test_once(self.trainer, self.model, self.datamodule)
        if self.trainer.is_global_zero:
            finish_run(self.trainer, self.model, seconds)
        if failed:
            raise SystemExit(1)


def default_experiment() -> dict[str, Any]:
    """What `python -m fl_lightning.fit` runs: digits, 10 clients, ε = 8 for every record.

    configs/base.yaml says the same, option by option.
    """
    return {
        "seed_everything": 1,
        "model.network": lazy_instance(CNN),
        "model.sampling_rate": 1.0,
        "model.client_lr": 1.0,
        "model.execution": "vmap",
        "model.server_optimizer": {
            "class_path": "torch.optim.SGD",
            "init_args": {"lr": 1.0, "momentum": 0.5},
        },
        "privacy.clip_norm": 3.0,
        "trainer.max_epochs": 20,
        "trainer.accelerator": "auto",
        "trainer.devices": 1,
        "trainer.log_every_n_steps": 1,
        "trainer.num_sanity_val_steps": 0,
        "trainer.enable_model_summary": False,
    }


def how_to_go_on(run_dir: Path) -> str:
    """What to do after a stop, in words."""
    if (run_dir / CHECKPOINT).exists():
        return f"go on by the same command with --run_dir {run_dir} --ckpt_path last"
    return "nothing was released: start again by the same command"


def _public_seed(seed: bool | int) -> int:
    return 0 if isinstance(seed, bool) else seed


def main(
    args: Sequence[str] | None = None,
    *,
    federation: Federation | None = None,
    search: dict[str, Any] | None = None,
) -> None:
    """Run the command line; errors of the user's making are one line and exit code 2.

    Args:
        args: the options; None: those of the process.
        federation: nodes that release for themselves; None: all clients are simulated.
        search: facts of the search that the run is a candidate of; None: of none.

    Raises:
        SearchLossError: a candidate whose choice would cost more than its search plans for.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if not arguments or arguments[0] not in SUBCOMMANDS:
        arguments.insert(0, "fit")
    answer_first(arguments)
    torch.set_float32_matmul_precision("highest")  # TF32 would break the clip's bound
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6 with torch 2.13
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # one item a round
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero.*")
    speak_any_encoding()
    without_advertisements()
    folder, stop = RunFolder(), Stop(program=args is None)
    try:
        with stoppable(stop), told_of_compiling():
            _run(folder, stop, arguments, federation=federation, search=search)
    except SearchLossError:
        raise
    except ArgumentError as error:
        if os.environ.get("AADP_FL_TRACEBACK"):
            raise
        say(f"error: {in_a_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except (ValueError, OSError, LedgerError, MisconfigurationException) as error:
        if os.environ.get("AADP_FL_TRACEBACK"):
            raise
        _say(error)
        raise SystemExit(2) from None
    finally:
        folder.give_up()


def _run(folder: RunFolder, stop: Stop, arguments: list[str], **given: Any) -> None:
    own = [folder] if given["search"] is None else [folder, SearchCheck()]
    FederatedCLI(
        folder,
        stop,
        given["federation"],
        given["search"],
        FederatedModule,
        FederatedDataModule,
        args=arguments,
        seed_everything_default=1,
        auto_configure_optimizers=False,
        save_config_callback=SaveRunConfig,
        trainer_defaults={"callbacks": [*own, RoundProgress(), RoundRecorder()]},
        parser_kwargs={"exit_on_error": False, "fit": {"exit_on_error": False}},
    )


def _say(error: Exception) -> None:
    """One line, from the process where the error arose."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank and came_from_another(error):
        return
    say(f"error: {' '.join(str(error).split())}", file=sys.stderr)


if __name__ == "__main__":
    main()
