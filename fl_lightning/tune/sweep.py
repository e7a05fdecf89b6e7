"""A sweep of Weights & Biases as the plan of a charged search: its file, run another way.

W&B's controller sees the score of every run and may choose the next one by it; no proof charges
that. What a sweep's file says of a search can be kept all the same: which options are drawn from
which laws, which are fixed, and the command. Its keys are those of W&B's documentation of sweep
configurations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

PROGRAM = "fl_lightning.fit"
# What W&B replaces, and the command itself; what is left are options of fit.
_COMMAND = ("${env}", "${interpreter}", "-m", "${program}", PROGRAM, "aadp", "fit", "${args}")
_IGNORED = ("program", "project", "entity", "name", "description")
_KEYS = ("method", "metric", "parameters", "command", "run_cap", *_IGNORED)
_SCORES = ("val_private_accuracy", "sim_only/val_accuracy")
Found = Mapping[str, Any]


def is_sweep(found: Any) -> bool:
    """Whether a file's content is a sweep, which has `parameters` where a search has `space`."""
    return isinstance(found, Mapping) and "parameters" in found


def plan_of(sweep: Found) -> dict[str, Any]:
    """A sweep as the content of a search's file, without ε and δ, which W&B does not know.

    Args:
        sweep: content of the sweep's YAML file.

    Returns:
        `space`, `fixed` (options of all candidates), `config` (files) and, where the sweep has a
        `run_cap`, `trials` with it as the mean: the number itself must be random.

    Raises:
        ValueError: naming what a charged search cannot do.
    """
    for key in sweep:
        if key == "early_terminate":
            raise ValueError("early_terminate: looking at a run before its end is not charged")
        if key not in _KEYS:
            raise ValueError(f"{key!r} is none of a sweep's {', '.join(_KEYS)}")
    if sweep.get("method") != "random":
        raise ValueError(
            f"method={sweep.get('method')!r} must be random: the charge holds for candidates that "
            "do not depend on the scores of others"
        )
    if sweep.get("program", PROGRAM) != PROGRAM:
        raise ValueError(f"program={sweep['program']!r} must be {PROGRAM}")
    _check_metric(sweep.get("metric", {}))
    config, fixed = _command(sweep.get("command", []))
    space: dict[str, Any] = {}
    for name, given in _flat(sweep["parameters"]).items():
        law = _law(name, given)
        if name == "read_test_set":
            continue  # the search itself decides that
        if "constant" in law:
            fixed[name] = law["constant"]
        else:
            space[name] = law
    plan = {"space": space, "fixed": fixed, "config": config}
    if "run_cap" in sweep:
        plan["trials"] = {"mean": sweep["run_cap"]}
    return plan


def _check_metric(metric: Any) -> None:
    if not isinstance(metric, Mapping):
        raise ValueError(f"metric={metric!r} must have name and goal")
    if "target" in metric:
        raise ValueError("metric.target: stopping at a score changes the law of the number of runs")
    if metric and metric.get("goal") != "maximize":
        raise ValueError(f"metric.goal={metric.get('goal')!r} must be maximize")
    if metric and metric.get("name") not in _SCORES:
        raise ValueError(
            f"metric.name={metric.get('name')!r} must be {' or '.join(_SCORES)}: a charged search "
            "chooses by the private accuracy of held-out records"
        )


def _command(words: Any) -> tuple[list[str], dict[str, Any]]:
    """Configuration files and further options of a sweep's command."""
    if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
        raise ValueError(f"command={words!r} must be a list of words")
    joined: list[str] = []
    for word in (w for w in words if w not in _COMMAND):
        if word.startswith("--") or not joined or "=" in joined[-1]:
            joined.append(word)
        else:
            joined[-1] += f"={word}"
    config: list[str] = []
    fixed: dict[str, Any] = {}
    for word in joined:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not equals or "${" in word:
            raise ValueError(
                f"command: {word!r} must be an option with its value, beside {' '.join(_COMMAND)}"
            )
        if name == "config":
            config.append(value)
        else:
            fixed[name] = value
    return config, fixed


