"""Copies, states, schedules and closures of PrivateOptimizer."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from aadp_kernels import with_clipping
from aadp_kernels.integrations.optim import PrivateOptimizer
from tests.aadp_kernels.private_networks import loss_of, network, private, same, train, values


def test_copies_and_files_of_the_model() -> None:
    model = network()
    optimizer = private(model)
    train(model, optimizer)
    average = AveragedModel(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        copy.deepcopy(model), torch.load(file, weights_only=False), average.module,
        pickle.loads(pickle.dumps(model)),
    ]  # fmt: skip
    for each in copies:
        assert same(each, values(model))
        (loss_of(each) + each[0].weight.sum()).backward()
        (each[0](torch.randn(3, 20)) + each[0](torch.randn(3, 20))).sum().backward()
    train(model, optimizer)
    average.update_parameters(model)
    other = copies[0]
    train(other, private(other))
    train(model, optimizer)
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(optimizer)
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(optimizer)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam"])
def test_states_go_on(kind: str) -> None:
    def build(first_step: int = 0) -> tuple[nn.Module, PrivateOptimizer]:
        model = network()
        options = {"momentum": 0.9} if kind == "SGD" else {}
        inner = getattr(torch.optim, kind)(model.parameters(), lr=0.1, **options)
        return model, private(model, inner)

    whole, optimizer = build()
    train(whole, optimizer, 4)
    first, optimizer = build()
    train(first, optimizer, 2)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    assert optimizer._key._secret not in file.getvalue()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, optimizer = build()
    second.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert (optimizer.next_step, optimizer.steps_taken) == (2, 2)
    train(second, optimizer, 2)
    assert same(second, values(whole))
    optimizer.load_state_dict(saved["optimizer"])
    assert (optimizer.next_step, optimizer.steps_taken) == (4, 4)


def test_states_of_something_else_are_refused() -> None:
    model = network()
    optimizer = private(model)
    train(model, optimizer)
    saved = optimizer.state_dict()
    for options, match in [
        ({"noise_multiplier": 2.0}, r"noise_multiplier 1\.0, this optimizer 2\.0"),
    ]:
        with pytest.raises(ValueError, match=match):
            private(network(), **options).load_state_dict(saved)
    other = with_clipping(nn.Sequential(nn.Linear(20, 8), nn.Linear(8, 2)), p=2)
    with pytest.raises(ValueError, match="layers"):
        private(other).load_state_dict(saved)
    with pytest.raises(ValueError, match="plain optimizer"):
        optimizer.load_state_dict(optimizer.optimizer.state_dict())
    third = network()
    used = private(third)
    train(third, used)
    with pytest.raises(ValueError, match="another run"):
        used.load_state_dict(saved)
    private(network(), clip_norm=1.0, expected_batch_size=3.0).load_state_dict(saved)


def test_schedules_groups_and_hooks() -> None:
    model = network()
    inner = torch.optim.SGD([{"params": model[0].parameters()},
                             {"params": model[2].parameters(), "lr": 0.1}], lr=0.5)  # fmt: skip
    optimizer = private(model, inner)
    assert isinstance(optimizer, torch.optim.Optimizer)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("before"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("after"))
    inner.register_step_pre_hook(lambda o, args, kwargs: seen.append("inner"))
    train(model, optimizer)
    schedule.step()
    assert seen == ["before", "inner", "after"]
    assert [g["lr"] for g in inner.param_groups] == [0.25, 0.05]
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=5, cycle_momentum=False)
    before = values(model)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.0
    train(model, optimizer)
    assert same(model, before)
    with pytest.raises(ValueError, match="new PrivateOptimizer"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert "SGD" in repr(optimizer)


def test_a_closure_runs_once() -> None:
    model, twin = network(), network()
    optimizer = private(model, torch.optim.Adam(model.parameters(), lr=0.1))
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        calls.append(loss)
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1
    train(twin, private(twin, torch.optim.Adam(twin.parameters(), lr=0.1)))
    assert same(model, values(twin))
    with pytest.raises(ValueError, match="LBFGS"):
        private(model, torch.optim.LBFGS(model.parameters()))
