"""Weights that are shared or that a later record changes are clipped as one or refused."""

import pytest
import torch
from torch import nn

from fl_lightning import FederatedDataModule, from_arrays
from tests.fl_lightning.tried_runs import data, train


class Renormed(nn.Module):
    """Rescales a row of its weights when a record holds the code 9."""

    def __init__(self):
        super().__init__()
        self.codes, self.last = nn.Embedding(10, 4), nn.Linear(4, 3)
        self.codes.weight.data[9] = 100.0

    def forward(self, x):
        rows = nn.functional.embedding(x, self.codes.weight, max_norm=50.0)
        return self.last(rows.mean(1))


@pytest.mark.parametrize("setting", ["record+local", "client+local"])
def test_weights_that_a_later_record_changes(tmp_path, setting, monkeypatch):
    monkeypatch.setattr(
        "fl_lightning.preflight.dry_round.different_records", lambda x, y: [0, 1, 2]
    )
    x = torch.arange(60).reshape(30, 2) % 8
    x[-1] = 9
    records = FederatedDataModule(
        from_arrays(x, torch.arange(30) % 3, codes=True), num_clients=3, val_fraction=0.0
    )
    with pytest.raises(ValueError, match="changes its parameters in place"):
        train(
            tmp_path,
            network=Renormed(),
            records=records,
            privacy={"setting": setting},
            sampling_rate=1.0,
        )
    assert not (tmp_path / "ledger.jsonl").exists()


class Tied(nn.Module):
    """One weight that is used twice: its per-record gradient is a sum over both uses."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.second(torch.tanh(self.first(x))))


class Reused(nn.Module):
    """One module called twice, which clip-in-backward alone would clip twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.first(torch.tanh(self.first(x))))


@pytest.mark.parametrize("execution", ["vmap", "loop"])
@pytest.mark.parametrize("make", [Tied, Reused])
def test_shared_weights_are_clipped_as_one(tmp_path, make, execution):
    torch.manual_seed(0)
    network, records, clip = make(), data(12, num_clients=1), [0.05, 0.05]
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    expected = {n: torch.zeros_like(p) for n, p in before.items()}
    layers = [["first.weight"], ["last.weight", "last.bias"]]
    for x, y in zip(records.x, records.y, strict=True):
        loss = nn.functional.cross_entropy(network(x[None]), y[None])
        grads = dict(zip(before, torch.autograd.grad(loss, network.parameters()), strict=True))
        for layer, bound in zip(layers, clip, strict=True):
            norm = torch.cat([grads[n].flatten() for n in layer]).norm()
            assert norm > bound, "the clip must bind"
            for name in layer:
                expected[name] -= grads[name] * bound / norm / 12
    train(
        tmp_path,
        network=network,
        records=records,
        privacy={"noise_multiplier": 0.0, "thresholds": "fixed", "clip_norm": clip},
        trainer={"max_epochs": 1},
        sampling_rate=1.0,
        client_lr=1.0,
        execution=execution,
    )
    for name, p in network.named_parameters():
        torch.testing.assert_close(p - before[name], expected[name], rtol=1e-4, atol=1e-7)


@pytest.fixture(autouse=True)
def _no_warning_of_lightnings_own(monkeypatch):
    # Lightning uses an old name of jsonargparse.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
