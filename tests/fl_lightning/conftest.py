"""Small federations for the tests: a quiet Trainer, and a population without one."""

import base64
import logging
import signal
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from aadp_kernels import NoiseKey
from fl_lightning import FederatedDataModule, FederatedModule, PrivacyConfig, from_arrays
from fl_lightning.accounting.budget import Budget
from fl_lightning.ledger import Ledger
from fl_lightning.module import cross_entropy
from fl_lightning.preflight.proposed_run import trained_layers
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.processes.together import Processes
from fl_lightning.release.claim import Books
from fl_lightning.release.clients import Clients
from fl_lightning.release.one_by_one import OneByOne
from fl_lightning.requirements import PACKAGES, installed
from fl_lightning.rules import Rules

# They are of whole runs, which need everything that the extra `federated` brings; a machine that
# has less, such as one of GPUs, runs the other folders.
if not all(map(installed, PACKAGES)):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def _quiet_lightning():
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _signals_are_handed_back():
    """A handler that is left behind would swallow the SIGTERM that ends a later process."""
    watched = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(signum) for signum in watched]
    yield
    assert [signal.getsignal(signum) for signum in watched] == before


# Whose pictures are looked at.
_PAINTED = (
    "test_plots.py", "test_report.py", "test_compare.py", "test_risk.py", "test_audit_command.py",
    "test_attack_inversion.py", "test_attack_membership.py",
)  # fmt: skip
_PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)


@pytest.fixture(autouse=True)
def _only_pictures_that_are_looked_at_are_painted(request, monkeypatch):
    """They are made all the same; to paint them takes two thirds of a small run."""

    def blank(figure, place, **_):
        place.write(_PNG) if hasattr(place, "write") else Path(place).write_bytes(_PNG)

    if request.path.name not in _PAINTED:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", blank)


@pytest.fixture(scope="session")
def zygote():
    """A process to fork runs from that can be killed."""
    from tests.fl_lightning.killing import Zygote

    made = Zygote()
    yield made
    made.process.communicate(timeout=60)


@pytest.fixture
def federation():
    """Gaussian records [N, *shape] with labels of 3 classes, dealt over clients."""

    def make(num_records=60, shape=(8,), *, clients=3, fill=None, change=None, **kwargs):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(num_records, *shape, generator=generator)
        y = torch.randint(0, 3, (num_records,), generator=generator)
        if fill is not None:
            x.fill_(fill)
        if change is not None:
            change(x, y)
        arrays = from_arrays(x, y, num_classes=3)
        return FederatedDataModule(arrays, num_clients=clients, val_fraction=0, **kwargs)

    return make


@pytest.fixture
def fit(tmp_path):
    """Train `network` on `data`; every call has a run folder of its own."""
    runs = iter(range(1000))

    def run(data, network, *, rounds=2, callbacks=(), module_kwargs=None, **privacy):
        privacy = {"seed": 1, "epsilon": None, **privacy}
        module = FederatedModule(
            network,
            PrivacyConfig(**privacy),
            run_dir=str(tmp_path / f"run{next(runs)}"),
            **({"execution": "vmap"} | (module_kwargs or {})),
        )
        trainer = pl.Trainer(
            max_epochs=rounds,
            accelerator="cpu",
            logger=False,
            callbacks=list(callbacks),
            limit_val_batches=0,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data)
        return module

    return run


@pytest.fixture
def population(tmp_path):
    """Releases of single clients with a ledger, as FederatedModule builds them."""
    runs = iter(range(1000))
    ledgers = []

    def make(
        data, network, config, *, lr=1.0, sampling_rate=1.0, local_steps=1,
        vectorize=True, max_examples=2**40,
    ):  # fmt: skip
        rules = Rules(config, sampling_rate=sampling_rate, local_steps=local_steps, client_lr=lr)
        layout = trained_layers(network, rules)
        rate = sampling_rate if config.unit == "record" else 1.0
        budget = Budget(config, [100] * data.num_clients, rate, layout.dims)
        if config.private:
            budget.calibrate(rules.steps_a_release)
        header = {"setting": config.setting, "simulated": True, "delta": 1e-5, "epsilon": None}
        header |= {"privacy_unit": config.unit, "trust": "local", "adjacency": "zero_out"}
        header |= {"mechanism": config.mechanism}
        ledgers.append(Ledger.create(tmp_path / f"population{next(runs)}", header))
        clients = Clients(
            data, network, cross_entropy, layout, privacy=config, training=rules.training,
            vectorize=vectorize, max_examples=max_examples,
        )  # fmt: skip
        history = ReleasedHistory(config, data.num_clients, layout.dims)
        books = Books(history, budget, ledgers[-1], Processes()) if config.private else None
        # As a secret one: noise of a public seed is not bound to what it hides.
        key = NoiseKey(NoiseKey.from_seed(config.seed or 0)._secret, config.rng)
        return OneByOne(clients, rules, key, books, Processes())

    yield make
    for ledger in ledgers:
        ledger.close()


@pytest.fixture
def global_params():
    """Parameters of a network as a release takes them."""

    def get(network):
        return {name: p.detach().clone() for name, p in network.named_parameters()}

    return get
