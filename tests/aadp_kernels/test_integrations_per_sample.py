"""Models that take Opacus' per-sample gradients: right for every record, or refused by name."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from aadp_kernels import NoiseKey, UnsupportedLayerError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("opacus")
    from opacus.grad_sample import GradSampleModule
    from opacus.layers import DPLSTM, DPMultiheadAttention

    from aadp_kernels.integrations.opacus import ClippedModule, PrivacyEngine
    from aadp_kernels.integrations.optim import records

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")

TOKENS = torch.tensor([[0, 1, 2, 2], [0, 0, 3, 1], [2, 2, 0, 4], [1, 1, 1, 0]])


def private(model: nn.Module, x: Tensor, **options: Any) -> tuple[Any, Any]:
    """Model and optimizer of the adapter, without noise; a record moves the sum by up to 0.5."""
    arguments = {
        "module": model, "optimizer": torch.optim.SGD(model.parameters(), lr=1.0),
        "data_loader": DataLoader(TensorDataset(x), batch_size=1), "noise_multiplier": 0.0,
        "max_grad_norm": 0.5, "loss_reduction": "sum",
    }  # fmt: skip
    made = PrivacyEngine(key=NoiseKey.from_seed(0)).make_private(**(arguments | options))
    return made[0], made[1]


def loss(output: Any) -> Tensor:
    """A sum over records in which no two elements of a record weigh alike."""
    weights = torch.arange(output.shape[1:].numel(), dtype=output.dtype).sin()
    weights = weights.view(output.shape[1:])
    return (output * weights).sum() + output.square().sum()


def noiseless(model: Any, optimizer: Any, *inputs: Tensor) -> Tensor:
    """The clipped sum that a step releases."""
    optimizer.zero_grad()
    loss(model(*inputs)).backward()
    optimizer.step()
    return torch.cat([p.grad.flatten() for p in optimizer.params])


def wanted(model: nn.Module, *inputs: Tensor) -> Tensor:
    """The sum of gradients that were made and clipped record by record, in float64."""
    total: Any = 0
    for i in range(len(inputs[0])):
        model.zero_grad()
        loss(model(*(t[i : i + 1] for t in inputs))).backward()
        grad = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        total = total + grad * torch.clamp(0.5 / grad.norm(), max=1)
    return total


_CONVOLUTIONS = [
    (kind, dims, options)
    for dims, kind in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d))
    for options in (
        {"padding": 1, "padding_mode": "circular"}, {"padding": 1, "padding_mode": "reflect"},
        {"padding": "same", "padding_mode": "replicate"}, {"padding": 1, "stride": 2},
    )
]  # fmt: skip


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew"])
@pytest.mark.parametrize(("kind", "dims", "options"), _CONVOLUTIONS)
def test_convolutions_with_any_padding(
    kind: Callable[..., nn.Module], dims: int, options: dict[str, Any], mode: str
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(2, 3, 3, **options), nn.Tanh()).double()
    x = torch.randn(4, 2, *[5] * dims, dtype=torch.float64)
    want = wanted(copy.deepcopy(model), x)
    made = private(model, x, grad_sample_mode=mode)
    torch.testing.assert_close(noiseless(*made, x), want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("options", [{"padding_idx": 0}, {"padding_idx": -1}, {}])
def test_embeddings_with_padding(options: dict[str, Any], clipping: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, **options)).double()
    want = wanted(copy.deepcopy(model), TOKENS)
    made = private(model, TOKENS, clipping=clipping)
    torch.testing.assert_close(noiseless(*made, TOKENS), want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_embeddings_scaled_by_frequency(clipping: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, scale_grad_by_freq=True)).double()
    want = wanted(copy.deepcopy(model), TOKENS)
    made = private(model, TOKENS, clipping=clipping)
    assert not isinstance(made[0], ClippedModule)
    torch.testing.assert_close(noiseless(*made, TOKENS), want, rtol=1e-5, atol=1e-8)


def test_a_layer_norm_without_a_bias() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4, bias=False)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    want = wanted(copy.deepcopy(model), x)
    torch.testing.assert_close(noiseless(*private(model, x), x), want, rtol=1e-5, atol=1e-8)


def test_a_model_that_opacus_has_wrapped_gets_the_right_samplers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular")).double()
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    twin = copy.deepcopy(model)
    wrapped = GradSampleModule(model, loss_reduction="sum")
    for _ in range(2):
        made = private(wrapped, x)
        want = wanted(twin, x)
        torch.testing.assert_close(noiseless(*made, x), want, rtol=1e-5, atol=1e-8)
        twin.load_state_dict(model.state_dict())


def test_a_batch_without_records_is_a_step() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), nn.Flatten())
    x = torch.randn(4, 2, 5)
    assert not noiseless(*private(model, x), x[:0]).any()


class _Gate(nn.Module):
    """A layer with a parameter of its own, in which `scale` may be given or not."""

    def __init__(self, chance: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.chance = chance

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        return F.dropout(x * self.weight * scale, self.chance)


class _Calls(nn.Module):
    """A gate that is called in a way of its own."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor], gate: nn.Module) -> None:
        super().__init__()
        self.gate, self.call = gate, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.gate, x)


