"""Records of several named inputs: packed for the run, apart again at the network."""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from fl_lightning import FederatedDataModule, FederatedModule, PrivacyConfig, from_arrays
from fl_lightning.data.fields import named_inputs
from fl_lightning.networks.inputs import take_fields

GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(1, 20, (40, 6), generator=GENERATOR)
MASK = torch.arange(6) < torch.randint(1, 7, (40, 1), generator=GENERATOR)
SIZE = torch.randn(40, generator=GENERATOR)
Y = torch.arange(40) % 3


class Reader(nn.Module):
    """Mean of the words that count, times a size; words that do not count change nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, input_ids, attention_mask=None, size=None):
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        words = self.words(input_ids) * seen.unsqueeze(-1).float()
        mean = words.sum(-2) / seen.float().sum(-1, keepdim=True).clamp(min=1)
        if size is not None:
            mean = mean * size.unsqueeze(-1)
        return {"logits": self.head(mean)}


@pytest.mark.parametrize("double", [False, True])
def test_fields_come_back_bit_by_bit(double):
    values = {"input_ids": IDS.int(), "attention_mask": MASK, "size": SIZE.to(torch.float64)}
    if not double:
        values.pop("size")
    fields, packed, none = named_inputs(values, None)
    assert none is None
    assert packed.dtype == torch.int64
    assert packed.shape == (40, 12 + double)
    back = fields.unpack(packed)
    assert torch.equal(back["input_ids"], IDS)
    assert torch.equal(back["attention_mask"], MASK)
    assert back["attention_mask"].dtype == torch.bool
    if double:
        assert torch.equal(back["size"], SIZE)


def test_floats_alone_stay_floats_and_positions_have_no_names():
    pair = (SIZE, torch.stack([SIZE, -SIZE], 1))
    fields, packed, held = named_inputs(pair, (SIZE[:3], np.ones((3, 2))))
    assert packed.dtype == held.dtype == torch.float32
    assert fields.by_position
    assert torch.equal(fields.unpack(packed)["1"], torch.stack([SIZE, -SIZE], 1))


@pytest.mark.parametrize(
    ("x", "x_test", "words"),
    [
        ({}, None, "at least one input"),
        ({"a": IDS, "b": IDS[:3]}, None, "equal numbers of records: a int64 .40, 6., b"),
        ({"a": IDS}, {"b": IDS}, "x_test must hold the inputs of x_train, a int64"),
        ({"a": IDS}, {"a": IDS[:, :3]}, r"a int64 \[40, 6\], got a int64 \[40, 3\]"),
        ({"a": IDS}, IDS, "x_test must hold named inputs"),
        ({"a": 3}, None, r"x_train\['a'\] must be real"),
    ],
)
def test_what_does_not_fit_is_said(x, x_test, words):
    with pytest.raises(ValueError, match=words):
        from_arrays(x, Y, x_test, None if x_test is None else Y)


def run(tmp_path, network, x, *, setting="record+local", execution="loop", rounds=2, **options):
    options = {"num_clients": 2, "val_fraction": 0.2} | options
    data = FederatedDataModule(from_arrays(x, Y, x, Y), **options)
    module = FederatedModule(
        network,
        PrivacyConfig(setting=setting, epsilon=8.0, delta=1e-2)
        if setting != "none"
        else PrivacyConfig(setting="none"),
        sampling_rate=0.5,
        client_lr=1.0,
        execution=execution,
        run_dir=str(tmp_path),
    )
    trainer = pl.Trainer(
        max_epochs=rounds, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    found = trainer.test(module, datamodule=data, verbose=False)[0]
    return module, found


@pytest.mark.parametrize("execution", ["loop", "vmap"])
def test_a_run_of_named_inputs(tmp_path, execution):
    torch.manual_seed(0)
    x = {"input_ids": IDS, "attention_mask": MASK, "size": SIZE}
    module, found = run(tmp_path, Reader(), x, execution=execution)
    assert set(found) == {"test/loss", "test/accuracy"}
    with torch.no_grad():
        logits = module.network(input_ids=IDS, attention_mask=MASK, size=SIZE)["logits"]
    assert found["test/accuracy"] == pytest.approx((logits.argmax(1) == Y).float().mean().item())


def test_what_does_not_count_changes_no_release(tmp_path):
    """Other words under the padding, and the update is the same bit by bit but for its noise."""
    other = torch.where(MASK, IDS, 7)
    ends = []
    for name, ids in (("a", IDS), ("b", other)):
        torch.manual_seed(0)
        x = {"input_ids": ids, "attention_mask": MASK}
        module, _ = run(tmp_path / name, Reader(), x, setting="none")
        ends.append(torch.cat([p.detach().flatten() for p in module.network.parameters()]))
    assert torch.equal(*ends)


def test_other_names_are_other_records():
    one, other = (
        FederatedDataModule(from_arrays({"a": x, "b": y}, Y), num_clients=2, val_fraction=0.0)
        for x, y in ((IDS, IDS), (IDS, IDS))
    )
    assert one.digest() == other.digest()
    arrays = from_arrays({"b": IDS, "a": IDS}, Y)
    renamed = FederatedDataModule(arrays, num_clients=2, val_fraction=0.0)
    assert renamed.digest() != one.digest()


def test_a_network_keeps_its_own_arguments():
    network = Reader()
    fields, packed, _ = named_inputs({"input_ids": IDS, "attention_mask": MASK}, None)
    take_fields(network, fields)
    take_fields(network, fields)
    assert len(network._forward_pre_hooks) == 1
    whole = network(packed)["logits"]
    assert torch.equal(whole, network(input_ids=IDS, attention_mask=MASK)["logits"])
    assert torch.equal(network(IDS)["logits"], network(input_ids=IDS)["logits"])
    take_fields(network, None)
    assert not network._forward_pre_hooks
    assert not network._forward_pre_hooks_with_kwargs


class Two(nn.Module):
    """Takes two tensors by their places."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 3)

    def forward(self, first, second):
        return self.head(torch.cat([first, second], -1))


