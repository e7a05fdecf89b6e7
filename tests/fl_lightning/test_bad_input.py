"""What a user can get wrong: an error at once that names the argument and its value."""

import math

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from fl_lightning import FederatedDataModule
from fl_lightning.models import MLP
from tests.fl_lightning.tried_runs import data, train

NAN, INF = math.nan, math.inf


class Averaged(nn.Module):
    def forward(self, outputs, labels):
        return nn.functional.cross_entropy(outputs, labels)


class Centred(nn.Module):
    """One loss a record, but of outputs that were centred over the batch."""

    def forward(self, outputs, labels):
        return nn.functional.cross_entropy(outputs - outputs.mean(0), labels, reduction="none")


class Counting(nn.Module):
    """Keeps a statistic of what it has seen."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(6, 3)
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x):
        self.seen += x.detach().mean(0)
        return self.last(x)


class Mixing(nn.Module):
    """Takes the mean of the batch away, in training alone or behind a layer of zeros."""

    def __init__(self, hidden_by):
        super().__init__()
        self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 3)
        self.always = hidden_by == "zeros"
        if self.always:
            nn.init.zeros_(self.last.weight)

    def forward(self, x):
        x = self.first(x)
        return self.last(x - x.mean(0) if self.always or self.training else x)


class Keeping(nn.Module):
    """Keeps a statistic that is no buffer."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(6, 3)
        self.mean = torch.zeros(6)

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.last(x - self.mean)


class Rescaling(nn.Module):
    """Changes a weight by what it sees."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        with torch.no_grad():
            self.last.bias.add_(x.mean())
        return self.last(x)


class Overwriting(nn.Module):
    """Scales its input in place."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        x /= 255
        return self.last(x)


def plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


def sequence(*layers):
    return nn.Sequential(nn.Linear(6, 4), *layers, nn.Linear(4, 3))


def frozen():
    network = MLP(6, 3)
    for p in network.parameters():
        p.requires_grad_(False)
    return network


