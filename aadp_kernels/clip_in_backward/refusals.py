"""Why what a record does to a module cannot be bounded."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm


def refusal(module: nn.Module) -> str | None:
    """Why a module's options cannot be clipped; None if they can."""
    if isinstance(module, nn.Embedding) and module.max_norm is None:
        if module.scale_grad_by_freq:
            return "weights records by the batch: scale_grad_by_freq must be False"
        if module.sparse:
            return "shows which tokens occur: sparse must be False"
    return mixing(module)


def mixing(module: nn.Module) -> str | None:
    """Why no clipping of gradients can bound what a record does to a module; None if it can."""
    if isinstance(module, _BatchNorm) and not _is_affine(module):
        return "mixes the records of a batch, unless it is frozen and in eval mode"
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        return "keeps statistics of the records: track_running_stats must be False"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        return "rescales weights by the tokens that records hold: max_norm must be None"
    return None


def _is_affine(module: _BatchNorm) -> bool:
    """Whether batch normalisation is in eval mode, with statistics, and has nothing to train."""
    fixed = not any(p.requires_grad for p in module.parameters())
    return fixed and not module.training and module.running_mean is not None
