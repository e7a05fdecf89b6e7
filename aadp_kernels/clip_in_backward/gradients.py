"""Gradients of records of one layer, as what they are made of: norms first, sums later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aadp_kernels.clip_in_backward import two_steps
from aadp_kernels.contract import GradientsNeeded


@dataclass(frozen=True)
class RecordGradients:
    """Gradients of a layer's records, as what they are made of.

    Attributes:
        weight_name: Name of the weight in the model; None if it has no gradient.
        bias_name: The same of the bias.
        kind: Rule of the layer, and what else gradients are made of, see `two_steps.made_of`.
        likes: Its weight and bias, for their shapes.
        a: See `kind`; private.
        g: See `kind`; private.
    """

    weight_name: str | None
    bias_name: str | None
    kind: Any
    likes: tuple[Tensor | None, Tensor | None]
    a: Tensor
    g: Tensor

    def norms(self, p: int, *, l1: bool) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """L1 norms and squared L2 norms [B], float64, and which records are finite.

        Args:
            p: Norm of the clipping, 1 or 2; the other one is None.
            l1: Whether L1 norms are needed beside L2.

        Guarantees:
            Relative errors below 1e-9 (certified bounds on a CPU), given the inputs and the
            gradients of the outputs; half precision is taken as float32.
        """
        needed = GradientsNeeded(
            p, x=False, weight=self.weight_name is not None, bias=self.bias_name is not None,
            counts=False,
        )  # fmt: skip
        return two_steps.norms(self.kind, self.a, self.g, self.likes[0], needed, l1=l1)

    def sums(self, factor: Tensor, finite: Tensor) -> dict[str, Tensor]:
        """Sums over records of factor times gradient, by name.

        Args:
            factor: [B], of the dtype of the sums.
            finite: bool [B]; the other records count as zero.
        """
        names = (self.weight_name, self.bias_name)
        found = two_steps.sums(
            self.kind, self.a, self.g, self.likes[0], factor, finite,
            weight=names[0] is not None, bias=names[1] is not None,
        )  # fmt: skip
        return {
            name: value.view_as(like).to(like.dtype)
            for name, like, value in zip(names, self.likes, found, strict=True)
            if name is not None and like is not None and value is not None
        }
