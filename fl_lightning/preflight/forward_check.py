"""One forward of a few records, in training and in evaluation, and what it must not do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from fl_lightning.networks.functional import apply_with
from fl_lightning.networks.metrics import computed, update_metrics
from fl_lightning.networks.outputs import batch_sums, check_outputs
from fl_lightning.networks.state import held, left_as_it_was
from fl_lightning.values.round import Params

Loss = Callable[[Tensor, Tensor], Tensor]


def first_line(error: Exception) -> str:
    """What an error says, without the pages that some have."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else repr(error)


def check_forward(
    network: nn.Module,
    loss: Loss,
    x: Tensor,
    y: Tensor,
    *,
    num_classes: int,
    smallest_label: int,
    inference_mode: bool,
    source: str,
    metrics: MetricCollection | None = None,
) -> None:
    """Apply network, loss and metric to a few records: shapes, and what is written.

    Args:
        network, loss: of the run.
        x, y: records [B, ...] and labels [B], on the network's device.
        num_classes: of the data.
        smallest_label: of the data.
        inference_mode: whether evaluation runs in torch's inference mode.
        source: name of the data.
        metrics: of the run, forgetting what they have seen.

    Raises:
        ValueError: saying which.
    """
    state, given = held(network), x.clone()
    before = {name: value.detach().clone() for name, value in state.items()}
    with left_as_it_was(network):
        try:
            with torch.no_grad():
                network.train()(given)
            written = [n for n, v in state.items() if not torch.equal(v, before[n])]
            with torch.inference_mode(inference_mode), torch.no_grad():
                outputs = network.eval()(x.clone())
        except Exception as error:
            raise ValueError(
                f"network={type(network).__name__}: it cannot be applied to records of shape "
                f"{tuple(x.shape[1:])} of {source}: {first_line(error)}"
            ) from error
        if written:
            kind = "buffer" if written[0] in dict(network.named_buffers()) else "parameter"
            raise ValueError(
                f"network={type(network).__name__}: applying it changes the {kind} '{written[0]}', "
                "which would leave a client without clipping or noise; keep no statistics in the "
                "network"
            )
        if not torch.equal(given, x):
            raise ValueError(
                f"network={type(network).__name__}: applying it changes the records that it is "
                "given; use no operation in place on them (x = x / 255, not x /= 255)"
            )
        check_outputs(network, outputs, len(x), num_classes, smallest_label)
        _check_loss(loss, outputs, y, num_classes)
        if metrics is not None:
            _check_metrics(metrics, outputs, y, loss)


def _check_metrics(metrics: MetricCollection, outputs: Tensor, y: Tensor, loss: Loss) -> None:
    """Try the metrics on a few records, of which some may lack what a metric needs."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a class without a record, among so few
            update_metrics(metrics, outputs, y, loss)
            computed(metrics)
    except Exception as error:
        words = first_line(error).removeprefix("metrics: ")
        raise ValueError(
            f"metrics={', '.join(map(str, metrics))}: they cannot take what the network gives: "
            f"{words}"
        ) from error
    finally:
        metrics.reset()


def _check_loss(loss: Loss, outputs: Tensor, y: Tensor, num_classes: int) -> None:
    name = getattr(loss, "__name__", type(loss).__name__)
    kind = type(outputs).__name__
    if isinstance(outputs, Tensor):
        kind = f"shape {tuple(outputs.shape)}"
    try:
        with torch.no_grad():
            losses = loss(outputs, y)
            shape = tuple(losses.shape)
            if shape == (len(y),):
                batch_sums(outputs, y, loss, num_classes)
    except Exception as error:
        raise ValueError(
            f"loss={name}: it cannot take the network's outputs ({kind}) for {len(y)} records with "
            f"{_targets(y, num_classes)}: {first_line(error)}"
        ) from error
    if shape != (len(y),):
        raise ValueError(
            f"loss={name}: it gave shape {shape} for {len(y)} records; it must give one "
            "number a record (reduction='none')"
        )


def _targets(y: Tensor, num_classes: int) -> str:
    if num_classes:
        return f"labels of {num_classes} classes"
    return f"{str(y.dtype).removeprefix('torch.')} targets of shape {tuple(y.shape[1:])}"


def draws_numbers(network: nn.Module, loss: Loss, values: Params, x: Tensor, y: Tensor) -> bool:
    """Whether the losses of equal records change with the random state."""
    first, other = (_losses(network, loss, values, x, y, seed) for seed in (0, 1))
    return not _close(first, other)


def check_repeatable(network: nn.Module, loss: Loss, values: Params, x: Tensor, y: Tensor) -> None:
    """Refuse networks whose losses depend on what they have seen before.

    Raises:
        ValueError: equal records have other losses when the network is applied again.
    """
    first, again = (_losses(network, loss, values, x, y, 0) for _ in range(2))
    if not _close(first, again):
        raise ValueError(
            "network or loss: equal records have other losses when it is applied again; it must "
            "keep nothing of the records that it has seen (neither clipped nor noised), and draw "
            "random numbers from torch alone (or no run can be repeated)"
        )


def _losses(
    network: nn.Module, loss: Loss, values: Params, x: Tensor, y: Tensor, seed: int
) -> Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return loss(apply_with(network, values, x.clone()), y)


_close = partial(torch.allclose, rtol=1e-4, atol=1e-5, equal_nan=True)
