"""Networks that mix records are refused by every adapter before a release; others are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from aadp_kernels import NoiseKey, UnsupportedLayerError, with_clipping
from aadp_kernels.integrations.optim import PrivateOptimizer, records
from tests.networks import plain, sequences, shared

# Opacus' hooks on layers whose inputs need no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
BLOCKS = {b.name: b for b in (*plain.BLOCKS, *sequences.BLOCKS, *shared.BLOCKS)}
# The loss outside of a model is the loop's.
MIXING = [n for n in BLOCKS if "(mixes records)" in n and not n.startswith("contrastive")]
HONEST = (
    "CNN",
    "ResNet with group normalisation",
    "layer normalisation",
    "instance normalisation",
    "batch normalisation, frozen in eval mode",
    "Embedding, padding_idx",
    "dropout",
    "AlphaDropout",
    "frozen body",
    "unused layer",
    "attention of Linear layers",
    "stochastic depth of the batch",
    "stochastic depth of records",
    "early exit by value",
    "gradient reversal (autograd.Function)",
    "straight-through rounding",
    "two outputs, dict",
    "one logit [B]",
)
WAYS = ("PrivateOptimizer", "per_layer", "flat", "ew")


def private(network: nn.Module, way: str = "PrivateOptimizer", x: Tensor | None = None) -> Any:
    """A model and its private optimizer, with noise."""
    if way == "PrivateOptimizer":
        model = with_clipping(network, p=2)
        parameters = [p for p in model.parameters() if p.requires_grad]
        return model, PrivateOptimizer(
            torch.optim.SGD(parameters, lr=0.1), model, clip_norm=1.0, noise_multiplier=1.0,
            expected_batch_size=4.0, key=NoiseKey.random(),
        )  # fmt: skip
    opacus = pytest.importorskip("aadp_kernels.integrations.opacus")
    engine = opacus.PrivacyEngine(accountant="rdp")
    parameters = [p for p in network.parameters() if p.requires_grad]
    assert x is not None
    model, optimizer, _ = engine.make_private(
        module=network.train(), optimizer=torch.optim.SGD(parameters, lr=0.1),
        data_loader=DataLoader(TensorDataset(x), batch_size=4), noise_multiplier=1.0,
        max_grad_norm=1.0, clipping="per_layer" if way == "per_layer" else "flat",
        grad_sample_mode="ew" if way == "ew" else "hooks", loss_reduction="sum",
    )  # fmt: skip
    return model, optimizer


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MIXING)
def test_networks_that_mix_records_are_refused_before_a_release(name: str, way: str) -> None:
    torch.manual_seed(0)
    x = BLOCKS[name].records(6, torch.Generator().manual_seed(0))
    model, optimizer = private(BLOCKS[name].network(), way, x)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(2):
        with pytest.raises(UnsupportedLayerError, match=r"changes? with the records beside it"):
            model(x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    if way == "PrivateOptimizer":
        assert optimizer.steps_taken == 0


@pytest.mark.parametrize("name", HONEST)
def test_honest_networks_are_accepted(name: str) -> None:
    torch.manual_seed(0)
    x = BLOCKS[name].records(6, torch.Generator().manual_seed(0))
    model, optimizer = private(BLOCKS[name].network())
    output = model(x)
    parts = output.values() if isinstance(output, dict) else (output,)
    torch.stack([part.sum() for part in parts]).sum().backward()
    optimizer.step()


class Net(nn.Module):
    """Two layers, and what happens between them."""

    def __init__(self, way: Callable[[Any, Tensor], Any] = lambda self, h: h, **parts: Any) -> None:
        super().__init__()
        self.fc, self.out, self.way = nn.Linear(4, 4), nn.Linear(4, 2), way
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor, mask: Tensor | None = None, **_: Any) -> Tensor:
        h = torch.tanh(self.fc(x))
        h = h if mask is None else h * mask[..., None]
        return self.out(self.way(self, h))


def data(n: int = 6, *shape: int) -> Tensor:
    return torch.randn(n, *shape, 4, generator=torch.Generator().manual_seed(1))


def centre(_: Any, h: Tensor) -> Tensor:
    return h - h.mean(0)


class Threshold(torch.autograd.Function):
    """Clips the gradient of the whole batch, where it is large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore
        return grad / (grad.norm() / 50).clamp_min(1)


