"""The space of a search: which options are drawn, from which public laws."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

# What a search promises, whose records it reads, and where it writes, is the same in all trials.
FIXED = (
    "privacy.setting", "privacy.epsilon", "privacy.delta", "privacy.noise_multiplier",
    "privacy.adjacency", "privacy.seed", "privacy.rng", "privacy.noise_form",
    "privacy.evaluate_every", "privacy.evaluation_share", "privacy.cohort_sampling",
    "seed_everything", "run_dir", "ckpt_path", "read_test_set", "tensorboard", "trainer.logger",
    "config",
)  # fmt: skip
FIXED_SECTIONS = ("data.", "checkpoint.", "client_tables.")
Options = dict[str, Any]
_Draw = Callable[[np.random.Generator, Any], Any]


@dataclass(frozen=True)
class Space:
    """Options by their dotted name, each with how it is drawn.

    Args:
        laws: {name: {law: arguments}}. `choice` takes a list, `weighted_choice` pairs of a value
            and its weight. `uniform`, `log_uniform` and `int_uniform` (both ends included) take two
            bounds; `normal` and `log_normal` mean and standard deviation. All but `int_uniform`
            take a third number besides, a step: what is drawn is rounded to multiples of it.

    Raises:
        ValueError: a law that there is not, or an option that all trials must share.
    """

    laws: Mapping[str, Mapping[str, Any]]

    def __post_init__(self) -> None:
        if not isinstance(self.laws, Mapping) or not self.laws:
            raise ValueError(f"space={self.laws!r} must name at least one option")
        for name, law in self.laws.items():
            if name in FIXED or str(name).startswith(FIXED_SECTIONS):
                raise ValueError(f"space: {name} is the same in all trials of a search")
            _check_law(str(name), law)

    def draw(self, generator: np.random.Generator) -> Options:
        """One candidate; each option by itself, in the order of the space."""
        return {name: _LAWS[law](generator, values) for name, law, values in self._parts()}

    def _parts(self) -> list[tuple[str, str, Any]]:
        return [(name, *next(iter(law.items()))) for name, law in self.laws.items()]


def _check_law(name: str, law: Any) -> None:
    known = ", ".join(_LAWS)
    if not isinstance(law, Mapping) or len(law) != 1 or next(iter(law)) not in _LAWS:
        raise ValueError(f"space: {name}={law!r} must be one of {known}, with its values")
    kind, values = next(iter(law.items()))
    if not isinstance(values, list) or not values:
        raise ValueError(f"space: {name}: {kind} takes a list, not {values!r}")
    if kind == "choice":
        return
    if kind == "weighted_choice":
        pairs = all(isinstance(v, list) and len(v) == 2 for v in values)
        if not pairs or not all(_is_number(w) and w >= 0 for _, w in values):
            raise ValueError(f"space: {name}: {kind} takes pairs of value and weight: {values}")
        if not sum(w for _, w in values) > 0:
            raise ValueError(f"space: {name}: {kind}={values} must have a weight above 0")
        return
    if kind == "int_uniform":
        if len(values) != 2 or not all(isinstance(v, int) and _is_number(v) for v in values):
            raise ValueError(f"space: {name}: {kind} takes two integers, not {values}")
    elif len(values) not in (2, 3) or not all(map(_is_number, values)):
        raise ValueError(f"space: {name}: {kind} takes two numbers, and a step, not {values}")
    if len(values) == 3 and not values[2] > 0:
        raise ValueError(f"space: {name}: {kind}={values} must have a step above 0")
    if kind in ("normal", "log_normal"):
        if not values[1] > 0:
            raise ValueError(f"space: {name}: {kind}={values} must have a deviation above 0")
    elif not values[0] < values[1] or (kind == "log_uniform" and values[0] <= 0):
        least = " and above 0" if kind == "log_uniform" else ""
        raise ValueError(f"space: {name}: {kind}={values} must be ascending{least}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _choice(generator: np.random.Generator, values: list[Any]) -> Any:
    return values[int(generator.integers(len(values)))]


def _weighted_choice(generator: np.random.Generator, values: list[Any]) -> Any:
    weights = np.array([weight for _, weight in values], dtype=float)
    return values[int(generator.choice(len(values), p=weights / weights.sum()))][0]


def _int_uniform(generator: np.random.Generator, values: list[int]) -> int:
    return int(generator.integers(values[0], values[1], endpoint=True))


def _stepped(draw: Callable[[np.random.Generator, float, float], float]) -> _Draw:
    """Draws of `draw` with two numbers, rounded to multiples of the third if there is one."""

    def drawn(generator: np.random.Generator, values: list[float]) -> float:
        found = draw(generator, *values[:2])
        return float(round(found / values[2]) * values[2] if len(values) > 2 else found)

    return drawn


def _uniform(generator: np.random.Generator, low: float, high: float) -> float:
    return generator.uniform(low, high)


def _log_uniform(generator: np.random.Generator, low: float, high: float) -> float:
    return math.exp(generator.uniform(math.log(low), math.log(high)))


def _normal(generator: np.random.Generator, mean: float, deviation: float) -> float:
    return generator.normal(mean, deviation)


def _log_normal(generator: np.random.Generator, mean: float, deviation: float) -> float:
    return math.exp(generator.normal(mean, deviation))


_LAWS: dict[str, _Draw] = {
    "choice": _choice,
    "weighted_choice": _weighted_choice,
    "int_uniform": _int_uniform,
    "uniform": _stepped(_uniform),
    "log_uniform": _stepped(_log_uniform),
    "normal": _stepped(_normal),
    "log_normal": _stepped(_log_normal),
}
