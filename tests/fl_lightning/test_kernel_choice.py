"""A run waits for the compiler of its kernels only where they pay its time back."""

import pytest
import torch
from torch import nn

from aadp_kernels import Layout, _dispatch
from fl_lightning import PrivacyConfig
from fl_lightning.kernel_choice import worth_compiling
from fl_lightning.module import cross_entropy
from fl_lightning.rules import Rules

pytest.importorskip("numba")
SMALL = Layout.build({"a.weight": torch.zeros(100, 20), "a.bias": torch.zeros(100)})
LARGE = Layout.build({"a.weight": torch.zeros(1000, 1000), "a.bias": torch.zeros(1000)})
MANY = Layout.build({f"l{i}.weight": torch.zeros(2) for i in range(400)})
TEN = torch.full((10,), 100)


def rules(setting="client+local", **options):
    options = {"sampling_rate": 0.1} | options
    privacy = PrivacyConfig(setting=setting, epsilon=None, noise_multiplier=1.0, clip_norm=1.0)
    return Rules(privacy, **options)


@pytest.mark.parametrize(
    ("layout", "rounds", "options", "worth"),
    [
        (SMALL, 20, {}, False),
        (SMALL, 2000, {}, True),
        (SMALL, 2000, {"clients_per_round": 1}, False),
        (LARGE, 2, {}, False),
        (LARGE, 20, {}, True),
        (MANY, 50, {}, True),
        (SMALL, 20, {"setting": "record+local"}, False),
        (SMALL, 20, {"setting": "record+local", "local_steps": 100}, True),
    ],
)
def test_it_follows_from_the_plan(layout, rounds, options, worth):
    assert worth_compiling(rules(**options), layout, TEN, rounds) is worth


def test_records_count_where_each_is_clipped():
    few, many = torch.full((10,), 100), torch.full((10,), 1_000_000)
    for setting, worth in (("record+local", True), ("client+local", False)):
        assert not worth_compiling(rules(setting), SMALL, few, 20)
        assert worth_compiling(rules(setting), SMALL, many, 20) is worth


class Seen(nn.Module):
    """Cross entropy that notes which back end a call would take."""

    def __init__(self):
        super().__init__()
        self.chosen = set()

    def forward(self, outputs, labels):
        cpu = torch.device("cpu")
        found = _dispatch.backend("auto", "clip_sum", device=cpu, elements=10_000)
        self.chosen.add(found.__name__)
        return cross_entropy(outputs, labels)


@pytest.mark.parametrize(("most", "taken"), [(1 << 26, "_torch"), (0, "_cpu")])
def test_dry_round_and_rounds_take_it(fit, federation, monkeypatch, most, taken):
    monkeypatch.setattr("fl_lightning.kernel_choice._WORTH_COMPILING", most)
    monkeypatch.setattr(_dispatch, "AUTO_ELEMENTS", 64)
    loss = Seen()
    fit(
        federation(), nn.Linear(8, 3), module_kwargs={"loss": loss, "sampling_rate": 1.0},
        setting="client+local", noise_multiplier=1.0, clip_norm=1.0,
    )  # fmt: skip
    assert loss.chosen == {f"aadp_kernels.{taken}.backend"}
    assert _dispatch.record_kernels(torch.zeros(3)) is not None
