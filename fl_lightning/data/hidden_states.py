"""Texts as hidden states of a frozen encoder's first layers: a public function of each record."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fl_lightning.data.sentence_features import encoded
from fl_lightning.data.tokenized import pretrained_part


def hidden_states(values: Mapping[str, Tensor], *, model: str, frozen_layers: int) -> Tensor:
    """States of each text's tokens after the first layers of an encoder; zeros where padding is.

    `networks.pretrained.text_classifier` with the same `frozen_layers` goes on from these, so that
    what is frozen is computed once.

    Args:
        values: `input_ids` and `attention_mask`, int64 [N, T].
        model: name or local folder of the encoder.
        frozen_layers: how many of its layers, from 1 to one less than it has.

    Returns:
        float32 [N, T, hidden].

    Raises:
        ValueError: records without these inputs, no such model, or one whose layers cannot be
            computed apart.
    """
    if not isinstance(values, Mapping) or {"input_ids", "attention_mask"} - set(values):
        raise ValueError("transform='hidden_states' needs data.source=tokenized_text")
    body = pretrained_part("AutoModel", model, "model", attn_implementation="eager").eval()
    lower, _ = divided(body, frozen_layers)
    ids, mask = values["input_ids"], values["attention_mask"]
    states = torch.zeros(*ids.shape, body.config.hidden_size)
    for rows, hidden, seen in encoded(lower, ids, mask):
        states[rows, : seen.shape[1]] = hidden.where(seen[..., None] > 0, 0.0)
    return states


def divided(body: Any, frozen_layers: int) -> tuple[Any, Any]:
    """An encoder's first layers and the rest: two encoders that make the whole, one after another.

    The first takes `input_ids`, the second the first's states as `inputs_embeds`. Layers keep their
    names in both, so that weights and adapters are those of the whole.

    Args:
        body: encoder of transformers; it stays as it is.
        frozen_layers: layers of the first.

    Raises:
        ValueError: too few or too many layers, or an encoder that the two do not make.
    """
    count = body.config.num_hidden_layers
    if not 0 < frozen_layers < count:
        raise ValueError(
            f"frozen_layers={frozen_layers} must be from 1 to {count - 1}: the encoder has {count}"
        )
    lower, upper = copy.deepcopy(body), copy.deepcopy(body)
    for part, passed in ((lower, range(frozen_layers, count)), (upper, range(frozen_layers))):
        if getattr(part, "pooler", None) is not None:
            part.pooler = None
        for layers in part.modules():
            if isinstance(layers, nn.ModuleList) and len(layers) == count:
                for i in passed:
                    layers[i] = _Passed()
                break
    upper.embeddings = _Given()
    if not _make(lower, upper, body):
        raise ValueError(
            f"frozen_layers={frozen_layers}: the first layers of {type(body).__name__} cannot be "
            "computed apart from the others here"
        )
    return lower, upper


class _Passed(nn.Module):
    """In the place of a layer: states go through as they are."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


class _Given(nn.Module):
    """In the place of embeddings: states that are known already."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Tensor:
        return inputs_embeds


@torch.no_grad()
def _make(lower: Any, upper: Any, body: Any) -> bool:
    """Whether the parts give the whole encoder's states of two public texts, one of them padded."""
    ids = torch.arange(8).repeat(2, 1) % body.config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    training = body.training
    try:
        body.eval()
        want = body(input_ids=ids, attention_mask=mask).last_hidden_state
        states = lower.eval()(input_ids=ids, attention_mask=mask).last_hidden_state
        # Nothing of padding is kept.
        states = states.where(mask[..., None] > 0, 0.0)
        have = upper.eval()(inputs_embeds=states, attention_mask=mask).last_hidden_state
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False
    finally:
        body.train(training)
    seen = mask > 0
    return have.shape == want.shape and torch.allclose(have[seen], want[seen], atol=1e-4)
