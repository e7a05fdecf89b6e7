"""Augmentation multiplicity: the copies, one gradient a record, one clip a record."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aadp_kernels import Layout
from fl_lightning.augmentation import MeanOverCopies, Shifts
from fl_lightning.local.batches import Batch
from fl_lightning.models import CNN
from fl_lightning.privacy.clipping import clipped_sums
from fl_lightning.values.round import LayerPolicy

LOSS = nn.NLLLoss(reduction="none")


def images(records=5, size=8, seed=0):
    return torch.randn(records, 1, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mirror", [False, True])
def test_copies_are_the_image_and_its_shifts(mirror):
    x = images(2, 4) + 5
    copies = Shifts(1, mirror)(x)
    assert copies.shape == (2, 10 if mirror else 5, 1, 4, 4)
    assert torch.equal(copies[:, 0], x)
    for copy, (rows, columns) in zip(
        copies[:, 1:5].unbind(1), [(1, 0), (-1, 0), (0, 1), (0, -1)], strict=True
    ):
        moved = torch.roll(x, (rows, columns), (-2, -1))
        gone = torch.zeros(4, 4, dtype=torch.bool)
        if rows:
            gone[0 if rows > 0 else -1] = True
        else:
            gone[:, 0 if columns > 0 else -1] = True
        assert torch.equal(copy, moved.masked_fill(gone, 0.0))
    if mirror:
        assert torch.equal(copies[:, 5:], copies[:, :5].flip(-1))


def test_shifts_by_nothing_are_refused():
    with pytest.raises(ValueError, match="pixels=0"):
        Shifts(0)


def test_loss_is_the_mean_of_the_copies_in_training_and_of_the_record_itself_in_evaluation():
    torch.manual_seed(0)
    plain, x, y = CNN(num_classes=3), images(), torch.tensor([0, 1, 2, 0, 1])
    network = MeanOverCopies(plain, Shifts(2))
    want = [F.cross_entropy(plain(c), y, reduction="none") for c in Shifts(2)(x).unbind(1)]
    torch.testing.assert_close(LOSS(network.train()(x), y), torch.stack(want).mean(0))
    torch.testing.assert_close(LOSS(network.eval()(x), y), want[0])


@pytest.mark.parametrize("clipping", ["layer", "flat", "joint"])
def test_a_record_is_clipped_once_with_all_of_its_copies(clipping):
    torch.manual_seed(0)
    network, y = MeanOverCopies(CNN(num_classes=3)).train(), torch.tensor([[0, 1, 2, 0, 1]])
    tensors = dict(network.named_parameters())
    layout = Layout.build(tensors, dict.fromkeys(tensors, "all") if clipping == "flat" else None)
    x, ones = images()[None], torch.ones(1)
    batch = Batch(x, y, torch.ones(1, 5), ones, ones.bool())
    run = clipped_sums(
        network, LOSS, layout, p=2, vectorize=True, max_examples=2, example=x[0, :1],
        clipping=clipping,
    )  # fmt: skip
    clip = torch.full((1, layout.num_layers), 0.2, dtype=torch.float64)
    shares = torch.full_like(clip, 1 / layout.num_layers)
    sums, _ = run(
        {n: p.detach() for n, p in tensors.items()}, True, batch,
        LayerPolicy(clip, shares, shares, 0 * clip),
    )  # fmt: skip
    expected = {n: torch.zeros_like(p) for n, p in tensors.items()}
    for one, label in zip(x[0], y[0], strict=True):
        network.zero_grad()
        LOSS(network(one[None]), label[None]).sum().backward()
        norms = torch.zeros(layout.num_layers)
        for n, layer in zip(layout.names, layout.layer_of, strict=True):
            norms[layer] += tensors[n].grad.square().sum()
        units = norms.sqrt() / 0.2
        for n, layer in zip(layout.names, layout.layer_of, strict=True):
            size = (units * shares[0].sqrt()).norm() if clipping == "joint" else units[layer]
            assert size > 1, "the test needs records that are clipped"
            expected[n] += tensors[n].grad / size
    for n in expected:
        torch.testing.assert_close(sums[n][0].float(), expected[n].float(), rtol=2e-5, atol=2e-6)


def test_a_run_learns_with_copies(federation, fit):
    torch.manual_seed(0)
    data = federation(shape=(1, 8, 8))
    options = {"loss": LOSS, "sampling_rate": 1.0, "client_lr": 0.5}
    module = fit(
        data, MeanOverCopies(CNN(num_classes=3)), rounds=20, module_kwargs=options,
        noise_multiplier=0.0, thresholds="fixed", clip_norm=10.0,
    )  # fmt: skip
    network = module.network.eval().requires_grad_(False)
    assert float(LOSS(network(data.x), data.y).mean()) < 0.8  # chance: 1.1
