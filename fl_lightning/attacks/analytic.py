"""Inputs that a gradient shows without any search: dense layers, labels, and tokens.

References:
    Phong et al. 2017, arXiv:1710.08232 (the gradient of a dense layer's weight is the outer product
    of that of its bias and the input); Zhao et al. 2020, arXiv:2001.02610 (the label has the one
    negative number in the last bias' gradient); Gupta et al. 2022, arXiv:2205.08514 (an embedding's
    rows that changed are the tokens).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def dense_input(weight: Tensor, bias: Tensor) -> Tensor:
    """The input of a dense layer from its gradients, [in], exact for one record without noise.

    Each row of the weight's gradient is the input times a number of the bias' gradient. All rows
    are used by least squares, which under noise is the sum that a matched filter gives.

    Args:
        weight: gradient [out, in].
        bias: gradient [out].

    Raises:
        ValueError: shapes do not fit, or the bias' gradient is zero.
    """
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"weight {[*weight.shape]} and bias {[*bias.shape]} are not [out, in] and [out]"
        )
    size = bias.double().square().sum()
    if not size > 0:
        raise ValueError("bias: its gradient is zero, so it says nothing of the input")
    return (bias.double() @ weight.double() / size).to(weight.dtype)


def direction_of_input(weight: Tensor, bias: Tensor, *, positive: bool) -> Tensor:
    """The input of a dense layer from noised gradients, up to its size, [in].

    The best approximation of rank one of [weight, bias]: under noise the quotient of
    `dense_input` divides by noise, and this does not.

    Args:
        weight, bias: gradients [out, in] and [out].
        positive: whether inputs are positive, so that their sum says the sign; else the bias does,
            as far as its noise lets it.
    """
    joint = torch.cat([weight, bias[:, None]], 1).double()
    _, _, right = torch.linalg.svd(joint, full_matrices=False)
    row = right[0]
    sign = (row[:-1].sum() if positive else row[-1]).sign()
    return (row[:-1] * torch.where(sign == 0, 1.0, sign)).to(weight.dtype)


def first_dense(network: nn.Module) -> tuple[str, nn.Linear] | None:
    """Name and module of a dense layer that sees the record itself; None where another is first."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            return (name, module) if module.bias is not None else None
        if any(True for _ in module.parameters(recurse=False)):
            return None
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            return None  # what the layer sees is not the record
    return None


def labels_of(bias: Tensor, records: int) -> Tensor:
    """Labels from the gradient of the last layer's bias, int64 [B], most certain first.

    Cross entropy's gradient is softmax minus one-hot: the label's number is negative. Of several
    records each label is taken by how far its number lies below the rest.

    Args:
        bias: gradient [classes] of the mean loss.
        records: B, public.
    """
    left, found = bias.double().clone(), []
    for _ in range(records):
        label = int(left.argmin())
        found.append(label)
        left[label] += 1.0 / records
    return torch.tensor(found)


def last_bias(network: nn.Module) -> str | None:
    """Name of the bias of the last dense layer; None where the last layer has none."""
    dense = [n for n, m in network.named_modules() if isinstance(m, nn.Linear)]
    name = f"{dense[-1]}.bias" if dense else ""
    return name if name in dict(network.named_parameters()) else None


def tokens_of(rows: Tensor, *, noise: float, count: int | None = None) -> list[int]:
    """Tokens of the records from an embedding's gradient, ascending.

    Args:
        rows: gradient [vocabulary, width].
        noise: standard deviation of each of its numbers.
        count: distinct tokens, if the attacker knows how many there are; None: those that noise
            alone would show less than once in all rows.
    """
    size = rows.double().norm(dim=1)
    if count is not None:
        return sorted(size.topk(min(count, len(size))).indices.tolist())
    if noise == 0:
        return size.nonzero()[:, 0].tolist()
    from scipy import stats

    threshold = noise * float(stats.chi(rows.shape[1]).isf(1 / len(rows)))
    return (size > threshold).nonzero()[:, 0].tolist()
