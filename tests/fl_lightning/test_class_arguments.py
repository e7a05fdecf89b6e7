"""What was given for one class is not given to the next."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from jsonargparse import _typehints

from fl_lightning import fit
from fl_lightning.command.class_arguments import class_before_its_arguments
from fl_lightning.fit import FederatedCLI, main

FILES = {
    "mlp.yaml": "fl_lightning.models.MLP\n    init_args: {in_features: 7, hidden: [4]}",
    "linear.yaml": "fl_lightning.models.LogisticRegression",
}
LOGS = {
    "csv.yaml": "CSVLogger\n    init_args: {save_dir: csv, name: mine}",
    "board.yaml": "TensorBoardLogger\n    init_args: {save_dir: board}",
}
STEPS = """model:
  server_optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.3}}
  server_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 3, gamma: 0.2}}
"""  # noqa: E501


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for name, network in FILES.items():
        Path(name).write_text(f"model:\n  network:\n    class_path: {network}\n")
    for name, logger in LOGS.items():
        path = f"pytorch_lightning.loggers.{logger}"
        Path(name).write_text(f"trainer:\n  logger:\n    class_path: {path}\n")
    Path("steps.yaml").write_text(STEPS)
    return tmp_path


@pytest.fixture
def parsed(cwd, monkeypatch, capsys):
    """The configuration that a command line comes to, and what is said of it."""

    class Parsed(Exception):
        pass

    def stop(self):
        raise Parsed(self.config.fit, self._notes)

    monkeypatch.setattr(FederatedCLI, "before_instantiate_classes", stop)

    def parse(typed):
        with pytest.raises(Parsed) as caught:
            main(typed.split())
        return caught.value.args

    return parse


OPTIMIZER, SCHEDULER = "model.server_optimizer", "model.server_scheduler"
DECAY = "torch.optim.lr_scheduler.ExponentialLR"


@pytest.mark.parametrize(
    ("typed", "key", "expected", "said"),
    [
        (f"--{OPTIMIZER} torch.optim.Adam", OPTIMIZER, {"lr": 1e-3}, []),
        (f"--{OPTIMIZER} Adam --{OPTIMIZER}.lr 1.0", OPTIMIZER, {"lr": 1.0}, []),
        (f"--{OPTIMIZER}.lr 0.1 --{OPTIMIZER} Adam", OPTIMIZER, {"lr": 0.1}, []),
        (f"--{OPTIMIZER} SGD", OPTIMIZER, {"lr": 1.0, "momentum": 0.5}, []),
        (f"--{OPTIMIZER} torch.optim.sgd.SGD", OPTIMIZER, {"lr": 1.0, "momentum": 0.5}, []),
        (f"--{OPTIMIZER}.momentum 0.9", OPTIMIZER, {"lr": 1.0, "momentum": 0.9}, []),
        (f"--config steps.yaml --{OPTIMIZER} AdamW", OPTIMIZER, {"lr": 1e-3}, ["lr=0.3"]),
        (
            f"--config steps.yaml --{SCHEDULER} {DECAY} --{SCHEDULER}.gamma 0.5",
            SCHEDULER,
            {"gamma": 0.5},
            ["step_size=3", "gamma=0.2", "StepLR"],
        ),
        ("--config mlp.yaml", "model.network", {"in_features": 7, "hidden": [4]}, []),
        (
            "--config mlp.yaml --config linear.yaml",
            "model.network",
            {"in_features": 64},
            ["in_features=7", "hidden=[4]"],
        ),
        ("--config linear.yaml --config mlp.yaml", "model.network", {"in_features": 7}, []),
        (
            "--config csv.yaml --config board.yaml",
            "trainer.logger",
            {"save_dir": "board", "name": "lightning_logs"},
            ["name='mine'", "CSVLogger"],
        ),
    ],
)
def test_arguments_end_with_their_class(parsed, typed, key, expected, said):
    config, notes = parsed(typed)
    found = config[key].init_args.as_dict()
    assert {name: found[name] for name in expected} == expected
    assert bool(notes) == bool(said)
    for part in said:
        assert part in notes[0]


def test_what_the_new_class_needs_must_be_given(cwd, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--config", "steps.yaml", f"--{SCHEDULER}", DECAY])
    assert stop.value.code == 2
    assert "required: gamma" in capsys.readouterr().err
    assert _typehints.discard_init_args_on_class_path_change.__module__ == _typehints.__name__


def test_a_printed_config_says_the_same(cwd, capsys):
    with pytest.raises(SystemExit):
        main([f"--{OPTIMIZER}", "torch.optim.Adam", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["server_optimizer"]
    assert (printed["class_path"], printed["init_args"]["lr"]) == ("torch.optim.Adam", 1e-3)
    assert fit.default_experiment()["model.server_optimizer"]["init_args"]["lr"] == 1.0


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("--a.b.c 1 --a.b X", "--a.b X --a.b.c 1"),
        ("--a.b.c=1 --z 2 --a.b=X", "--a.b=X --a.b.c=1 --z 2"),
        ("--a.b.c 1 --config f --a.b X", "--a.b.c 1 --config f --a.b X"),
        ("--a.b Y --a.b.c 1 --a.b X", "--a.b Y --a.b.c 1 --a.b X"),
        ("--a.b 1 --a X", "--a.b 1 --a X"),
        ("--t.c.x 1 --t.c+=X", "--t.c.x 1 --t.c+=X"),
        ("fit --a.b.c -1 --a.b X", "fit --a.b X --a.b.c -1"),
    ],
)
def test_a_class_stands_before_its_arguments(typed, expected):
    assert class_before_its_arguments(typed.split()) == expected.split()
