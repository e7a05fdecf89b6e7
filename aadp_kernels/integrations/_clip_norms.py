"""Clip norms of a model whose layers clip: reading the kind, writing them, seeing them changed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from aadp_kernels.integrations._watch import clipped_layers
from aadp_kernels.layout import Layout


def clipping_norm(model: nn.Module) -> int:
    """The norm p of a model that clips in backward.

    Raises:
        ValueError: The model was not made by `with_clipping`.
    """
    norms = {layer.norm_p for _, layer in clipped_layers(model)}
    if len(norms) != 1:
        raise ValueError("model must be the result of with_clipping, got one without clipping")
    return norms.pop()


def set_clip_norms(model: nn.Module, layout: Layout, clips: Tensor) -> None:
    """Write the clip norms [L] into the layers of a model that clips in backward.

    Raises:
        ValueError: A layer of the layout does not clip.
    """
    buffers: dict[str, Any] = dict(model.named_buffers())
    for name, clip in zip(layout.layer_names, clips.tolist(), strict=True):
        buffer = buffers.get(f"{name}.clip_norm")
        if buffer is None:
            raise ValueError(
                f"layer {name!r} does not clip; use the result of with_clipping (a model that is "
                "one layer must stand in an nn.Sequential)"
            )
        buffer.fill_(clip)


class ClipNormsKept:
    """Sees whether the layers still hold the clip norms that were written by `set_clip_norms`."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        layers = dict(clipped_layers(model))
        self._layers = {name: layers[name] for name in layout.layer_names}
        self._written = {n: float(layer.clip_norm) for n, layer in self._layers.items()}
        self._seen = {n: _mark(layer) for n, layer in self._layers.items()}

    def check(self) -> None:
        """Raise RuntimeError if a layer's clip norm is another one now."""
        for name, layer in self._layers.items():
            buffer, version = _mark(layer)
            if buffer is self._seen[name][0] and version == self._seen[name][1]:
                continue
            # Moved to another device, or written: only now is the value read.
            if not float(layer.clip_norm) <= self._written[name]:
                raise RuntimeError(
                    f"the clip norm of layer {name!r} is {float(layer.clip_norm)} now, and the "
                    f"noise is that of {self._written[name]}; make a new PrivateOptimizer"
                )
            self._seen[name] = buffer, version


def _mark(layer: Any) -> tuple[Tensor, int]:
    """The tensor that holds a layer's clip norm, and how often it was written."""
    buffer = layer._buffers["clip_norm"]
    return buffer, buffer._version
