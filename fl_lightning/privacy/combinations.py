"""Options of a `PrivacyConfig` that do not go together; each is refused by both names."""

from __future__ import annotations

from typing import Any

MOST_BANDS = 64
LARGEST_EVALUATION_SHARE = 0.5


def check_joint(config: Any) -> None:
    """Where one factor a record is available.

    Raises:
        ValueError: naming the options and their values.
    """
    if config.clipping != "joint":
        return
    if config.setting != "record+local" or config.noise_form == "grid":
        raise ValueError(
            f"clipping='joint' with setting='{config.setting}' and noise_form="
            f"'{config.noise_form}': only setting='record+local' with noise_form 'wide' or "
            "'fast' has it"
        )


def check_correlation(config: Any) -> None:
    """Where noise that rounds share is proven: everything else is refused.

    Raises:
        ValueError: naming both options and their values.
    """
    if isinstance(config.bands, bool) or not 2 <= config.bands <= MOST_BANDS:
        raise ValueError(f"bands={config.bands} must be in [2, {MOST_BANDS}]")
    if config.correlation == "none":
        if config.bands != 2:
            raise ValueError(f"bands={config.bands} with correlation='none': use 'banded'")
        return
    given, target = config.noise_multiplier, config.epsilon
    values = given if isinstance(given, list) else [given]
    reasons = {
        "setting": (
            config.setting != "client+aggregator",
            "only the trusted server of 'client+aggregator' adds one noise to every round",
        ),
        "mechanism": (config.mechanism != "gaussian", "only Gaussian noise has a proof; use it"),
        "noise_form": (
            config.noise_form == "grid",
            "its multiples of earlier noise lie on no grid; use 'wide' or 'fast'",
        ),
        "cohort_sampling": (
            config.cohort_sampling != "fixed",
            "secret coins ('poisson', the default) have no proof here; use 'fixed'",
        ),
        "noise_multiplier": (
            given is not None and (target is not None or 0 in values),
            f"epsilon={target}: the whole run is charged at once, with noise and without leaving "
            "early; give one of the two, and no multiplier of 0",
        ),
    }
    for name, (wrong, why) in reasons.items():
        if wrong:
            raise ValueError(
                f"{name}={getattr(config, name)!r} with correlation='{config.correlation}': {why}"
            )


def check_evaluation(config: Any) -> None:
    """Where private evaluations are planned, charged and proven.

    Raises:
        ValueError: naming both options and their values.
    """
    every, share = config.evaluate_every, config.evaluation_share
    if isinstance(every, bool) or not isinstance(every, int) or every < 0:
        raise ValueError(f"evaluate_every={every} must be a whole number of at least 0")
    if not 0 < share <= LARGEST_EVALUATION_SHARE:
        raise ValueError(f"evaluation_share={share} must be in (0, {LARGEST_EVALUATION_SHARE}]")
    if not every:
        return
    reasons = {
        "setting": (
            config.setting not in ("record+local", "client+local", "client+aggregator"),
            "only 'record+local', 'client+local' and 'client+aggregator' have private evaluations",
        ),
        "epsilon": (config.epsilon is None, "their noise is calibrated to it; give one"),
        "noise_multiplier": (
            config.noise_multiplier is not None,
            "how many steps it allows beside evaluations is not planned; give epsilon alone",
        ),
        "noise_form": (
            config.noise_form == "grid",
            "their noise has no whole-number form; use 'wide' or 'fast'",
        ),
        "correlation": (
            config.correlation != "none",
            "the whole run is charged at once there; use 'none'",
        ),
    }
    for name, (wrong, why) in reasons.items():
        if wrong:
            raise ValueError(f"{name}={getattr(config, name)!r} with evaluate_every={every}: {why}")
