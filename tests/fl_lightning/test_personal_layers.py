"""Personal layers: fitted as torch would, never released, judged client by client."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from fl_lightning import (
    FederatedDataModule,
    FederatedModule,
    PrivacyConfig,
    fit_personal_layers,
    from_arrays,
)
from fl_lightning.deploy.holding import Holding
from fl_lightning.deploy.node import Node
from fl_lightning.ledger import read
from fl_lightning.ledger.statement import privacy_statement
from fl_lightning.local.personal import take_out_personal
from fl_lightning.module import cross_entropy
from fl_lightning.networks.outputs import record_loss
from fl_lightning.release.agreement import network_digest, propose
from fl_lightning.release.personal_models import PersonalModels
from fl_lightning.rules import Rules
from tests.fl_lightning import nodes
from tests.fl_lightning.resuming import go

FIT = {"personal_layers": ["head"], "personal_steps": 3, "personal_lr": 0.7}
CLIENT = {"setting": "client+local", "epsilon": 20.0, "delta": 0.1, "thresholds": "fixed"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.drop, self.head = nn.Linear(6, 4), nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.drop(torch.tanh(self.body(x))))


def by_torch(network, x, y, steps=3, lr=0.7):
    """The network with its head fitted by torch's own SGD, in eval mode."""
    own = copy.deepcopy(network).eval()
    optimizer = torch.optim.SGD(own.head.parameters(), lr)
    for p in own.head.parameters():
        p.requires_grad_(True)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(own(x), y).backward()
        optimizer.step()
    return own


def module_of(data, network=None, *, privacy=None, **options):
    return FederatedModule(
        network or Net(),
        PrivacyConfig(**(privacy or {"setting": "none"})),
        **({"sampling_rate": None, "batch_size": 100, "client_lr": 0.3} | FIT | options),
    )


def client_records(data, k):
    rows = torch.from_numpy(data.partition.client(k))
    return data.x[rows], data.y[rows]


@pytest.mark.parametrize("vectorize", [True, False])
def test_each_client_fits_as_torch_does(federation, vectorize):
    """Clients of different sizes, padded to one length, and computed in small pieces."""
    data = federation(40, (6,), partition="quantity", alpha=1.0)
    data.eval_batch_size = 7
    module = module_of(data)
    run = _Run(module, data)
    models = PersonalModels(run, vectorize=vectorize)
    models.clients.at_once = 2
    models._fit([0, 1, 2])
    for k in range(3):
        want = by_torch(module.network, *client_records(data, k))
        for name, value in models._fitted[k].items():
            torch.testing.assert_close(value, want.get_parameter(name).detach())


class _Run:
    def __init__(self, module, data):
        self.rules, self.network, self.loss = module.rules, module.network, module.loss
        self.layout, self.data = module.layout, data


def test_a_round_trains_the_body_around_fitted_heads(federation, fit):
    data, network = federation(30, (6,)), Net()
    network.drop.p = 0.0
    before = copy.deepcopy(network)
    fit(data, network, rounds=1, module_kwargs=_kwargs(local_steps=1), setting="none")
    moved = torch.zeros(4, 6)
    for k in range(3):
        x, y = client_records(data, k)
        own = by_torch(before, x, y)
        own.zero_grad()
        F.cross_entropy(own(x), y).backward()
        moved -= 0.3 * own.body.weight.grad / 3
    torch.testing.assert_close(network.body.weight - before.body.weight, moved)
    assert torch.equal(network.head.weight, before.head.weight)  # the public start


def _kwargs(**more):
    return {"sampling_rate": None, "batch_size": 100, "client_lr": 0.3} | FIT | more


def blob_run(folder, rounds, **more):
    """`resuming.go`, whose network has the layers fc1 and fc2."""
    return go(folder, rounds, privacy=CLIENT, **_kwargs(personal_layers=["fc2"], **more))


