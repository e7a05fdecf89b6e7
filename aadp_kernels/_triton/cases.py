"""Which kernels a training needs, by what decides about their code. Triton is not imported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple


class Case(NamedTuple):
    """A kernel with what decides about its code.

    Attributes:
        kernel: Name of the kernel.
        dtype: Name of a torch dtype, of tensors and results.
        form, rng, mechanism: Of the noise; mechanism "" of none, "correlated" of Gaussian noise of
            several steps.
        p: Norm of the clipping.
        votes, reference: Whether they are asked for.
        sums: Of clipped sums: "all" at once, or the "first", "middle" or "last" of several batches.
        shape: Of the weight of a layer, (out, in), whose norms are those of products.
    """

    kernel: str
    dtype: str = "float32"
    form: str = "wide"
    rng: str = "philox10"
    mechanism: str = ""
    p: int = 1
    votes: bool = False
    reference: bool = False
    sums: str = "all"
    shape: tuple[int, int] = (256, 256)


class Needs(NamedTuple):
    """What calls will ask for: every combination of it.

    Attributes:
        dtypes: Names of torch dtypes.
        forms, rngs: Of the noise.
        kinds: (mechanism, p) pairs.
        votes, references: Whether calls ask for votes, and subtract a reference.
        sums: See `Case`.
        shapes: (out, in) of layers whose norms are those of products.
    """

    dtypes: Sequence[str] = ("float32",)
    forms: Sequence[str] = ("wide", "fast", "grid")
    rngs: Sequence[str] = ("philox10", "chacha8", "chacha20")
    kinds: Sequence[tuple[str, int]] = (("laplace", 1), ("gaussian", 2))
    votes: Sequence[bool] = (False,)
    references: Sequence[bool] = (False,)
    sums: Sequence[str] = ("all",)
    shapes: Sequence[tuple[int, int]] = ((256, 256),)


def cases(needs: Needs) -> list[Case]:
    """Every kernel once: what is launched first comes first."""
    every = (*_updates(needs), *_noise(needs), *_sums(needs), *_products(needs))
    return list(dict.fromkeys(every))


def _noises(needs: Needs) -> list[tuple[tuple[str, int], str]]:
    """((mechanism, p), form) of all noise but that which is refused."""
    every = product(needs.kinds, needs.forms)
    return [(kind, form) for kind, form in every if (kind[0], form) != ("correlated", "grid")]


def _updates(needs: Needs) -> Iterator[Case]:
    draws = (needs.dtypes, _noises(needs), needs.rngs, needs.votes, needs.references)
    for dtype, ((mechanism, p), form), rng, votes, reference in product(*draws):
        yield Case("privatize_kernel", dtype, form, rng, mechanism, p, votes, reference)
        # Clipping alone: every scale is zero, and no key is asked for.
        yield Case("privatize_kernel", dtype, p=p, votes=votes, reference=reference)


def _noise(needs: Needs) -> Iterator[Case]:
    draws = (needs.dtypes, _noises(needs), needs.rngs)
    for dtype, ((mechanism, _), form), rng in product(*draws):
        if form == "grid":
            yield Case("grid_kernel", dtype, form, rng, mechanism)
            yield Case("grid_kernel", "int64", form, rng, mechanism)
        else:
            yield Case("noise_kernel", dtype, form, rng, mechanism)


def _sums(needs: Needs) -> Iterator[Case]:
    draws = (needs.dtypes, _noises(needs), needs.votes, needs.sums)
    for dtype, ((mechanism, p), form), votes, sums in product(*draws):
        # Norms have no form but the grid's; and there the noise is a kernel of its own.
        grid = form == "grid"
        yield Case("norm_pieces", dtype, "grid" if grid else "wide", p=p, votes=votes)
        if grid or sums in ("first", "middle"):
            yield Case("sum_tiles", dtype, "grid" if grid else "wide", sums=sums)
            continue
        for rng in needs.rngs:
            yield Case("sum_tiles", dtype, form, rng, mechanism, sums=sums)


def _products(needs: Needs) -> Iterator[Case]:
    if "float32" in needs.dtypes:  # other records have their gradients written
        yield from (Case("linear_tiles", shape=shape) for shape in needs.shapes)
        yield Case("sum_slots")
