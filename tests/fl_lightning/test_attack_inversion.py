"""Inversion: without privacy a record is seen in its gradient, and the release is the run's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fl_lightning import FederatedDataModule, FederatedModule, PrivacyConfig, from_arrays
from fl_lightning.attacks import analytic
from fl_lightning.attacks.__main__ import main
from fl_lightning.attacks.inversion import ANALYTIC, NOTHING, SEARCH, attack, picture, quality
from fl_lightning.attacks.optimised import Search, total_variation
from fl_lightning.attacks.victim import upload, victims
from fl_lightning.fit import main as fit_main
from fl_lightning.models import CNN, MLP
from fl_lightning.text_model import CharTransformer

WITHOUT = {"setting": "none"}


def images(records: int = 30, side: int = 8) -> FederatedDataModule:
    """Soft blobs in [0, 1], so that neighbours are alike."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(records, 1, 3, 3, generator=generator)
    x = nn.functional.interpolate(coarse, side, mode="bilinear", align_corners=True)
    y = torch.randint(0, 10, (records,), generator=generator)
    return FederatedDataModule(from_arrays(x, y, num_classes=10), num_clients=2, val_fraction=0)


def module_of(network: nn.Module | None, privacy: dict, **options) -> FederatedModule:
    if network is None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = MLP(64, 10, hidden=[16])
    options = {"sampling_rate": 1.0, "client_lr": 0.5} | options
    return FederatedModule(network, PrivacyConfig(**{"seed": 1} | privacy), **options)


def gradient_of(module: FederatedModule, x, y) -> dict:
    loss = module.loss(module.network(x), y).mean()
    names, values = zip(*module.network.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, values), strict=True))


@pytest.mark.parametrize("steps", [1, 3])
def test_without_privacy_the_upload_is_the_mean_gradient(steps: int) -> None:
    data, module = images(), module_of(None, WITHOUT, local_steps=steps, client_lr=1e-4)
    x, y = victims(data, count=1, records=3, seed=0)[0]
    sent = upload(module, x, y, multiplier=None, seed=0)
    for name, want in gradient_of(module, x, y).items():
        assert torch.allclose(sent.gradient[name], want, atol=2e-3)
    assert set(sent.noise.values()) == {0.0}


@pytest.mark.parametrize("setting", ["record+local", "client+local"])
def test_a_private_upload_is_clipped_and_has_the_noise_that_is_said(setting: str) -> None:
    data, z = images(), 4.0
    privacy = {"epsilon": None, "noise_multiplier": z, "thresholds": "fixed", "setting": setting}
    module = module_of(None, privacy | {"clip_norm": 0.1, "allocation": "uniform"})
    x, y = victims(data, count=1, records=2, seed=0)[0]
    sents = [upload(module, x, y, multiplier=z, seed=s) for s in range(6)]
    for name in sents[0].gradient:
        values = torch.stack([s.gradient[name] for s in sents])
        scale = sents[0].noise[name]
        # Two layers with half of the budget each; under replace_one the sensitivity is twice.
        want = z * 0.1 / 2 if setting == "record+local" else 2 * z * 0.1 / 0.5
        assert scale == pytest.approx(want)
        if values[0].numel() > 100:
            assert float(values.std(0).square().mean().sqrt()) == pytest.approx(scale, rel=0.1)
            assert float(values.mean().abs()) < scale / 5


def test_coins_are_taken_to_have_chosen_every_record() -> None:
    data = images()
    x, y = victims(data, count=1, records=1, seed=0)[0]
    often = upload(module_of(None, WITHOUT), x, y, multiplier=None, seed=0)
    rarely = upload(module_of(None, WITHOUT, sampling_rate=0.01), x, y, multiplier=None, seed=0)
    assert all(torch.equal(v, rarely.gradient[n]) for n, v in often.gradient.items())


