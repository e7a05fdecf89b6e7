"""Texts as the outputs of a frozen pretrained encoder: a public function of each record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fl_lightning.data.tokenized import pretrained_part

_AT_ONCE = 64


def sentence_features(
    values: Mapping[str, Tensor], *, model: str, normalize: bool = True
) -> Tensor:
    """Mean of the last hidden states of each text's tokens.

    A network that trains on these is the pretrained encoder with a head, of which only the head
    learns: what is frozen is computed once.

    Args:
        values: `input_ids` and `attention_mask`, int64 [N, T].
        model: name or local folder of the encoder.
        normalize: whether each row is brought to L2 norm 1.

    Returns:
        float32 [N, hidden].

    Raises:
        ValueError: records without these inputs, or no such model.
    """
    if not isinstance(values, Mapping) or {"input_ids", "attention_mask"} - set(values):
        raise ValueError("transform='sentence_features' needs data.source=tokenized_text")
    encoder = pretrained_part("AutoModel", model, "model").eval()
    ids, mask = values["input_ids"], values["attention_mask"]
    rows: Tensor | None = None
    for part, hidden, seen in encoded(encoder, ids, mask):
        mean = masked_mean(hidden, seen)
        rows = mean.new_empty(len(ids), mean.shape[1]) if rows is None else rows
        rows[part] = mean
    assert rows is not None
    return torch.nn.functional.normalize(rows) if normalize else rows


def encoded(encoder: Any, ids: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Texts of about one length at a time: their rows [B], last states [B, t, d] and mask [B, t].

    Padding counts nowhere, so that of the longest text of a part is enough.

    Args:
        encoder: of transformers.
        ids: int64 [N, T].
        mask: int64 [N, T].
    """
    lengths = mask.sum(1)
    for part in lengths.argsort(stable=True).split(_AT_ONCE):
        longest = max(1, int(lengths[part].max()))
        seen = mask[part, :longest]
        out = encoder(input_ids=ids[part, :longest], attention_mask=seen)
        yield part, out.last_hidden_state, seen


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that count: [B, T, d] and [B, T] → [B, d]; zeros where none does."""
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(-2) / weight.sum(-2).clamp(min=1)
