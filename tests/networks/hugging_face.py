"""Models of Hugging Face, from a configuration (nothing is downloaded), and adapters by peft."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tests.networks.blocks import CLASSES, CODES, LENGTH, Block, Net, images, tokens

_SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT = {"vocab_size": CODES, "max_position_embeddings": LENGTH, "num_labels": CLASSES}


def _text(model: nn.Module, mask: bool = True) -> nn.Module:
    """Called by keyword, as such models are."""

    def run(net: Any, x: Tensor) -> Tensor:
        given = {"input_ids": x} | ({"attention_mask": (x != 0).long()} if mask else {})
        return net.model(**given).logits

    return Net(run, model=model)


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**_SMALL, **_TEXT, intermediate_size=16)
    return BertForSequenceClassification(config)


def _distil() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(dim=8, n_layers=2, n_heads=2, hidden_dim=16, **_TEXT)
    return DistilBertForSequenceClassification(config)


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=CODES, n_positions=LENGTH, n_embd=8, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _next_token(model: nn.Module) -> nn.Module:
    """The logits of the last token; the first classes are the labels."""
    return Net(lambda net, x: net.model(input_ids=x, use_cache=False).logits[:, -1], model=model)


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **_SMALL, vocab_size=CODES, max_position_embeddings=LENGTH, intermediate_size=16,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        **_SMALL, intermediate_size=16, image_size=8, patch_size=4, num_channels=2,
        num_labels=CLASSES,
    )  # fmt: skip
    return Net(lambda net, x: net.model(pixel_values=x).logits,
               model=ViTForImageClassification(config))  # fmt: skip


def _lora(model: nn.Module, targets: list[str]) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=targets))


BLOCKS = (
    Block("BERT classifier", tokens, lambda: _text(_bert()), needs=("transformers",)),
    Block("DistilBERT classifier", tokens, lambda: _text(_distil()), needs=("transformers",)),
    Block("GPT-2", tokens, lambda: _next_token(_gpt2()), needs=("transformers",)),
    Block("Llama, tied", tokens, lambda: _next_token(_llama()), needs=("transformers",)),
    Block("ViT classifier", images, _vit, needs=("transformers",)),
    Block("BERT with LoRA", tokens, lambda: _text(_lora(_bert(), ["query", "value"])),
          needs=("transformers", "peft")),
    Block("GPT-2 with LoRA", tokens, lambda: _next_token(_lora(_gpt2(), ["c_attn"])),
          needs=("transformers", "peft")),
)  # fmt: skip
