"""Networks that use parts several times, by other ways, or that mix records; outputs of all kinds.

"mixes records" in a name says that no clipping of single records can be right.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks.blocks import CLASSES, CODES, WIDTH, Block, Net, images, series, tokens, vectors


def _dense() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def _head() -> nn.Linear:
    return nn.Linear(WIDTH, CLASSES)


def _between(run: Any, **parts: Any) -> nn.Module:
    """A dense layer, what `run(net, h)` does, and a head."""
    return Net(
        lambda net, x: net.head(torch.tanh(run(net, net.first(x)))),
        first=_dense(), head=_head(), **parts,
    )  # fmt: skip


def _tied() -> nn.Module:
    encoder, decoder = _dense(), _dense()
    decoder.weight = encoder.weight
    return Net(
        lambda net, x: net.head(torch.tanh(net.decoder(torch.tanh(net.encoder(x))))),
        encoder=encoder, decoder=decoder, head=_head(),
    )  # fmt: skip


def _autoencoder() -> nn.Module:
    """The decoder is the transposed encoder."""
    return Net(
        lambda net, x: net.head(torch.tanh(F.linear(torch.tanh(net.encoder(x)),
                                                    net.encoder.weight.T))),
        encoder=nn.Linear(WIDTH, 5), head=_head(),
    )  # fmt: skip


def _language_model() -> nn.Module:
    """Embedding and softmax share their weight; the first classes are the labels."""
    return Net(
        lambda net, x: F.linear(torch.tanh(net.body(net.embed(x).mean(1))), net.embed.weight),
        embed=nn.Embedding(CODES, WIDTH), body=_dense(),
    )  # fmt: skip


def _language_model_of_layers() -> nn.Module:
    embed, head = nn.Embedding(CODES, WIDTH), nn.Linear(WIDTH, CODES, bias=False)
    head.weight = embed.weight
    return Net(
        lambda net, x: net.head(torch.tanh(net.body(net.embed(x).mean(1)))),
        embed=embed, body=_dense(), head=head,
    )  # fmt: skip


def _siamese() -> nn.Module:
    return Net(
        lambda net, x: net.head((net.tower(x[:, 0]) - net.tower(x[:, 1])).abs()),
        tower=nn.Sequential(_dense(), nn.Tanh(), _dense()), head=_head(),
    )  # fmt: skip


def _equilibrium() -> nn.Module:
    def run(net: Any, h: Tensor) -> Tensor:
        z = torch.zeros_like(h)
        for _ in range(6):
            z = torch.tanh(0.5 * net.state(z) + h)
        return z

    return _between(run, state=_dense())


def _experts(top: bool) -> nn.Module:
    """A mixture of experts: each record goes to its best expert alone, or to all with weights."""

    def run(net: Any, h: Tensor) -> Tensor:
        gate = torch.softmax(net.gate(h), -1)
        if not top:
            return sum(gate[:, i, None] * e(h) for i, e in enumerate(net.experts))  # type: ignore
        out = torch.zeros_like(h)
        weight, best = gate.max(-1)
        for i, expert in enumerate(net.experts):
            rows = (best == i).nonzero()[:, 0]
            out = out.index_add(0, rows, weight[rows, None] * expert(h[rows]))
        return out

    return _between(run, gate=nn.Linear(WIDTH, 3), experts=nn.ModuleList(_dense() for _ in "abc"))


def _depth(by: str) -> nn.Module:
    """Stochastic depth: a layer is left out for a whole batch, or for single records."""

    def run(net: Any, h: Tensor) -> Tensor:
        if not net.training:
            return h + 0.5 * torch.tanh(net.layer(h))
        shape = (len(h), 1) if by == "record" else (1, 1)
        return h + torch.bernoulli(h.new_full(shape, 0.5)) * torch.tanh(net.layer(h))

    return _between(run, layer=_dense())


def _skipped_by_value() -> nn.Module:
    """Early exit: records that are sure do without the second layer."""

    def run(net: Any, h: Tensor) -> Tensor:
        sure = h.amax(1, keepdim=True) > 1
        return torch.where(sure, h, torch.tanh(net.layer(h)))

    return _between(run, layer=_dense())


class _Reverse(torch.autograd.Function):
    """Gradient reversal (Ganin & Lempitsky 2015)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return -grads[0]


class _NormalisedBackward(torch.autograd.Function):
    """Scales the gradient of the whole batch to norm 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] / (grads[0].norm() + 1e-6)


def _hooked(tensor_hook: bool) -> nn.Module:
    """A backward hook that divides by the norm of the batch's gradient."""

    def hook(g: Tensor) -> Tensor:
        return g / (g.norm() + 1e-6)

    def run(net: Any, h: Tensor) -> Tensor:
        h = net.layer(h)
        if tensor_hook and h.requires_grad:
            h.register_hook(hook)
        return h

    layer = _dense()
    if not tensor_hook:
        layer.register_full_backward_hook(lambda _, gi, __: (hook(gi[0]),))
    return _between(run, layer=layer)


def _forward_hooks() -> nn.Module:
    layer = _dense()
    layer.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
    layer.register_forward_hook(lambda _, __, output: output.relu_())
    return _between(lambda net, h: net.layer(h), layer=layer)


