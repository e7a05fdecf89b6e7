"""A step of fine-tuning a small GPT-2: 4 layers, width 256, random weights, softmax tied to tokens.

Its dense layers hold their weight turned (Conv1D), and one weight is the table of tokens and the
softmax. `transformers` makes it from a configuration; nothing is downloaded.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

NAME = "small GPT-2, softmax tied"
VOCABULARY, LENGTH = 4096, 64


class Decoder(nn.Module):
    """Tokens [B, T] -> logits [B, T, vocabulary], by a model of Hugging Face."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        # One row of positions a record: per-sample rules want a batch dimension everywhere.
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape).contiguous()
        return self.model(input_ids=x, position_ids=places, use_cache=False).logits


def missing() -> str:
    """Packages that are not installed, "" for none."""
    return "" if find_spec("transformers") else "transformers"


def network() -> nn.Module:
    """The decoder; the package must be there."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=256, n_layer=4, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(config)
    assert model.lm_head.weight is model.transformer.wte.weight
    return Decoder(model)


def batch(size: int) -> tuple[Tensor, Tensor]:
    """Random tokens [size, 64] and those that follow them."""
    text = torch.randint(VOCABULARY, (size, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()