def test_a_dense_layer_shows_its_input_exactly() -> None:
    data, module = images(), module_of(None, WITHOUT)
    for x, y in victims(data, count=3, records=1, seed=0):
        sent = upload(module, x, y, multiplier=None, seed=0)
        grads = sent.gradient["fc1.weight"], sent.gradient["fc1.bias"]
        assert torch.allclose(analytic.dense_input(*grads), x.flatten(), atol=1e-4)
        found = analytic.direction_of_input(*grads, positive=True)
        assert torch.allclose(found * (x.norm() / found.norm()), x.flatten(), atol=1e-4)
        assert analytic.labels_of(sent.gradient["fc2.bias"], 1).tolist() == y.tolist()


def test_the_direction_of_an_input_is_seen_through_some_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    x, errors = torch.rand(50, generator=generator), torch.randn(20, generator=generator)
    joint = torch.outer(errors, torch.cat([x, torch.ones(1)]))
    joint += 0.1 * torch.randn(joint.shape, generator=generator)
    found = analytic.direction_of_input(joint[:, :-1], joint[:, -1], positive=False)
    assert torch.cosine_similarity(found, x, dim=0) > 0.99


def test_labels_of_several_records() -> None:
    # Softmax of zeros is 1/4 everywhere; labels 2, 2 and 0.
    bias = torch.full((4,), 0.25) - torch.tensor([1, 0, 2, 0]) / 3
    assert sorted(analytic.labels_of(bias, 3).tolist()) == [0, 2, 2]


def test_an_image_is_seen_without_privacy_and_not_at_epsilon_8() -> None:
    data, search = images(), Search(steps=120)
    chosen = victims(data, count=3, records=1, seed=0)
    plain = attack(module_of(None, WITHOUT), data, chosen, multiplier=None, search=search, seed=0)
    seen = {n: f["ssim"]["value"] for n, f in plain.figures["attacks"].items()}
    assert seen[ANALYTIC] > 0.999
    assert seen[SEARCH] > 0.7
    assert plain.figures["labels_right"]["value"] == 1.0
    private = module_of(None, {"thresholds": "fixed", "clip_norm": 1.0})
    hidden = attack(private, data, chosen, multiplier=0.6, search=search, seed=0)
    found = {n: f["ssim"]["value"] for n, f in hidden.figures["attacks"].items()}
    assert max(found[ANALYTIC], found[SEARCH]) < 0.5
    assert found[NOTHING] == seen[NOTHING]
    assert picture(plain).axes


@pytest.mark.slow
def test_several_records_of_a_convolution_are_searched() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = CNN(channels=[8])
    data, module = images(), module_of(network, WITHOUT)
    chosen = victims(data, count=1, records=2, seed=0)
    found = attack(module, data, chosen, multiplier=None, search=Search(steps=150), seed=0)
    assert set(found.figures["attacks"]) == {SEARCH, NOTHING}
    ssim = {n: f["ssim"]["value"] for n, f in found.figures["attacks"].items()}
    assert ssim[SEARCH] > ssim[NOTHING]


def test_quality_is_that_of_the_definition() -> None:
    truth = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    same = quality(truth, truth)
    assert same["ssim"]["value"] == pytest.approx(1.0)
    assert same["psnr"]["value"] == 100.0
    off = quality((truth - 0.5) * 0.5 + 0.5, truth)
    error = ((truth - 0.5) * 0.5).square().flatten(1).mean(1)
    assert off["psnr"]["value"] == pytest.approx(float((-10 * error.log10()).mean()), rel=1e-4)
    assert total_variation(torch.zeros(2, 1, 1, 4, 4)).tolist() == [0, 0]
    steps = torch.arange(4.0).expand(1, 1, 1, 4, 4)
    assert total_variation(steps).tolist() == [1.0]


def text() -> FederatedDataModule:
    x = torch.randint(0, 40, (20, 12), generator=torch.Generator().manual_seed(0))
    return FederatedDataModule(
        from_arrays(x, x[:, 0] % 5, num_classes=40, codes=True), num_clients=2, val_fraction=0
    )