class _BCE(nn.Module):
    """Binary cross entropy of one logit: is it class 0?"""

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        wanted = (labels == 0).to(outputs.dtype)
        return F.binary_cross_entropy_with_logits(
            outputs.reshape(len(labels)), wanted, reduction="none"
        )


class _TupleLoss(nn.Module):
    def forward(self, outputs: Any, labels: Tensor) -> Tensor:
        main, aux = outputs if isinstance(outputs, tuple) else (outputs["logits"], outputs["aux"])
        return F.cross_entropy(main, labels, reduction="none") + 0.3 * F.cross_entropy(
            aux, labels, reduction="none"
        )


class _WeightedLoss(nn.Module):
    """Cross entropy with a trainable scale, which no client trains."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return self.scale * F.cross_entropy(outputs, labels, reduction="none")


class _Contrastive(nn.Module):
    """Each record's similarity to the others of the batch."""

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        similar = outputs @ outputs.T / 3
        return F.cross_entropy(
            similar, torch.arange(len(labels), device=labels.device), reduction="none"
        )


def _auxiliary(kind: type) -> nn.Module:
    def run(net: Any, x: Tensor) -> Any:
        h = torch.tanh(net.first(x))
        found = net.main(h), net.aux(h)
        return found if kind is tuple else dict(zip(("logits", "aux"), found, strict=True))

    return Net(run, first=_dense(), main=_head(), aux=_head())


def _one_logit(squeezed: bool) -> nn.Module:
    return Net(
        lambda net, x: net.fc(x).squeeze(-1) if squeezed else net.fc(x), fc=nn.Linear(WIDTH, 1)
    )


def _two_names() -> nn.Module:
    layer = _dense()
    return _between(lambda net, h: net.second(torch.tanh(net.layer(h))), layer=layer, second=layer)


def _hyper() -> nn.Module:
    """A network that makes each record's weights."""

    def run(net: Any, h: Tensor) -> Tensor:
        weight = net.maker(h).view(len(h), WIDTH, WIDTH)
        return torch.einsum("bij,bj->bi", weight, h)

    return _between(run, maker=nn.Linear(WIDTH, WIDTH * WIDTH))


def _graph() -> nn.Module:
    """A graph convolution over a record's nodes."""
    ring = torch.eye(6).roll(1, 0) + torch.eye(6)
    return Net(
        lambda net, x: net.outer((ring.to(x) @ torch.relu(ring.to(x) @ net.inner(x))).mean(1)),
        inner=nn.Linear(WIDTH, 12), outer=nn.Linear(12, CLASSES),
    )  # fmt: skip


BLOCKS = (
    Block("tied layers", vectors, _tied),
    Block("tied autoencoder, F.linear", vectors, _autoencoder),
    Block("tied embedding and softmax, F.linear", tokens, _language_model),
    Block("tied embedding and softmax, layers", tokens, _language_model_of_layers),
    Block("one layer under two names", vectors, _two_names),
    Block("siamese towers", series, _siamese),
    Block("residual layer used three times", vectors, lambda: _between(
        lambda net, h: [h := h + torch.tanh(net.layer(h)) for _ in range(3)][-1],
        layer=_dense())),
    Block("equilibrium (one layer to a fixed point)", vectors, _equilibrium),
    Block("mixture of experts, all with weights", vectors, lambda: _experts(False)),
    Block("mixture of experts, routed by the record", vectors, lambda: _experts(True)),
    Block("stochastic depth of the batch", vectors, lambda: _depth("batch")),
    Block("stochastic depth of records", vectors, lambda: _depth("record")),
    Block("early exit by value", vectors, _skipped_by_value),
    Block("hypernetwork", vectors, _hyper),
    Block("graph convolution", series, _graph),
    Block("forward hooks", vectors, _forward_hooks),
    Block("gradient reversal (autograd.Function)", vectors, lambda: _between(
        lambda net, h: _Reverse.apply(h))),
    Block("straight-through rounding", vectors, lambda: _between(
        lambda net, h: h + (h.round() - h).detach())),
    Block("two outputs, tuple", vectors, lambda: _auxiliary(tuple), _TupleLoss),
    Block("two outputs, dict", vectors, lambda: _auxiliary(dict), _TupleLoss),
    Block("one logit [B, 1]", vectors, lambda: _one_logit(False), _BCE, classes=2),
    Block("one logit [B]", vectors, lambda: _one_logit(True), _BCE, classes=2),
    Block("loss with a parameter", vectors, lambda: _between(lambda net, h: h), _WeightedLoss),
    Block("batch centring (mixes records)", vectors, lambda: _between(
        lambda net, h: h - h.mean(0))),
    Block("contrastive loss (mixes records)", vectors, lambda: _between(
        lambda net, h: h), _Contrastive),
    Block("shuffled features (mixes records)", images, lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), Net(lambda net, x: 0.5 * (x + x.roll(1, 0))), nn.Flatten(),
        nn.Linear(144, CLASSES))),
    Block("centred gradients (mixes records)", vectors, lambda: _between(
        lambda net, h: h - h.mean(0) + h.mean(0).detach())),
    Block("normalised gradients, tensor hook (mixes records)", vectors, lambda: _hooked(True)),
    Block("normalised gradients, module hook (mixes records)", vectors, lambda: _hooked(False)),
    Block("normalised gradients, autograd.Function (mixes records)", vectors, lambda: _between(
        lambda net, h: _NormalisedBackward.apply(h))),
)  # fmt: skip
