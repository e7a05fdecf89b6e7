"""PrivateOptimizer lives as optimizers of torch do: freezing, failing, ending."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aadp_kernels import Bias, ReusedNoiseError, with_clipping
from aadp_kernels.integrations import optim
from aadp_kernels.integrations.optim import PrivateOptimizer
from tests.aadp_kernels.private_networks import CLIP, loss_of, network, private, same, train, values


def _unfreeze(model: Any, optimizer: PrivateOptimizer) -> None:
    model[0].requires_grad_(True)
    optimizer.optimizer.add_param_group({"params": list(model[0].parameters())})


CHANGES: dict[str, tuple[Any, str]] = {
    "unfrozen and added": (_unfreeze, r"'0\.weight' is trained now"),
    "frozen": (lambda model, _: model[2].requires_grad_(False), r"'2\.weight' is frozen now"),
    "one frozen": (lambda model, _: model[2].bias.requires_grad_(False), r"'2\.bias' is frozen"),
    "removed": (lambda _, o: o.param_groups[0]["params"].pop(), r"lost '2\.bias'"),
    "strange": (
        lambda _, o: o.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]}),
        r"of shape \(3,\)' is trained now",
    ),
    "louder": (lambda model, _: model[2].clip_norm.mul_(2), r"clip norm of layer '2'"),
    "replaced": (
        lambda model, _: setattr(model[2], "clip_norm", torch.tensor(math.inf)), "clip norm"),
    "clipped again": (
        lambda model, _: nn.utils.clip_grad_norm_(model.parameters(), 1e-4), "clip_grad_norm_"),
    "by hand": (lambda model, _: setattr(model[2].bias, "grad", torch.ones(2)), "by hand"),
    "one emptied": (lambda model, _: setattr(model[2].bias, "grad", None), r"'2\.bias' was chan"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_refused_before_anything_moves(change: str) -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = private(model, torch.optim.SGD(model[2].parameters(), lr=0.5))
    train(model, optimizer)
    optimizer.zero_grad()
    loss_of(model).backward()
    act, match = CHANGES[change]
    act(model, optimizer)
    before, facts = values(model), optimizer.state_dict()["privacy"]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=match):
            optimizer.step()
    assert same(model, before)
    assert optimizer.state_dict()["privacy"] == facts


def test_a_layer_unfrozen_among_the_parameters_is_refused() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = private(model)
    model[0].requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"'0\.weight' is trained now"):
        train(model, optimizer)
    train(model, private(model))


def test_frozen_layers_do_not_move_and_have_no_part() -> None:
    model = network()
    loss_of(model).backward()
    model[0].requires_grad_(False)
    optimizer = private(model)
    before = values(model)
    with pytest.raises(RuntimeError, match="frozen and has a gradient"):
        optimizer.step()
    train(model, optimizer, 3)
    assert same(model[0], before[:2])
    assert not same(model[2], before[2:])
    assert optimizer.layout.layer_names == ("2",)
    assert optimizer.clips.tolist() == [CLIP]
    assert float(optimizer.scales[0]) == pytest.approx(CLIP)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="all are frozen"):
        private(model)


def test_gradients_from_before_are_forgotten() -> None:
    model = network()
    loss_of(model).backward()
    optimizer = private(model, noise_multiplier=0.0)
    before = values(model)
    optimizer.step()
    assert same(model, before)


def test_a_second_optimizer_retires_the_first() -> None:
    model = network()
    first = private(model)
    train(model, first)
    for _ in range(3):
        second = private(model)
        train(model, second, 2)
    before = values(model)
    with pytest.raises(RuntimeError, match="retired: another private optimizer"):
        first.step()
    assert same(model, before)
    output = loss_of(model)
    second.retire()
    with pytest.raises(RuntimeError, match="retired"):
        output.backward()
    with pytest.raises(RuntimeError, match=r"retire\(\) was called"):
        second.step()
    (loss_of(model) + model[0].weight.sum()).backward()
    assert float(model[0].weight.grad.sum()) > 0


def test_the_watch_ends_with_the_optimizer() -> None:
    model = network()
    optimizer = private(model)
    assert model[0].watch is not None
    del optimizer
    assert model[0].watch is None
    model[0](torch.randn(3, 20)).sum().backward()


@pytest.mark.parametrize("options", [{"maximize": True}, {"foreach": True}, {"fused": True}])
def test_forms_of_the_same_optimizer(options: dict[str, Any]) -> None:
    model, twin = network(), network()
    train(model, private(model, torch.optim.SGD(model.parameters(), lr=0.5, **options)), 2)
    sign = -0.5 if "maximize" in options else 0.5
    start = values(twin)
    train(twin, private(twin), 1 if sign < 0 else 2)
    if sign > 0:
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    else:
        other = network()
        train(other, private(other, torch.optim.SGD(other.parameters(), lr=0.5, maximize=True)))
        for a, b, s in zip(values(twin), values(other), start, strict=True):
            torch.testing.assert_close(a - s, s - b)


def test_what_cannot_be_private_is_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="differentiable"):
        private(model, torch.optim.SGD(model.parameters(), lr=0.1, differentiable=True))
    with pytest.raises(ValueError, match="private already"):
        private(model, private(model))
    with pytest.raises(ValueError, match="distributed"):
        private(nn.DataParallel(model))


def test_grad_scaler_is_refused_unless_it_does_nothing() -> None:
    model = network()
    optimizer = private(model)
    before = values(model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model)).backward()
    with pytest.raises(RuntimeError, match="bfloat16"):
        scaler.step(optimizer)
    assert same(model, before)
    optimizer.zero_grad()
    idle = torch.amp.GradScaler("cpu", enabled=False)
    idle.scale(loss_of(model)).backward()
    idle.step(optimizer)
    assert optimizer.steps_taken == 1


def test_a_failing_step_moves_nothing_and_draws_no_noise_twice(monkeypatch: Any) -> None:
    model = network()
    optimizer = private(model, torch.optim.Adam(model.parameters(), lr=0.1))
    before = values(model)
    loss_of(model).backward()
    real = optim.add_noise_

    def half(sums: list[Tensor], layout: Any, **options: Any) -> None:
        real(sums, layout, **options)
        raise OSError("disk full")

    monkeypatch.setattr(optim, "add_noise_", half)
    with pytest.raises(OSError, match="disk full"):
        optimizer.step()
    monkeypatch.undo()
    assert same(model, before)
    assert all(p.grad is None for p in model.parameters())
    assert (optimizer.next_step, optimizer.steps_taken) == (1, 1)
    for act in (optimizer.step, lambda: loss_of(model).backward()):
        with pytest.raises(RuntimeError, match="the last step has failed"):
            act()
    train(model, optimizer)
    assert optimizer.steps_taken == 2
    optimizer.next_step = 0
    with pytest.raises(ReusedNoiseError):
        train(model, optimizer)


def test_a_first_step_that_fails_inside_is_undone(monkeypatch: Any) -> None:
    model = network()
    inner = torch.optim.Adam(model.parameters(), lr=0.1)
    optimizer = private(model, inner)
    before = values(model)
    real = inner.step

    def broken() -> None:
        real()
        raise MemoryError

    monkeypatch.setattr(inner, "step", broken)
    with pytest.raises(MemoryError):
        train(model, optimizer)
    monkeypatch.undo()
    assert same(model, before)
    assert not inner.state
    with pytest.raises(RuntimeError, match="zero_grad"):
        optimizer.step()
    train(model, optimizer)
    assert optimizer.steps_taken == 2
    assert not same(model, before)


def test_a_failing_reduce_is_no_release() -> None:
    def fail(sums: list[Tensor]) -> None:
        sums[0].mul_(2)
        raise ConnectionError

    model = network()
    optimizer = private(model, reduce=fail)
    with pytest.raises(ConnectionError):
        train(model, optimizer)
    assert optimizer.steps_taken == optimizer.next_step == 0
    with pytest.raises(RuntimeError, match="failed"):
        optimizer.step()


def test_a_parameter_that_is_not_trained_any_more_gets_noise_only() -> None:
    """A layer without a gradient in this step is released as zeros plus noise."""
    net = nn.Sequential(nn.Linear(20, 16), Bias(16), nn.Linear(16, 2))
    model = with_clipping(net, p=2)
    optimizer = private(model)
    optimizer.zero_grad()
    with optim.records(model, 30):
        model[0](torch.randn(30, 20)).sum().backward()
    before = values(model)
    optimizer.step()
    assert not same(model[2], before[3:])


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_with_it() -> None:
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1], reduction="sum")

        def configure_optimizers(self) -> Any:
            self.private = private(self.net)
            schedule = torch.optim.lr_scheduler.StepLR(self.private, 1, 0.5)
            return [self.private], [schedule]

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    module = Module()
    before = values(module.net)
    rows = torch.utils.data.TensorDataset(torch.randn(12, 20), torch.arange(12) % 2)
    trainer = pl.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=4))
    assert module.private.steps_taken == 6
    assert not same(module.net, before)
    assert module.private.param_groups[0]["lr"] == 0.125
