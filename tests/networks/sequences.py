"""Recurrent networks and attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aadp_kernels import Bias
from tests.networks.blocks import CLASSES, CODES, LENGTH, WIDTH, Block, Net, images, series, tokens

HEADS = 2


def _recurrent(layer: nn.Module, width: int = WIDTH) -> nn.Module:
    """The last state of a recurrent layer, and a head."""
    return Net(
        lambda net, x: net.head(net.layer(x)[0][:, -1]),
        layer=layer, head=nn.Linear(width, CLASSES),
    )  # fmt: skip


def _cell(cell: nn.Module) -> nn.Module:
    """A cell that is called once a position."""

    def run(net: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), WIDTH)
        state: Any = (h, h) if isinstance(net.cell, nn.LSTMCell) else h
        for t in range(x.shape[1]):
            state = net.cell(x[:, t], state)
        return net.head(state[0] if isinstance(state, tuple) else state)

    return Net(run, cell=cell, head=nn.Linear(WIDTH, CLASSES))


def _elman() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), WIDTH)
        for t in range(x.shape[1]):
            h = torch.tanh(net.inner(x[:, t]) + net.state(h))
        return net.head(h)

    return Net(
        run, inner=nn.Linear(WIDTH, WIDTH), state=nn.Linear(WIDTH, WIDTH),
        head=nn.Linear(WIDTH, CLASSES),
    )  # fmt: skip


def _elman_to_the_longest() -> nn.Module:
    """Stops at the longest record of the batch; a record's state stays after its own end."""

    def run(net: Net, x: Tensor) -> Tensor:
        real = x != 0
        e = net.embed(x)
        h = e.new_zeros(len(x), WIDTH)
        for t in range(int(real.sum(1).max()) if len(x) else 0):
            h = torch.where(real[:, t, None], torch.tanh(net.inner(e[:, t]) + net.state(h)), h)
        return net.head(h)

    return Net(
        run, embed=nn.Embedding(CODES, WIDTH), inner=nn.Linear(WIDTH, WIDTH),
        state=nn.Linear(WIDTH, WIDTH), head=nn.Linear(WIDTH, CLASSES),
    )  # fmt: skip


def _packed() -> nn.Module:
    """An LSTM on packed sequences of the records' own lengths."""

    def run(net: Net, x: Tensor) -> Tensor:
        length = (x != 0).sum(1).clamp(min=1)
        packed = nn.utils.rnn.pack_padded_sequence(
            net.embed(x), length.cpu(), batch_first=True, enforce_sorted=False
        )
        return net.head(net.rnn(packed)[1][0][-1])

    return Net(
        run, embed=nn.Embedding(CODES, WIDTH), rnn=nn.LSTM(WIDTH, WIDTH, batch_first=True),
        head=nn.Linear(WIDTH, CLASSES),
    )  # fmt: skip


def _attention(batch_first: bool) -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        x = x if batch_first else x.transpose(0, 1)
        h = net.attention(x, x, x, need_weights=False)[0]
        return net.head(h.mean(1 if batch_first else 0))

    return Net(
        run, attention=nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first),
        head=nn.Linear(WIDTH, CLASSES),
    )  # fmt: skip


def _encoder(batch_first: bool, dropout: float = 0.1) -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        x = x if batch_first else x.transpose(0, 1)
        return net.head(net.encoder(x).mean(1 if batch_first else 0))

    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 12, dropout, batch_first=batch_first)
    return Net(run, encoder=layer, head=nn.Linear(WIDTH, CLASSES))


class _Attention(nn.Module):
    """Attention of Linear layers and scaled dot products."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.out(h.transpose(1, 2).flatten(2))


class _Block(nn.Module):
    """A pre-norm transformer block of Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = _Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _vit(token: bool) -> nn.Module:
    """Patches, a class token as a bare parameter or the mean, positions as a Bias."""

    def run(net: Any, x: Tensor) -> Tensor:
        h = net.patch(x).flatten(2).transpose(1, 2)
        if token:
            h = torch.cat([net.token.expand(len(h), -1, -1), h], 1)
        h = net.norm(net.block(net.position(h)))
        return net.head(h[:, 0] if token else h.mean(1))

    parts = {"token": nn.Parameter(torch.zeros(1, 1, WIDTH))} if token else {}
    return Net(
        run, **parts, patch=nn.Conv2d(2, WIDTH, 4, stride=4),
        position=Bias(4 + token, WIDTH), block=_Block(), norm=nn.LayerNorm(WIDTH),
        head=nn.Linear(WIDTH, CLASSES),
    )  # fmt: skip


def _positions(kind: str) -> nn.Module:
    """Tokens with positions: a bare parameter, an Embedding of positions for all records at once
    or for each, or a Bias."""

    def run(net: Any, x: Tensor) -> Tensor:
        h, at = net.embed(x), torch.arange(x.shape[1], device=x.device)
        if kind == "parameter":
            h = h + net.position[: x.shape[1]]
        elif kind == "bias":
            h = net.position(h)
        else:
            h = h + net.position(at.expand(len(x), -1) if kind == "each" else at)
        return net.head(net.block(h).mean(1))

    position: Any = nn.Embedding(LENGTH, WIDTH)
    if kind == "parameter":
        position = nn.Parameter(torch.zeros(LENGTH, WIDTH))
    elif kind == "bias":
        position = Bias(LENGTH, WIDTH)
    return Net(
        run, embed=nn.Embedding(CODES, WIDTH), position=position, block=_Block(),
        head=nn.Linear(WIDTH, CLASSES),
    )  # fmt: skip


