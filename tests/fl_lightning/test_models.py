"""Models: shapes, layer sizes, which modules hold parameters, configuration, learning."""

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from fl_lightning.data import digits
from fl_lightning.models import CNN, MLP, LogisticRegression, NormalizedCNN, layer_dims

MODELS = [LogisticRegression, MLP, CNN]


@pytest.mark.parametrize(
    ("model", "dims"),
    [
        (LogisticRegression(), {"fc1": 650}),
        (MLP(), {"fc1": 4160, "fc2": 650}),
        (MLP(hidden=[]), {"fc1": 650}),
        (MLP(hidden=(3, 2)), {"fc1": 195, "fc2": 8, "fc3": 30}),
        (CNN(), {"conv1": 272, "fc1": 2570}),
        (CNN(channels=[4], kernel_sizes=[1], strides=[1]), {"conv1": 8, "fc1": 2570}),
        (
            CNN(channels=(4, 6), kernel_sizes=(3, 4), strides=(1, 2), hidden=(5,)),
            {"conv1": 40, "conv2": 390, "fc1": 485, "fc2": 60},
        ),
        (CNN(standardize=True), {"conv1": 272, "fc1": 2570}),
    ],
)
def test_layer_dims_and_output(model, dims):
    assert layer_dims(model) == dims
    assert sum(dims.values()) == sum(p.numel() for p in model.parameters())
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.parametrize("size", [28, 32, 9])
@pytest.mark.parametrize("hidden", [(), (5,)])
def test_cnn_on_other_image_sizes(size, hidden):
    model = CNN(
        in_channels=3,
        num_classes=7,
        image_size=size,
        channels=(4, 8),
        kernel_sizes=(8, 4),
        strides=(2, 2),
        hidden=hidden,
    )
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_each_convolution_divides_the_image_by_its_stride():
    model = CNN(image_size=24, channels=(2, 2), kernel_sizes=(7, 4), strides=(3, 2))
    x = torch.zeros(1, 1, 24, 24)
    assert model.conv1(x).shape == (1, 2, 8, 8)
    assert model.conv2(model.conv1(x)).shape == (1, 2, 4, 4)


def test_standardize_ignores_brightness_and_contrast_of_each_record():
    torch.manual_seed(0)
    model, x = CNN(standardize=True), torch.randn(4, 1, 8, 8)
    changed = x * torch.tensor([1.0, 2.0, 3.0, 0.5]).view(-1, 1, 1, 1) + 7
    torch.testing.assert_close(model(changed), model(x), rtol=1e-3, atol=1e-4)
    plain = CNN()
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(plain(changed), plain(x), atol=1e-2)


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu"])
@pytest.mark.parametrize("make", MODELS)
def test_only_linear_and_conv_hold_parameters(make, activation):
    model = make() if make is LogisticRegression else make(activation=activation)
    holders = {type(m) for m in model.modules() if list(m.parameters(recurse=False))}
    assert holders <= {nn.Linear, nn.Conv2d}
    assert not list(model.buffers())


@pytest.mark.parametrize("make", MODELS)
def test_records_do_not_mix(make):
    torch.manual_seed(0)
    model, x = make(), torch.randn(4, 1, 8, 8)
    changed = x.clone()
    changed[3] = torch.nan
    torch.testing.assert_close(model(changed)[:3], model(x)[:3])


@pytest.mark.parametrize("make", MODELS)
def test_vmap_over_clients_equals_a_loop(make):
    torch.manual_seed(0)
    models, x = [make() for _ in range(3)], torch.randn(3, 5, 1, 8, 8)
    params, _ = torch.func.stack_module_state(models)
    got = torch.func.vmap(lambda p, xk: torch.func.functional_call(models[0], p, (xk,)))(params, x)
    want = torch.stack([model(xk) for model, xk in zip(models, x, strict=True)])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("make", "floor"), [(LogisticRegression, 0.9), (MLP, 0.93), (CNN, 0.93)])
def test_learns_digits(make, floor):
    torch.manual_seed(0)
    data, model = digits(), make()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.x_train), data.y_train).backward()
        optimizer.step()
    accuracy = (model(data.x_test).argmax(1) == data.y_test).float().mean()
    assert accuracy > floor


@pytest.mark.parametrize(
    ("make", "kwargs", "message"),
    [
        (MLP, {"activation": "swish"}, "activation='swish' must be one of tanh, relu, gelu"),
        (MLP, {"hidden": (8, 0)}, "hidden=0"),
        (MLP, {"in_features": 0}, "in_features=0"),
        (LogisticRegression, {"num_classes": 0}, "num_classes=0"),
        (CNN, {"activation": "swish"}, "activation='swish'"),
        (CNN, {"kernel_sizes": (3,)}, r"kernel_sizes=\(3,\) with strides=\(2,\)"),
        (CNN, {"kernel_sizes": (1,)}, r"kernel_sizes=\(1,\) with strides=\(2,\)"),
        (CNN, {"kernel_sizes": (4, 4)}, r"channels=\(16,\), kernel_sizes=\(4, 4\)"),
        (CNN, {"strides": (0,)}, "strides=0"),
        (CNN, {"channels": (0,)}, "channels=0"),
        (CNN, {"image_size": 0}, "image_size=0"),
        (CNN, {"image_size": 1}, "image_size=1"),
        (CNN, {"hidden": (0,)}, "hidden=0"),
    ],
)
def test_refusals(make, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_configured_by_jsonargparse():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "net")
    argv = ["--net=fl_lightning.models.CNN", "--net.channels=[4]", "--net.activation=relu"]
    config = parser.parse_args(argv)
    model = parser.instantiate(config).net
    assert isinstance(model, CNN)
    assert layer_dims(model)["conv1"] == 4 * 16 + 4
    assert parser.parse_string(parser.dump(config)) == config


@pytest.mark.parametrize("standardize_weights", [False, True])
def test_normalized_cnn(standardize_weights):
    torch.manual_seed(0)
    options = {"channels": (8, 12), "kernel_sizes": (4, 4), "strides": (2, 2)}
    model = NormalizedCNN(groups=4, standardize_weights=standardize_weights, **options)
    x = torch.randn(3, 1, 8, 8)
    assert layer_dims(model) == layer_dims(CNN(**options))
    first = model.conv1(x)
    if standardize_weights:
        weight = model.conv1.weight
        flat = weight.flatten(1)
        flat = (flat - flat.mean(1, keepdim=True)) / flat.std(1, unbiased=False, keepdim=True)
        want = nn.functional.conv2d(
            x, flat.view_as(weight) / 16**0.5, model.conv1.bias, stride=2, padding=1
        )
        # The variance of initial weights is 1/48, beside which 1e-6 is small.
        torch.testing.assert_close(first, want, rtol=1e-3, atol=1e-3)
    grouped = first.view(3, 4, -1)
    mean, std = grouped.mean(-1, keepdim=True), grouped.std(-1, unbiased=False, keepdim=True)
    want = ((grouped - mean) / std).view_as(first).tanh()
    torch.testing.assert_close(model.conv_act1(first), want, rtol=1e-3, atol=1e-3)
    alone = torch.cat([model(x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(x), alone)


def test_normalized_cnn_needs_groups_that_divide_the_channels():
    with pytest.raises(ValueError, match="6 is no multiple of groups=4"):
        NormalizedCNN(groups=4, channels=(6,))
    with pytest.raises(ValueError, match="groups=0"):
        NormalizedCNN(groups=0)
