"""Dense layers that hold their weight as [in, out]: Conv1D of Hugging Face's GPT-2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aadp_kernels.clip_in_backward.matrix_rules import Linear, Results
from aadp_kernels.contract import ClipRule


@dataclass(frozen=True)
class TransposedLinear(Linear):
    """y = x W + b on x [B, ..., in]; every gradient of the weight is turned as the weight is."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super().forward(x, weight.t(), bias)

    def backward(self, x: Tensor, grad: Tensor, weight: Tensor, rule: ClipRule) -> Results:
        found = super().backward(x, grad, weight.transpose(1, 2), rule)
        turned = None if found[1] is None else found[1].transpose(1, 2)
        return found[0], turned, *found[2:]

    def single_client(
        self, saved: Sequence[Any], kept: Sequence[Tensor], grad: Tensor, needs: Sequence[bool],
        p: int,
    ) -> tuple[Tensor | None, ...] | None:  # fmt: skip
        x, weight, *rest = saved
        found = super().single_client((x, weight.t(), *rest), kept, grad, needs, p)
        if found is None:
            return None
        return found[0], None if found[1] is None else found[1].t(), *found[2:]

    def weight_grad(self, flat: Tensor, weight: Tensor) -> Tensor:
        features, out = weight.shape
        return flat.view(-1, out, features).transpose(1, 2)
