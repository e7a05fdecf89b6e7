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


@dataclass(frozen=True)
class Space:
    """Options by their dotted name, each with how it is drawn.

    Args:
        laws: {name: {law: arguments}}: `choice` of a list, `uniform` or `log_uniform` between two
            numbers.

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
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not numbers or len(values) != 2 or not all(map(math.isfinite, values)):
        raise ValueError(f"space: {name}: {kind} takes two numbers, not {values}")
    if not values[0] < values[1] or (kind == "log_uniform" and values[0] <= 0):
        least = " and above 0" if kind == "log_uniform" else ""
        raise ValueError(f"space: {name}: {kind}={values} must be ascending{least}")


def _choice(generator: np.random.Generator, values: list[Any]) -> Any:
    return values[int(generator.integers(len(values)))]


def _uniform(generator: np.random.Generator, values: list[float]) -> float:
    return float(generator.uniform(*values))


def _log_uniform(generator: np.random.Generator, values: list[float]) -> float:
    return float(math.exp(generator.uniform(*map(math.log, values))))


_LAWS: dict[str, Callable[[np.random.Generator, Any], Any]] = {
    "choice": _choice,
    "uniform": _uniform,
    "log_uniform": _log_uniform,
}
