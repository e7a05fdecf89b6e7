"""A small character model whose layers all can be clipped by themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fl_lightning.data.text import NUM_CODES


class _Block(nn.Module):
    """Causal attention and a dense layer, each after a normalisation and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        # Written out, since the fused attention has no rule for vmap over clients.
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(torch.tanh(self.up(self.norm2(x))))


class CharTransformer(nn.Module):
    """The next character of a window: codes [B, length] -> logits [B, num_classes].

    Layers by default: tokens, positions, one block of norm1, qkv, out, norm2, up and down, norm and
    head; about 32,000 parameters.

    Args:
        num_classes: characters of the vocabulary.
        length: longest window.
        width: numbers a position.
        heads: attention heads; must divide width.
        depth: blocks.
    """

    def __init__(
        self,
        num_classes: int = NUM_CODES,
        length: int = 80,
        width: int = 48,
        heads: int = 4,
        depth: int = 1,
    ) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("length", length), ("width", width)):
            if value < 1:
                raise ValueError(f"{name}={value} must be >= 1")
        if heads < 1 or width % heads:
            raise ValueError(f"heads={heads} must divide width={width}")
        if depth < 1:
            raise ValueError(f"depth={depth} must be >= 1")
        self.tokens = nn.Embedding(num_classes, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        # A row of positions for each record, so that clipping sees whose gradient it is.
        places = torch.arange(x.shape[1], device=x.device).expand_as(x)
        x = self.tokens(x) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, -1]))
