"""Private steps in JAX: by hand, and by jax_privacy. Runs in an environment of its own.

The networks are those of `bench.steps`, written in jnp with the weights of torch.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Params = dict[str, Array]


def dense(params: Params, name: str, x: Array) -> Array:
    """x Wᵀ + b."""
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def mlp(params: Params, x: Array) -> Array:
    """Logits of a record, as `fl_lightning.models.MLP`."""
    return dense(params, "fc2", jnp.tanh(dense(params, "fc1", x.reshape(-1))))


def cnn(params: Params, x: Array) -> Array:
    """Logits of a record, as `fl_lightning.models.CNN` with strides of 2."""
    x = x[None]
    for name in ("conv1", "conv2"):
        weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
        pad = (weight.shape[-1] - 2) // 2
        x = jax.lax.conv_general_dilated(
            x, weight, (2, 2), [(pad, pad), (pad, pad)], dimension_numbers=("NCHW", "OIHW", "NCHW")
        )
        x = jnp.tanh(x + bias[:, None, None])
    return dense(params, "fc1", x.reshape(-1))


def transformer(params: Params, x: Array) -> Array:
    """Logits of the tokens of a record, as `bench.steps.Transformer`."""
    h = params["token.weight"][x] + params["place.weight"][: len(x)]
    for block in ("blocks.0", "blocks.1"):
        h = h + attention(params, block, normed(params, f"{block}.norm1", h))
        inner = dense(params, f"{block}.up", normed(params, f"{block}.norm2", h))
        h = h + dense(params, f"{block}.down", jax.nn.gelu(inner, approximate=False))
    return dense(params, "head", normed(params, "norm", h))


def normed(params: Params, name: str, x: Array) -> Array:
    """Layer normalisation with weight and bias."""
    centred = x - x.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return centred * scale * params[f"{name}.weight"] + params[f"{name}.bias"]


def attention(params: Params, block: str, x: Array, heads: int = 4) -> Array:
    """Causal attention of a record [T, width]."""
    length, width = x.shape
    q, k, v = (
        part.reshape(length, heads, -1).swapaxes(0, 1)
        for part in jnp.split(dense(params, f"{block}.qkv", x), 3, -1)
    )
    scores = q @ k.swapaxes(1, 2) / math.sqrt(width // heads)
    seen = jnp.tril(jnp.ones((length, length), bool))
    mixed = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)) @ v
    return dense(params, f"{block}.out", mixed.swapaxes(0, 1).reshape(length, width))


NETWORKS = {"MLP": mlp, "CNN": cnn, "transformer": transformer}
# (params, x, y, key, scale) -> noisy sums of clipped gradients.
Gradient = Callable[[Params, Array, Array, Array, Array], Params]


def by_hand(loss: Callable[..., Array], clips: list[float], members: list[list[str]]) -> Gradient:
    """vmap(grad), one norm for each layer, the weighted sum and the noise."""

    def gradient(params: Params, x: Array, y: Array, key: Array, scale: Array) -> Params:
        records = jax.vmap(jax.grad(loss), (None, 0, 0))(params, x, y)
        sums = {}
        for names, clip in zip(members, clips, strict=True):
            square = sum((records[n] ** 2).reshape(len(x), -1).sum(1) for n in names)
            factor = jnp.minimum(1.0, clip / jnp.sqrt(square))
            for name in names:
                sums[name] = jnp.tensordot(factor, records[name], 1)
        keys = dict(zip(sums, jax.random.split(key, len(sums)), strict=True))
        return {n: s + scale * jax.random.normal(keys[n], s.shape) for n, s in sums.items()}

    return gradient


def by_jax_privacy(loss: Callable[..., Array], clip: float, nan_safe: bool) -> Gradient:
    """jax_privacy: clipped_grad with one norm for everything, then its Gaussian privatizer."""
    from jax_privacy import clipping, noise_addition

    summed = clipping.clipped_grad(
        loss, l2_clip_norm=clip, batch_argnums=(1, 2), keep_batch_dim=False, nan_safe=nan_safe
    )

    def gradient(params: Params, x: Array, y: Array, key: Array, scale: Array) -> Params:
        sums = summed(params, x, y)
        privatizer = noise_addition.gaussian_privatizer(stddev=scale, prng_key=key)
        return privatizer.update(sums, privatizer.init(sums))[0]

    return gradient


def without_privacy(loss: Callable[..., Array]) -> Gradient:
    """The gradient of the batch and nothing else: what the private steps of JAX start from."""

    def gradient(params: Params, x: Array, y: Array, key: Array, scale: Array) -> Params:
        return jax.grad(lambda p: jax.vmap(loss, (None, 0, 0))(p, x, y).sum())(params)

    return gradient


def build(
    network: str, variant: str, parameters: dict[str, Any], x: Any, y: Any, clips: list[float],
    members: list[list[str]], lr: float,
) -> tuple[str, Callable[[float], list[Any]]]:  # fmt: skip
    """Version, and a step from the first parameters: (noise scale) -> gradients.

    Args:
        network: a name of `NETWORKS`.
        variant: "no privacy", "vmap", "jax_privacy" or "jax_privacy, nan_safe".
        parameters: tensors by name.
        x, y: the batch.
        clips: of each group of `members`.
        members: names of the parameters under one norm.
        lr: of a step along the sum.
    """
    if network not in NETWORKS:
        raise ImportError(f"{network} is not written in jnp")
    forward = NETWORKS[network]

    def loss(params: Params, x: Array, y: Array) -> Array:
        logits = forward(params, x).reshape(-1, forward_classes)
        scores = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(scores, y.reshape(-1, 1), 1).sum()

    params = {name: jnp.asarray(value.numpy()) for name, value in parameters.items()}
    x, y = (jnp.asarray(t.numpy()) for t in (x, y))
    forward_classes = forward(params, x[0]).shape[-1]
    about = f"jax {version('jax')}"
    if variant == "no privacy":
        gradient = without_privacy(loss)
    elif variant == "vmap":
        gradient = by_hand(loss, clips, members)
    else:
        gradient = by_jax_privacy(loss, clips[0], variant.endswith("nan_safe"))
        about = f"jax-privacy {version('jax-privacy')}, {about}"

    @jax.jit
    def step(params: Params, x: Array, y: Array, key: Array, scale: Array) -> tuple:
        found = gradient(params, x, y, key, scale)
        return found, {name: value - lr * found[name] for name, value in params.items()}

    root, number = jax.random.key(0), [0]

    def run(scale: float) -> list[Any]:
        number[0] += 1
        key = jax.random.fold_in(root, number[0])
        found, _ = jax.block_until_ready(step(params, x, y, key, jnp.float32(scale)))
        return [found[name] for name in params]

    return about, run
