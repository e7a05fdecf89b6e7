"""What a run cannot do is seen in a round that is thrown away: nothing is charged or written."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

from fl_lightning import FederatedDataModule, from_arrays
from fl_lightning.models import MLP
from fl_lightning.networks.outputs import PerRecord, predictions, record_loss
from fl_lightning.networks.state import left_as_it_was
from tests.fl_lightning.tried_runs import train

pytestmark = [
    pytest.mark.filterwarnings("ignore:Found 1 module.*eval mode"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]


class Body(nn.Module):
    """A small network, whose outputs are made into something else."""

    def __init__(self, outputs=3, make=lambda out: out):
        super().__init__()
        self.first, self.last, self.make = nn.Linear(6, 5), nn.Linear(5, outputs), make

    def hidden(self, x):
        return torch.tanh(self.first(x))

    def forward(self, x):
        return self.make(self.last(self.hidden(x)))


class Temperature(Body):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return super().forward(x) * self.scale


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.last = kind(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.rnn(x.view(-1, 3, 2))[0][:, -1])


class Checkpointed(Body):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.last, self.hidden(x), use_reentrant=self.reentrant)


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.LazyLinear(3)

    def forward(self, x):
        return self.last(x)


class FrozenNorm(Body):
    def __init__(self, stays=True, trained=False, statistics=True):
        super().__init__()
        self.norm, self.stays = nn.BatchNorm1d(6, track_running_stats=statistics), stays
        self.norm.requires_grad_(trained)
        self.norm.eval()

    def train(self, mode=True):
        super().train(mode)
        if self.stays:
            self.norm.eval()
        return self

    def forward(self, x):
        return super().forward(self.norm(x))


class Branching(Body):
    def hidden(self, x):
        return super().hidden(x if x.abs().sum() >= 0 else x + 1)


class WithLogits(nn.Module):
    def forward(self, outputs, labels):
        return nn.functional.cross_entropy(outputs["logits"], labels, reduction="none")


class First(nn.Module):
    def forward(self, outputs, labels):
        return nn.functional.cross_entropy(outputs[0], labels, reduction="none")


WORKING = {
    "0-d": (Temperature, {}),
    "GRU": (lambda: Recurrent(nn.GRU), {}),
    "RNN": (lambda: Recurrent(nn.RNN), {}),
    "LSTM": (lambda: Recurrent(nn.LSTM), {}),
    "checkpointed": (lambda: Checkpointed(False), {}),
    "lazy": (Lazy, {}),
    "frozen norm": (FrozenNorm, {}),
    "branching": (Branching, {}),
    "more outputs": (lambda: Body(7), {}),
    "mapping": (lambda: Body(make=lambda o: {"logits": o}), {"loss": WithLogits()}),
    "mapping, no loss": (lambda: Body(make=lambda o: {"logits": o}), {}),
    "tuple": (lambda: Body(make=lambda o: (o, o.sum())), {"loss": First()}),
}


@pytest.mark.parametrize(
    ("setting", "execution"),
    [
        ("record+local", "vmap"),
        ("client+aggregator", "loop"),
        pytest.param("record+local", "loop", marks=pytest.mark.slow),
        pytest.param("client+local", "vmap", marks=pytest.mark.slow),
        pytest.param("none", "vmap", marks=pytest.mark.slow),
        pytest.param("client+local", "loop", marks=pytest.mark.slow),
        pytest.param("client+aggregator", "vmap", marks=pytest.mark.slow),
        pytest.param("none", "loop", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", WORKING)
def test_networks_that_work(tmp_path, name, setting, execution):
    make, options = WORKING[name]
    module = train(
        tmp_path / "run",
        network=make(),
        privacy={"setting": setting},
        execution=execution,
        sampling_rate=0.5,
        **options,
    )
    assert module.result is not None
    assert all(bool(p.isfinite().all()) for p in module.network.parameters())


class Complex(Body):
    def __init__(self):
        super().__init__()
        self.turn = nn.Parameter(torch.ones(5, dtype=torch.complex64))

    def hidden(self, x):
        return (super().hidden(x) * self.turn).real


class Without(Body):
    def __init__(self):
        super().__init__()
        self.nothing = nn.Parameter(torch.ones(0, 4))

    def hidden(self, x):
        return super().hidden(x) + self.nothing.sum()


class Codes(nn.Module):
    def __init__(self):
        super().__init__()
        self.codes, self.last = nn.Embedding(9, 2, sparse=True), nn.Linear(12, 3)

    def forward(self, x):
        return self.last(self.codes(x.abs().clamp(max=8).long()).flatten(1))


class Unstepped(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("needs a closure")


def one_cycle(optimizer):
    return lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=1)


def no_schedule(optimizer):
    return object()


class Captured(Body):
    def __init__(self):
        super().__init__()
        weight = self.first.weight
        self.also = lambda x: (x @ weight.T).sum(1, keepdim=True)

    def forward(self, x):
        return super().forward(x) * self.also(x)


class Unpickled(Body):
    def get_extra_state(self):
        return lambda: 0

    def set_extra_state(self, state):
        pass


REFUSED = [
    ({"network": lambda: Body(2)}, "Body: it gives 2 outputs a record.*num_classes=3"),
    ({"network": lambda: Body(1)}, "Body: it gives 1 output a record.*num_classes=3"),
    ({"network": lambda: Checkpointed(True)}, "Checkpointed: .*use_reentrant"),
    ({"network": Complex}, "parameter 'turn' is complex64"),
    ({"network": Without}, "parameter 'nothing' has shape .0, 4., no elements to train"),
    ({"network": lambda: Body().half()}, "parameter 'first.weight' is float16"),
    ({"network": Codes}, "'codes' has sparse=True"),
    ({"network": lambda: FrozenNorm(stays=False)}, "'norm' is a BatchNorm1d"),
    ({"network": lambda: FrozenNorm(trained=True)}, "'norm' is a BatchNorm1d"),
    ({"network": lambda: FrozenNorm(statistics=False)}, "'norm' is a BatchNorm1d"),
    ({"network": lambda: Body(make=lambda o: (o, o))}, "loss=cross_entropy: .*outputs .tuple"),
    ({"network": Captured}, "'first.weight'.*not what autograd finds"),
    ({"network": Unpickled}, "network=Unpickled: a checkpoint"),
    ({"server_scheduler": lambda: one_cycle}, "server_scheduler=OneCycleLR fails after round 2"),
    ({"server_scheduler": lambda: no_schedule}, "server_scheduler=object is no"),
    ({"server_optimizer": lambda: Unstepped}, "server_optimizer=Unstepped cannot take a step"),
    ({"server_optimizer": lambda: torch.optim.SparseAdam}, "=SparseAdam cannot take a step"),
    (
        {"server_optimizer": lambda: lambda p: torch.optim.SGD(p, lr=-1.0)},
        "server_optimizer=<lambda>: Invalid learning rate",
    ),
]


@pytest.mark.parametrize("execution", ["vmap", "loop"])
@pytest.mark.parametrize(("bad", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_refused_before_anything_is_written(tmp_path, bad, message, execution):
    with pytest.raises(ValueError, match=message):
        train(
            tmp_path / "run",
            execution=execution,
            **{name: make() for name, make in bad.items()},
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("shape", ["flat", "column"])
@pytest.mark.parametrize("loss", [nn.BCEWithLogitsLoss, nn.BCELoss])
def test_one_output_for_two_classes(tmp_path, shape, loss):
    def make(out):
        out = torch.sigmoid(out) if loss is nn.BCELoss else out
        return out[:, 0] if shape == "flat" else out

    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    records = FederatedDataModule(from_arrays(x, y), num_clients=3, val_fraction=0.0)
    module = train(tmp_path, network=Body(1, make), records=records, loss=loss(reduction="none"))
    assert isinstance(module.loss, PerRecord)
    found = predictions(module.network(x), y, module.loss, 2)
    threshold = 0.5 if loss is nn.BCELoss else 0.0
    assert torch.equal(found, (module.network(x).view(-1) > threshold).long())


def test_outputs_that_say_no_class():
    loss, y = record_loss(nn.MSELoss(reduction="none")), torch.zeros(4, dtype=torch.int64)
    for outputs in (torch.zeros(4, 2, 3), {"mean": torch.zeros(4, 3)}, (), torch.zeros(4, 1)):
        assert predictions(outputs, y, loss, 3) is None


def test_the_dry_round_leaves_everything_as_it_was(tmp_path, monkeypatch):
    def run(folder, dry):
        torch.manual_seed(0)
        network = MLP(6, 3, hidden=[4])
        if not dry:
            monkeypatch.setattr("fl_lightning.preflight.dry_round", lambda *_: True)
        module = train(folder, network=network, privacy={"seed": 1}, execution="vmap")
        return module.network.state_dict(), torch.get_rng_state()

    (first, random), (other, random_too) = (run(tmp_path / str(d), d) for d in (True, False))
    assert all(torch.equal(first[n], other[n]) for n in first)
    assert torch.equal(random, random_too)


def test_what_is_tried_is_put_back():
    network = Body()
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    with left_as_it_was(network):
        network.eval()
        torch.rand(1)
        for p in network.parameters():
            p.data += 1
            p.grad = torch.ones_like(p)
    assert network.first.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(v, before[n]) for n, v in network.state_dict().items())


class Mixing(Body):
    """Mixes records on the way back alone, or by what is beside a record."""

    def __init__(self, how, drop=0.0):
        super().__init__()
        self.how, self.drop = how, nn.Dropout(drop)

    def hidden(self, x):
        return self.how(self.drop(super().hidden(x)))


class Mixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h.clone()

    @staticmethod
    def backward(ctx, g):
        return 0.5 * g + 0.5 * g.roll(1, 0)


def normalised(h):
    if h.requires_grad:
        h.register_hook(lambda g: g / (g.norm() + 1e-12))
    return h


MIXING = {
    "centred backwards": lambda h: h - h.mean(0) + h.mean(0).detach(),
    "function": Mixer.apply,
    "hook": normalised,
    "neighbour": lambda h: h + 0.1 * h.roll(1, 0),
    "scaled by the largest": lambda h: h / (1 + h.detach().abs().amax()),
}


@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("execution", ["vmap", "loop"])
@pytest.mark.parametrize("how", MIXING)
def test_records_that_mix_in_the_backward_pass(tmp_path, how, execution, drop):
    with pytest.raises(ValueError, match="changes with the records beside it"):
        train(tmp_path / "run", network=Mixing(MIXING[how], drop), execution=execution)
    assert not (tmp_path / "run").exists()


class MixingInTraining(Mixing):
    """Mixes records while dropout draws numbers, and never without."""

    def hidden(self, x):
        return super().hidden(x) if self.drop.training else Body.hidden(self, x)


@pytest.mark.parametrize("execution", ["vmap", "loop"])
@pytest.mark.parametrize("how", MIXING)
def test_records_that_mix_while_numbers_are_drawn(tmp_path, how, execution):
    with pytest.raises(ValueError, match="changes with the records beside it"):
        train(tmp_path / "run", network=MixingInTraining(MIXING[how], 0.3), execution=execution)
    assert not (tmp_path / "run").exists()


class Paired(nn.Module):
    """Records sorted among each other, and a layer that is called for two of them at a time.

    Larger batches go record by record, where nothing mixes; two records go in one pass.
    """

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x)).sort(0).values
        return self.last(torch.cat([torch.tanh(self.second(two)) for two in h.split(2)]))


def test_small_batches_that_mix_are_not_hidden_by_large_ones_that_cannot(tmp_path):
    with pytest.raises(ValueError, match="changes with the records beside it"):
        train(tmp_path / "run", network=Paired())
    assert not (tmp_path / "run").exists()


def test_mixing_within_a_client_is_the_clients_own(tmp_path):
    train(
        tmp_path,
        network=Mixing(MIXING["neighbour"]),
        privacy={"setting": "client+local"},
        sampling_rate=1.0,
    )
