"""The server's mean: FedAvg weights, precision weights, one weight a layer, groups of clients."""

import math

import pytest
import torch
from torch import nn

from aadp_kernels import Layout
from fl_lightning import PrivacyConfig
from fl_lightning.server.aggregate import WeightedMean, client_weights
from fl_lightning.values.round import LayerPolicy

SIZES = torch.tensor([10, 30, 60])
NETWORK = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))
LAYOUT = Layout.build(dict(NETWORK.named_parameters()))


def updates(k=3):
    generator = torch.Generator().manual_seed(2)
    return {n: torch.randn(k, *p.shape, generator=generator) for n, p in NETWORK.named_parameters()}


def weights(rule, policy=None, batch=SIZES):
    return client_weights(
        rule, client_sizes=SIZES, expected_batch=batch, policy=policy, num_layers=2
    )


def policy(scale):
    ones = torch.ones(3, 2, dtype=torch.float64)
    return LayerPolicy(ones, ones / 2, ones / 2, torch.tensor(scale, dtype=torch.float64))


def mean(update, weight, groups=((0, 1, 2),)):
    average = WeightedMean(LAYOUT)
    for rows in groups:
        rows = list(rows)
        average.add({n: v[rows] for n, v in update.items()}, weight[rows])
    average.write_gradient(NETWORK)
    return {n: p.grad.clone() for n, p in NETWORK.named_parameters()}


@pytest.mark.parametrize(
    ("rule", "factors"), [("records", [0.1, 0.3, 0.6]), ("uniform", [1 / 3] * 3)]
)
def test_server_sgd_with_rate_one_is_fedavg(rule, factors):
    update = updates()
    grads = mean(update, weights(rule))
    for name, value in update.items():
        want = sum(f * v for f, v in zip(factors, value, strict=True))
        torch.testing.assert_close(-grads[name], want)


def test_precision_minimises_the_variance_of_each_layer():
    scale = [[1.0, 4.0], [2.0, 2.0], [3.0, 1.0]]
    batch = torch.tensor([5.0, 10.0, 20.0])
    got = weights("precision", policy(scale), batch)
    got = got / got.sum(0)
    variance = (torch.tensor(scale, dtype=torch.float64) / batch[:, None]).square()

    def spread(w):
        return (w.square() * variance).sum(0)

    torch.testing.assert_close(spread(got), 1 / (1 / variance).sum(0))
    for i in range(3):
        moved = got.clone()
        moved[i] += 0.01
        assert bool((spread(moved / moved.sum(0)) > spread(got)).all())


def test_precision_without_noise_is_uniform():
    torch.testing.assert_close(weights("precision"), weights("uniform"))
    silent = policy([[0.0, 0.0]] * 3)
    torch.testing.assert_close(weights("precision", silent), weights("uniform"))


def test_each_layer_is_divided_by_its_own_weight():
    update = updates()
    weight = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 5.0]], dtype=torch.float64)
    grads = mean(update, weight)
    bias = update["0.bias"]
    torch.testing.assert_close(-grads["0.bias"], (bias[0] + 2 * bias[1] + bias[2]) / 4)
    torch.testing.assert_close(-grads["1.weight"], update["1.weight"][2])


def test_groups_of_clients_give_the_same_mean():
    update, weight = updates(), weights("records")
    whole, parts = mean(update, weight), mean(update, weight, groups=((0,), (1, 2)))
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name])
        assert math.isfinite(whole[name].sum())


def test_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="weighting='best'"):
        weights("best")


def test_noise_of_records_is_divided_by_their_batch_and_of_updates_by_nothing(
    federation, population
):
    """So clients of other sizes but equal noise weigh the same when whole updates are noised."""
    data = federation(partition="dirichlet")
    clients = torch.arange(3)
    batches = [
        population(
            data,
            nn.Linear(8, 3),
            PrivacyConfig(setting=setting, epsilon=None, noise_multiplier=1.0, seed=0),
            sampling_rate=0.5,
        ).clients.expected_batch(clients)
        for setting in ("record+local", "client+local")
    ]
    torch.testing.assert_close(batches[0], 0.5 * data.client_sizes)
    assert batches[1].tolist() == [1.0, 1.0, 1.0]