@pytest.mark.parametrize("double", [False, True])
def test_a_tuple_of_real_inputs(tmp_path, double):
    network = Two().double() if double else Two()
    x = (IDS.float() / 20, MASK.float())
    _, found = run(tmp_path, network, x)
    assert "test/accuracy" in found


def features(values, *, power=1):
    """A public function of one record's inputs."""
    counted = values["attention_mask"].float()
    return (values["input_ids"].float() * counted).sum(1, keepdim=True).repeat(1, 4) ** power / 60


def test_a_transform_gets_the_inputs_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("AADP_FL_DATA_DIR", str(tmp_path / "cache"))
    x = {"input_ids": IDS, "attention_mask": MASK}
    options = {"transform": f"{__name__}.features", "transform_args": {"power": 1}}
    module, found = run(tmp_path, nn.Linear(4, 3), x, **options)
    assert module.data.fields is None
    assert module.data.input_shape == (4,)
    assert "test/accuracy" in found


SEEN = []


def fitted_at_first(values):
    """Keeps the first records that it is given, as what fits itself to the data does."""
    if not SEEN:
        SEEN.append(values["input_ids"].float().mean(0))
    return values["input_ids"].float() - SEEN[0]


def test_a_transform_that_fits_itself_at_first_meets_drawn_records(tmp_path, monkeypatch):
    monkeypatch.setenv("AADP_FL_DATA_DIR", str(tmp_path / "cache"))
    SEEN.clear()
    arrays = from_arrays({"input_ids": IDS, "attention_mask": MASK}, Y)
    name = f"{__name__}.fitted_at_first"
    data = FederatedDataModule(arrays, num_clients=2, transform=name)
    data.setup()
    assert (SEEN[0] <= 1).all()  # of records that were drawn, not of these
    assert (IDS.float().mean(0) > 1).all()