class _Two(_Gate):
    def forward(self, x: Tensor, scale: Any = None) -> Any:
        return x * self.weight, x.detach()


@pytest.mark.parametrize(
    ("gate", "call", "reason"),
    [
        (_Gate(), lambda gate, x: gate(x, x), "with one tensor and nothing else"),
        (_Gate(), lambda gate, x: gate(x, scale=x), "with one tensor and nothing else"),
        (_Gate(), lambda gate, x: gate(x=x), "with one tensor and nothing else"),
        (_Two(), lambda gate, x: gate(x)[0], "must return one tensor"),
        (_Gate(0.5), lambda gate, x: gate(x), "cannot make its per-sample gradients"),
    ],
)
def test_layers_that_opacus_sees_in_part_are_named(gate: nn.Module, call: Any, reason: str) -> None:
    x = torch.randn(4, 3)
    made, optimizer = private(_Calls(call, gate), x)
    with pytest.raises(UnsupportedLayerError, match=rf"^gate \(_\w+\).* {reason}") as caught:
        noiseless(made, optimizer, x)
    assert "\n" not in str(caught.value)


_REFUSED = [
    (nn.RNN(3, 3), "DPRNN"), (nn.GRU(3, 3), "DPGRU"), (nn.LSTM(3, 3), "DPLSTM"),
    (nn.RNNCell(3, 3), "DPRNN"), (nn.GRUCell(3, 3), "DPGRU"), (nn.LSTMCell(3, 3), "DPLSTM"),
    (nn.Bilinear(3, 3, 3), "nn.Linear"), (nn.MultiheadAttention(4, 2), "DPMultiheadAttention"),
    (nn.EmbeddingBag(5, 3, mode="sum"), "nn.Embedding"),
    (nn.Embedding(5, 3, max_norm=1.0), "max_norm must be None"),
    (nn.Embedding(5, 3, sparse=True), "sparse must be False"),
    (nn.BatchNorm1d(3), "frozen and in eval mode"),
    (nn.BatchNorm1d(3, affine=False), "frozen and in eval mode"),
    (nn.InstanceNorm1d(3, track_running_stats=True), "track_running_stats must be False"),
]  # fmt: skip


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew"])
@pytest.mark.parametrize(("layer", "instead"), _REFUSED)
def test_layers_without_a_gradient_of_a_record_are_refused(
    layer: nn.Module, instead: str, mode: str, clipping: str
) -> None:
    if mode == "ew" and type(layer) in (nn.RNN, nn.GRU, nn.LSTM):
        pytest.skip("expanded weights know nn.RNN; Opacus itself refuses the others")
    model = nn.Sequential(nn.Linear(3, 3), copy.deepcopy(layer))
    with pytest.raises(UnsupportedLayerError, match=r"^1 \(\w+\) .*" + instead) as caught:
        private(model, torch.ones(4, 3), grad_sample_mode=mode, clipping=clipping)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"padding_idx": 0}, {"scale_grad_by_freq": True}])
def test_expanded_weights_of_such_embeddings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedLayerError, match=r"^0 \(Embedding\) .*'hooks'"):
        private(nn.Sequential(nn.Embedding(5, 3, **options)), TOKENS, grad_sample_mode="ew")


def test_batch_normalisation_stays_in_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3).requires_grad_(False), _Gate())
    model[1].eval()
    x = torch.randn(4, 3)
    made = private(model, x)
    noiseless(*made, x)
    made[0].train()
    with pytest.raises(UnsupportedLayerError, match=r"^1 \(BatchNorm1d\)"):
        noiseless(*made, x)


