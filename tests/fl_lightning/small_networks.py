"""Networks of two layers for tests, and their parameters."""

import torch
from torch import nn

from fl_lightning.models import CNN, MLP


class Normalised(nn.Module):
    """A network of other layers than convolutions."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.norm = nn.GroupNorm(2, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        words = x.flatten(1)[:, :5].mul(3).round().clamp(-6, 5).long() + 6
        return self.out(self.norm(self.embed(words).mean(1)))


def mlp():
    return MLP(hidden=(7,), num_classes=3)


def cnn():
    return CNN(channels=(4,), num_classes=3)


def build(make):
    torch.manual_seed(3)
    return make()
