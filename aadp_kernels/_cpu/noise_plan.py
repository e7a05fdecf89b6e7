"""Which noise a pass over memory writes, as the kernels take it."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from aadp_kernels._cpu.rng import STATE_WORDS, first_words, rounds_and_blocks
from aadp_kernels.addresses import DOMAINS, LAYER_BITS
from aadp_kernels.contract import Noise


class NoiseKind(NamedTuple):
    """The options of noise that compiled code reads. Releases of equal options share one.

    Attributes:
        layer_words: int64 [L], the word of the address that names layer and domain.
        rounds: Rounds of the generator.
        blocks: Blocks of the generator that a tile takes.
        fast: Whether the noise is of the fast form.
        gaussian: Whether it is Gaussian.
    """

    layer_words: np.ndarray
    rounds: int
    blocks: int
    fast: bool
    gaussian: bool

    @staticmethod
    @lru_cache(maxsize=64)
    def of(rng: str, mechanism: str, form: str, first: int, layers: int) -> NoiseKind:
        """For `layers` layers, of which the first has the number `first`."""
        fast = form == "fast"
        domain = DOMAINS[f"fast_{mechanism}" if fast else mechanism] << LAYER_BITS
        words = np.arange(first, first + layers) + domain
        return NoiseKind(words, *rounds_and_blocks(rng), fast, mechanism == "gaussian")


class NoisePlan(NamedTuple):
    """The noise that `sum_and_write.write_units` adds to the clipped values.

    Attributes:
        scale: float64 [K, L] noise scales.
        clients: int64 [K] ids.
        states: uint32 [p, 24], first words of the generator: of this step, then of each step that
            is drawn again.
        coefficients: float64 [p], factors of the noise of these steps; the first is 1.
        kind: Options of the noise, and the address words of the layers.
    """

    scale: np.ndarray
    clients: np.ndarray
    states: np.ndarray
    coefficients: np.ndarray
    kind: NoiseKind

    @classmethod
    def build(cls, noise: Noise, scale: np.ndarray, first: int = 0) -> NoisePlan:
        """For L layers from `first` on; `scale` is [K, L]."""
        kind = NoiseKind.of(noise.rng, noise.mechanism, noise.form, first, scale.shape[1])
        words, coefficients = words_of(noise)
        states = np.array(words, np.uint32).reshape(-1, STATE_WORDS)
        return cls(scale, noise.clients.numpy(), states, np.array(coefficients), kind)


def words_of(noise: Noise) -> tuple[list[int], list[float]]:
    """`states` one after another, and `coefficients`, of a `NoisePlan`."""
    words = first_words(noise.rng, noise.key_words, int(noise.step))
    coefficients = [1.0]
    for term in noise.again:
        words += first_words(noise.rng, term.key_words, int(term.step))
        coefficients.append(float(term.coefficient))
    return words, coefficients
