"""Small models for per-layer clipping: only Linear and Conv2d carry parameters.

Tanh bounds activations, which suits clipped training (Papernot et al., 2021, arXiv:2007.14191).
Pooling is by average: it is linear, so nothing depends on which of two nearly equal inputs wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

Activation = Literal["tanh", "relu", "gelu"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}


def layer_dims(model: nn.Module) -> dict[str, int]:
    """d_l: trainable parameters of each module that has any of its own, in order, by name."""
    dims = {
        name: sum(p.numel() for p in module.parameters(recurse=False) if p.requires_grad)
        for name, module in model.named_modules()
    }
    return {name: dim for name, dim in dims.items() if dim}


def _activation(name: str) -> nn.Module:
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation={name!r} must be one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]()


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be >= 1")


class _Chain(nn.Module):
    """Applies its children in the order in which they were assigned."""

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


class LogisticRegression(_Chain):
    """Softmax regression on flattened records: [B, ...] -> logits [B, num_classes].

    Layers by default: fc1 650 parameters.

    Args:
        in_features: numbers per record; the default suits 8x8 digits.
        num_classes: number of classes.
    """

    def __init__(self, in_features: int = 64, num_classes: int = 10) -> None:
        super().__init__()
        _check_positive(in_features=in_features, num_classes=num_classes)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(in_features, num_classes)


class MLP(_Chain):
    """Dense layers on flattened records: [B, ...] -> logits [B, num_classes].

    Layers by default: fc1 4160 parameters, fc2 650.

    Args:
        in_features: numbers per record; the default suits 8x8 digits.
        num_classes: number of classes.
        hidden: widths of the hidden layers; an empty list is softmax regression.
        activation: tanh, relu or gelu.
    """

    def __init__(
        self,
        in_features: int = 64,
        num_classes: int = 10,
        hidden: Sequence[int] = (64,),
        activation: Activation = "tanh",
    ) -> None:
        super().__init__()
        _check_positive(in_features=in_features, num_classes=num_classes)
        self.flatten = nn.Flatten()
        width = in_features
        for i, size in enumerate(hidden, 1):
            _check_positive(hidden=size)
            self.add_module(f"fc{i}", nn.Linear(width, size))
            self.add_module(f"act{i}", _activation(activation))
            width = size
        self.add_module(f"fc{len(hidden) + 1}", nn.Linear(width, num_classes))


class CNN(_Chain):
    """Convolutions with 2x2 average pooling, then two dense layers, on square images.

    [B, in_channels, image_size, image_size] -> logits [B, num_classes].
    Layers by default: conv1 160 parameters, conv2 4640, fc1 4128, fc2 330.

    Args:
        in_channels: channels of the images; the default suits grey ones.
        num_classes: number of classes.
        image_size: height and width in pixels; the default suits 8x8 digits.
        channels: output channels of each convolution; every one halves the image.
        hidden: width of the hidden dense layer.
        kernel_size: height and width of the convolutions in pixels, odd.
        activation: tanh, relu or gelu.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 8,
        channels: Sequence[int] = (16, 32),
        hidden: int = 32,
        kernel_size: int = 3,
        activation: Activation = "tanh",
    ) -> None:
        super().__init__()
        _check_positive(in_channels=in_channels, num_classes=num_classes, hidden=hidden)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd and >= 1")
        side = image_size >> len(channels)
        if side < 1:
            raise ValueError(
                f"image_size={image_size} is too small to be halved {len(channels)} times"
            )
        width = in_channels
        for i, size in enumerate(channels, 1):
            _check_positive(channels=size)
            conv = nn.Conv2d(width, size, kernel_size, padding=kernel_size // 2)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"conv_act{i}", _activation(activation))
            self.add_module(f"pool{i}", nn.AvgPool2d(2))
            width = size
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(width * side * side, hidden)
        self.fc_act1 = _activation(activation)
        self.fc2 = nn.Linear(hidden, num_classes)
