"""Figures of held-out records beside loss and accuracy, by torchmetrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from fl_lightning.networks.outputs import Loss, PerRecord, class_scores

_NAMES = ("loss", "accuracy")


def named_metrics(
    given: Metric | MetricCollection | Sequence[Metric] | Mapping[str, Metric] | None,
) -> MetricCollection | None:
    """One collection of what was asked for, by name; None for nothing.

    Args:
        given: one metric, several (named by their classes), or metrics by name.

    Raises:
        ValueError: something else, or a name that a run uses itself.
    """
    if given is None:
        return None
    if isinstance(given, Metric):
        given = [given]
    try:
        found = given if isinstance(given, MetricCollection) else MetricCollection(given)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError) as error:
        raise ValueError(f"metrics={given!r:.120}: {error}") from error
    taken = [name for name in found if name in _NAMES]
    if taken:
        raise ValueError(f"metrics: {taken[0]!r} is what a run logs itself; choose another name")
    return found


def update_metrics(metrics: MetricCollection, outputs: object, targets: Tensor, loss: Loss) -> None:
    """Let the metrics see a batch.

    Metrics get probabilities where the loss is one of logits. From logits torchmetrics would guess
    batch by batch whether they are probabilities already: those that happen to lie in [0, 1] are.

    Args:
        metrics: of the run.
        outputs: of the network, for B records.
        targets: [B, ...].
        loss: of each record; it says what outputs are.

    Raises:
        ValueError: outputs of which nothing says what the scores are.
    """
    scores = class_scores(outputs)
    if scores is None:
        raise ValueError(f"outputs of type {type(outputs).__name__} have no logits")
    scores, kind = scores.float(), loss.loss if isinstance(loss, PerRecord) else loss
    if scores.ndim == targets.ndim + 1 and scores.shape[-1] == 1:
        scores = scores.squeeze(-1)
    if isinstance(kind, nn.BCEWithLogitsLoss):
        scores = scores.sigmoid()
    elif isinstance(kind, nn.CrossEntropyLoss) or _name(kind) == "cross_entropy":
        scores = scores.softmax(-1)
        if scores.ndim == 3:
            scores = scores.movedim(-1, 1)
    elif isinstance(kind, nn.NLLLoss):
        scores = scores.exp()
    if scores.shape == targets.shape and not isinstance(kind, nn.BCELoss | nn.BCEWithLogitsLoss):
        targets = targets.to(scores.dtype)
    elif not targets.is_floating_point() or isinstance(kind, nn.BCELoss | nn.BCEWithLogitsLoss):
        targets = targets.long()
    metrics.update(scores, targets)


def _name(loss: object) -> str:
    return getattr(loss, "__name__", "")


def computed(metrics: MetricCollection) -> dict[str, Tensor]:
    """The value of each metric, float32 []; what they have seen is forgotten.

    Raises:
        ValueError: a value that is not one number.
    """
    values = {name: torch.as_tensor(v).float() for name, v in metrics.compute().items()}
    metrics.reset()
    for name, value in values.items():
        if value.numel() != 1:
            raise ValueError(
                f"metrics: {name} gives {value.numel()} numbers; a run logs one (average='macro', "
                "for instance)"
            )
    return {name: value.reshape(()) for name, value in values.items()}
