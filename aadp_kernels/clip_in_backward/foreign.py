"""Layers of other libraries, which need not be installed: what stands for them in the tables."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

_ROWS = 3


class Conv1D(nn.Module):
    """Stands for `transformers.pytorch_utils.Conv1D`."""

    weight: nn.Parameter
    bias: nn.Parameter


class PlainRMSNorm(nn.Module):
    """Stands for the RMS norms that models bring along: LlamaRMSNorm, T5LayerNorm and others."""

    weight: nn.Parameter
    variance_epsilon: float


def layer_type(module: nn.Module) -> type[nn.Module]:
    """The type under which a module's rules are found: its own, but for layers of other libraries.

    An RMS norm has many names. It is known by its one weight and `variance_epsilon`, and by what it
    gives for a few numbers: Gemma's, which multiplies by 1 + weight, is another layer.
    """
    kind = type(module)
    if kind.__module__ == "transformers.pytorch_utils" and kind.__name__ == "Conv1D":
        return Conv1D
    return PlainRMSNorm if _is_rms_norm(module) else kind


@torch.no_grad()
def _is_rms_norm(module: nn.Module) -> bool:
    epsilon, weight = getattr(module, "variance_epsilon", None), getattr(module, "weight", None)
    if not isinstance(epsilon, float) or not isinstance(weight, nn.Parameter) or weight.dim() != 1:
        return False
    if len([*module.parameters()]) > 1 or [*module.children()]:
        return False
    size = len(weight)
    x = torch.linspace(-2, 3, _ROWS * size, dtype=weight.dtype, device=weight.device)
    x = x.view(_ROWS, size)
    try:
        # Not by a call of the module, which would run hooks.
        have = type(module).forward(module, x)
    except Exception:
        return False
    want = F.rms_norm(x.float(), (size,), weight.float(), epsilon)
    error = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 2e-2
    return have.shape == want.shape and torch.allclose(have.float(), want, error, error)
