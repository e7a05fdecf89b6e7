"""Private evaluations: scale of the noise, sensitivity, and who holds which record out."""

import math

import numpy as np
import pytest
import torch

from aadp_kernels import NoiseKey
from fl_lightning import PrivacyConfig
from fl_lightning.data.partition import Partition, held_out_partition
from fl_lightning.privacy.noised_counts import bounded_answers, noised_answers
from tests.fl_lightning.resuming import blobs


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
@pytest.mark.parametrize("setting", ["record+local", "client+local", "client+aggregator"])
def test_noise_has_the_scale_that_is_charged(setting, mechanism):
    """A scale of 2/3 or of 3/2 is far outside."""
    privacy = PrivacyConfig(setting=setting, mechanism=mechanism, thresholds="fixed")
    key, unit = NoiseKey.from_seed(3), math.sqrt(2) if mechanism == "laplace" else 1.0
    z = torch.tensor([1.5, 3.0], dtype=torch.float64)
    if privacy.summed:
        answers, ids = torch.tensor([0.5, 1.0], dtype=torch.float64), torch.arange(2)
        found = [
            noised_answers(answers, z, ids, privacy, key.derive("try", i))[0] for i in range(300)
        ]
        errors, scales = torch.cat(found)[:, None] - 1.0, [1.5]  # 0.5 + 1.0 of weight 1/2
    else:
        answers = torch.full((8000,), 4.0, dtype=torch.float64)
        noised, _ = noised_answers(answers, z.repeat(4000), torch.arange(8000), privacy, key)
        errors, scales = (noised - answers).view(4000, 2), z.tolist()
    for error, scale in zip(errors.T, scales, strict=True):
        assert 0.8 < float(error.std()) / (unit * scale) < 1.25
        assert float(error.mean()) == pytest.approx(0, abs=0.4)


@pytest.mark.parametrize("unit", ["record", "client"])
def test_one_unit_moves_a_number_by_at_most_one(unit):
    generator = np.random.default_rng(0)
    records = torch.from_numpy(generator.integers(1, 20, 200))
    right = torch.from_numpy(generator.integers(0, 20, 200)).minimum(records)
    moved = (right + torch.from_numpy(generator.choice([-1, 1], 200))).clamp(min=0)
    moved = moved.minimum(records) if unit == "record" else torch.flip(right, [0])
    before, after = (bounded_answers(r, records, unit) for r in (right, moved))
    assert (before - after).abs().max() <= 1
    assert before.min() >= 0
    assert (before <= (records if unit == "record" else 1)).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -5.0, 1e9])
def test_an_impossible_number_is_bounded(value):
    found = bounded_answers(torch.tensor([value]), torch.tensor([4]), "client")
    assert 0 <= float(found) <= 1


def test_a_client_weighs_what_keeps_it_within_its_multiplier():
    privacy = PrivacyConfig(setting="client+aggregator", thresholds="fixed")
    z = torch.tensor([2.0, 5.0], dtype=torch.float64)
    key, ids = NoiseKey.from_seed(3), torch.arange(2)
    one, other = (
        noised_answers(torch.tensor(a).double(), z, ids, privacy, key.derive("x"))[0]
        for a in ([0.5, 0.0], [0.5, 1.0])
    )
    assert float(other - one) == pytest.approx(2 / 5)


# Who holds what ----------------------------------------------------------------------------------


def test_held_out_records_are_dealt_once_and_like_the_training_records():
    data = blobs()
    held, train = data.held_out_partition, data.partition
    assert sorted(held.indices) == list(range(len(data.held_out[0])))
    assert held.num_clients == train.num_clients
    rows = {tuple(r) for r in data.x.numpy().tolist()}
    assert not rows & {tuple(r) for r in data.held_out[0].numpy().tolist()}


def test_owners_keep_their_held_out_records():
    partition = Partition(np.array([0, 2, 1]), np.array([0, 2, 3]))
    owners = np.array([7, 9, 7]), np.array([9, 8, 7, 9])
    held = held_out_partition(partition, 0, labels=None, owners=owners, count=4)
    assert held.client(0).tolist() == [2]
    assert held.client(1).tolist() == [0, 3]


def test_a_class_goes_to_who_trains_on_it():
    partition = Partition(np.array([0, 1, 2, 3]), np.array([0, 2, 4]))
    labels = np.array([0, 0, 1, 1]), np.array([1, 0, 1, 0, 5])
    held = held_out_partition(partition, 0, labels=labels, owners=None, count=5)
    assert {1, 3} <= set(held.client(0).tolist())
    assert {0, 2} <= set(held.client(1).tolist())
    assert held.sizes.sum() == 5
