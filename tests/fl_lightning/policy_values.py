"""Values of policies for tests."""

import torch

from fl_lightning import PrivacyConfig
from fl_lightning.privacy.allocation import layer_shares
from fl_lightning.privacy.history import ReleasedHistory

DIMS = torch.tensor([4000.0, 64.0, 650.0], dtype=torch.float64)
CLIP = torch.tensor([0.7, 2.0, 0.1], dtype=torch.float64)
PART = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
MECHANISMS = ("gaussian", "laplace")


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def shares(rule, mechanism="gaussian", floor=0.1, part=PART, clip=CLIP, dims=DIMS):
    return layer_shares(
        rule, contribution=part, clip_norm=clip, dims=dims, mechanism=mechanism, floor=floor
    )


def history(clients=4, dims=(30, 20), **kwargs):
    config = PrivacyConfig(**({"epsilon": None, "noise_multiplier": 1.0, "seed": 0} | kwargs))
    return ReleasedHistory(config, clients, dims)
