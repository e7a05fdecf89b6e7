"""Options of a `PrivacyConfig` that do not go together; each is refused by both names."""

from __future__ import annotations

from typing import Any

MOST_BANDS = 64


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
