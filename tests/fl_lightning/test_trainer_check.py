"""Callbacks and options of a Trainer that rounds cannot have: refused before there is a folder."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning import callbacks

from fl_lightning.fit import main
from fl_lightning.output.checkpoint import AtomicCheckpointIO, RoundCheckpoint
from fl_lightning.preflight.trainer_check import check_options
from tests.fl_lightning.tried_runs import data, train

LOSS = "sim_only/val_loss"


class Thawing(callbacks.BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.network)

    def finetune_function(self, pl_module, epoch, optimizer):
        self.unfreeze_and_add_param_group(pl_module.network, optimizer)


class Softer(callbacks.StochasticWeightAveraging):
    """A user's own kind is refused as well."""


REFUSED = {
    "StochasticWeightAveraging": lambda: callbacks.StochasticWeightAveraging(0.1),
    "Softer": lambda: Softer(0.1),
    "ModelPruning": lambda: callbacks.ModelPruning("l1_unstructured", amount=0.5),
    "Thawing": Thawing,
    "GradientAccumulationScheduler": lambda: callbacks.GradientAccumulationScheduler({1: 2}),
    "SpikeDetection": callbacks.SpikeDetection,
}


def fit(folder, *, held=0.2, setting="record+local", callback=(), rounds=2, **options):
    return train(
        folder / "run",
        records=data(val_fraction=held),
        privacy={"setting": setting},
        trainer={
            "callbacks": list(callback),
            "limit_val_batches": 1.0,
            "max_epochs": rounds,
            "enable_checkpointing": True,
            "default_root_dir": folder,
            "plugins": [AtomicCheckpointIO()],
        },
        **options,
    )


@pytest.mark.parametrize("setting", ["record+local", "none"])
@pytest.mark.parametrize("name", REFUSED)
def test_callbacks_that_cannot_go_with_rounds(tmp_path, name, setting):
    with pytest.raises(ValueError, match=f"^trainer.callbacks: {name} "):
        fit(tmp_path, setting=setting, callback=[REFUSED[name]()])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["LearningRateFinder", "BatchSizeFinder"])
def test_finders_of_values(tmp_path, name):
    with pytest.raises(ValueError, match=f"^trainer.callbacks: {name} trains on the records"):
        fit(tmp_path, callback=[getattr(callbacks, name)()])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", [callbacks.EarlyStopping, callbacks.ModelCheckpoint])
def test_private_figures_decide_nothing_in_a_private_run(tmp_path, kind):
    with pytest.raises(ValueError, match=rf"{kind.__name__}\(monitor='{LOSS}'\).* private figures"):
        fit(tmp_path, callback=[kind(monitor=LOSS)])
    assert not (tmp_path / "run").exists()
    assert fit(tmp_path, setting="none", callback=[kind(monitor=LOSS)]).result is not None


@pytest.mark.parametrize(
    ("monitor", "held"), [("val_loss", 0.2), (LOSS, 0.0), ("train_loss", 0.2), ("x", 0.2)]
)
@pytest.mark.parametrize("kind", [callbacks.EarlyStopping, callbacks.ModelCheckpoint])
def test_figures_that_no_run_logs(tmp_path, kind, monitor, held):
    with pytest.raises(ValueError, match=rf"monitor='{monitor}'\): a run logs no such figure"):
        fit(tmp_path, setting="none", held=held, callback=[kind(monitor=monitor)])
    assert not (tmp_path / "run").exists()


class Logging(pl.Callback):
    """Logs a public figure."""

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.log("round", float(trainer.current_epoch))


def test_figures_of_others_may_be_monitored(tmp_path):
    stop = callbacks.EarlyStopping(monitor="round", mode="max", check_on_train_epoch_end=True)
    assert fit(tmp_path, callback=[Logging(), stop]).result.round == 1


