"""A privacy configuration as the text that noise is bound to."""

from __future__ import annotations

from typing import Any

from fl_lightning.privacy.config import PrivacyConfig

# Noise of a public seed must stay the same when an option is added, so order and names are these,
# and those with a "?" stand where they differ from their default.
_ORDER = (
    "setting", "mechanism", "adjacency", "epsilon", "delta", "noise_multiplier", "clip_order",
    "clip_norm", "thresholds", "quantile", "quantile_lr", "vote_share", "clip_factor",
    "clipping?", "clip_function?", "votes_on?", "history", "history_rule?", "history_cosine?",
    "allocation", "share_floor", "cohort_sampling?", "correlation?", "bands?",
    "min_survivors?", "evaluate_every?", "evaluation_share?", "nominal_sensitivity?",
    "seed", "noise_form?", "rng",
)  # fmt: skip


def named_options(config: PrivacyConfig) -> str:
    """Every option that decides noise, with its value; later ones only where they are used."""
    defaults, values = flat_options(PrivacyConfig()), flat_options(config)
    always = {name for name in _ORDER if not name.endswith("?")}
    order = dict.fromkeys([*(name.rstrip("?") for name in _ORDER), *values])
    shown = [n for n in order if n in always or values[n] != defaults[n]]
    return f"PrivacyConfig({', '.join(f'{n}={values[n]!r}' for n in shown)})"


def flat_options(config: PrivacyConfig) -> dict[str, Any]:
    """Value of every option by its name, those of the comparator among them."""
    options = dict(vars(config))
    return options | vars(options.pop("comparator"))
