"""Dense, convolutional and normalised networks, and layers with options."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from aadp_kernels import Bias
from tests.networks.blocks import (
    CLASSES,
    CODES,
    LENGTH,
    WIDTH,
    Block,
    Net,
    frozen,
    images,
    tokens,
    vectors,
    volumes,
)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 12), nn.ReLU(), nn.Linear(12, CLASSES))


def _head(features: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(features, CLASSES))


def _around(layer: nn.Module, features: int) -> nn.Module:
    """A convolution before a layer, and a head behind."""
    return nn.Sequential(nn.Conv2d(2, 4, 3), layer, nn.Tanh(), _head(features))


def _parts(**parts: nn.Module) -> nn.Module:
    """Two dense layers around parts that are called one after the other."""

    def run(net: Net, x: Tensor) -> Tensor:
        h = net.first(x)
        for name in parts:
            h = getattr(net, name)(h)
        return net.last(torch.tanh(h))

    return Net(run, first=nn.Linear(WIDTH, WIDTH), last=nn.Linear(WIDTH, CLASSES), **parts)


class _GroupNormBlock(nn.Module):
    """A residual block of ResNet v1 with group normalisation."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(2, out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(2, out)
        self.short = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(h)) + self.short(x), inplace=True)


class _Standardised(nn.Conv2d):
    """A convolution with standardised weights (Qiao et al. 2019)."""

    def forward(self, input: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True) + 1e-5
        return self._conv_forward(input, (self.weight - mean) / std, self.bias)


class _Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).mT


def _symmetric() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    parametrize.register_parametrization(layer, "weight", _Symmetric())
    return _parts(layer=layer)


class _EvalBatchNorm(nn.BatchNorm2d):
    """Frozen batch normalisation, as detection models have it."""

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)


def _frozen_batch_norm() -> nn.Module:
    layer = _EvalBatchNorm(4).eval()
    with torch.no_grad():
        layer.running_mean.normal_()  # pyright: ignore[reportOptionalMemberAccess]
    return _around(frozen(layer), 144)


def _squeeze() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        h = torch.relu(net.conv(x))
        gate = torch.sigmoid(net.up(torch.relu(net.down(h.mean((2, 3))))))
        return net.head(h * gate[:, :, None, None])

    return Net(
        run, conv=nn.Conv2d(2, 4, 3), down=nn.Linear(4, 2), up=nn.Linear(2, 4), head=_head(144)
    )


def _unet() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        high = torch.relu(net.down(x))
        low = torch.relu(net.deep(F.max_pool2d(high, 2)))
        return net.head(torch.cat([high, F.interpolate(low, scale_factor=2)], 1).mean((2, 3)))

    return Net(
        run, down=nn.Conv2d(2, 4, 3, padding=1), deep=nn.Conv2d(4, 4, 3, padding=1),
        head=nn.Linear(8, CLASSES),
    )  # fmt: skip


def _codes(layer: nn.Module, width: int = 4) -> nn.Module:
    """An embedding before a dense head."""
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(LENGTH * width, CLASSES))


def _bag(mode: str) -> nn.Module:
    bag = nn.EmbeddingBag(CODES, WIDTH, mode=mode, padding_idx=0)
    return nn.Sequential(bag, nn.Linear(WIDTH, CLASSES))


def _scaled(parameter: Tensor) -> nn.Module:
    return Net(
        lambda net, x: net.last(torch.tanh(net.first(x))) * net.scale,
        first=nn.Linear(WIDTH, WIDTH), last=nn.Linear(WIDTH, CLASSES),
        scale=nn.Parameter(parameter),
    )  # fmt: skip


def _rezero() -> nn.Module:
    return Net(
        lambda net, x: net.last(x + net.alpha * torch.relu(net.first(x))),
        first=nn.Linear(WIDTH, WIDTH), last=nn.Linear(WIDTH, CLASSES),
        alpha=nn.Parameter(torch.tensor(0.0)),
    )  # fmt: skip


def _gated() -> nn.Module:
    return Net(
        lambda net, x: net.down(F.silu(net.gate(x)) * net.up(x)),
        gate=nn.Linear(WIDTH, 12), up=nn.Linear(WIDTH, 12), down=nn.Linear(12, CLASSES),
    )  # fmt: skip


def _checkpointed(reentrant: bool) -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        h = net.first(x)
        return net.last(checkpoint(lambda z: torch.tanh(net.body(z)), h, use_reentrant=reentrant))

    return Net(
        run, first=nn.Linear(WIDTH, WIDTH), body=nn.Linear(WIDTH, 12), last=nn.Linear(12, CLASSES)
    )


