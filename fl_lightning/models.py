"""Small models for per-layer clipping: only Linear and Conv2d carry parameters.

Tanh bounds activations, which suits clipped training (Papernot et al., 2021, arXiv:2007.14191).
Strided convolutions take the place of pooling: fewer positions, so less work a record.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
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
        standardize: whether each record is shifted and scaled to mean 0 and variance 1 by itself,
            which needs no statistics of the data.
    """

    def __init__(
        self,
        in_features: int = 64,
        num_classes: int = 10,
        hidden: Sequence[int] = (64,),
        activation: Activation = "tanh",
        standardize: bool = False,
    ) -> None:
        super().__init__()
        _check_positive(in_features=in_features, num_classes=num_classes)
        self.flatten = nn.Flatten()
        if standardize:
            self.standardize = nn.LayerNorm(in_features, elementwise_affine=False)
        width = in_features
        for i, size in enumerate(hidden, 1):
            _check_positive(hidden=size)
            self.add_module(f"fc{i}", nn.Linear(width, size))
            self.add_module(f"act{i}", _activation(activation))
            width = size
        self.add_module(f"fc{len(hidden) + 1}", nn.Linear(width, num_classes))


class CNN(_Chain):
    """Strided convolutions, then dense layers, on square images.

    [B, in_channels, image_size, image_size] -> logits [B, num_classes]. Every convolution is
    padded by (kernel - stride) / 2, so that it divides the size of the image by its stride.
    Layers by default: conv1 272 parameters, fc1 2570.

    Args:
        in_channels: channels of the images; the default suits grey ones.
        num_classes: number of classes.
        image_size: height and width in pixels; the default suits 8x8 digits.
        channels: output channels of each convolution.
        kernel_sizes: height and width of each convolution in pixels.
        strides: step of each convolution in pixels; kernel - stride must be even and >= 0.
        hidden: widths of the hidden dense layers; an empty list is none.
        activation: tanh, relu or gelu.
        standardize: whether each record is shifted and scaled to mean 0 and variance 1 by itself,
            which needs no statistics of the data.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 8,
        channels: Sequence[int] = (16,),
        kernel_sizes: Sequence[int] = (4,),
        strides: Sequence[int] = (2,),
        hidden: Sequence[int] = (),
        activation: Activation = "tanh",
        standardize: bool = False,
    ) -> None:
        super().__init__()
        _check_positive(in_channels=in_channels, num_classes=num_classes, image_size=image_size)
        if not len(channels) == len(kernel_sizes) == len(strides):
            raise ValueError(
                f"channels={channels}, kernel_sizes={kernel_sizes} and strides={strides} must have "
                "one number for each convolution"
            )
        if standardize:
            shape = [in_channels, image_size, image_size]
            self.standardize = nn.LayerNorm(shape, elementwise_affine=False)
        width, side = in_channels, image_size
        convolutions = zip(channels, kernel_sizes, strides, strict=True)
        for i, (size, kernel, stride) in enumerate(convolutions, 1):
            _check_positive(channels=size, kernel_sizes=kernel, strides=stride)
            if kernel < stride or (kernel - stride) % 2:
                raise ValueError(
                    f"kernel_sizes={kernel_sizes} with strides={strides}: kernel - stride must be "
                    "even and >= 0"
                )
            padding = (kernel - stride) // 2
            conv = nn.Conv2d(width, size, kernel, stride=stride, padding=padding)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"conv_act{i}", _activation(activation))
            width, side = size, (side + 2 * padding - kernel) // stride + 1
            if side < 1:
                raise ValueError(f"image_size={image_size} is too small for strides={strides}")
        self.flatten = nn.Flatten()
        width *= side * side
        for i, size in enumerate(hidden, 1):
            _check_positive(hidden=size)
            self.add_module(f"fc{i}", nn.Linear(width, size))
            self.add_module(f"act{i}", _activation(activation))
            width = size
        self.add_module(f"fc{len(hidden) + 1}", nn.Linear(width, num_classes))


class StandardizedConv2d(nn.Conv2d):
    """A convolution by weights of mean 0 and variance 1 an output channel (arXiv:1903.10520)."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, in_channels, H, W] → [B, out_channels, H', W']."""
        axes = (1, 2, 3)
        variance, mean = torch.var_mean(self.weight, axes, unbiased=False, keepdim=True)
        count = self.weight[0].numel()
        # Divided by the root of the fan-in too, so that outputs have the size of the inputs.
        weight = (self.weight - mean) / (variance + 1e-6).sqrt() / count**0.5
        return self._conv_forward(input, weight, self.bias)


class NormalizedCNN(CNN):
    """A CNN whose convolutions are followed by group normalisation without parameters.

    Args:
        groups: groups of channels of a record that are normalised together; each of `channels`
            must be a multiple of it.
        standardize_weights: whether weights of convolutions are standardised. Such layers do not
            clip in backward: gradients are then computed record by record, which is slower.
        options: those of `CNN`.
    """

    def __init__(self, groups: int = 4, standardize_weights: bool = False, **options: Any) -> None:
        super().__init__(**options)
        _check_positive(groups=groups)
        for name, conv in list(self.named_children()):
            if not isinstance(conv, nn.Conv2d):
                continue
            if conv.out_channels % groups:
                raise ValueError(f"channels: {conv.out_channels} is no multiple of groups={groups}")
            if standardize_weights:
                conv.__class__ = StandardizedConv2d
            after = name.replace("conv", "conv_act")
            norm = nn.GroupNorm(groups, conv.out_channels, affine=False)
            setattr(self, after, nn.Sequential(norm, getattr(self, after)))