BAD_PRIVACY = [
    ({"epsilon": 0}, "epsilon=0"),
    ({"epsilon": -1.0}, r"epsilon=-1\.0"),
    ({"epsilon": INF}, "epsilon=inf"),
    ({"epsilon": NAN}, "epsilon=nan"),
    ({"epsilon": []}, r"epsilon=\[\]"),
    ({"epsilon": [1.0, -2.0]}, r"epsilon=-2\.0"),
    ({"epsilon": [1.0] * 4}, "epsilon=.*4 numbers for 3 clients"),
    ({"epsilon": None, "noise_multiplier": None}, "epsilon=null and noise_multiplier=null"),
    ({"delta": 1.0}, r"delta=1\.0"),
    ({"delta": NAN}, "delta=nan"),
    ({"delta": 0.05}, r"delta=0\.05 of client 0 is not below 1/20"),
    ({"delta": 0.4, "setting": "client+local"}, r"delta=0\.4 of client 0 is not below 1/3"),
    ({"delta": 0.0}, "delta=0 .*laplace"),
    ({"noise_multiplier": 0.0, "epsilon": 8.0}, r"noise_multiplier=0\.0 adds no noise"),
    ({"noise_multiplier": 0.1, "epsilon": 0.1}, r"noise_multiplier=0\.1.*never take part"),
    ({"noise_multiplier": -1.0}, r"noise_multiplier=-1\.0"),
    ({"noise_multiplier": INF}, "noise_multiplier=inf"),
    ({"clip_norm": 0.0}, r"clip_norm=0\.0"),
    ({"clip_norm": NAN}, "clip_norm=nan"),
    ({"clip_norm": []}, r"clip_norm=\[\]"),
    ({"clip_norm": [1.0, 2.0, 3.0]}, r"clip_norm.*3.*2"),
    ({"clip_norm": INF}, "clip_norm=inf needs noise_multiplier=0"),
    ({"clip_norm": INF, "noise_multiplier": 0.0}, "clip_norm=inf needs thresholds='fixed'"),
    ({"setting": "record"}, "setting='record'"),
    (
        {"setting": "client+secure_sum", "cohort_sampling": "poisson"},
        "cohort_sampling='poisson' with setting='client\\+secure_sum'",
    ),
    ({"setting": "client+aggregator", "adjacency": "replace_one"}, "adjacency='replace_one'"),
    ({"setting": "client+aggregator", "min_survivors": 2}, "min_survivors=2 with setting"),
    ({"setting": "client+secure_sum", "min_survivors": 0}, "min_survivors=0"),
    ({"setting": "client+secure_sum", "min_survivors": 99}, "min_survivors=99 is more than"),
    ({"adjacency": "replace_one", "mechanism": "laplace"}, "adjacency='replace_one' with mech"),
    ({"setting": "client+local", "adjacency": "zero_out"}, "adjacency='zero_out'.*client\\+local"),
    ({"adjacency": "add_remove"}, "adjacency='add_remove'"),
    ({"mechanism": "exponential"}, "mechanism='exponential'"),
    ({"mechanism": "laplace", "clip_order": 2}, "clip_order=2 with mechanism='laplace'"),
    ({"clip_order": 3}, "clip_order=3"),
    ({"thresholds": "median"}, "thresholds='median'"),
    ({"thresholds": "raw"}, "thresholds='raw'.*only for setting='abstract'"),
    ({"thresholds": "quantile", "setting": "client+local"}, "thresholds='quantile'.*one vote"),
    ({"allocation": "greedy"}, "allocation='greedy'"),
    ({"quantile": 1.0}, r"quantile=1\.0"),
    ({"quantile_lr": 0.0}, r"quantile_lr=0\.0"),
    ({"vote_share": 0.0}, r"vote_share=0\.0"),
    ({"clip_factor": -1.0}, r"clip_factor=-1\.0"),
    ({"share_floor": 0.0}, r"share_floor=0\.0"),
    ({"history": 0}, "history=0"),
    ({"rng": "mt19937"}, "rng='mt19937'"),
    ({"seed": -1}, "seed=-1"),
]
BAD_OPTIONS = [
    ({"sampling_rate": 0.0}, r"sampling_rate=0\.0"),
    ({"sampling_rate": 1.5}, r"sampling_rate=1\.5"),
    ({"sampling_rate": NAN}, "sampling_rate=nan"),
    ({"sampling_rate": None}, "sampling_rate=None and batch_size=None"),
    ({"batch_size": 4}, r"sampling_rate=0\.1 and batch_size=4"),
    ({"sampling_rate": None, "batch_size": 4}, "batch_size=4.*sampling_rate"),
    ({"local_steps": 0}, "local_steps=0"),
    ({"local_steps": None, "local_epochs": 0}, "local_epochs=0"),
    ({"client_lr": 0.0}, r"client_lr=0\.0"),
    ({"client_lr": NAN}, "client_lr=nan"),
    ({"client_momentum": 1.0}, r"client_momentum=1\.0"),
    ({"client_proximal": -0.1}, r"client_proximal=-0\.1"),
    ({"clients_per_round": 0}, "clients_per_round=0"),
    ({"clients_per_round": 4}, "clients_per_round=4 is more than num_clients=3"),
    ({"planned_rounds": 0}, "planned_rounds=0"),
    ({"planned_rounds": 1}, "trainer.max_epochs=2 is more than planned_rounds=1"),
    ({"memory_budget": 0.0}, r"memory_budget=0\.0"),
    ({"weighting": "sizes"}, "weighting='sizes'"),
    ({"execution": "parallel"}, "execution='parallel'"),
    ({"seed": -1}, "seed=-1"),
    ({"network": frozen()}, "no trainable parameters"),
    ({"network": MLP(7, 3)}, r"network=MLP: it cannot be applied to records of shape \(6,\)"),
    ({"network": sequence(nn.BatchNorm1d(4))}, "'1' is a BatchNorm1d.*GroupNorm"),
    ({"network": sequence(nn.BatchNorm2d(4))}, "'1' is a BatchNorm2d.*GroupNorm"),
    ({"network": sequence(nn.SyncBatchNorm(4))}, "'1' is a SyncBatchNorm.*GroupNorm"),
    (
        {"network": sequence(nn.InstanceNorm1d(4, track_running_stats=True))},
        "'1' keeps unprotected running statistics",
    ),
    ({"network": Counting()}, "changes the buffer 'seen'"),
    ({"network": sequence(nn.Embedding(9, 4, max_norm=1.0))}, "'1' has max_norm=1.0"),
    ({"network": sequence(nn.EmbeddingBag(9, 4, max_norm=1.0))}, "'1' has max_norm=1.0"),
    ({"network": Rescaling()}, "changes the parameter 'last.bias'"),
    ({"network": Overwriting()}, "changes the records that it is given"),
    ({"network": Keeping()}, "other losses when it is applied again"),
    ({"network": Mixing("training")}, "changes with the records beside it"),
    ({"network": Mixing("zeros")}, "changes with the records beside it"),
    ({"loss": Centred()}, "changes with the records beside it"),
    ({"server_scheduler": plateau}, "ReduceLROnPlateau.*private"),
    ({"server_optimizer": torch.optim.LBFGS}, "server_optimizer=LBFGS"),
    ({"loss": Averaged()}, r"loss=Averaged: it gave shape \(\) for 6 records"),
    ({"trainer": {"max_epochs": -1}}, "max_epochs=-1: give the number of rounds"),
    ({"trainer": {"max_epochs": None, "max_steps": 5}}, "max_epochs=.*give the number of rounds"),
    ({"trainer": {"precision": "bf16-mixed"}}, "precision=bf16-mixed"),
    ({"records": lambda: data(5, num_clients=5, min_client_size=1)}, "client 0 has 1 record"),
    ({"records": lambda: data(2)}, "num_clients=3.*at least 2"),
    ({"records": lambda: data(val_fraction=1.0)}, r"val_fraction=1\.0"),
    ({"records": lambda: data(num_clients=0)}, "num_clients=0"),
    ({"records": lambda: data(partition="dirichlet", alpha=0.0)}, r"alpha=0\.0"),
    ({"records": lambda: data(partition="sorted")}, "partition='sorted'"),
    ({"records": lambda: data(partition="shards", shards_per_client=99)}, "297 shards"),
    ({"records": lambda: data(partition="natural")}, "says who holds a record"),
    ({"records": lambda: data(seed=-1)}, "seed=-1"),
    ({"records": lambda: FederatedDataModule("cifar")}, "source='cifar'.*digits"),
]


