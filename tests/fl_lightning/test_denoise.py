"""Shrinking the mean by what is noise in it: known variance, whole runs, refusals."""

import pytest
import torch
from torch import nn

from aadp_kernels import Layout
from fl_lightning.models import MLP
from fl_lightning.server.aggregate import WeightedMean, noise_variance
from fl_lightning.values.round import LayerPolicy

SETTINGS = ["record+local", "client+local"]


def wide_network():
    torch.manual_seed(0)
    return MLP(in_features=8, hidden=(600,), num_classes=3)


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("weighting", ["records", "precision"])
def test_noise_alone_has_the_energy_that_is_taken_away(
    federation, fit, monkeypatch, setting, mechanism, weighting
):
    """Energy of pure noise over what is expected: within 10 % of 1; 2/3 and 3/2 are not."""
    seen = []
    signal = WeightedMean.signal

    def watched(self):
        energy = torch.zeros_like(self.weight)
        for name, layer in zip(self.layout.names, self.layout.layer_of, strict=True):
            energy[layer] += self.total[name].double().square().sum()
        seen.append(energy / (torch.tensor(self.layout.dims) * self.variance))
        return signal(self)

    monkeypatch.setattr(WeightedMean, "signal", watched)
    data = federation(clients=4, partition="quantity", alpha=5.0)
    options = {"denoise": True, "client_lr": 0.3, "weighting": weighting, "sampling_rate": 0.5}
    fit(
        data, wide_network(), rounds=3, module_kwargs=options, setting=setting, thresholds="fixed",
        mechanism=mechanism, clip_norm=[0.01, 0.02], allocation="contribution",
        noise_multiplier=300.0,
    )  # fmt: skip
    assert len(seen) == 3
    ratio = torch.stack(seen).mean(0)
    assert float((ratio - 1).abs().max()) < 0.1, ratio


def test_shrinkage_takes_the_noise_out_of_a_known_mean():
    """At an energy of signal s and of noise n the factor is about s / (s + n)."""
    network = nn.Sequential(nn.Linear(400, 50, bias=False), nn.Linear(50, 300, bias=False))
    layout = Layout.build(dict(network.named_parameters()))
    generator = torch.Generator().manual_seed(0)
    mean = WeightedMean(layout)
    truth = {n: torch.randn(p.shape, generator=generator) for n, p in network.named_parameters()}
    scale = torch.tensor([[1.0, 3.0], [2.0, 0.5]], dtype=torch.float64)
    policy = LayerPolicy(scale, scale, scale, scale)
    variance = noise_variance(policy, "gaussian", torch.ones(2))
    draws = {
        n: v + torch.randn(2, *v.shape, generator=generator) * scale[:, i].float().view(2, 1, 1)
        for i, (n, v) in enumerate(truth.items())
    }
    weights = torch.tensor([[1.0, 2.0], [3.0, 2.0]], dtype=torch.float64)
    mean.add({n: v[:1] for n, v in draws.items()}, weights[:1], variance[:1])
    mean.add({n: v[1:] for n, v in draws.items()}, weights[1:], variance[1:])
    expected_noise = (weights.square() * scale.square()).sum(0) / weights.sum(0).square()
    torch.testing.assert_close(mean.signal(), 1 / (1 + expected_noise), rtol=0.1, atol=0)
    mean.write_gradient(network)
    plain = [p.grad.clone() for p in network.parameters()]
    mean.write_gradient(network, denoise=True)
    for p, grad, share, want in zip(
        network.parameters(), plain, mean.signal(), truth.values(), strict=True
    ):
        torch.testing.assert_close(p.grad, grad * float(share))
        assert (p.grad + want).norm() < (grad + want).norm()


def test_without_noise_nothing_is_taken_away(federation, fit):
    found = []
    for denoise in (False, True):
        torch.manual_seed(0)
        network = nn.Linear(8, 3)
        options = {"noise_multiplier": 0.0, "thresholds": "fixed", "clip_norm": 1.0}
        fit(federation(), network, module_kwargs={"denoise": denoise}, **options)
        found.append(network.weight.detach().clone())
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("options", "privacy", "message"),
    [
        ({}, {"setting": "none"}, "denoise=True with setting='none'"),
        ({}, {"setting": "client+aggregator"}, r"denoise=True with setting='client\+aggregator'"),
        ({"local_steps": 2}, {}, "denoise=True with local_steps=2"),
        ({"local_steps": None}, {}, "denoise=True with local_steps=None"),
    ],
)
def test_denoising_needs_noise_that_is_known(federation, fit, options, privacy, message):
    privacy = {"noise_multiplier": 1.0} | privacy
    with pytest.raises(ValueError, match=message):
        fit(federation(), nn.Linear(8, 3), module_kwargs={"denoise": True} | options, **privacy)
