"""Networks made of pretrained transformers, by name or from a local folder.

Both functions stand where a network's class does: `--model.network
fl_lightning.networks.pretrained.text_classifier --model.network.model FOLDER`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fl_lightning.data.hidden_states import divided
from fl_lightning.data.sentence_features import masked_mean, sentence_features
from fl_lightning.data.tokenized import encoder_inputs, pretrained_part

Trained = Literal["head", "lora", "all"]
LoraStart = Literal["frozen_a", "orthogonal", "default"]


class TextClassifier(nn.Module):
    """An encoder, the mean of its last hidden states over the tokens that count, and a head.

    Args:
        body: encoder with `last_hidden_state` among its outputs.
        hidden: width of its states.
        num_classes: outputs of the head.
        normalize: whether the mean is brought to L2 norm 1, as sentence encoders are used.
    """

    def __init__(
        self, body: nn.Module, hidden: int, num_classes: int, normalize: bool = True
    ) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(hidden, num_classes)
        self.normalize = normalize

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, num_classes] of token ids and their mask, int64 [B, T]."""
        states = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mean = masked_mean(states, attention_mask)
        return self.head(nn.functional.normalize(mean) if self.normalize else mean)


class UpperTextClassifier(TextClassifier):
    """The same of an encoder's upper layers, from states that its lower ones have made."""

    def forward(self, states: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Logits [B, num_classes] of hidden states [B, T, hidden], zeros where padding is."""
        mask = (states != 0).any(-1)
        # As it is added to the scores, which needs no look at its values: vmap has none.
        least = torch.finfo(states.dtype).min
        added = torch.zeros_like(mask, dtype=states.dtype).masked_fill(~mask, least)
        upper = self.body(inputs_embeds=states, attention_mask=added[:, None, None, :])
        upper = upper.last_hidden_state
        mean = masked_mean(upper, mask)
        return self.head(nn.functional.normalize(mean) if self.normalize else mean)


def text_classifier(
    model: str,
    num_classes: int = 2,
    *,
    labels: Sequence[str] | None = None,
    label_scale: float = 20.0,
    normalize: bool = True,
    train: Trained = "lora",
    frozen_layers: int = 0,
    lora_rank: int = 4,
    lora_alpha: float = 8.0,
    lora_targets: Sequence[str] | None = None,
    lora_start: LoraStart = "frozen_a",
    dropout: float = 0.0,
    attention: str = "eager",
    seed: int = 0,
) -> nn.Module:
    """A pretrained encoder with a new head; see `TextClassifier`.

    Args:
        model: name or local folder of the encoder. Public: what it was trained on is not protected.
        num_classes: public number of classes, at least 2.
        labels: public words for each class, at which the head starts (see `label_head`); null: it
            starts at random.
        label_scale: see `label_head`.
        normalize: whether the mean of the states is brought to L2 norm 1 before the head.
        train: head (the encoder stays; data.transform=sentence_features computes it once), lora
            (low-rank updates of its projections, and the head) or all.
        frozen_layers: first layers of the encoder that stay as they are and are computed once, by
            data.transform=hidden_states with the same number; `train` means the others. 0: records
            are tokens.
        lora_rank: rank r of an update B·A, at least 1.
        lora_alpha: its scale is lora_alpha / r, above 0.
        lora_targets: names of the layers that get one; null: queries and values, as peft chooses.
        lora_start: frozen_a (A is random, public and stays; B starts at 0. While B is 0 the
            gradient of A is exactly 0, so that a share of the budget for A would buy noise alone),
            orthogonal (both are trained and start so that B·A is 0 and both have gradients) or
            default (both are trained, B starts at 0).
        dropout: probability in every dropout layer, in [0, 1).
        attention: of transformers: eager, or sdpa, which cannot be vmapped over clients.
        seed: public seed of head and A.

    Raises:
        ValueError: naming the argument, or a package that is missing.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes} must be >= 2")
    if labels is not None and len(labels) != num_classes:
        raise ValueError(f"labels={list(labels)} are {len(labels)}, num_classes={num_classes}")
    body = _frozen_body("AutoModel", model, dropout, attention)
    if getattr(body, "pooler", None) is not None:
        body.pooler = None  # not used here: it would take a share and learn nothing
    kind = TextClassifier
    if frozen_layers:
        body, kind = divided(body, frozen_layers)[1], UpperTextClassifier
    with torch.random.fork_rng(()):
        torch.manual_seed(seed)
        body = _trained(
            body, train, lora_rank, lora_alpha, lora_targets, lora_start, "FEATURE_EXTRACTION"
        )
        network = kind(body, body.config.hidden_size, num_classes, normalize)
    if labels is not None:
        network.head = label_head(model, labels, label_scale, normalize)
    return network.train()


