"""Per-layer clipping and secure noise for differentially private training."""

from aadp_kernels._dispatch import without_compiling
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
from aadp_kernels.noise import (
    FORMS,
    MECHANISMS,
    max_elements,
    poisson_mask,
    sample_noise,
    tail_cutoff,
)
from aadp_kernels.noise_key import NoiseKey
from aadp_kernels.privatize import ClipStats, layer_norms, privatize_
from aadp_kernels.sensitivity import noise_scales, sensitivity, vote_noise

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
    "without_compiling",
]
