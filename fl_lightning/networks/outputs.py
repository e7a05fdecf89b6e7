"""What a network's outputs say of a record's class, in every shape that networks give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


class PerRecord(nn.Module):
    """A loss of torch as the round calls it: one number a record, whatever its targets look like.

    Args:
        loss: of torch, made with reduction='none'.

    Edge cases:
        | targets | outputs | loss of a record |
        |---|---|---|
        | int64 [B], classes | [B, C] | as torch |
        | int64 [B], 0 and 1 | [B] or [B, 1] | binary cross entropy of one number |
        | [B, ...], numbers or several labels | as many numbers | mean over the record's numbers |
        | int64 [B, T], tokens | [B, T, C] | mean over tokens that are not `ignore_index`; 0 if \
          there is none |
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Any, targets: Tensor) -> Tensor:
        """The loss of each record [B] of `outputs`, which may hold their scores as `logits`."""
        scores = class_scores(outputs)
        if scores is None:
            return self.loss(outputs, targets)
        if isinstance(self.loss, _OF_CLASSES):
            if scores.ndim == 3 and scores.shape[:2] == targets.shape:
                scores = scores.movedim(-1, 1)  # torch has classes before places
            losses = self.loss(scores, targets)
            if losses.ndim == 1:
                return losses
            counted = targets != self.loss.ignore_index
            return losses.flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)
        losses = self.loss(scores.reshape(targets.shape), targets.to(scores.dtype))
        return losses if losses.ndim < 2 else losses.flatten(1).mean(1)


_OF_CLASSES = nn.CrossEntropyLoss | nn.NLLLoss
_OF_NUMBERS = (
    nn.BCEWithLogitsLoss | nn.BCELoss | nn.MSELoss | nn.L1Loss | nn.SmoothL1Loss | nn.HuberLoss
)


def record_loss(loss: Loss) -> Loss:
    """The loss as the round calls it: torch's own take outputs and targets as they come."""
    return PerRecord(loss) if isinstance(loss, _OF_CLASSES | _OF_NUMBERS) else loss


def class_scores(outputs: object) -> Tensor | None:
    """Scores of the classes among a network's outputs; None where nothing says which they are.

    A tensor is the scores. A mapping or an object holds them as `logits`; of a tuple or list they
    come first.
    """
    found: object = outputs
    if isinstance(outputs, Mapping):
        found = outputs.get("logits")
    elif not isinstance(outputs, Tensor) and hasattr(outputs, "logits"):
        found = outputs.logits  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(outputs, tuple | list):
        found = outputs[0] if outputs else None
    return found if isinstance(found, Tensor) else None


def check_outputs(
    network: nn.Module, outputs: object, records: int, num_classes: int, smallest: int = 0
) -> None:
    """Refuse fewer outputs than classes; more are fine.

    Args:
        network: for its name.
        outputs: of `records` records.
        records: their number B.
        num_classes: of the data; 0 where targets are no classes.
        smallest: label of the data.

    Raises:
        ValueError: with both numbers. A tuple is never refused: what it holds is the loss's matter.
    """
    scores = None if isinstance(outputs, tuple | list) else class_scores(outputs)
    if scores is None or scores.ndim not in (1, 2) or len(scores) != records:
        return
    count = 1 if scores.ndim == 1 else scores.shape[1]
    if count >= num_classes or (count == 1 and num_classes == 2):
        return
    advice = f"give it {num_classes} outputs"
    if smallest > 0:
        advice = f"labels go from {smallest} to {num_classes - 1}: number classes from 0"
    raise ValueError(
        f"network={type(network).__name__}: it gives {count} output{'s' * (count != 1)} a record, "
        f"but the data has num_classes={num_classes} (labels 0 to {num_classes - 1}); {advice}"
    )


def predictions(outputs: object, labels: Tensor, loss: Loss, num_classes: int) -> Tensor | None:
    """Class of each record, int64 [B]; None where the outputs do not say one.

    Args:
        outputs: of the network.
        labels: int64 [B].
        loss: of each record; it tells logits from probabilities.
        num_classes: of the data; 0 where targets are no classes.

    Edge cases:
        | scores | class |
        |---|---|
        | [B, C] with C > 1 | the largest |
        | one number a record, two classes | 1 above 0 (a logit) or above 1/2 (a probability) |
        | anything else | None |
    """
    scores = class_scores(outputs)
    if not num_classes or scores is None or scores.ndim not in (1, 2) or len(scores) != len(labels):
        return None
    if scores.ndim == 2 and scores.shape[1] > 1:
        return scores.argmax(1) if scores.shape[1] >= num_classes else None
    if num_classes > 2:
        return None
    half = isinstance(outputs, Tensor) and _is_even(loss, outputs, 0.5)
    probability = half and not _is_even(loss, outputs, 0.0)  # pyright: ignore[reportArgumentType]
    return (scores.reshape(-1) > (0.5 if probability else 0.0)).long()


def _is_even(loss: Loss, outputs: Tensor, value: float) -> bool:
    """Whether an output of this value costs as much for label 0 as for label 1."""
    guess = torch.full_like(outputs[:1], value)
    zero = torch.zeros(1, dtype=torch.int64, device=outputs.device)
    return bool(torch.isclose(loss(guess, zero).sum(), loss(guess, zero + 1).sum(), atol=1e-6))


def batch_sums(outputs: object, labels: Tensor, loss: Loss, num_classes: int) -> Tensor:
    """Records, loss, correct predictions and predictions of a batch, float64 [4] on the CPU.

    Args:
        outputs: of the network, for B > 0 records.
        labels: int64 [B].
        loss: of each record.
        num_classes: of the data; 0 where targets are no classes.
    """
    value = loss(outputs, labels).mean()  # pyright: ignore[reportArgumentType]
    predicted = predictions(outputs, labels, loss, num_classes)
    right = value.new_zeros(()) if predicted is None else (predicted == labels).to(value).mean()
    known = torch.full_like(value, predicted is not None)
    return (len(labels) * torch.stack([torch.ones_like(value), value, right, known])).double().cpu()
