"""What is refused of a network by its layers and parameters alone, before any record is seen."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_REAL = (torch.float32, torch.float64)


def check_network(network: nn.Module) -> None:
    """Refuse networks that mix records, cannot be clipped, or have nothing to train.

    Raises:
        ValueError: naming the layer or parameter, with what to use instead.
    """
    stays = _eval_for_good(network)
    for name, layer in network.named_modules():
        if isinstance(layer, nn.modules.batchnorm._NormBase) and name not in stays:
            _check_norm(name, layer)
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
            _check_embedding(name, layer)
    if not any(p.requires_grad for p in network.parameters()):
        raise ValueError("network: it has no trainable parameters")
    for name, p in network.named_parameters():
        if p.requires_grad and p.dtype not in _REAL:
            raise ValueError(
                f"network: parameter '{name}' is {str(p.dtype).removeprefix('torch.')}: clipping "
                "is only proven for float32 and float64; hold a complex number as two real ones"
            )
        if p.requires_grad and not is_lazy(p) and not p.numel():
            raise ValueError(
                f"network: parameter '{name}' has shape {list(p.shape)}, no elements to train; "
                "leave it out, or set its requires_grad to False"
            )


def _eval_for_good(network: nn.Module) -> set[str]:
    """Norm layers that no `train()` brings out of eval mode and nothing trains: affine maps."""
    modes = [(layer, layer.training) for layer in network.modules()]
    network.train()
    names = {
        name
        for (name, layer), (_, mode) in zip(network.named_modules(), modes, strict=True)
        if isinstance(layer, nn.modules.batchnorm._NormBase)
        and not (layer.training or mode)
        and layer.running_mean is not None
        and not any(p.requires_grad for p in layer.parameters())
    }
    for layer, mode in modes:
        layer.training = mode
    return names


def _check_norm(name: str, layer: nn.modules.batchnorm._NormBase) -> None:
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        raise ValueError(
            f"network: layer '{name}' is a {type(layer).__name__}, which mixes the records of "
            "a batch (no per-record clipping) and keeps unprotected statistics; use GroupNorm, "
            "LayerNorm or InstanceNorm without running statistics instead, or freeze it: "
            "parameters that need no gradient, and eval mode that network.train() leaves on"
        )
    if layer.track_running_stats:
        raise ValueError(
            f"network: layer '{name}' keeps unprotected running statistics; set "
            "track_running_stats=False or use GroupNorm"
        )


def _check_embedding(name: str, layer: nn.Embedding | nn.EmbeddingBag) -> None:
    if layer.max_norm is not None:
        raise ValueError(
            f"network: layer '{name}' has max_norm={layer.max_norm}, which rescales weights by "
            "the codes that records hold, without clipping or noise; leave max_norm out"
        )
    if layer.sparse and layer.weight.requires_grad:
        raise ValueError(
            f"network: layer '{name}' has sparse=True, whose gradients show the codes of records "
            "by what is not zero and cannot be clipped; leave sparse out"
        )


def is_unfinished(network: nn.Module) -> bool:
    """Whether lazy layers still wait for the shape of their input."""
    return any(map(is_lazy, [*network.parameters(), *network.buffers()]))


def finish_network(network: nn.Module, record: Tensor) -> None:
    """Make the parameters of lazy layers, by one forward of a record of zeros.

    Args:
        network: the model; its modes stay as they are.
        record: a record, for its shape and dtype alone.

    Raises:
        ValueError: the network cannot be applied to it.
    """
    if not is_unfinished(network):
        return
    modes = [(layer, layer.training) for layer in network.modules()]
    try:
        with torch.no_grad():
            network.eval()(torch.zeros_like(record)[None])
    except Exception as error:
        raise ValueError(
            f"network={type(network).__name__}: its lazy layers cannot be made from a record of "
            f"shape {tuple(record.shape)}: {error}"
        ) from error
    finally:
        for layer, mode in modes:
            layer.training = mode
    if is_unfinished(network):
        raise ValueError(
            f"network={type(network).__name__}: forward does not use all of its lazy layers, whose "
            "parameters then have no shape; leave these layers out"
        )
    check_network(network)
