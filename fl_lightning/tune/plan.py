"""What a search promises and tries: its YAML file, checked before anything is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fl_lightning.accounting.repeat_and_select import (
    CandidateBudget,
    TrialNumber,
    candidate_budget,
)
from fl_lightning.tune.space import FIXED, Space
from fl_lightning.tune.sweep import is_sweep, plan_of

# Evaluated after the last round alone: one score a candidate.
LAST_ROUND = 10**9
_ALLOWED = ("privacy.setting", "privacy.seed", "seed_everything")
_KEYS = ("epsilon", "delta", "trials", "space", "config", "fixed")
Numbers = float | Sequence[float]


@dataclass(frozen=True)
class SearchPlan:
    """A search whose choice is charged. Public.

    Args:
        epsilon, delta: of the whole search; one number, or one a client, as in `PrivacyConfig`.
        number: law of the number of candidates.
        space: law of a candidate's options.
        config: configuration files of all candidates.
        fixed: options of all candidates besides, by dotted name.

    Raises:
        ValueError: naming the option.
    """

    epsilon: Numbers
    delta: Numbers
    number: TrialNumber
    space: Space
    config: Sequence[str] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("epsilon", "delta"):
            values = _list(getattr(self, name))
            if not values or not all(_is_number(v) for v in values):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a number, or a list")
            if not all(0 < v < (1 if name == "delta" else float("inf")) for v in values):
                raise ValueError(f"{name}={getattr(self, name)!r} must be above 0 and finite")
        check_given([f"--{name}" for name in self.fixed])

    @classmethod
    def read(cls, path: Path, given: Mapping[str, Any] | None = None) -> SearchPlan:
        """The plan of a YAML file: of a search, or of a random sweep of W&B.

        Args:
            path: of the file.
            given: what the file lacks, `epsilon` and `delta` for instance.

        Raises:
            ValueError: it has something else than a plan.
            OSError: it cannot be read.
        """
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
        try:
            return cls._of(plan_of(found) if is_sweep(found) else found, given or {})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def _of(cls, found: Any, given: Mapping[str, Any]) -> SearchPlan:
        if not isinstance(found, dict):
            raise ValueError(f"it must have {', '.join(_KEYS)}")
        for key, value in given.items():
            if key in found:
                raise ValueError(f"{key} is {found[key]} there already: --{key}={value} is refused")
        found = {**found, **given}
        unknown = [str(key) for key in found if key not in _KEYS]
        missing = [key for key in ("epsilon", "delta", "space") if key not in found]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is none of {', '.join(_KEYS)}")
        if missing:
            raise ValueError(f"{missing[0]} is missing, there or as --{missing[0]}")
        trials, config = found.get("trials") or {}, found.get("config") or []
        if not isinstance(trials, dict) or not set(trials) <= {"law", "mean", "shape"}:
            raise ValueError(f"trials={trials!r} takes law, mean and shape")
        for key in trials.keys() - {"law"}:
            if not _is_number(trials[key]):
                raise ValueError(f"trials.{key}={trials[key]!r} must be a number")
        config = [config] if isinstance(config, str) else config
        if not isinstance(config, list) or not all(isinstance(c, str) for c in config):
            raise ValueError(f"config={config!r} must be a file, or a list of files")
        fixed = found.get("fixed") or {}
        if not isinstance(fixed, dict):
            raise ValueError(f"fixed={fixed!r} must be options with their values")
        number, space = TrialNumber(**trials), Space(found["space"])
        return cls(found["epsilon"], found["delta"], number, space, tuple(config), fixed)

    def budgets(self, clients: int) -> list[CandidateBudget]:
        """What each client may spend in a candidate, [clients]."""
        known: dict[tuple[float, float], CandidateBudget] = {}
        pairs = zip(*(_repeated(v, clients) for v in (self.epsilon, self.delta)), strict=True)
        return [
            known.setdefault(pair, known.get(pair) or candidate_budget(self.number, *pair))
            for pair in pairs
        ]

    def facts(self, clients: int) -> dict[str, Any]:
        """What the ledger of each candidate says of the search."""
        return {
            "law": self.number.law,
            "mean": self.number.mean,
            "shape": self.number.shape,
            "epsilon": _repeated(self.epsilon, clients),
            "delta": _repeated(self.delta, clients),
            "loss": [budget.loss for budget in self.budgets(clients)],
            "space": {name: dict(law) for name, law in self.space.laws.items()},
        }

    def options(self, shrink: float = 1.0, clients: int = 1) -> dict[str, Any]:
        """Options of every candidate.

        Args:
            shrink: part of its ε that it may spend; less where its choice would cost too much.
            clients: of the run.
        """
        budgets = self.budgets(clients)
        pairs = {
            "epsilon": [b.epsilon * shrink for b in budgets],
            "delta": [b.delta for b in budgets],
        }
        return {
            **{f"privacy.{n}": v[0] if len(set(v)) == 1 else v for n, v in pairs.items()},
            "privacy.evaluate_every": LAST_ROUND,
            "trainer.logger": False,
            "read_test_set": False,
        }


def check_given(arguments: Sequence[str]) -> None:
    """Whether options that are given for all candidates leave the search as it is planned.

    Raises:
        ValueError: naming the option.
    """
    for argument in arguments:
        name = argument.removeprefix("--").partition("=")[0]
        if argument.startswith("--") and name in FIXED and name not in _ALLOWED:
            raise ValueError(
                f"--{name}: a search sets it itself; its file has epsilon, delta and config, and "
                "what candidates log would be shown"
            )


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _repeated(value: Numbers, count: int) -> list[float]:
    values = _list(value)
    return [float(values[k % len(values)]) for k in range(count)]


def given_seed(arguments: Sequence[str], files: Sequence[Mapping[str, Any]]) -> int | None:
    """`privacy.seed` of a simulated search, as its options or files give it; None: none.

    Args:
        arguments: options, each with its value as one word.
        files: what the configuration files have.
    """
    seed: Any = None
    for found in files:
        section = found.get("privacy")
        seed = section.get("seed", seed) if isinstance(section, Mapping) else seed
    for argument in arguments:
        name, _, value = argument.partition("=")
        seed = yaml.safe_load(value) if name == "--privacy.seed" else seed
    return None if seed is None else int(seed)
