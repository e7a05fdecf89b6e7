"""The study of dividing: its runs are those of the product, and its page shows what was found."""

from __future__ import annotations

import functools

import pytest
import pytorch_lightning as pl
import torch

from bench import lean_rounds, lora, margin, margin_report, pages
from bench.margin import Study
from fl_lightning import FederatedDataModule, FederatedModule, PrivacyConfig
from fl_lightning.data import from_arrays
from fl_lightning.models import MLP
from fl_lightning.privacy.allocation import division_ratio

ROUNDS = 3


def population(**options):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 6, generator=generator)
    arrays = from_arrays(x, (x[:, 0] > 0).long(), num_classes=2)
    return FederatedDataModule(arrays, num_clients=4, val_fraction=0.0, **options)


def network():
    torch.manual_seed(1)
    return MLP(in_features=6, hidden=(5,), num_classes=2)


@pytest.mark.parametrize("method", ["flat, fixed", "AADP: contribution", "AADP: joint, mse"])
def test_a_lean_run_is_a_run(tmp_path, method):
    """Without noise, so that both are functions of records and rules alone."""
    options = margin.METHODS[method] | {"noise_multiplier": 0.0, "epsilon": None, "clip_norm": 0.5}
    lean = network()
    found = lean_rounds.trained(lean, population(), lean_rounds.Plan(options, ROUNDS, 1.0, 2.0), 3)
    linear = functools.partial(torch.optim.lr_scheduler.PolynomialLR, total_iters=ROUNDS)
    whole = FederatedModule(
        network(), PrivacyConfig(**options, seed=3), sampling_rate=1.0, client_lr=1.0,
        execution="loop", server_optimizer=functools.partial(torch.optim.SGD, lr=2.0),
        server_scheduler=linear, run_dir=str(tmp_path),
    )  # fmt: skip
    pl.Trainer(
        max_epochs=ROUNDS, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=str(tmp_path),
        limit_val_batches=0, num_sanity_val_steps=0,
    ).fit(whole, datamodule=population())  # fmt: skip
    start = network().state_dict()
    for name, value in whole.network.state_dict().items():
        assert not torch.equal(value, start[name])
        torch.testing.assert_close(lean.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    if method == "flat, fixed":
        assert found["released_ratio"] is None
    else:
        history = whole.run.history
        want = float(division_ratio(history.l1_norm, history.dims).median())
        assert found["released_ratio"] == pytest.approx(want, rel=1e-5)


def test_the_noise_of_a_lean_run_is_that_of_its_epsilon(tmp_path):
    want = lean_rounds.multiplier(1.0, ROUNDS, 1.0, (35, 12))
    # The Gaussian mechanism's own: z = √T·σ of one release with ε = 1, δ = 1e-5.
    assert want == pytest.approx(3.7303 * ROUNDS**0.5, rel=1e-2)
    options = margin.METHODS["flat, fixed"] | {"epsilon": 1.0, "clip_norm": 1e-3}
    lean = MLP(in_features=6, hidden=(500,), num_classes=2)
    before = {n: p.detach().clone() for n, p in lean.named_parameters()}
    lean_rounds.trained(lean, population(), lean_rounds.Plan(options, 1, 1.0, 1.0), 3)
    moved = torch.cat([(p.detach() - before[n]).flatten() for n, p in lean.named_parameters()])
    one = lean_rounds.multiplier(1.0, 1, 1.0, (3500, 1002))
    # Four clients of twenty records: z·C/20 each, a half of that in their mean.
    assert float(moved.std()) == pytest.approx(one * 1e-3 / 20 / 2, rel=0.1)


def test_raw_ratios_are_those_of_the_records_gradients():
    net, data = network(), population()
    raw = lean_rounds.RawRatios(net, data, (1,))
    params = {n: p.detach() for n, p in net.named_parameters()}
    raw(0, params)
    assert raw.found == []
    raw(1, params)
    norms = []
    for x, y in zip(data.x[:64], data.y[:64], strict=True):
        loss = torch.nn.functional.cross_entropy(net(x[None]), y[None])
        grads = torch.autograd.grad(loss, list(net.parameters()))
        norms.append(
            [torch.cat([g.flatten() for g in part]).norm() for part in (grads[:2], grads[2:])]
        )
    want = torch.tensor(norms).median(0).values.double()
    torch.testing.assert_close(torch.tensor(raw.norms[0]).double(), want, rtol=1e-3, atol=0)
    dims = torch.tensor([35.0, 12.0]).double()
    ratio = (want * dims.sqrt()).sum() ** 2 / (want.square().sum() * dims.sum())
    assert raw.found[0] == pytest.approx(float(ratio), rel=1e-3)


def test_one_layer_is_harmed_alike_whatever_the_division():
    net, data = MLP(in_features=6, hidden=(), num_classes=2), population()
    params = {n: p.detach() for n, p in net.named_parameters()}
    assert lean_rounds.harm_ratio(net, params, data, 0.1) == 1.0


def test_harm_is_that_of_the_noise_which_a_division_gives_each_layer():
    """A layer without a gradient gets no noise, but its noise may move nothing: then R alone."""

    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.rest = torch.nn.Linear(6, 2), torch.nn.Linear(6, 40)

        def forward(self, x):
            # Both logits move alike with the rest, so that predictions do not.
            return self.seen(x) + self.rest(x).sum(1, keepdim=True)

    torch.manual_seed(0)
    net, data = Half(), population()
    params = {n: p.detach() for n, p in net.named_parameters()}
    norms = lean_rounds._layer_norms(net, params, data)
    assert norms[1] == pytest.approx(0.0, abs=1e-6)
    # A² = (n/√d)·n·√d = n² = Σ n² in the layer that is seen.
    assert lean_rounds.harm_ratio(net, params, data, 0.05) == pytest.approx(1.0, rel=0.01)


def test_every_method_has_three_trials_and_reads_the_test_records_once(monkeypatch, tmp_path):
    asked = []

    def run(case, method, epsilon, seed, lr, trial):
        asked.append((seed, lr, trial))
        return {"accuracy": -abs(lr - 9.0 * case.lr), "cpu_seconds": 0.0}

    monkeypatch.setattr(margin, "one_run", run)
    study = Study(tmp_path / "found.json")
    for _ in range(2):  # nothing is run again
        margin.tuned(study, "digits, 32-32-32", "AADP: joint, mse", 1.0)
    middle = margin.CASES["digits, 32-32-32"].lr
    assert sorted(lr for _, lr, trial in asked if trial) == [middle, 3 * middle, 9 * middle]
    assert [(s, lr) for s, lr, trial in asked if not trial] == [
        (s, 9 * middle) for s in margin.SEEDS
    ]
    assert margin.TRIAL_SEED not in margin.SEEDS


def test_a_margin_is_paired():
    def runs(method, accuracies):
        facts = {"case": "digits, 32-32-32", "method": method, "epsilon": 1.0, "trial": False}
        return {f"{method} {s}": facts | {"seed": s, "accuracy": a} for s, a in accuracies.items()}

    both = runs(margin.BASE, {1: 50.0, 2: 60.0, 3: 70.0}) | runs(
        "AADP: joint, mse", {1: 51.0, 2: 62.0, 3: 73.0, 4: 99.0}
    )
    mean, half = margin_report.margin(both, "digits, 32-32-32", "AADP: joint, mse", 1.0)
    assert mean == pytest.approx(2.0)
    assert half == pytest.approx(4.303 / 3**0.5)
    assert margin_report.margin(both, "digits, 512-16", "AADP: joint, mse", 1.0) is None


def test_networks_of_both_studies_stand_by_falling_ratio_and_a_head_is_one_layer():
    def runs(case, method, accuracy, ratio):
        facts = {"case": case, "method": method, "epsilon": 1.0, "trial": False}
        more = {"accuracy": accuracy, "raw_ratios": [0.2, ratio, 0.9]}
        return {f"{case} {method} {s}": facts | more | {"seed": s} for s in (1, 2, 3)}

    best = margin_report.RATIO_OF
    here = runs("digits, 256", margin.BASE, 50.0, 0.6) | runs("digits, 256", best, 48.0, 0.5)
    there = runs(lora.LORA, margin.BASE, 50.0, 0.8) | runs(lora.LORA, best, 53.0, 0.5)
    there |= runs(lora.HEAD, margin.BASE, 50.0, 0.4) | runs(lora.HEAD, "flat, quantile", 51.0, 0.4)
    files = {margin.PATH: here, lora.PATH: there}
    found = margin_report.points(files, 1.0)
    assert [(n, p.ratio[1], p.margin[0]) for n, p in found.items()] == [
        ("R8, head alone", 1.0, 1.0),
        ("R8, LoRA, A frozen", 0.8, 3.0),
        ("digits, 256", 0.6, -2.0),
    ]
    rows = margin_report.networks_table(files).splitlines()
    assert rows[2].startswith("| R8, head alone | 1.00 / 1.00 / 1.00 | +1.0 ± 0.0 | - | - |")


def test_every_network_of_the_picture_is_in_its_study():
    for path, case, method, *_ in margin_report.NETWORKS.values():
        if path == margin.PATH:
            assert case in margin.CASES
            assert method in margin.METHODS
        else:
            assert method in lora.METHODS_OF[case]


def test_the_page_shows_the_results():
    assert pages.written(pages.RESULTS, "margin") == margin_report.tables(Study().runs)
    files = {path: Study(path).runs for path in (margin.PATH, lora.PATH)}
    assert pages.written(pages.RESULTS, "margin networks") == margin_report.networks_table(files)
    assert pages.written(pages.RESULTS, "harm") == margin_report.harm_table(Study().runs)
    assert margin_report.IMAGE.exists()
