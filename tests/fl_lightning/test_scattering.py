"""Scattering features: known values, and the properties that Bruna and Mallat (2013) prove."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fl_lightning.data import FederatedDataModule, from_arrays, leaves
from fl_lightning.data import transform as transforms
from fl_lightning.data.leaves import whitened_scattering
from fl_lightning.data.scattering import averages, channels, scattering, wavelets

# Means over space that kymatio 0.3.0 (Scattering2D, J=2, L=8) gives for `picture`: orders 0 and 1,
# then every seventh path of order 2. It subsamples between the layers, which we do not.
KYMATIO = [0.15971, 0.03714, 0.07249, 0.09615, 0.07869, 0.04593, 0.02340, 0.01519, 0.01646]
KYMATIO += [0.02874, 0.10024, 0.18721, 0.10300, 0.05230, 0.03927, 0.02600, 0.02316]
SECOND = [0.001689, 0.001841, 0.002029, 0.002472, 0.001789, 0.004247, 0.003713, 0.001681]
SECOND += [0.001070, 0.001282]


def picture() -> Tensor:
    row, column = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    blob = torch.exp(-((row - 10) ** 2 + (column - 16) ** 2) / 40)
    return (blob + 0.5 * torch.sin(0.9 * row + 0.4 * column))[None, None]


def noise(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape)).float()


def test_values_are_those_of_another_implementation():
    means = scattering(picture(), groups=None)[0].mean((1, 2))
    # Order 0 and the first scale are not subsampled by either; its 3.1415 for π gives 6e-5.
    torch.testing.assert_close(means[:9], torch.tensor(KYMATIO[:9]), rtol=4e-4, atol=0)
    torch.testing.assert_close(means[9:17], torch.tensor(KYMATIO[9:]), rtol=1e-2, atol=0)
    torch.testing.assert_close(means[17::7], torch.tensor(SECOND), rtol=3e-2, atol=0)


@pytest.mark.parametrize(
    ("scale", "angles", "order", "count"),
    [(1, 8, 2, 9), (2, 8, 1, 17), (2, 8, 2, 81), (3, 8, 2, 217), (2, 4, 2, 25)],
)
def test_channel_counts(scale, angles, order, count):
    assert channels(scale, angles, order) == count
    x = noise(2, 1, 32, 32)
    found = scattering(x, scale=scale, angles=angles, order=order, groups=None)
    assert found.shape == (2, count, 32 >> scale, 32 >> scale)
    assert found.dtype == torch.float32


def test_wavelets_have_no_mean_and_lose_no_energy_but_at_the_corners():
    bank = wavelets(36, 2, 8).flatten(0, 1).double()
    assert bank[:, 0, 0].abs().max() < 1e-6
    # Row weights of the smoothing are one period of φ: its spectrum by the definition.
    low = torch.fft.fft(averages(28, 2)[0].double().roll(-4)).real
    mirrored = bank.flip(1, 2).roll((1, 1), (1, 2))
    energy = (low[:, None] * low).square() + (bank.square() + mirrored.square()).sum(0) / 2
    # Littlewood-Paley: at most 1, so no transform of a layer expands a difference.
    assert 0.9999 < float(energy.max()) < 1.0002
    frequency = torch.fft.fftfreq(36, dtype=torch.float64) * 2 * math.pi
    inside = frequency[:, None].square() + frequency.square() < (0.9 * math.pi) ** 2
    assert float(energy[inside].min()) > 0.45


def test_two_images_do_not_move_apart():
    x = noise(32, 1, 28, 28)
    x[16:] = x[:16] + 0.1 * noise(16, 1, 28, 28).flip(0)
    # Periodic on its own margin: reflection counts some pixels twice, at most four times.
    features = 4 * scattering(x, groups=None)  # a value stands for 4 x 4 pixels
    apart = (features[:16] - features[16:]).flatten(1).norm(dim=1)
    padded = torch.nn.functional.pad(x[:16] - x[16:], [4] * 4, mode="reflect")
    assert bool((apart <= 1.001 * padded.flatten(1).norm(dim=1)).all())
    assert bool((apart > 0.05 * padded.flatten(1).norm(dim=1)).all())


def test_moving_the_image_moves_the_features():
    x = torch.zeros(1, 1, 96, 96)
    x[..., 40:56, 40:56] = noise(16, 16)  # far from the margins, whatever the width of a wavelet
    moved = scattering(x.roll((4, 8), (2, 3)), groups=None)
    still = scattering(x, groups=None)
    torch.testing.assert_close(moved, still.roll((1, 2), (2, 3)), rtol=0, atol=1e-5)
    # A move by one pixel, a quarter of the averaged window, changes little; pixels change a lot.
    change = (scattering(x.roll(1, 3), groups=None) - still).norm() / still.norm()
    assert change < 0.35 < (x.roll(1, 3) - x).norm() / x.norm()


def test_turning_the_image_turns_the_angles():
    x = picture()
    turned = scattering(x.rot90(1, (2, 3)), order=1, groups=None).rot90(-1, (2, 3))[0, 1:]
    expected = scattering(x, order=1, groups=None)[0, 1:].unflatten(0, (2, 8)).roll(4, 1)
    # The grid of 4 x 4 pixels does not turn into itself (its points are corners), so in the mean.
    torch.testing.assert_close(
        turned.unflatten(0, (2, 8)).mean((2, 3)), expected.mean((2, 3)), rtol=0.15, atol=1e-3
    )


def test_scaling_and_groups():
    x = noise(3, 2, 16, 16)
    raw = scattering(x, groups=None)
    torch.testing.assert_close(scattering(-2 * x, groups=None)[:, 1:81], 2 * raw[:, 1:81])
    grouped = scattering(x, groups=27).view(3, 27, -1)
    torch.testing.assert_close(grouped.mean(2), torch.zeros(3, 27), rtol=0, atol=1e-5)
    assert bool((grouped.var(2, unbiased=False) < 1.0001).all())


def test_records_do_not_see_each_other():
    x = noise(5, 1, 28, 28)
    together = scattering(x)
    x[1:] = 1e3
    torch.testing.assert_close(scattering(x)[0], together[0], rtol=1e-4, atol=1e-4)
    assert bool(scattering(x)[:1].isfinite().all())


@pytest.mark.parametrize(
    ("argument", "value"),
    [("scale", 0), ("scale", 3), ("angles", 0), ("order", 3), ("groups", 0), ("groups", 5)],
)
def test_bad_arguments(argument, value):
    with pytest.raises(ValueError, match=f"{argument}={value}"):
        scattering(noise(1, 1, 28, 28), **{argument: value})
    with pytest.raises(ValueError, match="square"):
        scattering(noise(2, 28))


def doubled(x: Tensor, factor: float = 2.0) -> Tensor:
    calls.append(len(x))
    return factor * x


calls: list[int] = []


def module(**options) -> FederatedDataModule:
    x, y = noise(20, 1, 8, 8), torch.arange(20) % 2
    data = from_arrays(x, y, x[:4], y[:4])
    return FederatedDataModule(data, num_clients=2, **options)


def test_a_data_module_transforms_every_record_once(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("AADP_FL_DATA_DIR", str(tmp_path))
    calls.clear()
    name = f"{__name__}.doubled"
    monkeypatch.setitem(transforms.TRANSFORMS, name, doubled)
    made: list[int] = []
    for _ in range(2):
        data = module(transform=name, transform_args={"factor": 3.0})
        torch.testing.assert_close(data.x, 3 * module().x)
        (test_x, _) = next(iter(data.test_dataloader()))
        torch.testing.assert_close(test_x, 3 * noise(20, 1, 8, 8)[:4])
        made = made or [*calls]
    assert made[:2] == [20, 4]
    assert calls == made, "the second time the results are read from disk"
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert sorted(p.suffix for p in files) == [".alone", ".npy", ".npy"]
    assert all(os.stat(p).st_mode & 0o077 == 0 for p in files)
    assert data.digest() != module().digest()
    torch.testing.assert_close(module(transform=name, transform_args={"factor": 1.0}).x, module().x)
    assert calls[: len(made)] == made
    assert calls[len(made) :][:2] == [20, 4], "other arguments, other results"


def test_scattering_by_name():
    data = module(transform="scattering", transform_args={"scale": 1, "groups": None})
    assert data.input_shape == (9, 4, 4)


def test_bad_transforms(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("AADP_FL_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="transform_args="):
        module(transform_args={"scale": 1})
    with pytest.raises(ValueError, match="transform='fourier' is unknown"):
        module(transform="fourier").setup()
    with pytest.raises(ValueError, match=r"transform_args=.*depth"):
        module(transform="scattering", transform_args={"depth": 1}).setup()
    with pytest.raises(ValueError, match="made 1 records of 20"):
        module(transform="torch.Tensor.sum", transform_args={"dim": 0, "keepdim": True}).setup()


@pytest.fixture
def few_drawings(monkeypatch):
    monkeypatch.setattr(leaves, "_PICTURES", 300)
    leaves._drawn_components.cache_clear()
    yield
    leaves._drawn_components.cache_clear()


def test_drawings_are_public_and_vary():
    x = leaves.drawings(40, 16)
    assert x.shape == (40, 1, 16, 16)
    assert torch.equal(x, leaves.drawings(40, 16))
    assert not torch.equal(x, leaves.drawings(40, 16, seed=1))
    assert float(x.min()) == -1
    assert float(x.max()) <= 1
    assert float(x.std()) > 0.3


def test_whitened_features_of_drawings_are_white(few_drawings):
    ridge, options = 1e-9, {"scale": 1, "groups": None}
    mean, variance, directions = leaves._drawn_components(16, 1, 8, 2, None)
    features = leaves._features(leaves.drawings(300, 16), 1, 8, 2, None)
    basis = directions[:, :20] * (variance[:20] + ridge).rsqrt()
    white = (features - mean) @ basis
    torch.testing.assert_close(white.T @ white / 300, torch.eye(20), rtol=0, atol=2e-2)
    assert bool((variance[:-1] >= variance[1:]).all())
    found = whitened_scattering(leaves.drawings(300, 16), components=20, ridge=ridge, **options)
    torch.testing.assert_close(found, torch.nn.functional.normalize(white), rtol=1e-3, atol=1e-3)


def test_whitened_features_are_of_one_record_and_length_one(few_drawings):
    x = noise(6, 1, 16, 16)
    found = whitened_scattering(x, components=30)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(6))
    fewer = torch.nn.functional.normalize(found[:, :7])
    torch.testing.assert_close(whitened_scattering(x, components=7), fewer, rtol=1e-4, atol=1e-5)
    x[1:] = 5 * noise(5, 1, 16, 16)
    torch.testing.assert_close(whitened_scattering(x, components=30)[0], found[0])


@pytest.mark.parametrize(
    ("argument", "value"), [("components", 0), ("components", 300), ("ridge", 0.0)]
)
def test_bad_whitening(few_drawings, argument, value):
    with pytest.raises(ValueError, match=f"{argument}={value}"):
        whitened_scattering(noise(2, 1, 16, 16), **{argument: value})
    with pytest.raises(ValueError, match="grey"):
        whitened_scattering(noise(2, 3, 16, 16))