def test_they_are_in_no_release_and_in_the_statement(tmp_path):
    """Noise, clip norms and shares are of the body alone; the statement says what stays."""
    module = blob_run(tmp_path, 2, client_proximal=0.1)
    header, releases = read(tmp_path / "ledger.jsonl")
    assert (header["layers"], header["dims"]) == (["fc1"], [6 * 4 + 4])
    assert all(r.num_layers == 1 for r in releases)
    assert header["personal"] == {"parameters": ["fc2.weight", "fc2.bias"], "steps": 3, "lr": 0.7}
    statement = privacy_statement(module.ledger)
    assert "Personal layers (fc2.weight, fc2.bias): in every round each client" in statement
    assert "what they predict" in statement
    assert "FedProx, mu = 0.1" in statement


def test_a_stopped_run_goes_on_with_the_same_bits(tmp_path):
    options = {"local_steps": 2, "batch_size": 5}
    whole = blob_run(tmp_path / "whole", 4, **options)
    blob_run(tmp_path / "parts", 2, **options)
    parts = blob_run(tmp_path / "parts", 4, resume=True, **options)
    assert torch.equal(whole.network.fc1.weight, parts.network.fc1.weight)
    ends = [[r.digest for r in module.ledger] for module in (whole, parts)]
    assert ends[0] == ends[1]