class _Rows(nn.Module):
    """Linear layers on tokens, in an order of axes of one's own."""

    def __init__(self, before: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.before = nn.Linear(3, 4), nn.Linear(4, 2), before

    def forward(self, x: Tensor) -> Tensor:
        rows = self.two(self.one(self.before(x)).tanh())
        return rows.flatten().view(len(x), -1)


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.parametrize(
    "before",
    [
        lambda x: x.flatten(0, 1),
        lambda x: x.transpose(0, 1),
        lambda x: x if len(x) == 1 else x.transpose(0, 1),
    ],
)
def test_rows_that_are_no_records_are_refused(before: Any, mode: str, wrap: bool) -> None:
    # As many tokens as records.
    x = torch.randn(4, 4, 3)
    model = _Rows(before)
    made, optimizer = private(model, x, grad_sample_mode=mode, wrap_model=wrap)
    with pytest.raises(UnsupportedLayerError, match=r"^one \(Linear\) gets shape"):
        noiseless(made if wrap else model, optimizer, x)


def test_one_record_moves_the_sum_by_the_clip_norm() -> None:
    torch.manual_seed(0)
    x = 9 * torch.randn(5, 4, 3)
    sums = []
    for count in (4, 5):
        torch.manual_seed(0)
        sums.append(noiseless(*private(_Rows(lambda x: x), x), x[:count]))
    assert 0.1 < float((sums[1] - sums[0]).norm()) <= 0.5 * (1 + 1e-5)


def test_the_number_of_records_can_be_told() -> None:
    class Masked(_Rows):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x if mask is None else x * mask[:, None])

    x, mask = torch.randn(4, 5, 3), torch.ones(5)
    made, optimizer = private(Masked(lambda x: x), x)
    with pytest.raises(UnsupportedLayerError, match="with records"):
        noiseless(made, optimizer, x, mask)
    optimizer.zero_grad()
    with records(made, 4):
        output = made(x, mask)
    loss(output).backward()
    optimizer.step()
    for foreign in (lambda: made.one(x[0]), lambda: made._module.one(x)):
        with pytest.raises(UnsupportedLayerError, match="outside of a forward of the model"):
            foreign()


def test_a_layer_that_is_called_by_chance_is_tried() -> None:
    class Chance(_Rows):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 2 and self.only_many:
                return super().forward(x)
            return super().forward(x) if torch.rand(()) < 0.5 else x.flatten(1) * 1.0

        only_many = False

    x = torch.randn(4, 5, 3)
    made, _ = private(Chance(lambda x: x), x)
    for _ in range(8):
        made(x)
    Chance.only_many = True
    made, _ = private(Chance(lambda x: x), x)
    torch.manual_seed(0)
    model = made._module
    model.forward = lambda x: Chance.forward(model, x) if len(x) > 2 else x.flatten(1)
    with pytest.raises(UnsupportedLayerError, match="in no forward of one or two"):
        made(x)


def test_layers_of_opacus_are_known() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = DPLSTM(3, 2, batch_first=True)
            self.attention = DPMultiheadAttention(2, 1, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            steps, _ = self.lstm(x)
            return self.attention(steps, steps, steps)[0]

    torch.manual_seed(0)
    model = Recurrent().double()
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    want = wanted(copy.deepcopy(model), x)
    torch.testing.assert_close(noiseless(*private(model, x), x), want, rtol=1e-5, atol=1e-8)


def test_packed_sequences_of_opacus_layers_are_known() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = DPLSTM(3, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            lengths = (x != 0).any(-1).sum(-1).cpu()
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
            return self.lstm(packed)[1][0][0]

    torch.manual_seed(0)
    model = Packed().double()
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    for row, length in enumerate((5, 2, 4, 1)):
        x[row, length:] = 0
    want = wanted(copy.deepcopy(model), x)
    torch.testing.assert_close(noiseless(*private(model, x), x), want, rtol=1e-5, atol=1e-8)


def test_files_of_the_model_and_the_model_without_hooks() -> None:
    model = _Rows(torch.Tensor.clone)
    x = torch.randn(4, 5, 3)
    made, _ = private(model, x)
    assert pickle.loads(pickle.dumps(made)) is not None
    made.remove_hooks()
    model.one(x[0])
    model(x).sum().backward()
