"""Augmentation multiplicity: a record's loss is the mean over public copies of it.

One record then has one gradient, with less variance, and is clipped once: privacy costs the same
(De et al. 2022, arXiv:2204.13650). Every copy costs a forward and a backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Shifts(nn.Module):
    """Images and their copies moved up, down, left and right: [B, C, H, W] → [B, A, C, H, W].

    Nothing is drawn, so a run stays repeatable. A = 5, or 10 with mirrored copies.

    Args:
        pixels: distance, at least 1; what comes in at the edge is 0.
        mirror: whether every copy is there a second time, left and right exchanged.

    Raises:
        ValueError: pixels below 1.
    """

    def __init__(self, pixels: int = 1, mirror: bool = False) -> None:
        super().__init__()
        if pixels < 1:
            raise ValueError(f"pixels={pixels} must be >= 1")
        self.pixels = pixels
        self.mirror = mirror

    def forward(self, x: Tensor) -> Tensor:
        """All copies, the image itself first."""
        by, (height, width) = self.pixels, x.shape[-2:]
        wide = F.pad(x, (by, by, by, by))
        corners = [(by, by), (0, by), (2 * by, by), (by, 0), (by, 2 * by)]
        copies = [wide[..., i : i + height, j : j + width] for i, j in corners]
        if self.mirror:
            copies += [copy.flip(-1) for copy in copies]
        return torch.stack(copies, 1)


class MeanOverCopies(nn.Module):
    """A network that trains on copies of every record: [B, ...] → log-probabilities [B, classes].

    Made for the loss `torch.nn.NLLLoss(reduction="none")`, which then is the mean of the copies'
    cross entropies. In evaluation the record itself is the only copy. Records are clipped whole:
    layers see copies, not records, so that gradients are computed record by record.

    Args:
        network: [B, ...] → logits [B, classes]; one record or copy a row.
        copies: module [B, ...] → [B, A, ...]; null: `Shifts()`. It must treat each record alone.
    """

    def __init__(self, network: nn.Module, copies: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network
        self.copies = copies or Shifts()

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities, in training averaged over the copies."""
        if not self.training:
            return self.network(x).log_softmax(-1)
        copies = self.copies(x)
        logits = self.network(copies.flatten(0, 1))
        return logits.log_softmax(-1).unflatten(0, copies.shape[:2]).mean(1)