def test_figures_are_of_each_clients_own_model(federation, tmp_path):
    """Against models that torch fits, for validation, test, and the private evaluation."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(200, 6, generator=generator), torch.randint(3, (200,), generator=generator)
    arrays = from_arrays(x[:150], y[:150], x[150:], y[150:], num_classes=3)
    data = FederatedDataModule(arrays, 3, partition="dirichlet", alpha=0.3, eval_batch_size=16)
    privacy = {**CLIENT, "seed": 7, "evaluate_every": 1, "epsilon": 20.0}
    module = module_of(data, privacy=privacy, run_dir=str(tmp_path))
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    own = [by_torch(module.network, *client_records(data, k)) for k in range(3)]
    right = []
    for records, labels, held in (
        (*data.held_out, data.held_out_partition),
        (x[150:], y[150:], data.test_partition),
    ):
        rows = [torch.from_numpy(held.client(k)) for k in range(3)]
        answered = [own[k](records[r]).argmax(1) == labels[r] for k, r in enumerate(rows)]
        right.append([found.sum() for found in answered])
        assert sum(map(len, rows)) == len(labels)
    (figures,) = trainer.test(module, data, verbose=False)
    assert figures["test/accuracy"] == pytest.approx(float(sum(right[1])) / 50)
    (figures,) = trainer.validate(module, data, verbose=False)
    held_out = float(sum(right[0])) / len(data.held_out[0])
    assert figures["sim_only/val_accuracy"] == pytest.approx(held_out)
    there = data.held_out_partition.sizes > 0
    answers = [float(r) for r, some in zip(right[0], there, strict=True) if some]
    assert module.run.evaluations.right_answers().tolist() == answers


def test_natural_clients_test_on_their_own_records():
    x, y = np.zeros((8, 2), np.float32), np.array([0, 1] * 4)
    names = list("aabbccdd")
    arrays = from_arrays(x, y, x, y, client=names, client_test=list("dcbaxxdd"))
    data = FederatedDataModule(arrays, 4, partition="natural", val_fraction=0)
    holders = {data.partition.client(k)[0] // 2: k for k in range(4)}
    held = data.test_partition
    assert sorted(held.client(holders[3])) == [0, 6, 7]
    assert [held.client(holders[k]).tolist() for k in (0, 1, 2)] == [[3], [2], [1]]
    unnamed = from_arrays(x, y, x, y, client=names)
    with pytest.raises(ValueError, match="does not say whose its test records are"):
        _ = FederatedDataModule(unnamed, 4, partition="natural", val_fraction=0).test_partition
    with pytest.raises(ValueError, match="client_test needs client"):
        from_arrays(x, y, x, y, client_test=names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"personal_layers": ["haed"]}, r"nothing named 'haed'; it trains body, head"),
        ({"personal_layers": ["head", "body"]}, "nothing is left that clients train together"),
        ({"personal_steps": 0}, "personal_steps=0"),
        ({"personal_lr": float("inf")}, "personal_lr=inf"),
        ({"privacy": {"epsilon": 8.0}, "sampling_rate": 0.5, "batch_size": None}, "record.local"),
    ],
)
def test_what_is_refused(federation, options, message):
    with pytest.raises(ValueError, match=message):
        module_of(federation(30, (6,)), **options)


def test_a_shared_parameter_is_not_half_personal():
    network = Net()
    network.head = nn.Linear(6, 4)
    network.head.weight = network.body.weight
    with pytest.raises(ValueError, match=r"share the parameter 'body.weight'"):
        module_of(None, network)


OF_NODES = {"personal_layers": ["2"], "personal_steps": 3, "personal_lr": 0.5}
HOLDERS = {"setting": "client+local", "epsilon": 50.0, "seed": 5}


@pytest.fixture
def holder(tmp_path):
    """Nodes that keep layers of their network, closed in the end."""
    made = []

    def make(client=0, layers=("2",), **options):
        network = nodes.network()
        personal = take_out_personal(network, layers)
        digest = network_digest(network, record_loss(cross_entropy))
        policy = nodes.policy(simulation=True, epsilon=50.0, networks=[digest], **options)
        data = nodes.population().only(client)
        holding = Holding(data, network, None, policy, personal=personal)
        made.append(Node(holding, tmp_path / f"holder{len(made)}", client))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_nodes_keep_them_and_give_the_simulated_run(holder, tmp_path):
    simulated = nodes.module(tmp_path / "simulated", OF_NODES, **HOLDERS)
    nodes.trainer(3).fit(simulated, nodes.population())
    run = nodes.deployed(
        tmp_path / "run", [holder(k) for k in range(nodes.CLIENTS)], rules=OF_NODES, **HOLDERS
    )
    for a, b in zip(simulated.network.parameters(), run.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(run.network[0].weight, nodes.network()[0].weight)
    assert run.ledger.header["personal"] == simulated.ledger.header["personal"]
    # Whose records are elsewhere cannot be judged here.
    assert run.trainer.test(run, nodes.population(), verbose=False) == [{}]


@pytest.mark.parametrize(
    ("kept", "options", "message"),
    [
        ((), {}, "personal layers are .*, the holder keeps"),
        (("2",), {"local_steps": 2}, "local steps is 3, the holder allows at most 2"),
    ],
)
def test_a_holder_decides_what_stays(holder, tmp_path, kept, options, message):
    node = holder(0, kept, **options)
    (network,) = node._holding.policy.networks
    rules = Rules(PrivacyConfig(**HOLDERS, delta=1e-3), personal=("2.weight", "2.bias"))
    rules = replace(rules, personal_steps=3, local_steps=2)
    terms = propose(rules, run=nodes.RUN, client=0, clients=3, network=network, rounds=3, span=3)
    answer = nodes.join(node, terms)
    assert re.search(message, answer["refused"])


def test_an_exported_model_is_fitted_as_in_training(federation):
    data = federation(30, (6,))
    network = Net().eval()
    x, y = client_records(data, 1)
    want = by_torch(network, x, y)
    fit_personal_layers(network, x, y, ["head"], steps=3, lr=0.7)
    torch.testing.assert_close(network.state_dict(), want.state_dict())
    assert all(p.requires_grad for p in network.parameters())
    with pytest.raises(ValueError, match="x has 0 records"):
        fit_personal_layers(network, x[:0], y[:0], ["head"])


def test_a_fit_that_is_not_finite_gives_the_start(federation):
    """Also beside clients whose fit is."""
    data = federation(30, (6,))
    data.x[data.partition.client(0)[0]] = torch.nan
    module = module_of(data)
    models = PersonalModels(_Run(module, data), vectorize=True)
    models._fit([0, 1])
    start = module.network.head.weight
    assert torch.equal(models._fitted[0]["head.weight"], start)
    assert not torch.allclose(models._fitted[1]["head.weight"], start)
