"""What the samplers of noise cannot give: draws beyond a cutoff, streams beyond a length."""

from __future__ import annotations

from aadp_kernels import _validate
from aadp_kernels.addresses import CUTOFFS, words_per_block

MECHANISMS = ("gaussian", "laplace")
FORMS = ("wide", "fast", "grid")


def tail_cutoff(mechanism: str, form: str = "wide") -> float:
    """Largest |noise| / scale that the sampler can give; in the grid form, up to which it is right.

    An accountant charges a delta for the missing tails; a Gaussian beyond 9.419 has mass 4.6e-21.
    The grid form of Laplace noise misses nothing, see `aadp_kernels.grid`.

    | form | gaussian | laplace |
    |---|---|---|
    | wide | 9.419 | 43.67 |
    | fast | 9.493 | 44.36 |
    | grid | 10 | inf |
    """
    _validate.one_of("mechanism", mechanism, MECHANISMS)
    _validate.one_of("form", form, FORMS)
    return CUTOFFS[mechanism, form]


def max_elements(rng: str, form: str = "wide") -> int:
    """Elements that one (step, client, layer) stream can serve.

    | form | ChaCha | Philox |
    |---|---|---|
    | wide | 2^35 | 2^33 |
    | fast | 2^36 | 2^34 |
    | grid | 2^32 | 2^30 |
    """
    _validate.one_of("form", form, FORMS)
    words_an_element = {"wide": 2, "fast": 1, "grid": 16}[form]
    return (1 << 32) * words_per_block(rng) // words_an_element