def _flat(parameters: Any, before: str = "") -> dict[str, Found]:
    """Parameters by dotted name; nested ones have `parameters` of their own."""
    if not isinstance(parameters, Mapping) or not parameters:
        raise ValueError(f"parameters={parameters!r} must name at least one option")
    found: dict[str, Found] = {}
    for name, given in parameters.items():
        if not isinstance(given, Mapping):
            raise ValueError(f"parameters: {before}{name}={given!r} must have values or a law")
        nested = given.get("parameters")
        if nested is None:
            found[f"{before}{name}"] = given
        else:
            found |= _flat(nested, f"{before}{name}.")
    return found


def _law(name: str, given: Found) -> dict[str, Any]:
    """The law of an option, as `Space` has it, or {"constant": value}."""
    kind = given.get("distribution") or _implied(given)
    if not isinstance(kind, str) or kind not in _LAWS:
        raise ValueError(
            f"parameters: {name}: distribution={kind!r} must be one of {', '.join(_LAWS)}"
        )
    keys, law = _LAWS[kind]
    values = {"q": 1, "mu": 0, "sigma": 1} | dict(given)
    missing = [key for key in keys if key not in values]
    unknown = [key for key in given if key not in (*keys, "distribution", "probabilities")]
    if missing or unknown:
        wrong = f"{missing[0]} is missing" if missing else f"{unknown[0]!r} is unknown"
        raise ValueError(f"parameters: {name}: {wrong} of {kind}, which has {', '.join(keys)}")
    if "probabilities" in given:
        return _weighted(name, kind, given)
    try:
        return law(*(values[key] for key in keys))
    except (TypeError, OverflowError):
        raise ValueError(f"parameters: {name}: {kind} takes numbers, not {dict(given)}") from None


def _implied(given: Found) -> str | None:
    """The law that W&B takes where none is named."""
    if "value" in given:
        return "constant"
    if "values" in given:
        return "categorical"
    bounds = [given.get(key) for key in ("min", "max")]
    if all(isinstance(b, int) for b in bounds):
        return "int_uniform"
    if None not in bounds:
        return "uniform"
    return "normal" if "mu" in given or "sigma" in given else None


def _weighted(name: str, kind: str, given: Found) -> dict[str, Any]:
    values, weights = given.get("values"), given["probabilities"]
    if kind != "categorical" or not isinstance(weights, list) or len(weights) != len(values or []):
        raise ValueError(
            f"parameters: {name}: probabilities={weights!r} must be one number for each of values"
        )
    return {"weighted_choice": [list(pair) for pair in zip(values or [], weights, strict=True)]}


def _of(law: str) -> Callable[..., dict[str, Any]]:
    return lambda *numbers: {law: list(numbers)}


def _exponents(low: float, high: float, *step: float) -> dict[str, Any]:
    return {"log_uniform": [math.exp(low), math.exp(high), *step]}


_RANGE, _BELL = ("min", "max"), ("mu", "sigma")
_LAWS: dict[str, tuple[tuple[str, ...], Callable[..., dict[str, Any]]]] = {
    "constant": (("value",), lambda value: {"constant": value}),
    "categorical": (("values",), lambda values: {"choice": values}),
    "int_uniform": (_RANGE, _of("int_uniform")),
    "uniform": (_RANGE, _of("uniform")),
    "q_uniform": ((*_RANGE, "q"), _of("uniform")),
    "log_uniform": (_RANGE, _exponents),
    "q_log_uniform": ((*_RANGE, "q"), _exponents),
    "log_uniform_values": (_RANGE, _of("log_uniform")),
    "q_log_uniform_values": ((*_RANGE, "q"), _of("log_uniform")),
    # log(1/X) is even between -max and -min where log(X) is between min and max.
    "inv_log_uniform": (_RANGE, lambda low, high: _exponents(-high, -low)),
    "inv_log_uniform_values": (_RANGE, _of("log_uniform")),
    "normal": (_BELL, _of("normal")),
    "q_normal": ((*_BELL, "q"), _of("normal")),
    "log_normal": (_BELL, _of("log_normal")),
    "q_log_normal": ((*_BELL, "q"), _of("log_normal")),
}