def test_a_monitor_of_the_learning_rate_needs_a_logger(tmp_path):
    with pytest.raises(ValueError, match="LearningRateMonitor needs a logger"):
        fit(tmp_path, callback=[callbacks.LearningRateMonitor()])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda: callbacks.EMAWeightAveraging(decay=0.5),
        callbacks.WeightAveraging,
        lambda: callbacks.Timer("00:01:00:00"),
        lambda: callbacks.LambdaCallback(on_train_start=lambda *_: None),
    ],
)
def test_callbacks_that_go_with_rounds(tmp_path, make):
    module = fit(tmp_path, callback=[make()])
    assert module.result.round == 1
    assert len(module.ledger) == 6


def test_a_moving_average_of_models_is_saved_and_gone_on_with(tmp_path):
    def averaged(folder, rounds, path=None):
        torch.manual_seed(0)
        average = callbacks.EMAWeightAveraging(decay=0.5)
        module = fit(
            folder, callback=[average, RoundCheckpoint()], rounds=rounds, planned_rounds=4
        ) if path is None else again(folder, average, path)  # fmt: skip
        return module.network.state_dict()

    def again(folder, average, path):
        from fl_lightning import FederatedModule, PrivacyConfig
        from fl_lightning.models import MLP

        privacy = PrivacyConfig(epsilon=None, noise_multiplier=1.0, seed=0)
        module = FederatedModule(
            MLP(6, 3, hidden=[4]), privacy, run_dir=str(folder / "run"), execution="loop",
            planned_rounds=4,
        )  # fmt: skip
        trainer = pl.Trainer(
            max_epochs=4, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder, plugins=[AtomicCheckpointIO()],
            callbacks=[average, RoundCheckpoint()],
        )  # fmt: skip
        trainer.fit(module, data(val_fraction=0.2), ckpt_path=path, weights_only=False)
        return module

    whole = averaged(tmp_path / "whole", 4)
    averaged(tmp_path / "parts", 2)
    path = tmp_path / "parts" / "run" / "checkpoints" / "last.ckpt"
    parts = averaged(tmp_path / "parts", 4, path)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    saved = torch.load(path, weights_only=False)["state_dict"]
    assert all(torch.equal(saved[f"network.{name}"], parts[name]) for name in parts)


OPTIONS = {
    "accumulate_grad_batches": (2, "must be 1"),
    "gradient_clip_val": (0.5, "privacy.clip_norm"),
    "overfit_batches": (1, "no meaning for rounds"),
    "limit_train_batches": (0, "leaves no rounds"),
    "val_check_interval": (2, "check_val_every_n_epoch"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_have_no_meaning_for_rounds(name):
    value, message = OPTIONS[name]
    with pytest.raises(ValueError, match=rf"^trainer.{name}={value} .*{message}"):
        check_options(pl.Trainer(accelerator="cpu", logger=False, **{name: value}))


@pytest.mark.parametrize(
    "options",
    [
        {"limit_train_batches": 3},
        {"val_check_interval": 0.5},
        {"val_check_interval": 2, "check_val_every_n_epoch": None},
        {"reload_dataloaders_every_n_epochs": 1},
        {"max_steps": 2},
        {"num_sanity_val_steps": 2},
    ],
    ids=str,
)
def test_options_that_have_a_meaning(tmp_path, options):
    steps = options.get("max_steps", 3)
    trainer = {"max_epochs": 3, "limit_val_batches": 1.0, **options}
    module = train(tmp_path / "run", records=data(val_fraction=0.2), trainer=trainer)
    assert module.result.round == steps - 1
    assert len(module.ledger) == 3 * steps


@pytest.mark.parametrize("name", ["gradient_clip_val", "overfit_batches", "limit_train_batches"])
def test_the_command_line_refuses_by_name(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    # Lightning uses an old name of jsonargparse.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    value = OPTIONS[name][0]
    with pytest.raises(SystemExit):
        main(["--run_dir", "run", f"--trainer.{name}", str(value), "--trainer.accelerator", "cpu"])
    assert capsys.readouterr().err.startswith(f"error: trainer.{name}={value} ")
    assert not (tmp_path / "run").exists()