def label_head(
    model: str, labels: Sequence[str], scale: float = 20.0, normalize: bool = True
) -> nn.Linear:
    """A linear head that starts as a classifier by likeness: features → logits [B, classes].

    The weights of a class are the features of the words for it, times a scale. What a class is
    called is public, so this start costs no privacy, and what noise would drown is known before
    the first round.

    Args:
        model: name or local folder of the encoder that makes the features
            (data.transform=sentence_features).
        labels: public words for each class, in the order of the class numbers, at least 2.
        scale: inverse temperature of the start, at least 0; 0 starts at zeros.
        normalize: as for the features.

    Raises:
        ValueError: naming the argument, or a package that is missing.
    """
    if len(labels) < 2:
        raise ValueError(f"labels={list(labels)} must be words for at least 2 classes")
    if not 0 <= scale < float("inf"):
        raise ValueError(f"scale={scale} must be finite and >= 0")
    words = encoder_inputs(model, 64)(list(labels))
    with torch.no_grad():
        rows = sentence_features(words, model=model, normalize=normalize)
    head = nn.Linear(rows.shape[1], len(labels))
    with torch.no_grad():
        head.weight.copy_(scale * rows)
        head.bias.zero_()
    return head


class CausalLanguageModel(nn.Module):
    """A decoder with its head: logits of the next token at every place.

    Args:
        body: with `logits` among its outputs.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, T, vocabulary] of token ids and their mask, int64 [B, T]."""
        found = self.body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return found.logits


def language_model(
    model: str,
    *,
    train: Literal["lora", "all"] = "lora",
    lora_rank: int = 4,
    lora_alpha: float = 8.0,
    lora_targets: Sequence[str] | None = None,
    lora_start: LoraStart = "frozen_a",
    dropout: float = 0.0,
    attention: str = "eager",
    seed: int = 0,
) -> nn.Module:
    """A pretrained decoder that goes on learning language; a record is a sequence.

    With data.source=tokenized_text and label=null, and the loss torch.nn.CrossEntropyLoss with
    reduction='none': the mean over a record's tokens.

    Args:
        model: see `text_classifier`; also the others.
        train: lora or all.
        lora_rank, lora_alpha, lora_targets, lora_start: see `text_classifier`.
        dropout, attention, seed: see `text_classifier`.

    Raises:
        ValueError: naming the argument, or a package that is missing.
    """
    body = _frozen_body("AutoModelForCausalLM", model, dropout, attention)
    with torch.random.fork_rng(()):
        torch.manual_seed(seed)
        return CausalLanguageModel(
            _trained(body, train, lora_rank, lora_alpha, lora_targets, lora_start, "CAUSAL_LM")
        ).train()


def _frozen_body(kind: str, model: str, dropout: float, attention: str) -> Any:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must lie in [0, 1)")
    body = pretrained_part(kind, model, "model", attn_implementation=attention, dtype="float32")
    for layer in body.modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            layer.p = dropout
    return body.requires_grad_(False)


def _trained(
    body: Any,
    train: str,
    rank: int,
    alpha: float,
    targets: Sequence[str] | None,
    start: str,
    task: str,
) -> Any:
    """The body with what is to be trained of it."""
    if train == "all":
        return body.requires_grad_(True)
    if train == "head":
        return body
    if rank < 1:
        raise ValueError(f"lora_rank={rank} must be >= 1")
    if not 0 < alpha < float("inf"):
        raise ValueError(f"lora_alpha={alpha} must be positive and finite")
    try:
        import peft  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "train='lora' needs the package peft: install the extra pretrained"
        ) from error
    config = peft.LoraConfig(
        task_type=task,
        r=rank,
        lora_alpha=alpha,
        target_modules=None if targets is None else list(targets),
        init_lora_weights="orthogonal" if start == "orthogonal" else True,
    )
    try:
        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5 by a name of old.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            adapted = peft.get_peft_model(body, config)
    except ValueError as error:
        raise ValueError(f"lora_targets={targets}: {str(error).splitlines()[0]}") from error
    if start == "frozen_a":
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name or "lora_embedding_A" in name:
                parameter.requires_grad_(False)
    return adapted
