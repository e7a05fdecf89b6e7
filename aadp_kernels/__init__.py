"""Per-layer clipping and secure noise for differentially private training."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aadp_kernels._late import compiling
    from aadp_kernels._reuse import ReusedNoiseError
    from aadp_kernels.clip_in_backward.functions import (
        clipped_bias,
        clipped_conv1d,
        clipped_conv2d,
        clipped_embedding,
        clipped_group_norm,
        clipped_layer_norm,
        clipped_linear,
        clipped_rms_norm,
    )
    from aadp_kernels.clip_in_backward.gradients import RecordGradients
    from aadp_kernels.clip_in_backward.kept import (
        forget_gradients,
        record_gradients,
        with_kept_gradients,
    )
    from aadp_kernels.clip_in_backward.modules import (
        Bias,
        ClippingLayer,
        UnsupportedLayerError,
        with_clipping,
    )
    from aadp_kernels.clip_in_backward.shared_weights import SharedGradients
    from aadp_kernels.clip_in_backward.single_use import check_single_use
    from aadp_kernels.clip_in_backward.watched import WatchedForward
    from aadp_kernels.clip_sum import clip_sum_noise
    from aadp_kernels.correlation import Correlation
    from aadp_kernels.layout import Layout
    from aadp_kernels.noise import poisson_mask, sample_noise
    from aadp_kernels.noise_key import NoiseKey
    from aadp_kernels.privatize import ClipStats, layer_norms, privatize_
    from aadp_kernels.sampler_limits import FORMS, MECHANISMS, max_elements, tail_cutoff
    from aadp_kernels.scales import noise_scales, sensitivity
    from aadp_kernels.votes import vote_noise

__version__ = "0.1.0"  # of the distribution: pyproject.toml takes it from this line

__all__ = [
    "FORMS",
    "MECHANISMS",
    "Bias",
    "ClipStats",
    "ClippingLayer",
    "Correlation",
    "Layout",
    "NoiseKey",
    "RecordGradients",
    "ReusedNoiseError",
    "SharedGradients",
    "UnsupportedLayerError",
    "WatchedForward",
    "check_single_use",
    "clip_sum_noise",
    "clipped_bias",
    "clipped_conv1d",
    "clipped_conv2d",
    "clipped_embedding",
    "clipped_group_norm",
    "clipped_layer_norm",
    "clipped_linear",
    "clipped_rms_norm",
    "compiling",
    "forget_gradients",
    "layer_norms",
    "max_elements",
    "noise_scales",
    "poisson_mask",
    "privatize_",
    "record_gradients",
    "sample_noise",
    "sensitivity",
    "tail_cutoff",
    "vote_noise",
    "with_clipping",
    "with_kept_gradients",
]
_HOMES = {
    "Bias": "clip_in_backward.modules",
    "ClipStats": "privatize",
    "ClippingLayer": "clip_in_backward.modules",
    "Correlation": "correlation",
    "FORMS": "sampler_limits",
    "Layout": "layout",
    "MECHANISMS": "sampler_limits",
    "NoiseKey": "noise_key",
    "RecordGradients": "clip_in_backward.gradients",
    "ReusedNoiseError": "_reuse",
    "SharedGradients": "clip_in_backward.shared_weights",
    "UnsupportedLayerError": "clip_in_backward.modules",
    "WatchedForward": "clip_in_backward.watched",
    "check_single_use": "clip_in_backward.single_use",
    "clip_sum_noise": "clip_sum",
    "clipped_bias": "clip_in_backward.functions",
    "clipped_conv1d": "clip_in_backward.functions",
    "clipped_conv2d": "clip_in_backward.functions",
    "clipped_embedding": "clip_in_backward.functions",
    "clipped_group_norm": "clip_in_backward.functions",
    "clipped_layer_norm": "clip_in_backward.functions",
    "clipped_linear": "clip_in_backward.functions",
    "clipped_rms_norm": "clip_in_backward.functions",
    "compiling": "_late",
    "forget_gradients": "clip_in_backward.kept",
    "layer_norms": "privatize",
    "max_elements": "sampler_limits",
    "noise_scales": "scales",
    "poisson_mask": "noise",
    "privatize_": "privatize",
    "record_gradients": "clip_in_backward.kept",
    "sample_noise": "noise",
    "sensitivity": "scales",
    "tail_cutoff": "sampler_limits",
    "vote_noise": "votes",
    "with_clipping": "clip_in_backward.modules",
    "with_kept_gradients": "clip_in_backward.kept",
}


def __getattr__(name: str) -> Any:
    """Public names on first use, so that what noise costs can be read without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