HIDDEN: dict[str, Callable[[], nn.Module]] = {
    "behind zeros": lambda: Net(
        lambda self, h: self.one(h) * self.two(h - h.mean(0)),
        one=nn.Linear(4, 4),
        two=nn.Linear(4, 4),
    ),
    "by chance, in training": lambda: Net(
        lambda self, h: h - h.mean(0) if self.training and torch.rand(()) < 0.7 else h
    ),
    "beside dropout by function": lambda: Net(
        lambda self, h: F.dropout(h, 0.5, self.training) - self.training * h.mean(0)
    ),
    "beside a dropout layer": lambda: Net(
        lambda self, h: self.drop(h) - h.mean(0), drop=nn.Dropout(0.5)
    ),
    "every third record": lambda: Net(lambda _, h: h + 0.1 * h.roll(3, 0)),
    "large gradients alone": lambda: Net(lambda _, h: Threshold.apply(h)),
    "by the size of the batch": lambda: Net(lambda _, h: h / len(h)),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_mixing_that_hides_is_found(name: str) -> None:
    torch.manual_seed(0)
    net: Any = HIDDEN[name]()
    if name == "behind zeros":
        for parameter in (*net.one.parameters(), *net.two.parameters()):
            nn.init.zeros_(parameter)
    model, _optimizer = private(net)
    with pytest.raises(UnsupportedLayerError, match="with the records beside it"):
        model(data())


def test_equal_records_show_nothing_and_the_most_different_are_taken() -> None:
    def far(_: Any, h: Tensor) -> Tensor:
        return h + 0.1 * (h[-1] - h[-1].detach()) * (h - h[0]).abs().amax()

    x = data(1).repeat(20, 1)
    x[-1] += 3
    model, _optimizer = private(Net(far))
    with pytest.raises(UnsupportedLayerError, match="with the records beside it"):
        model(x)
    model, _optimizer = private(Net(lambda _, h: torch.where((h == h[0]).all(), h, h - h.mean(0))))
    model(x[:5])
    with pytest.raises(UnsupportedLayerError, match="with the records beside it"):
        model(x)


def test_one_record_shows_nothing_and_the_next_batch_is_compared() -> None:
    model, optimizer = private(Net(lambda _, h: h + 0.1 * h.roll(2, 0)))
    for count in (1, 2):
        optimizer.zero_grad()
        model(data(count)).sum().backward()
        optimizer.step()
    with pytest.raises(UnsupportedLayerError, match="with the records beside it"):
        model(data(3))


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize(
    "call",
    [
        lambda model, x, mask: model(x, mask),
        lambda model, x, mask: model(x=x, mask=mask),
        lambda model, x, mask: model(mask=mask, x=x, labels=None),
    ],
)
def test_masks_and_keywords(call: Any, mixes: bool) -> None:
    model, _optimizer = private(Net(centre if mixes else lambda _, h: h.cumsum(1)))
    x, mask = data(5, 3), torch.tril(torch.ones(5, 3))
    if mixes:
        with pytest.raises(UnsupportedLayerError, match="with the records beside it"):
            call(model, x, mask)
    else:
        call(model, x, mask).sum().backward()


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("way", ["PrivateOptimizer", "flat"])
def test_positions_for_all_records_are_told(way: str, mixes: bool) -> None:
    x, positions = data(5, 3), torch.arange(3)[None]
    net = Net(centre if mixes else lambda _, h: h)
    model, _optimizer = private(net, way, x)
    with records(model, 5):
        if mixes:
            with pytest.raises(UnsupportedLayerError, match="with the records beside it"):
                model(x, position_ids=positions)
        else:
            model(x, position_ids=positions).sum().backward()


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "a sum of losses": lambda h: h.square().sum(),
    "a mean of losses": lambda h: h.square().mean(),
    "a loss beside outputs": lambda h: {"loss": h.square().sum(), "logits": h},
    "positions first": lambda h: [h[:, None].expand(-1, 3, -1).transpose(0, 1)],
    "rows of all records": lambda h: (h[:, None].expand(-1, 3, -1).reshape(-1, 2), h.new_ones(7)),
    "rows in turn": lambda h: torch.cat([h, 2 * h, 3 * h]),
    "a tensor for each record": lambda h: [*h],
}  # fmt: skip


class Wrapped(nn.Module):
    def __init__(self, net: nn.Module, last: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.last = net, last

    def forward(self, x: Tensor) -> Any:
        return self.last(self.net(x))


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_all_kinds(name: str, mixes: bool) -> None:
    net = Net(centre) if mixes else Net()
    model, _optimizer = private(Wrapped(net, OUTPUTS[name]))
    if mixes:
        with pytest.raises(UnsupportedLayerError, match="with the records beside it"):
            model(data())
    else:
        model(data())


def test_the_comparison_leaves_everything_as_it_was() -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__(lambda self, h: self.drop(h), drop=nn.Dropout(0.5))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor, **_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            self.calls.add_(x.sum())  # pyright: ignore
            return super().forward(x)

    net = Counting()
    model, _optimizer = private(net)
    modes = [module.training for module in model.modules()]
    parameters = [p.clone() for p in model.parameters()]
    plain = Counting()
    plain.load_state_dict(model.state_dict())
    outputs = []
    for each in (model, plain):
        torch.manual_seed(3)
        outputs.append(each(data()))
    assert torch.equal(*outputs)
    assert torch.equal(model.calls, data().sum())
    assert [module.training for module in model.modules()] == modes
    assert all(map(torch.equal, parameters, model.parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_packed_rows_of_another_order_than_the_heads_are_refused() -> None:
    """Opacus 1.6 gives rows of a packed sequence by length: a flat norm would add two records."""
    pytest.importorskip("opacus")
    from opacus.layers import DPLSTM

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = DPLSTM(4, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            lengths = (x != 0).any(-1).sum(-1).cpu()
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
            return self.head(self.lstm(packed)[1][0][0])

    x = data(4, 5)
    for row, length in enumerate((1, 2, 4, 5)):
        x[row, length:] = 0
    model, _optimizer = private(Packed(), "flat", x)
    with pytest.raises(UnsupportedLayerError, match="with the records beside it"):
        model(x)


def test_hugging_face_models_are_accepted_and_mixing_ones_refused() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=8,
    )  # fmt: skip
    for mixes in (False, True):
        net = transformers.BertForSequenceClassification(config)
        net.bert.embeddings.requires_grad_(False)
        if mixes:
            net.bert.pooler.register_forward_hook(lambda _m, _a, h: h - h.mean(0))
        model, optimizer = private(net)
        ids, labels = torch.randint(0, 20, (6, 5)), torch.arange(6) % 2
        if mixes:
            with pytest.raises(UnsupportedLayerError, match="with the records beside it"):
                model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
        else:
            found = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
            F.cross_entropy(found.logits, labels, reduction="sum").backward()
            optimizer.step()