def test_tokens_are_the_rows_of_an_embedding_that_changed() -> None:
    data, network = text(), CharTransformer(num_classes=40, length=12, width=8, heads=2)
    chosen = victims(data, count=3, records=1, seed=0)
    module = module_of(network, WITHOUT)
    plain = attack(module, data, chosen, multiplier=None, search=Search(), seed=0)
    assert plain.figures["tokens"]["found"]["value"] == 1.0
    assert plain.figures["tokens"]["right"]["value"] == 1.0
    assert picture(plain) is None
    module = module_of(network, {"thresholds": "fixed"})
    hidden = attack(module, data, chosen, multiplier=1.0, search=Search(), seed=0)
    tokens = hidden.figures["tokens"]
    assert tokens["found"]["value"] < 0.5
    rows = torch.randn(2000, 6, generator=torch.Generator().manual_seed(0))
    rows[7] += 10
    assert 7 in analytic.tokens_of(rows, noise=1.0)
    assert len(analytic.tokens_of(rows, noise=1.0)) < 6


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: victims(images(), count=0, records=1, seed=0), "victims=0"),
        (lambda: victims(images(), count=31, records=1, seed=0), "the 30 training records"),
        (lambda: analytic.dense_input(torch.ones(2, 3), torch.ones(3)), "weight"),
        (lambda: analytic.dense_input(torch.ones(2, 3), torch.zeros(2)), "gradient is zero"),
    ],
)
def test_bad_input_is_named(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def refused(data: FederatedDataModule, network: nn.Module | None, privacy: dict) -> str:
    chosen = victims(data, count=1, records=1, seed=0)
    with pytest.raises(ValueError) as caught:
        attack(module_of(network, privacy), data, chosen, multiplier=1.0, search=Search(), seed=0)
    return str(caught.value)


def test_records_that_cannot_be_shown_are_refused() -> None:
    x, y = torch.rand(10, 6), torch.arange(10) % 3

    def data(x, codes: bool = False) -> FederatedDataModule:
        arrays = from_arrays(x, y, num_classes=3, codes=codes)
        return FederatedDataModule(arrays, num_clients=2, val_fraction=0)

    assert "no images" in refused(data(x), None, WITHOUT)
    assert "pixels must be" in refused(data(2 * x.view(10, 1, 2, 3)), None, WITHOUT)
    assert "sum" in refused(data(x.view(10, 1, 2, 3)), None, {"setting": "client+aggregator"})
    whole = torch.zeros(10, 4, dtype=torch.int64)
    assert "trains no embedding" in refused(data(whole, codes=True), _Codes(), WITHOUT)


class _Codes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 3)

    def forward(self, x):
        return self.dense(x.float())


def test_layers_that_do_not_see_the_record_are_left_alone() -> None:
    assert analytic.first_dense(MLP(64, 10))[0] == "fc1"
    assert analytic.first_dense(MLP(64, 10, standardize=True)) is None
    assert analytic.first_dense(CNN()) is None
    assert analytic.first_dense(nn.Linear(2, 2, bias=False)) is None
    assert analytic.last_bias(CNN()) == "fc1.bias"
    assert analytic.last_bias(nn.Conv2d(1, 1, 1)) is None


def test_the_command_writes_two_files_and_changes_none(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    words = f"--run_dir {folder} --trainer.max_epochs 1 --trainer.logger false --privacy.seed 1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        fit_main(words.split())
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert main(["inversion", str(folder), "--victims", "2"]) == 0
    after = {p for p in folder.rglob("*") if p.is_file()}
    assert {p.name for p in after - set(before)} == {"inversion.json", "inversion.png"}
    assert all(p.read_bytes() == content for p, content in before.items())
    assert json.loads((folder / "inversion.json").read_text())["clients"] == 2
    assert main(["inversion", str(folder), "--victims", "0"]) == 2
    assert "victims=0" in capsys.readouterr().err