def names(cases):
    return [f"{', '.join(bad)}-{i}" for i, (bad, _) in enumerate(cases)]


@pytest.mark.parametrize(("bad", "message"), BAD_PRIVACY, ids=names(BAD_PRIVACY))
def test_privacy(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", privacy=bad)
    assert not (tmp_path / "run" / "ledger.jsonl").exists()


@pytest.mark.filterwarnings("ignore:.*bfloat16.*")
@pytest.mark.parametrize(("bad", "message"), BAD_OPTIONS, ids=names(BAD_OPTIONS))
def test_run(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", **{n: v() if n == "records" else v for n, v in bad.items()})
    assert not (tmp_path / "run" / "ledger.jsonl").exists()


def test_missing_files_say_how_to_get_them(tmp_path):
    records = FederatedDataModule("fashion_mnist", data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError) as caught:
        train(tmp_path / "run", records=records, network=MLP(784, 10))
    message = str(caught.value)
    for way in (str(tmp_path / "nowhere"), "data_dir", "dataset-fashion-mnist", "http://"):
        assert way in message


def test_a_datamodule_of_another_kind_is_refused(tmp_path):
    class Plain(pl.LightningDataModule):
        def train_dataloader(self):
            return [0]

        def val_dataloader(self):
            return [0]

    with pytest.raises(ValueError, match="must be a FederatedDataModule"):
        train(tmp_path, records=Plain())


def test_the_defaults_of_these_tests_are_good(tmp_path):
    module = train(tmp_path)
    assert module.ledger is not None
    assert len(module.ledger) == 2 * 3


@pytest.mark.parametrize("setting", ["record+local", "client+local", "client+aggregator", "none"])
def test_double_precision_trains(tmp_path, setting):
    module = train(
        tmp_path, privacy={"setting": setting}, trainer={"precision": "64-true"}, local_steps=2
    )
    assert module.result is not None
    for p in module.network.parameters():
        assert p.dtype == torch.float64
        assert p.isfinite().all()


@pytest.fixture(autouse=True)
def _no_warning_of_lightnings_own(monkeypatch):
    # Lightning uses an old name of jsonargparse.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
