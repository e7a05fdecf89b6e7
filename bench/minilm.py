"""A step of fine-tuning a BERT of MiniLM's size: 6 layers, width 384, 12 heads, random weights.

`transformers` makes it from a configuration and `peft` its adapters; nothing is downloaded.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, LENGTH, CLASSES = 30_522, 64, 4
KINDS = ("full", "LoRA, r = 4", "frozen body")
NAMES = tuple(f"MiniLM-size BERT, {kind}" for kind in KINDS)


class Classifier(nn.Module):
    """Tokens [B, T] -> logits [B, classes], by a model of Hugging Face."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        # One row of positions a record: per-sample rules want a batch dimension everywhere.
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape).contiguous()
        kinds = torch.zeros_like(x)
        return self.model(input_ids=x, position_ids=places, token_type_ids=kinds).logits


def missing() -> str:
    """Packages that are not installed, "" for none."""
    return ", ".join(name for name in ("transformers", "peft") if find_spec(name) is None)


def network(name: str) -> nn.Module:
    """One of `NAMES`; the packages must be there."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
        vocab_size=VOCABULARY, num_labels=CLASSES, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = BertForSequenceClassification(config)
    if name == NAMES[1]:
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(
            r=4, target_modules=["query", "value"], modules_to_save=["classifier"]
        )
        model = get_peft_model(model, adapters)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:  # while it is zero, A has no gradient
                nn.init.normal_(parameter, std=0.02)
    elif name == NAMES[2]:
        for parameter in model.bert.parameters():
            parameter.requires_grad_(False)
    return Classifier(model)


def written_out(model: nn.Module) -> nn.Module:
    """The model with attention that vmap has rules for: the fused one falls back to a loop."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"  # pyright: ignore
    return model


def batch(size: int) -> tuple[Tensor, Tensor]:
    """Random tokens [size, 64] and labels [size]."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(VOCABULARY, (size, LENGTH), generator=generator)
    return x, torch.randint(CLASSES, (size,), generator=generator)