def _causal() -> nn.Module:
    """A decoder with a causal mask; the last token speaks."""

    def run(net: Any, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        return net.head(net.decoder(net.embed(x), mask=mask, is_causal=True)[:, -1])

    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 12, 0.0, batch_first=True, norm_first=True)
    return Net(
        run, embed=nn.Embedding(CODES, WIDTH),
        decoder=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        head=nn.Linear(WIDTH, CLASSES),
    )  # fmt: skip


def _perceiver() -> nn.Module:
    """Learned queries that attend to the records' positions."""

    def run(net: Any, x: Tensor) -> Tensor:
        q = net.queries.expand(len(x), -1, -1)
        return net.head(F.scaled_dot_product_attention(q, net.key(x), net.value(x)).flatten(1))

    return Net(
        run, queries=nn.Parameter(torch.randn(1, 2, WIDTH)), key=nn.Linear(WIDTH, WIDTH),
        value=nn.Linear(WIDTH, WIDTH), head=nn.Linear(2 * WIDTH, CLASSES),
    )  # fmt: skip


def _deep_sets() -> nn.Module:
    return Net(
        lambda net, x: net.outer(torch.relu(net.inner(x)).sum(1)),
        inner=nn.Linear(WIDTH, 12), outer=nn.Linear(12, CLASSES),
    )  # fmt: skip


def _positions_first() -> nn.Module:
    """Dense layers that get positions first, as sequence-first code has it."""
    return Net(
        lambda net, x: net.outer(torch.relu(net.inner(x.transpose(0, 1))).mean(0)),
        inner=nn.Linear(WIDTH, 12), outer=nn.Linear(12, CLASSES),
    )  # fmt: skip


def _flattened() -> nn.Module:
    """Records times positions as rows of one dense layer."""
    return Net(
        lambda net, x: net.outer(
            torch.relu(net.inner(x.reshape(-1, WIDTH))).view(len(x), LENGTH, 12).mean(1)
        ),
        inner=nn.Linear(WIDTH, 12), outer=nn.Linear(12, CLASSES),
    )  # fmt: skip


BLOCKS = (
    Block("RNN", series, lambda: _recurrent(nn.RNN(WIDTH, WIDTH, batch_first=True))),
    Block("GRU", series, lambda: _recurrent(nn.GRU(WIDTH, WIDTH, batch_first=True))),
    Block("GRU, two layers with dropout", series, lambda: _recurrent(
        nn.GRU(WIDTH, WIDTH, num_layers=2, dropout=0.1, batch_first=True))),
    Block("LSTM", series, lambda: _recurrent(nn.LSTM(WIDTH, WIDTH, batch_first=True))),
    Block("LSTM, bidirectional", series, lambda: _recurrent(
        nn.LSTM(WIDTH, WIDTH, batch_first=True, bidirectional=True), 2 * WIDTH)),
    Block("LSTM with projection", series, lambda: _recurrent(
        nn.LSTM(WIDTH, WIDTH, proj_size=4, batch_first=True), 4)),
    Block("LSTM on packed sequences", tokens, _packed),
    Block("RNNCell", series, lambda: _cell(nn.RNNCell(WIDTH, WIDTH))),
    Block("GRUCell", series, lambda: _cell(nn.GRUCell(WIDTH, WIDTH))),
    Block("LSTMCell", series, lambda: _cell(nn.LSTMCell(WIDTH, WIDTH))),
    Block("Elman network of Linear layers", series, _elman),
    Block("Elman network, to the longest record", tokens, _elman_to_the_longest),
    Block("MultiheadAttention", series, lambda: _attention(True)),
    Block("MultiheadAttention, positions first", series, lambda: _attention(False)),
    Block("TransformerEncoderLayer", series, lambda: _encoder(True)),
    Block("TransformerEncoderLayer, positions first", series, lambda: _encoder(False)),
    Block("attention of Linear layers", series, lambda: Net(
        lambda net, x: net.head(net.block(x).mean(1)), block=_Block(),
        head=nn.Linear(WIDTH, CLASSES))),
    Block("causal TransformerEncoder", tokens, _causal),
    Block("ViT, class token", images, lambda: _vit(True)),
    Block("ViT, mean of patches", images, lambda: _vit(False)),
    Block("positions: bare parameter", tokens, lambda: _positions("parameter")),
    Block("positions: Bias", tokens, lambda: _positions("bias")),
    Block("positions: Embedding for each record", tokens, lambda: _positions("each")),
    Block("positions: Embedding for all records at once", tokens, lambda: _positions("all")),
    Block("Perceiver (learned queries)", series, _perceiver),
    Block("deep sets", series, _deep_sets),
    Block("positions first in dense layers", series, _positions_first),
    Block("records × positions as rows", series, _flattened),
)  # fmt: skip