def _complex() -> nn.Module:
    return Net(
        lambda net, x: net.head(net.rotate(torch.fft.rfft(x)).abs()),
        rotate=nn.Linear(WIDTH // 2 + 1, 6, dtype=torch.complex64), head=nn.Linear(6, CLASSES),
    )  # fmt: skip


def _compiled() -> nn.Module:
    inner = torch.compile(nn.Sequential(nn.Linear(WIDTH, 12), nn.Tanh()), backend="eager")
    return Net(lambda net, x: net.head(net.inner(x)), inner=inner, head=nn.Linear(12, CLASSES))


def _frozen_body() -> nn.Module:
    body = frozen(nn.Sequential(nn.Linear(WIDTH, 12), nn.Tanh()))
    return nn.Sequential(body, nn.Linear(12, CLASSES))


def _half_frozen() -> nn.Module:
    network = _mlp()
    network[0].weight.requires_grad_(False)  # pyright: ignore[reportIndexIssue]
    return network


def _unused() -> nn.Module:
    return Net(
        lambda net, x: net.used(x),
        used=nn.Linear(WIDTH, CLASSES), spare=nn.Linear(WIDTH, CLASSES),
    )  # fmt: skip


def _dropout(layer: nn.Module) -> nn.Module:
    return _around(layer, 144)


BLOCKS = (
    Block("MLP", vectors, _mlp),
    Block("CNN", images, lambda: _around(nn.MaxPool2d(2), 36)),
    Block("strided, dilated and circular convolutions", images, lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.Tanh(),
        nn.Conv2d(4, 4, 3, stride=2, dilation=2, padding="valid"), nn.Tanh(), _head(16))),
    Block("depthwise separable convolution", images, lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), _head(144))),
    Block("grouped convolution", images, lambda: _around(nn.Conv2d(4, 4, 3, groups=2), 64)),
    Block("transposed convolution", images, lambda: _around(nn.ConvTranspose2d(4, 2, 2), 98)),
    Block("1-D convolution", vectors, lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 4, 3, padding=1), nn.Tanh(), _head(16))),
    Block("3-D convolution", volumes, lambda: nn.Sequential(
        nn.Conv3d(1, 3, 3), nn.Tanh(), _head(24))),
    Block("weight-standardised convolution", images, lambda: nn.Sequential(
        _Standardised(2, 4, 3), nn.Tanh(), _head(144))),
    Block("squeeze and excitation", images, _squeeze),
    Block("U-net", images, _unet),
    Block("ResNet with group normalisation", images, lambda: nn.Sequential(
        _GroupNormBlock(2, 4, 1), _GroupNormBlock(4, 8, 2), nn.AdaptiveAvgPool2d(1), _head(8))),
    Block("layer normalisation", vectors, lambda: _parts(norm=nn.LayerNorm(WIDTH))),
    Block("RMS normalisation", vectors, lambda: _parts(norm=nn.RMSNorm(WIDTH))),
    Block("group normalisation", images, lambda: _around(nn.GroupNorm(2, 4), 144)),
    Block("instance normalisation", images, lambda: _around(
        nn.InstanceNorm2d(4, affine=True), 144)),
    Block("instance normalisation, running statistics", images, lambda: _around(
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True), 144)),
    Block("batch normalisation", images, lambda: _around(nn.BatchNorm2d(4), 144)),
    Block("batch normalisation without statistics", images, lambda: _around(
        nn.BatchNorm2d(4, track_running_stats=False), 144)),
    Block("batch normalisation, frozen in eval mode", images, _frozen_batch_norm),
    Block("local response normalisation", images, lambda: _around(nn.LocalResponseNorm(2), 144)),
    Block("weight_norm", vectors, lambda: _parts(
        layer=parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)))),
    Block("spectral_norm", vectors, lambda: _parts(
        layer=parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)))),
    Block("orthogonal", vectors, lambda: _parts(
        layer=parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH)))),
    Block("own parametrization (symmetric)", vectors, _symmetric),
    Block("PReLU", vectors, lambda: _parts(act=nn.PReLU())),
    Block("learned temperature, 0-d", vectors, lambda: _scaled(torch.tensor(1.0))),
    Block("LayerScale", vectors, lambda: _scaled(torch.ones(CLASSES))),
    Block("parameter [1, 1, 3]", vectors, lambda: nn.Sequential(
        _scaled(torch.ones(1, 1, CLASSES)), nn.Flatten(0, 1))),
    Block("ReZero", vectors, _rezero),
    Block("aadp_kernels.Bias", vectors, lambda: _parts(bias=Bias(WIDTH))),
    Block("SwiGLU", vectors, _gated),
    Block("Bilinear", vectors, lambda: Net(
        lambda net, x: net.pair(x, x.square()), pair=nn.Bilinear(WIDTH, WIDTH, CLASSES))),
    Block("Embedding, padding_idx", tokens, lambda: _codes(
        nn.Embedding(CODES, 4, padding_idx=0))),
    Block("Embedding, max_norm", tokens, lambda: _codes(nn.Embedding(CODES, 4, max_norm=1.0))),
    Block("Embedding, sparse", tokens, lambda: _codes(nn.Embedding(CODES, 4, sparse=True))),
    Block("Embedding, scale_grad_by_freq", tokens, lambda: _codes(
        nn.Embedding(CODES, 4, scale_grad_by_freq=True))),
    Block("EmbeddingBag, mean", tokens, lambda: _bag("mean")),
    Block("EmbeddingBag, sum", tokens, lambda: _bag("sum")),
    Block("dropout", images, lambda: _dropout(nn.Dropout(0.25))),
    Block("dropout of channels", images, lambda: _dropout(nn.Dropout2d(0.25))),
    Block("AlphaDropout", vectors, lambda: _parts(drop=nn.AlphaDropout(0.2))),
    Block("frozen body", vectors, _frozen_body),
    Block("frozen weight, trained bias", vectors, _half_frozen),
    Block("unused layer", vectors, _unused),
    Block("checkpointed activations", vectors, lambda: _checkpointed(False)),
    Block("checkpointed activations, reentrant", vectors, lambda: _checkpointed(True)),
    Block("complex layer", vectors, _complex),
    Block("lazy layers", vectors, lambda: nn.Sequential(
        nn.LazyLinear(12), nn.Tanh(), nn.LazyLinear(CLASSES))),
    Block("torch.compile of a part", vectors, _compiled),
    Block("one layer", vectors, lambda: nn.Linear(WIDTH, CLASSES)),
    Block("float64", vectors, lambda: _mlp().double()),
)  # fmt: skip
